"""Checks of the ops' arguments, and memory formats made to agree.

Every error names the op, the argument, what it was and what it must be.
"""

import math
from typing import NoReturn

import torch
from torch import Tensor

from robustdm.errors import UsageError

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def refuse(op: str, problem: str) -> NoReturn:
    """Raise the UsageError of an op. Every check asks first and words its complaint afterwards: a
    right call pays for no text."""
    raise UsageError(f"{op}: {problem}")


def check_float(op: str, name: str, value: Tensor) -> None:
    if value.dtype not in FLOATS:
        refuse(op, f"{name} is {value.dtype}: give float32, bfloat16, float16 or float64")


def check_dtype(op: str, dtype: torch.dtype) -> None:
    if dtype not in FLOATS:
        refuse(op, f"dtype is {dtype}: give torch.float32, bfloat16, float16 or float64")


def check_like(op: str, first: str, x: Tensor, name: str, value: Tensor | None) -> None:
    if value is None:
        return
    if value.shape != x.shape or value.dtype not in FLOATS or value.device != x.device:
        check_float(op, name, value)
        if value.shape != x.shape:
            refuse(op, f"{name} has shape {tuple(value.shape)}, {first} {tuple(x.shape)}: they "
                   "must agree")
        check_device(op, first, x, name, value)


def check_device(op: str, first: str, x: Tensor, name: str, value: Tensor) -> None:
    if value.device != x.device:
        refuse(op, f"{name} is on {value.device}, {first} on {x.device}: move one of them")


def check_per_sample(op: str, first: str, x: Tensor, **values: Tensor) -> None:
    size, device = x.shape[:1], x.device
    for name, value in values.items():
        if (value.shape != size or value.dtype not in FLOATS or value.device != device
                or value.requires_grad):
            if value.shape != size:
                refuse(op, f"{name} has shape {tuple(value.shape)}, {first} {tuple(x.shape)}: give "
                       "one number per sample")
            check_float(op, name, value)
            check_device(op, first, x, name, value)
            refuse(op, f"{name} requires a gradient, but is a constant here: detach it")


def check_key(op: str, first: str, x: Tensor, key: Tensor) -> None:
    if key.shape != (3,) or key.dtype != torch.int64:
        refuse(op, f"key is {key.dtype} of shape {tuple(key.shape)}: give (seed, step, first "
               "index), int64")
    check_device(op, first, x, "key", key)


def check_values(op: str, radius: Tensor, lambda_t: Tensor | None = None) -> None:
    """Look at the numbers where that is free: on a GPU it would stall every step, and there a NaN
    ends up in the loss, whose step is skipped and reported."""
    if radius.device.type != "cpu" or not len(radius):
        return
    if not radius.min().item() >= 0:  # NaN is the least of all numbers
        worst = radius[~(radius >= 0)][0].item()
        refuse(op, f"radius holds {worst}: it must be a number, 0 or more, for every sample")
    if lambda_t is not None and math.isnan(lambda_t.sum().item()) and bool(lambda_t.isnan().any()):
        refuse(op, "lambda_t holds NaN: it must be a number for every sample")


def dense_format(x: Tensor) -> torch.memory_format | None:
    """The dense memory format of a tensor; None if it has gaps or another order."""
    if x.is_contiguous():
        return torch.contiguous_format
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    if x.ndim == 5 and x.is_contiguous(memory_format=torch.channels_last_3d):
        return torch.channels_last_3d
    return None


def dense(x: Tensor, *others: Tensor | None) -> list[Tensor | None]:
    """Tensors of one shape in one dense memory format: the first one's, if it has one."""
    layout = dense_format(x) or torch.contiguous_format
    return [v if v is None else v.contiguous(memory_format=layout) for v in (x, *others)]


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
    """Numbers per sample, contiguous in the dtype that the ops compute in."""
    work = torch.float64 if dtype == torch.float64 else torch.float32
    return x if x.dtype == work and x.is_contiguous() else x.to(work).contiguous()


def like_input(out: Tensor, like: Tensor) -> Tensor:
    """The reference computes in any order of memory; what was promised is the input's."""
    return out.contiguous(memory_format=dense_format(like))
