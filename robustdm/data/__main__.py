"""Entry point: `python -m robustdm.data PATH` looks at a data set before anything is trained on it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import tyro

from robustdm.cli import guard
from robustdm.errors import UsageError
from robustdm.runs.config import TrainConfig

# Images that mean and deviation are taken over, drawn at random; more of them change no digit.
_SAMPLE = 4096
_PAIRS = 32
_WARM_UP = 3


@dataclass(frozen=True)
class DataConfig:
    """Which data, and what to do with them. Flags that training has too mean what they mean there.
    """

    path: tyro.conf.Positional[Path]
    """A folder, zip, lmdb, .npy, .npz, CIFAR archive, or hf:NAME[:SPLIT]."""
    data: Literal["images", "cifar10", "cifar100"] = "images"
    """What it is; images finds out, except for CIFAR in folders."""
    resolution: int | None = None
    """Side of the images in pixels; by default that of most of them, at most 256."""
    crop: int = 0
    """Side of the square cut out of the middle of every picture before it is resized."""
    channels: Literal[1, 3, 4] | None = None
    """Channels of the images; by default what the files have."""
    value_range: tuple[float, float] | None = None
    """.npy, .npz: the two values that become -1 and 1; what lies beyond them is kept."""
    stream: bool = False
    """hf: read the data set as a stream."""
    shuffle_buffer: int = 4096
    """--stream: so many images are shuffled at a time."""
    corrupt_kind: Literal["gaussian", "salt_pepper", "missing", "jpeg", "outliers"] = "gaussian"
    """How images are corrupted."""
    corrupt_fraction: float = 0.9
    """Share of the images that are corrupted."""
    corrupt_sigma: float = 0.2
    """gaussian: standard deviation of the noise; data range is [-1, 1]."""
    corrupt_pixels: float = 0.1
    """salt_pepper, missing: share of the pixels that are hit."""
    corrupt_quality: int = 10
    """jpeg: quality, 1 to 95."""
    corrupt_with: Path | None = None
    """outliers: images that replace those of the set."""
    seed: int = 0
    """Decides the corruption, and which images are shown."""
    preview: Path | None = None
    """Write a grid of images here, each beside what training sees of it."""
    speed: bool = False
    """Measure how many images per second are read for training."""
    batch_size: int = 64
    """--speed: images per step."""
    workers: int = 4
    """--speed: processes that decode."""
    resident_gib: float = 8.0
    """--speed: sets up to this size (as uint8) are held on the device; 0 reads while training."""
    flip: bool = False
    """--speed: flip images left to right at random."""
    seconds: float = 10.0
    """--speed: how long to measure."""
    device: str = "auto"
    """--speed: where the images go: auto, cpu, cuda or cuda:N."""


def main(argv: Sequence[str] | None = None) -> None:
    """Parse flags, look, print.

    Raises:
        UsageError: for a wrong flag, or a path without images.
        RunError: if reading fails.
    """
    look(tyro.cli(
        DataConfig, args=argv, prog="python -m robustdm.data",
        description="Counts, sizes and broken files of a data set, and how it looks corrupted.",
    ))


def look(config: DataConfig) -> dict:
    """Print what a data set is; write a preview and measure its speed if asked for.

    Returns:
        What was printed, by name.

    Raises:
        UsageError: for a wrong setting, or a path without images.
        RunError: if reading fails.
    """
    from robustdm.data.images import image_set
    from robustdm.ops.stream import shuffled

    if config.seconds <= 0:
        raise UsageError(f"seconds is {config.seconds}: it must be positive")
    shared = {f.name for f in fields(TrainConfig)} & {f.name for f in fields(DataConfig)}
    train, data, sizes = image_set(
        {name: getattr(config, name) for name in shared} | {"data_dir": config.path})
    indices = shuffled(config.seed, 0, len(data))[:_SAMPLE]
    # In pieces: large pictures are decoded here, and thousands of them do not fit.
    count, sums, squares = 0, 0.0, 0.0
    for piece in indices.split(64):
        pixels = data.clean(piece).transpose(0, 1).flatten(1).double()
        count += pixels.shape[1]
        sums, squares = sums + pixels.sum(dim=1), squares + pixels.square().sum(dim=1)
    mean = sums / count
    std = (squares / count - mean.square()).clamp(min=0).sqrt()
    found = {
        "data": data.describe(),
        "stored sizes": _sizes_text(sizes),
        "channels": data.shape[0],
        "mean": [round(v, 4) for v in mean.tolist()],
        "std": [round(v, 4) for v in std.tolist()],
        "broken": len(data.quarantine),
    }
    for name, value in found.items():
        of = f" (data range [-1, 1], over {len(indices)} images)" if name in ("mean", "std") else ""
        print(f"{name:<13} {value}{of}")
    for name, reason in data.quarantine[:20]:
        print(f"  {name}: {reason}")
    if len(data.quarantine) > 20:
        print(f"  and {len(data.quarantine) - 20} more")
    if config.preview is not None:
        _write_preview(config.preview, data, indices[:_PAIRS])
        print(f"preview       {config.preview}: each image beside what training sees of it")
    if config.speed:
        found["img_per_s"] = _speed(config, data, train)
        print(f"loader        {found['img_per_s']:,.0f} img/s in batches of {config.batch_size}, "
              f"{_how(data, config)}")
    return found


def _sizes_text(sizes: Counter) -> str:
    shown = ", ".join(f"{width}x{height}: {count}" for (width, height), count in
                      sizes.most_common(3))
    if len(sizes) <= 3:
        return shown
    short = [min(size) for size in sizes]
    return f"{shown}, {len(sizes) - 3} others; short sides from {min(short)} to {max(short)}"


def _write_preview(path: Path, data, indices) -> None:
    import torch

    from robustdm.reporting.images import save_grid

    pairs = torch.stack([data.clean(indices), data.batch(indices)], 1).flatten(0, 1)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_grid(path, pairs, columns=8)
    except (OSError, ValueError) as error:
        raise UsageError(f"preview is {str(path)!r}: it cannot be written ({error})") from None


def _speed(config: DataConfig, data, train: TrainConfig) -> float:
    """Images per second of the training stream, after the workers have started."""
    import torch

    from robustdm.data import batches

    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError):
        raise UsageError(f"device is {config.device!r}, which is not here: use cpu") from None
    stream = batches(data, train, 0, device)

    def wait() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    for _ in range(_WARM_UP):
        next(stream)
    begin, count = wait(), 0
    while time.perf_counter() < begin + config.seconds:
        next(stream)
        count += config.batch_size
    return count / (wait() - begin)


def _how(data, config: DataConfig) -> str:
    if getattr(data, "resident", False):
        return "held in memory: they are corrupted where the step diffuses them"
    return f"decoded by {config.workers} workers" if config.workers else "decoded in this process"


if __name__ == "__main__":
    guard(main)
