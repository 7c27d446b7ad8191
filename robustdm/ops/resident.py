"""Batches of images that stay where the whole set lies, as uint8, until they are diffused."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from robustdm.ops import reference


@dataclass(frozen=True)
class ResidentBatch:
    """A batch of images that lie on the device as uint8: gathered, normalised, corrupted and
    flipped where they are diffused, in one launch. Takes the place of x0.

    Attributes:
        data: (N, C, H, W) uint8, the whole set; v stands for v / 127.5 - 1.
        items: (B,) int64 rows of ``data``, on its device.
        flip: mirror half of the images left to right; the step's draw decides which.
        corrupt_fraction, corrupt_sigma, corrupt_seed: the set's one noisy realisation, as in
            `robustdm.data.Corruption`.
        dtype: of the diffused images.
    """

    data: Tensor
    items: Tensor
    flip: bool = False
    corrupt_fraction: float = 0.0
    corrupt_sigma: float = 0.0
    corrupt_seed: int = 0
    dtype: torch.dtype = torch.float32

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.items), *self.data.shape[1:])

    @property
    def device(self) -> torch.device:
        return self.data.device

    def __len__(self) -> int:
        return len(self.items)

    def chunk(self, pieces: int) -> list[ResidentBatch]:
        """The batch in pieces, like `torch.Tensor.chunk`."""
        return [replace(self, items=items) for items in self.items.chunk(pieces)]

    def load(self, key: Tensor) -> Tensor:
        """The images as training sees them at a draw's key: (B, C, H, W) float32 in [-1, 1]."""
        return reference.load_resident(
            self.data, self.items, key, self.flip, self.corrupt_fraction, self.corrupt_sigma,
            self.corrupt_seed,
        )
