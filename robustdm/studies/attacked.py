"""Figure 8: attacks on the sampling trajectory, beside random signs and no attack at all.

Source: Briglia et al. 2026, section 3.4, appendices A.2 to A.4.
"""

from __future__ import annotations

import statistics

from robustdm import plots
from robustdm.attacks import TrajectoryAttack
from robustdm.studies.denoising import tables
from robustdm.studies.page import write_page
from robustdm.studies.runner import Claim
from robustdm.studies.scales import (
    METHODS,
    Scale,
    by_seed,
    corrupted,
    noise_name,
    ratio_claim,
    spread,
)

SHARES = (0.25, 0.5, 0.75, 1.0)
ATTACKS = ("random", "fgsm", "pgd", "eot")
PAPER = {
    "fgsm": ((49.8, 131.7, 190.4, 243.4), (19.29, 52.0, 90.7, 127.7)),
    "pgd": ((55.7, 134.5, 200.3, 248.1), (22.7, 55.8, 98.1, 128.6)),
    "eot": ((57.6, 132.7, 195.99, 248.6), (25.9, 61.2, 100.2, 132.6)),
}
UNATTACKED = (7.2, 28.68)
MODELS = ("DDPM", "robust_adv")


def _row(name: str, method: str, share: float) -> str:
    return f"{name}, {method} {share:.0%}"


def fig8(scale: Scale) -> list[Claim]:
    """Both models under every attack, at every share of the steps."""
    group, arms = noise_name(0.0), []
    sampling = dict(samples=scale.attacked_samples, sampling_steps=scale.attacked_steps)
    for seed in range(scale.seeds):
        for name in MODELS:
            fields = METHODS[name] | corrupted(0.0)
            arms.append(scale.arm(group, f"{name}, no attack", fields, seed, **sampling))
            arms += [scale.arm(group, _row(name, method, share), fields, seed, **sampling,
                               attack=TrajectoryAttack(method, share, seed=seed))
                     for method in ATTACKS for share in SHARES]
    records = scale.run(arms)

    def values(row, measure="frechet"):
        return by_seed(records, group, row, measure)

    plain = {name: values(f"{name}, no attack") for name in MODELS}
    claims = []
    for method, (ddpm, robust) in PAPER.items():
        for i, share in enumerate(SHARES):
            claims.append(ratio_claim(
                f"{method}, {share:.0%} of the steps: distance, robust_adv / DDPM",
                values(_row("robust_adv", method, share)), values(_row("DDPM", method, share)),
                paper=f"{robust[i]} / {ddpm[i]}"))

    for share in SHARES:
        claims.append(ratio_claim(
            f"not in the paper: the same ratio under random signs, {share:.0%} of the steps (below "
            "1: no adversary is needed for it)", values(_row("robust_adv", "random", share)),
            values(_row("DDPM", "random", share))))

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
        ratio_claim("DDPM: distance, eot / pgd on all steps (the same gradient with noise on it)",
                    values(_row("DDPM", "eot", 1.0)), values(_row("DDPM", "pgd", 1.0)),
                    at_least=0.95, paper="248.6 / 248.1"),
    ]
    for name in MODELS:
        claims.append(ratio_claim(
            f"not in the paper: distance, {name}, fgsm on all steps / random signs of the same "
            "size", values(_row(name, "fgsm", 1.0)), values(_row(name, "random", 1.0)),
            at_least=1.0))
    made, axes = plots.figure(1, 2, size=(4.8, 3.6))
    for ax, measure in zip(axes[0], ("frechet", "recall"), strict=True):
        for colour, name in zip(plots.COLOURS, MODELS, strict=False):
            for style, method in zip((":", "-", "--", "-."), ATTACKS, strict=True):
                found = [spread(values(f"{name}, no attack", measure)),
                         *(spread(values(_row(name, method, share), measure))
                           for share in SHARES)]
                ax.errorbar((0, *SHARES), [v.mean for v in found], [v.sd for v in found],
                            color=colour, linestyle=style, marker="o", markersize=3,
                            label=f"{name}, {method}")
        ax.set(xlabel="share of steps attacked", title=measure)
    axes[0, 0].legend(fontsize=6)
    signal = ["signal"] if scale.signal else []
    factor = statistics.fmean(rise("robust_adv", "fgsm", 1.0, True)) / statistics.fmean(
        rise("DDPM", "fgsm", 1.0, True))
    paper = {f"{name}, {method}": dict(zip(("25%", "50%", "75%", "100%"), map(str, numbers),
                                           strict=True))
             for method, both in PAPER.items() for name, numbers in zip(MODELS, both, strict=True)}
    return write_page(
        scale.out, f"Figure 8: attacks on the trajectory ({scale.name})",
        {"the paper, CIFAR-10, FID": paper,
         **tables(records, ["frechet", *signal, scale.noise, "precision", "recall"])},
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
        ), {"figure-8": (made, "")})
