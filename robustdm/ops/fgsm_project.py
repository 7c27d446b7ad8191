"""The one-step attack: random start, sign step, projection into the ball."""

from types import ModuleType

import torch
from torch import Tensor

from robustdm.ops import reference
from robustdm.ops.checks import (
    as_vector,
    check_float,
    check_key,
    check_like,
    check_per_sample,
    check_values,
    dense,
    like_input,
    refuse,
)
from robustdm.ops.dispatch import choose, eager, implementation, registered


def _kernels() -> ModuleType:
    from robustdm.kernels import fgsm_project

    return fgsm_project


def _run_fgsm_project(
    xt: Tensor, gradient: Tensor | None, noise: Tensor, radius: Tensor, key: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    check_values("fgsm_project", radius)
    module = implementation("fgsm_project", _kernels, backend, xt.device, xt.dtype)
    x_adv, delta = module.fgsm_project(xt, gradient, noise, radius, key)
    if module is reference:
        return like_input(x_adv, xt), like_input(delta, xt)
    return x_adv, delta


_fgsm_project = registered(_run_fgsm_project)


@_fgsm_project.register_fake
def _(xt, gradient, noise, radius, key, backend):
    return torch.empty_like(xt), torch.empty_like(xt)


def _fgsm_project_setup(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])


def _fgsm_project_backward(ctx, grad_x_adv, grad_delta):
    return grad_x_adv, None, None, None, None, None


_fgsm_project.register_autograd(_fgsm_project_backward, setup_context=_fgsm_project_setup)
_eager_fgsm_project = eager(_run_fgsm_project, _fgsm_project_setup, _fgsm_project_backward)


def fgsm_project(
    xt: Tensor, gradient: Tensor | None, noise: Tensor, radius: Tensor, key: Tensor, *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """One sign-gradient step from the random start, projected onto the l-inf ball, in one launch.

    delta = clamp(delta_ran + r / sqrt3 sign(gradient), -r, r);  x_adv = x_t + s delta

    Args:
        xt: (B, ...) diffused batch, from `noise_perturb` with the same key.
        gradient: (B, ...) float of any dtype; where it is 0 nothing moves. None steps outwards,
            along the random start itself (a control that needs no network).
        noise, radius, key, backend: as in `noise_perturb`.

    Returns:
        x_adv and delta (eps-units), like xt. delta is a constant: no gradient flows through it.

    Raises:
        UsageError: for wrong shapes, dtypes, devices or values, or a backend that is off.

    Source: Briglia et al. 2026, Eq. 8.
    """
    op = "fgsm_project"
    if not xt.ndim:
        refuse(op, "xt has no dimension: give a batch (B, ...)")
    check_float(op, "xt", xt)
    check_like(op, "xt", xt, "gradient", gradient)
    check_per_sample(op, "xt", xt, noise=noise, radius=radius)
    check_key(op, "xt", xt, key)
    xt, gradient = dense(xt, gradient)
    run = choose(xt, _fgsm_project, _eager_fgsm_project)
    return run(xt, gradient, as_vector(noise, xt.dtype), as_vector(radius, xt.dtype), key,
               backend)
