"""Entry point: `python -m robustdm.denoise DATA --run RUN` removes the noise of your own pictures.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from robustdm.cli import guard
from robustdm.errors import UsageError
from robustdm.flags import DrawFlags, parse_flags

if TYPE_CHECKING:
    from torch import Tensor

RECORD = "denoise.json"
_SHOWN = 32


@dataclass(frozen=True)
class DenoiseConfig(DrawFlags):
    """Which pictures, and which run knows their like."""

    path: tyro.conf.Positional[Path]
    """Pictures, as for training: a folder, zip, lmdb, .npy or .npz; they are brought to the size of
    the run's."""
    run: Path
    """Run directory of `python -m robustdm.train --objective ddpm`, trained on noisy pictures."""
    sigma: float | None = None
    """Standard deviation of the noise; measured on the pictures if not given."""
    stop: float = 0.5
    """Noise of the state that the pictures are taken for, in units of sigma: less keeps detail."""
    all: bool = False
    """Also correct the pictures that look clean; they lose detail."""
    value_range: tuple[float, float] | None = None
    """.npy, .npz: the two values that become -1 and 1; what lies beyond them is kept."""
    checkpoint: int | None = None
    """Step of the checkpoint to use; the newest sound one if not given."""
    out: Path | None = None
    """Folder for the pictures; RUN/denoised if not given."""
    overwrite: bool = False
    """Replace what an earlier call wrote to --out."""


def main(argv: Sequence[str] | None = None) -> None:
    """Parse flags, denoise, write.

    Raises:
        UsageError: for a wrong flag, run or set.
        RunError: if reading or writing fails.
    """
    run(parse_flags(
        DenoiseConfig, argv, prog="python -m robustdm.denoise",
        description="Remove the noise of pictures with a run that was trained on their like.",
    ))


def run(config: DenoiseConfig) -> dict:
    """Denoise a set of pictures.

    Writes ``samples.npz`` (float32, as `robustdm.sample` does), ``00000.png`` and so on, and
    ``grid.png``, pictures before and after.

    Returns:
        What denoise.json holds.

    Raises:
        UsageError: for a wrong run or set, a run that removes noise itself, or clean pictures.
        RunError: if reading or writing fails.
    """
    import torch

    from robustdm.data.images import image_set
    from robustdm.device import resolve_device
    from robustdm.method.baselines import denoise
    from robustdm.method.sampling import batch_or_default, enough_memory
    from robustdm.models.load_run import load_run
    from robustdm.runs.rundir import check_out

    out = config.run / "denoised" if config.out is None else config.out
    check_out(out, RECORD, config.overwrite)
    device = resolve_device(config.device)
    trained = load_run(config.run, config.ema, device, config.checkpoint)
    if trained.config.objective != "ddpm":
        raise UsageError(f"run is {str(config.run)!r}: it was trained with "
                         f"{trained.config.objective}, which removes noise itself; take a plain "
                         "DDPM")
    if not trained.is_image:
        raise UsageError(f"run is {str(config.run)!r}: it was trained on points, not on images")
    # Brought to their size as the run's own pictures were.
    _, data, _ = image_set({
        "data_dir": config.path, "resolution": trained.shape[-1], "channels": trained.shape[0],
        "crop": trained.config.crop, "value_range": config.value_range, "corrupt_fraction": 0.0})
    images = torch.cat([data.clean(part) for part in torch.arange(len(data)).split(256)])
    sigma, noisy = _noise(images, config)
    result, size = images.clone(), batch_or_default(config.batch_size, trained.shape)
    with enough_memory(size):
        for part in noisy.nonzero().flatten().split(size):
            x = images[part].to(device)
            result[part] = denoise(trained.model, trained.schedule, x, sigma, config.stop).cpu()
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items()}
    record = settings | {"sigma": sigma, "items": len(images), "corrected": int(noisy.sum()),
                         "step": trained.step}
    _write(out, images, result, record)
    print(f"{record['corrected']} of {len(images)} items corrected for noise of sd {sigma:.3g}: "
          f"{out}")
    return record


def _noise(images: Tensor, config: DenoiseConfig) -> tuple[float, Tensor]:
    """Its standard deviation, and (N,) which items carry it."""
    import torch

    from robustdm.metrics.noise import TooFewItems, mixture

    everything = torch.ones(len(images), dtype=torch.bool)
    if not 0 < config.stop < float("inf"):
        raise UsageError(f"stop is {config.stop}: it must be a positive number")
    if config.sigma is not None and not 0 < config.sigma < float("inf"):
        raise UsageError(f"sigma is {config.sigma}: it must be a positive number")
    try:
        found = mixture(images)
    except TooFewItems as error:
        if config.sigma is None:
            raise UsageError(f"sigma is not given, and {error}") from None
        return config.sigma, everything
    if not found.share and config.sigma is None:
        raise UsageError(f"path is {str(config.path)!r}: its items look clean, sd {found.rms:.2g}; "
                         "give --sigma to correct them all the same")
    sigma = found.sigma if config.sigma is None else config.sigma
    return sigma, everything if config.all or not found.share else found.noisy


def _write(out: Path, before: Tensor, after: Tensor, record: dict) -> None:
    import numpy as np
    import torch

    from robustdm.errors import RunError
    from robustdm.reporting import images

    try:
        out.mkdir(parents=True, exist_ok=True)
        for path in out.glob("[0-9][0-9][0-9][0-9][0-9]*.png"):
            path.unlink()
        # First, since it marks the folder as one that --overwrite may clear.
        (out / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        np.savez(out / "samples.npz", samples=after.numpy())
        images.save_images(out, after.numpy())
        pairs = torch.stack([before[:_SHOWN], after[:_SHOWN]], 1).flatten(0, 1)
        images.save_grid(out / "grid.png", pairs.numpy(), columns=8)
    except OSError as error:
        raise RunError(f"cannot write to {out} ({error.strerror}): name another --out") from error


if __name__ == "__main__":
    guard(main)
