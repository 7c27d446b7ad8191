"""Figure 7: how lambda trades noise for smoothing, beside what the planner predicts."""

import torch

from robustdm.method.closed_form import Setting, generated_deviation
from robustdm.method.perturbation import Perturbation
from robustdm.models.load_run import schedule_of
from robustdm.studies.denoising import READ, SIGMAS, Denoising
from robustdm.studies.runner import SHRUNK_LAM
from robustdm.studies.scales import METHODS, SDS, TRAINING, noise_name

LAMS = {0.0: (0.1, 0.2, 0.3), 0.1: (0.1, 0.2, 0.3), 0.2: (0.1, 0.2, 0.3, 0.5)}


class Figure7(Denoising):
    """robust_adv at several lam."""

    title = "Figure 7: lambda"
    notes = (READ[0], "Predicted columns are the planner's closed form for Gaussian data.")

    def arms(self):
        return [arm for sigma, lams in LAMS.items() for arm in self.scale.arms(
            sigma, {f"robust_adv, lam {lam:g}": METHODS["robust_adv"] | dict(lam=lam)
                    for lam in lams} | {"DDPM": METHODS["DDPM"]}, SHRUNK_LAM)]

    def tables(self, of):
        tables = super().tables(of)
        if self.scale.signal:
            for sigma, lams in LAMS.items():
                for lam in lams:
                    tables[noise_name(sigma)][f"robust_adv, lam {lam:g}"] |= self._predicted(
                        lam, sigma)
        return tables

    def _predicted(self, lam: float, sigma: float) -> dict[str, float]:
        """The planner's noise left and signal kept."""
        schedule = schedule_of(self.scale.arm("", "", {}, 0).config)
        variances = torch.tensor([0.0, *(sd**2 for sd in SDS)], dtype=torch.float64)
        made = generated_deviation(schedule, [Setting("robust_adv", Perturbation(lam=lam))],
                                   variances + 0.9 * sigma**2, steps=self.scale.sampling_steps)[0]
        kept = (made[1:] / torch.tensor(SDS, dtype=torch.float64)).mean()
        return {f"predicted {self.scale.noise}": made[0].item(), "predicted signal": kept.item()}

    def compare(self, of):
        noise = self.scale.noise

        def claim(text, sigma, above, below, measure, **limit):
            above, below = f"robust_adv, lam {above}", (
                below if isinstance(below, str) else f"robust_adv, lam {below}")
            return of.ratio(text, noise_name(sigma), above, below, measure, "pictures only",
                            **limit)

        return [
            *(claim(f"sigma {s:g}: noise left, lam 0.3 / lam 0.1 ('0.1 leaves noise')", s, 0.3, 0.1,
                    noise, at_most=0.75) for s in SIGMAS),
            *(claim(f"sigma {s:g}: noise left, lam 0.2 / training data ('0.2 removes most')", s,
                    0.2, TRAINING, noise, at_most=0.5) for s in SIGMAS),
            claim("clean data: signal kept, lam 0.3 / lam 0.1 ('oversmoothing')", 0.0, 0.3, 0.1,
                  "signal"),
            claim("sigma 0.2: signal kept, lam 0.5 / lam 0.3 ('0.5 over-smooths')", 0.2, 0.5, 0.3,
                  "signal"),
        ]
