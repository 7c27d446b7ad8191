"""Figure 2 and Figure 6, right: the paper's 3-D sets, and how samples travel to them.

Source: Briglia et al. 2026, sections 2.2 and 3.3, appendix D.
"""

from __future__ import annotations

import numpy as np
import torch

from robustdm.errors import UsageError
from robustdm.method.perturbation import Perturbation
from robustdm.method.sampling import sample
from robustdm.models.load_run import schedule_of
from robustdm.reporting import plots
from robustdm.studies import invitro, subspace
from robustdm.studies.claims import EFFECT, Claim, by_seed, ratio_claim, untested
from robustdm.studies.page import write_page
from robustdm.studies.runner import (
    EQUAL_WORK,
    SHRUNK_LAM,
    SHRUNK_SWEEP,
    Arm,
    load_model,
    run_arms,
    summarise,
)
from robustdm.studies.scales import Scale
from robustdm.studies.tradeoff import equal_signal_claim

DIFFERS = (
    "The paper gives neither the number of points, the network, nor the noise's strength: here "
    "10,000 points, a residual MLP of 3 x 64, 2,500 steps of 512; inlier noise of standard "
    "deviation 1 along the plane's normal, or 20 % of the points replaced by a uniform grid.",
    "The paper shows pictures only; every number here is ours.",
)
ADV = "robust_adv (ray)"
PLANE, GAUSSIANS = invitro.SETS
_BINS, _REACH, _DRAWN = 80, 3.0, 500


def _arms(scale: Scale, names: tuple[str, ...]) -> list[Arm]:
    if scale.name != "tiny":
        raise UsageError(f"scale is {scale.name!r}: the 3-D sets have one scale, tiny")
    return invitro.arms(scale.seeds, scale.steps,
                        {name: subspace.OBJECTIVES[name] for name in names})


def fig2(scale: Scale) -> list[Claim]:
    """Samples, paths and score fields under inlier noise and outliers; the perturbation's ray."""
    names = ("DDPM", ADV, "robust_adv (x)", "invariance")
    arms = subspace.with_baselines(_arms(scale, names), SHRUNK_SWEEP)
    records = run_arms(arms, scale.out, scale.jobs)
    for arm, record in zip(arms, records, strict=True):
        if arm.baseline is None:  # those have the plain network, but not its score
            record["measures"] |= _field(arm, scale)

    def values(group, name, measure):
        return by_seed(records, group, name, measure)

    def claim(text, group, measure, name=ADV, **limit):
        return ratio_claim(text, values(group, name, measure), values(group, "DDPM", measure),
                           paper="pictures only", **limit)

    claims = []
    for name in (ADV, "robust_adv (x)"):
        claims += [
            claim(f"inlier noise: distance from the plane, {name} / DDPM", PLANE, "distance", name),
            claim(f"outliers: share of samples far from the modes, {name} / DDPM", GAUSSIANS,
                  "far_share", name),
            claim(f"outliers: sliced Wasserstein distance, {name} / DDPM", GAUSSIANS,
                  "sliced_wasserstein", name),
        ]
    claims += [claim(f"{group}: distance, invariance / DDPM ('the process diverges')", group,
                     "distance", "invariance", at_least=1.5) for group in invitro.SETS]
    claims += [
        ratio_claim(f"{group}, not in the paper: distance, {ADV} / {name}",
                    values(group, ADV, "distance"), values(group, name, "distance"))
        for group, others in ((PLANE, ()), (GAUSSIANS, SHRUNK_LAM))
        for name in (EQUAL_WORK, *(f"DDPM, shrunk {lam:g}" for lam in others))
    ] + [
        equal_signal_claim(records, PLANE, name, measure, "in_plane_std", words)
        for name in (ADV, "robust_adv (x)")
        for words, measure in (("distance from the plane", "distance"),
                               ("sliced Wasserstein distance", "sliced_wasserstein"))
    ] + [
        claim(f"{group}: error of the score at {words} points, {ADV} / DDPM ('more consistent "
              "scores')", group, measure) for group in invitro.SETS
        for words, measure in (("clean", "score_error"), ("training", "score_error_train"))
    ] + [
        claim(f"{group}: magnitude of the score, {ADV} / DDPM ('increasing field intensity')",
              group, "score_magnitude", at_least=1 + EFFECT) for group in invitro.SETS
    ] + [
        claim(f"inlier noise: spread within the plane, {ADV} / DDPM ('shrinking variability')",
              PLANE, "in_plane_std"),
    ]
    tables = {}
    for group, (preset, _) in invitro.SETS.items():
        columns = [*invitro.COLUMNS[preset], "score_error", "score_error_train",
                   "score_magnitude"]
        tables[group] = summarise([r for r in records if r["group"] == group], columns)
    schedule = schedule_of(arms[0].config)
    figures = {"perturbation-ray": (plots.schedule_figure(schedule, Perturbation(), ("x",)),
                                    "Figure 2 (c): the radius in units of x")}
    for group, (preset, _) in invitro.SETS.items():
        made = invitro.figure(scale.out, [a for a in arms if a.group == group and
                                          a.config.seed == 0])
        figures[preset] = (made, f"{group}: samples, DDIM paths, score field (seed 0)")
    return write_page(
        scale.out, "Figure 2: 3-D sets", tables, claims, records, DIFFERS, (
            "score_error is the relative error of the learnt score against that of the clean law "
            "at noise scale 0.11, at 1,000 clean points with noise of that scale; "
            "score_error_train the same at training points without it, outliers included, where "
            "the true score is large; score_magnitude is its mean length there over the true "
            "one's.",
            "Distances reward shrinkage: in_plane_std (1 is the truth) and the "
            "sliced Wasserstein distance stand beside them."), figures)


def _field(arm: Arm, scale: Scale) -> dict[str, float]:
    """Learnt against true score of the clean law, at the scale of SCORE_TIMESTEP."""
    data, model = arm.make_data(arm.config), load_model(arm, scale.out)
    schedule = schedule_of(arm.config)
    t = invitro.SCORE_TIMESTEP
    a = float(schedule.sqrt_alphas_cumprod[t])
    s = float(schedule.sqrt_one_minus_alphas_cumprod[t])
    items = torch.arange(1000)
    noise = torch.randn(1000, *data.shape, generator=torch.Generator().manual_seed(0))

    def compared(points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            return -model(points, torch.full((1000,), t)) / s, data.score(points / a, s / a) / a

    def error(points: torch.Tensor) -> float:
        learnt, true = compared(points)
        return float((learnt - true).norm() / true.norm())

    clean, train = a * data.clean(items) + s * noise, a * data.batch(items)
    learnt, true = compared(train)
    return {"score_error": error(clean), "score_error_train": error(train),
            "score_magnitude": float(learnt.norm(dim=1).mean() / true.norm(dim=1).mean())}


def fig6_right(scale: Scale) -> list[Claim]:
    """How concentrated and how straight the sampling paths are."""
    names = ("DDPM", ADV)
    arms = _arms(scale, names)
    records = run_arms(arms, scale.out, scale.jobs)
    shown: dict[tuple[str, str], np.ndarray] = {}
    for arm, record in zip(arms, records, strict=True):
        counts, straight = _paths(arm, scale)
        share = counts / counts.sum()
        entropy = -(share[share > 0] * np.log(share[share > 0])).sum()
        record["measures"] |= {"cells": float(np.exp(entropy)), "straightness": straight}
        if arm.config.seed == 0:
            shown[arm.group, arm.name] = counts
    claims = []
    for group in invitro.SETS:
        def values(name, measure, group=group):
            return by_seed(records, group, name, measure)

        claims += [
            ratio_claim(f"{group}: cells that the paths fill, {ADV} / DDPM ('clustered, sharp')",
                        values(ADV, "cells"), values("DDPM", "cells"), paper="pictures only"),
            ratio_claim(f"{group}: straightness of the DDIM paths, {ADV} / DDPM "
                        "('remain straight')", values(ADV, "straightness"),
                        values("DDPM", "straightness"), at_least=0.95, paper="pictures only"),
        ]
    smallest = [min(modes) for modes in zip(*(
        by_seed(records, GAUSSIANS, ADV, f"mode{k}") for k in range(3)), strict=True)]
    claims += [
        ratio_claim(f"{GAUSSIANS}: smallest mode's share, {ADV} / truth ('no mode collapse')",
                    smallest, [1 / 3] * len(smallest), at_least=0.6, paper="pictures only"),
        ratio_claim(f"{PLANE}: spread within the plane, {ADV} / DDPM ('less variability')",
                    by_seed(records, PLANE, ADV, "in_plane_std"),
                    by_seed(records, PLANE, "DDPM", "in_plane_std"), paper="pictures only"),
        untested(f"{PLANE}: DDPM has an additional mode (no measure tells a subtle one)",
                 "pictures only"),
    ]
    made, axes = plots.figure(len(invitro.SETS), len(names), size=(3.4, 3.2))
    for (group, name), counts in shown.items():
        ax = axes[list(invitro.SETS).index(group), names.index(name)]
        ax.imshow(np.log1p(counts.T), origin="lower", extent=(-_REACH, _REACH) * 2, cmap="magma")
        ax.set_title(f"{group}: {name}", fontsize=7)
    columns = ["cells", "straightness", "distance", "sliced_wasserstein", "in_plane_std",
               "far_share", *(f"mode{k}" for k in range(3))]
    tables = {group: summarise([r for r in records if r["group"] == group], columns)
              for group in invitro.SETS}
    return write_page(
        scale.out, "Figure 6, right: the flow from noise to data", tables, claims, records,
        DIFFERS, (
            f"cells is exp of the entropy of where {_DRAWN} DDPM paths of 200 steps have been, on "
            f"a grid of {_BINS} x {_BINS} cells in the plane of sight; straightness is the "
            "distance from start to end over the length of the path, DDIM with 100 steps.",),
        {"paths": (made, "Where the paths have been (seed 0), logarithmic.")})


def _paths(arm: Arm, scale: Scale) -> tuple[np.ndarray, float]:
    """Counts of visited cells, and the mean straightness."""
    data, model = arm.make_data(arm.config), load_model(arm, scale.out)
    view = plots.point_view(data.clean(torch.arange(len(data))).numpy())
    plane = view.planes[-1] if data.name == "plane" else view.planes[0]
    schedule = schedule_of(arm.config)

    def drawn(**settings) -> torch.Tensor:
        frames = []
        sample(model, schedule, data.shape, num=_DRAWN, batch_size=_DRAWN, seed=arm.config.seed,
               trajectory=lambda timestep, numbers, x: frames.append(x.clone()), **settings)
        return torch.stack(frames)

    flat = (drawn(steps=200).numpy() @ plane).reshape(-1, 2)
    counts, _, _ = np.histogram2d(*flat.T, bins=_BINS, range=[(-_REACH, _REACH)] * 2)
    path = drawn(sampler="ddim", steps=100)
    length = path.diff(dim=0).norm(dim=2).sum(0)
    return counts, float(((path[-1] - path[0]).norm(dim=1) / length).mean())
