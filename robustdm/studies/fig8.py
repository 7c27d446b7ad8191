"""Figure 8: attacks on the sampling trajectory, beside random signs and no attack at all.

Source: Briglia et al. 2026, section 3.4, appendices A.2 to A.4.
"""

import statistics
from dataclasses import replace

from robustdm.method.baselines import Baseline
from robustdm.method.trajectory_attack import TrajectoryAttack
from robustdm.reporting import plots
from robustdm.studies.claims import EFFECT, ratio_claim
from robustdm.studies.scales import METHODS, noise_name
from robustdm.studies.study import Line, Study, line_figure

SHARES = (0.25, 0.5, 0.75, 1.0)
ATTACKS = {
    "random": dict(method="random"), "fgsm": dict(method="fgsm"), "pgd": dict(method="pgd"),
    "eot": dict(method="eot"), "eot as printed": dict(method="eot", eot_loss="printed"),
}
PAPER = {
    "fgsm": ((49.8, 131.7, 190.4, 243.4), (19.29, 52.0, 90.7, 127.7)),
    "pgd": ((55.7, 134.5, 200.3, 248.1), (22.7, 55.8, 98.1, 128.6)),
    "eot": ((57.6, 132.7, 195.99, 248.6), (25.9, 61.2, 100.2, 132.6)),
}
UNATTACKED = (7.2, 28.68)
MODELS = ("DDPM", "robust_adv")
SHRUNK = "DDPM, shrunk 0.3"
"""What robust training with this lam aims at, without training."""
GROUP = noise_name(0.0)


def row(name: str, method: str = "no attack", share: float = 0.0) -> str:
    """Name of an arm."""
    return f"{name}, {method} {share:.0%}" if share else f"{name}, {method}"


class Figure8(Study):
    """Both models under every attack, at every share of the steps; the shrunk DDPM under some."""

    title = "Figure 8: attacks on the trajectory"
    paper = {"the paper, CIFAR-10, FID": {
        f"{name}, {method}": {f"{share:.0%}": str(n) for share, n in zip(SHARES, both[i],
                                                                       strict=True)}
        for method, both in PAPER.items() for i, name in enumerate(MODELS)}}
    notes = (
        "An attack is as strong as its distance above random signs of the same size, not above no "
        "attack: the first row of each model is the same sampler left alone.",
        "As a factor of its own unattacked distance, robust_adv rises {factor:.2f} times as much "
        "as DDPM under fgsm on all steps. Its unattacked distance is larger, so a smaller factor "
        "alone would be no sign of robustness.",
        "The paper says neither which model was attacked (here: trained on clean data), nor which "
        "steps (here: evenly spread), nor how large the random start is (here: that of the "
        "sampler's noise).",
        "Where fgsm's gradient keeps its signs, pgd ends in the same corner of the ball: rows of "
        "pgd that equal fgsm's are no second witness.",
        "eot, corrected, compares with the step that the sampler's own noise makes, and so takes "
        "that noise back; as printed, it leads away from the state itself.")

    def __init__(self, scale):
        # An attack costs up to 42 times as much as sampling.
        super().__init__(replace(
            scale, samples=scale.attacked_samples, sampling_steps=scale.attacked_steps,
            differs=(*scale.differs, f"{scale.attacked_samples:,} samples by "
                     f"{scale.attacked_steps or 1000} steps.")))

    references = True

    @property
    def columns(self):
        return ["frechet", "signal", self.scale.noise, "precision", "recall"]

    def arms(self):
        made = []
        for name in (*MODELS, SHRUNK):
            method = METHODS[name.split(",")[0]]
            how = dict(baseline=Baseline("shrink", 0.3) if name == SHRUNK else None)
            made += self.scale.arms(0.0, {row(name): method}, **how)
            for words, attack in ATTACKS.items():
                if name == SHRUNK and words not in ("random", "fgsm"):
                    continue
                for share in SHARES:
                    made += [replace(arm, attack=TrajectoryAttack(
                        share=share, seed=arm.config.seed, **attack)) for arm in self.scale.arms(
                        0.0, {row(name, words, share): method}, **how)]
        return made

    def compare(self, of):
        def compared(words, method, share, below="DDPM", paper=""):
            return of.ratio(f"{words}, {share:.0%} of the steps: distance, robust_adv / {below}",
                            GROUP, row("robust_adv", method, share), row(below, method, share),
                            "frechet", paper)

        def rise(relative):
            return (self._rise(of, name, relative) for name in reversed(MODELS))

        fgsm, random = "not in the paper: fgsm", "not in the paper: random"
        (ddpm, adv), (plain, robust) = (numbers[-1] for numbers in PAPER["fgsm"]), UNATTACKED
        eot = "eot as printed"
        return [
            *(compared(method, method, share, paper=f"{robust[i]} / {ddpm[i]}")
              for method, (ddpm, robust) in PAPER.items() for i, share in enumerate(SHARES)),
            *(compared("eot as Algorithm 4 prints it", eot, share,
                       paper=f"{PAPER['eot'][1][i]} / {PAPER['eot'][0][i]}")
              for i, share in enumerate(SHARES)),
            *(compared(f"{random} signs (holds: no adversary is needed)", "random", share)
              for share in SHARES),
            *(compared(words, method, share, SHRUNK)
              for words, method in ((random, "random"), (fgsm, "fgsm")) for share in (0.25, 1.0)),
            ratio_claim("fgsm, all steps: rise of the distance over no attack in absolute terms, "
                        "robust_adv / DDPM", *rise(relative=False),
                        paper=f"{adv - robust:.0f} / {ddpm - plain:.0f}"),
            ratio_claim("fgsm, all steps: rise as a factor of no attack, robust_adv's / DDPM's",
                        *rise(relative=True), paper=f"{adv / robust:.1f} / {ddpm / plain:.1f}"),
            of.ratio("robust_adv: distance, 25 % of the steps attacked by fgsm / no attack (below "
                     "1: the attack gives back variance that smoothing took)", GROUP,
                     row("robust_adv", "fgsm", 0.25), row("robust_adv"), "frechet",
                     "19.29 / 28.68"),
            *(of.ratio(f"DDPM: distance, {above} / {below} on all steps (as strong)", GROUP,
                       row("DDPM", above, 1.0), row("DDPM", below, 1.0), "frechet", paper,
                       at_least=0.95)
              for above, below, paper in (("pgd", "fgsm", "248.1 / 243.4"),
                                          ("eot", "pgd", "248.6 / 248.1"),
                                          (eot, "pgd", "248.6 / 248.1"))),
            *(of.ratio(f"not in the paper: distance, {name}, fgsm on all steps / random signs of "
                       "the same size", GROUP, row(name, "fgsm", 1.0), row(name, "random", 1.0),
                       "frechet", at_least=1 + EFFECT) for name in MODELS),
        ]

    def _rise(self, of, name: str, relative: bool) -> list[float]:
        """Of the distance, under fgsm on all steps over no attack."""
        pairs = zip(of(GROUP, row(name, "fgsm", 1.0), "frechet"), of(GROUP, row(name), "frechet"),
                    strict=True)
        return [attacked / plain if relative else attacked - plain for attacked, plain in pairs]

    def read(self, of):
        ddpm, adv = (statistics.fmean(self._rise(of, name, relative=True)) for name in MODELS)
        return [note.format(factor=adv / ddpm) for note in self.notes]

    def figures(self, of):
        lines = [Line(f"{name}, {method}", (0, *SHARES), [
            (GROUP, row(name)), *((GROUP, row(name, method, share)) for share in SHARES)],
            colour, style)
            for name, colour in zip(MODELS, plots.COLOURS, strict=False)
            for method, style in zip(ATTACKS, (":", "-", "--", "-.", (0, (1, 3))), strict=True)]
        return {"figure-8": (line_figure(of, ("frechet", "recall"), lines,
                                         "share of steps attacked"), "")}
