"""Pictures in databases: lmdb (LSUN) and Hugging Face data sets, as files of a `Source`.

What they hold is decoded like any file: the formats of `decode` alone, and no picture too large.
"""

from __future__ import annotations

import hashlib
import io
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from robustdm.data.decode import MAX_PACKED, BadImage
from robustdm.errors import UsageError

_HUB = "hf:"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def is_lmdb(path: Path) -> bool:
    """Whether a path is an lmdb: the folder, or data.mdb in it."""
    return (path / "data.mdb").is_file() or path.name == "data.mdb" and path.is_file()


# Open lmdbs, by folder, with the process that opened each. The library allows one for all threads
# of a process, and none that was opened before a fork.
_open_lmdbs: dict[str, tuple[int, object]] = {}
_opening = threading.Lock()


def _environment(folder: str):
    import lmdb

    with _opening:
        process, environment = _open_lmdbs.get(folder, (None, None))
        if process != os.getpid():
            if environment is not None:
                environment.close()
            environment = lmdb.open(folder, readonly=True, lock=False, readahead=False,
                                    max_spare_txns=32)
            _open_lmdbs[folder] = os.getpid(), environment
    return environment


class Lmdb:
    """Pictures that are the values of an lmdb, by key, as LSUN comes. Needs the extra ``lmdb``.

    Raises:
        UsageError: if the package is missing or the database is damaged.
    """

    def __init__(self, path: Path):
        self.path = path
        folder = path.parent if path.name == "data.mdb" else path
        self._folder = os.path.realpath(folder)
        try:
            import lmdb
        except ImportError:
            raise UsageError(f"data_dir is {str(path)!r}: an lmdb is read by a package that is not "
                             'here: pip install "robustdm[lmdb]"') from None
        try:
            with _environment(self._folder).begin() as transaction:
                keys = transaction.cursor().iternext(keys=True, values=False)
                self.names = [key.decode("latin-1") for key in keys]
        except (lmdb.Error, OSError) as error:
            raise UsageError(f"{path}: not a readable lmdb: {_line(error)}") from None

    def _value(self, name: str, function):
        with _environment(self._folder).begin(buffers=True) as transaction:
            value = transaction.get(name.encode("latin-1"))
            if value is None:
                raise BadImage("the key is gone")
            return function(value)

    def open(self, name: str) -> BinaryIO:
        """Raises BadImage for an absurdly large value."""
        return self._value(name, lambda value: io.BytesIO(_checked(value)))

    def stamp(self, name: str) -> int:
        """Changes when the value's length does."""
        return self._value(name, len)


def _checked(content) -> bytes:
    if len(content) > MAX_PACKED:
        raise BadImage(f"larger than {MAX_PACKED} bytes")
    return bytes(content)


def is_hub(path: Path) -> bool:
    """Whether a path stands for a Hugging Face data set: ``hf:NAME[:SPLIT]``."""
    return str(path).startswith(_HUB)


def _open_hub(path: Path, streaming: bool):
    """The data set that ``hf:NAME``, ``hf:NAME:SPLIT`` or ``hf:NAME:CONFIGURATION:SPLIT`` names.

    Returns:
        It, with nothing but its column of images, not decoded; and that column's name.

    Raises:
        UsageError: if the package is missing, or there is no such set, or no images in it.
    """
    name, *rest = str(path).removeprefix(_HUB).split(":")
    split = rest.pop() if rest else "train"
    if not name or len(rest) > 1:
        raise UsageError(f"data_dir is {str(path)!r}: write hf:NAME, hf:NAME:SPLIT or "
                         "hf:NAME:CONFIGURATION:SPLIT")
    try:
        import datasets
    except Exception as error:  # a broken installation raises anything
        raise UsageError(f"data_dir is {str(path)!r}: the package datasets cannot be imported "
                         f'({_line(error)}): pip install "robustdm[data]"') from None
    if int(datasets.__version__.split(".")[0]) < 4:
        raise UsageError(f"data_dir is {str(path)!r}: datasets {datasets.__version__} may run code "
                         'of the set, version 4 never does: pip install "robustdm[data]"')
    if os.path.isdir(name):
        name = os.path.abspath(name)  # else a folder called parquet would be taken for a format
    try:
        data = datasets.load_dataset(name, *rest, split=split, streaming=streaming)
        features = data.features
        if features is None:  # a stream of a form that declares nothing: its first row tells
            features = next(iter(data), {})
    except Exception as error:  # the network, the files, the split: each with errors of its own
        raise UsageError(
            f"data_dir is {str(path)!r}: {_line(error)}. Without a network, name a local folder of "
            "parquet or arrow files as hf:FOLDER"
        ) from None
    # Parquet files of other tools have the struct, but not the name of the type.
    columns = [key for key, kind in features.items() if isinstance(kind, datasets.Image)
               or isinstance(kind, dict) and {"bytes", "path"} <= set(kind)]
    if len(columns) > 1:
        columns = [key for key in columns if key in ("image", "img")]
    if len(columns) != 1:
        raise UsageError(f"data_dir is {str(path)!r}: which of its columns "
                         f"({', '.join(features) or 'none'}) holds the images cannot be told: it "
                         "must have the type Image, or fields named bytes and path")
    (column,) = columns
    if isinstance(features[column], datasets.Image):
        data = data.cast_column(column, datasets.Image(decode=False))
    return data.select_columns([column]), column


def _content(row: dict | None) -> bytes:
    """The picture file in a row's column."""
    row = row if isinstance(row, dict) else {}
    if isinstance(row.get("bytes"), bytes):
        return _checked(row["bytes"])
    if not row.get("path"):
        raise BadImage("an empty row")
    from datasets.utils.file_utils import xopen  # knows remote files too

    with xopen(row["path"], "rb") as file:
        return _checked(file.read(MAX_PACKED + 1))


class HubPictures:
    """A Hugging Face data set on this disk, downloaded where it was not, by row."""

    def __init__(self, path: Path):
        self.path = path
        self._rows, self._column = _open_hub(path, streaming=False)
        self.names = [f"{row:09d}" for row in range(len(self._rows))]

    def open(self, name: str) -> BinaryIO:
        """Raises BadImage for an empty row or an absurdly large picture."""
        return io.BytesIO(_content(self._rows[int(name)][self._column]))

    def stamp(self, name: str) -> int:
        """Changes when the picture's length does."""
        row = self._rows[int(name)][self._column] or {}
        return len(row.get("bytes") or row.get("path") or "")


class HubStream:
    """A Hugging Face data set that is read from its first row to its last, without a download.

    Attributes:
        size: number of rows, None if it is not known beforehand.
    """

    def __init__(self, path: Path):
        self.path = path
        self._rows, self._column = _open_hub(path, streaming=True)
        splits = self._rows.info.splits or {}
        split = splits.get(str(self._rows.split))
        self.size = split.num_examples if split and split.num_examples else None

    def read(self, start: int) -> Iterator[bytes]:
        """The picture files from row ``start`` on; empty where there is none.

        Raises:
            OSError: and others, if the source fails on the way.
        """
        for row in self._rows.skip(start):
            try:
                yield _content(row[self._column])
            except BadImage:
                yield b""


def sha256_of_files(contents: list[bytes]) -> str:
    """Hash of picture files, one after the other."""
    lengths = ",".join(str(len(content)) for content in contents)
    return hashlib.sha256(lengths.encode() + b"".join(contents)).hexdigest()
