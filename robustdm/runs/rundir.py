"""The directory of a run: who may write to it, and what it says about the run.

    config.yaml      the resolved configuration
    run.json         provenance: data, network, and for each start its command, versions, machine
    metrics.jsonl    one JSON object per line, in the order of the steps
    checkpoints/     see robustdm.runs.checkpoint
    run.lock         held (flock) by the process that is writing
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import json
import logging
import math
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
import uuid
from pathlib import Path

import yaml

import robustdm
from robustdm.errors import RunError, UsageError
from robustdm.runs.config import TrainConfig
from robustdm.runs.fields import load_yaml

CONFIG, RUN, METRICS, LOCK = "config.yaml", "run.json", "metrics.jsonl", "run.lock"

_log = logging.getLogger("robustdm")

# What a resumed run may change, and why it stays the same run. All other fields decide the
# sequence of weights: changing one would make a run that no configuration describes.
CHANGEABLE = {
    **dict.fromkeys(("preset", "config", "out", "resume", "dry_run"),
                    "names and switches of the command; what they lead to is compared itself"),
    **dict.fromkeys(("steps", "stop_after", "max_time"), "length of the run: it can be extended"),
    **dict.fromkeys(("log_every", "sample_every", "checkpoint_every", "checkpoint_minutes",
                     "keep_last", "keep_every", "tensorboard", "wandb"),
                    "what is written on the way"),
    **dict.fromkeys(("num_samples", "preview_steps", "clip_samples", "correct_samples",
                     "final_sampler", "final_steps"), "the samples shown, not the training"),
    **dict.fromkeys(("device", "backend", "compile", "cuda_graph", "cudnn_benchmark", "attention",
                     "accumulate", "workers", "resident_gib", "parallel", "rank_timeout",
                     "threads"),
                    "where and how the same step is computed: machines differ"),
    **dict.fromkeys(("data_dir", "corrupt_with", "max_bad"),
                    "the content of the data is compared by its sha256"),
    "max_skipped": "when to give up",
    "allow_pickle": "how the file is read, not what is in it: its sha256 is compared",
    "lr": "constant after the warm-up, so a later value is a common and clear correction",
}
# Switches of a single command: config.yaml does not carry them over to the next one.
_SWITCHES_OFF = dict(config=None, resume=False, stop_after=None, max_time=None, dry_run=False)


class RunDir:
    """A run directory that this process alone may write to, from ``open`` until ``close``."""

    def __init__(self, path: Path, lock: int):
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.samples = path / "samples"
        self._lock = lock
        self._metrics: int | None = None
        self._torn = False
        self._recorded: tuple[TrainConfig, dict] | None = None

    @classmethod
    def open(cls, path: Path, config: TrainConfig, resume: bool) -> RunDir:
        """Check and lock the directory, creating it for a new run. Writes nothing but the lock.

        Raises:
            UsageError: it holds another run or other files; it is no run (``resume``); the
                configuration asked for would make it another run; another process is writing.
            RunError: it cannot be created.
        """
        path = Path(path)
        check_use(path, config, resume)
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock = _take_lock(path)
        except OSError as error:
            raise RunError(f"cannot write to {path}: {error.strerror}; choose another --out"
                           ) from error
        try:
            # Again, now that nobody else can write: two runs may have started at once.
            check_use(path, config, resume)
            for folder in (path, path / "samples"):
                for left_over in filter(_is_staging, folder.glob(".tmp-*")):
                    if left_over.is_dir():
                        shutil.rmtree(left_over, ignore_errors=True)
                    else:
                        left_over.unlink()
        except BaseException:
            _release(lock)
            raise
        return cls(path, lock)

    def __enter__(self) -> RunDir:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Release the lock. The lock file stays: removing it could free another process's."""
        self._close_metrics()
        if self._lock >= 0:
            _release(self._lock)
            self._lock = -1

    def record(self, config: TrainConfig, **facts) -> None:
        """Write config.yaml and run.json; call it once everything is checked, before step one.

        Args:
            config: the resolved configuration.
            facts: JSON-able facts of the run, such as ``data``, ``network``, ``parameters``.
        """
        self._recorded = config, facts
        run_json = self.path / RUN
        sessions = []
        if run_json.exists():
            with contextlib.suppress(ValueError, TypeError, KeyError, OSError):
                sessions = list(parse_json(run_json.read_bytes())["sessions"])
        sessions.append(provenance())
        resolved = {**config.to_dict(), **_SWITCHES_OFF}
        write_text(self.path / CONFIG, yaml.safe_dump(resolved, sort_keys=False))
        write_json(run_json, {**facts, "sessions": sessions})
        try:
            self.samples.mkdir(exist_ok=True)
        except OSError as error:
            raise RunError(f"{self.samples} was not made: {error.strerror}; make room or choose "
                           "another --out") from error

    def renew(self) -> bool:
        """Make the directory anew if somebody has deleted it, or moved it away, since `record`.

        Returns:
            Whether that was so.

        Raises:
            UsageError: another run has taken its place.
            RunError: it cannot be made.
        """
        try:
            ours = (self.path / LOCK).read_bytes() == f"{os.getpid()}\n".encode()
        except (FileNotFoundError, NotADirectoryError):
            ours = (self.path / CONFIG).exists()  # without the lock alone
        except OSError:
            ours = True  # as far as can be told
        if ours:
            return False
        config, facts = self._recorded
        new = RunDir.open(self.path, config, resume=False)
        self.close()
        self._lock = new._lock
        self.record(config, **facts)
        return True

    def append_metrics(self, line: dict) -> None:
        """Append one line to metrics.jsonl. A full disk costs the line and a warning, not the run.

        Numbers of numpy and torch become plain ones, and those that are not finite become null.
        """
        data = json.dumps(_plain(line), allow_nan=False).encode() + b"\n"
        path = self.path / METRICS
        try:
            if self._metrics is None:
                self._metrics = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            # Straight to the system: what is written is there for readers, and after a kill.
            if self._torn:
                data = b"\n" + data
            written = os.write(self._metrics, data)
            self._torn = written < len(data)
            if self._torn:
                raise OSError(None, "only part of the line was written")
        except OSError as error:
            _log.warning("a line of %s was lost: %s", path, error.strerror)

    def truncate_metrics(self, step: int) -> dict | None:
        """Drop the lines after ``step``, and torn ones: a resumed run writes them again.

        Returns:
            The last line that is left, or None.
        """
        self._close_metrics()
        path = self.path / METRICS
        if not path.exists():
            return None
        kept = [line for line in read_metrics(path) if line["step"] <= step]
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        return kept[-1] if kept else None

    def _close_metrics(self) -> None:
        if self._metrics is not None:
            os.close(self._metrics)
            self._metrics = None


# Reading and writing single files.


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl, without those that a kill or a full disk tore."""
    lines = []
    for raw in Path(path).read_bytes().splitlines():
        with contextlib.suppress(ValueError):
            line = parse_json(raw)
            if isinstance(line, dict) and is_step(line.get("step")):
                lines.append(line)
    return lines


def parse_json(text: bytes):
    """The value of a JSON text that anybody may have written; huge integers become floats.

    Raises:
        ValueError: if it is not JSON, or nested too deep.
    """
    def number(digits: str) -> int | float:
        return int(digits) if len(digits) < 19 else float(digits)  # 19 may not fit 64 bits

    try:
        return json.loads(text, parse_int=number)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def is_step(value) -> bool:
    """Whether a value read from JSON is a number of steps."""
    return type(value) is int and value >= 0


def read_config(path: Path) -> dict:
    """The plain configuration of the run in directory ``path``.

    Raises:
        UsageError: it is no run directory, or its config.yaml cannot be read.
    """
    file = Path(path) / CONFIG
    if not Path(path).is_dir():
        raise UsageError(f"{path} is not a run: there is no such directory")
    try:
        values = load_yaml(file)
    except FileNotFoundError:
        raise UsageError(f"{path} is not a run: it has no {CONFIG}") from None
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"{file} is not YAML: {error}") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UsageError(f"{file} is not the configuration of a run: put back a copy of it")
    return values


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file in one rename, so that readers see the old or the new one, never a part.

    Raises:
        RunError: it could not be written; the old file is as it was.
    """
    path = Path(path)
    staging = path.with_name(f".tmp-{uuid.uuid4().hex}-{path.name}")
    try:
        with open(staging, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(staging, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            staging.unlink()
        raise RunError(f"{path} was not written: {error.strerror}; make room or choose another "
                       "--out") from error


def write_text(path: Path, text: str) -> None:
    """Like :func:`write_bytes`, in UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: Path, value) -> None:
    """Like :func:`write_bytes`, for a JSON-able value; numbers as in ``append_metrics``."""
    write_text(path, json.dumps(_plain(value), indent=1, allow_nan=False) + "\n")


def _plain(value):
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return value


# May this process use the directory?


def check_use(path: Path, config: TrainConfig, resume: bool) -> None:
    """Raise a UsageError unless a run of this configuration may start, or go on, in ``path``."""
    _check_entries(Path(path), resume)
    if resume:
        _check_config(path, config)


def _check_entries(path: Path, resume: bool) -> None:
    if path.exists() and not path.is_dir():
        raise UsageError(f"out is {path}: that is a file, name a directory")
    entries = {entry.name for entry in path.iterdir()} if path.exists() else set()
    is_run = CONFIG in entries
    if resume:
        if not is_run:
            what = f"it has no {CONFIG}" if entries else "it is empty or does not exist"
            raise UsageError(f"cannot resume {path}: {what}; name the --out of a run, or leave out "
                             "--resume to start one")
        return
    # A run that died before it had anything to lose may be started again.
    started = any((path / name).exists() and (path / name).stat().st_size > 0
                  for name in (METRICS, "summary.json"))
    started |= any((path / "checkpoints").glob("*step-*"))
    if is_run and started:
        raise UsageError(f"out is {path}: it holds a run; add --resume to continue that one, or "
                         "choose another --out")
    others = sorted(name for name in entries - {LOCK} if not _is_staging(path / name))
    if not is_run and others:
        raise UsageError(f"out is {path}: it is not empty (it holds {others[0]!r}) and no run; "
                         "choose a new or empty directory")


def _is_staging(path: Path) -> bool:
    """Whether a writer that died has left it: half of what was to take another's place."""
    return re.match(r"\.tmp-[0-9a-f]{32}", path.name) is not None


def _check_config(path: Path, config: TrainConfig) -> None:
    saved, asked = read_config(path), config.to_dict()
    # A field that an older version did not know had the value that is now its default.
    default = TrainConfig().to_dict()
    changes = [
        f"{name} is {saved.get(name, default[name])!r} there, {value!r} was asked for"
        for name, value in asked.items()
        if name not in CHANGEABLE and saved.get(name, default[name]) != value
    ]
    if changes:
        raise UsageError(f"cannot resume {path} as another run: {'; '.join(changes)}; drop the "
                         "change, or start a new run with another --out")


def check_same_data(saved: dict, found: dict, path: Path) -> None:
    """Raise a UsageError where the data's identity is not the one the run was started with.

    The name is only that of a file or folder: the same content may have moved.
    """
    found = _plain(found)
    if saved.get("sha256") and saved["sha256"] == found.get("sha256"):
        saved = {**saved, "name": found.get("name")}
    changes = [f"{key} was {saved.get(key)!r} and is {found.get(key)!r}"
               for key in {**saved, **found} if saved.get(key) != found.get(key)]
    if changes:
        raise UsageError(f"cannot resume {path} on other data: {'; '.join(changes)}; name the data "
                         "it was started with in --data-dir, or choose another --out")


# A forked data worker that outlives a killed run must not keep its lock.
_held: set[int] = set()


def _close_inherited() -> None:
    for handle in _held:
        os.close(handle)
    _held.clear()


os.register_at_fork(after_in_child=_close_inherited)


def _take_lock(path: Path) -> int:
    handle = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.read(handle, 32).decode("ascii", "replace").strip()
        os.close(handle)
        raise UsageError(f"another process (pid {owner or 'unknown'}) is writing to {path}: wait "
                         "for it, or choose another --out") from None
    except OSError as error:
        # Some network file systems have no locks: better to run than to refuse.
        _log.warning("%s cannot be locked (%s): start no second run in it", path, error.strerror)
    os.ftruncate(handle, 0)
    os.write(handle, f"{os.getpid()}\n".encode())
    _held.add(handle)
    return handle


def _release(handle: int) -> None:
    _held.discard(handle)
    os.close(handle)


# Provenance.


def provenance() -> dict:
    """Where, when and by which versions this process runs; JSON-able."""
    import torch

    versions = {"python": platform.python_version(), "robustdm": robustdm.__version__}
    for name in ("torch", "numpy", "diffusers", "safetensors", "triton", "xformers", "peft"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": shlex.join(sys.orig_argv),
        "git": git_revision(),
        "versions": versions,
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "gpu": gpu,
        "cuda": torch.version.cuda,
    }


def git_revision() -> str | None:
    """Commit of the package, ending in "-dirty" with local changes; None where it has no git."""
    here = Path(__file__)

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=5
        ).stdout.strip()

    try:
        # An installed copy may lie in somebody else's repository, which does not track it.
        git("ls-files", "--error-unmatch", here.name)
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return None


def check_out(out: Path, record: str, overwrite: bool) -> None:
    """Raise a UsageError unless a command may write its results to a folder: one that is new or
    empty, or holds an earlier call's, which its record marks, and may be replaced."""
    try:
        if out.exists() and not out.is_dir():
            raise UsageError(f"out is {str(out)!r}: that is a file; name a folder")
        if out.is_dir() and any(out.iterdir()):
            if not (out / record).is_file():
                raise UsageError(f"out is {str(out)!r}: it holds other files; name another folder")
            if not overwrite:
                raise UsageError(f"out is {str(out)!r}: it holds results; name another folder or "
                                 "add --overwrite")
    except OSError as error:
        raise UsageError(f"out is {str(out)!r}: it cannot be read ({error.strerror})") from None
