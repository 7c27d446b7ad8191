"""``python -m robustdm.reproduce NAME``: train, measure and judge, in one command.

Every table and figure of the paper, and the project's own studies.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Literal

import tyro

from robustdm.cli import guard
from robustdm.errors import UsageError

Name = Literal[
    "fig2", "fig3", "fig6-left", "fig6-right", "fig7", "fig8", "table1", "table2", "fig24",
    "timecost", "calibration", "finetune", "finetune-digits", "subspace", "invitro", "digits",
    "lambda-mode", "approximations",
]


@dataclass(frozen=True)
class Study:
    """One entry of ``--list``.

    Attributes:
        where: module and function. A function of the paper's takes a ``Scale``, the others out,
            seeds, steps and jobs.
        claim: what it is about.
        minutes: measured time of the tiny scale with three seeds, on two CPU cores.
        scales: that it has; of the project's own studies, none.
        takes: flags that it has besides.
        features: whether small and full measure in a feature space.
    """

    where: str
    claim: str
    minutes: float
    scales: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()
    features: bool = True


_ALL = ("tiny", "small", "full")
STUDIES = {
    "fig2": Study("flow:fig2", "on 3-D sets with noise, robust_adv finds the data, DDPM the noise, "
                  "and invariance diverges", 7, ("tiny",)),
    "fig3": Study("denoising:fig3", "on a known subspace, robust models leave less noise, and "
                  "invariance fails", 15, _ALL, features=False),
    "fig6-left": Study("memorisation:fig6_left", "robust models memorise less", 11, _ALL),
    "fig6-right": Study("flow:fig6_right", "robust sampling paths are sharper and straighter", 3,
                        ("tiny",)),
    "fig7": Study("denoising:fig7", "lambda trades noise for smoothing", 11, _ALL),
    "fig8": Study("attacked:fig8", "robust models resist attacks on the trajectory", 10, _ALL),
    "table1": Study("denoising:table1", "adversarial beats random; fewer steps suffice", 14, _ALL),
    "table2": Study("denoising:table2", "with 90 % noisy data robust_adv beats DDPM and DDIM", 11,
                    _ALL),
    "fig24": Study("denoising:fig24", "first the noise goes, then the details come", 8, _ALL),
    "timecost": Study("timecost:timecost", "a step costs 2.5 times DDPM's", 6, _ALL),
    "calibration": Study("calibration:run", "how far the corrupted training set is from the clean "
                         "one", 0.2, takes=("data_dir", "features", "weights", "count")),
    "finetune": Study("finetune:finetune", "Table 4: a part of the budget makes a DDPM robust", 14,
                      _ALL),
    "finetune-digits": Study("finetune:finetune_digits", "the same on handwritten digits", 60,
                             ("tiny",)),
    "subspace": Study("subspace:run", "all objectives where noise is measured exactly", 14),
    "invitro": Study("invitro:run", "all objectives on the 3-D sets", 12),
    "digits": Study("digits:run", "all objectives on handwritten digits", 60),
    "lambda-mode": Study("lambda_mode:run", "which reading of lambda_t should be the default", 45,
                         takes=("butterflies",)),
    "approximations": Study("approximations:run", "what cheaper training than the exact method "
                            "gives", 180),
}


@dataclass(frozen=True)
class ReproduceConfig:
    """Which table, figure or study, and how much of it."""

    name: tyro.conf.Positional[Name | None] = None
    """See --list."""
    list: bool = False
    """Only print the names, with what each is about and how long it takes."""
    scale: Literal["tiny", "small", "full"] | None = None
    """tiny: two CPU cores, 15 minutes at most; small: CIFAR-10 with a small network, for a GPU;
    full: the paper's protocol. tiny if not given, and for the project's own studies."""
    seeds: int = 3
    """Repeats of every arm, with seeds 0, 1, ...; a single one gives values but no verdicts."""
    steps: int | None = None
    """Optimizer steps of every arm; by default the study's own."""
    jobs: int = 0
    """Arms trained side by side; 0 is one per CPU core, or one on a GPU."""
    fresh: bool = False
    """Use no arms that are kept from before: all that lie beside the results, of other studies
    too, are moved aside."""
    out: Path | None = None
    """Directory of the results; by default runs/reproduce/NAME, with -SCALE but for tiny. Trained
    arms stay beside it."""
    data_dir: Path | None = None
    """CIFAR-10 for small and full; fig3: any images; calibration: any images, the digits if not
    given."""
    features: Literal["auto", "pixels", "digits", "resnet20", "resnet56", "inception",
                      "dinov2"] = "auto"
    """Feature space of the Frechet distance (small, full, calibration); only inception's is
    comparable with the paper."""
    weights: Path | None = None
    """Weights of the feature extractor."""
    count: int = 10_000
    """calibration: images used."""
    butterflies: Path | None = None
    """lambda-mode: an .npz of 64x64 images (uint8, N x 64 x 64 x 3); without it that set is left
    out."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a study; returns the exit code.

    Raises:
        UsageError: for a wrong flag.
        RunError: if an arm fails.
    """
    config = tyro.cli(ReproduceConfig, args=argv, prog="python -m robustdm.reproduce",
                      description=__doc__)
    if config.list:
        print(overview())
        return 0
    if config.name is None:
        raise UsageError("name is not given: --list shows the tables, figures and studies")
    for key in ("seeds", "steps", "count"):
        value = getattr(config, key)
        if value is not None and value < 1:
            raise UsageError(f"{key} is {value}: it must be at least 1")
    from robustdm.studies.runner import arms_directory

    study = STUDIES[config.name]
    scale = config.scale or "tiny"
    if scale not in (study.scales or ("tiny",)):
        known = ", ".join(study.scales or ("tiny",))
        raise UsageError(f"scale is {config.scale!r}: the scales of {config.name} are: {known}")
    suffix = f"-{scale}" if scale != "tiny" else ""
    out = config.out or Path("runs/reproduce") / f"{config.name}{suffix}"
    if config.fresh:
        _move_aside(arms_directory(out))
    module, function = study.where.split(":")
    run = getattr(import_module(f"robustdm.studies.{module}"), function)
    if study.scales:
        from robustdm.studies.scales import make_scale

        claims = run(make_scale(scale, out, config.seeds, config.jobs, config.steps,
                                config.data_dir, config.features, config.weights,
                                study.features))
    else:
        extra = {key: getattr(config, key) for key in study.takes}
        claims = run(out, config.seeds, config.steps, config.jobs, **extra)
    for claim in claims:
        print(claim)
    page = "page.html" if (out / "page.html").exists() else "table.md"
    print(f"table, figures and records: {out / page}")
    return 0


def _move_aside(kept: Path) -> None:
    if kept.exists():
        number = 1
        while (there := kept.with_name(f"{kept.name}.{number}")).exists():
            number += 1
        kept.rename(there)
        print(f"{kept} is moved to {there}")


def overview() -> str:
    """What ``--list`` prints."""
    lines = [f"{'name':<14}  {'minutes':>7}  {'scales':<17}  claim"]
    for name, study in STUDIES.items():
        scales = ", ".join(study.scales) or "-"
        lines.append(f"{name:<14}  {study.minutes:>7g}  {scales:<17}  {study.claim}")
    lines += ["", "minutes: tiny, three seeds, on two CPU cores; small and full are for a GPU and "
              "have not been timed"]
    return "\n".join(lines)


if __name__ == "__main__":
    guard(main)
