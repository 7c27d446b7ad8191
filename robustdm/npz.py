"""What has to be looked at before an .npz of unknown origin is unpacked."""

import os
import zipfile

_SMALL = 1 << 28  # bytes; what unpacks to less does no harm
_MOST = 100  # bytes out of one byte packed: only arrays of little but zeros give more


def refuse_bombs(archive: zipfile.ZipFile) -> None:
    """Raise a ValueError if the members unpack to hundreds of MiB out of next to nothing.

    The size of the file counts, for what a zip says of its members' packed sizes may be a lie.
    """
    packed = os.fstat(archive.fp.fileno()).st_size
    unpacked = sum(member.file_size for member in archive.infolist())
    if unpacked > max(_SMALL, _MOST * packed):
        raise ValueError(f"it unpacks from {packed} to {unpacked} bytes, as no images do: if that "
                         "is meant, save it as .npy")
