"""What every data set offers, and the set that fits in memory."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

from robustdm.data.corruption import ItemCorruption
from robustdm.device import to_device
from robustdm.metrics import noise_level, spread
from robustdm.ops.stream import WORD, shuffled

# Sets up to this many elements (16 MiB as float32) are corrupted once instead of in every batch.
_PRECOMPUTE_ELEMENTS = 4 * 2**20
# Items corrupted at a time where a whole set is.
_CHUNK = 1024
# Sets smaller than this have no held-out part: one item of theirs says nothing.
_SMALLEST_SPLIT = 20


def split(total: int, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of the training and of the held-out items, each in rising order.

    The held-out part is a seeded random share, at least one item of a set of 20 or more.
    """
    count = 0
    if share > 0 and total >= _SMALLEST_SPLIT:
        count = min(max(1, round(share * total)), total - 1)
    # The last epoch number is out of reach of training, so this order is used nowhere else.
    order = shuffled(seed, WORD, total)
    return order[count:].sort().values, order[:count].sort().values


class Data:
    """A training set: noisy items to learn from, and what is known of the clean law.

    ``indices`` are positions among the training items, 0 to len(self) - 1; an *item* is an index
    in the whole set, of which ``members`` lists those that belong to this part. Corruption goes
    by item, so a held-out split does not change it.

    Attributes:
        name: name of the set.
        shape: (C, H, W) of images or (D,) of points.
        is_image: whether items are images.
        heldout: the part kept out of training, None if there is none.
        files: names of all items' files, None where they have none.
        quarantine: (path, reason) of the files that could not be read.
        note: what was done to files unlike the others, for the screen.
        members: (n,) int64 items of this part.
    """

    is_image = False
    note = ""
    files: list[str] | None = None

    def __init__(
        self, name: str, shape: tuple[int, ...], total: int, corruption: ItemCorruption | None,
        holdout: float, seed: int,
    ):
        self.name = name
        self.shape = tuple(shape)
        self.total = total
        self.corruption = corruption if corruption else None
        self.quarantine: list[tuple[str, str]] = []
        self.members, rest = split(total, holdout, seed)
        self._rest = rest

    @property
    def heldout(self) -> Data | None:
        """The held-out part: shares storage and corruption with this one."""
        if not len(self._rest):
            return None
        part = copy.copy(self)
        part.members, part._rest = self._rest, self._rest[:0]
        return part

    def __len__(self) -> int:
        return len(self.members)

    def names(self, indices: Tensor) -> list[str]:
        """What to call items in messages: their files, or their numbers in the whole set."""
        items = self.members[indices.cpu()].tolist()
        if self.files is None:
            return [str(item) for item in items]
        from robustdm.data.files import printable  # and with it Pillow, which points do without

        return [printable(self.files[item]) for item in items]

    def clean(self, indices: Tensor, device: torch.device | str = "cpu") -> Tensor:
        """(B, *shape) float32: the items without corruption."""
        raise NotImplementedError

    def batch(self, indices: Tensor, device: torch.device | str = "cpu") -> Tensor:
        """(B, *shape) float32: the training data, corruption included."""
        raise NotImplementedError

    def order(self, batch_size: int, seed: int, step: int) -> Iterator[Tensor]:
        """Indices (batch_size,) of every step from ``step`` on: sample k of the run is item k
        modulo the size of the set, of the permutation of epoch k // size.
        """
        size = len(self)
        epoch, permutation = -1, torch.empty(0)
        while True:
            pieces, k, end = [], step * batch_size, (step + 1) * batch_size
            while k < end:
                if k // size != epoch:
                    epoch = k // size
                    permutation = shuffled(seed, epoch, size)
                piece = permutation[k % size : k % size + end - k]
                pieces.append(piece)
                k += len(piece)
            yield torch.cat(pieces)
            step += 1

    def stream(
        self, order: Iterator[Tensor], device: torch.device | str, workers: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (batch, indices) for every index tensor of an endless ``order``."""
        for indices in order:
            yield self.batch(indices, device), indices

    def measure(self, samples: Tensor) -> dict[str, float]:
        """How far samples (N, *shape) are from the clean law, as far as that is known.

        Images always have ``noise_level``, the median over the samples of the white-noise
        estimate, texture included. Samples with a NaN or an infinity are left out and counted by
        ``finite_share``, which is there only if it is below 1.
        """
        samples = samples.detach().float().cpu()
        finite = samples.flatten(1).isfinite().all(dim=1)
        share = {} if finite.all() else {"finite_share": finite.double().mean().item()}
        if not finite.any():
            return share
        samples = samples[finite]
        if self.is_image and min(self.shape[1:]) >= 2:
            share["noise_level"] = noise_level(samples).median().item()
        return self._measure(samples) | share

    def _measure(self, samples: Tensor) -> dict[str, float]:
        return {}

    def score(self, x: Tensor, sigma: float) -> Tensor | None:
        """Gradient of the log of the clean density convolved with N(0, sigma^2 I), at x (N, D).

        None where the clean law is unknown. For ``x_t = a x0 + s eps`` the score of p_t at x_t is
        ``score(x_t / a, s / a) / a``.
        """
        return None

    def to_original(self, samples: Tensor) -> Tensor:
        """Samples in the units of the source: undoes the normalisation of point sets."""
        return samples

    def describe(self) -> str:
        """One line for the screen."""
        heldout = f", {len(self._rest)} held out" if len(self._rest) else ""
        size = "x".join(map(str, self.shape)) if self.is_image else f"R^{self.shape[0]}"
        text = f"{self.name}: {len(self)} items{heldout}, {size}, {self._noise_text()}"
        if self.note:
            text += f"; {self.note}"
        if self.quarantine:
            text += f"; {len(self.quarantine)} broken files left out"
        return text

    def _noise_text(self) -> str:
        return self.corruption.describe() if self.corruption else "not corrupted"

    def identity(self) -> dict:
        """What decides the training data, JSON-able; compared when a run is resumed."""
        return {
            "name": self.name,
            "count": len(self),
            "heldout": len(self._rest),
            "shape": list(self.shape),
            "sha256": self._fingerprint(),
            "corruption": self.corruption.identity() if self.corruption else None,
        }

    def _fingerprint(self) -> str:
        raise NotImplementedError


class TensorData(Data):
    """A set held in one tensor, moved to the device at first use.

    Args:
        values: (N, *shape) clean items; uint8 stands for [-1, 1] by ``v / 127.5 - 1``.
        observed: (N, *shape) noisy items like ``values``, where they are not ``corruption`` of the
            clean.
        resident: keep the set on the device; otherwise each batch is gathered in host memory.
        fingerprint: sha256 of what a generated set is made from. Its values are not hashed, since
            they may differ in the last bit from one processor to another.
    """

    def __init__(
        self, name: str, values: Tensor, corruption: ItemCorruption | None, holdout: float,
        seed: int, observed: Tensor | None = None, resident: bool = True,
        fingerprint: str | None = None,
    ):
        super().__init__(name, values.shape[1:], len(values), corruption, holdout, seed)
        self.values = values
        self.resident = resident
        self.observed = observed
        self._sha256 = fingerprint
        # Shared with the held-out part, so that a device holds the set once.
        self._copies: dict[tuple[str, torch.device], Tensor] = {}
        if observed is None and self.corruption:
            items = torch.arange(len(values))
            if self.corruption.keeps_8_bits:
                pieces = zip(values.split(_CHUNK), items.split(_CHUNK), strict=True)
                self.observed = torch.cat([self.corruption(*piece) for piece in pieces])
            elif values.numel() <= _PRECOMPUTE_ELEMENTS:
                self.observed = self.corruption(to_float(values), items)

    def _gather(self, name: str, items: Tensor, device: torch.device) -> Tensor:
        if not self.resident:
            return to_device(getattr(self, name)[items], device)
        key = (name, device)
        if key not in self._copies:
            self._copies[key] = getattr(self, name).to(device)
        return self._copies[key][to_device(items, device)]

    def clean(self, indices: Tensor, device: torch.device | str = "cpu") -> Tensor:
        return to_float(self._gather("values", self.members[indices.cpu()], torch.device(device)))

    def batch(self, indices: Tensor, device: torch.device | str = "cpu") -> Tensor:
        items = self.members[indices.cpu()]
        if self.observed is not None:
            return to_float(self._gather("observed", items, torch.device(device)))
        clean = self.clean(indices, device)
        return self.corruption(clean, to_device(items, clean.device)) if self.corruption else clean

    def all_clean(self) -> Tensor:
        """(N, *shape) float32: every clean item of the whole set, the reference of measures."""
        return to_float(self.values)

    def _fingerprint(self) -> str:
        if self._sha256 is None:
            self._sha256 = sha256_of(self.values)
        return self._sha256


def to_float(values: Tensor) -> Tensor:
    """uint8 0..255 to float32 in [-1, 1]; float values as they are."""
    return values.float().div_(127.5).sub_(1) if values.dtype == torch.uint8 else values


def sha256_of(values: Tensor) -> str:
    """Hash of a tensor's bytes."""
    return hashlib.sha256(memoryview(values.contiguous().numpy()).cast("B")).hexdigest()


def measure_images(samples: Tensor) -> dict[str, float]:
    """What can be said without knowing the clean law: ``pixel_std``, the mean per-pixel std."""
    return {"pixel_std": spread(samples)}


class ImageTensor(TensorData):
    """Images in one tensor (N, C, H, W), uint8 or float32 in [-1, 1]."""

    is_image = True

    def _measure(self, samples: Tensor) -> dict[str, float]:
        return measure_images(samples)
