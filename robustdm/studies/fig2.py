"""Figure 2: samples, paths and score fields under inlier noise and outliers.

Source: Briglia et al. 2026, sections 2.2 and 3.3, appendix D.
"""

from robustdm.method.perturbation import Perturbation
from robustdm.models.load_run import schedule_of
from robustdm.reporting import plots
from robustdm.studies.claims import EFFECT
from robustdm.studies.points import (
    GAUSSIANS,
    PLANE,
    SETS,
    SHOWN,
    PointStudy,
    point_arms,
    score_measures,
)
from robustdm.studies.runner import EQUAL_WORK, SHRUNK_SWEEP
from robustdm.studies.scales import OBJECTIVES, SHRUNK
from robustdm.studies.tradeoff import equal_signal_claim

_, ADV, ADV_X, INVARIANCE = SHOWN
DIFFERS = (
    "The paper gives neither the number of points, the network, nor the noise's strength: here "
    "10,000 points, a residual MLP of 3 x 64, 2,500 steps of 512; inlier noise of standard "
    "deviation 1 along the plane's normal, or 20 % of the points replaced by a uniform grid.",
    "The paper shows pictures only; every number here is ours.",
)


class Figure2(PointStudy):
    """The methods of the figure, with what their scores are worth."""

    title = "Figure 2: 3-D sets"
    differs = DIFFERS
    more = ("score_error", "score_error_train", "score_magnitude")
    notes = (
        "score_error is the relative error of the learnt score against that of the clean law at "
        "noise scale 0.11, at 1,000 clean points with noise of that scale; score_error_train the "
        "same at training points without it, outliers included, where the true score is large; "
        "score_magnitude is its mean length there over the true one's.",
        "Distances reward shrinkage: in_plane_std (1 is the truth) and the sliced Wasserstein "
        "distance stand beside them.")

    def arms(self):
        return point_arms(self.scale, {name: OBJECTIVES[name] for name in SHOWN}, SHRUNK_SWEEP)

    def probe(self, arm):
        return score_measures(arm, self.scale) if arm.baseline is None else {}

    def compare(self, of):
        def claim(text, group, measure, name=ADV, **limit):
            return of.ratio(text, group, name, "DDPM", measure, "pictures only", **limit)

        return [
            *(made for name in (ADV, ADV_X) for made in (
                claim("inlier noise: distance from the plane, {} / {}", PLANE, "distance", name),
                claim("outliers: share of samples far from the modes, {} / {}", GAUSSIANS,
                      "far_share", name),
                claim("outliers: sliced Wasserstein distance, {} / {}", GAUSSIANS,
                      "sliced_wasserstein", name))),
            *(claim(f"{group}: distance, {{}} / {{}} ('the process diverges')", group, "distance",
                    INVARIANCE, at_least=1.5) for group in SETS),
            *(of.ratio(f"{group}, not in the paper: distance, {{}} / {{}}", group, ADV, name,
                       "distance")
              for group, others in ((PLANE, ()), (GAUSSIANS, SHRUNK.values()))
              for name in (EQUAL_WORK, *others)),
            *(equal_signal_claim(of, PLANE, name, measure, "in_plane_std", words)
              for name in (ADV, ADV_X)
              for words, measure in (("distance from the plane", "distance"),
                                     ("sliced Wasserstein distance", "sliced_wasserstein"))),
            *(claim(f"{group}: error of the score at {words} points, {{}} / {{}} ('more consistent "
                    "scores')", group, measure) for group in SETS
              for words, measure in (("clean", "score_error"), ("training", "score_error_train"))),
            *(claim(f"{group}: magnitude of the score, {{}} / {{}} ('increasing field intensity')",
                    group, "score_magnitude", at_least=1 + EFFECT) for group in SETS),
            claim("inlier noise: spread within the plane, {} / {} ('shrinking variability')",
                  PLANE, "in_plane_std"),
        ]

    def figures(self, of):
        schedule = schedule_of(self.arms()[0].config)
        return {"perturbation-ray": (plots.schedule_figure(schedule, Perturbation(), ("x",)),
                                     "Figure 2 (c): the radius in units of x")
                } | super().figures(of)
