"""Sampling: DDPM and DDIM over all timesteps or a respaced subset, noise seeded per sample.

A respaced chain visits a decreasing list of timesteps; its steps are numbered k = 0 (noisiest) to
S - 1 (cleanest), and each step goes to the *next timestep of the list*, the last one to clean data.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from robustdm.device import is_out_of_memory
from robustdm.errors import RunError, UsageError
from robustdm.method.predict import predict_noise
from robustdm.method.schedule import NoiseSchedule
from robustdm.ops.stream import Stream, element_index, normal, philox

Sampler = Literal["ddpm", "ddim"]
Spacing = Literal["linspace", "leading", "trailing", "truncate"]
Variance = Literal["fixed_large", "fixed_small"]


def timesteps(
    schedule: NoiseSchedule | int, steps: int | None = None, spacing: Spacing = "linspace",
    stop: float = 0.0,
) -> Tensor:
    """The timesteps that a sampler of ``steps`` steps visits.

    Args:
        schedule: the schedule, or its length T.
        steps: how many, 1 to T; by default all.
        spacing: "linspace", "leading" and "trailing" give the sets that diffusers' schedulers
            give for these names. "truncate" visits the ``steps`` cleanest timesteps, that is, it
            puts pure noise in the middle of the chain: no proper sampler, but what the published
            300- and 500-step rows may have done.
        stop: leave out the timesteps whose noise over signal, s / a, is below this, so that the
            chain ends early, with the prediction of clean data. Needs the schedule itself.

    Returns:
        (steps,) int64, or fewer if stopped, strictly decreasing.

    Raises:
        UsageError: for steps out of range, an unknown spacing, or a stop above all noise.

    Source: Lin et al. 2024, "Common Diffusion Noise Schedules and Sample Steps are Flawed",
        Table 2, for the names.
    """
    total = schedule if isinstance(schedule, int) else len(schedule)
    steps = total if steps is None else steps
    if not 1 <= steps <= total:
        raise UsageError(f"steps is {steps}: it must be from 1 to the schedule's length, {total}")
    _check_choice("spacing", spacing, Spacing)
    k = np.arange(steps)
    if spacing == "linspace":
        increasing = np.linspace(0, total - 1, steps).round()
    elif spacing == "leading":
        increasing = k * (total // steps)
    elif spacing == "trailing":
        # Rounding can give arange one element too many, timestep -1: diffusers keeps it.
        increasing = np.arange(total, 0, -total / steps)[:steps].round()[::-1] - 1
    else:
        increasing = k
    chosen = torch.from_numpy(increasing[::-1].astype(np.int64))
    if not stop:
        return chosen
    noise = (schedule.sqrt_one_minus_alphas_cumprod / schedule.sqrt_alphas_cumprod)[chosen]
    if not 0 < stop <= noise[0]:
        raise UsageError(f"stop is {stop}: it must be from 0 to the sampler's first noise scale, "
                         f"{noise[0]:.3g}")
    return chosen[noise >= stop]


class Respaced:
    """The reverse chain over a list of timesteps; every table is (S,) float64, indexed by step k.

    Attributes:
        timesteps: (S,) int64, decreasing: what the network is told.
        alphas_cumprod: signal power abar before the step.
        alphas_cumprod_prev: signal power after it; 1 after the last.
        betas: variance that the forward chain adds between the two, 1 - abar / abar_prev.
        mean_x0, mean_x: coefficients of the posterior mean of q(x_prev | x, x0).
        std: noise of a step for each ``Variance``: "fixed_large" is sqrt(beta), "fixed_small" the
            posterior's. No noise is added at the last step. For users that perturb by this amount
            "fixed_large" still holds a number there: like improved-diffusion's, the posterior's
            deviation of the step before.

    Raises:
        UsageError: unless the timesteps decrease and belong to the schedule.

    Source: Ho et al. 2020, Eq. 7; respacing as in Nichol & Dhariwal 2021, Eq. 19.
    """

    def __init__(self, schedule: NoiseSchedule, timesteps: Tensor):
        timesteps = torch.as_tensor(timesteps, dtype=torch.int64).cpu()
        inside = timesteps.numel() and 0 <= timesteps.min() and timesteps.max() < len(schedule)
        if timesteps.ndim != 1 or not inside or bool((timesteps.diff() >= 0).any()):
            raise UsageError(
                f"timesteps must be a list that decreases strictly within 0 to {len(schedule) - 1}"
            )
        self.timesteps = timesteps
        after = schedule.alphas_cumprod[timesteps]
        before = torch.cat([after[1:], after.new_ones(1)])
        self.alphas_cumprod, self.alphas_cumprod_prev = after, before
        self.betas = 1 - after / before
        self.mean_x0 = before.sqrt() * self.betas / (1 - after)
        self.mean_x = (1 - self.betas).sqrt() * (1 - before) / (1 - after)
        small = (self.betas * (1 - before) / (1 - after)).sqrt()
        large = self.betas.sqrt()
        if len(timesteps) > 1:
            large[-1] = small[-2]
        self.std = {"fixed_large": large, "fixed_small": small}

    def __len__(self) -> int:
        return len(self.timesteps)

    def predict_x0(self, k: int, x: Tensor, eps: Tensor, clip: bool = False) -> Tensor:
        """The data that x and a noise prediction imply, clipped to [-1, 1] if wished."""
        abar = self.alphas_cumprod[k].item()
        x0 = (x - math.sqrt(1 - abar) * eps) / math.sqrt(abar)
        return x0.clamp(-1, 1) if clip else x0

    def posterior_mean(self, k: int, x: Tensor, x0: Tensor) -> Tensor:
        """Mean of q(x_prev | x, x0)."""
        return self.mean_x0[k].item() * x0 + self.mean_x[k].item() * x

    def ddpm_step(
        self, k: int, x: Tensor, eps: Tensor, noise: Tensor | None, variance: Variance, clip: bool
    ) -> Tensor:
        """One ancestral step: posterior mean plus noise; no noise at the last step.

        Args:
            x, eps: (B, ...) state and noise prediction.
            noise: (B, ...) standard normal, unused at the last step.
        """
        mean = self.posterior_mean(k, x, self.predict_x0(k, x, eps, clip))
        if k == len(self) - 1:
            return mean
        return mean + self.std[variance][k].item() * noise

    def ddim_step(
        self, k: int, x: Tensor, eps: Tensor, noise: Tensor | None, eta: float, clip: bool
    ) -> Tensor:
        """One DDIM step. Clipping moves x0 but not eps, as diffusers does it by default.

        Args:
            x, eps: (B, ...) state and noise prediction.
            noise: (B, ...) standard normal, unused if eta is 0 and at the last step.

        Source: Song et al. 2021, Eq. 12 and 16.
        """
        before = self.alphas_cumprod_prev[k].item()
        std = eta * self.std["fixed_small"][k].item()
        x = math.sqrt(before) * self.predict_x0(k, x, eps, clip)
        # Both are 0 after the last step; rounding must not turn that into the root of -1e-17.
        x = x + math.sqrt(max(0.0, 1 - before - std**2)) * eps
        return x if eta == 0 or k == len(self) - 1 else x + std * noise


# noise(timestep, samples): timestep None is the initial noise, samples their global numbers.
NoiseSource = Callable[[int | None, range], Tensor]


def stream_noise(
    seed: int, shape: tuple[int, ...], device=None, dtype: torch.dtype = torch.float32
) -> NoiseSource:
    """The samplers' noise: sample k has the same whatever the batch it is computed in.

    Args:
        seed: 0 to 2**32 - 1.
        shape: shape of one sample.

    Returns:
        noise(timestep, samples) -> (len(samples), *shape) standard normal; ``samples`` is a range
        of global sample numbers, ``timestep`` None for the initial noise x_T.
    """

    def noise(timestep: int | None, samples: range) -> Tensor:
        stream = Stream.SAMPLER_INIT if timestep is None else Stream.SAMPLER_STEP
        index = element_index(samples.start, (len(samples), *shape), device)
        return normal(*philox(seed, timestep or 0, index, stream)[:2], dtype)

    return noise


@torch.no_grad()
def sample(
    model: Callable,
    schedule: NoiseSchedule,
    shape: tuple[int, ...],
    *,
    num: int,
    sampler: Sampler = "ddpm",
    steps: int | None = None,
    spacing: Spacing = "linspace",
    variance: Variance = "fixed_large",
    eta: float = 0.0,
    clip: bool = False,
    stop: float = 0.0,
    data_noise: float = 0.0,
    seed: int = 0,
    first_index: int = 0,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    noise: NoiseSource | None = None,
    attack: Callable[[Callable, Respaced, int, range, Tensor, Tensor | None], Tensor] | None = None,
    trajectory: Callable[[int, range, Tensor], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Generate samples.

    Args:
        model: what ``predict_noise`` takes; a module runs in eval mode and gets its modes back.
        schedule: the noise schedule it was trained with.
        shape: shape of one sample, e.g. (3, 32, 32) or (3,).
        num: how many.
        sampler: "ddpm" (ancestral) or "ddim".
        steps: timesteps to visit; by default all.
        spacing: which ones; see ``timesteps``.
        variance: ddpm's noise; "fixed_large" is beta, "fixed_small" the posterior variance.
        eta: ddim's noise, 0 (none) to 1 (that of ddpm with "fixed_small").
        clip: clip each predicted x0 to [-1, 1].
        stop: end the chain at this noise scale; see ``timesteps``.
        data_noise: standard deviation of white Gaussian noise in the data that the model learned
            from: the last step predicts the data without it, x0 = x/a - (1 + data_noise^2 /
            (s/a)^2) (s/a) eps. Below that noise nothing is left to predict from: stop near it.
        seed, first_index: the samples are numbers first_index to first_index + num - 1 of the
            seed's sequence; a number determines its noise, whatever the batch size.
        batch_size: samples computed at once; see `batch_or_default`.
        device: where to compute; by default where the model's parameters are.
        dtype: of the state.
        noise: replaces ``stream_noise``.
        attack: called before every step as attack(model, chain, k, samples, x, z), where z is the
            noise of the step (None if there is none); returns the state to go on from. See
            ``attacks.TrajectoryAttack``.
        trajectory: called as trajectory(timestep, samples, x) with the state before every step, and
            at the end with timestep -1; ``samples`` is the range of sample numbers.
        progress: called after every step as progress(done, total), in sample-steps.

    Returns:
        (num, *shape), on the CPU, so that a large set need not fit the device.

    Raises:
        UsageError: for an argument out of range, or a model whose output does not fit.

    Source: Ho et al. 2020, Algorithm 2; Song et al. 2021, Eq. 12; for ``data_noise`` Daras et al.
        2024, "Consistent Diffusion Meets Tweedie".
    """
    batch_size = batch_or_default(batch_size, shape)
    check_settings(schedule, num=num, batch_size=batch_size, first_index=first_index,
                   sampler=sampler, steps=steps, spacing=spacing, variance=variance, eta=eta,
                   stop=stop, data_noise=data_noise)
    chain = Respaced(schedule, timesteps(schedule, steps, spacing, stop))
    if device is None:
        tensors = model.parameters() if isinstance(model, torch.nn.Module) else ()
        device = next((p.device for p in tensors), "cpu")
    if noise is None:
        noise = stream_noise(seed, tuple(shape), device, dtype)
    needs_noise = sampler == "ddpm" or eta > 0
    last = chain.alphas_cumprod[-1].item()
    correction = 1 + data_noise**2 * last / (1 - last)
    visited = chain.timesteps.tolist()
    samples = torch.empty((num, *shape), dtype=dtype)
    done = 0
    with _evaluating(model):
        for start in range(0, num, batch_size):
            count = min(batch_size, num - start)
            numbers = range(first_index + start, first_index + start + count)
            x = noise(None, numbers).to(device, dtype)
            for k, timestep in enumerate(visited):
                if trajectory is not None:
                    trajectory(timestep, numbers, x)
                z = None
                if needs_noise and k < len(chain) - 1:
                    z = noise(timestep, numbers).to(device, dtype)
                if attack is not None:
                    x = attack(model, chain, k, numbers, x, z)
                t = torch.full((count,), timestep, device=device)
                eps = predict_noise(model, x, t).to(dtype)
                if data_noise and k == len(chain) - 1:
                    eps = eps * correction
                if sampler == "ddpm":
                    x = chain.ddpm_step(k, x, eps, z, variance, clip)
                else:
                    x = chain.ddim_step(k, x, eps, z, eta, clip)
                done += count
                if progress is not None:
                    progress(done, num * len(chain))
            if trajectory is not None:
                trajectory(-1, numbers, x)
            samples[start:start + count] = x.cpu()
    return samples


def batch_or_default(batch_size: int | None, shape: tuple[int, ...]) -> int:
    """How many samples to compute at once if nobody says: 128 of 3x32x32, few of large images, and
    many points, whose steps take the same time for one as for hundreds."""
    if batch_size is None:
        return max(16, min(2048, 3 * 2**17 // math.prod(shape)))
    return batch_size


@contextlib.contextmanager
def enough_memory(batch_size: int) -> Iterator[None]:
    """Sampling in batches; raises a RunError that names the remedy where memory runs out."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, RunError) or not is_out_of_memory(error):
            raise
        remedy = "use a larger machine" if batch_size == 1 else (
            f"try --batch-size {batch_size // 2}, which gives the same samples")
        raise RunError(f"out of memory at batch_size {batch_size}: {remedy}") from error


def check_settings(
    schedule: NoiseSchedule, *, num: int, batch_size: int, sampler: Sampler, steps: int | None,
    spacing: Spacing, variance: Variance, eta: float, first_index: int = 0, stop: float = 0.0,
    data_noise: float = 0.0,
) -> None:
    """What `sample` checks first, for those that have long work to do before.

    Raises:
        UsageError: for an argument out of range.
    """
    for name, value in (("num", num), ("batch_size", batch_size)):
        if value < 1:
            raise UsageError(f"{name} is {value}: it must be at least 1")
    if first_index < 0:
        raise UsageError(f"first_index is {first_index}: it must not be negative")
    _check_choice("sampler", sampler, Sampler)
    _check_choice("variance", variance, Variance)
    if not 0 <= eta <= 1:
        raise UsageError(f"eta is {eta}: it must be from 0 to 1")
    if eta and sampler == "ddpm":
        raise UsageError(f"eta is {eta}: ddpm has none; use sampler ddim, or drop eta")
    if not (math.isfinite(data_noise) and data_noise >= 0):
        raise UsageError(f"data_noise is {data_noise}: it must be a number from 0 up")
    timesteps(schedule, steps, spacing, stop)


@contextlib.contextmanager
def _evaluating(model) -> Iterator[None]:
    """Eval mode inside; afterwards every submodule has the mode it had."""
    modules = list(model.modules()) if isinstance(model, torch.nn.Module) else []
    modes = [module.training for module in modules]
    try:
        for module in modules:
            module.training = False
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode


def _check_choice(name: str, value: str, choices) -> None:
    if value not in choices.__args__:
        raise UsageError(f"{name} is {value!r}: choose one of {', '.join(choices.__args__)}")
