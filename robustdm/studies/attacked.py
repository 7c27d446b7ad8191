"""Figure 8: attacks on the sampling trajectory, beside random signs and no attack at all.

Source: Briglia et al. 2026, section 3.4, appendices A.2 to A.4.
"""

from __future__ import annotations

import statistics
from dataclasses import replace

from robustdm.method.baselines import Baseline
from robustdm.method.trajectory_attack import TrajectoryAttack
from robustdm.reporting import plots
from robustdm.studies.claims import EFFECT, Claim, by_seed, ratio_claim, spread
from robustdm.studies.denoising import tables
from robustdm.studies.page import write_page
from robustdm.studies.scales import METHODS, Scale, corrupted, noise_name

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


def _row(name: str, method: str, share: float) -> str:
    return f"{name}, {method} {share:.0%}"


def fig8(scale: Scale) -> list[Claim]:
    """Both models under every attack, at every share of the steps; the shrunk DDPM under some."""
    group, arms = noise_name(0.0), []
    sampling = dict(samples=scale.attacked_samples, sampling_steps=scale.attacked_steps)
    for seed in range(scale.seeds):
        for name in (*MODELS, SHRUNK):
            fields = METHODS[name.split(",")[0]] | corrupted(0.0)
            how = dict(sampling, baseline=Baseline("shrink", 0.3) if name == SHRUNK else None)
            arms.append(scale.arm(group, f"{name}, no attack", fields, seed, **how))
            arms += [scale.arm(group, _row(name, words, share), fields, seed, **how,
                               attack=TrajectoryAttack(share=share, seed=seed, **attack))
                     for words, attack in ATTACKS.items() for share in SHARES
                     if name != SHRUNK or words in ("random", "fgsm")]
    records = scale.run(arms)
    records += replace(scale, samples=scale.attacked_samples).references(arms)

    def values(row, measure="frechet"):
        return by_seed(records, group, row, measure)

    def compared(words, method, share, below="DDPM", paper="", **limit):
        """The distances of robust_adv and of another model under an attack."""
        return ratio_claim(f"{words}, {share:.0%} of the steps: distance, robust_adv / {below}",
                           values(_row("robust_adv", method, share)),
                           values(_row(below, method, share)), paper=paper, **limit)

    plain = {name: values(f"{name}, no attack") for name in MODELS}
    claims = [compared(method, method, share, paper=f"{robust[i]} / {ddpm[i]}")
              for method, (ddpm, robust) in PAPER.items() for i, share in enumerate(SHARES)]
    claims += [compared("eot as Algorithm 4 prints it", "eot as printed", share,
                        paper=f"{PAPER['eot'][1][i]} / {PAPER['eot'][0][i]}")
               for i, share in enumerate(SHARES)]
    claims += [compared("not in the paper: random signs (holds: no adversary is needed)", "random",
                        share) for share in SHARES]
    claims += [compared(f"not in the paper: {method}", method, share, SHRUNK)
               for method in ("random", "fgsm") for share in (0.25, 1.0)]

    def rise(name, method, share, relative):
        attacked = values(_row(name, method, share))
        return [a / b if relative else a - b for a, b in zip(attacked, plain[name], strict=True)]

    fgsm = PAPER["fgsm"]
    claims += [
        ratio_claim(
            "fgsm, all steps: rise of the distance over no attack in absolute terms, robust_adv / "
            "DDPM", rise("robust_adv", "fgsm", 1.0, False), rise("DDPM", "fgsm", 1.0, False),
            paper=f"{fgsm[1][3] - UNATTACKED[1]:.0f} / {fgsm[0][3] - UNATTACKED[0]:.0f}"),
        ratio_claim(
            "fgsm, all steps: rise as a factor of no attack, robust_adv's / DDPM's",
            rise("robust_adv", "fgsm", 1.0, True), rise("DDPM", "fgsm", 1.0, True),
            paper=f"{fgsm[1][3] / UNATTACKED[1]:.1f} / {fgsm[0][3] / UNATTACKED[0]:.1f}"),
        ratio_claim(
            "robust_adv: distance, 25 % of the steps attacked by fgsm / no attack (below 1: the "
            "attack gives back variance that smoothing took)",
            values(_row("robust_adv", "fgsm", 0.25)), plain["robust_adv"], paper="19.29 / 28.68"),
    ]
    for above, below, paper in (("pgd", "fgsm", "248.1 / 243.4"), ("eot", "pgd", "248.6 / 248.1"),
                                ("eot as printed", "pgd", "248.6 / 248.1")):
        claims.append(ratio_claim(
            f"DDPM: distance, {above} / {below} on all steps (as strong)",
            values(_row("DDPM", above, 1.0)), values(_row("DDPM", below, 1.0)),
            at_least=0.95, paper=paper))
    for name in MODELS:
        claims.append(ratio_claim(
            f"not in the paper: distance, {name}, fgsm on all steps / random signs of the same "
            "size", values(_row(name, "fgsm", 1.0)), values(_row(name, "random", 1.0)),
            at_least=1 + EFFECT))
    made, axes = plots.figure(1, 2, size=(4.8, 3.6))
    for ax, measure in zip(axes[0], ("frechet", "recall"), strict=True):
        for colour, name in zip(plots.COLOURS, MODELS, strict=False):
            for style, method in zip((":", "-", "--", "-.", (0, (1, 3))), ATTACKS, strict=True):
                found = [spread(values(f"{name}, no attack", measure)),
                         *(spread(values(_row(name, method, share), measure))
                           for share in SHARES)]
                ax.errorbar((0, *SHARES), [v.mean for v in found], [v.sd for v in found],
                            color=colour, linestyle=style, marker="o", markersize=3,
                            label=f"{name}, {method}")
        ax.set(xlabel="share of steps attacked", title=measure)
    axes[0, 0].legend(fontsize=6)
    factor = statistics.fmean(rise("robust_adv", "fgsm", 1.0, True)) / statistics.fmean(
        rise("DDPM", "fgsm", 1.0, True))
    paper = {f"{name}, {method}": dict(zip(("25%", "50%", "75%", "100%"), map(str, numbers),
                                           strict=True))
             for method, both in PAPER.items() for name, numbers in zip(MODELS, both, strict=True)}
    return write_page(
        scale.out, f"Figure 8: attacks on the trajectory ({scale.name})",
        {"the paper, CIFAR-10, FID": paper,
         **tables(records, ["frechet", "signal", scale.noise, "precision", "recall"])},
        claims, records, (
            *scale.differs, f"{scale.attacked_samples:,} samples by "
            f"{scale.attacked_steps or 1000} steps."), (
            "An attack is as strong as its distance above random signs of the same size, not above "
            "no attack: the first row of each model is the same sampler left alone.",
            f"As a factor of its own unattacked distance, robust_adv rises {factor:.2f} times as "
            "much as DDPM under fgsm on all steps. Its unattacked distance is larger, so a smaller "
            "factor alone would be no sign of robustness.",
            "The paper says neither which model was attacked (here: trained on clean data), nor "
            "which steps (here: evenly spread), nor how large the random start is (here: that of "
            "the sampler's noise).",
            "Where fgsm's gradient keeps its signs, pgd ends in the same corner of the ball: rows "
            "of pgd that equal fgsm's are no second witness.",
            "eot, corrected, compares with the step that the sampler's own noise makes, and so "
            "takes that noise back; as printed, it leads away from the state itself.",
        ), {"figure-8": (made, "")})
