"""CIFAR-10 and CIFAR-100 from a local copy: the official archive, packed or extracted, or sprites.

The python version is a pickle. It is read by an unpickler that builds nothing but plain
containers and byte arrays, so a hostile file can run no code; archives are never extracted.
"""

from __future__ import annotations

import gzip
import io
import itertools
import pickle
import pickletools
import re
import tarfile
import zlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from robustdm.data.decode import BadImage, decode_pixels
from robustdm.errors import UsageError

_SIDE = 32
_PIECE = 1 << 20  # bytes of an archive read at once
# A batch takes a few for each of its images; one of them is a byte that may stand for 64.
_OPERATIONS = 1 << 21


@dataclass(frozen=True)
class Edition:
    """How one of the two sets is packed.

    Attributes:
        title: its name for people.
        stem: what the names of its archives and folders begin with.
        batches: files with the training images.
        labels: bytes before an image in the binary version.
        max_bytes: more than the official files have.
    """

    title: str
    stem: str
    batches: tuple[str, ...]
    labels: int
    max_bytes: int

    @property
    def url(self) -> str:
        return f"https://www.cs.toronto.edu/~kriz/{self.stem}-python.tar.gz"

    @property
    def archives(self) -> tuple[str, ...]:
        return f"{self.stem}-python.tar.gz", f"{self.stem}-binary.tar.gz"

    def folders(self, path: Path) -> tuple[Path, ...]:
        """Where the extracted files may lie: below ``path``, or there if nothing else is called
        like that."""
        return (path / f"{self.stem}-batches-py", path / f"{self.stem}-batches-bin",
                path / f"{self.stem}-python", path / f"{self.stem}-binary", path)


EDITIONS = {
    "cifar10": Edition("CIFAR-10", "cifar-10", tuple(f"data_batch_{k}" for k in range(1, 6)), 1,
                       64 * 2**20),
    "cifar100": Edition("CIFAR-100", "cifar-100", ("train",), 2, 256 * 2**20),
}


def default_dir(name: str) -> Path:
    """Where a copy is looked for if no path is given."""
    return Path("data") / name


def load_cifar(path: Path, name: str | None = None) -> Tensor | None:
    """The training images of a copy of CIFAR-10 or CIFAR-100: (N, 3, 32, 32) uint8, as stored.

    Args:
        path: the archive, a folder that holds it, the extracted folder or its parent, or a folder
            of sprites ``train_0.webp``, ...: images in rows of 20 or any other number.
        name: cifar10 or cifar100, the one that is wanted; either if None.

    Returns:
        None if there is nothing of the kind (the path may still be a folder of images).

    Raises:
        UsageError: if it is incomplete or damaged, or the other of the two.
    """
    if path.is_file():
        if not re.search(r"\.(tar|tar\.gz|tgz)$", path.name):
            return None
        return _checked(*_from_tar(path), path, name)
    for edition in EDITIONS.values():
        for folder in edition.folders(path):
            for suffix in ("", ".bin"):
                if (folder / (edition.batches[0] + suffix)).is_file():
                    return _checked(edition, _from_folder(folder, edition, suffix), path, name)
        for archive in edition.archives:
            if (path / archive).is_file():
                return _checked(*_from_tar(path / archive), path, name)
    sprites = [
        file for file in path.glob("train_*") if re.fullmatch(r"train_\d+\.(webp|png)", file.name)
    ]
    if sprites:
        return _from_sprites(sorted(sprites, key=lambda file: int(file.stem.split("_")[1])))
    return None


def _checked(edition: Edition, images: Tensor, path: Path, name: str | None) -> Tensor:
    if name is not None and edition is not EDITIONS[name]:
        found = next(key for key, value in EDITIONS.items() if value is edition)
        raise UsageError(f"data is {name!r}, but {path} holds {edition.title}: use --data {found}")
    return images


def _damaged(path: Path, why: str, edition: Edition) -> UsageError:
    return UsageError(f"{path}: {why}: the copy is damaged, download {edition.url} again")


def _from_folder(folder: Path, edition: Edition, suffix: str) -> Tensor:
    batches = {}
    for name in edition.batches:
        file = folder / (name + suffix)
        if file.is_file() and file.stat().st_size <= edition.max_bytes:
            batches[file.name] = file.read_bytes()
    return _join(folder, edition, batches)


def _from_tar(path: Path) -> tuple[Edition, Tensor]:
    """Raises UsageError if it is damaged or holds neither set."""
    found: dict[str, dict[str, bytes]] = {name: {} for name in EDITIONS}
    guess = EDITIONS["cifar100" if "100" in path.name else "cifar10"]
    try:
        with _Bounded(path) as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
            for member in archive:
                file = member.name.rsplit("/", 1)[-1]
                for name, edition in EDITIONS.items():
                    wanted = file.removesuffix(".bin") in edition.batches
                    if wanted and member.isreg() and member.size <= edition.max_bytes:
                        pieces = iter(partial(archive.extractfile(member).read, _PIECE), b"")
                        found[name][file] = b"".join(pieces)
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise _damaged(path, " ".join(str(error).split()), guess) from None
    name = next((name for name, batches in found.items() if batches), None)
    edition = EDITIONS[name] if name else guess
    return edition, _join(path, edition, found[name] if name else {})


class _Bounded:
    """The stream of an archive, of which a header may ask for any number of bytes at once."""

    def __init__(self, path: Path):
        self._file = open(path, "rb")
        packed = self._file.read(2) == b"\x1f\x8b"
        self._file.seek(0)
        self._stream = gzip.GzipFile(fileobj=self._file) if packed else self._file
        self.seek, self.tell = self._stream.seek, self._stream.tell

    def __enter__(self) -> _Bounded:
        return self

    def __exit__(self, *_) -> None:
        self._file.close()

    def read(self, size: int) -> bytes:
        if size > _PIECE:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._stream.read(size)


def _join(path: Path, edition: Edition, batches: dict[str, bytes]) -> Tensor:
    parts = []
    for name in edition.batches:
        if name in batches:
            parts.append(_python_batch(batches[name], path, name, edition))
        elif name + ".bin" in batches:
            parts.append(_binary_batch(batches[name + ".bin"], path, name + ".bin", edition))
        else:
            raise _damaged(path, f"{name} is missing", edition)
    return torch.from_numpy(np.concatenate(parts).reshape(-1, 3, _SIDE, _SIDE))


def _binary_batch(content: bytes, path: Path, name: str, edition: Edition) -> np.ndarray:
    record = edition.labels + 3 * _SIDE * _SIDE
    if not content or len(content) % record:
        raise _damaged(path, f"{name} has {len(content)} bytes, no multiple of {record}", edition)
    return np.frombuffer(content, np.uint8).reshape(-1, record)[:, edition.labels:]


class _Dtype:
    """Stands for numpy.dtype while unpickling: uint8 or nothing."""

    def __init__(self, code="", *_):
        if code not in ("u1", b"u1"):
            raise pickle.UnpicklingError(f"dtype {code!r} instead of u1")

    def __setstate__(self, state):
        pass


class _Array:
    """Stands for numpy.ndarray while unpickling: keeps shape and bytes, checked afterwards."""

    def __init__(self, *_):
        self.array = None

    def __setstate__(self, state):
        _, shape, _, fortran, content = state
        array = np.frombuffer(content, np.uint8)
        self.array = array.reshape(shape, order="F" if fortran else "C")


class _Unpickler(pickle.Unpickler):
    """Knows a few names, and answers each with a stand-in of this module."""

    _NAMES = {
        ("numpy.core.multiarray", "_reconstruct"): _Array,
        ("numpy._core.multiarray", "_reconstruct"): _Array,
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _Dtype,
    }

    def __init__(self, content: bytes):
        super().__init__(io.BytesIO(content), encoding="bytes")
        self._left = len(content)

    def _encode(self, text, encoding):
        """Stands for codecs.encode, by which Python 3 writes bytes into old pickles: each once, so
        there is no more to encode than the file is long."""
        if not isinstance(text, str) or encoding != "latin1":
            raise pickle.UnpicklingError(f"encoding {encoding!r}")
        self._left -= len(text)
        if self._left < 0:
            raise pickle.UnpicklingError("the file stands for more than it is long")
        return text.encode("latin1")

    def find_class(self, module, name):
        if (module, name) == ("_codecs", "encode"):
            return self._encode
        if (module, name) not in self._NAMES:
            raise pickle.UnpicklingError(f"the file asks for {module}.{name}, which is refused")
        return self._NAMES[module, name]


def _python_batch(content: bytes, path: Path, name: str, edition: Edition) -> np.ndarray:
    try:
        operations = itertools.islice(pickletools.genops(content), _OPERATIONS + 1)
        if sum(1 for _ in operations) > _OPERATIONS:
            raise ValueError("it makes millions of objects")
        batch = _Unpickler(content).load()
        array = (batch[b"data"] if b"data" in batch else batch["data"]).array
        if array.ndim != 2 or array.shape[1] != 3 * _SIDE * _SIDE:
            raise ValueError(f"its array has shape {array.shape}")
    except Exception as error:  # a damaged pickle raises almost anything
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise _damaged(path, f"{name} is not a batch of {edition.title} ({reason})",
                       edition) from None
    return array


def _from_sprites(files: list[Path]) -> Tensor:
    parts = []
    for file in files:
        try:
            with open(file, "rb") as stream:
                pixels = decode_pixels(stream)
        except (BadImage, OSError) as error:
            raise UsageError(f"{file}: {error}: the copy is damaged, copy it again") from None
        rows, columns = pixels.shape[0] // _SIDE, pixels.shape[1] // _SIDE
        if pixels.shape[:2] != (rows * _SIDE, columns * _SIDE):
            raise UsageError(f"{file}: {pixels.shape[1]}x{pixels.shape[0]} pixels are no sprite "
                             f"of {_SIDE}x{_SIDE} images")
        grid = pixels.reshape(rows, _SIDE, columns, _SIDE, 3)
        parts.append(grid.transpose(0, 2, 4, 1, 3).reshape(-1, 3, _SIDE, _SIDE))
    return torch.from_numpy(np.concatenate(parts))
