"""Robust fine-tuning: what a DDPM that learnt the noise becomes for a part of the budget.

A plain DDPM is trained on noisy data. Then it is continued as it was, or fine-tuned with the
equivariance loss, for several shares of what training robust_adv from scratch costs; and robust_adv
is trained from scratch for as much as DDPM and fine-tuning cost together. Work is counted in
forward passes (``Objective.units``), so that cheap losses take more steps for the same share.

Source: Briglia et al. 2026, appendix F.2 and Table 4.
"""

import statistics
from dataclasses import replace

from robustdm.method.baselines import Baseline
from robustdm.reporting import plots
from robustdm.runs.config import TrainConfig
from robustdm.studies.claims import Ratio
from robustdm.studies.robustness import units
from robustdm.studies.runner import Arm, shrunk_arms
from robustdm.studies.scales import METHODS, OBJECTIVES, Scale, corrupted, noise_name
from robustdm.studies.study import Line, Study, line_figure
from robustdm.studies.tradeoff import EqualSignal

SHARES = (0.02, 0.05, 0.1, 0.2)
PRETRAINED, SCRATCH = "DDPM", "robust_adv from scratch"
SAME_TOTAL = "robust_adv from scratch, same total cost"
CONTINUED = "DDPM continued"
AS_BEFORE = "robust_adv, learning rate as before"
WAYS = {
    CONTINUED: METHODS["DDPM"],
    "robust_adv": METHODS["robust_adv"],
    "outward_ran": OBJECTIVES["outward_ran"],
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


class FineTune(Study):
    """Noise left and signal kept against the share of the budget."""

    title = "Table 4: robust fine-tuning"
    references = True
    contrast = 1.0
    paper = {"the paper's Table 4, CelebA, FID": {
        "DDPM continued": {"sigma 0.1": "65.4", "sigma 0.2": "100.68"},
        "robust_adv, the last 100 epochs": {"sigma 0.1": "23.3", "sigma 0.2": "25.8"},
        "robust_adv from scratch (Table 2)": {"sigma 0.1": "14.54", "sigma 0.2": "16.53"}}}
    notes = (
        "A share is of the work of robust_adv from scratch. The DDPM that fine-tuning starts from "
        "counts as given, but for the rows of the same total cost.",
        "Fine-tuning restarts Adam and the average of the weights; the average's decay rises from "
        "0.1, so that a short run does not return the old weights. A fifth of the first training's "
        f"learning rate (but for '{AS_BEFORE}'), warm-up a tenth of the steps. 'Shrunk' rows "
        "sample as the shrunk DDPM does, from the fine-tuned network.")

    def __init__(self, scale: Scale):
        super().__init__(scale)
        self.sigma = TrainConfig(**scale.base).corrupt_sigma
        self.group = group = noise_name(self.sigma)
        self.columns = ["units", scale.noise, "signal", "frechet", "recall", "train_cpu_s"]
        ways = [(way, share) for way in WAYS for share in shares(way)]
        tuned, distance = row("robust_adv", 0.2), "frechet"
        self.comparisons = [
            *(ratio for way, share in ways if way != CONTINUED
              for ratio in self._near(row(way, share))),
            *(EqualSignal(group, row(way, share)) for way, share in ways
              if way not in (CONTINUED, AS_BEFORE)),
            *(EqualSignal(group, row(way, SHARES[0], lam)) for way, lam in THEN_SHRUNK.items()),
            *(Ratio("{}: noise left / robust_adv from scratch for what both trainings cost", group,
                    row("robust_adv", share), row(SAME_TOTAL, share), "noise")
              for share in shares(SAME_TOTAL)),
            *([Ratio("distance, robust_adv for 20 % / DDPM continued for as much", group, tuned,
                     row(CONTINUED, 0.2), distance, "23.3 / 65.4 and 25.8 / 100.68"),
               Ratio("distance, robust_adv for 20 % / from scratch ('similar results')", group,
                     tuned, SCRATCH, distance, "23.3 / 14.54 and 25.8 / 16.53", 1.25, 0.8)]
              if scale.features else [])]

    def _near(self, name: str) -> tuple[Ratio, Ratio]:
        return (Ratio("{}: noise left / from scratch's", self.group, name, SCRATCH, "noise",
                      at_most=NEAR),
                Ratio("{}: signal / from scratch's", self.group, name, SCRATCH, "signal",
                      at_least=1 / NEAR))

    def arms(self):
        made = []
        for seed in range(self.scale.seeds):
            def arm(name, fields, seed=seed):
                return self.scale.arm(self.group, name, fields | corrupted(self.sigma), seed)

            plain, whole = arm(PRETRAINED, METHODS["DDPM"]), arm(SCRATCH, METHODS["robust_adv"])
            spent, budget = (units(a.config) * a.config.steps for a in (plain, whole))
            made += [plain, whole, *shrunk_arms(plain, SHRUNK)]
            for way, fields in WAYS.items():
                rate = plain.config.lr * (1.0 if way == AS_BEFORE else SLOWER)
                for share in shares(way):
                    tuned = arm(row(way, share), fields | dict(lr=rate))
                    made.append(_lasting(tuned, share * budget, plain.config))
                    if share == SHARES[0] and (lam := THEN_SHRUNK.get(way)):
                        made.append(replace(made[-1], name=row(way, share, lam),
                                            baseline=Baseline("shrink", lam)))
            made += [_lasting(replace(whole, name=row(SAME_TOTAL, share)), spent + share * budget)
                     for share in shares(SAME_TOTAL)]
        return made

    def probe(self, arm):
        return {"units": units(arm.config) * arm.config.steps}

    def read(self, of):
        """With the smallest share of each way that is enough."""
        def within(ratio: Ratio) -> bool:
            """In the mean."""
            above, below = (statistics.fmean(of(self.group, name, ratio.measure))
                            for name in (ratio.above, ratio.below))
            return above <= NEAR * below if ratio.at_most else above >= below / NEAR

        def first(way: str, enough) -> str:
            found = [s for s in shares(way) if all(map(enough, self._near(row(way, s))))]
            return f"{min(found):.0%}" if found else "none"

        return [self.notes[0], *(
            f"{way} (tried: {', '.join(f'{s:.0%}' for s in shares(way))}): smallest share within "
            f"10 % of from-scratch in the mean {first(way, within)}, surely (95 % over seeds) "
            f"{first(way, lambda ratio: ratio.claim(of).holds)}." for way in WAYS), *self.notes[1:]]

    def figures(self, of):
        rows = of.rows(self.group, self.columns)
        colours = dict(zip(WAYS, plots.COLOURS, strict=False)) | {SAME_TOTAL: plots.INK}
        lines = []
        for way, colour in colours.items():
            names = [row(way, share) for share in shares(way)]
            lines.append(Line(way, [rows[name]["train_cpu_s"].mean for name in names],
                              [(self.group, name) for name in names], colour))
        measures = (self.scale.noise, "signal")
        made = line_figure(of, measures, lines, "training, s of one processor", "log")
        for ax, measure in zip(made.axes, measures, strict=True):
            for style, name in ((":", PRETRAINED), ("-", SCRATCH), ("--", "DDPM, shrunk 0.1")):
                ax.axhline(rows[name][measure].mean, color=plots.INK, linestyle=style, linewidth=1,
                           label=name)
            ax.axvline(rows[SCRATCH]["train_cpu_s"].mean, color=plots.INK, linestyle=":",
                       linewidth=0.5)
        made.axes[0].set_yscale("log")
        made.axes[0].legend(fontsize=5, loc="lower left")
        caption = ("Points: shares of the budget. Vertical line: from scratch. Without the DDPM's "
                   "own time, but for the same total cost.")
        return {"finetune": (made, caption)} | super().figures(of)


class FineTuneDigits(FineTune):
    """The same on handwritten digits."""

    def __init__(self, scale: Scale):
        scale = scale.on("digits", 128, 1200, noise="noise_rms", signal=("pixel_std",))
        super().__init__(replace(scale, differs=(
            "Data: handwritten digits of 8x8 pixels, 90 % with sigma 0.2.",
            f"A UNet of 0.43 million parameters, {scale.base['steps']:,} steps of 64; 128 samples.",
            "Noise is measured on pixels that are constant in clean digits; signal is pixel_std.")))


def _lasting(arm: Arm, work: float, start: TrainConfig | None = None) -> Arm:
    """The arm with as many steps as the work allows."""
    steps = max(1, round(work / units(arm.config)))
    changed = {"steps": steps}
    if start is not None:  # the weights are good already: a short warm-up, for Adam's moments
        changed["warmup_steps"] = min(arm.config.warmup_steps, max(1, steps // 10))
    return replace(arm, config=replace(arm.config, **changed), start=start)
