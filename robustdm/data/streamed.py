"""Images that come as a stream: no length, no way back, never downloaded as a whole."""

from __future__ import annotations

import io
import itertools
import os
import queue
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import torch
from torch import Tensor

from robustdm.data.base import ImageTensor
from robustdm.data.corruption import ItemCorruption
from robustdm.data.databases import HubStream, is_hub, sha256_of_files
from robustdm.data.decode import quiet
from robustdm.data.files import Pictures, check_quarantine, scan
from robustdm.data.workers import Collate, Decoded, decode_in_workers, finish, host_part
from robustdm.errors import RunError, UsageError
from robustdm.ops.stream import shuffled

if TYPE_CHECKING:
    from robustdm.runs.config import TrainConfig

# Rows at the beginning that are held decoded: what can be looked at, and the held-out part.
HEAD = 1024


class _Rows:
    """Picture files in memory, as a `Source`."""

    def __init__(self, path: Path, contents: list[bytes]):
        self.path, self.contents = path, contents
        self.names = [f"row {row}" for row in range(len(contents))]

    def open(self, name: str) -> BinaryIO:
        return io.BytesIO(self.contents[int(name.split()[1])])

    def stamp(self, name: str) -> int:
        return len(self.open(name).getbuffer())


class _RowDecoder(torch.utils.data.Dataset):
    """Decodes a row, which comes as (item, picture file): what `Decoder` is to files."""

    def __init__(self, like: Pictures, resolution: int):
        self.channels, self.crop, self.resolution = like.channels, like.crop, resolution

    def __getitem__(self, row: tuple[int, bytes]) -> tuple[Tensor | None, int, list]:
        item, content = row
        one = Pictures(_Rows(Path(), [content]), [], self.channels, 1, self.crop)
        pixels, reason = one.decode("row 0", self.resolution)
        return pixels, item, [] if reason is None else [(f"row {item}", reason)]


def _filled(results: list[tuple[Tensor | None, int, list]]) -> list:
    """Broken rows replaced by the next one of the batch that can be read, as far as there is one.
    """
    good = [(pixels, item) for pixels, item, _ in results if pixels is not None]
    if not good:
        return results
    filled, last = [], good[0]
    for pixels, item, broken in reversed(results):
        last = last if pixels is None else (pixels, item)
        filled.append((*last, broken))
    return filled[::-1]


class _FillingCollate(Collate):
    def __call__(self, results: list) -> Decoded:
        return super().__call__(_filled(results))


@dataclass
class Beginning:
    """The first rows of a stream, at most `HEAD`.

    Attributes:
        source: the stream.
        contents: the rows' picture files.
        pictures: what their headers tell.
    """

    source: HubStream
    contents: list[bytes]
    pictures: Pictures

    @classmethod
    def read(cls, config: TrainConfig) -> Beginning:
        """Read the beginning of the stream that a configuration names.

        Raises:
            UsageError: if there is no such stream, or no images in it.
            RunError: if it cannot be read.
        """
        if not is_hub(config.data_dir):
            raise UsageError(f"stream is True, but data_dir is {str(config.data_dir)!r}: only "
                             "hf:NAME can be streamed, leave --stream out")
        source = HubStream(config.data_dir)
        try:
            contents = list(itertools.islice(source.read(0), HEAD))
        except Exception as error:
            raise _failed(source.path, error) from error
        if not contents:
            raise UsageError(f"data_dir is {str(source.path)!r}: the stream is empty")
        rows = _Rows(source.path, contents)
        return cls(source, contents, scan(rows, 1.0, config.channels, config.crop))


class StreamedImages(ImageTensor):
    """A stream of images, item k being its row k.

    The first rows are decoded at the start. They are what indices stand for: what is measured,
    shown and held out is of them. Training goes through all rows but those held out, again and
    again in the order of the stream, in blocks of ``shuffle_buffer`` rows that are shuffled each: a
    pure function of the step, whatever the number of workers. To begin at a later step, the rows of
    the present round before it are read and dropped.

    Raises:
        UsageError: if none of the first rows can be read.
        RunError: if too many of them are broken.
    """

    def __init__(
        self, name: str, beginning: Beginning, config: TrainConfig,
        corruption: ItemCorruption | None,
    ):
        source, contents = beginning.source, beginning.contents
        self._source, self._decoder = source, _RowDecoder(beginning.pictures, config.resolution)
        self.buffer, self.max_bad, self.seed = config.shuffle_buffer, config.max_bad, config.seed
        with quiet(), ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            results = list(pool.map(self._decoder.__getitem__, enumerate(contents)))
        decoded = _FillingCollate()(results)
        if decoded.pixels is None:
            raise UsageError(f"data_dir is {str(source.path)!r}: none of its first {len(contents)} "
                             "images can be read")
        super().__init__(name, decoded.pixels, corruption, config.holdout, config.seed,
                         resident=False, fingerprint=sha256_of_files(contents))
        # Not a random part: these rows are left out of every round.
        self._held = len(self._rest)
        self.members = torch.arange(self._held, len(contents))
        self._rest = torch.arange(self._held)
        self.note = beginning.pictures.note
        self._seen = len(contents)
        self._note_broken(decoded.broken)

    def _note_broken(self, broken: list[tuple[str, str]]) -> None:
        self.quarantine.extend(entry for entry in broken if entry not in self.quarantine)
        check_quarantine(self.quarantine, self._seen, self.max_bad)

    def names(self, indices: Tensor) -> list[str]:
        return [f"row {row}" for row in indices.tolist()]

    def order(self, batch_size: int, seed: int, step: int) -> Iterator[Tensor]:
        """Numbers (batch_size,) of the samples of every step, which `stream` finds the rows for."""
        for first in itertools.count(step * batch_size, batch_size):
            yield torch.arange(first, first + batch_size)

    def stream(
        self, order: Iterator[Tensor], device: torch.device | str, workers: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        first = next(order)
        reader = _Reader(self._rows(int(first[0]) // self.buffer * self.buffer))
        collate = _FillingCollate(host_part(self.corruption))
        try:
            loaded = decode_in_workers(
                self._decoder, self._batches(reader, itertools.chain([first], order)), workers,
                collate, self._source.path,
            )
            for decoded in loaded:
                self._seen += len(decoded.positions)
                self._note_broken(decoded.broken)
                if decoded.pixels is None:
                    raise RunError(f"{self._source.path}: none of {len(decoded.positions)} rows in "
                                   "a row can be read; check the source, then go on with --resume")
                items = decoded.positions
                x = finish(decoded.pixels, items, self.corruption, torch.device(device))
                yield x, items
            raise reader.error
        finally:
            reader.stop()

    def _batches(self, reader: _Reader, order: Iterator[Tensor]) -> Iterator[list]:
        """(item, picture file) of every sample of every step, until the reader fails."""
        number, block = None, []
        for samples in order:
            rows = []
            for sample in samples.tolist():
                if number is None:  # the reader begins with the first sample's block
                    number = sample // self.buffer - 1
                while number < sample // self.buffer:
                    number += 1
                    taken = reader.take(self.buffer)
                    if reader.error is not None:
                        return
                    block = [taken[k] for k in shuffled(self.seed, number, self.buffer)]
                rows.append(block[sample % self.buffer])
            yield rows

    def _rows(self, place: int) -> Iterator[tuple[int, bytes]]:
        """(item, picture file) from a place on in the endless sequence of training rows."""
        source, held = self._source, self._held
        size = None if source.size is None else source.size - held
        try:
            while True:
                start, count = place % size if size else place, 0
                for content in source.read(held + start):
                    yield held + start + count, content
                    count += 1
                if size is None:
                    # Begun beyond the end: how long the stream is, only its end tells.
                    size = start + count if count else sum(1 for _ in source.read(held))
                if not size or not count and size > start:
                    raise OSError("it has ended early")
                place += count
        except Exception as error:
            raise _failed(source.path, error) from error

    def describe(self) -> str:
        text = super().describe()
        items = "a stream" if self._source.size is None else f"a stream of {self._source.size}"
        return text.replace(f"{len(self)} items", items, 1)

    def identity(self) -> dict:
        return super().identity() | {"count": self._source.size, "buffer": self.buffer}


def _failed(path: Path, error: Exception) -> RunError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return RunError(f"reading {path} failed: {reason}; go on with --resume when it is back")


class _Reader:
    """Reads rows in a thread, up to one block ahead of what is taken.

    Attributes:
        error: why there are no more rows. Not raised where rows are taken: that is inside a
            DataLoader, which would leave its workers behind, and what they have to deliver.
    """

    def __init__(self, rows: Iterator[tuple[int, bytes]]):
        self.error: RunError | None = None
        self._rows, self._stopped = rows, threading.Event()
        self._ready: queue.Queue | None = None

    def take(self, count: int) -> list[tuple[int, bytes]]:
        """The next ``count`` rows; fewer only with an error."""
        if self._ready is None:
            # Not before: worker processes are forked first, and a fork wants no threads.
            self._ready = queue.Queue(count)
            threading.Thread(target=self._read, daemon=True).start()
        taken = []
        while len(taken) < count:
            row = self._ready.get()
            if isinstance(row, RunError):
                self.error = row
                break
            taken.append(row)
        return taken

    def _read(self) -> None:
        try:
            for row in self._rows:
                self._put(row)
                if self._stopped.is_set():
                    break
        except RunError as error:
            self._put(error)
        finally:
            self._rows.close()

    def _put(self, row) -> None:
        while not self._stopped.is_set():
            try:
                return self._ready.put(row, timeout=0.2)
            except queue.Full:
                pass

    def stop(self) -> None:
        """End the thread, at the latest after the row it is reading."""
        self._stopped.set()
