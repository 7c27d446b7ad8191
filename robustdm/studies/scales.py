"""The scales at which a table or figure of the paper is reproduced, and what all of them share."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from robustdm.data import Corruption, Data, SubspaceData, load_data
from robustdm.errors import UsageError
from robustdm.metrics import noise_level
from robustdm.runs.config import TrainConfig
from robustdm.runs.presets import preset_values
from robustdm.studies.runner import (
    SHRUNK_LAM,
    Arm,
    baseline_arms,
    load_samples,
    measures_of,
    run_arms,
)

SCALES = ("tiny", "small", "full")
METHODS = {
    "DDPM": dict(objective="ddpm"),
    "robust_ran": dict(objective="robust_ran", lambda_mode="ray"),
    "robust_adv": dict(objective="robust_adv", lambda_mode="ray"),
}
# The mode is named throughout, so that a change of the default leaves the studies as they are.
OBJECTIVES = {
    "DDPM": dict(objective="ddpm", lambda_mode="ray"),
    "robust_ran": dict(objective="robust_ran", lambda_mode="ray"),
    "outward_ran": dict(objective="outward_ran", lambda_mode="ray"),
    "robust_adv (ray)": dict(objective="robust_adv", lambda_mode="ray"),
    "robust_adv (x)": dict(objective="robust_adv", lambda_mode="x"),
    "invariance": dict(objective="invariance", lambda_mode="ray"),
}
SDS = [2.0, 1.4, 1.0, 0.7, 0.5]
NOISE_DIMS = 27
"""The subspace: standard deviations along it, and dimensions of noise alone."""
SHRUNK = {lam: f"DDPM, shrunk {lam:g}" for lam in SHRUNK_LAM}
BLURRED = "DDPM, blurred"
EXCESS = "noise_excess"
AXES = 20
"""Principal axes of clean images along which the signal of others is measured."""
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
            the truth. Those of images are ``ImageTruth``'s.
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

    def on(self, preset: str, samples: int, steps: int | None = None, fields: Mapping | None = None,
           **changes) -> Scale:
        """The same with data and network of a preset, and no features if ``changes`` name none.

        Args:
            steps: optimizer steps, unless others were asked for.
            fields: of the training configuration.
        """
        base = preset_values(preset) | dict(fields or {})
        if self.steps or steps:
            base["steps"] = self.steps or steps
        return replace(self, base=base, samples=samples, **(
            dict(features=None, make_data=load_data, signal=()) | changes))

    @property
    def is_image(self) -> bool:
        """Whether samples are images: only those can be blurred."""
        return TrainConfig(**self.base).data in ("cifar10", "images", "digits")

    def arm(self, group: str, name: str, fields: dict, seed: int, **sampling) -> Arm:
        """An arm of this scale; ``fields`` change the training, ``sampling`` the rest."""
        config = TrainConfig(**{**self.base, **fields, "seed": seed})
        return Arm(group, name, config, **({
            "samples": self.samples, "sampling_steps": self.sampling_steps,
            "features": self.features, "weights": self.weights, "make_data": self.make_data,
            "batch_size": self.batch_size} | sampling))

    def arms(
        self, group: str | float, methods: Mapping[str, dict],
        shrunk: Sequence[float] | None = None, sampling: Mapping | None = None,
    ) -> list[Arm]:
        """Every method with every seed.

        Args:
            group: its name, or the strength of its corruption.
            methods: name -> fields of the training.
            shrunk: strengths of the shrunk DDPM; with them, all that the paper leaves out beside
                plain DDPM is there.
            sampling: see ``arm``.
        """
        fields = {}
        if not isinstance(group, str):
            group, fields = noise_name(group), corrupted(group)
        made = []
        for seed in range(self.seeds):
            made += [self.arm(group, name, method | fields, seed, **sampling or {})
                     for name, method in methods.items()]
            if shrunk is not None:
                plain = self.arm(group, "DDPM", METHODS["DDPM"] | fields, seed)
                made += baseline_arms(plain, shrunk)
        return made

    def run(self, arms: Sequence[Arm]) -> list[dict]:
        """Records of the arms, with the measure ``signal`` and of images ``noise_excess`` added."""
        records = run_arms(arms, self.out, self.jobs)
        truths: dict[int, ImageTruth] = {}
        for arm, record in zip(arms, records, strict=True):
            samples = load_samples(arm, self.out) if self.noise == EXCESS else None
            self._add(record["measures"], samples, arm, truths)
        return records

    def references(self, arms: Sequence[Arm]) -> list[dict]:
        """Records of clean data that no model saw and of the training data, for every group and
        seed: what the measures are at best, and for a model that learns everything.
        """
        made, known = [], {}
        truths: dict[int, ImageTruth] = {}
        for arm in {(a.group, a.config.seed): a for a in reversed(arms)}.values():
            seed, sigma = arm.config.seed, arm.config.corrupt_sigma
            for name in (CLEAN, *([TRAINING] if sigma else [])):
                key = arm.config.data, seed, name, sigma if name == TRAINING else None
                if key not in known:
                    data, points = self._points(arm, name)
                    known[key] = self._add(measures_of(arm, data, points), points, arm, truths)
                    known[key]["samples"] = len(points)
                made.append({"group": arm.group, "name": name, "seed": seed,
                             "measures": dict(known[key])})
        return made

    def _points(self, arm: Arm, which: str) -> tuple[Data, torch.Tensor]:
        data = arm.make_data(arm.config)
        if which == TRAINING:
            points = data.batch(torch.arange(min(arm.samples, len(data))))
        elif arm.config.data == "subspace":  # whose first points do not depend on their number
            more = replace(arm.config, num_points=arm.config.num_points + arm.samples)
            points = arm.make_data(more).all_clean()[-arm.samples:]
        else:
            points = data.heldout.clean(torch.arange(min(arm.samples, len(data.heldout))))
        return data, points

    def _add(self, measures: dict, samples: torch.Tensor | None, arm: Arm, truths: dict) -> dict:
        if self.noise == EXCESS:
            seed = arm.config.seed
            if seed not in truths:
                data = arm.make_data(arm.config)
                truths[seed] = ImageTruth.of(data.clean(torch.arange(min(2500, len(data)))))
            measures |= truths[seed].measure(samples)
        else:
            found = [measures[k] for k in self.signal if k in measures]
            if found:
                measures["signal"] = statistics.fmean(found)
        return measures


@dataclass(frozen=True)
class ImageTruth:
    """What noise and signal of images are measured against: clean ones.

    Attributes:
        level: their white-noise estimate, which is texture.
        axes: (D, AXES) leading principal axes of their pixels.
        deviation: (AXES,) standard deviation along them.
    """

    level: float
    axes: torch.Tensor
    deviation: torch.Tensor

    @classmethod
    def of(cls, clean: torch.Tensor) -> ImageTruth:
        """Of clean images (N, C, H, W)."""
        x = clean.flatten(1)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            axes = torch.pca_lowrank(x, min(AXES, *x.shape), niter=4)[2]
        return cls(noise_level(clean).median().item(), axes, (x @ axes).std(0))

    def measure(self, samples: torch.Tensor) -> dict[str, float]:
        """``noise_excess``: standard deviation of the white noise beyond clean images'; negative,
        and that of the texture lost, where samples are smoother. ``signal``: mean over the leading
        axes of the standard deviation over the truth's, that noise taken off.
        """
        level = noise_level(samples).median().item()
        excess = math.copysign(abs(level**2 - self.level**2) ** 0.5, level - self.level)
        variance = (samples.flatten(1) @ self.axes).var(0) - max(excess, 0.0) ** 2
        signal = variance.clamp(min=0).sqrt() / self.deviation
        return {EXCESS: excess, "signal": signal.mean().item()}


def linear_images(scale: Scale) -> Scale:
    """Samples of the leading components of a scale's images, of which the truth is known."""
    base = scale.base | dict(
        data="subspace", subspace_space="ambient", subspace_rank=25, num_points=10_000,
        clip_samples=False)
    return replace(
        # No features: thousands of pixels would need more samples.
        scale, base=base, noise="off_subspace_sd", features=None, weights=None,
        samples=min(scale.samples, 5000),
        signal=tuple(f"component_ratio_{k}" for k in range(1, 26)),
        differs=("Images: the given set's 25 leading components, in place of the Smithsonian "
                 "butterflies'.", *scale.differs[:1]))


def make_data(config: TrainConfig) -> SubspaceData:
    """The points of the subspace: fixed for a seed, corrupted once."""
    corruption = Corruption(config.corrupt_fraction, config.corrupt_sigma, config.seed)
    return SubspaceData.from_sds(
        SDS, NOISE_DIMS, config.num_points, corruption, config.holdout, config.seed)


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
            features="pixels", weights=None, make_data=make_data, **common,
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
            # More than Inception's 2,048 features, which a Frechet distance takes; an attack costs
            # up to 42 times as much as sampling.
            base=base, samples=2500, sampling_steps=100,
            attacked_samples=2500 if features == "inception" else 500, attacked_steps=25,
            noise=EXCESS, signal=(), features=features, weights=weights, batch_size=500,
            **common, differs=(
                f"A UNet of 7 million parameters, {base['steps']:,} steps of 128.",
                f"{seen}; 2,500 samples by 100 respaced steps.",
                "5 % of the training images are held out, and are the row of clean data."))
    base |= {"steps": steps} if steps else {}
    return Scale(
        base=base, samples=50_000, sampling_steps=None, attacked_samples=10_000,
        attacked_steps=None, noise=EXCESS, signal=(), features=features, weights=weights,
        batch_size=500, **common, differs=(
            f"The paper does not say how long it trained: here {base['steps']:,} steps of 128, the "
            "35.7 M network of google/ddpm-cifar10-32.",
            f"{seen}; 50,000 samples, 10,000 under attack.",
            "5 % of the training images are held out: the row of clean data has only 2,500, where "
            "a Frechet distance is larger."))
