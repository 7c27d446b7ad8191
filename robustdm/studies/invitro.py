"""All objectives on the paper's 3-D sets; distances reward shrinkage, so spread and the sliced
Wasserstein distance stand beside them."""

from robustdm.studies.claims import Ratio
from robustdm.studies.points import GAUSSIANS, PLANE, SETS, PointStudy
from robustdm.studies.runner import SHRUNK_SWEEP
from robustdm.studies.scales import OBJECTIVES


class InVitro(PointStudy):
    """robust_adv removes noise, and invariance fails."""

    title = "The 3-D sets"
    differs = ()
    methods, shrunk = OBJECTIVES, SHRUNK_SWEEP
    comparisons = [
        *(Ratio(f"{group}: {words}, {{}} / {{}}", group, name, "DDPM", measure, at_most=limit)
          for name in ("robust_adv (ray)", "robust_adv (x)") for group, words, measure, limit in (
              (PLANE, "distance", "distance", 1 / 3), (GAUSSIANS, "far share", "far_share", None))),
        *(Ratio(f"{group}: distance, {{}} / {{}}", group, "invariance", "DDPM", "distance",
                at_least=1.5) for group in SETS),
    ]
