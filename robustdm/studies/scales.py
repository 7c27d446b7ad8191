"""The scales at which a table or figure of the paper is reproduced, and what all of them share."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from robustdm.data import Data, load_data
from robustdm.errors import UsageError
from robustdm.studies import subspace
from robustdm.studies.runner import SHRUNK_LAM, Arm, baseline_arms, measures_of, run_arms
from robustdm.training.config import TrainConfig, preset_values

SCALES = ("tiny", "small", "full")
METHODS = {
    "DDPM": dict(objective="ddpm"),
    "robust_ran": dict(objective="robust_ran", lambda_mode="ray"),
    "robust_adv": dict(objective="robust_adv", lambda_mode="ray"),
}
SHRUNK = {lam: f"DDPM, shrunk {lam:g}" for lam in SHRUNK_LAM}
STOPPED, BLURRED = "DDPM, stopped early", "DDPM, blurred"
EXCESS = "noise_excess"
"""White-noise estimate of images over that of clean ones, whose texture counts too."""
CLEAN, TRAINING = "clean data, drawn anew", "training data"


@dataclass(frozen=True)
class Scale:
    """How large the runs of a reproduction are.

    Attributes:
        name: of SCALES.
        base: fields of the training configuration.
        samples, sampling_steps: what is measured; steps None visits every timestep.
        attacked_samples, attacked_steps: the same under attack, which costs up to 42 times as much.
        noise, signal: measures of the noise left and of the signal kept; the latter's mean is 1 for
            the truth. Images have none of the latter: see ``kept``.
        features, weights: feature space of the Frechet distance; None leaves it out.
        differs: what is not as in the paper, a sentence each.
        seeds, out, jobs: repeats, directory of the results, processes.
        steps: optimizer steps that were asked for, None for those of each study.
    """

    name: str
    base: dict
    samples: int
    sampling_steps: int | None
    attacked_samples: int
    attacked_steps: int | None
    noise: str
    signal: tuple[str, ...]
    features: str | None
    weights: Path | None
    differs: tuple[str, ...]
    seeds: int
    out: Path
    jobs: int
    steps: int | None = None
    batch_size: int = 2000
    make_data: Callable[[TrainConfig], Data] = load_data

    @property
    def is_image(self) -> bool:
        """Whether samples are images: only those can be blurred."""
        return self.base["data"] in ("cifar10", "images")

    @property
    def kept(self) -> str:
        """The measure of what shrinkage takes. Not recall: that rises with noise."""
        return "signal" if self.signal else "coverage"

    def arm(self, group: str, name: str, fields: dict, seed: int, **sampling) -> Arm:
        """An arm of this scale; ``fields`` change the training, ``sampling`` the rest."""
        config = TrainConfig(**{**self.base, **fields, "seed": seed})
        return Arm(group, name, config, **({
            "samples": self.samples, "sampling_steps": self.sampling_steps,
            "features": self.features, "weights": self.weights, "make_data": self.make_data,
            "batch_size": self.batch_size} | sampling))

    def baselines(self, group: str, fields: dict, seed: int, sigma: float) -> list[Arm]:
        """What the plain DDPM of a group can do without training; corruption ``sigma``, if any."""
        return baseline_arms(self.arm(group, "DDPM", METHODS["DDPM"] | fields, seed), sigma)

    def run(self, arms: Sequence[Arm]) -> list[dict]:
        """Records of the arms, with the measures ``signal`` or ``noise_excess`` added."""
        records = run_arms(arms, self.out, self.jobs)
        clean: dict[int, float] = {}
        for arm, record in zip(arms, records, strict=True):
            measures, seed = record["measures"], arm.config.seed
            if self.noise == EXCESS and seed not in clean:
                data = arm.make_data(arm.config)
                some = torch.arange(min(self.samples, len(data)))
                clean[seed] = data.measure(data.clean(some))["noise_level"]
            self._add(measures, clean.get(seed, 0.0))
        return records

    def references(self, arms: Sequence[Arm]) -> list[dict]:
        """Records of clean data that no model saw and of the training data, for every group and
        seed: what the measures are at best, and for a model that learns everything.
        """
        made, known = [], {}
        for arm in {(a.group, a.config.seed): a for a in reversed(arms)}.values():
            seed, sigma = arm.config.seed, arm.config.corrupt_sigma
            for name in (CLEAN, *([TRAINING] if sigma else [])):
                key = seed, name, sigma if name == TRAINING else None
                if key not in known:
                    known[key] = self._measures(arm, name)
                clean = known[seed, CLEAN, None].get("noise_level", 0.0)
                made.append({"group": arm.group, "name": name, "seed": seed,
                             "measures": self._add(dict(known[key]), clean)})
        return made

    def _measures(self, arm: Arm, which: str) -> dict[str, float]:
        data = arm.make_data(arm.config)
        if which == TRAINING:
            points = data.batch(torch.arange(min(self.samples, len(data))))
        elif arm.config.data == "subspace":  # whose first points do not depend on their number
            more = replace(arm.config, num_points=arm.config.num_points + self.samples)
            points = arm.make_data(more).all_clean()[-self.samples:]
        else:
            points = data.heldout.clean(torch.arange(min(self.samples, len(data.heldout))))
        return measures_of(arm, data, points)

    def _add(self, measures: dict[str, float], clean: float) -> dict[str, float]:
        found = [measures[k] for k in self.signal if k in measures]
        if found:
            measures["signal"] = statistics.fmean(found)
        if self.noise == EXCESS:
            measures[EXCESS] = measures["noise_level"] - clean
        return measures


def corrupted(sigma: float) -> dict:
    """Fields of a training set of which 90 % carry noise of this standard deviation."""
    return dict(corrupt_fraction=0.9 if sigma else 0.0, corrupt_sigma=sigma)


def noise_name(sigma: float) -> str:
    """Name of a group."""
    return f"90 % with sigma {sigma:g}" if sigma else "clean data"


def make_scale(
    name: str, out: Path, seeds: int, jobs: int, steps: int | None, data_dir: Path | None = None,
    features: str = "auto", weights: Path | None = None, needs_features: bool = True,
) -> Scale:
    """The scale of a name.

    Args:
        out, seeds, jobs: see ``Scale``.
        steps: optimizer steps in place of the scale's own.
        data_dir: CIFAR-10 (small, full).
        features, weights: feature space of the Frechet distance (small, full).
        needs_features: whether the study measures in it.

    Raises:
        UsageError: for an unknown scale, or where data or a feature space are missing.
    """
    if name not in SCALES:
        raise UsageError(f"scale is {name!r}: choose one of {', '.join(SCALES)}")
    common = dict(name=name, seeds=seeds, out=out, jobs=jobs, steps=steps)
    if name == "tiny":
        for key, value in (("data_dir", data_dir), ("weights", weights),
                           ("features", None if features == "auto" else features)):
            if value is not None:
                raise UsageError(f"{key} is {str(value)!r}: tiny makes its own data and has its "
                                 "own features; use --scale small or full")
        base = preset_values("subspace") | ({"steps": steps} if steps else {})
        return Scale(
            base=base, samples=500, sampling_steps=None, attacked_samples=256, attacked_steps=100,
            noise="off_subspace_sd", signal=tuple(f"component_ratio_{k}" for k in range(1, 6)),
            features="pixels", weights=None, make_data=subspace.make_data, **common,
            differs=(
                "Data: a Gaussian of rank 5 in R^32 (standard deviations 2 to 0.5), 5,000 points, "
                "in place of images; so noise and signal are measured exactly.",
                f"Network and budget: a residual MLP, {base['steps']:,} steps of "
                f"{base['batch_size']}, in place of a UNet trained for hundreds of thousands.",
                "Frechet distance of the points themselves, 500 samples against the clean set, in "
                "place of FID of 50,000 images: only orders and ratios can be compared.",
            ))
    if data_dir is None:
        raise UsageError(f"data_dir is not given: --scale {name} trains on CIFAR-10, name your "
                         "copy")
    if not needs_features:
        features = "no"
    if features in ("pixels", "digits"):
        raise UsageError(f"features is {features!r}: --scale {name} cannot measure in them (more "
                         "pixels than samples; no digits); use inception or resnet56")
    if features == "auto":
        raise UsageError(f"features is 'auto': --scale {name} needs a feature space; use "
                         "--features inception (the paper's), or resnet56 with --weights")
    base = preset_values("cifar10") | dict(data_dir=data_dir, compile=True)
    seen = f"Frechet distance in {features} features"
    if features != "inception":
        seen += ", which is not FID: only orders and ratios can be compared"
    if name == "small":
        base |= dict(block_channels=(64, 128, 128), layers_per_block=2, batch_size=128,
                     steps=steps or 4000, lr=2e-4, warmup_steps=200, ema_rates=(0.999,),
                     dropout=0.0)
        return Scale(
            # More than Inception's 2,048 features, which a Frechet distance takes.
            base=base, samples=2500, sampling_steps=100, attacked_samples=2500, attacked_steps=50,
            noise=EXCESS, signal=(), features=features, weights=weights, batch_size=500,
            **common, differs=(
                f"A UNet of 7 million parameters, {base['steps']:,} steps of 128.",
                f"{seen}; 2,500 samples by 100 respaced steps."))
    base |= {"steps": steps} if steps else {}
    return Scale(
        base=base, samples=50_000, sampling_steps=None, attacked_samples=10_000,
        attacked_steps=None, noise=EXCESS, signal=(), features=features, weights=weights,
        batch_size=500, **common, differs=(
            f"The paper does not say how long it trained: here {base['steps']:,} steps of 128, the "
            "35.7 M network of google/ddpm-cifar10-32.",
            f"{seen}; 50,000 samples, 10,000 under attack."))
