"""Figure 24: samples at different stages of training."""

from robustdm.studies.claims import EFFECT, Ratio
from robustdm.studies.denoising import READ, Denoising
from robustdm.studies.runner import SHRUNK_LAM
from robustdm.studies.scales import METHODS, noise_name

NOISY, CLEAN = noise_name(0.2), noise_name(0.0)
PAPER = "pictures only"


class Figure24(Denoising):
    """robust_adv after a quarter to twice of the steps, each a training of its own."""

    title = "Figure 24: stages of training"
    notes = READ[:1]

    def __init__(self, scale):
        super().__init__(scale)
        stages = [max(1, round(scale.base["steps"] * share)) for share in (0.25, 0.5, 1, 2)]
        early, _, middle, late = (f"robust_adv, {steps} steps" for steps in stages)
        methods = {f"robust_adv, {steps} steps": METHODS["robust_adv"] | dict(steps=steps)
                   for steps in stages} | {"DDPM": METHODS["DDPM"]}
        self.grid = [(sigma, methods, SHRUNK_LAM) for sigma in (0.0, 0.2)]
        self.comparisons = [
            Ratio("noisy data: noise left, late / early ('completely denoised' later)", NOISY, late,
                  early, "noise", PAPER, at_most=0.75),
            *(Ratio(f"{words}: signal kept, late / early ('acquires its details')", group, late,
                    early, "signal", PAPER, at_least=1 + EFFECT)
              for words, group in (("noisy data", NOISY), ("clean data", CLEAN))),
            Ratio("noisy data: noise left, late / middle ('not taking into account the noise')",
                  NOISY, late, middle, "noise", PAPER, at_most=1.1),
        ]
