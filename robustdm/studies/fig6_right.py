"""Figure 6, right: how concentrated and how straight the sampling paths to the 3-D sets are.

Source: Briglia et al. 2026, sections 2.2 and 3.3, appendix D.
"""

import numpy as np

from robustdm.reporting import plots
from robustdm.studies.claims import Ratio, ratio_claim, untested
from robustdm.studies.points import (
    BINS,
    DIFFERS,
    DRAWN,
    GAUSSIANS,
    MODES,
    PLANE,
    REACH,
    SETS,
    PointStudy,
    path_measures,
    visits,
)
from robustdm.studies.scales import OBJECTIVES

NAMES = DDPM, ADV = "DDPM", "robust_adv (ray)"
PAPER = "pictures only"


class Figure6Right(PointStudy):
    """Paths of DDPM and robust_adv; baselines have those of the plain network."""

    title = "Figure 6, right: the flow from noise to data"
    differs = DIFFERS
    methods = {name: OBJECTIVES[name] for name in NAMES}
    columns = ("cells", "straightness", "distance", "sliced_wasserstein", "in_plane_std",
               "far_share", *MODES)
    notes = (
        f"cells is exp of the entropy of where {DRAWN} DDPM paths of 200 steps have been, on a "
        f"grid of {BINS} x {BINS} cells in the plane of sight; straightness is the distance from "
        "start to end over the length of the path, DDIM with 100 steps.",)
    comparisons = [ratio for group in SETS for ratio in (
        Ratio(f"{group}: cells that the paths fill, {{}} / {{}} ('clustered, sharp')", group, ADV,
              DDPM, "cells", PAPER),
        Ratio(f"{group}: straightness of the DDIM paths, {{}} / {{}} ('remain straight')", group,
              ADV, DDPM, "straightness", PAPER, at_least=0.95))]

    def probe(self, arm):
        return path_measures(arm, self.scale)

    def compare(self, of):
        modes = zip(*(of(GAUSSIANS, ADV, mode) for mode in MODES), strict=True)
        smallest = [min(shares) for shares in modes]
        return super().compare(of) + [
            ratio_claim(f"{GAUSSIANS}: smallest mode's share, {ADV} / truth ('no mode collapse')",
                        smallest, [1 / 3] * len(smallest), at_least=0.6, paper=PAPER),
            Ratio(f"{PLANE}: spread within the plane, {{}} / {{}} ('less variability')", PLANE, ADV,
                  DDPM, "in_plane_std", PAPER).claim(of),
            untested(f"{PLANE}: DDPM has an additional mode (no measure tells a subtle one)",
                     PAPER)]

    def figures(self, of):
        made, axes = plots.figure(len(SETS), len(NAMES), size=(3.4, 3.2))
        for arm in (arm for arm in self.arms() if arm.config.seed == 0):
            ax = axes[SETS.index(arm.group), NAMES.index(arm.name)]
            ax.imshow(np.log1p(visits(arm, self.scale).T), origin="lower",
                      extent=(-REACH, REACH) * 2, cmap="magma")
            ax.set_title(f"{arm.group}: {arm.name}", fontsize=7)
        return {"paths": (made, "Where the paths have been (seed 0), logarithmic.")}
