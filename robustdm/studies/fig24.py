"""Figure 24: samples at different stages of training."""

from robustdm.studies.claims import EFFECT
from robustdm.studies.denoising import READ, Denoising
from robustdm.studies.runner import SHRUNK_LAM
from robustdm.studies.scales import METHODS, noise_name


class Figure24(Denoising):
    """robust_adv after a quarter to twice of the steps."""

    title = "Figure 24: stages of training"
    notes = READ[:1]

    @property
    def stages(self) -> list[int]:
        """Steps of each."""
        return [max(1, round(self.scale.base["steps"] * share)) for share in (0.25, 0.5, 1, 2)]

    def arms(self):
        methods = {f"robust_adv, {steps} steps": METHODS["robust_adv"] | dict(steps=steps)
                   for steps in self.stages} | {"DDPM": METHODS["DDPM"]}
        return [arm for sigma in (0.0, 0.2)
                for arm in self.scale.arms(sigma, methods, SHRUNK_LAM)]

    def compare(self, of):
        early, _, middle, late = (f"robust_adv, {steps} steps" for steps in self.stages)

        def claim(text, sigma, below, measure, **limit):
            return of.ratio(text, noise_name(sigma), late, below, measure, "pictures only",
                            **limit)

        return [
            claim("noisy data: noise left, late / early ('completely denoised' later)", 0.2, early,
                  self.scale.noise, at_most=0.75),
            claim("noisy data: signal kept, late / early ('acquires its details')", 0.2, early,
                  "signal", at_least=1 + EFFECT),
            claim("clean data: signal kept, late / early ('acquires its details')", 0.0, early,
                  "signal", at_least=1 + EFFECT),
            claim("noisy data: noise left, late / middle ('not taking into account the noise')",
                  0.2, middle, self.scale.noise, at_most=1.1),
        ]
