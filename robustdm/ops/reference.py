"""Every fused op in plain torch, on any device: the oracle of the kernels, and the fallback.

Arithmetic is in float32 at least ("wide"); results are rounded once, to the dtype that a kernel
stores. Names: ``signal`` = sqrt(abar_t) and ``noise`` = s_t = sqrt(1 - abar_t) scale data and noise
of x_t; ``radius`` is that of the l-inf ball in eps-units. These are (B,) tensors in the wide dtype,
and the radius holds values of the batch's own dtype, so that no product with a number below one
rounds to outside the ball. ``key`` is (3,) int64 on the batch's device: seed, step, global index of
the first sample; a tensor, so that neither a compiled step nor a CUDA graph has numbers baked in.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from robustdm.ops import stream

INVERSE_SQRT3 = 3**-0.5


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that arithmetic on ``dtype`` is done in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.ndim - 1))


def noise_perturb(
    x0: Tensor, signal: Tensor, noise: Tensor, radius: Tensor, key: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Diffuse a batch, and perturb it at random.

    x_t = signal x0 + noise eps; x_ran = x_t + noise delta_ran, with delta_ran uniform in the ball.

    Args:
        x0: (B, ...) float of any dtype.
        dtype: of both results.

    Returns:
        x_t and x_ran, shaped like x0.

    Source: Briglia et al. 2026, Eq. 7 and Algorithm 1.
    """
    work = wide(dtype)
    eps, unit = stream.element_noise(key, tuple(x0.shape), work)
    signal, noise, radius = (_per_sample(v, x0) for v in (signal, noise, radius))
    xt = (signal * x0.to(work) + noise * eps).to(dtype)
    delta = (radius * unit).to(dtype)
    return xt, (xt.to(work) + noise * delta.to(work)).to(dtype)


def fgsm_project(
    xt: Tensor, gradient: Tensor | None, noise: Tensor, radius: Tensor, key: Tensor
) -> tuple[Tensor, Tensor]:
    """One sign-gradient step of r / sqrt3 from the random start, clamped to the ball.

    delta = clamp(delta_ran + r / sqrt3 sign(gradient), -r, r) and x_adv = x_t + noise delta.

    Args:
        xt: (B, ...) diffused batch; its dtype is that of both results.
        gradient: (B, ...) of any float dtype, with respect to x_ran (or delta: the sign is the
            same). None steps outwards, along delta_ran itself. Zeros move nothing; NaN stays NaN.

    Returns:
        x_adv and delta, shaped like xt.

    Source: Briglia et al. 2026, Eq. 8.
    """
    work = wide(xt.dtype)
    _, unit = stream.element_noise(key, tuple(xt.shape), work)
    noise, radius = _per_sample(noise, xt), _per_sample(radius, xt)
    start = (radius * unit).to(xt.dtype).to(work)
    direction = start if gradient is None else gradient
    # torch's sign of NaN is 0, which would let a broken pass look like a gradient of zero.
    sign = torch.where(direction.isnan(), direction, direction.sign()).to(work)
    moved = start + (radius * INVERSE_SQRT3) * sign
    delta = torch.minimum(torch.maximum(moved, -radius), radius).to(xt.dtype)
    return (xt.to(work) + noise * delta.to(work)).to(xt.dtype), delta


def equivariance_loss(
    eps_pred: Tensor, eps_pred_adv: Tensor | None, delta: Tensor | None, radius: Tensor,
    lambda_t: Tensor, key: Tensor, dtype: torch.dtype, invariance: bool, detach_clean: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss, and in the same pass its gradients with respect to both predictions.

    With o = eps_pred, o' = eps_pred_adv and d elements per sample::

        fit = mean (o - eps)^2     res = o' - o - delta     reg = lambda_t mean res^2
        total = mean over the batch of (fit + reg)
        d total / d o  = 2 / (B d) ((o - eps) - lambda_t res)
        d total / d o' = 2 / (B d) lambda_t res

    Args:
        eps_pred: (B, ...) prediction at x_t.
        eps_pred_adv: (B, ...) prediction at the perturbed batch; None is plain DDPM: reg is 0.
        delta: (B, ...) the perturbation; None regenerates the random start in ``dtype``.
        dtype: of the batch, in which the random start is rounded.
        invariance: penalise o' - o instead (Eq. 14).
        detach_clean: stop the regulariser's gradient through o.

    Returns:
        total (scalar), fit and reg (B,) in the wide dtype, and the two gradients: in the
        predictions' dtype, but float32 for float16, which cannot hold them unscaled. Without
        eps_pred_adv the second gradient is empty.

    Source: Briglia et al. 2026, Eq. 6; Ho et al. 2020, Eq. 14.
    """
    work = wide(eps_pred.dtype)
    stored = torch.float32 if eps_pred.dtype == torch.float16 else eps_pred.dtype
    eps, unit = stream.element_noise(key, tuple(eps_pred.shape), work)
    inner = tuple(range(1, eps_pred.ndim))

    def mean(x: Tensor) -> Tensor:
        return x.mean(inner) if inner else x

    error = eps_pred.to(work) - eps
    fit = mean(error**2)
    scale = 2 / max(1, eps_pred.numel())
    if eps_pred_adv is None:
        reg = torch.zeros_like(fit)
        grad, grad_adv = (scale * error).to(stored), eps_pred.new_empty(0, dtype=stored)
    else:
        residual = eps_pred_adv.to(work) - eps_pred.to(work)
        if not invariance:
            if delta is None:
                delta = (_per_sample(radius, eps_pred).to(work) * unit).to(dtype)
            residual = residual - delta.to(work)
        reg = lambda_t.to(work) * mean(residual**2)
        pull = _per_sample(lambda_t, eps_pred).to(work) * residual
        grad = (scale * (error if detach_clean else error - pull)).to(stored)
        grad_adv = (scale * pull).to(stored)
    return (fit + reg).mean(), fit, reg, grad, grad_adv


def normalisable(x: Tensor, weight: Tensor | None) -> Tensor:
    """``x`` for `torch.nn.functional.group_norm`, made contiguous where torch would crash.

    Its gradient on CPUs writes to memory that it does not have (2.13: a segmentation fault) when a
    channels-last input wants no gradient but the weight does, as behind frozen layers.
    """
    behind_frozen = (weight is not None and weight.requires_grad and not x.requires_grad
                     and torch.is_grad_enabled())
    return x.contiguous() if behind_frozen and x.device.type == "cpu" else x


def group_norm_act(
    x: Tensor, groups: int, weight: Tensor | None = None, bias: Tensor | None = None,
    scale: Tensor | None = None, shift: Tensor | None = None, add: Tensor | None = None,
    silu: bool = True, dropout: float = 0.0, key: Tensor | None = None, layer: int = 0,
    tiny: float = 1e-5,
) -> Tensor:
    """Group normalisation with what stands around it in a diffusion U-Net's block.

    v = x + add;  u = GroupNorm(v) (1 + scale) + shift;  y = dropout(silu(u))

    Args:
        x: (B, C, *spatial) float.
        groups: number of groups, divides C.
        weight, bias: (C,) of the normalisation; both or neither.
        scale, shift: (B, C) per sample, or None (adaptive normalisation, "AdaGN").
        add: (B, C), added to x over all positions first (a time embedding), or None.
        silu: apply SiLU.
        dropout: rate of dropout after the activation, with `robustdm.ops.stream.dropout_mask`.
        key: (3,) int64, needed with dropout.
        layer: which of the network's layers this is, for its own dropout mask.
        tiny: added to the variance.

    Returns:
        y, shaped like x and in its dtype, to which v is rounded before it is normalised. In a group
        of one value the variance is 0, so that u is bias (1 + scale) + shift, as on every backend.

    Source: Wu & He 2018; Nichol & Dhariwal 2021 (scale and shift); Ramachandran et al. 2017 (SiLU).
    """
    work = wide(x.dtype)

    def spread(values: Tensor) -> Tensor:
        return values.to(work).view(*values.shape, *[1] * (x.ndim - 2))

    v = _sum(x, add).to(work)
    wide_or_none = (None if p is None else p.to(work) for p in (weight, bias))
    # Torch's function of that name refuses groups of one value, and this one computes no other way.
    u = torch.group_norm(normalisable(v, weight), groups, *wide_or_none, tiny)
    if scale is not None:
        u = u * (1 + spread(scale)) + spread(shift)
    if silu:
        u = F.silu(u)
    if dropout:
        mask = stream.dropout_mask(key, tuple(x.shape), layer, dropout)
        u = torch.where(mask, u / (1 - dropout), 0.0)
    return u.to(x.dtype)


def _sum(x: Tensor, add: Tensor | None) -> Tensor:
    """x + add, rounded to the dtype of x."""
    if add is None:
        return x
    work = wide(x.dtype)
    return (x.to(work) + add.to(work).view(*add.shape, *[1] * (x.ndim - 2))).to(x.dtype)


def group_norm_act_forward(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, scale: Tensor | None,
    shift: Tensor | None, add: Tensor | None, silu: bool, dropout: float, key: Tensor | None,
    layer: int, tiny: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`group_norm_act` with what its gradient needs: y, keep, mean and rstd (B, groups).

    keep, uint8, holds dropout's mask where a backend stores it. This one draws it again: empty.
    """
    y = group_norm_act(
        x, groups, weight, bias, scale, shift, add, silu, dropout, key, layer, tiny
    )
    size = math.prod(x.shape[1:]) // groups
    grouped = _sum(x, add).to(wide(x.dtype)).reshape(len(x), groups, size)
    variance, mean = torch.var_mean(grouped, -1, correction=0)
    return y, x.new_empty(0, dtype=torch.uint8), mean, (variance + tiny).rsqrt()


def group_norm_act_backward(
    dy: Tensor, x: Tensor, keep: Tensor, mean: Tensor, rstd: Tensor, groups: int,
    weight: Tensor | None, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None,
    add: Tensor | None, silu: bool, dropout: float, key: Tensor | None, layer: int,
    need_sums: bool,
) -> tuple[Tensor, Tensor]:
    """Gradient of `group_norm_act_forward`, and the sums that its parameters' gradients come from.

    With xhat = (v - mean) rstd, weights w = weight (1 + scale) and du the gradient with respect to
    u, and m1, m2 the means over a group of w du and of w du xhat::

        dx = rstd (w du - m1 - xhat m2)

    Args:
        dy: like x, gradient with respect to y.
        keep, mean, rstd: from the forward.
        need_sums: also compute the sums; the attack needs none.

    Returns:
        dx like x, and (B, C, 3): the sums over all positions of du, of du xhat and of dx; empty
        unless ``need_sums``.
    """
    work = wide(dy.dtype)
    batch, channels = dy.shape[:2]

    def spread(values: Tensor) -> Tensor:
        return values.to(work).view(*values.shape, *[1] * (dy.ndim - 2))

    def per_channel(values: Tensor) -> Tensor:
        return spread(values.repeat_interleave(channels // groups, 1))

    xhat = (_sum(x, add).to(work) - per_channel(mean)) * per_channel(rstd)
    w = torch.ones(1, channels, dtype=work, device=dy.device) if weight is None else weight[None]
    gain = spread(w if scale is None else w * (1 + scale.to(work)))
    du = dy.to(work)
    if dropout:
        mask = stream.dropout_mask(key, tuple(dy.shape), layer, dropout)
        du = torch.where(mask, du / (1 - dropout), 0.0)
    if silu:
        u = xhat * gain
        if bias is not None:
            u = u + spread(bias[None] if scale is None else bias * (1 + scale.to(work)))
        if shift is not None:
            u = u + spread(shift)
        sigmoid = u.sigmoid()
        du = du * sigmoid * (1 + u * (1 - sigmoid))
    inner = tuple(range(2, dy.ndim))
    sum1, sum2 = (x.sum(inner) if inner else x for x in (du, du * xhat))
    weights = gain.expand(batch, *gain.shape[1:]).reshape(batch, channels)
    count = math.prod(dy.shape[1:]) // groups
    m1, m2 = (
        (weights * s).view(batch, groups, channels // groups).sum(-1) / count for s in (sum1, sum2)
    )
    dx = per_channel(rstd) * (gain * du - per_channel(m1) - xhat * per_channel(m2))
    if not need_sums:
        return dx.to(dy.dtype), dy.new_empty(0, dtype=work)
    sums = torch.stack((sum1, sum2, dx.sum(inner) if inner else dx), -1)
    return dx.to(dy.dtype), sums


def adamw_ema(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor],
    averages: list[Tensor], copies: list[Tensor], lr: Tensor, step: Tensor, decay: Tensor,
    factor: Tensor, skip: Tensor, beta1: float, beta2: float, tiny: float, weight_decay: float,
) -> None:
    """AdamW, a moving average of the weights and a bf16 copy of them, in place.

    With g = factor grad (left alone where skip is 1, but for the average and the copy)::

        p <- (1 - lr weight_decay) p
        m <- beta1 m + (1 - beta1) g          v <- beta2 v + (1 - beta2) g^2
        p <- p - lr / (1 - beta1^step) m / (sqrt(v / (1 - beta2^step)) + tiny)
        average <- average + (1 - decay) (p - average)          copy <- bf16(p)

    Args:
        params, grads, exp_avgs, exp_avg_sqs: float32 tensors of equal shapes and strides.
        averages: moving averages of the weights, or empty.
        copies: bfloat16 working copies of the weights, or empty.
        lr, step, decay, factor, skip: float32 scalars on the weights' device. ``step`` counts from
            1 and is this step's number; ``factor`` clips; ``skip`` is 0 or 1.

    Source: Loshchilov & Hutter 2019, algorithm 2; Kingma & Ba 2015.
    """
    keep = skip == 0
    # In float32, 1 - 0.999^1 has but four good digits.
    correction1, correction2 = (1 - b ** step.double() for b in (beta1, beta2))
    step_size = (lr / correction1).float()
    root = correction2.sqrt().float()
    for i, (p, g) in enumerate(zip(params, grads, strict=True)):
        m, v = exp_avgs[i], exp_avg_sqs[i]
        g = g * factor
        m.copy_(torch.where(keep, beta1 * m + (1 - beta1) * g, m))
        v.copy_(torch.where(keep, beta2 * v + (1 - beta2) * g * g, v))
        scale = v.sqrt() / root + tiny
        moved = p * (1 - lr * weight_decay) - step_size * m / scale
        p.copy_(torch.where(keep, moved, p))
        if averages:
            averages[i].lerp_(p, 1 - decay)
        if copies:
            copies[i].copy_(p)
