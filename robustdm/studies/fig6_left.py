"""Figure 6, left: how near samples come to single training images, with what smoothing alone does.

Source: Briglia et al. 2026, section 3.2.
"""

import dataclasses

import torch

from robustdm.evaluation.features import cache_directory, load_extractor
from robustdm.evaluation.measure import features_of
from robustdm.method.baselines import DEFAULT_STRENGTH, blur
from robustdm.metrics import nearest, nearness
from robustdm.reporting import plots
from robustdm.studies.claims import EFFECT, judge, untested
from robustdm.studies.runner import load_samples
from robustdm.studies.scales import METHODS, Scale, corrupted
from robustdm.studies.study import Study

GROUP = "clean data"
DRASTIC = 0.5
"""A shift by half the histogram's standard deviation."""
HELD_OUT = "held-out images"
BLURRED_TRAINING, BLURRED_SAMPLES = "training images, blurred", "DDPM's samples, blurred"


class Figure6Left(Study):
    """Nearest training image of every sample of DDPM and robust_adv, and of three controls."""

    title = "Figure 6, left: memorisation"
    notes = (
        "Similarity alone says little: images that were never trained on are near training images "
        "too, and blurring moves the histogram without anything having been forgotten.",)

    def __init__(self, scale: Scale):
        super().__init__(digits(scale) if scale.name == "tiny" else scale)
        self.similarities: dict[str, torch.Tensor] = {}

    @property
    def columns(self):
        spread = ["pixel_std"] if self.scale.name == "tiny" else []
        return [*nearness(torch.zeros(2)), "frechet", "recall", "coverage", *spread]

    def arms(self):
        return self.scale.arms(
            GROUP, {name: METHODS[name] | corrupted(0.0) for name in ("DDPM", "robust_adv")})

    def records(self):
        records = super().records()
        for arm, record in zip(self.arms(), list(records), strict=True):
            data = arm.make_data(arm.config)
            extractor = load_extractor(arm.features, data.shape, arm.weights,
                                       "cuda" if torch.cuda.is_available() else "cpu")
            train, samples = data.clean(torch.arange(len(data))), load_samples(arm, self.scale.out)
            reference = features_of(extractor, train, cache_directory()).features
            compared = {arm.name: samples}
            if arm.name == "DDPM":
                sd = DEFAULT_STRENGTH["blur"]
                compared |= {HELD_OUT: data.heldout.clean(torch.arange(len(data.heldout))),
                             BLURRED_TRAINING: blur(train[: self.scale.samples], sd),
                             BLURRED_SAMPLES: blur(samples, sd)}
            for name, images in compared.items():
                similarity, _ = nearest(features_of(extractor, images).features, reference)
                if name == arm.name:
                    record["measures"] |= nearness(similarity)
                else:
                    records.append({"group": GROUP, "name": name, "seed": arm.config.seed,
                                    "measures": nearness(similarity)})
                if arm.config.seed == 0:
                    self.similarities[name] = similarity
        return records

    def compare(self, of):
        def below(name, other="DDPM"):
            """How far a histogram is to the left of another, in widths of DDPM's, per seed."""
            return [(b - a) / sd for a, b, sd in zip(
                of(GROUP, name, "mean"), of(GROUP, other, "mean"), of(GROUP, "DDPM", "sd"),
                strict=True)]

        near = "share >= 0.9"
        replicas = f"{near}: robust_adv / DDPM ('reduces near-replicas')"
        return [
            judge("similarity, DDPM - robust_adv in standard deviations ('drastically shifted to "
                  "the left')", below("robust_adv"), at_least=DRASTIC, paper="histogram only"),
            # Where unseen images pass the threshold too, it tells nothing apart.
            untested(replicas, "histogram only") if min(of(GROUP, HELD_OUT, near)) > 0.99 else
            of.ratio(replicas, GROUP, "robust_adv", "DDPM", near, "histogram only", at_most=0.75),
            judge("not in the paper: similarity, DDPM - held-out images in standard deviations "
                  "(DDPM has memorised more than images of this kind share anyway)",
                  below(HELD_OUT), at_least=EFFECT),
            judge("not in the paper: similarity, DDPM's samples blurred - robust_adv in standard "
                  "deviations (robust training forgets more than smoothing its samples does)",
                  below("robust_adv", BLURRED_SAMPLES), at_least=EFFECT),
        ]

    def tables(self, of):
        return {"Nearest training image": of.rows(GROUP, self.columns)}

    def figures(self, of):
        return {"figure-6-left": (plots.similarities(self.similarities, ""), "Seed 0.")}


def digits(scale: Scale) -> Scale:
    """The handwritten digits: what memorises must be images."""
    made = scale.on("digits", 300, 1200, dict(holdout=0.2), sampling_steps=250, noise="noise_rms",
                    features="digits")
    steps = made.base["steps"]
    return dataclasses.replace(made, differs=(
        "Data: 1,438 handwritten digits of 8x8 pixels; 359 others are held out.",
        f"A UNet of 0.43 million parameters, {steps:,} steps of 64; 300 samples by 250 respaced "
        "steps.",
        "Features of a small classifier of digits in place of DINOv2: the thresholds of 0.9 and "
        "0.95 do not mean the same, and tell nothing where held-out images pass them."))
