"""The device by name, copies that do not wait, and the device's errors."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from robustdm.errors import UsageError


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


def resolve_device(name: str) -> torch.device:
    """``auto`` is CUDA where there is one, and CUDA without a number is this process's GPU: other
    threads would take it for the first.

    Raises:
        UsageError: for a device that does not exist here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"device is {name!r}: use auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"device is {name!r}: use auto, cpu, cuda or cuda:N")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise UsageError(f"device is {name!r}, but {count} CUDA devices are here: use cpu")
        if device.index is None:
            return torch.device("cuda", torch.cuda.current_device())
    return device


def device_name(device: torch.device) -> str:
    """Name of the GPU, or the number of threads that the CPU may use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"
