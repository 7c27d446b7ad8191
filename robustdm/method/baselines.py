"""What a plain DDPM can do against noise without being trained for it: the baselines of the method.

All three cost no training. For Gaussian data ``shrink`` is the regularised optimum itself (see
``planner``): where it does as well as a robust model, robust training has bought nothing.
"""

from __future__ import annotations

import math
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

Method = Literal["shrink", "early_stop", "blur"]
DEFAULT_SHAPE = (Perturbation().omega, Perturbation().gamma)
DEFAULT_STRENGTH = {"shrink": Perturbation().lam, "early_stop": 0.2, "blur": 0.5}


@dataclass(frozen=True)
class Baseline:
    """One baseline and how strong it is.

    Args:
        method: "shrink" denoises as if the state carried noise of variance s^2 (1 + c_t), with the
            c_t that robust_adv has in closed form; "early_stop" ends the chain where its noise has
            the strength of the corruption, with the prediction of clean data; "blur" blurs samples
            (images only).
        strength: shrink: lam of the regulariser that is imitated. early_stop: standard deviation of
            the corruption. blur: standard deviation in pixels. By default ``DEFAULT_STRENGTH``.
        shape: shrink: omega and gamma of the regulariser that is imitated.

    Raises:
        UsageError: for an unknown method or a strength that is not positive.
    """

    method: Method
    strength: float | None = None
    shape: tuple[float, float] = DEFAULT_SHAPE

    def __post_init__(self):
        if self.method not in Method.__args__:
            raise UsageError(f"baseline is {self.method!r}: choose one of "
                             f"{', '.join(Method.__args__)}")
        if self.strength is None:
            object.__setattr__(self, "strength", DEFAULT_STRENGTH[self.method])
        if not (math.isfinite(self.strength) and self.strength > 0):
            raise UsageError(f"baseline_strength is {self.strength}: it must be a positive number")

    def network(self, model: nn.Module, schedule: NoiseSchedule) -> nn.Module:
        """What to sample with in place of the model."""
        if self.method != "shrink":
            return model
        omega, gamma = self.shape
        setting = Setting("robust_adv", Perturbation(omega, gamma, self.strength, "ray"))
        return Shrunk(model, schedule, excess(schedule, setting, torch.arange(len(schedule))))

    @property
    def stop(self) -> float:
        """``stop`` of the sampler."""
        return self.strength if self.method == "early_stop" else 0.0

    def finish(self, samples: Tensor) -> Tensor:
        """What is done to finished samples.

        Raises:
            UsageError: for a blur of points.
        """
        if self.method != "blur":
            return samples
        if samples.ndim != 4:
            raise UsageError("baseline is 'blur': only images can be blurred, and these samples "
                             f"have the shape {tuple(samples.shape[1:])}; use shrink or early_stop")
        return blur(samples, self.strength)


def from_flags(
    method: str, strength: float | None, shape: tuple[float, float] | None, sigma: float | None
) -> Baseline | None:
    """The baseline that ``--baseline``, ``--baseline-strength`` and ``--baseline-shape`` name, None
    for "none".

    Args:
        sigma: standard deviation of the run's corruption, None if unknown.

    Raises:
        UsageError: for a strength that is missing, wrong or without a baseline, or a shape of
            anything but "shrink".
    """
    if shape is not None and method != "shrink":
        raise UsageError(f"baseline_shape is {shape}: only --baseline shrink has one")
    if method == "none":
        if strength is not None:
            raise UsageError(f"baseline_strength is {strength} without a baseline: name one, or "
                             "leave it out")
        return None
    if strength is None and method == "early_stop":
        if not sigma:
            raise UsageError("baseline is 'early_stop', and how strong the corruption is is not "
                             "known: give --baseline-strength")
        strength = sigma
    return Baseline(method, strength, shape or DEFAULT_SHAPE)


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
