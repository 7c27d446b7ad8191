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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustdm import ops, random, reference
from robustdm.device import to_device
from robustdm.dropout import masks_from
from robustdm.errors import UsageError
from robustdm.network import predict_noise
from robustdm.perturbation import Perturbation
from robustdm.random import Stream
from robustdm.resident import ResidentBatch
from robustdm.schedule import NoiseSchedule, expand

OBJECTIVES = ("ddpm", "robust_adv", "robust_ran", "invariance", "outward_ran")


@dataclass(frozen=True)
class Draw:
    """Every random number of one training step, a pure function of (seed, step, sample index).

    The noise itself is not stored: `eps` and `delta` make it when asked, as the fused ops do.

    Attributes:
        t: (B,) int64 timesteps.
        beta: (B,) float64 factor of the radius.
        signal, noise: (B,) sqrt(abar_t) and sqrt(1 - abar_t), in float32 at least.
        radius: (B,) radius of the l-inf ball, eps-units, as wide; its values are rounded to the
            batch's dtype, so that perturbations stay in the ball whatever the precision.
        lambda_t: (B,) weight of the regulariser, as wide; that of the objective that drew.
        key: (3,) int64 on the device: seed, step, first_index.
        seed, step, first_index: what the numbers were drawn from.
        shape, dtype: of the batch.
    """

    t: Tensor
    beta: Tensor
    signal: Tensor
    noise: Tensor
    radius: Tensor
    lambda_t: Tensor
    key: Tensor
    seed: int
    step: int
    first_index: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def eps(self) -> Tensor:
        """Standard normal noise, (B, ...)."""
        return random.element_noise(self.key, self.shape, self.radius.dtype)[0].to(self.dtype)

    @property
    def delta(self) -> Tensor:
        """The random start, uniform in the l-inf ball of radius r: (B, ...), eps-units."""
        # Half precision cannot hold a 23-bit uniform: rounded once, when it is scaled.
        unit = random.element_noise(self.key, self.shape, self.radius.dtype)[1]
        return (unit * expand(self.radius, unit)).to(self.dtype)

    @property
    def dropout_seed(self) -> int:
        """Seed of the generator that dropout draws from in the first pass of the step."""
        high, low, _, _ = random.philox_int(
            self.seed, self.step, self.first_index, Stream.DROPOUT
        )
        return (high >> 1) << 32 | low


@dataclass(frozen=True)
class Loss:
    """What one step computed.

    Attributes:
        total: scalar, ``(fit + reg).mean()``; it alone carries a gradient.
        fit: (B,) mean squared error of the noise prediction, per sample.
        reg: (B,) regulariser, lambda_t included, per sample; zeros for "ddpm".
        xt: (B, ...) the diffused batch.
        x_adv: (B, ...) the perturbed batch x_t + s delta; None for "ddpm".
        draw: the random numbers it was computed from.
    """

    total: Tensor
    fit: Tensor
    reg: Tensor
    xt: Tensor
    x_adv: Tensor | None
    draw: Draw
    _delta: Tensor | None = None

    @property
    def delta(self) -> Tensor | None:
        """(B, ...) the perturbation used, eps-units; None for "ddpm"."""
        if self.x_adv is None:
            return None
        return self.draw.delta if self._delta is None else self._delta


class Objective:
    """A training objective for a network that predicts noise.

    Args:
        name: "ddpm" (Ho et al. 2020, Eq. 14), "robust_adv" (Briglia et al. 2026, Eq. 6 with the
            one-step attack of Eq. 8), "robust_ran" (Eq. 6, random perturbation), "invariance"
            (Eq. 14: penalises |o' - o|^2 under the same attack), or "outward_ran" (a control: the
            random start pushed outwards by one step, without a network gradient).
        schedule: the noise schedule.
        perturbation: radius and weight; the paper's defaults if None.
        backend: what runs the fused ops: "auto", "torch", "cpp" or "triton"; see `robustdm.ops`.
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
            ("backend", backend, ops.BACKENDS),
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
        self._tables: dict[torch.device, Tensor] = {}

    def draw(
        self, x0: Tensor | ResidentBatch, *, seed: int, step: int, first_index: int = 0,
        t: Tensor | None = None,
    ) -> Draw:
        """Draw a step's random numbers.

        Args:
            x0: (B, ...) data of any floating dtype; only shape, dtype and device are used.
            seed: seed of the run, 0 to 2**32 - 1.
            step: number of the optimizer step, 0 to 2**32 - 1.
            first_index: place of the first sample in the step's whole batch, so that a batch in
                several pieces (accumulation, ranks) draws what one piece would.
            t: (B,) int64 timesteps that replace the drawn ones.

        Raises:
            UsageError: if x0 is not a batch of floating-point numbers.
        """
        shape, dtype = tuple(x0.shape), x0.dtype
        if not shape or not dtype.is_floating_point:
            raise UsageError(
                f"x0 is {dtype} of shape {shape}: pass a floating-point batch (B, ...), or a "
                "ResidentBatch of uint8 images"
            )
        random.check_word("seed", seed)
        random.check_word("step", step)
        key = to_device(torch.tensor([seed, step, first_index]), x0.device)
        tables, pert = self._device_tables(x0.device), self.perturbation
        fixed = (pert.gamma, pert.lam, pert.lambda_mode)
        drawn, beta, *scales = ops.draw_samples(
            key, tables, shape[0], dtype, *fixed, *pert.beta_range, self.lambda_max,
            self.beta_per == "batch", self.backend,
        )
        if t is not None:
            if t.shape != shape[:1] or t.dtype != torch.int64 or (
                t.device.type == "cpu" and len(t) and not 0 <= t.min() <= t.max() < tables.shape[1]
            ):
                raise UsageError(f"t is {t.dtype} of shape {tuple(t.shape)}: give one timestep per "
                                 f"sample, int64 from 0 to {tables.shape[1] - 1}")
            scales = reference.scales(tables, t, beta, dtype, *fixed, self.lambda_max)
        t = drawn if t is None else t
        return Draw(t, beta, *scales, key, seed, step, first_index, shape, dtype)

    def _device_tables(self, device: torch.device) -> Tensor:
        """(3, T) float64: sqrt(abar), s and s**(omega - 1), copied to a device once."""
        if device not in self._tables:
            s = self.schedule.sqrt_one_minus_alphas_cumprod
            rows = (self.schedule.sqrt_alphas_cumprod, s, s ** (self.perturbation.omega - 1))
            self._tables[device] = torch.stack(rows).to(device)
        return self._tables[device]

    def __call__(
        self, model: Callable[[Tensor, Tensor], Tensor], x0: Tensor | ResidentBatch, draw: Draw
    ) -> Loss:
        """Compute the loss of one step.

        Args:
            model: called as ``model(xt, t)`` with (B, ...) and (B,) int64; returns the predicted
                noise, shaped like xt, or what `predict_noise` makes that of.
            x0: (B, ...) data.
            draw: the step's random numbers, from `draw` on a batch of this shape.

        Raises:
            UsageError: if the draw or the model's output does not have x0's shape.
        """
        if draw.shape != tuple(x0.shape) or draw.dtype != x0.dtype:
            raise UsageError(f"draw has shape {draw.shape} and is {draw.dtype}, x0 "
                             f"{tuple(x0.shape)} and {x0.dtype}: draw from x0")
        xt, x_ran = self._perturb(x0, draw)
        passes = itertools.count()

        def predict(x: Tensor) -> Tensor:
            number = next(passes)
            number = 0 if self.share_dropout else number
            with seeded(draw.dropout_seed + number, x.device), masks_from(draw.key, number):
                return predict_noise(model, x, draw.t)

        clean = predict(xt)
        if self.name == "ddpm":
            return self._loss(clean, None, None, xt, None, draw)
        delta, x_adv = None, x_ran
        if self.name in ("robust_adv", "invariance"):
            with no_weight_gradients(model):
                gradient = self._attack(predict, xt, x_ran, clean.detach(), draw)
            x_adv, delta = self._project(xt, gradient, draw)
        elif self.name == "outward_ran":
            x_adv, delta = self._project(xt, None, draw)
        return self._loss(clean, predict(x_adv), delta, xt, x_adv, draw)

    def _perturb(self, x0: Tensor | ResidentBatch, draw: Draw) -> tuple[Tensor, Tensor]:
        """x_t and the random start x_t + s delta_ran (Eq. 7)."""
        scales = draw.signal, draw.noise, draw.radius, draw.key
        if isinstance(x0, Tensor):
            return ops.noise_perturb(x0, *scales, backend=self.backend)
        return ops.noise_perturb_resident(
            x0.data, x0.items, *scales, dtype=x0.dtype, flip=x0.flip,
            corrupt_fraction=x0.corrupt_fraction, corrupt_sigma=x0.corrupt_sigma,
            corrupt_seed=x0.corrupt_seed, backend=self.backend,
        )

    def _attack(
        self, predict: Callable[[Tensor], Tensor], xt: Tensor, x_ran: Tensor, clean: Tensor,
        draw: Draw,
    ) -> Tensor:
        """Gradient, up to a positive factor, of the attacked distance at the random start."""
        x = x_ran.detach().requires_grad_()
        with torch.enable_grad():
            out = predict(x)
            change = (out - clean).detach()
            if self.attack == "equivariance":
                # A projection by a gradient of zero is the random start itself.
                change = change - self._project(xt, torch.zeros_like(xt), draw)[1]
            (gradient,) = torch.autograd.grad(out, x, change.to(out.dtype))
        if self.attack == "equivariance":  # delta also stands in the residual itself
            gradient = expand(draw.noise, gradient) * gradient - change
        return gradient

    def _project(
        self, xt: Tensor, gradient: Tensor | None, draw: Draw
    ) -> tuple[Tensor, Tensor]:
        """The projected sign-gradient step (Eq. 8)."""
        return ops.fgsm_project(
            xt, gradient, draw.noise, draw.radius, draw.key, backend=self.backend
        )

    def _loss(
        self, clean: Tensor, adv: Tensor | None, delta: Tensor | None, xt: Tensor,
        x_adv: Tensor | None, draw: Draw,
    ) -> Loss:
        total, fit, reg = ops.equivariance_loss(
            clean, adv, delta, draw.radius, draw.lambda_t, draw.key, dtype=draw.dtype,
            invariance=self.name == "invariance", detach_clean=self.detach_clean,
            backend=self.backend,
        )
        return Loss(total, fit, reg, xt, x_adv, draw, delta)


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
