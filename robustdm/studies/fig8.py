"""Figure 8: attacks on the sampling trajectory, beside random signs and no attack at all.

Source: Briglia et al. 2026, section 3.4, appendices A.2 to A.4.
"""

import statistics
from dataclasses import replace

from robustdm.method.baselines import Baseline
from robustdm.method.trajectory_attack import TrajectoryAttack
from robustdm.reporting import plots
from robustdm.studies.claims import EFFECT, Ratio, ratio_claim
from robustdm.studies.scales import METHODS, noise_name
from robustdm.studies.study import Line, Study, line_figure

SHARES = (0.25, 0.5, 0.75, 1.0)
ATTACKS = {
    "random": dict(method="random"), "fgsm": dict(method="fgsm"), "pgd": dict(method="pgd"),
    "eot": dict(method="eot"), "eot as printed": dict(method="eot", eot_loss="printed")}
STYLES = (":", "-", "--", "-.", (0, (1, 3)))
FID = {  # of DDPM and robust_adv at every share
    "fgsm": ((49.8, 131.7, 190.4, 243.4), (19.29, 52.0, 90.7, 127.7)),
    "pgd": ((55.7, 134.5, 200.3, 248.1), (22.7, 55.8, 98.1, 128.6)),
    "eot": ((57.6, 132.7, 195.99, 248.6), (25.9, 61.2, 100.2, 132.6))}
PLAIN, ROBUST = 7.2, 28.68  # without an attack
MODELS = ("DDPM", "robust_adv")
SHRUNK = "DDPM, shrunk 0.3"
"""What robust training with this lam aims at, without training."""
GROUP = noise_name(0.0)


def row(name: str, method: str = "no attack", share: float = 0.0) -> str:
    """Name of an arm."""
    return f"{name}, {method} {share:.0%}" if share else f"{name}, {method}"


def models(words: str, method: str, share: float, below: str = "DDPM", paper: str = "") -> Ratio:
    """robust_adv and another model under an attack."""
    return Ratio(f"{words}, {share:.0%} of the steps: distance, robust_adv / {below}", GROUP,
                 row("robust_adv", method, share), row(below, method, share), "frechet", paper)


class Figure8(Study):
    """Both models under every attack, at every share of the steps; the shrunk DDPM under some."""

    title = "Figure 8: attacks on the trajectory"
    references = True
    paper = {"the paper, CIFAR-10, FID": {
        f"{name}, {method}": {f"{s:.0%}": str(n) for s, n in zip(SHARES, both[i], strict=True)}
        for method, both in FID.items() for i, name in enumerate(MODELS)}}
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
    comparisons = [
        *(models(method, method, share, paper=f"{robust[i]} / {ddpm[i]}")
          for method, (ddpm, robust) in FID.items() for i, share in enumerate(SHARES)),
        *(models("eot as Algorithm 4 prints it", "eot as printed", share,
                 paper=f"{FID['eot'][1][i]} / {FID['eot'][0][i]}")
          for i, share in enumerate(SHARES)),
        *(models("not in the paper: random signs (holds: no adversary is needed)", "random", share)
          for share in SHARES),
        *(models(f"not in the paper: {method}", method, share, SHRUNK)
          for method in ("random", "fgsm") for share in (0.25, 1.0)),
        Ratio("robust_adv: distance, 25 % of the steps attacked by fgsm / no attack (below 1: the "
              "attack gives back variance that smoothing took)", GROUP,
              row("robust_adv", "fgsm", 0.25), row("robust_adv"), "frechet", "19.29 / 28.68"),
        *(Ratio(f"DDPM: distance, {above} / {below} on all steps (as strong)", GROUP,
                row("DDPM", above, 1.0), row("DDPM", below, 1.0), "frechet", paper, at_least=0.95)
          for above, below, paper in (("pgd", "fgsm", "248.1 / 243.4"),
                                      ("eot", "pgd", "248.6 / 248.1"),
                                      ("eot as printed", "pgd", "248.6 / 248.1"))),
        *(Ratio(f"not in the paper: distance, {name}, fgsm on all steps / random signs of the same "
                "size", GROUP, row(name, "fgsm", 1.0), row(name, "random", 1.0), "frechet",
                at_least=1 + EFFECT) for name in MODELS)]

    def __init__(self, scale):
        super().__init__(replace(
            scale, samples=scale.attacked_samples, sampling_steps=scale.attacked_steps))
        self.columns = ["frechet", "signal", scale.noise, "precision", "recall"]
        self.differs = (*scale.differs, f"{scale.attacked_samples:,} samples by "
                        f"{scale.attacked_steps or 1000} steps.")

    def arms(self):
        made = []
        for name in (*MODELS, SHRUNK):
            how = dict(baseline=Baseline("shrink", 0.3) if name == SHRUNK else None)
            plain = self.scale.arms(0.0, {row(name): METHODS[name.split(",")[0]]}, None, how)
            attacks = {k: ATTACKS[k] for k in ("random", "fgsm")} if name == SHRUNK else ATTACKS
            made += plain + [
                replace(arm, name=row(name, words, share), attack=TrajectoryAttack(
                    share=share, seed=arm.config.seed, **attack))
                for words, attack in attacks.items() for share in SHARES for arm in plain]
        return made

    def _rises(self, of, relative: bool) -> list[list[float]]:
        """Of the distance under fgsm on all steps over no attack: robust_adv's and DDPM's."""
        return [[a / b if relative else a - b for a, b in zip(
            of(GROUP, row(name, "fgsm", 1.0), "frechet"), of(GROUP, row(name), "frechet"),
            strict=True)] for name in reversed(MODELS)]

    def compare(self, of):
        (*_, ddpm), (*_, adv) = FID["fgsm"]
        return super().compare(of) + [
            ratio_claim("fgsm, all steps: rise of the distance over no attack in absolute terms, "
                        "robust_adv / DDPM", *self._rises(of, relative=False),
                        paper=f"{adv - ROBUST:.0f} / {ddpm - PLAIN:.0f}"),
            ratio_claim("fgsm, all steps: rise as a factor of no attack, robust_adv's / DDPM's",
                        *self._rises(of, relative=True),
                        paper=f"{adv / ROBUST:.1f} / {ddpm / PLAIN:.1f}")]

    def read(self, of):
        adv, ddpm = map(statistics.fmean, self._rises(of, relative=True))
        return [note.format(factor=adv / ddpm) for note in self.notes]

    def figures(self, of):
        lines = [Line(f"{name}, {method}", (0, *SHARES), [
            (GROUP, row(name)), *((GROUP, row(name, method, share)) for share in SHARES)],
            colour, style) for name, colour in zip(MODELS, plots.COLOURS, strict=False)
            for method, style in zip(ATTACKS, STYLES, strict=True)]
        made = line_figure(of, ("frechet", "recall"), lines, "share of steps attacked")
        return {"figure-8": (made, "")}
