"""Figure 6, left: how near samples come to single training images, with what smoothing alone does.

Source: Briglia et al. 2026, section 3.2.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from robustdm import plots
from robustdm.baselines import blur
from robustdm.data import load_data
from robustdm.evaluation import features_of
from robustdm.features import cache_directory, load_extractor
from robustdm.metrics import nearest
from robustdm.studies.page import write_page
from robustdm.studies.runner import Claim, load_samples, summarise
from robustdm.studies.scales import (
    METHODS,
    Scale,
    by_seed,
    corrupted,
    ratio_claim,
    spread,
    untested,
)
from robustdm.training.config import preset_values

GROUP = "clean data"
THRESHOLDS = (0.9, 0.95)
HELD_OUT, BLURRED = "held-out images", "blurred training images"


def fig6_left(scale: Scale) -> list[Claim]:
    """Nearest training image of every sample of DDPM and robust_adv, and of two controls."""
    if scale.name == "tiny":
        scale = _digits(scale)
    arms = [scale.arm(GROUP, name, METHODS[name] | corrupted(0.0), seed)
            for seed in range(scale.seeds) for name in ("DDPM", "robust_adv")]
    records = scale.run(arms)
    histograms: dict[str, torch.Tensor] = {}
    for arm, record in zip(arms, list(records), strict=True):
        data = arm.make_data(arm.config)
        extractor = load_extractor(arm.features, data.shape, arm.weights, _device())
        train = data.clean(torch.arange(len(data)))
        reference = features_of(extractor, train, cache_directory()).features
        compared = {record["name"]: load_samples(arm, scale.out)}
        if arm.name == "DDPM":
            compared[HELD_OUT] = data.heldout.clean(torch.arange(len(data.heldout)))
            compared[BLURRED] = blur(train[: scale.samples], 0.5)
        for name, images in compared.items():
            similarity, _ = nearest(features_of(extractor, images).features, reference)
            measures = {"mean": similarity.mean().item(), **{
                f"share >= {t:g}": (similarity >= t).double().mean().item() for t in THRESHOLDS},
                "99th percentile": similarity.quantile(0.99).item()}
            if name == record["name"]:
                record["measures"] |= measures
            else:
                records.append({"group": GROUP, "name": name, "seed": record["seed"],
                                "measures": measures})
            if record["seed"] == 0:
                histograms[name] = similarity

    def values(name, measure):
        return by_seed(records, GROUP, name, measure)

    def change(name):
        """How far a row's mean lies below DDPM's, per seed; never zero."""
        return [max(a - b, 1e-9) for a, b in zip(values("DDPM", "mean"), values(name, "mean"),
                                                 strict=True)]

    near = "share >= 0.9"
    # Where unseen images pass the threshold too, it tells nothing apart.
    saturated = min(values(HELD_OUT, near)) > 0.99

    def share(text, *found, paper=""):
        return untested(text, paper) if saturated else Claim(text, *found, paper=paper)

    claims = [
        Claim("similarity, mean, robust_adv - DDPM ('drastically shifted to the left')",
              *_below(values("robust_adv", "mean"), values("DDPM", "mean")),
              paper="histogram only"),
        share(f"{near}, robust_adv - DDPM ('reduces near-replicas')",
              *_below(values("robust_adv", near), values("DDPM", near)), paper="histogram only"),
        Claim("not in the paper: similarity, mean, DDPM - held-out images (above 0: more than what "
              "images of this kind share anyway)", *_below(
                  values(HELD_OUT, "mean"), values("DDPM", "mean"), swap=True)),
        ratio_claim("not in the paper: shift of the mean, a blur of half a pixel of training "
                    "images / robust_adv (above 0.5: smoothing alone explains much)",
                    [max(1 - v, 1e-9) for v in values(BLURRED, "mean")], change("robust_adv"),
                    at_most=0.5),
    ]
    made, axes = plots.figure(1, 1, size=(6.0, 3.6))
    edges = np.linspace(min(float(s.min()) for s in histograms.values()), 1, 50)
    for colour, (name, similarity) in zip(plots.COLOURS, histograms.items(), strict=False):
        axes[0, 0].hist(similarity.numpy(), bins=edges, density=True, histtype="step",
                        color=colour, label=name)
    axes[0, 0].axvline(THRESHOLDS[0], color=plots.INK, linestyle=":", linewidth=1)
    axes[0, 0].set(xlabel="cosine similarity to the nearest training image", ylabel="density")
    axes[0, 0].legend(fontsize=7)
    columns = ["mean", *(f"share >= {t:g}" for t in THRESHOLDS), "99th percentile", "frechet",
               "recall", *(["pixel_std"] if scale.name == "tiny" else [])]
    return write_page(
        scale.out, f"Figure 6, left: memorisation ({scale.name})",
        {"Nearest training image": summarise(records, columns)}, claims, records, scale.differs, (
            "Similarity alone says little: images that were never trained on are near training "
            "images too, and blurring moves the histogram without anything having been forgotten.",
        ), {"figure-6-left": (made, "Seed 0.")})


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


def _below(a: list[float], b: list[float], swap: bool = False) -> tuple[str, str, bool]:
    """Value, target and verdict of a difference a - b that should be below 0."""
    differences = [(y - x) if swap else (x - y) for x, y in zip(a, b, strict=True)]
    fits = [d > 0 if swap else d < 0 for d in differences]
    return (f"{spread(differences)}; {sum(fits)} of {len(fits)} seeds",
            "above 0" if swap else "below 0", all(fits))


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"

