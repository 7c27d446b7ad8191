"""Which numbers a network's fused dropout layers draw their masks from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

PASS_STRIDE = 1 << 16
"""Layers that one forward pass may number before the next pass's begin."""


@dataclass(frozen=True)
class MaskSource:
    """Where masks come from during one forward pass.

    Attributes:
        key: (3,) int64: seed, step, global index of the first sample.
        number: which of the step's passes this is; equal numbers give equal masks.
    """

    key: Tensor
    number: int


_current: MaskSource | None = None


@contextmanager
def masks_from(key: Tensor, number: int = 0) -> Iterator[None]:
    """Let the fused dropout layers of a forward pass draw from ``key`` (see `robustdm.fuse`).

    Outside of it they draw from torch's own generator, as unfused ones do.
    """
    global _current
    before, _current = _current, MaskSource(key, number)
    try:
        yield
    finally:
        _current = before


def mask_source() -> MaskSource | None:
    """The source in force, None outside of `masks_from`."""
    return _current


def unfused_dropout(model: nn.Module) -> list[str]:
    """Names of a module's active dropout layers that draw from torch's own generator.

    Fused blocks, which draw from `mask_source`, say so by ``draws_masks = True``.
    """
    fused = tuple(
        name + "." if name else "" for name, m in model.named_modules()
        if getattr(m, "draws_masks", False)
    )
    return [
        name for name, m in model.named_modules()
        if isinstance(m, nn.modules.dropout._DropoutNd) and m.training and m.p > 0
        and not name.startswith(fused)
    ]
