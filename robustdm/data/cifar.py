"""CIFAR-10 from a local copy: the official archive, packed or extracted, or sprites.

The python version is a pickle. It is read by an unpickler that builds nothing but plain
containers and byte arrays, so a hostile file can run no code; archives are never extracted.
"""

from __future__ import annotations

import io
import pickle
import re
import tarfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from robustdm.data.decode import BadImage, decode_pixels
from robustdm.errors import UsageError

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
DEFAULT_DIR = Path("data/cifar10")
_ARCHIVES = ("cifar-10-python.tar.gz", "cifar-10-binary.tar.gz")
_FOLDERS = (".", "cifar-10-batches-py", "cifar-10-batches-bin")
_BATCHES = tuple(f"data_batch_{k}" for k in range(1, 6))
# The official batches have 31 MB; more is not CIFAR-10.
_MAX_BATCH_BYTES = 64 * 2**20
_SIDE = 32
_RECORD = 1 + 3 * _SIDE * _SIDE


def load_cifar(path: Path) -> Tensor | None:
    """The training images of a copy of CIFAR-10: (N, 3, 32, 32) uint8, as stored.

    Args:
        path: the archive, a folder that holds it, the extracted folder or its parent, or a folder
            of sprites ``train_0.webp``, ...: images in rows of 20 or any other number.

    Returns:
        None if there is nothing of the kind (the path may still be a folder of images).

    Raises:
        UsageError: if it is incomplete or damaged.
    """
    if path.is_file():
        return _from_tar(path) if re.search(r"\.(tar|tar\.gz|tgz)$", path.name) else None
    for folder in _FOLDERS:
        for suffix in ("", ".bin"):
            if (path / folder / (_BATCHES[0] + suffix)).is_file():
                return _from_folder(path / folder, suffix)
    for name in _ARCHIVES:
        if (path / name).is_file():
            return _from_tar(path / name)
    sprites = [
        file for file in path.glob("train_*") if re.fullmatch(r"train_\d+\.(webp|png)", file.name)
    ]
    if sprites:
        return _from_sprites(sorted(sprites, key=lambda file: int(file.stem.split("_")[1])))
    return None


def _damaged(path: Path, why: str) -> UsageError:
    return UsageError(f"{path}: {why}: the copy is damaged, download {URL} again")


def _from_folder(folder: Path, suffix: str) -> Tensor:
    batches = {}
    for name in _BATCHES:
        file = folder / (name + suffix)
        if file.is_file() and file.stat().st_size <= _MAX_BATCH_BYTES:
            batches[file.name] = file.read_bytes()
    return _join(folder, batches)


def _from_tar(path: Path) -> Tensor:
    batches = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                name = member.name.rsplit("/", 1)[-1]
                wanted = name.removesuffix(".bin") in _BATCHES
                if wanted and member.isreg() and member.size <= _MAX_BATCH_BYTES:
                    batches[name] = archive.extractfile(member).read()
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise _damaged(path, " ".join(str(error).split())) from None
    return _join(path, batches)


def _join(path: Path, batches: dict[str, bytes]) -> Tensor:
    parts = []
    for name in _BATCHES:
        if name in batches:
            parts.append(_python_batch(batches[name], path, name))
        elif name + ".bin" in batches:
            parts.append(_binary_batch(batches[name + ".bin"], path, name + ".bin"))
        else:
            raise _damaged(path, f"{name} is missing")
    return torch.from_numpy(np.concatenate(parts).reshape(-1, 3, _SIDE, _SIDE))


def _binary_batch(content: bytes, path: Path, name: str) -> np.ndarray:
    if not content or len(content) % _RECORD:
        raise _damaged(path, f"{name} has {len(content)} bytes, no multiple of {_RECORD}")
    return np.frombuffer(content, np.uint8).reshape(-1, _RECORD)[:, 1:]


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
        content = content.encode("latin1") if isinstance(content, str) else content
        array = np.frombuffer(content, np.uint8)
        self.array = array.reshape(shape, order="F" if fortran else "C")


def _latin1(text, encoding):
    """Stands for codecs.encode, by which Python 3 writes bytes into old pickles."""
    if not isinstance(text, str) or encoding != "latin1":
        raise pickle.UnpicklingError(f"encoding {encoding!r}")
    return text.encode("latin1")


class _Unpickler(pickle.Unpickler):
    """Knows a few names, and answers each with a stand-in of this module."""

    _NAMES = {
        ("numpy.core.multiarray", "_reconstruct"): _Array,
        ("numpy._core.multiarray", "_reconstruct"): _Array,
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _Dtype,
        ("_codecs", "encode"): _latin1,
    }

    def find_class(self, module, name):
        if (module, name) not in self._NAMES:
            raise pickle.UnpicklingError(f"the file asks for {module}.{name}, which is refused")
        return self._NAMES[module, name]


def _python_batch(content: bytes, path: Path, name: str) -> np.ndarray:
    try:
        batch = _Unpickler(io.BytesIO(content), encoding="bytes").load()
        array = (batch[b"data"] if b"data" in batch else batch["data"]).array
        if array.ndim != 2 or array.shape[1] != _RECORD - 1:
            raise ValueError(f"its array has shape {array.shape}")
    except Exception as error:  # a damaged pickle raises almost anything
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise _damaged(path, f"{name} is not a batch of CIFAR-10 ({reason})") from None
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
