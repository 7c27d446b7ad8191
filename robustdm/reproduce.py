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
    "known", "lambda-mode", "approximations",
]


@dataclass(frozen=True)
class Entry:
    """One entry of ``--list``.

    Attributes:
        where: module of `robustdm.studies`, and its class.
        claim: what it is about.
        minutes: measured time of the tiny scale with three seeds, on two CPU cores.
        scales: that it has; of the project's own studies, which are tiny, none.
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
    "fig2": Entry("fig2:Figure2", "on 3-D sets with noise, robust_adv finds the data, DDPM the "
                  "noise, and invariance diverges", 7, ("tiny",)),
    "fig3": Entry("fig3:Figure3", "on a known subspace, robust models leave less noise, and "
                  "invariance fails", 15, _ALL, features=False),
    "fig6-left": Entry("fig6_left:Figure6Left", "robust models memorise less", 11, _ALL),
    "fig6-right": Entry("fig6_right:Figure6Right", "robust sampling paths are sharper and "
                        "straighter", 3, ("tiny",)),
    "fig7": Entry("fig7:Figure7", "lambda trades noise for smoothing", 11, _ALL),
    "fig8": Entry("fig8:Figure8", "robust models resist attacks on the trajectory", 10, _ALL),
    "table1": Entry("table1:Table1", "adversarial beats random; fewer steps suffice", 14, _ALL),
    "table2": Entry("table2:Table2", "with 90 % noisy data robust_adv beats DDPM and DDIM", 11,
                    _ALL),
    "fig24": Entry("fig24:Figure24", "first the noise goes, then the details come", 8, _ALL),
    "timecost": Entry("timecost:TimeCost", "a step costs 2.5 times DDPM's", 6, _ALL),
    "calibration": Entry("calibration:Calibration", "how far the corrupted training set is from "
                         "the clean one", 0.2, takes=("data_dir", "features", "weights", "count")),
    "finetune": Entry("finetune:FineTune", "Table 4: a part of the budget makes a DDPM robust", 14,
                      _ALL),
    "finetune-digits": Entry("finetune:FineTuneDigits", "the same on handwritten digits", 60,
                             ("tiny",)),
    "subspace": Entry("subspace:Subspace", "all objectives where noise is measured exactly", 14),
    "invitro": Entry("invitro:InVitro", "all objectives on the 3-D sets", 12),
    "digits": Entry("digits:Digits", "all objectives on handwritten digits", 60),
    "known": Entry("known:Known", "a plain DDPM, its noise measured, and one corrected step", 40),
    "lambda-mode": Entry("lambda_mode:LambdaMode", "which reading of lambda_t should be the "
                         "default", 45, takes=("butterflies",)),
    "approximations": Entry("approximations:Approximations", "what cheaper training than the exact "
                            "method gives", 180),
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
    from robustdm.studies.scales import make_scale

    entry = STUDIES[config.name]
    scale = config.scale or "tiny"
    if scale not in (entry.scales or ("tiny",)):
        known = ", ".join(entry.scales or ("tiny",))
        raise UsageError(f"scale is {config.scale!r}: the scales of {config.name} are: {known}")
    suffix = f"-{scale}" if scale != "tiny" else ""
    out = config.out or Path("runs/reproduce") / f"{config.name}{suffix}"
    if config.fresh:
        _move_aside(arms_directory(out))
    module, name = entry.where.split(":")
    study = getattr(import_module(f"robustdm.studies.{module}"), name)
    own = {key: getattr(config, key) for key in entry.takes}
    data = {key: getattr(config, key) for key in ("data_dir", "features", "weights")
            if entry.scales}
    made = make_scale(scale, out, config.seeds, config.jobs, config.steps,
                      needs_features=entry.features, **data)
    for claim in study(made, **own).run():
        print(claim)
    print(f"table, figures and records: {out / 'page.html'}")
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
    for name, entry in STUDIES.items():
        scales = ", ".join(entry.scales) or "-"
        lines.append(f"{name:<14}  {entry.minutes:>7g}  {scales:<17}  {entry.claim}")
    lines += ["", "minutes: tiny, three seeds, on two CPU cores; small and full are for a GPU and "
              "have not been timed"]
    return "\n".join(lines)


if __name__ == "__main__":
    guard(main)
