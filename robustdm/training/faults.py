"""Death on demand, to try what a checkpoint is worth on a given machine and file system.

With ``ROBUSTDM_FAULT=kill@bytes:N`` in the environment a process sends itself SIGKILL once it has
written N bytes of checkpoints. Without it, files are written as they are.
"""

import os
import signal
from typing import BinaryIO

FAULT = os.environ.get("ROBUSTDM_FAULT", "")


def watched(file: BinaryIO) -> BinaryIO:
    """The file, or one that looks after the fault that the environment asks for."""
    return _Deadly(file) if FAULT.startswith("kill@bytes:") else file


class _Deadly:
    written = 0  # by all files of the process

    def __init__(self, file: BinaryIO):
        self._file = file

    def write(self, chunk: bytes | memoryview) -> int:
        left = int(FAULT.removeprefix("kill@bytes:")) - _Deadly.written
        if len(chunk) >= left:
            self._file.write(chunk[:left])
            self._file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        _Deadly.written += len(chunk)
        return self._file.write(chunk)

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self._file.close()

    def __getattr__(self, name: str):
        return getattr(self._file, name)
