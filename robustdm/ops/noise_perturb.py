"""Diffusion and random perturbation of a batch, in one launch."""

from types import ModuleType

import torch
from torch import Tensor

from robustdm.ops import reference
from robustdm.ops.checks import (
    as_vector,
    check_dtype,
    check_float,
    check_key,
    check_per_sample,
    check_values,
    dense_format,
    like_input,
    refuse,
)
from robustdm.ops.dispatch import choose, eager, implementation, registered


def _kernels() -> ModuleType:
    from robustdm.kernels import noise_perturb

    return noise_perturb


def _run_noise_perturb(
    x0: Tensor, signal: Tensor, noise: Tensor, radius: Tensor, key: Tensor, dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor]:
    check_values("noise_perturb", radius)
    module = implementation("noise_perturb", _kernels, backend, x0.device, dtype)
    xt, x_ran = module.noise_perturb(x0, signal, noise, radius, key, dtype)
    if module is reference:
        return like_input(xt, x0), like_input(x_ran, x0)
    return xt, x_ran


_noise_perturb = registered(_run_noise_perturb)


@_noise_perturb.register_fake
def _(x0, signal, noise, radius, key, dtype, backend):
    return torch.empty_like(x0, dtype=dtype), torch.empty_like(x0, dtype=dtype)


def _noise_perturb_setup(ctx, inputs, output):
    x0, signal = inputs[0], inputs[1]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(signal)
    ctx.shape, ctx.dtype = x0.shape, x0.dtype


def _noise_perturb_backward(ctx, grad_xt, grad_x_ran):
    (signal,) = ctx.saved_tensors
    parts = [grad for grad in (grad_xt, grad_x_ran) if grad is not None]
    if not parts:
        return (None,) * 7
    grad = (signal.view(-1, *[1] * (len(ctx.shape) - 1)) * sum(parts)).to(ctx.dtype)
    return grad, None, None, None, None, None, None


_noise_perturb.register_autograd(_noise_perturb_backward, setup_context=_noise_perturb_setup)
_eager_noise_perturb = eager(_run_noise_perturb, _noise_perturb_setup, _noise_perturb_backward)


def noise_perturb(
    x0: Tensor, signal: Tensor, noise: Tensor, radius: Tensor, key: Tensor, *,
    dtype: torch.dtype | None = None, backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Diffuse a batch, and perturb it at random: x_t and x_t + s delta_ran, in one launch.

    eps and delta_ran come from the random stream and are never stored: other ops, and
    `robustdm.ops.stream.element_noise`, draw the same numbers again from the same ``key``.

    Args:
        x0: (B, ...) float, data units.
        signal, noise: (B,) sqrt(abar_t) and sqrt(1 - abar_t).
        radius: (B,) radius of the l-inf ball, eps-units, 0 or more.
        key: (3,) int64 on x0's device: seed, step, global index of the first sample.
        dtype: of both results; x0's if None.
        backend: "auto", "torch", "cpp" or "triton".

    Returns:
        x_t and x_ran, (B, ...) in x0's memory format.

    Raises:
        UsageError: for wrong shapes, dtypes, devices or values, or a backend that is off.

    Source: Briglia et al. 2026, Eq. 7 and Algorithm 1.
    """
    op = "noise_perturb"
    if not x0.ndim:
        refuse(op, "x0 has no dimension: give a batch (B, ...)")
    check_float(op, "x0", x0)
    check_per_sample(op, "x0", x0, signal=signal, noise=noise, radius=radius)
    check_key(op, "x0", x0, key)
    dtype = dtype or x0.dtype
    check_dtype(op, dtype)
    x0 = x0.contiguous(memory_format=dense_format(x0) or torch.contiguous_format)
    run = choose(x0, _noise_perturb, _eager_noise_perturb)
    return run(x0, as_vector(signal, dtype), as_vector(noise, dtype), as_vector(radius, dtype), key,
               dtype, backend)
