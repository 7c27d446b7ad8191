"""The paper's corruption of a data set: a share of the items carries Gaussian noise, for ever."""

from dataclasses import dataclass

import torch
from torch import Tensor

from robustdm.random import Stream, element_index, normal, philox, uniform


@dataclass(frozen=True)
class Corruption:
    """``y = x0 + sigma z`` for a share ``fraction`` of the items; float, never clipped.

    Which items, and their z, depend on the seed and on the item's index in the whole set alone: a
    data set has one fixed noisy realisation, whatever the batch, the epoch or the held-out split.
    Source: Briglia et al. 2026, section 4; the fixed realisation as in Daras et al. 2024.
    """

    fraction: float
    sigma: float
    seed: int

    def __bool__(self) -> bool:
        return self.fraction > 0 and self.sigma > 0

    def chosen(self, items: Tensor) -> Tensor:
        """(B,) bool: whether each item, given by its index in the whole set, is corrupted."""
        word, _, _, _ = philox(self.seed, 0, items, Stream.CORRUPT_CHOICE)
        return uniform(word) < self.fraction

    def __call__(self, clean: Tensor, items: Tensor) -> Tensor:
        """Corrupt items.

        Args:
            clean: (B, *shape) float, in data units ([-1, 1] for images).
            items: (B,) int64 indices in the whole set, on the device of ``clean``.

        Returns:
            A new tensor like ``clean``, or ``clean`` itself where nothing is ever corrupted.
        """
        if not self:
            return clean
        shape = clean.shape[1:]
        element = element_index(0, (1, *shape), clean.device)
        first = (items * element.numel()).view(-1, *[1] * len(shape))
        word0, word1, _, _ = philox(self.seed, 0, first + element, Stream.CORRUPT_NOISE)
        noise = normal(word0, word1, clean.dtype).mul_(self.sigma)
        return torch.where(self.chosen(items).view_as(first), clean + noise, clean)
