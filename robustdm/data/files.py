"""Sources of pictures: folders and zips (and what `databases` adds), listed, checked, decoded at
once or streamed by workers."""

from __future__ import annotations

import hashlib
import io
import os
import sys
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Protocol

import torch
from torch import Tensor

from robustdm.data.decode import MAX_PACKED, SUFFIXES, BadImage, decode, quiet, read_header
from robustdm.errors import RunError, UsageError

# Tasks handed to the thread pool at a time: bounds its queue for sets of millions.
_CHUNK = 1024


class Source(Protocol):
    """Where pictures are read from, by name."""

    path: Path
    names: list[str]

    def open(self, name: str) -> BinaryIO:
        """Raises OSError or BadImage if it cannot be read."""

    def stamp(self, name: str) -> int:
        """Changes when the picture does, as far as can be told without decoding it."""


class Folder:
    """Pictures below a folder, by relative path; links to folders are followed once."""

    def __init__(self, path: Path):
        self.path = path
        self.names = sorted(self._walk())

    def _walk(self) -> Iterator[str]:
        seen = set()
        for parent, folders, names in os.walk(self.path, followlinks=True):
            place = os.path.realpath(parent)
            if place in seen:
                folders.clear()
                continue
            seen.add(place)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in names:
                file = Path(parent, name)
                if _is_picture(name) and file.is_file():
                    yield file.relative_to(self.path).as_posix()

    def open(self, name: str) -> BinaryIO:
        """Raises OSError if the file is gone."""
        return open(self.path / name, "rb")

    def stamp(self, name: str) -> int:
        """Changes when the file's length does; -1 if it is gone."""
        try:
            return (self.path / name).stat().st_size
        except OSError:
            return -1


class Zip:
    """Pictures in a zip, read in place. EDM's form (``dataset.json``, stored) or any other."""

    def __init__(self, path: Path):
        self.path = path
        self._opened: tuple[int, zipfile.ZipFile] | None = None
        try:
            members = self._archive().namelist()
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
            raise UsageError(f"{path}: not a readable zip: {error}") from None
        self.names = sorted({name for name in members if _is_picture(name)})

    def _archive(self) -> zipfile.ZipFile:
        # A process that was forked must not share the parent's file position.
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = (os.getpid(), zipfile.ZipFile(self.path))
        return self._opened[1]

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_opened": None}

    def open(self, name: str) -> BinaryIO:
        """Raises BadImage for a damaged, encrypted or absurdly large member."""
        try:
            archive = self._archive()
            if archive.getinfo(name).file_size > MAX_PACKED:
                raise BadImage(f"larger than {MAX_PACKED} bytes")
            return io.BytesIO(archive.read(name))
        except BadImage:
            raise
        except Exception as error:  # wrong CRC, encryption, unknown method, damaged stream
            raise BadImage(f"{type(error).__name__}: {' '.join(str(error).split())}") from None

    def stamp(self, name: str) -> int:
        """Changes when the file's content does."""
        return self._archive().getinfo(name).CRC


def _is_picture(name: str) -> bool:
    """By its suffix; hidden files and what macOS adds to zips are none."""
    hidden = any(
        part == "__MACOSX" or part.startswith(".") and part.strip(".") for part in name.split("/")
    )
    return not hidden and Path(name).suffix.lower() in SUFFIXES


def printable(name: str) -> str:
    """A file name in one line that any terminal and any UTF-8 file takes."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def check_quarantine(quarantine: list[tuple[str, str]], total: int, max_bad: float) -> None:
    """Raise a RunError if more than the share ``max_bad`` of ``total`` files cannot be read."""
    if len(quarantine) > max_bad * total:
        first = "; ".join(f"{name} ({reason})" for name, reason in quarantine[:3])
        raise RunError(
            f"{len(quarantine)} of {total} images cannot be read, more than --max-bad {max_bad:g} "
            f"allows: {first}{'; ...' if len(quarantine) > 3 else ''}. Remove or repair them, or "
            "raise --max-bad"
        )


@dataclass
class Pictures:
    """The usable pictures of a source.

    Attributes:
        source: where they are read from.
        names: their names, sorted.
        channels: 1, 3 or 4.
        found: number of files, broken ones included.
        crop: side of the square cut out of the middle of each, 0 for the largest there is.
        sizes: how many pictures there are of each (width, height).
        quarantine: (name, reason) of the broken files so far.
        note: what was done to files unlike the others, for the screen.
    """

    source: Source
    names: list[str]
    channels: int
    found: int
    crop: int = 0
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    quarantine: list[tuple[str, str]] = field(default_factory=list)
    note: str = ""

    def fingerprint(self) -> str:
        """sha256 of names and sizes (zip: checksums), channels and crop; no pixels are read."""
        lines = (f"{printable(name)} {self.source.stamp(name)}\n" for name in self.names)
        crop = f" crop {self.crop}" if self.crop else ""
        return hashlib.sha256(f"{self.channels}{crop}\n{''.join(lines)}".encode()).hexdigest()

    def decode(self, name: str, resolution: int) -> tuple[Tensor | None, str | None]:
        """(pixels (C, resolution, resolution) uint8, None), or (None, why it is broken)."""
        return attempt(
            lambda file: decode_tensor(file, self.channels, resolution, self.crop), self.source,
            name,
        )


def open_pictures(path: Path) -> Source:
    """Raises UsageError if ``path`` is no source of pictures, or has none."""
    from robustdm.data import databases

    if databases.is_hub(path):
        source = databases.HubPictures(path)
    elif databases.is_lmdb(path):
        source = databases.Lmdb(path)
    elif path.is_dir():
        source = Folder(path)
    elif path.suffix.lower() == ".zip":
        source = Zip(path)
    else:
        raise UsageError(f"data_dir is {str(path)!r}: name a folder, a .zip, an .npy or an .npz")
    if not source.names:
        raise UsageError(f"data_dir is {str(path)!r}: no images there ({', '.join(_COMMON)})")
    return source


_COMMON = ("png", "jpg", "webp", "bmp", "gif", "tiff", "ppm")


def attempt(function: Callable, source: Source, name: str):
    """(result, None) or (None, reason)."""
    try:
        with source.open(name) as file:
            return function(file), None
    except BadImage as error:
        return None, str(error)
    except OSError as error:
        return None, error.strerror or type(error).__name__
    except Exception as error:  # nobody thought of it: its file is to be named all the same
        return None, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def decode_tensor(file: BinaryIO, channels: int, resolution: int, crop: int) -> Tensor:
    """`decode` as a tensor of its own."""
    return torch.from_numpy(decode(file, channels, resolution, crop).copy())


def _in_threads(function: Callable, names: list[str], title: str) -> Iterable:
    def results():
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            for start in range(0, len(names), _CHUNK):
                yield from pool.map(function, names[start : start + _CHUNK])

    if not sys.stderr.isatty():
        return results()
    from rich.console import Console
    from rich.progress import track

    return track(
        results(), title, total=len(names), console=Console(stderr=True), transient=True
    )


def scan(
    source: Source, max_bad: float, channels: int | None = None, crop: int = 0
) -> Pictures:
    """Read the header of every file and settle the number of channels: 1 if all pictures are grey,
    4 if all have transparency, else 3, unless ``channels`` says.

    Raises:
        RunError: if too many files are no pictures.
    """
    names, headers, quarantine = [], [], []
    with quiet():
        tries = _in_threads(
            lambda name: attempt(lambda file: read_header(file, crop), source, name),
            source.names, "Reading headers",
        )
        for name, (header, reason) in zip(source.names, tries, strict=True):
            if header is None:
                quarantine.append((printable(name), reason))
            else:
                names.append(name)
                headers.append(header)
    if not names:
        raise UsageError(f"data_dir is {str(source.path)!r}: none of its images can be read"
                         f" ({quarantine[0][0]}: {quarantine[0][1]})")
    check_quarantine(quarantine, len(source.names), max_bad)
    alpha = sum(header.alpha for header in headers)
    grey = sum(header.grey for header in headers)
    colour = len(headers) - grey
    if channels is None:
        channels = 4 if alpha == len(headers) else 1 if not colour else 3
    notes = []
    if alpha and channels != 4:
        notes.append(f"{alpha} with transparency laid on white")
    if grey and channels == 3:
        notes.append(f"{grey} grey ones made RGB")
    if colour and channels == 1:
        notes.append(f"{colour} coloured ones made grey")
    return Pictures(source, names, channels, len(source.names), crop,
                    Counter(header.size for header in headers), quarantine, ", ".join(notes))


def decode_all(pictures: Pictures, resolution: int, max_bad: float) -> Tensor:
    """Decode every picture: (N, C, resolution, resolution) uint8. Broken ones go to quarantine
    and leave ``pictures.names``.

    Raises:
        RunError: if too many files are broken.
    """
    good = []
    result = torch.empty(
        len(pictures.names), pictures.channels, resolution, resolution, dtype=torch.uint8
    )
    with quiet():
        tries = _in_threads(
            lambda name: pictures.decode(name, resolution), pictures.names, "Decoding images"
        )
        for name, (pixels, reason) in zip(pictures.names, tries, strict=True):
            if pixels is None:
                pictures.quarantine.append((printable(name), reason))
            else:
                result[len(good)] = pixels
                good.append(name)
    check_quarantine(pictures.quarantine, pictures.found, max_bad)
    if not good:
        raise UsageError(f"data_dir is {str(pictures.source.path)!r}: no image can be read")
    pictures.names = good
    return result[: len(good)]
