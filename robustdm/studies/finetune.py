"""Robust fine-tuning: what a DDPM that learnt the noise becomes for a part of the budget.

A plain DDPM is trained on noisy data. Then it is continued as it was, or fine-tuned with the
equivariance loss, for several shares of what training robust_adv from scratch costs; and robust_adv
is trained from scratch for as much as DDPM and fine-tuning cost together. Work is counted in
forward passes (``Objective.units``), so that cheap losses take more steps for the same share.

Source: Briglia et al. 2026, appendix F.2 and Table 4.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence

from robustdm.data import load_data
from robustdm.method.baselines import Baseline
from robustdm.reporting import plots
from robustdm.runs.config import TrainConfig
from robustdm.runs.presets import preset_values
from robustdm.studies.approximations import units
from robustdm.studies.claims import Claim, by_seed, ratio_claim
from robustdm.studies.denoising import sheet
from robustdm.studies.page import write_page
from robustdm.studies.runner import Arm, baseline_arms, summarise
from robustdm.studies.scales import METHODS, Scale, corrupted
from robustdm.studies.tradeoff import equal_signal_claim

SHARES = (0.02, 0.05, 0.1, 0.2)
PRETRAINED, SCRATCH = "DDPM", "robust_adv from scratch"
SAME_TOTAL = "robust_adv from scratch, same total cost"
CONTINUED = "DDPM continued"
AS_BEFORE = "robust_adv, learning rate as before"
WAYS = {
    CONTINUED: METHODS["DDPM"],
    "robust_adv": METHODS["robust_adv"],
    "outward_ran": dict(objective="outward_ran", lambda_mode="ray"),
    "robust_adv, reg_fraction 0.25": METHODS["robust_adv"] | dict(reg_fraction=0.25),
    AS_BEFORE: METHODS["robust_adv"],
}
FEWER_SHARES = {
    CONTINUED: SHARES[-1:],
    SAME_TOTAL: SHARES[-1:],
    "robust_adv, reg_fraction 0.25": (SHARES[0], SHARES[2]),
    AS_BEFORE: SHARES[1:2],
}
"""Where the question is not how much is enough: the study is to end within a quarter of an hour."""
SHRUNK = (0.03, 0.1, 0.2, 0.3)
"""Strengths at which the DDPM is shrunk, to compare others with one of the same signal."""
THEN_SHRUNK = {"robust_adv": 0.03}
"""Strength at which a network fine-tuned for the smallest share is shrunk besides."""
SLOWER = 0.2
"""Learning rate of fine-tuning over that of the first training, but for ``AS_BEFORE``."""
NEAR = 1.1
"""Noise of this many times that of training from scratch, and signal of the inverse, are near."""


def shares(way: str) -> tuple[float, ...]:
    """Shares of the budget for which a way is tried."""
    return FEWER_SHARES.get(way, SHARES)


def row(way: str, share: float, lam: float = 0.0) -> str:
    """Name of an arm; of the same network shrunk by ``lam``."""
    return f"{way}, {share:.0%}" + (f", shrunk {lam:g}" if lam else "")


def arms(scale: Scale, sigma: float) -> tuple[str, list[Arm]]:
    """The group and its arms."""
    group, made = f"90 % with sigma {sigma:g}", []
    for seed in range(scale.seeds):
        plain = scale.arm(group, PRETRAINED, METHODS["DDPM"] | corrupted(sigma), seed)
        whole = scale.arm(group, SCRATCH, METHODS["robust_adv"] | corrupted(sigma), seed)
        budget = units(whole.config) * whole.config.steps
        spent = units(plain.config) * plain.config.steps
        made += [plain, whole,
                 *(a for a in baseline_arms(plain, 0.0, SHRUNK) if "shrunk" in a.name)]
        for way, fields in WAYS.items():
            rate = plain.config.lr * (1.0 if way == AS_BEFORE else SLOWER)
            for share in shares(way):
                tuned = scale.arm(group, row(way, share), fields | corrupted(sigma) | dict(lr=rate),
                                  seed)
                made.append(_lasting(tuned, share * budget, plain.config))
                if share == SHARES[0] and (lam := THEN_SHRUNK.get(way)):
                    made.append(dataclasses.replace(made[-1], name=row(way, share, lam),
                                                    baseline=Baseline("shrink", lam)))
        for share in shares(SAME_TOTAL):
            both = dataclasses.replace(whole, name=row(SAME_TOTAL, share))
            made.append(_lasting(both, spent + share * budget, None))
    return group, made


def _lasting(arm: Arm, work: float, start: TrainConfig | None) -> Arm:
    """The arm with as many steps as the work allows."""
    steps = max(1, round(work / units(arm.config)))
    changed = {"steps": steps}
    if start is not None:  # the weights are good already: a short warm-up, for Adam's moments
        changed["warmup_steps"] = min(arm.config.warmup_steps, max(1, steps // 10))
    return dataclasses.replace(arm, config=dataclasses.replace(arm.config, **changed), start=start)


def finetune(scale: Scale, sigma: float | None = None) -> list[Claim]:
    """Noise left and signal kept against the share of the budget.

    Args:
        sigma: corruption; by default the data's own.
    """
    sigma = TrainConfig(**scale.base).corrupt_sigma if sigma is None else sigma
    group, todo = arms(scale, sigma)
    records = scale.run(todo)
    for arm, record in zip(todo, records, strict=True):
        record["measures"]["units"] = units(arm.config) * arm.config.steps
    records += scale.references(todo)
    noise, kept = scale.noise, "signal"

    def values(name: str, measure: str) -> list[float]:
        return by_seed(records, group, name, measure)

    def near(way: str, share: float) -> tuple[Claim, Claim]:
        name = row(way, share)
        return (
            ratio_claim(f"{name}: noise left / from scratch's", values(name, noise),
                        values(SCRATCH, noise), at_most=NEAR),
            ratio_claim(f"{name}: {kept} / from scratch's", values(name, kept),
                        values(SCRATCH, kept), at_least=1 / NEAR))

    claims, answers = [], []
    for way in WAYS:
        found = {share: near(way, share) for share in shares(way)}
        if way != CONTINUED:
            claims += [claim for both in found.values() for claim in both]
        means = [share for share in found if _near_in_the_mean(values, row(way, share), noise,
                                                                kept)]
        sure = [s for s, both in found.items() if all(c.holds for c in both)]
        tried = ", ".join(f"{share:.0%}" for share in found)
        answers.append(f"{way} (tried: {tried}): smallest share within 10 % of from-scratch in the "
                       f"mean {_first(means)}, surely (95 % over seeds) {_first(sure)}.")
    claims += [equal_signal_claim(records, group, row(way, share), noise, kept)
               for way in WAYS if way not in (CONTINUED, AS_BEFORE) for share in shares(way)]
    claims += [equal_signal_claim(records, group, row(way, SHARES[0], lam), noise, kept)
               for way, lam in THEN_SHRUNK.items()]
    claims += [ratio_claim(f"{row('robust_adv', share)}: noise left / robust_adv from scratch for "
                           "what both trainings cost", values(row("robust_adv", share), noise),
                           values(row(SAME_TOTAL, share), noise)) for share in shares(SAME_TOTAL)]
    if scale.features:
        found = {name: values(name, "frechet") for name in (
            row("robust_adv", 0.2), row(CONTINUED, 0.2), SCRATCH)}
        claims += [
            ratio_claim("distance, robust_adv for 20 % / DDPM continued for as much",
                        found[row("robust_adv", 0.2)], found[row(CONTINUED, 0.2)],
                        paper="23.3 / 65.4 and 25.8 / 100.68"),
            ratio_claim("distance, robust_adv for 20 % / from scratch ('similar results')",
                        found[row("robust_adv", 0.2)], found[SCRATCH], at_least=0.8, at_most=1.25,
                        paper="23.3 / 14.54 and 25.8 / 16.53"),
        ]
    rows = summarise(records, ["units", noise, kept, "frechet", "recall", "train_cpu_s"])
    return write_page(
        scale.out, f"Table 4: robust fine-tuning ({scale.name})",
        {"the paper's Table 4, CelebA, FID": {
            "DDPM continued": {"sigma 0.1": "65.4", "sigma 0.2": "100.68"},
            "robust_adv, the last 100 epochs": {"sigma 0.1": "23.3", "sigma 0.2": "25.8"},
            "robust_adv from scratch (Table 2)": {"sigma 0.1": "14.54", "sigma 0.2": "16.53"}},
         group: rows}, claims, records, scale.differs, (
            "A share is of the work of robust_adv from scratch. The DDPM that fine-tuning starts "
            "from counts as given, but for the rows of the same total cost.",
            *answers,
            "Fine-tuning restarts Adam and the average of the weights; the average's decay rises "
            "from 0.1, so that a short run does not return the old weights. A fifth of the first "
            f"training's learning rate (but for '{AS_BEFORE}'), warm-up a tenth of the steps. "
            "'Shrunk' rows sample as the shrunk DDPM does, from the fine-tuned network.",
        ), {"finetune": (_figure(scale, group, rows), "Points: shares of the budget. Vertical "
                         "line: from scratch. Without the DDPM's own time, but for the same total "
                         "cost.")}
        | sheet(scale, todo))


def _near_in_the_mean(values, name: str, noise: str, kept: str) -> bool:
    def mean(of: str, measure: str) -> float:
        return statistics.fmean(values(of, measure))

    return (mean(name, noise) <= NEAR * mean(SCRATCH, noise)
            and mean(name, kept) >= mean(SCRATCH, kept) / NEAR)


def _first(found: Sequence[float]) -> str:
    return f"{min(found):.0%}" if found else "none"


def _figure(scale: Scale, group: str, rows: dict):
    made, axes = plots.figure(1, 2, size=(4.8, 3.8))
    for ax, measure in zip(axes[0], (scale.noise, "signal"), strict=True):
        for i, way in enumerate((*WAYS, SAME_TOTAL)):
            colour = plots.INK if way == SAME_TOTAL else plots.COLOURS[i]
            found = [rows[row(way, share)] for share in shares(way)]
            ax.errorbar([r["train_cpu_s"].mean for r in found], [r[measure].mean for r in found],
                        [r[measure].sd for r in found], color=colour, marker="o", markersize=3,
                        label=way)
        for style, name in ((":", PRETRAINED), ("-", SCRATCH), ("--", "DDPM, shrunk 0.1")):
            ax.axhline(rows[name][measure].mean, color=plots.INK, linestyle=style, linewidth=1,
                       label=name)
        whole = rows[SCRATCH]["train_cpu_s"].mean
        ax.axvline(whole, color=plots.INK, linestyle=":", linewidth=0.5)
        ax.set(xlabel="training, s of one processor", title=measure, xscale="log",
               yscale="log" if measure == scale.noise else "linear")
    axes[0, 0].legend(fontsize=5, loc="lower left")
    return made


def finetune_digits(scale: Scale) -> list[Claim]:
    """The same on handwritten digits."""
    base = preset_values("digits") | {"steps": scale.steps or 1200}
    return finetune(dataclasses.replace(
        scale, base=base, samples=128, noise="noise_rms", signal=("pixel_std",), features=None,
        make_data=load_data, differs=(
            "Data: handwritten digits of 8x8 pixels, 90 % with sigma 0.2.",
            f"A UNet of 0.43 million parameters, {base['steps']:,} steps of 64; 128 samples.",
            "Noise is measured on pixels that are constant in clean digits; signal is pixel_std.")))
