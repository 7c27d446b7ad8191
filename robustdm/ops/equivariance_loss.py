"""The training loss: data term and regulariser, with their gradients."""

from types import ModuleType

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

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
from robustdm.ops.reference import wide


def _kernels() -> ModuleType:
    from robustdm.kernels import equivariance_loss

    return equivariance_loss


def _run_equivariance_loss(
    eps_pred: Tensor, eps_pred_adv: Tensor | None, delta: Tensor | None, radius: Tensor,
    lambda_t: Tensor, key: Tensor, dtype: torch.dtype, invariance: bool, detach_clean: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    check_values("equivariance_loss", radius, lambda_t)
    module = implementation("equivariance_loss", _kernels, backend, eps_pred.device, eps_pred.dtype)
    total, fit, reg, grad, grad_adv = module.equivariance_loss(
        eps_pred, eps_pred_adv, delta, radius, lambda_t, key, dtype, invariance, detach_clean
    )
    if module is reference:
        grad = like_input(grad, eps_pred)
        grad_adv = grad_adv if eps_pred_adv is None else like_input(grad_adv, eps_pred)
    return total, fit, reg, grad, grad_adv


_equivariance_loss = registered(_run_equivariance_loss)


@_equivariance_loss.register_fake
def _(eps_pred, eps_pred_adv, delta, radius, lambda_t, key, dtype, *rest):
    stored = torch.float32 if eps_pred.dtype == torch.float16 else eps_pred.dtype
    fit, reg = (radius.new_empty(eps_pred.shape[0], dtype=wide(eps_pred.dtype)) for _ in range(2))
    grad = torch.empty_like(eps_pred, dtype=stored)
    if eps_pred_adv is None:
        return fit.new_empty(()), fit, reg, grad, eps_pred.new_empty(0, dtype=stored)
    return fit.new_empty(()), fit, reg, grad, torch.empty_like(eps_pred, dtype=stored)


def _equivariance_loss_setup(ctx, inputs, output):
    _, fit, reg, grad, grad_adv = output
    # Else every backward would fill zeros for the outputs that have no gradient.
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(fit, reg, grad, grad_adv)
    ctx.save_for_backward(grad, grad_adv)
    ctx.dtype, ctx.has_adv = inputs[0].dtype, inputs[1] is not None


def _equivariance_loss_backward(ctx, grad_total, *unused):
    if grad_total is None:
        return (None,) * 10
    # On a CPU a look at the number is free, and it is 1 but for accumulated batches; on a GPU the
    # look would cost more than the product.
    whole = grad_total.device.type == "cpu" and not torch.compiler.is_compiling() and (
        not is_fake(grad_total) and grad_total.item() == 1)
    clean, adv = (
        (grad if whole else grad_total * grad).to(ctx.dtype) for grad in ctx.saved_tensors
    )
    return clean, adv if ctx.has_adv else None, *[None] * 8


_equivariance_loss.register_autograd(
    _equivariance_loss_backward, setup_context=_equivariance_loss_setup
)
_eager_equivariance_loss = eager(
    _run_equivariance_loss, _equivariance_loss_setup, _equivariance_loss_backward
)


def equivariance_loss(
    eps_pred: Tensor, eps_pred_adv: Tensor | None, delta: Tensor | None, radius: Tensor,
    lambda_t: Tensor, key: Tensor, *, dtype: torch.dtype | None = None, invariance: bool = False,
    detach_clean: bool = False, backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """The training loss; both its gradients are computed in the same pass over the predictions.

    total = mean over the batch of fit + reg,  fit = mean |o - eps|^2,
    reg = lambda_t mean |o' - o - delta|^2, with o = eps_pred, o' = eps_pred_adv.

    Args:
        eps_pred: (B, ...) float prediction at x_t.
        eps_pred_adv: (B, ...) prediction at the perturbed batch; None is plain DDPM (reg is 0).
        delta: (B, ...) perturbation, eps-units; None draws delta_ran again.
        radius, lambda_t: (B,) radius of the ball and weight of the regulariser.
        key: as in `noise_perturb`; eps is drawn again from it.
        dtype: of the batch that was perturbed (delta_ran is rounded to it); eps_pred's if None.
        invariance: penalise |o' - o|^2 instead (Eq. 14).
        detach_clean: stop the regulariser's gradient through o.
        backend: "auto", "torch", "cpp" or "triton".

    Returns:
        total (scalar), which alone carries a gradient, and fit and reg, (B,), at least float32.

    Raises:
        UsageError: for wrong shapes, dtypes, devices or values, or a backend that is off.

    Source: Briglia et al. 2026, Eq. 6 and 14; Ho et al. 2020, Eq. 14.
    """
    op = "equivariance_loss"
    if not eps_pred.ndim:
        refuse(op, "eps_pred has no dimension: give a batch (B, ...)")
    check_float(op, "eps_pred", eps_pred)
    check_like(op, "eps_pred", eps_pred, "eps_pred_adv", eps_pred_adv)
    check_like(op, "eps_pred", eps_pred, "delta", delta)
    if eps_pred_adv is not None and eps_pred_adv.dtype != eps_pred.dtype:
        refuse(op, f"eps_pred_adv is {eps_pred_adv.dtype}, eps_pred {eps_pred.dtype}: they must "
               "agree")
    check_per_sample(op, "eps_pred", eps_pred, radius=radius, lambda_t=lambda_t)
    check_key(op, "eps_pred", eps_pred, key)
    eps_pred, eps_pred_adv, delta = dense(eps_pred, eps_pred_adv, delta)
    run = choose(eps_pred, _equivariance_loss, _eager_equivariance_loss)
    return run(
        eps_pred, eps_pred_adv, delta, as_vector(radius, eps_pred.dtype),
        as_vector(lambda_t, eps_pred.dtype), key, dtype or eps_pred.dtype, invariance, detach_clean,
        backend,
    )[:3]
