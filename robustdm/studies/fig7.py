"""Figure 7: how lambda trades noise for smoothing, beside what the planner predicts."""

import torch

from robustdm.method.closed_form import Setting, generated_deviation
from robustdm.method.perturbation import Perturbation
from robustdm.models.load_run import schedule_of
from robustdm.studies.claims import Ratio
from robustdm.studies.denoising import READ, SIGMAS, Denoising
from robustdm.studies.runner import SHRUNK_LAM
from robustdm.studies.scales import METHODS, SDS, TRAINING, noise_name

LAMS = {0.0: (0.1, 0.2, 0.3), 0.1: (0.1, 0.2, 0.3), 0.2: (0.1, 0.2, 0.3, 0.5)}
NAME, PAPER = "robust_adv, lam {:g}".format, "pictures only"


class Figure7(Denoising):
    """robust_adv at several lam, the strongest only where there is most noise."""

    title = "Figure 7: lambda"
    notes = (READ[0], "Predicted columns are the planner's closed form for Gaussian data.")
    grid = [(sigma, {NAME(lam): METHODS["robust_adv"] | dict(lam=lam) for lam in lams}
             | {"DDPM": METHODS["DDPM"]}, SHRUNK_LAM) for sigma, lams in LAMS.items()]
    comparisons = [
        *(Ratio(f"sigma {s:g}: noise left, lam 0.3 / lam 0.1 ('0.1 leaves noise')", noise_name(s),
                NAME(0.3), NAME(0.1), "noise", PAPER, at_most=0.75) for s in SIGMAS),
        *(Ratio(f"sigma {s:g}: noise left, lam 0.2 / training data ('0.2 removes most')",
                noise_name(s), NAME(0.2), TRAINING, "noise", PAPER, at_most=0.5) for s in SIGMAS),
        Ratio("clean data: signal kept, lam 0.3 / lam 0.1 ('oversmoothing')", noise_name(0.0),
              NAME(0.3), NAME(0.1), "signal", PAPER),
        Ratio("sigma 0.2: signal kept, lam 0.5 / lam 0.3 ('0.5 over-smooths')", noise_name(0.2),
              NAME(0.5), NAME(0.3), "signal", PAPER),
    ]

    def tables(self, of):
        tables = super().tables(of)
        if not self.scale.signal:  # no Gaussian data
            return tables
        schedule = schedule_of(self.scale.arm("", "", {}, 0).config)
        sds = torch.tensor([0.0, *SDS], dtype=torch.float64)
        for sigma, lams in LAMS.items():
            settings = [Setting("robust_adv", Perturbation(lam=lam)) for lam in lams]
            found = generated_deviation(schedule, settings, sds**2 + 0.9 * sigma**2,
                                        steps=self.scale.sampling_steps)
            for lam, made in zip(lams, found, strict=True):
                tables[noise_name(sigma)][NAME(lam)] |= {
                    f"predicted {self.scale.noise}": made[0].item(),
                    "predicted signal": (made[1:] / sds[1:]).mean().item()}
        return tables
