"""Entry point: `python -m robustdm.steps RUN [RUN ...]` measures runs with fewer sampling steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from robustdm.cli import guard
from robustdm.errors import UsageError
from robustdm.flags import ComputeFlags, FeatureFlags, parse_flags


@dataclass(frozen=True)
class StepsConfig(ComputeFlags, FeatureFlags):
    """Which runs, with how many steps, and what to measure."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run directories of `python -m robustdm.train`, side by side."""
    steps: tuple[int, ...] = (50, 100, 300, 500, 1000)
    """Numbers of sampling steps."""
    samplers: tuple[Literal["ddpm", "ddim"], ...] = ("ddpm", "ddim")
    """Samplers."""
    spacings: tuple[Literal["linspace", "leading", "trailing", "truncate"], ...] = ("linspace",)
    """Which timesteps. truncate starts from pure noise in the middle of the chain: no proper
    sampler, but what published numbers for 300 and 500 steps may have been made with."""
    variance: Literal["fixed_large", "fixed_small"] = "fixed_large"
    """ddpm: noise of a step."""
    num: int = 1000
    """Samples per run and sampler."""
    out: Path = Path("runs/steps")
    """Folder for steps.json, steps.html and steps.png."""


def main(argv: Sequence[str] | None = None) -> None:
    """Parse flags, sample, write.

    Raises:
        UsageError: for a wrong flag or run.
        RunError: if sampling fails.
    """
    measure_steps(parse_flags(
        StepsConfig, argv, prog="python -m robustdm.steps",
        description="Distance to the clean data against the number of sampling steps.",
    ))


def measure_steps(config: StepsConfig) -> dict:
    """Sample every run with every sampler and number of steps; print, write, return.

    Started by torchrun, each process draws its part of the samples, and rank 0 writes.

    Returns:
        What steps.json holds; empty on other ranks than 0.

    Raises:
        UsageError: for a wrong run or setting.
        RunError: if sampling fails.
    """
    from robustdm.distributed import join

    with join(config.device) as ranks:
        return _measure_steps(config, ranks)


def _measure_steps(config: StepsConfig, ranks) -> dict:
    from robustdm.device import resolve_device
    from robustdm.evaluation.compare import Comparison, open_runs
    from robustdm.evaluation.measure import check_out
    from robustdm.method.sampling import timesteps

    for name in ("steps", "samplers", "spacings"):
        if not getattr(config, name):
            raise UsageError(f"{name} is empty: give one or more")
    device = resolve_device(config.device)
    with ranks.together():
        if ranks.main:
            check_out(config.out)
    generators = open_runs(config.runs, device, config.ema, ranks)
    ways = [(sampler, spacing, steps) for sampler in dict.fromkeys(config.samplers)
            for spacing in dict.fromkeys(config.spacings)
            for steps in sorted(dict.fromkeys(config.steps))]
    for generator in generators.values():  # before the first sample: the last way may be wrong
        for _, spacing, steps in ways:
            timesteps(generator.schedule, steps, spacing)
    compared = Comparison(config, device, ranks)
    for name, generator in generators.items():
        for sampler, spacing, steps in ways:
            kind = sampler if len(config.spacings) == 1 else f"{sampler} {spacing}"
            what = f"{kind} {steps}"
            compared.add(name, generator, what,
                         {"kind": kind, "sampler": sampler, "spacing": spacing, "steps": steps},
                         f"[{len(compared.rows) + 1}/{len(generators) * len(ways)}] {name}, {what}",
                         sampler=sampler, steps=steps, spacing=spacing, variance=config.variance)
    if not ranks.main:
        return {}
    record = compared.record()
    print(compared.table())
    compared.write(
        "steps", "Sampling steps",
        "Distances reward shrinkage, so recall and deviation (1 is the clean spread) stand beside "
        "them.", compared.lines("kind", "steps", "sampling steps", log=True), record)
    return record


if __name__ == "__main__":
    guard(main)
