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

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustdm import ops
from robustdm.device import to_device
from robustdm.errors import UsageError
from robustdm.method.draws import Draw, draw_samples, dropout_seed, scales_of
from robustdm.method.perturbation import Perturbation
from robustdm.method.predict import predict_noise
from robustdm.method.schedule import NoiseSchedule, expand
from robustdm.ops import stream
from robustdm.ops.dropout import masks_from

ATTACKING = ("robust_adv", "invariance")
OBJECTIVES = ("ddpm", "robust_adv", "robust_ran", "invariance", "outward_ran")


@dataclass(frozen=True)
class Loss:
    """What one step computed.

    Attributes:
        total: scalar, ``(fit + reg).mean()``; it alone carries a gradient.
        fit: (B,) mean squared error of the noise prediction, per sample.
        reg: (B,) regulariser with all its factors, per sample; zeros where there is none.
        xt: (B, ...) the diffused batch.
        x_adv: (R, ...) the perturbed samples x_t + s delta: the first R of the batch, all B of them
            unless ``reg_fraction`` says otherwise; None without the regulariser.
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
        """(R, ...) the perturbation used, eps-units; None without the regulariser."""
        if self.x_adv is None:
            return None
        draw = self.draw.part(0, len(self.x_adv))
        return draw.delta if self._delta is None else self._delta


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
        reg_fraction: share q of the batch that gets the regulariser, with weight 1/q: the first
            samples, at least one. Their gradient is unbiased, and noisier: a batch is a random
            sample already, so that no second choice is needed.
        reg_every: the regulariser acts in every k-th step only, with weight k.
        reg_from: first step that has the regulariser (adversarial fine-tuning).
        attack_fraction: share of the regularised samples whose perturbation is attacked; the
            others keep their random start. The last four are approximations, for less work.

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
        reg_fraction: float = 1.0,
        reg_every: int = 1,
        reg_from: int = 0,
        attack_fraction: float = 1.0,
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
        for field, value in (("reg_fraction", reg_fraction), ("attack_fraction", attack_fraction)):
            if not 0 < value <= 1:
                raise UsageError(f"{field} is {value}: it is a share, above 0 and up to 1")
        if reg_every < 1 or reg_from < 0:
            raise UsageError(f"reg_every is {reg_every}, reg_from {reg_from}: give a number of "
                             "steps, at least 1, and the number of a step, 0 or more")
        self.name = name
        self.schedule = schedule
        self.perturbation = perturbation or Perturbation()
        self.backend = backend
        self.beta_per = beta_per
        self.detach_clean = detach_clean
        self.share_dropout = share_dropout
        self.lambda_max = lambda_max
        self.attack = attack
        self.reg_fraction = reg_fraction
        self.reg_every = reg_every
        self.reg_from = reg_from
        self.attack_fraction = attack_fraction
        self._tables: dict[torch.device, Tensor] = {}
        self._leaves: dict[torch.device, Tensor] = {}

    def regularises(self, step: int) -> bool:
        """Whether step number ``step`` has the regulariser."""
        return self.name != "ddpm" and step >= self.reg_from and step % self.reg_every == 0

    def units(self, step: int | None = None) -> float:
        """Work of step number ``step`` in units of a forward pass; None averages over the steps
        from ``reg_from`` on.

        Gradients of activations cost a unit, of weights another: plain DDPM takes 3, an exact
        adversarial step 3 more and 2 for the attack.
        """
        if self.name == "ddpm" or (step is not None and not self.regularises(step)):
            return 3.0
        every = self.reg_every if step is None else 1
        attack = 2.0 * self.attack_fraction if self.name in ATTACKING else 0.0
        return 3.0 + self.reg_fraction * (3.0 + attack) / every

    def draw(
        self, x0: Tensor, *, seed: int, step: int, first_index: int = 0,
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
        for name, value in (("seed", seed), ("step", step)):
            stream.check_word(name, value)
        key = to_device(torch.tensor([seed, step, first_index]), x0.device)
        return self.draw_from(
            x0, key, t=t, regularised=self.regularises(step),
            dropout_seed=dropout_seed(seed, step, first_index),
        )

    def draw_from(
        self, x0: Tensor, key: Tensor, *, t: Tensor | None = None,
        regularised: bool = True, dropout_seed: int | None = None,
    ) -> Draw:
        """`draw` from a key that lies on the device: nothing of the step's number is baked into a
        compiled step, or a CUDA graph, that calls it.

        Args:
            key: (3,) int64 on x0's device: seed, step, global index of the first sample.
            regularised: what `regularises` says of the step.
            dropout_seed: as in `Draw`.
            others: as in `draw`.
        """
        shape, dtype = tuple(x0.shape), x0.dtype
        if not shape or not dtype.is_floating_point:
            raise UsageError(
                f"x0 is {dtype} of shape {shape}: pass a floating-point batch (B, ...)"
            )
        tables, pert = self._device_tables(x0.device), self.perturbation
        fixed = (pert.gamma, pert.lam, pert.lambda_mode)
        drawn, beta, *scales = draw_samples(
            key, tables, shape[0], dtype, *fixed, *pert.beta_range, self.lambda_max,
            self.beta_per == "batch",
        )
        if t is not None:
            if t.shape != shape[:1] or t.dtype != torch.int64 or (
                t.device.type == "cpu" and len(t) and not 0 <= t.min() <= t.max() < tables.shape[1]
            ):
                raise UsageError(f"t is {t.dtype} of shape {tuple(t.shape)}: give one timestep per "
                                 f"sample, int64 from 0 to {tables.shape[1] - 1}")
            scales = scales_of(tables, t, beta, dtype, *fixed, self.lambda_max)
        t = drawn if t is None else t
        return Draw(t, beta, *scales, key, shape, dtype, regularised, dropout_seed)

    def prepare(self, device: torch.device) -> None:
        """Put on a device what a compiled step needs there: nothing can be copied within it."""
        self._device_tables(device)
        self._leaves[device] = torch.zeros((), device=device, requires_grad=True)

    def _device_tables(self, device: torch.device) -> Tensor:
        """(3, T) float64: sqrt(abar), s and s**(omega - 1), copied to a device once."""
        if device not in self._tables:
            s = self.schedule.sqrt_one_minus_alphas_cumprod
            rows = (self.schedule.sqrt_alphas_cumprod, s, s ** (self.perturbation.omega - 1))
            self._tables[device] = torch.stack(rows).to(device)
        return self._tables[device]

    def __call__(
        self, model: Callable[[Tensor, Tensor], Tensor], x0: Tensor, draw: Draw
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
        clean = self._predict(model, xt, draw, 0)
        if self.name == "ddpm" or not draw.regularised:
            return Loss(*self._loss(clean, None, None, draw), xt, None, draw)
        size = len(xt)
        count = share(self.reg_fraction, size)
        part, delta, x_adv = draw.part(0, count), None, first(x_ran, count)
        if self.name in ATTACKING:
            attacked = share(self.attack_fraction, count)
            with no_weight_gradients(model):
                gradient = self._attack(
                    model, *(first(x, attacked) for x in (xt, x_ran, clean.detach())),
                    draw.part(0, attacked),
                )
            if attacked < count:  # a projection by a gradient of zero is the random start itself
                gradient = torch.cat([gradient, torch.zeros_like(gradient[:1]).expand(
                    count - attacked, *gradient.shape[1:])])
            x_adv, delta = self._project(first(xt, count), gradient, part)
        elif self.name == "outward_ran":
            x_adv, delta = self._project(first(xt, count), None, part)
        adv = self._predict(model, x_adv, part, 2 if self.name in ATTACKING else 1)
        weight = self.reg_every * size / count
        total, fit, reg = self._loss(first(clean, count), adv, delta, part, weight)
        if count < size:
            rest = self._loss(clean[count:], None, None, draw.part(count, size))
            total = (count / size) * total + (1 - count / size) * rest[0]
            fit, reg = torch.cat([fit, rest[1]]), torch.cat([reg, rest[2]])
        return Loss(total, fit, reg, xt, x_adv, draw, delta)

    def _predict(self, model: Callable, x: Tensor, draw: Draw, number: int) -> Tensor:
        """Pass ``number`` of a step, counted from 0."""
        number, seed = 0 if self.share_dropout else number, draw.dropout_seed
        # A generator cannot be seeded within a trace.
        alone = seed is None or torch.compiler.is_compiling()
        with nullcontext() if alone else seeded(seed + number, x.device), (
            masks_from(draw.key, number)
        ):
            return predict_noise(model, x, draw.t)

    def _perturb(self, x0: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        """x_t and the random start x_t + s delta_ran (Eq. 7)."""
        return ops.noise_perturb(
            x0, draw.signal, draw.noise, draw.radius, draw.key, backend=self.backend
        )

    def _attack(
        self, model: Callable, xt: Tensor, x_ran: Tensor, clean: Tensor, draw: Draw
    ) -> Tensor:
        """Gradient, up to a positive factor, of the attacked distance at the random start."""
        x, leaf = x_ran.detach(), self._leaves.get(x_ran.device)
        if torch.compiler.is_compiling() and leaf is not None:
            # Torch 2.11 traces no requires_grad_() of what was computed in the same trace.
            x = x + leaf.to(x.dtype)
        else:
            x.requires_grad_()
        with torch.enable_grad():
            out = self._predict(model, x, draw, 1)
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
        self, clean: Tensor, adv: Tensor | None, delta: Tensor | None, draw: Draw,
        weight: float = 1.0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        lambda_t = draw.lambda_t if weight == 1 else weight * draw.lambda_t
        return ops.equivariance_loss(
            clean, adv, delta, draw.radius, lambda_t, draw.key, dtype=draw.dtype,
            invariance=self.name == "invariance", detach_clean=self.detach_clean,
            backend=self.backend,
        )


def first(x: Tensor, count: int) -> Tensor:
    """``x[:count]``, without the work that the gradient of a slice takes where it is all of x."""
    return x if count == len(x) else x[:count]


def share(fraction: float, size: int) -> int:
    """How many of ``size`` samples a fraction of them is: at least one."""
    return min(size, max(1, round(fraction * size)))


@contextmanager
def no_weight_gradients(model) -> Iterator[None]:
    """Treat the parameters of a module as constants, so that a backward pass computes none of
    their gradients even if the module is compiled (autograd alone prunes them only in eager).

    Where the whole step is compiled there is nothing to do: its trace holds what is used."""
    if torch.compiler.is_compiling():
        yield
        return
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
