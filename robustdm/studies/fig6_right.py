"""Figure 6, right: how concentrated and how straight the sampling paths to the 3-D sets are.

Source: Briglia et al. 2026, sections 2.2 and 3.3, appendix D.
"""

import numpy as np
import torch

from robustdm.method.sampling import sample
from robustdm.models.load_run import schedule_of
from robustdm.reporting import plots
from robustdm.studies.claims import ratio_claim, untested
from robustdm.studies.fig2 import ADV, DIFFERS
from robustdm.studies.points import GAUSSIANS, MODES, PLANE, SETS, plane_of_sight, point_arms
from robustdm.studies.runner import load_model
from robustdm.studies.scales import OBJECTIVES
from robustdm.studies.study import Study

NAMES = ("DDPM", ADV)
BINS, REACH, DRAWN = 80, 3.0, 500


class Figure6Right(Study):
    """Paths of DDPM and robust_adv."""

    title = "Figure 6, right: the flow from noise to data"
    differs = DIFFERS
    columns = ("cells", "straightness", "distance", "sliced_wasserstein", "in_plane_std",
               "far_share", *MODES)
    notes = (
        f"cells is exp of the entropy of where {DRAWN} DDPM paths of 200 steps have been, on a "
        f"grid of {BINS} x {BINS} cells in the plane of sight; straightness is the distance from "
        "start to end over the length of the path, DDIM with 100 steps.",)

    def arms(self):
        return point_arms(self.scale, {name: OBJECTIVES[name] for name in NAMES})

    def probe(self, arm):
        counts = self._counts(arm)
        share = counts / counts.sum()
        entropy = -(share[share > 0] * np.log(share[share > 0])).sum()
        path = self._drawn(arm, sampler="ddim", steps=100)
        length = path.diff(dim=0).norm(dim=2).sum(0)
        return {"cells": float(np.exp(entropy)),
                "straightness": float(((path[-1] - path[0]).norm(dim=1) / length).mean())}

    def compare(self, of):
        def claim(text, group, measure, **limit):
            return of.ratio(text, group, ADV, "DDPM", measure, "pictures only", **limit)

        smallest = [min(shares) for shares in zip(*(of(GAUSSIANS, ADV, mode) for mode in MODES),
                                                  strict=True)]
        return [
            *(made for group in SETS for made in (
                claim(f"{group}: cells that the paths fill, {{}} / {{}} ('clustered, sharp')",
                      group, "cells"),
                claim(f"{group}: straightness of the DDIM paths, {{}} / {{}} ('remain straight')",
                      group, "straightness", at_least=0.95))),
            ratio_claim(f"{GAUSSIANS}: smallest mode's share, {ADV} / truth ('no mode collapse')",
                        smallest, [1 / 3] * len(smallest), at_least=0.6, paper="pictures only"),
            claim(f"{PLANE}: spread within the plane, {{}} / {{}} ('less variability')", PLANE,
                  "in_plane_std"),
            untested(f"{PLANE}: DDPM has an additional mode (no measure tells a subtle one)",
                     "pictures only"),
        ]

    def figures(self, of):
        made, axes = plots.figure(len(SETS), len(NAMES), size=(3.4, 3.2))
        for arm in (arm for arm in self.arms() if arm.config.seed == 0):
            ax = axes[SETS.index(arm.group), NAMES.index(arm.name)]
            ax.imshow(np.log1p(self._counts(arm).T), origin="lower",
                      extent=(-REACH, REACH) * 2, cmap="magma")
            ax.set_title(f"{arm.group}: {arm.name}", fontsize=7)
        return {"paths": (made, "Where the paths have been (seed 0), logarithmic.")}

    def _counts(self, arm) -> np.ndarray:
        """Points of DDPM's paths in each cell."""
        plane = plane_of_sight(arm.make_data(arm.config))
        flat = (self._drawn(arm, steps=200).numpy() @ plane).reshape(-1, 2)
        return np.histogram2d(*flat.T, bins=BINS, range=[(-REACH, REACH)] * 2)[0]

    def _drawn(self, arm, **settings) -> torch.Tensor:
        """(steps, DRAWN, 3) paths."""
        frames = []
        sample(load_model(arm, self.scale.out), schedule_of(arm.config),
               arm.make_data(arm.config).shape, num=DRAWN, batch_size=DRAWN, seed=arm.config.seed,
               trajectory=lambda timestep, numbers, x: frames.append(x.clone()), **settings)
        return torch.stack(frames)
