"""Group normalisation with what stands before and behind it in a UNet."""

import math
from types import ModuleType

import torch
from torch import Tensor

from robustdm.ops import reference
from robustdm.ops.checks import FLOATS, channels_last, check_device, check_float, check_key, refuse
from robustdm.ops.dispatch import choose, eager, implementation, is_torch, registered, resolve
from robustdm.ops.reference import wide


def _kernels() -> ModuleType:
    from robustdm.kernels import group_norm_act

    return group_norm_act


def _run_group_norm_act(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor | None,
    shift: Tensor | None, add: Tensor | None, key: Tensor | None, groups: int, silu: bool,
    dropout: float, layer: int, tiny: float, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    module = implementation("group_norm_act", _kernels, backend, x.device, x.dtype)
    y, keep, mean, rstd = module.group_norm_act_forward(
        x, groups, weight, bias, scale, shift, add, silu, dropout, key, layer, tiny
    )
    return channels_last(y), keep, mean, rstd


_group_norm_act = registered(_run_group_norm_act)


@_group_norm_act.register_fake
def _(x, weight, bias, scale, shift, add, key, groups, silu, dropout, layer, tiny, backend):
    size = (0,)  # C++ and the reference draw the mask again
    if dropout and resolve("group_norm_act", backend, x.device, x.dtype) == "triton":
        size = (x.shape[0], math.prod(x.shape[2:]), (x.shape[1] + 7) // 8)
    keep = x.new_empty(size, dtype=torch.uint8)
    mean, rstd = (x.new_empty(x.shape[0], groups, dtype=wide(x.dtype)) for _ in range(2))
    return torch.empty_like(x), keep, mean, rstd


def _run_group_norm_act_backward(
    dy: Tensor, x: Tensor, keep: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None,
    bias: Tensor | None, scale: Tensor | None, shift: Tensor | None, add: Tensor | None,
    key: Tensor | None, groups: int, silu: bool, dropout: float, layer: int, need_sums: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    module = implementation("group_norm_act", _kernels, backend, dy.device, dy.dtype)
    dx, sums = module.group_norm_act_backward(
        dy, x, keep, mean, rstd, groups, weight, bias, scale, shift, add, silu, dropout, key, layer,
        need_sums,
    )
    return channels_last(dx), sums


_group_norm_act_backward = registered(_run_group_norm_act_backward)


@_group_norm_act_backward.register_fake
def _(dy, x, keep, mean, rstd, weight, bias, scale, shift, add, key, groups, silu, dropout, layer,
      need_sums, backend):
    shape = (*dy.shape[:2], 3) if need_sums else (0,)
    return torch.empty_like(dy), dy.new_empty(shape, dtype=wide(dy.dtype))


def _group_norm_act_setup(ctx, inputs, output):
    x, weight, bias, scale, shift, add, key, *ctx.rest = inputs
    _, keep, mean, rstd = output
    ctx.set_materialize_grads(False)
    ctx.add_dtype = None if add is None else add.dtype
    ctx.mark_non_differentiable(keep, mean, rstd)
    ctx.save_for_backward(x, keep, mean, rstd, weight, bias, scale, shift, add, key)


def _group_norm_act_grad(ctx, dy, *unused):
    x, keep, mean, rstd, weight, bias, scale, shift, add, key = ctx.saved_tensors
    groups, silu, dropout, layer, _, backend = ctx.rest
    if dy is None:
        return (None,) * 13
    need_weight, need_bias, need_scale, need_shift, need_add = ctx.needs_input_grad[1:6]
    need_sums = need_weight or need_bias or need_scale or need_shift or need_add
    run = choose(dy, _group_norm_act_backward, _run_group_norm_act_backward)
    dx, sums = run(
        channels_last(dy), x, keep, mean, rstd, weight, bias, scale, shift, add, key, groups, silu,
        dropout, layer, need_sums, backend,
    )
    grads = [None] * 5
    if need_sums:
        sum_u, sum_u_xhat, sum_x = sums.unbind(-1)
        if need_weight or need_bias:
            gain = None if scale is None else 1 + scale.to(sums.dtype)[..., None]
            by_channel = (sums if gain is None else sums * gain).sum(0)
            grads[0] = by_channel[:, 1].to(weight.dtype) if need_weight else None
            grads[1] = by_channel[:, 0].to(bias.dtype) if need_bias else None
        if need_scale:
            ds = sum_u_xhat if weight is None else weight * sum_u_xhat + bias * sum_u
            grads[2] = ds.to(scale.dtype)
        if need_shift:
            grads[3] = sum_u.to(shift.dtype)
        if need_add:
            grads[4] = sum_x.to(ctx.add_dtype)
    return dx, *grads, *[None] * 7


_group_norm_act.register_autograd(_group_norm_act_grad, setup_context=_group_norm_act_setup)
_eager_group_norm_act = eager(_run_group_norm_act, _group_norm_act_setup, _group_norm_act_grad)


def group_norm_act(
    x: Tensor, groups: int, weight: Tensor | None = None, bias: Tensor | None = None, *,
    scale: Tensor | None = None, shift: Tensor | None = None, add: Tensor | None = None,
    silu: bool = True, dropout: float = 0.0, key: Tensor | None = None, layer: int = 0,
    tiny: float = 1e-5, backend: str = "auto",
) -> Tensor:
    """Channels-last group normalisation with the addition before it and the activation after it.

    v = x + add;  u = GroupNorm(v) (1 + scale) + shift;  y = dropout(silu(u))

    In the backward pass the gradients of weight, bias, scale, shift and add cost nothing unless
    asked for. For it, the triton backend stores the dropout mask, one bit per element; the others
    draw it from ``key`` again. In a group of one value, xhat is 0.

    Args:
        x: (B, C, *spatial) float; made channels-last if it is not.
        groups: number of groups, a divisor of C.
        weight, bias: (C,), both or neither.
        scale, shift: (B, C) per sample (adaptive normalisation), both or neither.
        add: (B, C), added over all positions before the normalisation (a time embedding).
        silu: apply SiLU.
        dropout: rate of dropout behind it, from 0 to below 1.
        key: (3,) int64, needed with dropout: seed, step, global index of the first sample.
        layer: number of this layer in its network: each has masks of its own.
        tiny: added to the variance.
        backend: "auto", "torch", "cpp" or "triton".

    Returns:
        y, channels-last.

    Raises:
        UsageError: for wrong shapes, dtypes or devices, or a backend that is off.

    Source: Wu & He 2018; Nichol & Dhariwal 2021 for scale and shift.
    """
    op = "group_norm_act"
    if x.ndim < 2:
        refuse(op, f"x has shape {tuple(x.shape)}: give (B, C, *spatial)")
    check_float(op, "x", x)
    samples, channels = x.shape[:2]
    if groups < 1 or channels % groups:
        refuse(op, f"groups is {groups}: it must divide the {channels} channels of x")
    if (weight is None) != (bias is None):
        refuse(op, "weight and bias go together: give both or none")
    if (scale is None) != (shift is None):
        refuse(op, "scale and shift go together: give both or none")
    if weight is not None:
        _check(x, "weight", weight, (channels,))
        _check(x, "bias", bias, (channels,))
    if scale is not None:
        _check(x, "scale", scale, (samples, channels))
        _check(x, "shift", shift, (samples, channels))
    if add is not None:
        _check(x, "add", add, (samples, channels))
    if not 0 <= dropout < 1:
        refuse(op, f"dropout is {dropout}: give a rate from 0 to below 1")
    if dropout and key is None:
        refuse(op, "dropout needs a key: give (seed, step, first index)")
    if key is not None:
        check_key(op, "x", x, key)
    if backend == "auto" and is_torch(op, _kernels, backend, x.device, x.dtype):
        # Torch's own gradients are faster than the reference's, and a compiler can fuse them.
        return channels_last(reference.group_norm_act(
            channels_last(x), groups, weight, bias, scale, shift, add, silu, dropout, key, layer,
            tiny,
        ))
    run = choose(x, _group_norm_act, _eager_group_norm_act)
    weight, bias, scale, shift, add = [
        p if p is None else p.contiguous() for p in (weight, bias, scale, shift, add)
    ]
    return run(channels_last(x), weight, bias, scale, shift, add, key, groups, silu,
               float(dropout), layer, tiny, backend)[0]


def _check(x: Tensor, name: str, value: Tensor, size: tuple[int, ...]) -> None:
    if value.shape != size or value.dtype not in FLOATS or value.device != x.device:
        if value.shape != size:
            refuse("group_norm_act", f"{name} has shape {tuple(value.shape)}, x {tuple(x.shape)}: "
                   f"give {size}")
        check_float("group_norm_act", name, value)
        check_device("group_norm_act", "x", x, name, value)
