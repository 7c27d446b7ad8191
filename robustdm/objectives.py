"""The training objectives: plain DDPM, the equivariance loss and its controls.

One call computes one step's loss from a clean batch and a `Draw`, the record of every random number
of the step::

    x_t   = sqrt(abar_t) x_0 + s eps
    x_adv = x_t + s delta                                             (Briglia et al. 2026, Eq. 7)
    L     = mean |o - eps|^2 + lambda_t mean |o' - o - delta|^2       (Eq. 6)

with o = E(x_t, t), o' = E(x_adv, t). Equivariance of eps is invariance of the predicted data:
o' - o - delta = -(sqrt(abar_t) / s) (x0_hat' - x0_hat).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from robustdm import random
from robustdm.errors import UsageError
from robustdm.network import predict_noise
from robustdm.perturbation import Perturbation
from robustdm.random import Stream
from robustdm.schedule import NoiseSchedule, expand

OBJECTIVES = ("ddpm", "robust_adv", "robust_ran", "invariance", "outward_ran")


@dataclass(frozen=True)
class Draw:
    """Every random number of one training step, a pure function of (seed, step, sample index).

    Attributes:
        t: (B,) int64 timesteps.
        beta: (B,) float64 factor of the radius.
        radius: (B,) radius of the l-inf ball, eps-units, in the batch's dtype.
        seed, step, first_index: what the numbers were drawn from.
    """

    t: Tensor
    beta: Tensor
    radius: Tensor
    seed: int
    step: int
    first_index: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @cached_property
    def _noise(self) -> tuple[Tensor, Tensor]:
        index = random.element_index(self.first_index, self.shape, self.t.device)
        w0, w1, w2, _ = random.philox(self.seed, self.step, index, Stream.ELEMENT)
        # Half precision cannot hold a 23-bit uniform: `delta` is rounded once, when it is scaled.
        wide = torch.promote_types(self.dtype, torch.float32)
        return random.normal(w0, w1, self.dtype), random.signed_uniform(w2, wide)

    @property
    def eps(self) -> Tensor:
        """Standard normal noise, (B, ...)."""
        return self._noise[0]

    @cached_property
    def delta(self) -> Tensor:
        """The random start, uniform in the l-inf ball of radius r: (B, ...), eps-units."""
        unit = self._noise[1]
        return (unit * expand(self.radius, unit)).to(self.dtype)

    @cached_property
    def dropout_seed(self) -> int:
        """Seed of the generator that dropout draws from in the first pass of the step."""
        index = torch.tensor([self.first_index])
        high, low, _, _ = random.philox(self.seed, self.step, index, Stream.DROPOUT)
        return (int(high) >> 1) << 32 | int(low)


@dataclass(frozen=True)
class Loss:
    """What one step computed.

    Attributes:
        total: scalar, ``(fit + reg).mean()``; carries the gradient.
        fit: (B,) mean squared error of the noise prediction, per sample.
        reg: (B,) regulariser, lambda_t included, per sample; zeros for "ddpm".
        delta: (B, ...) the perturbation used, eps-units; None for "ddpm".
        xt: (B, ...) the diffused batch.
        x_adv: (B, ...) the perturbed batch x_t + s delta; None for "ddpm".
    """

    total: Tensor
    fit: Tensor
    reg: Tensor
    delta: Tensor | None
    xt: Tensor
    x_adv: Tensor | None


class Objective:
    """A training objective for a network that predicts noise.

    Args:
        name: "ddpm" (Ho et al. 2020, Eq. 14), "robust_adv" (Briglia et al. 2026, Eq. 6 with the
            one-step attack of Eq. 8), "robust_ran" (Eq. 6, random perturbation), "invariance"
            (Eq. 14: penalises |o' - o|^2 under the same attack), or "outward_ran" (a control: the
            random start pushed outwards by one step, without a network gradient).
        schedule: the noise schedule.
        perturbation: radius and weight; the paper's defaults if None.
        backend: "auto" or "torch".
        beta_per: draw the factor b once per "sample" or per "batch".
        detach_clean: stop the regulariser's gradient through the clean prediction.
        share_dropout: use one dropout mask for all forward passes of a step; independent masks
            add a penalty on the dropout noise itself. Either way the generator is seeded before
            each pass, so that a step's masks depend on the draw alone.
        lambda_max: upper bound of lambda_t; None is unbounded.
        attack: "output" maximises |E(x_t + s delta) - o|^2 (Eq. 8), "equivariance" the residual
            |E(x_t + s delta) - o - delta|^2 that the loss penalises.

    Raises:
        UsageError: for an unknown name or option.
    """

    def __init__(
        self,
        name: str,
        schedule: NoiseSchedule,
        perturbation: Perturbation | None = None,
        *,
        backend: str = "auto",
        beta_per: str = "sample",
        detach_clean: bool = False,
        share_dropout: bool = True,
        lambda_max: float | None = None,
        attack: str = "output",
    ):
        for field, value, choices in (
            ("objective", name, OBJECTIVES),
            ("backend", backend, ("auto", "torch")),
            ("beta_per", beta_per, ("sample", "batch")),
            ("attack", attack, ("output", "equivariance")),
        ):
            if value not in choices:
                raise UsageError(f"{field} is {value!r}: choose one of {', '.join(choices)}")
        if lambda_max is not None and not lambda_max >= 0:
            raise UsageError(f"lambda_max is {lambda_max}: give a number, 0 or more, or None")
        self.name = name
        self.schedule = schedule
        self.perturbation = perturbation or Perturbation()
        self.backend = backend
        self.beta_per = beta_per
        self.detach_clean = detach_clean
        self.share_dropout = share_dropout
        self.lambda_max = lambda_max
        self.attack = attack

    def draw(self, x0: Tensor, *, seed: int, step: int, first_index: int = 0) -> Draw:
        """Draw a step's random numbers.

        Args:
            x0: (B, ...) data of any floating dtype; only shape, dtype and device are used.
            seed: seed of the run, 0 to 2**32 - 1.
            step: number of the optimizer step, 0 to 2**32 - 1.
            first_index: place of the first sample in the step's whole batch, so that a batch in
                several pieces (accumulation, ranks) draws what one piece would.

        Raises:
            UsageError: if x0 is not a batch of floating-point numbers.
        """
        if x0.ndim < 1 or not x0.is_floating_point():
            raise UsageError(
                f"x0 is {x0.dtype} of shape {tuple(x0.shape)}: pass a floating-point batch (B, ...)"
            )
        index = torch.arange(first_index, first_index + len(x0), device=x0.device)
        w0, w1, _, _ = random.philox(seed, step, index, Stream.SAMPLE)
        t = (w0 * len(self.schedule)) >> 32
        if self.beta_per == "batch":
            one = torch.zeros(1, dtype=torch.int64, device=x0.device)
            w1 = random.philox(seed, step, one, Stream.BATCH)[1].expand(len(x0))
        low, high = self.perturbation.beta_range
        beta = low + (high - low) * random.uniform(w1, torch.float64)
        radius = self.perturbation.radius(self.schedule, t, beta)
        # The radius is rounded to the batch's dtype before any use: products with a number below
        # one then never round to outside the ball, whatever the precision.
        radius = radius.to(x0.dtype)
        return Draw(t, beta, radius, seed, step, first_index, tuple(x0.shape), x0.dtype)

    def __call__(self, model: Callable[[Tensor, Tensor], Tensor], x0: Tensor, draw: Draw) -> Loss:
        """Compute the loss of one step.

        Args:
            model: called as ``model(xt, t)`` with (B, ...) and (B,) int64; returns the predicted
                noise, shaped like xt, or what `predict_noise` makes that of.
            x0: (B, ...) data.
            draw: the step's random numbers, from `draw` on a batch of this shape.

        Raises:
            UsageError: if the draw or the model's output does not have x0's shape.
        """
        if draw.shape != tuple(x0.shape):
            raise UsageError(f"draw has shape {draw.shape}, x0 {tuple(x0.shape)}: draw from x0")
        t, eps = draw.t, draw.eps
        s = self.schedule.at("sqrt_one_minus_alphas_cumprod", t, x0)
        xt = self.schedule.q_sample(x0, t, eps)
        passes = itertools.count()

        def predict(x: Tensor) -> Tensor:
            number = next(passes)
            with seeded(draw.dropout_seed + (0 if self.share_dropout else number), x.device):
                return predict_noise(model, x, t)

        clean = predict(xt)
        fit = mean_flat((clean - eps) ** 2)
        if self.name == "ddpm":
            return Loss(fit.mean(), fit, torch.zeros_like(fit), None, xt, None)

        if self.name in ("robust_adv", "invariance"):
            with no_weight_gradients(model):
                delta = self._attack(predict, xt, s, clean.detach(), draw)
        elif self.name == "outward_ran":
            delta = project_step(draw.delta, draw.delta, draw.radius)
        else:
            delta = draw.delta
        x_adv = xt + s * delta
        anchor = clean.detach() if self.detach_clean else clean
        residual = predict(x_adv) - anchor
        if self.name != "invariance":
            residual = residual - delta
        lambda_t = self.perturbation.lambda_t(self.schedule, t, draw.beta)
        if self.lambda_max is not None:
            lambda_t = lambda_t.clamp(max=self.lambda_max)
        reg = lambda_t.to(fit.dtype) * mean_flat(residual**2)
        return Loss((fit + reg).mean(), fit, reg, delta, xt, x_adv)

    def _attack(
        self, predict: Callable[[Tensor], Tensor], xt: Tensor, s: Tensor, clean: Tensor, draw: Draw
    ) -> Tensor:
        """One projected sign-gradient step from the random start (Eq. 8)."""
        start = draw.delta.clone().requires_grad_()
        with torch.enable_grad():
            change = predict(xt + s * start) - clean
            if self.attack == "equivariance":
                change = change - start
            # Summed, not averaged: only the sign matters, and a mean could underflow in half.
            (gradient,) = torch.autograd.grad((change**2).sum(), start)
        return project_step(draw.delta, gradient, draw.radius)


def project_step(start: Tensor, direction: Tensor, radius: Tensor) -> Tensor:
    """Step from ``start`` by r / sqrt3 along a sign, and clamp to the ball.

    Args:
        start: (B, ...) perturbation, eps-units.
        direction: (B, ...) gradient; where it is zero nothing moves.
        radius: (B,) radius of the l-inf ball.

    Source: Briglia et al. 2026, Eq. 8.
    """
    r = expand(radius, start)
    moved = start + (r / math.sqrt(3)) * direction.sign()
    return torch.minimum(torch.maximum(moved, -r), r)


def mean_flat(x: Tensor) -> Tensor:
    """Mean over everything but the first dimension: (B, ...) -> (B,), at least in float32."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    # Not flatten(1), which would copy a channels-last tensor.
    return x.mean(tuple(range(1, x.ndim))) if x.ndim > 1 else x


@contextmanager
def no_weight_gradients(model) -> Iterator[None]:
    """Treat the parameters of a module as constants, so that a backward pass computes none of
    their gradients even if the module is compiled (autograd alone prunes them only in eager)."""
    parameters = model.parameters() if isinstance(model, nn.Module) else ()
    weights = [p for p in parameters if p.requires_grad]
    for p in weights:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in weights:
            p.requires_grad_(True)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Run a pass whose dropout masks ``seed`` decides, and leave the user's generators alone."""
    gpu = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpu):
        # Not torch.manual_seed: it formats a traceback for every kind of absent device. Nor
        # torch.cuda.manual_seed: it seeds the current GPU, which need not be the batch's.
        torch.default_generator.manual_seed(seed)
        for each in gpu:
            torch.cuda.default_generators[each.index].manual_seed(seed)
        yield
