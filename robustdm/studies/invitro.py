"""All objectives on the paper's 3-D sets; distances reward shrinkage, so spread and the sliced
Wasserstein distance stand beside them."""

from robustdm.studies.points import GAUSSIANS, PLANE, SETS, PointStudy, point_arms
from robustdm.studies.runner import SHRUNK_SWEEP
from robustdm.studies.scales import OBJECTIVES


class InVitro(PointStudy):
    """Distances to DDPM's."""

    title = "The 3-D sets"
    differs = ()

    def arms(self):
        return point_arms(self.scale, OBJECTIVES, SHRUNK_SWEEP)

    def compare(self, of):
        def claim(words, group, name, measure, **limit):
            return of.ratio(f"{group}: {words}, {{}} / {{}}", group, name, "DDPM", measure, **limit)

        return [
            *(made for name in ("robust_adv (ray)", "robust_adv (x)") for made in (
                claim("distance", PLANE, name, "distance", at_most=1 / 3),
                claim("far share", GAUSSIANS, name, "far_share"))),
            *(claim("distance", group, "invariance", "distance", at_least=1.5) for group in SETS),
        ]
