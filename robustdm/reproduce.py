"""``python -m robustdm.reproduce STUDY``: train, measure and judge, in one command."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Literal

import tyro

from robustdm.cli import guard
from robustdm.errors import UsageError

Study = Literal["subspace", "invitro", "digits", "lambda-mode", "approximations"]


@dataclass(frozen=True)
class ReproduceConfig:
    """Which study to run, and how much of it."""

    study: tyro.conf.Positional[Study]
    """subspace and invitro: the paper's in-vitro analyses; digits: real images; lambda-mode: which
    reading of lambda_t should be the default; approximations: what cheaper training than the exact
    method gives."""
    seeds: int = 3
    """Repeats of every arm, with seeds 0, 1, ..."""
    steps: int | None = None
    """Optimizer steps of every arm; by default the study's own."""
    jobs: int = 0
    """Arms trained side by side; 0 is one per CPU core, or one on a GPU."""
    out: Path | None = None
    """Directory of the results; by default runs/reproduce/STUDY. Trained arms stay beside it."""
    butterflies: Path | None = None
    """lambda-mode: an .npz of 64x64 images (uint8, N x 64 x 64 x 3); without it that set is left
    out."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a study; returns the exit code."""
    config = tyro.cli(ReproduceConfig, args=argv, prog="python -m robustdm.reproduce")
    for name in ("seeds", "steps"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UsageError(f"{name} is {value}: it must be at least 1")
    module = import_module(f"robustdm.studies.{config.study.replace('-', '_')}")
    out = config.out or Path("runs/reproduce") / config.study
    extra = {"butterflies": config.butterflies} if config.study == "lambda-mode" else {}
    claims = module.run(out, config.seeds, config.steps, config.jobs, **extra)
    for claim in claims:
        print(claim)
    print(f"table, figures and records: {out}")
    return 0


if __name__ == "__main__":
    guard(main)
