"""What a reader may do with a file: raise our own errors, in seconds, in a gigabyte, in its folder.

The folder is watched by an audit hook of Python, which sees every file that is opened for writing,
every program started and every pickle that names a class.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

from robustdm.errors import RobustDMError

SECONDS = 5  # of the processor, so that a busy machine finds nothing
MEBIBYTES = 1024
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.chmod"}
_WHOLE = {"os.truncate", "shutil.rmtree", "shutil.move", "shutil.copyfile"}
_FORBIDDEN = {"os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen",
              "socket.connect", "socket.getaddrinfo", "pickle.find_class"}
_folder: str | None = None  # watched while a reader runs
_seen: list[str] = []


class Hang(BaseException):
    """Raised within a reader whose time is up; no reader catches it."""


def _audit(event: str, arguments: tuple) -> None:
    if _folder is None:
        return
    if event in _FORBIDDEN:
        _seen.append(f"{event} {arguments!r:.200}")
    elif event == "open":
        path, _, flags = arguments
        if flags & _WRITING and isinstance(path, str | bytes | os.PathLike):
            _check_place(event, path)
    elif event in _CHANGES and arguments[-1] in (-1, None) or event in _WHOLE:
        _check_place(event, arguments[0])  # others are relative to a folder, checked with rmtree


def _check_place(event: str, path) -> None:
    place = os.path.abspath(os.fsdecode(path))
    if not (place + os.sep).startswith(_folder) and place != os.devnull:
        _seen.append(f"{event} {place}")


sys.addaudithook(_audit)  # there is no way to take it away again


def _stop(*_) -> None:
    raise Hang(f"more than {SECONDS} s")


@contextlib.contextmanager
def _watched(folder: Path) -> Iterator[None]:
    global _folder
    writes_code, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    handler = signal.signal(signal.SIGPROF, _stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    _seen.clear()
    _folder = os.path.abspath(folder) + os.sep
    try:
        yield
    finally:
        _folder = None
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, handler)
        sys.dont_write_bytecode = writes_code


def check(read, folder: Path) -> str | None:
    """Run a reader on what is in a folder.

    Returns:
        None if it did what it may, else what it did wrong: a first line that is the same for the
        same fault, then the details.
    """
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fault = None
    try:
        with _watched(folder):
            read(folder)
    except RobustDMError as error:
        if "\n" in str(error).strip():
            fault = f"an error of several lines\n{error}"
    except (Exception, Hang) as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__)
                  if "/robustdm/" in f.filename]
        place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
        fault = f"{type(error).__name__} in {place}\n{traceback.format_exc()}"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    if grown > MEBIBYTES:
        fault = f"used {grown:.0f} MiB\n{fault or ''}"
    if _seen:
        fault = f"touched what it must not: {_seen[0].split()[0]}\n" + "\n".join(_seen)
    return fault
