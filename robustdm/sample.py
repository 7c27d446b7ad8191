"""Entry point: `python -m robustdm.sample --run DIR` generates samples from a trained run."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from robustdm.cli import guard
from robustdm.errors import RunError
from robustdm.flags import ComputeFlags, SamplingFlags, parse_flags

GRID_SAMPLES = 64
RECORD = "sample.json"


@dataclass(frozen=True)
class SampleConfig(ComputeFlags, SamplingFlags):
    """What to generate, how, and where to put it."""

    run: Path
    """Run directory of `python -m robustdm.train`."""
    out: Path | None = None
    """Folder for the samples; RUN/generated if not given."""
    num: int = 64
    """How many samples."""
    checkpoint: int | None = None
    """Step of the checkpoint to use; the newest sound one if not given."""
    overwrite: bool = False
    """Replace the samples that an earlier call wrote to --out."""


def main(argv: Sequence[str] | None = None) -> None:
    """Parse flags, generate, write.

    Raises:
        UsageError: for a wrong flag, run or folder.
        RunError: if sampling or writing fails.
    """
    config = parse_flags(
        SampleConfig, argv, prog="python -m robustdm.sample",
        description="Generate samples from a trained run.",
    )
    generate(config)


def generate(config: SampleConfig) -> Path:
    """Generate samples from a run and write them to a folder.

    Writes ``samples.npz`` (key "samples", float32, (num, *shape), unclipped), ``sample.json``
    and, for images, ``00000.png`` and so on and ``grid.png`` (the first 64). Started by torchrun,
    each process generates its part, and rank 0 writes.

    Returns:
        The folder.

    Raises:
        UsageError: for a wrong setting, run or folder.
        RunError: if sampling or writing fails.
    """
    from robustdm.distributed import join
    from robustdm.host import threads_restored

    with threads_restored(), join(config.device) as ranks:
        return _generate(config, ranks)


def _generate(config: SampleConfig, ranks) -> Path:
    import torch

    from robustdm.data.noise import noise_of_run
    from robustdm.device import resolve_device
    from robustdm.method.baselines import from_flags
    from robustdm.method.sampling import (
        batch_or_default,
        check_settings,
        enough_memory,
        sample,
        timesteps,
    )
    from robustdm.models.inference import fast_network
    from robustdm.models.load_run import load_run
    from robustdm.reporting.progress import sampling_progress
    from robustdm.runs.rundir import check_out

    out = config.run / "generated" if config.out is None else config.out
    with ranks.together():
        if ranks.main:
            check_out(out, RECORD, config.overwrite)
        device = resolve_device(config.device)
        run = load_run(config.run, config.ema, device, config.checkpoint)
    ranks.same_weights("the step and the bits of the weights", run.model.parameters(),
                       run.step)
    # Clipping hides noise at the edge of the range, so only runs that ask for it get it.
    clip = run.config.clip_samples and run.is_image
    batch_size = batch_or_default(config.batch_size, run.shape)
    settings = dict(num=config.num, sampler=config.sampler, steps=config.steps,
                    spacing=config.spacing, variance=config.variance, eta=config.eta,
                    batch_size=batch_size)
    with ranks.together():
        baseline = from_flags(config, lambda: noise_of_run(config.run),
                              run.config.objective)
    if baseline is not None:
        settings |= baseline.settings
        baseline.finish(torch.zeros(1, *run.shape))  # blurs no points: say so now
    check_settings(run.schedule, **settings)
    steps = len(timesteps(run.schedule, config.steps, config.spacing, settings.get("stop", 0.0)))
    part, batch_size = ranks.batches(config.num, batch_size)
    settings |= dict(num=len(part), first_index=part.start, batch_size=batch_size)
    network = fast_network(
        run.model, precision=config.precision, compile=config.compile, device=device
    )
    samples = None
    with enough_memory(min(batch_size, config.num)):
        if part:
            network.choose_threads(batch_size, run.shape, steps * -(-len(part) // batch_size))
        _prepare(network, config, min(batch_size, config.num), run.shape, ranks.main)
        started = time.monotonic()
        with sampling_progress(config.num, shown=ranks.main) as progress, \
                ranks.apart(config.num * steps, progress) as report:
            if part:
                samples = sample(
                    baseline.network(network, run.schedule).to(device) if baseline else network,
                    run.schedule, run.shape, **settings, clip=clip, seed=config.seed,
                    device=device, progress=report)
        samples = ranks.gather(samples)
        if not ranks.main:
            return out
        samples = baseline.finish(samples) if baseline else samples
    seconds = time.monotonic() - started
    if not bool(torch.isfinite(samples).all()):
        raise RunError(
            f"the samples of {config.run} at step {run.step} are not finite numbers: the run has "
            "diverged; sample from an earlier --checkpoint"
        )
    made = {"batch_size": batch_size, "ranks": ranks.size, "off": network.off}
    record = _record(config, run, clip, seconds, made)
    try:
        _write(out, samples.numpy(), run.is_image, record)
    except OSError as error:
        raise RunError(f"cannot write to {out} ({error.strerror}): name another --out") from error
    print(f"{config.num} samples at {record['img_per_s']:.3g} img/s are in {out}")
    return out


def _prepare(
    network, config: SampleConfig, batch_size: int, shape: tuple[int, ...], speak: bool
) -> None:
    """Compile and capture before the clock of the sampling starts, and say what did not work."""
    if config.compile and speak:
        print("compiling the network ...", flush=True)
    begin = time.monotonic()
    network.prepare(batch_size, shape)
    if not speak:
        return
    if config.compile and "compile" not in network.off:
        print(f"compiled in {time.monotonic() - begin:.0f} s", flush=True)
    if "compile" in network.off:
        print("warning: --compile does not work here, running eagerly "
              f"({network.off['compile']})", flush=True)
    if "cuda_graph" in network.off:
        print(f"warning: no CUDA graph could be captured ({network.off['cuda_graph']})", flush=True)


def _record(config: SampleConfig, run, clip: bool, seconds: float, made: dict) -> dict:
    """What made these samples, for sample.json."""
    from robustdm.runs.rundir import provenance

    settings = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items()}
    return {
        **settings,
        "steps": len(run.schedule) if config.steps is None else config.steps,
        "ema": run.config.ema_rates[0] if config.ema is None else config.ema,
        "checkpoint": run.step,
        "clip": clip,
        "shape": list(run.shape),
        "seconds": round(seconds, 3),
        "img_per_s": config.num / seconds,
        **made,
        "provenance": provenance(),
    }


def _write(out: Path, samples, is_image: bool, record: dict) -> None:
    import numpy as np

    from robustdm.reporting import images

    out.mkdir(parents=True, exist_ok=True)
    # Pictures of an earlier, larger set must not stay among the new ones.
    for path in out.glob("[0-9][0-9][0-9][0-9][0-9]*.png"):
        path.unlink()
    # First, since it marks the folder as one that --overwrite may clear.
    (out / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    np.savez(out / "samples.npz", samples=samples)
    if is_image:
        images.save_images(out, samples)
        images.save_grid(out / "grid.png", samples[:GRID_SAMPLES])


if __name__ == "__main__":
    guard(main)
