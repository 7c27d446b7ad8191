"""Decoding pictures in worker processes, or in threads, while a run trains."""

from __future__ import annotations

import multiprocessing
import signal
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from robustdm.data.base import to_float
from robustdm.data.corruption import ItemCorruption
from robustdm.data.files import Pictures, printable
from robustdm.device import to_device
from robustdm.errors import RobustDMError, RunError


class Decoder(torch.utils.data.Dataset):
    """Decodes one picture at a time, in a worker process or in a thread.

    Item ``position`` is picture ``members[position]``. A broken one is replaced by the next that
    can be read, so the answer depends on the files alone.
    """

    # So many broken files in a row are not bad luck: the disk is gone.
    _MAX_TRIES = 100

    def __init__(self, pictures: Pictures, members: Tensor, resolution: int):
        self.pictures, self.members, self.resolution = pictures, members, resolution

    def __getitem__(self, position: int) -> tuple[Tensor | None, int, list[tuple[str, str]]]:
        """(pixels (C, R, R) uint8 or None, position they belong to, broken files met)."""
        pictures, broken = self.pictures, []
        for shift in range(min(self._MAX_TRIES, len(self.members))):
            place = (position + shift) % len(self.members)
            name = pictures.names[self.members[place]]
            pixels, reason = pictures.decode(name, self.resolution)
            if pixels is not None:
                return pixels, place, broken
            broken.append((printable(name), reason))
        return None, position, broken


@dataclass
class Decoded:
    """A batch of decoded pictures.

    Attributes:
        pixels: (B, C, R, R) uint8, or None if some could not be replaced.
        positions: (B,) int64, what the rows are.
        broken: (name, reason) of the broken files met.
    """

    pixels: Tensor | None
    positions: Tensor
    broken: list[tuple[str, str]]


class Collate:
    """Joins what a decoder gave to a batch, and corrupts it where that is the host's work.

    Runs in the worker: one tensor is one file handle to pass on, where a tensor per picture would
    use up the handles a process may have.

    Args:
        corruption: what to apply, None for nothing.
        members: (n,) items that positions stand for; None if they are items.
    """

    def __init__(self, corruption: ItemCorruption | None = None, members: Tensor | None = None):
        self.corruption, self.members = corruption, members

    def __call__(self, results: list[tuple[Tensor | None, int, list]]) -> Decoded:
        pixels = [pixels for pixels, _, _ in results]
        positions = torch.tensor([position for _, position, _ in results])
        broken = [entry for _, _, broken in results for entry in broken]
        if any(image is None for image in pixels):
            return Decoded(None, positions, broken)
        batch = torch.stack(pixels)
        if self.corruption is not None:
            items = positions if self.members is None else self.members[positions]
            batch = self.corruption(batch, items)
        return Decoded(batch, positions, broken)


class Packed:
    """A `Collate` whose tensors become arrays: these travel through a pipe, where tensors take
    shared memory, of which a container may have little; without room for them a batch never comes.
    """

    def __init__(self, collate: Collate):
        self.collate = collate

    def __call__(self, results: list) -> tuple:
        made = self.collate(results)
        pixels = None if made.pixels is None else made.pixels.numpy()
        return pixels, made.positions.numpy(), made.broken

    @staticmethod
    def unpack(packed: tuple) -> Decoded:
        pixels, positions, broken = packed
        pixels = None if pixels is None else torch.from_numpy(pixels)
        return Decoded(pixels, torch.from_numpy(positions), broken)


def start_worker(worker: int) -> None:
    """Set up a decoding process.

    The main process decides what a signal means; a worker that died of the Ctrl-C or SIGTERM sent
    to the whole group would take the run with it before the checkpoint. Workers end when told, or
    when the main process is gone.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    warnings.simplefilter("ignore")  # they would be printed over the progress line


def host_part(corruption: ItemCorruption | None) -> ItemCorruption | None:
    """The corruption, if it is applied where pictures are decoded."""
    return corruption if corruption and corruption.needs_host else None


def finish(
    pixels: Tensor, items: Tensor, corruption: ItemCorruption | None, device: torch.device
) -> Tensor:
    """Decoded images (B, C, R, R) uint8 to the device; there normalised, and corrupted by what the
    host has not done. Returns float32 in [-1, 1].
    """
    x = to_float(to_device(pixels, device))
    if corruption and not corruption.needs_host:
        return corruption(x, to_device(items, device))
    return x


def decode_in_workers(
    decoder: torch.utils.data.Dataset, order: Iterator[list], workers: int, collate: Collate,
    path: Path,
) -> Iterator[Decoded]:
    """Batches of an order, decoded by worker processes (in this one if ``workers`` is 0).

    Raises:
        RunError: if reading fails for good.
    """
    loader = torch.utils.data.DataLoader(
        decoder, batch_sampler=order, num_workers=workers, collate_fn=Packed(collate),
        worker_init_fn=start_worker,
        generator=torch.Generator(),  # else it would take a number from the global one
    )
    try:
        # As many as the loader takes: half made for want of them, it would print a traceback.
        [multiprocessing.Lock() for _ in range(8 + 3 * workers if workers else 0)]
        for packed in loader:
            yield Packed.unpack(packed)
    except RobustDMError:
        raise
    except Exception as error:  # a worker's comes with its traceback: the last line says what
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1][:300]
        raise RunError(f"reading images of {path} failed: {reason.strip()}; go on with --resume, "
                       "--workers 0 reads them in this process") from error
