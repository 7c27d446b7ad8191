"""What a plain DDPM can do against noise without being trained for it: the baselines of the method.

None costs training. ``known`` is exact for white Gaussian noise of known strength, which can be
measured (`robustdm.metrics.noise`). For Gaussian data ``shrink`` is the regularised optimum itself
(see ``planner``): where it does as well as a robust model, robust training has bought nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustdm.errors import UsageError
from robustdm.method.closed_form import Setting, excess
from robustdm.method.perturbation import Perturbation
from robustdm.method.predict import predict_noise
from robustdm.method.schedule import NoiseSchedule, expand

Method = Literal["known", "shrink", "blur"]
DEFAULT_SHAPE = (Perturbation().omega, Perturbation().gamma)
DEFAULT_STRENGTH = {"shrink": Perturbation().lam, "blur": 0.5}
CLEAN = 0.03
"""Noise that is not worth removing: clean photographs of 64x64 read as much."""


@dataclass(frozen=True)
class Baseline:
    """One baseline and how strong it is.

    Args:
        method: "known" ends the chain where its noise is about as strong as that of the training
            data, and there predicts clean data instead of training data; "shrink" denoises as if
            the state carried noise of variance s^2 (1 + c_t), with the c_t that robust_adv has in
            closed form; "blur" blurs samples (images only).
        strength: known: standard deviation of the noise, root mean square over all training items,
            sqrt(p) sigma if a share p of them has noise sigma and nobody knows which. shrink: lam
            of the regulariser that is imitated, by default 0.3. blur: standard deviation in pixels,
            by default 0.5.
        shape: shrink: omega and gamma of the regulariser that is imitated.
        stop: known: the chain ends at the cleanest of its timesteps with s / a >= stop * strength.
            Small keeps detail; large bounds what a strength that is too high can do.
        safety: known: share of the strength that is corrected for. Too little leaves some noise,
            too much adds noise of its own.

    Raises:
        UsageError: for an unknown method, or a value out of range.

    Source: ``known`` is Tweedie's formula with the noise of data and chain together, as Daras et
        al. 2024, "Consistent Diffusion Meets Tweedie", train with; the network of a plain DDPM
        needs no other training for it.
    """

    method: Method
    strength: float | None = None
    shape: tuple[float, float] = DEFAULT_SHAPE
    stop: float = 1.0
    safety: float = 0.9

    def __post_init__(self):
        if self.method == "early_stop":
            raise UsageError("baseline is 'early_stop', which is gone: it returned the mean of "
                             "noisy data; 'known' stops there and returns clean data")
        if self.method not in Method.__args__:
            raise UsageError(f"baseline is {self.method!r}: choose one of "
                             f"{', '.join(Method.__args__)}")
        if self.strength is None:
            if self.method == "known":
                raise UsageError("baseline is 'known', and the noise of the training data is not: "
                                 "give its standard deviation as --baseline-strength")
            object.__setattr__(self, "strength", DEFAULT_STRENGTH[self.method])
        for name, value in (("strength", self.strength), ("stop", self.stop)):
            if not (math.isfinite(value) and value > 0):
                raise UsageError(f"baseline_{name} is {value}: it must be a positive number")
        if not 0 < self.safety <= 1:
            raise UsageError(f"baseline_safety is {self.safety}: it must be above 0 and at most 1")

    def network(self, model: nn.Module, schedule: NoiseSchedule) -> nn.Module:
        """What to sample with in place of the model."""
        if self.method != "shrink":
            return model
        omega, gamma = self.shape
        setting = Setting("robust_adv", Perturbation(omega, gamma, self.strength, "ray"))
        return Shrunk(model, schedule, excess(schedule, setting, torch.arange(len(schedule))))

    @property
    def settings(self) -> dict[str, float]:
        """``stop`` and ``data_noise`` of the sampler."""
        if self.method != "known":
            return {}
        return {"stop": self.stop * self.strength, "data_noise": self.safety * self.strength}

    def finish(self, samples: Tensor) -> Tensor:
        """What is done to finished samples.

        Raises:
            UsageError: for a blur of points.
        """
        if self.method != "blur":
            return samples
        if samples.ndim != 4:
            raise UsageError("baseline is 'blur': only images can be blurred, and these samples "
                             f"have the shape {tuple(samples.shape[1:])}; use known or shrink")
        return blur(samples, self.strength)


def from_flags(
    flags, noise: Callable[[], float] | None = None, objective: str | None = None
) -> Baseline | None:
    """The baseline that ``--baseline`` and the flags beside it name, None for "none".

    Args:
        flags: with baseline, baseline_strength, baseline_shape, baseline_stop, baseline_safety.
        noise: measures the root mean square of the training data's noise, which is the strength of
            "known" unless one is given, and bounds it; None if there are no data.
        objective: the model's training objective, None if unknown.

    Raises:
        UsageError: for a flag that is missing, wrong or of another baseline, a strength above the
            data's noise, data without noise, or a model that removes noise itself.
    """
    method, strength = flags.baseline, flags.baseline_strength
    for name, owner in (("shape", "shrink"), ("stop", "known"), ("safety", "known")):
        value = getattr(flags, f"baseline_{name}")
        if value is not None and method != owner:
            raise UsageError(f"baseline_{name} is {value}: only --baseline {owner} has one")
    if method == "none":
        if strength is not None:
            raise UsageError(f"baseline_strength is {strength} without a baseline: name one, or "
                             "leave it out")
        return None
    if method in ("known", "shrink") and objective not in (None, "ddpm"):
        raise UsageError(f"baseline is {method!r}, and the model was trained with {objective}, "
                         "which removes noise itself: leave --baseline out, or use a plain DDPM")
    given = {name: value for name in ("shape", "stop", "safety")
             if (value := getattr(flags, f"baseline_{name}")) is not None}
    if method == "known" and noise is not None:
        if strength is None:
            strength = noise()
            if strength < CLEAN:
                raise UsageError("baseline is 'known', and the training data look clean: their "
                                 f"noise has a standard deviation of {strength:.2g} at most; leave "
                                 "--baseline out")
        else:
            made = Baseline(method, strength, **given)
            try:
                bound = noise()
            except UsageError:  # nothing to compare with
                return made
            if strength > 1.1 * bound:
                raise UsageError(
                    f"baseline_strength is {strength:g}: the data vary by no more than "
                    f"{bound:.3g} in some direction, so their noise cannot be as strong; give at "
                    "most that, or leave it out")
    return Baseline(method, strength, **given)


@torch.no_grad()
def denoise(
    model: nn.Module, schedule: NoiseSchedule, x: Tensor, sigma: float, stop: float = 0.5
) -> Tensor:
    """Data without their noise, by one call of a network that learned noisy data.

    The last step of ``known``, from the data themselves: they are taken for a state at the timestep
    where s / a is nearest to stop * sigma, with no noise added. Far below that timestep the network
    knows the direction of the noise badly (of digits, a tenth of sigma removes nothing), far above
    it blurs.

    Args:
        model: what ``predict_noise`` takes, trained as a plain DDPM.
        x: (B, ...) data with noise of standard deviation ``sigma``.

    Returns:
        Shaped like x.
    """
    noise = schedule.sqrt_one_minus_alphas_cumprod / schedule.sqrt_alphas_cumprod
    t = int((noise - stop * sigma).abs().argmin())
    level, a = noise[t].item(), schedule.sqrt_alphas_cumprod[t].item()
    eps = predict_noise(model, a * x, torch.full((len(x),), t, device=x.device)).to(x.dtype)
    return x - (1 + (sigma / level) ** 2) * level * eps


class Shrunk(nn.Module):
    """A DDPM's network, queried as if the noise had the variance s^2 (1 + c_t).

    At timestep t the state counts as one of timestep t', the nearest with s'/a' = sqrt(1 + c_t)
    s/a: the network is asked at (x a'/a, t'), and what it takes for clean data is turned back into
    a noise prediction at t. Where the schedule has no noise as strong, t' is its last timestep.

    Args:
        model: what ``predict_noise`` takes, trained as a plain DDPM.
        schedule: of its training.
        excess: (T,) c_t, none negative.
    """

    def __init__(self, model: nn.Module, schedule: NoiseSchedule, excess: Tensor):
        super().__init__()
        self.model = model
        a, s = schedule.sqrt_alphas_cumprod, schedule.sqrt_one_minus_alphas_cumprod
        scale = (s / a).log()
        wanted = scale + 0.5 * torch.log1p(excess.to(scale))
        above = torch.searchsorted(scale, wanted).clamp(1, len(scale) - 1)
        nearer = wanted - scale[above - 1] < scale[above] - wanted
        self.register_buffer("seen_as", torch.where(nearer, above - 1, above))
        self.register_buffer("a", a)
        self.register_buffer("s", s)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Noise prediction for x (B, ...) at timesteps t (B,)."""
        other = self.seen_as[t]
        a, s, a2, s2 = (expand(v.to(x.dtype), x) for v in (
            self.a[t], self.s[t], self.a[other], self.s[other]))
        y = x * (a2 / a)
        x0 = (y - s2 * predict_noise(self.model, y, other).to(x.dtype)) / a2
        return (x - a * x0) / s


def blur(images: Tensor, sd: float) -> Tensor:
    """Gaussian blur of images (N, C, H, W), the border repeated.

    Args:
        sd: standard deviation in pixels.
    """
    reach = max(1, round(3 * sd))
    taps = torch.exp(-torch.arange(-reach, reach + 1.0).square() / (2 * sd * sd))
    taps = (taps / taps.sum()).to(images)
    channels = images.shape[1]
    for kernel in (taps.view(1, 1, 1, -1), taps.view(1, 1, -1, 1)):
        padding = (reach, reach, 0, 0) if kernel.shape[-1] > 1 else (0, 0, reach, reach)
        images = F.conv2d(F.pad(images, padding, mode="replicate"),
                          kernel.expand(channels, 1, *kernel.shape[2:]), groups=channels)
    return images
