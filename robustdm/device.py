"""Copies between host and device that do not wait, and the device's errors."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Copy from the host without waiting: an ordinary copy lets the host wait until the GPU has
    done all that it was given before, and so leaves the GPU idle once in every step."""
    values = values.pin_memory() if device.type == "cuda" else values
    return values.to(device, non_blocking=True)


def to_host(values: Tensor) -> Callable[[], Tensor]:
    """Begin to copy to the host; the function returned waits for that, not for later work."""
    if values.device.type != "cuda":
        kept = values.clone()
        return lambda: kept
    copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    copy.copy_(values, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()

    def wait() -> Tensor:
        arrived.synchronize()
        return copy

    return wait


def normalisable(x: Tensor, weight: Tensor | None) -> Tensor:
    """``x`` for `torch.nn.functional.group_norm`, made contiguous where torch would crash.

    Its gradient on CPUs writes to memory that it does not have (2.13: a segmentation fault) when a
    channels-last input wants no gradient but the weight does, as behind frozen layers.
    """
    behind_frozen = (weight is not None and weight.requires_grad and not x.requires_grad
                     and torch.is_grad_enabled())
    return x.contiguous() if behind_frozen and x.device.type == "cpu" else x


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that an allocation failed, on the GPU or on the host."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


@contextlib.contextmanager
def cudnn_benchmark(device: torch.device, wanted: bool = True) -> Iterator[None]:
    """Let cuDNN time its convolutions at their first call, on a GPU; then the caller's setting
    counts again. Shapes never change in training and in `fast_network`. Speed unmeasured."""
    if device.type != "cuda":
        yield
        return
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = wanted
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
