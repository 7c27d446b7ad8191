"""What a run will need in memory, counted without allocating it."""

from __future__ import annotations

import contextlib
import math
import os
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from robustdm.device import resolve_device
from robustdm.errors import UsageError
from robustdm.models import build_model, lora
from robustdm.models.sharded import blocks
from robustdm.runs.config import TrainConfig


def estimate_bytes(
    config: TrainConfig, shape: tuple[int, ...], ranks: int = 1
) -> dict[str, int]:
    """Bytes of a training step's weights and activations, from a dry pass of tensors without data.

    Activations are what one forward pass keeps for its backward pass, for one piece of the batch,
    and what drawing its noise takes. A robust objective holds two such graphs at its peak: the
    clean one, and the attack's or the adversarial one. In bf16, tensors are half as large.

    Args:
        config: the run's configuration.
        shape: shape of one sample.
        ranks: processes that share the batch; the estimate is of one of them.

    Returns:
        ``weights`` (parameters, gradients, AdamW moments, moving averages; of a network in parts,
        this rank's, with what it gathers), ``activations`` and ``total``. Of frozen parameters,
        activations are counted as if they were not; those of adapters are not counted.
    """
    with FakeTensorMode(), torch.device(resolve_device(config.device)):
        model = build_model(config, shape)
        if config.network == "unet" and config.backend != "torch":
            from robustdm.models.fuse import change_classes  # fused norms keep less

            change_classes(model)
        piece = config.batch_size // config.accumulate // ranks
        x, t = torch.empty(piece, *shape), torch.zeros(piece, dtype=torch.int64)
        own = {p.untyped_storage()._cdata for p in model.parameters()}
        kept: dict[int, Tensor] = {}

        def remember(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage()._cdata] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
            out = model(x, t)  # alive until counted: its graph is what keeps the tensors
        activations = sum(v.untyped_storage().nbytes() for k, v in kept.items() if k not in own)
        del out
    if config.precision == "bf16":
        activations //= 2
    if config.objective != "ddpm":
        activations *= 2
    # While noise is drawn, about eight int64 words per element of the batch are alive.
    activations += 64 * x.numel()
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    if config.lora:
        trained = 4 * lora.count(model, config)
        size += trained
    averages = len(config.ema_rates)
    if config.parallel == "fsdp" and ranks > 1:
        weights = (size * (1 + averages) + trained * 3) // ranks + _gathered(model, config)
        if config.accumulate > 1 or config.objective != "ddpm":
            weights += trained  # whole gradients, until the last backward pass
    else:
        weights = size + trained * (3 + averages)
        if config.precision == "bf16":
            weights += (size + trained) // 2  # working weights and their gradients
        if ranks > 1:
            weights += trained  # gradients in one piece, for the all-reduce
    return {"weights": weights, "activations": activations, "total": weights + activations}


def _gathered(model: nn.Module, config: TrainConfig) -> int:
    """Bytes of the weights that a pass holds whole: the top's, and two blocks'."""
    sizes = sorted(sum(p.numel() for p in block.parameters()) for block in blocks(model))
    top = sum(p.numel() for p in model.parameters()) - sum(sizes)
    return (2 if config.precision == "bf16" else 4) * (top + sum(sizes[-2:]))


def available_bytes(device: torch.device) -> int | None:
    """Memory that a new process may take on a device; None where that cannot be told.

    The ranks on one machine share its host memory evenly.
    """
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1]) // ranks
    return None


def check_fits(
    config: TrainConfig, estimate: dict[str, int], available: int | None, ranks: int = 1
) -> str | None:
    """Compare an estimate with the memory there is.

    Returns:
        A warning if it is a close call, else None.

    Raises:
        UsageError: if it is far too much: on a CPU the system would kill the process without a
            word.
    """
    if available is None or estimate["total"] <= available:
        return None
    need, free = (f"{value / 2**30:.1f} GiB" for value in (estimate["total"], available))
    text = f"batch_size is {config.batch_size}: a step needs about {need}, but {free} are free"
    room = available - estimate["weights"]
    whole = estimate["activations"] * config.accumulate
    fitting = [n for n in finer_pieces(config, ranks) if whole / n <= room]
    remedy = f"--accumulate {fitting[0]} gives the same result in less" if fitting else (
        "use a smaller network or a larger machine")
    largest = int(config.batch_size * room / whole) if room > 0 else 0
    if largest:
        remedy += f"; the largest batch that fits in one piece is about {largest}"
    if estimate["total"] > 1.25 * available:
        raise UsageError(f"{text}; {remedy}")
    return f"{text}; if memory runs out, {remedy}"


def finer_pieces(config: TrainConfig, ranks: int = 1) -> list[int]:
    """The values of ``accumulate`` above the present one that divide a rank's part of the batch,
    lowest first."""
    size = config.batch_size // ranks
    low = [n for n in range(1, math.isqrt(size) + 1) if size % n == 0]
    return [n for n in sorted({*low, *(size // n for n in low)}) if n > config.accumulate]
