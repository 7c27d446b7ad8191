"""Cases of the ops that work on images one element at a time: the draws, noise, projection, loss.

The eager code is what one would write without this package: `torch.randn` and `torch.rand` where
the op draws from its own stream. Where such code would rather keep the noise in memory from an
earlier op, that is timed too, as "eager stored": it saves the drawing and reads more.
"""

from __future__ import annotations

from functools import cache, partial

import torch
from case import (
    OTHERS,
    OURS,
    Case,
    Setup,
    against,
    both,
    case_name,
    eager_and_compiled,
    looks_like,
    our_backends,
)
from torch import Tensor

from robustdm import ops
from robustdm.ops import reference, stream

SIZES = ((128, 3, 32, 32), (64, 3, 64, 64), (32, 3, 256, 256))
TINY = ((4, 3, 8, 8),)
DTYPES = (torch.float32, torch.bfloat16)
# gamma, lam, lambda_mode, beta_low, beta_high, lambda_max, beta_per_batch


def cases(device: torch.device, tiny: bool = False) -> list[Case]:
    """All cases; for a CPU, the larger batches in float32 and with the full loss alone."""
    found = []
    for shape in TINY if tiny else SIZES:
        small = shape[-1] <= 32
        for dtype in DTYPES:
            if device.type == "cpu":
                target = small and dtype == torch.float32
                if not small and dtype != torch.float32:
                    continue
            else:
                target = shape[-1] in (32, 256)
            for op in (_perturb, _project):
                found.append(op(shape, dtype, 0 if target else 1))
            found.append(_loss(shape, dtype, 0 if target else 1, "robust"))
            if small or device.type == "cuda":
                found += [_loss(shape, dtype, 1, variant) for variant in ("ran", "ddpm")]
    return found


# What all cases start from.


def make_batch(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> dict:
    """A batch as a training step has it: images, predictions, per-sample numbers, key."""
    torch.manual_seed(0)
    batch = shape[0]
    noise = torch.linspace(0.05, 0.99, batch, device=device)
    # What is usual there; on a CPU torch.randn is 6 times slower into channels-last memory.
    layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    images = {
        name: torch.randn(shape, device=device).to(dtype).contiguous(memory_format=layout)
        for name in ("x0", "xt", "gradient", "pred", "pred_adv")
    }
    radius = (noise + 0.03 / noise).to(dtype).float()
    return {
        **images, "noise": noise, "signal": (1 - noise**2).sqrt(), "radius": radius,
        "lambda_t": 0.3 / radius, "key": torch.tensor([1, 2, 0], device=device),
    }


def spread_out(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def stored_noise(batch: dict, shape, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """eps and delta_ran that our ops draw, to feed them to other code."""
    eps, unit = stream.element_noise(batch["key"], shape)
    return tuple(torch.empty_like(batch["x0"]).copy_(v)
                 for v in (eps, spread_out(batch["radius"]) * unit))


def draw_delta(like: Tensor, radius: Tensor) -> Tensor:
    return (2 * torch.rand_like(like) - 1) * spread_out(radius).to(like.dtype)


def moved(count: int, dtype: torch.dtype, shape: tuple[int, ...], extra: int = 0) -> int:
    elements = torch.Size(shape).numel()
    return elements * (count * dtype.itemsize + extra)


# noise_perturb


def _eager_perturb(x0, signal, noise, eps, delta):
    signal, noise = (spread_out(v).to(x0.dtype) for v in (signal, noise))
    xt = signal * x0 + noise * eps
    return xt, xt + noise * delta


def _eager_drawn_perturb(x0, signal, noise, radius, key):
    return _eager_perturb(x0, signal, noise, torch.randn_like(x0), draw_delta(x0, radius))


def _perturb(shape, dtype, priority) -> Case:
    def build(device: torch.device) -> Setup:
        b = make_batch(shape, dtype, device)
        scales = b["signal"], b["noise"], b["radius"]

        @cache  # one reference for all providers
        def expected():
            wide = (v.double() for v in (b["x0"], *scales))
            return reference.noise_perturb(*wide, b["key"], torch.float64)

        def same_noise(inputs, got):
            noise = stored_noise(b, shape, dtype)
            fed = _eager_perturb(b["x0"], b["signal"], b["noise"], *noise)
            return against(expected, OTHERS[dtype])(inputs, fed)

        ours, off = our_backends(
            "noise_perturb", device, lambda name: partial(ops.noise_perturb, backend=name),
            against(expected, OURS[dtype]),
        )
        drawn = eager_and_compiled(_eager_drawn_perturb, both(same_noise, looks_like(expected)))
        return Setup((b["x0"], *scales, b["key"]), [*drawn, *ours], off)

    return Case(
        "noise_perturb", case_name("noise_perturb", "", shape, dtype), moved(3, dtype, shape),
        f"read x0, write x_t and x_ran: 3 x {dtype.itemsize} B an element", dtype, build, priority,
    )


# fgsm_project


def _eager_stored_project(xt, gradient, noise, radius, delta):
    radius, noise = (spread_out(v).to(xt.dtype) for v in (radius, noise))
    delta = delta + radius * 3**-0.5 * gradient.sign()
    delta = torch.minimum(torch.maximum(delta, -radius), radius)
    return xt + noise * delta, delta


def _project(shape, dtype, priority) -> Case:
    def eager(xt, gradient, noise, radius, key, stored):
        return _eager_stored_project(xt, gradient, noise, radius, draw_delta(xt, radius))

    def build(device: torch.device) -> Setup:
        b = make_batch(shape, dtype, device)
        inputs = tuple(b[name] for name in ("xt", "gradient", "noise", "radius", "key"))
        _, delta_ran = stored_noise(b, shape, dtype)

        @cache
        def expected():
            return reference.fgsm_project(*(v.double() for v in inputs[:4]), b["key"])

        def stored(xt, gradient, noise, radius, key, delta_ran):
            return _eager_stored_project(xt, gradient, noise, radius, delta_ran)

        ours, off = our_backends(
            "fgsm_project", device,
            lambda name: lambda *given: ops.fgsm_project(*given[:5], backend=name),
            against(expected, OURS[dtype]),
        )
        providers = [
            *eager_and_compiled(eager, looks_like(expected)), *ours,
            *eager_and_compiled(stored, against(expected, OTHERS[dtype]), suffix=" stored"),
        ]
        return Setup((*inputs, delta_ran), providers, off)

    return Case(
        "fgsm_project", case_name("fgsm_project", "", shape, dtype), moved(4, dtype, shape),
        f"read x_t and gradient, write x_adv and delta: 4 x {dtype.itemsize} B an element", dtype,
        build, priority,
    )


# equivariance_loss


def _eager_loss(pred, pred_adv, delta, eps, lambda_t):
    fit = (pred - eps).float().square().mean((1, 2, 3))
    if pred_adv is None:
        return fit.mean(), fit, torch.zeros_like(fit)
    reg = lambda_t * (pred_adv - pred - delta).float().square().mean((1, 2, 3))
    return (fit + reg).mean(), fit, reg


def with_gradients(function):
    """The loss and its gradients with respect to the predictions."""

    def call(pred, pred_adv, *rest):
        with torch.enable_grad():
            out = function(pred, pred_adv, *rest)
            leaves = [p for p in (pred, pred_adv) if p is not None]
            return *out, *torch.autograd.grad(out[0], leaves)

    return call


def _loss(shape, dtype, priority, variant) -> Case:
    read, write = {"robust": (3, 2), "ran": (2, 2), "ddpm": (1, 1)}[variant]

    def eager(pred, pred_adv, delta, radius, lambda_t, key, *stored):
        if variant == "ran":
            delta = draw_delta(pred, radius)
        return _eager_loss(pred, pred_adv, delta, torch.randn_like(pred), lambda_t)

    def build(device: torch.device) -> Setup:
        b = make_batch(shape, dtype, device)
        pred = b["pred"].requires_grad_()
        adv = None if variant == "ddpm" else b["pred_adv"].requires_grad_()
        eps, delta_ran = stored_noise(b, shape, dtype)
        delta = delta_ran.clone() if variant == "robust" else None
        inputs = pred, adv, delta, b["radius"], b["lambda_t"], b["key"]
        noise = eps, delta_ran  # inputs too, so that they rotate through the cache like the others

        def wide(v):
            return None if v is None else v.detach().double()

        @cache
        def expected():
            *loss, grad, grad_adv = reference.equivariance_loss(
                *map(wide, inputs[:5]), b["key"], dtype, False, False)
            return (*loss, grad, *(() if adv is None else (grad_adv,)))

        def stored(pred, pred_adv, delta, radius, lambda_t, key, eps, delta_ran):
            return _eager_loss(pred, pred_adv, delta_ran, eps, lambda_t)

        def call(name):
            return with_gradients(
                lambda *given: ops.equivariance_loss(*given[:6], backend=name))

        right = against(expected, OURS[dtype])
        ours, off = our_backends("equivariance_loss", device, call, right)
        # The op's one launch, without autograd's multiplication by the gradient from above.
        alone, _ = our_backends(
            "equivariance_loss", device, lambda name: _alone(name, dtype), right, " alone")
        providers = [
            *eager_and_compiled(eager, looks_like(expected), with_gradients), *ours,
            *(p for p in alone if not p.name.startswith("torch")),
            *eager_and_compiled(stored, against(expected, OTHERS[dtype]), with_gradients,
                                suffix=" stored"),
        ]
        return Setup((*inputs, *noise), providers, off)

    return Case(
        "equivariance_loss", case_name("equivariance_loss", variant, shape, dtype),
        moved(read + write, dtype, shape),
        f"read {read}, write {write} (gradients): {read + write} x {dtype.itemsize} B an element",
        dtype, build, priority,
    )


def _alone(backend: str, dtype: torch.dtype):
    def call(pred, pred_adv, delta, radius, lambda_t, key, *stored):
        out = torch.ops.robustdm.equivariance_loss(
            pred.detach(), None if pred_adv is None else pred_adv.detach(), delta, radius,
            lambda_t, key, dtype, False, False, backend,
        )
        return out[: 4 if pred_adv is None else 5]

    return call
