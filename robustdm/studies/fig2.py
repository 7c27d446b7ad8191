"""Figure 2: samples, paths and score fields under inlier noise and outliers.

Source: Briglia et al. 2026, sections 2.2 and 3.3, appendix D.
"""

from robustdm.method.perturbation import Perturbation
from robustdm.method.schedule import NoiseSchedule
from robustdm.reporting import plots
from robustdm.studies.claims import EFFECT, Ratio
from robustdm.studies.points import (
    DIFFERS,
    GAUSSIANS,
    PLANE,
    SETS,
    SHOWN,
    PointStudy,
    score_measures,
)
from robustdm.studies.runner import EQUAL_WORK, SHRUNK_SWEEP
from robustdm.studies.scales import OBJECTIVES, SHRUNK
from robustdm.studies.tradeoff import EqualSignal

DDPM, ADV, ADV_X, INVARIANCE = SHOWN
PAPER = "pictures only"


class Figure2(PointStudy):
    """The methods of the figure, with what their scores are worth."""

    title = "Figure 2: 3-D sets"
    differs = DIFFERS
    methods, shrunk = {name: OBJECTIVES[name] for name in SHOWN}, SHRUNK_SWEEP
    more = ("score_error", "score_error_train", "score_magnitude")
    notes = (
        "score_error is the relative error of the learnt score against that of the clean law at "
        "noise scale 0.11, at 1,000 clean points with noise of that scale; score_error_train the "
        "same at training points without it, outliers included, where the true score is large; "
        "score_magnitude is its mean length there over the true one's.",
        "Distances reward shrinkage: in_plane_std (1 is the truth) and the sliced Wasserstein "
        "distance stand beside them.")
    comparisons = [
        *(Ratio(f"{words}, {{}} / {{}}", group, name, DDPM, measure, PAPER)
          for name in (ADV, ADV_X) for words, group, measure in (
              ("inlier noise: distance from the plane", PLANE, "distance"),
              ("outliers: share of samples far from the modes", GAUSSIANS, "far_share"),
              ("outliers: sliced Wasserstein distance", GAUSSIANS, "sliced_wasserstein"))),
        *(Ratio(f"{group}: distance, {{}} / {{}} ('the process diverges')", group, INVARIANCE, DDPM,
                "distance", PAPER, at_least=1.5) for group in SETS),
        *(Ratio(f"{group}, not in the paper: distance, {{}} / {{}}", group, ADV, name, "distance")
          for group, others in ((PLANE, ()), (GAUSSIANS, SHRUNK.values()))
          for name in (EQUAL_WORK, *others)),
        *(EqualSignal(PLANE, name, measure, "in_plane_std", words) for name in (ADV, ADV_X)
          for words, measure in (("distance from the plane", "distance"),
                                 ("sliced Wasserstein distance", "sliced_wasserstein"))),
        *(Ratio(f"{group}: error of the score at {words} points, {{}} / {{}} ('more consistent "
                "scores')", group, ADV, DDPM, measure, PAPER) for group in SETS
          for words, measure in (("clean", "score_error"), ("training", "score_error_train"))),
        *(Ratio(f"{group}: magnitude of the score, {{}} / {{}} ('increasing field intensity')",
                group, ADV, DDPM, "score_magnitude", PAPER, at_least=1 + EFFECT) for group in SETS),
        Ratio("inlier noise: spread within the plane, {} / {} ('shrinking variability')", PLANE,
              ADV, DDPM, "in_plane_std", PAPER),
    ]

    def probe(self, arm):  # a baseline has the plain network, but not its score
        return score_measures(arm, self.scale) if arm.baseline is None else {}

    def figures(self, of):
        ray = plots.schedule_figure(NoiseSchedule.linear(1000), Perturbation(), ("x",))
        caption = "Figure 2 (c): the radius in units of x"
        return {"perturbation-ray": (ray, caption)} | super().figures(of)
