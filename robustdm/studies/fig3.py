"""Figure 3: PSNR and distance to the data's subspace, with and without noise in the data."""

import dataclasses

from robustdm.metrics import psnr
from robustdm.reporting import plots
from robustdm.studies.claims import EFFECT, Spread, judge
from robustdm.studies.denoising import READ, Denoising
from robustdm.studies.runner import SHRUNK_LAM, SHRUNK_SWEEP
from robustdm.studies.scales import METHODS, NOISE_DIMS, SDS, SHRUNK, Scale, noise_name
from robustdm.studies.tradeoff import equal_signal_claim

INVARIANCE = {f"invariance, lam {lam:g}": dict(objective="invariance", lambda_mode="ray", lam=lam)
              for lam in (0.3, 0.03)}
CLEAN, NOISY = noise_name(0.0), noise_name(0.1)


class Figure3(Denoising):
    """A subspace that is known exactly: of points, or the leading components of images."""

    title = "Figure 3: a subspace that is known exactly"
    contrast = 0.0
    notes = (
        "rho is the mean distance of a sample from the clean subspace, PSNR the same in dB with "
        "peak 2. The paper's figure has bars without numbers.", *READ)

    def __init__(self, scale: Scale):
        super().__init__(scale if scale.name == "tiny" else linear_images(scale))

    @property
    def columns(self):
        paper = ["rho_paper"] if self.scale.name != "tiny" else []
        return ["psnr", "rho", *paper, "off_subspace_sd", "signal", self.scale.signal[-1],
                "sliced_wasserstein", "frechet", "recall", "coverage"]

    def arms(self):
        return [arm for sigma, shrunk in ((0.0, SHRUNK_LAM), (0.1, SHRUNK_SWEEP))
                for arm in self.scale.arms(sigma, METHODS | INVARIANCE, shrunk)]

    def records(self):
        records = super().records()
        for measures in (record["measures"] for record in records):
            if "psnr" not in measures:
                measures["psnr"] = psnr(
                    measures["off_subspace_sd"] ** 2 * NOISE_DIMS / (NOISE_DIMS + len(SDS)))
        return records

    def compare(self, of):
        def rho(text, above, below="DDPM", group=NOISY, **more):
            return of.ratio(text, group, above, below, "rho", **more)

        return [
            *(rho("noisy data: rho, {} / {}", name, at_most=0.75, paper="wide gaps, no number")
              for name in ("robust_ran", "robust_adv")),
            judge("noisy data: PSNR gained by robust_adv over DDPM, dB", [a - b for a, b in zip(
                of(NOISY, "robust_adv", "psnr"), of(NOISY, "DDPM", "psnr"), strict=True)],
                at_least=1, paper="superior, no number"),
            rho("noisy data: rho, {} / {}", "robust_adv", "robust_ran",
                paper="adv better at unlearning noise"),
            *(of.ratio(f"clean data: {measure}, {{}} / {{}} ('perform similarly')", CLEAN,
                       "robust_adv", "DDPM", measure, at_least=0.8, at_most=1.25,
                       paper="similar, no number") for measure in ("rho", "signal")),
            *(rho(f"{group}: rho, {{}} / {{}} (invariance fails)", name, group=group,
                  at_least=1.25, paper="does not model the data")
              for group in (CLEAN, NOISY) for name in INVARIANCE),
            *(claim for name in SHRUNK.values() for claim in (
                rho("noisy data, not in the paper: rho, {} / {}", "robust_adv", name),
                of.ratio("noisy data, not in the paper: signal kept, {} / {}", NOISY, "robust_adv",
                         name, "signal", at_least=1 + EFFECT))),
            *(equal_signal_claim(of, NOISY, name, "off_subspace_sd")
              for name in ("robust_ran", "robust_adv")),
        ]

    def figures(self, of):
        made, axes = plots.figure(1, 2, size=(5.4, 3.4))
        for ax, measure in zip(axes[0], ("psnr", "rho"), strict=True):
            tables = of.tables([measure])
            names = list(dict.fromkeys(name for rows in tables.values() for name in rows))
            width = 0.8 / len(tables)
            for i, (group, rows) in enumerate(tables.items()):
                found = [rows.get(name, {}).get(measure, Spread(0, 0)) for name in names]
                ax.bar([k + i * width for k in range(len(names))], [v.mean for v in found], width,
                       yerr=[v.sd for v in found], label=group, color=plots.COLOURS[i])
            ax.set_xticks([k + width / 2 for k in range(len(names))], names, rotation=40,
                          ha="right", fontsize=6)
            ax.set(title=measure, yscale="log" if measure == "rho" else "linear")
            ax.legend(fontsize=6)
        return {"figure-3": (made, "")}


def linear_images(scale: Scale) -> Scale:
    """Samples of the leading components of the given images."""
    base = scale.base | dict(
        data="subspace", subspace_space="ambient", subspace_rank=25, num_points=10_000,
        clip_samples=False)
    return dataclasses.replace(
        # No features: thousands of pixels would need more samples, and the truth is known exactly.
        scale, base=base, noise="off_subspace_sd", features=None, weights=None,
        samples=min(scale.samples, 5000),
        signal=tuple(f"component_ratio_{k}" for k in range(1, 26)),
        differs=("Images: the given set's 25 leading components, in place of the Smithsonian "
                 "butterflies'.", *scale.differs[:1]))
