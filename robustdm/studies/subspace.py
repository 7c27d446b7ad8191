"""How much noise is removed, and how much signal kept, where the truth is known exactly.

A Gaussian of rank 5 in R^32 with standard deviations 2, 1.4, 1, .7 and .5; 90 % of the 5,000 points
carry Gaussian noise of standard deviation 0.1 in all dimensions. 3,000 steps of 128 points, a
residual MLP; 500 samples by 1000-step DDPM.
"""

from robustdm.studies.claims import Ratio, judge
from robustdm.studies.runner import SHRUNK_SWEEP, Arm
from robustdm.studies.scales import OBJECTIVES, Scale, make_data
from robustdm.studies.study import Study
from robustdm.studies.tradeoff import EqualSignal, figure

NOISE_SD = 0.1 * 0.9**0.5
"""rms over all points of the training data's noise, per dimension."""
GROUP, NOISE, ADV = "subspace", "off_subspace_sd", "robust_adv (ray)"
RATIOS = [f"component_ratio_{k}" for k in range(1, 6)]
PAIRS = ((ADV, "DDPM", 0.35, None), ("robust_ran", "DDPM", None, None),
         (ADV, "robust_ran", None, None), ("invariance", "DDPM", None, 1.25))


def arms(scale: Scale, methods: dict[str, dict], shrunk=None) -> list[Arm]:
    """Every method with every seed."""
    return scale.on("subspace", 500, make_data=make_data, signal=tuple(RATIOS)).arms(
        GROUP, methods, shrunk)


class Subspace(Study):
    """All objectives with the truth, with DDPM and with each other."""

    title = "The subspace"
    differs = ()
    columns = [NOISE, "signal", *RATIOS, "sliced_wasserstein"]
    comparisons = [
        *(Ratio("{} / {}, off-subspace sd", GROUP, above, below, NOISE, "", *limits)
          for above, below, *limits in PAIRS),
        *(EqualSignal(GROUP, n) for n in ("robust_ran", "outward_ran", ADV, "robust_adv (x)"))]

    def arms(self):
        return arms(self.scale, OBJECTIVES, SHRUNK_SWEEP)

    def compare(self, of):
        share = [v / NOISE_SD for v in of(GROUP, "DDPM", NOISE)]
        return super().compare(of) + [
            judge("DDPM / training noise, off-subspace sd", share, at_least=0.9),
            judge(f"{ADV}, strongest component's sd / truth", of(GROUP, ADV, RATIOS[0]),
                  at_least=0.8, at_most=1.2)]

    def figures(self, of):
        rows = of.rows(GROUP, self.columns)
        del rows["invariance"]  # far off
        return {"tradeoff": (figure(rows, NOISE, "signal"), "Noise against signal.")}
