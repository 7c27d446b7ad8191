"""Files of strangers: what is checked before a library reads them.

The libraries run no code of theirs. What they lack is a bound: a few megabytes can stand for more
than fits in memory.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

# What deflate makes 200 times smaller is no data: the best of it, zeros, become 1000 times smaller.
_RATIO = 200
_HARMLESS = 64 * 2**20  # bytes
_HEADER_LIMIT = 4 * 2**20  # bytes; a tensor takes about 100
# Besides tensors, torch lets a pickle make these, of any size and any number of times.
_MAKERS = (b"\nbytearray\n", b"\nencode\n")


def open_npz(path: Path) -> np.lib.npyio.NpzFile:
    """An .npz without pickles.

    Raises:
        ValueError: if it would take absurdly much memory; numpy and zipfile raise a dozen others.
    """
    archive = np.load(path, allow_pickle=False)
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise ValueError("it is no .npz")
    # Of the whole file: what a zip says of its members' packed sizes may be a lie.
    size = sum(member.file_size for member in archive.zip.infolist())
    if size > max(_HARMLESS, _RATIO * path.stat().st_size):
        archive.close()
        raise ValueError(f"it would unpack to {size} bytes, over {_RATIO} times what it takes: if "
                         "that is meant, save it as .npy")
    return archive


def load_pickle(data: bytes) -> object:
    """What `torch.save` wrote, tensors alone; nothing of it is run.

    Raises:
        ValueError: if it would take absurdly much memory; torch raises a dozen others.
    """
    import torch

    if zipfile.is_zipfile(io.BytesIO(data)):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = archive.infolist()
        if any(member.filename.endswith("data.pkl") and member.file_size > _HEADER_LIMIT
               for member in members):
            raise ValueError(f"what describes its tensors has more than {_HEADER_LIMIT} bytes")
        size = sum(member.file_size for member in members)
        if size > len(data) or any(m.compress_type != zipfile.ZIP_STORED for m in members):
            raise ValueError(f"it is compressed, to {len(data)} bytes from {size}; torch.save "
                             "compresses nothing")
    if any(maker in data for maker in _MAKERS):
        raise ValueError("it holds byte arrays")
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def load_safetensors(data: bytes) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        ValueError: for a header that would take minutes; safetensors raises errors of its own.
    """
    import safetensors.torch

    size = int.from_bytes(data[:8], "little")
    if size > _HEADER_LIMIT:
        raise ValueError(f"its header claims {size} bytes, more than {_HEADER_LIMIT}")
    return safetensors.torch.load(data)
