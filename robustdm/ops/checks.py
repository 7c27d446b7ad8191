"""Checks of the ops' arguments, and memory formats made to agree.

Every error names the op, the argument, what it was and what it must be.
"""

import torch
from torch import Tensor

from robustdm.errors import UsageError
from robustdm.ops.reference import wide

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def need(op: str, ok: bool, problem: str) -> None:
    if not ok:
        raise UsageError(f"{op}: {problem}")


def check_float(op: str, name: str, value: Tensor) -> None:
    need(op, value.dtype in FLOATS,
         f"{name} is {value.dtype}: give float32, bfloat16, float16 or float64")


def check_dtype(op: str, dtype: torch.dtype) -> None:
    need(op, dtype in FLOATS,
         f"dtype is {dtype}: give torch.float32, bfloat16, float16 or float64")


def check_like(op: str, first: str, x: Tensor, **others: Tensor | None) -> None:
    for name, value in others.items():
        if value is None:
            continue
        check_float(op, name, value)
        need(op, value.shape == x.shape,
             f"{name} has shape {tuple(value.shape)}, {first} {tuple(x.shape)}: they must agree")
        check_device(op, first, x, **{name: value})


def check_device(op: str, first: str, x: Tensor, **others: Tensor | None) -> None:
    for name, value in others.items():
        if value is not None:
            need(op, value.device == x.device,
                 f"{name} is on {value.device}, {first} on {x.device}: move one of them")


def check_per_sample(op: str, first: str, x: Tensor, **values: Tensor) -> None:
    for name, value in values.items():
        need(op, value.shape == x.shape[:1],
             f"{name} has shape {tuple(value.shape)}, {first} {tuple(x.shape)}: give one number "
             "per sample")
        check_float(op, name, value)
        check_device(op, first, x, **{name: value})
        need(op, not value.requires_grad,
             f"{name} requires a gradient, but is a constant here: detach it")


def check_key(op: str, first: str, x: Tensor, key: Tensor) -> None:
    need(op, key.shape == (3,) and key.dtype == torch.int64,
         f"key is {key.dtype} of shape {tuple(key.shape)}: give (seed, step, first index), int64")
    check_device(op, first, x, key=key)


def check_values(op: str, radius: Tensor | None = None, lambda_t: Tensor | None = None) -> None:
    """Look at the numbers where that is free: on a GPU it would stall every step, and there a NaN
    ends up in the loss, whose step is skipped and reported."""
    if radius is not None and radius.device.type == "cpu" and not bool((radius >= 0).all()):
        worst = radius[~(radius >= 0)][0].item()
        raise UsageError(f"{op}: radius holds {worst}: it must be a number, 0 or more, for every "
                         "sample")
    if lambda_t is not None and lambda_t.device.type == "cpu" and bool(lambda_t.isnan().any()):
        raise UsageError(f"{op}: lambda_t holds NaN: it must be a number for every sample")


def dense_format(x: Tensor) -> torch.memory_format | None:
    """The dense memory format of a tensor; None if it has gaps or another order."""
    if x.is_contiguous():
        return torch.contiguous_format
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    if x.ndim == 5 and x.is_contiguous(memory_format=torch.channels_last_3d):
        return torch.channels_last_3d
    return None


def dense(x: Tensor, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    """Tensors of one shape in one dense memory format: the first one's, if it has one."""
    layout = dense_format(x) or torch.contiguous_format
    return tuple(v if v is None else v.contiguous(memory_format=layout) for v in (x, *others))


def channels_last(x: Tensor) -> Tensor:
    """(B, C, *spatial) with the channels innermost, whatever the number of dimensions."""
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return x
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def same_order(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape lie in memory alike; strides of single items are idle."""
    return a.stride() == b.stride() or all(
        s == t for s, t, n in zip(a.stride(), b.stride(), a.shape, strict=True) if n > 1
    )


def is_dense(x: Tensor) -> bool:
    """Whether a tensor fills a stretch of memory, in whatever order of its dimensions."""
    if x.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(x.stride(), x.shape, strict=True) if n > 1):
        if stride != expected:
            return False
        expected *= size
    return True


def as_vector(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(wide(dtype)).contiguous()


def like_input(out: Tensor, like: Tensor) -> Tensor:
    """The reference computes in any order of memory; what was promised is the input's."""
    return out.contiguous(memory_format=dense_format(like))
