"""What spoils a data set: a share of its items is corrupted, each in one way, for ever.

Which items, and how, depend on the seed and on an item's index in the whole set alone: a data set
has one fixed noisy realisation, whatever the batch, the epoch, the device or the held-out split.
Whatever the kind, one seed and one share choose the same items.
"""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from robustdm.ops.stream import Stream, element_index, normal, philox, uniform


class ItemCorruption:
    """What all kinds have in common: ``fraction`` of the items is corrupted, drawn by ``seed``.

    Attributes:
        keeps_8_bits: uint8 images stay uint8, so that a set in memory is corrupted once and for
            all; otherwise items have to be floats.
        needs_host: computed in host memory, by the workers that decode.
    """

    kind: ClassVar[str]
    keeps_8_bits: ClassVar[bool] = True
    needs_host: ClassVar[bool] = False
    fraction: float
    seed: int

    def __bool__(self) -> bool:
        return self.fraction > 0

    def chosen(self, items: Tensor) -> Tensor:
        """(B,) bool: whether each item, given by its index in the whole set, is corrupted."""
        word, _, _, _ = philox(self.seed, 0, items, Stream.CORRUPT_CHOICE)
        return uniform(word) < self.fraction

    def __call__(self, clean: Tensor, items: Tensor) -> Tensor:
        """Corrupt items.

        Args:
            clean: (B, *shape) float in data units ([-1, 1] for images), or uint8 images where the
                kind keeps 8 bits.
            items: (B,) int64 indices in the whole set, on the device of ``clean``.

        Returns:
            A new tensor like ``clean``, or ``clean`` itself where nothing is ever corrupted.
        """
        if not self:
            return clean
        chosen = self.chosen(items)
        if self.needs_host:
            result = clean.clone()
            result[chosen] = self._spoil(clean[chosen], items[chosen])
            return result
        # Not by index: a GPU would have to wait for the number of items.
        return torch.where(_per_item(chosen, clean), self._spoil(clean, items), clean)

    def _spoil(self, clean: Tensor, items: Tensor) -> Tensor:
        """All of the items corrupted."""
        raise NotImplementedError

    def describe(self) -> str:
        """A few words for the screen."""
        return f"{self.fraction:.0%} corrupted with {self._how()}"

    def _how(self) -> str:
        raise NotImplementedError

    def identity(self) -> dict:
        """What decides the corruption, JSON-able; compared when a run is resumed."""
        return {"kind": self.kind, **asdict(self)}


def _per_item(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.ndim - 1))


@dataclass(frozen=True)
class Corruption(ItemCorruption):
    """The paper's: Gaussian noise, ``y = x0 + sigma z``; float, never clipped.

    Source: Briglia et al. 2026, section 4; the fixed realisation as in Daras et al. 2024.
    """

    kind = "gaussian"
    keeps_8_bits = False
    fraction: float
    sigma: float
    seed: int

    def __bool__(self) -> bool:
        return self.fraction > 0 and self.sigma > 0

    def _spoil(self, clean: Tensor, items: Tensor) -> Tensor:
        shape = clean.shape[1:]
        element = element_index(0, (1, *shape), clean.device)
        index = _per_item(items * element.numel(), clean) + element
        word0, word1, _, _ = philox(self.seed, 0, index, Stream.CORRUPT_NOISE)
        return clean + normal(word0, word1, clean.dtype).mul_(self.sigma)

    def _how(self) -> str:
        return f"sigma {self.sigma:g}"

    def identity(self) -> dict:
        return asdict(self)  # as runs have it that are older than the other kinds


def _pixel_words(images: Tensor, items: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Two words for every pixel of (B, C, H, W), whatever its channels: (B, 1, H, W) each."""
    pixel = element_index(0, (1, 1, *images.shape[2:]), images.device)
    index = _per_item(items * pixel.numel(), images) + pixel
    return philox(seed, 0, index, Stream.CORRUPT_PIXEL)[:2]


def _black_white(images: Tensor) -> tuple[float, float]:
    return (0, 255) if images.dtype == torch.uint8 else (-1.0, 1.0)


@dataclass(frozen=True)
class SaltAndPepper(ItemCorruption):
    """A share ``pixels`` of the pixels of an image is black or white, one as likely as the other.
    """

    kind = "salt_pepper"
    fraction: float
    pixels: float
    seed: int

    def _spoil(self, clean: Tensor, items: Tensor) -> Tensor:
        black, white = _black_white(clean)
        hit, colour = _pixel_words(clean, items, self.seed)
        speck = torch.where(uniform(colour) < 0.5, black, white).to(clean.dtype)
        return torch.where(uniform(hit) < self.pixels, speck, clean)

    def _how(self) -> str:
        return f"salt and pepper on {self.pixels:.0%} of the pixels"


@dataclass(frozen=True)
class MissingPixels(ItemCorruption):
    """A share ``pixels`` of the pixels of an image is black, in all channels."""

    kind = "missing"
    fraction: float
    pixels: float
    seed: int

    def _spoil(self, clean: Tensor, items: Tensor) -> Tensor:
        hit, _ = _pixel_words(clean, items, self.seed)
        return clean.masked_fill(uniform(hit) < self.pixels, _black_white(clean)[0])

    def _how(self) -> str:
        return f"{self.pixels:.0%} of the pixels missing"


@dataclass(frozen=True)
class Jpeg(ItemCorruption):
    """An image was saved as JPEG of a low ``quality``, 1 to 95, colour at half the resolution.

    Pillow compresses; a fourth channel is left as it is.
    """

    kind = "jpeg"
    needs_host = True
    fraction: float
    quality: int
    seed: int

    def _spoil(self, clean: Tensor, items: Tensor) -> Tensor:
        is_float = clean.dtype != torch.uint8
        pixels = clean.add(1).mul_(127.5).round_().clamp_(0, 255).byte() if is_float else clean
        result = pixels.clone()
        for image, out in zip(pixels, result, strict=True):
            colours = min(len(image), 3)
            out[:colours] = self._compress(image[:colours])
        return result.to(clean.dtype).div_(127.5).sub_(1) if is_float else result

    def _compress(self, image: Tensor) -> Tensor:
        array = image.permute(1, 2, 0).numpy()
        file = io.BytesIO()
        picture = Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)
        picture.save(file, "JPEG", quality=self.quality, subsampling="4:2:0")
        decoded = np.array(Image.open(file))
        return torch.from_numpy(decoded).view(*array.shape).permute(2, 0, 1)

    def _how(self) -> str:
        return f"JPEG of quality {self.quality}"


@dataclass(frozen=True, eq=False)
class Outliers(ItemCorruption):
    """An image is replaced by one of another set, drawn with replacement.

    Args:
        images: (M, C, H, W) uint8, of the data set's shape.
        name: of the other set, for the screen.
        sha256: of the other set's images.
    """

    kind = "outliers"
    needs_host = True
    fraction: float
    images: Tensor
    seed: int
    name: str
    sha256: str

    def _spoil(self, clean: Tensor, items: Tensor) -> Tensor:
        _, word, _, _ = philox(self.seed, 0, items, Stream.CORRUPT_CHOICE)
        taken = self.images[(word * len(self.images)) >> 32]
        return taken if clean.dtype == torch.uint8 else taken.to(clean.dtype).div_(127.5).sub_(1)

    def describe(self) -> str:
        return f"{self.fraction:.0%} replaced by images of {self.name}"

    def identity(self) -> dict:
        return {"kind": self.kind, "fraction": self.fraction, "seed": self.seed,
                "sha256": self.sha256}
