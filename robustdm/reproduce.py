"""``python -m robustdm.reproduce STUDY``: train, measure and judge, in one command."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Literal

import tyro

from robustdm.cli import guard
from robustdm.errors import UsageError

Study = Literal["subspace", "invitro", "digits", "lambda-mode", "approximations", "calibration"]


@dataclass(frozen=True)
class ReproduceConfig:
    """Which study to run, and how much of it."""

    study: tyro.conf.Positional[Study]
    """subspace and invitro: the paper's in-vitro analyses; digits: real images; lambda-mode: which
    reading of lambda_t should be the default; approximations: what cheaper training than the exact
    method gives; calibration: how far the corrupted training set is from the clean one."""
    seeds: int = 3
    """Repeats of every arm, with seeds 0, 1, ..."""
    steps: int | None = None
    """Optimizer steps of every arm; by default the study's own."""
    jobs: int = 0
    """Arms trained side by side; 0 is one per CPU core, or one on a GPU."""
    out: Path | None = None
    """Directory of the results; by default runs/reproduce/STUDY. Trained arms stay beside it."""
    data_dir: Path | None = None
    """calibration: images, such as a copy of CIFAR-10; the digits if not given."""
    features: Literal["auto", "pixels", "digits", "resnet20", "resnet56", "inception",
                      "dinov2"] = "auto"
    """calibration: feature space of the distance; only inception's is comparable with the paper."""
    weights: Path | None = None
    """calibration: weights of the feature extractor."""
    count: int = 10_000
    """calibration: images used."""
    butterflies: Path | None = None
    """lambda-mode: an .npz of 64x64 images (uint8, N x 64 x 64 x 3); without it that set is left
    out."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a study; returns the exit code."""
    config = tyro.cli(ReproduceConfig, args=argv, prog="python -m robustdm.reproduce")
    for name in ("seeds", "steps", "count"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UsageError(f"{name} is {value}: it must be at least 1")
    module = import_module(f"robustdm.studies.{config.study.replace('-', '_')}")
    out = config.out or Path("runs/reproduce") / config.study
    own = {"lambda-mode": ("butterflies",),
           "calibration": ("data_dir", "features", "weights", "count")}
    extra = {name: getattr(config, name) for name in own.get(config.study, ())}
    claims = module.run(out, config.seeds, config.steps, config.jobs, **extra)
    for claim in claims:
        print(claim)
    print(f"table, figures and records: {out}")
    return 0


if __name__ == "__main__":
    guard(main)
