"""Figure 3: PSNR and distance to the data's subspace, with and without noise in the data."""

from robustdm.metrics import psnr
from robustdm.studies.claims import EFFECT, Ratio, judge
from robustdm.studies.denoising import READ, Denoising
from robustdm.studies.runner import SHRUNK_LAM, SHRUNK_SWEEP
from robustdm.studies.scales import METHODS, NOISE_DIMS, SDS, SHRUNK, linear_images, noise_name
from robustdm.studies.study import bar_figure
from robustdm.studies.tradeoff import EqualSignal

INVARIANCE = {f"invariance, lam {lam:g}": dict(objective="invariance", lambda_mode="ray", lam=lam)
              for lam in (0.3, 0.03)}
CLEAN, NOISY = noise_name(0.0), noise_name(0.1)
ROBUST = ("robust_ran", "robust_adv")


class Figure3(Denoising):
    """A subspace that is known exactly: of points, or the leading components of images."""

    title = "Figure 3: a subspace that is known exactly"
    contrast = 0.0
    notes = (
        "rho is the mean distance of a sample from the clean subspace, PSNR the same in dB with "
        "peak 2. The paper's figure has bars without numbers.", *READ)
    grid = [(0.0, METHODS | INVARIANCE, SHRUNK_LAM), (0.1, METHODS | INVARIANCE, SHRUNK_SWEEP)]
    comparisons = [
        Ratio("noisy data: rho, {} / {}", NOISY, "robust_adv", "robust_ran", "rho",
              "adv better at unlearning noise"),
        *(Ratio(f"clean data: {measure}, {{}} / {{}} ('perform similarly')", CLEAN, "robust_adv",
                "DDPM", measure, "similar, no number", 1.25, 0.8) for measure in ("rho", "signal")),
        *(Ratio(f"{group}: rho, {{}} / {{}} (invariance fails)", group, name, "DDPM", "rho",
                "does not model the data", at_least=1.25)
          for group in (CLEAN, NOISY) for name in INVARIANCE),
        *(ratio for name in SHRUNK.values() for ratio in (
            Ratio("noisy data, not in the paper: rho, {} / {}", NOISY, "robust_adv", name, "rho"),
            Ratio("noisy data, not in the paper: signal kept, {} / {}", NOISY, "robust_adv", name,
                  "signal", at_least=1 + EFFECT))),
        *(EqualSignal(NOISY, name, "off_subspace_sd") for name in ROBUST),
    ]

    def __init__(self, scale):
        super().__init__(scale if scale.name == "tiny" else linear_images(scale))
        paper = ["rho_paper"] if scale.name != "tiny" else []
        self.columns = ["psnr", "rho", *paper, "off_subspace_sd", "signal", self.scale.signal[-1],
                        "sliced_wasserstein", "frechet", "recall", "coverage"]

    def records(self):
        records = super().records()
        for measures in (record["measures"] for record in records):
            if "psnr" not in measures:  # of points: the same formula, per coordinate
                measures["psnr"] = psnr(
                    measures["off_subspace_sd"] ** 2 * NOISE_DIMS / (NOISE_DIMS + len(SDS)))
        return records

    def compare(self, of):
        gained = zip(*(of(NOISY, name, "psnr") for name in ("robust_adv", "DDPM")), strict=True)
        return [
            *(Ratio("noisy data: rho, {} / {}", NOISY, name, "DDPM", "rho", "wide gaps, no number",
                    at_most=0.75).claim(of) for name in ROBUST),
            judge("noisy data: PSNR gained by robust_adv over DDPM, dB",
                  [adv - plain for adv, plain in gained], at_least=1, paper="superior, no number"),
            *super().compare(of)]

    def figures(self, of):
        return {"figure-3": (bar_figure(of, ("psnr", "rho")), "")}
