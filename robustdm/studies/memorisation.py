"""Figure 6, left: how near samples come to single training images, with what smoothing alone does.

Source: Briglia et al. 2026, section 3.2.
"""

from __future__ import annotations

import dataclasses

import torch

from robustdm.data import load_data
from robustdm.evaluation.features import cache_directory, load_extractor
from robustdm.evaluation.measure import features_of
from robustdm.method.baselines import DEFAULT_STRENGTH, blur
from robustdm.metrics import nearest, nearness
from robustdm.reporting import plots
from robustdm.runs.presets import preset_values
from robustdm.studies.claims import EFFECT, Claim, by_seed, judge, ratio_claim, untested
from robustdm.studies.page import write_page
from robustdm.studies.runner import load_samples, summarise
from robustdm.studies.scales import METHODS, Scale, corrupted

GROUP = "clean data"
DRASTIC = 0.5
"""A shift by half the histogram's standard deviation."""
HELD_OUT = "held-out images"
BLURRED_TRAINING, BLURRED_SAMPLES = "training images, blurred", "DDPM's samples, blurred"


def fig6_left(scale: Scale) -> list[Claim]:
    """Nearest training image of every sample of DDPM and robust_adv, and of three controls."""
    if scale.name == "tiny":
        scale = _digits(scale)
    arms = [scale.arm(GROUP, name, METHODS[name] | corrupted(0.0), seed)
            for seed in range(scale.seeds) for name in ("DDPM", "robust_adv")]
    records = scale.run(arms)
    similarities: dict[str, torch.Tensor] = {}
    for arm, record in zip(arms, list(records), strict=True):
        data = arm.make_data(arm.config)
        extractor = load_extractor(arm.features, data.shape, arm.weights, _device())
        train = data.clean(torch.arange(len(data)))
        reference = features_of(extractor, train, cache_directory()).features
        samples = load_samples(arm, scale.out)
        compared = {record["name"]: samples}
        if arm.name == "DDPM":
            sd = DEFAULT_STRENGTH["blur"]
            compared |= {
                HELD_OUT: data.heldout.clean(torch.arange(len(data.heldout))),
                BLURRED_TRAINING: blur(train[: scale.samples], sd),
                BLURRED_SAMPLES: blur(samples, sd),
            }
        for name, images in compared.items():
            similarity, _ = nearest(features_of(extractor, images).features, reference)
            if name == record["name"]:
                record["measures"] |= nearness(similarity)
            else:
                records.append({"group": GROUP, "name": name, "seed": record["seed"],
                                "measures": nearness(similarity)})
            if record["seed"] == 0:
                similarities[name] = similarity

    def values(name, measure):
        return by_seed(records, GROUP, name, measure)

    def below(name, other="DDPM"):
        """How far a histogram lies to the left of another, in widths of DDPM's, per seed."""
        return [(b - a) / sd for a, b, sd in zip(
            values(name, "mean"), values(other, "mean"), values("DDPM", "sd"), strict=True)]

    near = "share >= 0.9"
    # Where unseen images pass the threshold too, it tells nothing apart.
    saturated = min(values(HELD_OUT, near)) > 0.99
    words = f"{near}: robust_adv / DDPM ('reduces near-replicas')"
    claims = [
        judge("similarity, DDPM - robust_adv in standard deviations ('drastically shifted to the "
              "left')", below("robust_adv"), at_least=DRASTIC, paper="histogram only"),
        untested(words, "histogram only") if saturated else ratio_claim(
            words, values("robust_adv", near), values("DDPM", near), at_most=0.75,
            paper="histogram only"),
        judge("not in the paper: similarity, DDPM - held-out images in standard deviations (DDPM "
              "has memorised more than images of this kind share anyway)", below(HELD_OUT),
              at_least=EFFECT),
        judge("not in the paper: similarity, DDPM's samples blurred - robust_adv in standard "
              "deviations (robust training forgets more than smoothing its samples does)",
              below("robust_adv", BLURRED_SAMPLES), at_least=EFFECT),
    ]
    columns = [*nearness(similarities["DDPM"]), "frechet", "recall", "coverage",
               *(["pixel_std"] if scale.name == "tiny" else [])]
    return write_page(
        scale.out, f"Figure 6, left: memorisation ({scale.name})",
        {"Nearest training image": summarise(records, columns)}, claims, records, scale.differs, (
            "Similarity alone says little: images that were never trained on are near training "
            "images too, and blurring moves the histogram without anything having been forgotten.",
        ), {"figure-6-left": (plots.similarities(similarities, ""), "Seed 0.")})


def _digits(scale: Scale) -> Scale:
    """The handwritten digits: what memorises must be images."""
    steps = scale.steps or 1200
    base = preset_values("digits") | dict(steps=steps, holdout=0.2)
    return dataclasses.replace(
        scale, base=base, samples=300, sampling_steps=250, signal=(), noise="noise_rms",
        features="digits", make_data=load_data, differs=(
            "Data: 1,438 handwritten digits of 8x8 pixels; 359 others are held out.",
            f"A UNet of 0.43 million parameters, {steps:,} steps of 64; 300 samples by 250 "
            "respaced steps.",
            "Features of a small classifier of digits in place of DINOv2: the thresholds of 0.9 "
            "and 0.95 do not mean the same, and tell nothing where held-out images pass them."))


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"

