"""What a plain DDPM leaves of the noise if its strength is measured, and if that is wrong.

DDPMs of fresh seeds on the subspace and on digits, 90 % of which carry noise. The strength is
measured on the noisy training data. Where the chain ends and how much of the strength is corrected
for are the defaults of ``--baseline known``, which other seeds decided.
"""

from dataclasses import replace

from robustdm.data.noise import noise_of
from robustdm.method.baselines import Baseline
from robustdm.studies import digits, subspace
from robustdm.studies.claims import Ratio, judge
from robustdm.studies.runner import SHRUNK_SWEEP, Arm, shrunk_arms
from robustdm.studies.scales import OBJECTIVES
from robustdm.studies.study import Study
from robustdm.studies.tradeoff import EqualSignal

FIRST_SEED = 10
WRONG = (0.5, 0.8, 1.25, 2.0)
RIGHT = "DDPM, noise measured"
SETS = {"subspace": (subspace.NOISE, "signal"), "digits": (digits.NOISE, digits.SIGNAL)}


def known_arms(plain: Arm) -> list[Arm]:
    """The corrected last step at the measured strength, and at strengths that are wrong."""
    measured = noise_of(plain.make_data(plain.config), plain.config.seed).rms
    return [replace(plain, name=name, baseline=Baseline("known", share * measured))
            for name, share in ((RIGHT, 1.0), *((f"{RIGHT} x {k:g}", k) for k in WRONG))]


class Known(Study):
    """DDPM, shrunk, and corrected for the measured noise."""

    title = "A plain DDPM and one corrected last step"
    differs = ()
    references = True
    columns = [*(noise for noise, _ in SETS.values()), "residual", "signal", digits.SIGNAL,
               subspace.RATIOS[-1], "sliced_wasserstein"]
    comparisons = [comparison for group, (noise, signal) in SETS.items() for comparison in (
        Ratio("{} / {}, noise", group, RIGHT, "DDPM", noise, at_most=0.5),
        EqualSignal(group, RIGHT, noise, signal),
        *(Ratio("{} / {}, noise", group, f"{RIGHT} x {k:g}", RIGHT, noise) for k in WRONG))]

    def arms(self):
        made = []
        for module in (subspace, digits):
            for plain in module.arms(self.scale, {"DDPM": OBJECTIVES["DDPM"]}):
                seed = FIRST_SEED + plain.config.seed
                plain = replace(plain, config=replace(plain.config, seed=seed))
                made += [plain, *shrunk_arms(plain, SHRUNK_SWEEP), *known_arms(plain)]
        return made

    def compare(self, of):
        return super().compare(of) + [
            judge("subspace, noise", of("subspace", RIGHT, subspace.NOISE), at_most=0.035),
            judge("subspace, signal", of("subspace", RIGHT, "signal"), at_least=0.96)]
