"""Checkpoints that can be trusted: safetensors and JSON, a sha256 manifest, one rename.

A checkpoint is a directory ``checkpoints/step-00001234``::

    model.safetensors, ema_0.99.safetensors, optimizer.safetensors, ...   tensors
    state.json                                                            everything else
    MANIFEST.json           size and sha256 of each file and of itself; written last

Where they hold adapters alone, the model that these belong to lies beside them, written once:
``origin.safetensors``, whose size and sha256 are in every ``state.json``.

It is written to ``.tmp-<uuid>`` beside its place, flushed to the disk file by file, and moved into
place by a single rename: a crash, a full disk or a kill at any moment leaves the earlier ones as
they were. Reading compares every byte with the manifest before any of it is parsed, and a damaged
checkpoint falls back to the one before. No pickle is read or written.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import logging
import os
import re
import shutil
import stat
import struct
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
from torch import Tensor

from robustdm.distributed import whole
from robustdm.errors import RunError, UsageError
from robustdm.untrusted import load_safetensors

FORMAT_VERSION = 1
MANIFEST = "MANIFEST.json"
STATE = "state.json"
ORIGIN = "origin.safetensors"

_log = logging.getLogger("robustdm")
_STEP = re.compile(r"step-(\d{8,})")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_MANIFEST_LIMIT = 1 << 20  # bytes; a real one has a few hundred
_SPACE_MARGIN = 1 << 20  # bytes for state, manifest and headers
_WRONG = (ValueError, TypeError, KeyError)  # what parsing foreign text may raise
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}


class CheckpointError(RunError):
    """A checkpoint could not be written; the earlier ones are untouched and the run may go on."""


class _Damaged(Exception):
    """One file of a checkpoint is not what was written; the text says which and why."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose bytes were compared with its manifest."""

    step: int
    path: Path
    tensors: dict[str, dict[str, Tensor]]
    state: dict


# Writing.


def save_checkpoint(
    root: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict
) -> Path:
    """Write ``root/step-<step>`` in full or not at all.

    Args:
        root: the directory of all checkpoints of the run; created where it is missing.
        step: optimizer steps done so far.
        tensors: file name without suffix -> tensors by name, of any device, layout and sharing.
            Of those that lie in parts on the ranks, one at a time is gathered: all other ranks call
            `accompany` meanwhile.
        state: JSON-able values; "step" is added.

    Returns:
        The checkpoint's directory. One of the same step is replaced.

    Raises:
        CheckpointError: it could not be written (disk full, quota, permissions); nothing of it is
            left and the earlier checkpoints are as they were.
    """
    for name in tensors:
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} cannot name a file of a checkpoint")
    root = Path(root)
    final = root / f"step-{step:08d}"
    staging = root / f".tmp-{uuid.uuid4().hex}"
    old = _aside(final)
    published = False
    state_json = json.dumps({**state, "step": step}, indent=1).encode()
    gathered = _gathered(tensors)
    try:
        root.mkdir(parents=True, exist_ok=True)
        _check_space(root, tensors, len(state_json))
        staging.mkdir()
        files = {
            f"{name}.safetensors":
                _write_file(staging / f"{name}.safetensors", _chunks(group, gathered))
            for name, group in tensors.items()
        }
        files[STATE] = _write_file(staging / STATE, [state_json])
        _write_file(staging / MANIFEST, [_manifest_bytes(step, files)])
        _sync_directory(staging)
        if final.exists():
            # A directory cannot be renamed onto a full one. Until the second rename the old
            # checkpoint is found under its other name, so there is always one to be loaded.
            shutil.rmtree(old, ignore_errors=True)
            os.rename(final, old)
        os.rename(staging, final)
        published = True
        _sync_directory(root)
    except BaseException as error:
        with contextlib.suppress(OSError):
            if published:  # it may be gone after a power cut, so nobody may count on it
                os.rename(final, staging)
            if old.exists() and not final.exists():
                os.rename(old, final)
        shutil.rmtree(staging, ignore_errors=True)
        if isinstance(error, OSError):
            for _ in gathered:  # the other ranks know of nothing
                pass
            raise CheckpointError(
                f"the checkpoint of step {step} was not written to {root}: "
                f"{error.strerror or error}; earlier checkpoints are untouched, make room or "
                "choose another --out"
            ) from error
        raise
    shutil.rmtree(old, ignore_errors=True)
    return final


def accompany(tensors: dict[str, dict[str, Tensor]]) -> None:
    """What other ranks do while one is in `save_checkpoint`: give it their parts."""
    for _ in _gathered(tensors):
        pass


def save_origin(root: Path, tensors: dict[str, Tensor]) -> dict:
    """Write ``root/origin.safetensors``, in full or not at all; what an older one held is lost.

    Returns:
        Its size and sha256, for `load_origin`.

    Raises:
        CheckpointError: it could not be written.
    """
    root = Path(root)
    staging = root / f".tmp-{uuid.uuid4().hex}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        _check_space(root, {"origin": tensors}, 0)
        entry = _write_file(staging, _chunks(tensors, _gathered({"": tensors})))
        os.rename(staging, root / ORIGIN)
        _sync_directory(root)
    except OSError as error:
        staging.unlink(missing_ok=True)
        raise CheckpointError(f"{root / ORIGIN} was not written: {error.strerror or error}; make "
                              "room or choose another --out") from error
    return entry


def _aside(final: Path) -> Path:
    """Where a checkpoint waits while its replacement is moved into its place."""
    return final.with_name(f".old-{final.name}")


def _check_space(root: Path, tensors: dict[str, dict[str, Tensor]], extra: int) -> None:
    need = extra + _SPACE_MARGIN + sum(
        t.numel() * t.element_size() for group in tensors.values() for t in group.values()
    )
    free = shutil.disk_usage(root).free
    if need > free:
        reason = f"it needs {need / 2**20:.0f} MiB and {free / 2**20:.0f} MiB are free"
        raise OSError(errno.ENOSPC, reason)


def _in_order(tensors: dict[str, Tensor]) -> list[str]:
    """The names in a file's order: larger elements first, so that every tensor is aligned."""
    return sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))


def _gathered(tensors: dict[str, dict[str, Tensor]]) -> Iterator[Tensor]:
    """Every tensor, file by file: those that lie in parts as they are asked for."""
    for group in tensors.values():
        for name in _in_order(group):
            yield whole(group[name].detach())


def _chunks(
    tensors: dict[str, Tensor], gathered: Iterator[Tensor]
) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file, one tensor at a time: no second copy of a network is held.

    The library's own writer does not fit: it leaves files of mode 0600, refuses tensors that share
    memory, and cannot hash what it writes.

    Args:
        tensors: the file's tensors, perhaps in parts.
        gathered: what `_gathered` makes of them, and perhaps of later files'.

    Source: https://huggingface.co/docs/safetensors, "Format".
    """
    order = _in_order(tensors)
    header, start = {"__metadata__": {"format": "pt"}}, 0
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"tensor {name!r}: a checkpoint cannot hold {tensor.dtype}")
        end = start + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for tensor in itertools.islice(gathered, len(order)):
        flat = tensor.cpu().contiguous().reshape(-1)
        yield memoryview(flat.view(torch.uint8).numpy())


def _write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> dict:
    """Write and flush to the disk; the manifest's entry is made of what was meant to be written."""
    digest, size = hashlib.sha256(), 0
    with open(path, "xb") as file:
        for chunk in chunks:
            file.write(chunk)
            digest.update(chunk)
            size += len(chunk)
        file.flush()
        os.fsync(file.fileno())
    return {"size": size, "sha256": digest.hexdigest()}


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems keep no directories to flush.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def _manifest_bytes(step: int, files: dict[str, dict], version: int = FORMAT_VERSION) -> bytes:
    content = {"format": version, "step": step, "files": files}
    own = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps({**content, "sha256": own}, indent=1, sort_keys=True).encode() + b"\n"


# Reading.


def list_checkpoints(root: Path) -> list[tuple[int, Path]]:
    """(step, path) of every checkpoint directory, sound or not, oldest first."""
    found: dict[int, Path] = {}
    try:
        entries = sorted(Path(root).iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    for path in entries:
        # ".old-step-..." sorts first, hence counts only where its replacement never arrived.
        if match := _STEP.fullmatch(path.name.removeprefix(".old-")):
            found[int(match[1])] = path
    return sorted(found.items())


def load_newest(
    root: Path, names: Iterable[str] | None = None, device: str | torch.device = "cpu"
) -> Checkpoint | None:
    """Load the newest sound checkpoint; a damaged one is skipped with a warning.

    Args:
        root: the directory of all checkpoints.
        names: load, and hence compare with the manifest, these tensor files only; None is all.
        device: where the tensors go.

    Returns:
        The checkpoint, or None where there is none at all.

    Raises:
        RunError: there are checkpoints, but none is sound.
        UsageError: a sound checkpoint does not hold one of ``names``.
    """
    names = None if names is None else list(names)
    while True:
        entries = list_checkpoints(root)
        reasons = []
        for _, path in reversed(entries):
            try:
                loaded = _load(path, names, device)
            except _Damaged as damage:
                reasons.append(f"{path.name}: {damage}")
                continue
            for reason in reasons:
                _log.warning("damaged checkpoint skipped in %s: %s", root, reason)
            return loaded
        # A run that is going on may have replaced all of them meanwhile.
        if entries == list_checkpoints(root):
            break
    if not entries:
        return None
    raise RunError(
        f"no checkpoint in {root} is sound ({'; '.join(reasons)}); put back a copy of one, or "
        "start again with another --out"
    )


def load_checkpoint(
    path: Path, names: Iterable[str] | None = None, device: str | torch.device = "cpu"
) -> Checkpoint:
    """Load exactly this checkpoint directory; arguments as for :func:`load_newest`.

    Raises:
        RunError: it is damaged; the message names file and reason.
        UsageError: there is no such directory, or it does not hold one of ``names``.
    """
    path = Path(path)
    if not path.is_dir():
        raise UsageError(f"there is no checkpoint at {path}: name a directory like step-00001000")
    try:
        return _load(path, None if names is None else list(names), device)
    except _Damaged as damage:
        raise RunError(f"the checkpoint {path} is damaged: {damage}; use another one") from None


def load_origin(checkpoint: Checkpoint, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """The model that a checkpoint's adapters belong to.

    Raises:
        RunError: its file is missing or damaged.
    """
    path = checkpoint.path.parent / ORIGIN
    try:
        entry = checkpoint.state.get("origin")
        if not _is_entry(entry):
            raise _Damaged(f"{STATE} has no size and sha256 of {ORIGIN}")
        group = load_safetensors(_read_file(path, entry))
    except (_Damaged, safetensors.SafetensorError, RuntimeError, *_WRONG) as damage:
        raise RunError(f"{path.parent}: {damage}; put back a copy of it: without the model that "
                       "its adapters belong to, the run cannot be used") from None
    return {key: tensor.to(device) for key, tensor in group.items()}


def verify(path: Path) -> list[str]:
    """Compare every file of a checkpoint with its manifest: the problems found, [] if sound."""
    path = Path(path)
    try:
        _, files = _read_manifest(path)
    except _Damaged as damage:
        return [str(damage)]
    problems = []
    for name, entry in files.items():
        try:
            _read_file(path / name, entry)
        except _Damaged as damage:
            problems.append(str(damage))
    return problems


def _load(path: Path, names: list[str] | None, device: str | torch.device) -> Checkpoint:
    step, files = _read_manifest(path)
    held = [name.removesuffix(".safetensors") for name in files if name != STATE]
    wanted = held if names is None else names
    for name in wanted:
        if name not in held:
            raise UsageError(f"the checkpoint {path} holds no {name!r}, but {', '.join(held)}")
    try:
        state = json.loads(_read_file(path / STATE, files[STATE]))
    except (ValueError, RecursionError) as error:
        raise _Damaged(f"{STATE}: {error}") from None
    if not isinstance(state, dict):
        raise _Damaged(f"{STATE}: not a JSON object")
    tensors = {}
    for name in wanted:
        file = f"{name}.safetensors"
        try:
            # The very bytes that were compared are parsed: the file is not opened again.
            group = load_safetensors(_read_file(path / file, files[file]))
        except (safetensors.SafetensorError, RuntimeError, *_WRONG) as error:
            raise _Damaged(f"{file}: {error}") from None
        tensors[name] = {key: tensor.to(device) for key, tensor in group.items()}
    return Checkpoint(step, path, tensors, state)


def _read_manifest(path: Path) -> tuple[int, dict[str, dict]]:
    """(step, file -> {size, sha256}) of a manifest that is whole and of this format."""
    try:
        with open(path / MANIFEST, "rb") as file:
            raw = file.read(_MANIFEST_LIMIT + 1)
    except FileNotFoundError:
        raise _Damaged(f"{MANIFEST}: missing, the checkpoint is not complete") from None
    except OSError as error:
        raise _Damaged(f"{MANIFEST}: {error.strerror}") from None
    try:
        if len(raw) > _MANIFEST_LIMIT:
            raise ValueError
        content = json.loads(raw)
        version, step, files = content["format"], content["step"], content["files"]
        # Byte for byte what this library would write: no flipped bit can hide, not even in space.
        whole = raw == _manifest_bytes(step, files, version)
    except (RecursionError, *_WRONG):
        whole = False
    if not whole:
        raise _Damaged(f"{MANIFEST}: its content does not have the sha256 it states")
    if version != FORMAT_VERSION:
        raise _Damaged(f"{MANIFEST}: format {version} is unknown, this is format {FORMAT_VERSION}")
    if not isinstance(step, int) or not isinstance(files, dict) or STATE not in files:
        raise _Damaged(f"{MANIFEST}: it lists no {STATE}")
    match = _STEP.fullmatch(path.name.removeprefix(".old-"))
    if match and int(match[1]) != step:
        raise _Damaged(f"{MANIFEST}: it is of step {step}")
    for name, entry in files.items():
        stem = name.removesuffix(".safetensors")
        if name != STATE and (stem == name or not _NAME.fullmatch(stem)):
            raise _Damaged(f"{MANIFEST}: {name!r} is no file of a checkpoint")
        if not _is_entry(entry):
            raise _Damaged(f"{MANIFEST}: the entry of {name} is not a size and a sha256")
    return step, files


def _is_entry(entry) -> bool:
    """Whether it is what `_write_file` returns."""
    return isinstance(entry, dict) and entry.keys() == {"size", "sha256"} and (
        type(entry["size"]) is int and entry["size"] >= 0 and isinstance(entry["sha256"], str))


def _check_size(path: Path, entry: dict) -> None:
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise _Damaged(f"{path.name}: missing") from None
    except OSError as error:
        raise _Damaged(f"{path.name}: {error.strerror}") from None
    if not stat.S_ISREG(status.st_mode):
        raise _Damaged(f"{path.name}: not a regular file")
    if status.st_size != entry["size"]:
        raise _Damaged(f"{path.name}: {status.st_size} bytes instead of {entry['size']}")


def _read_file(path: Path, entry: dict) -> bytes:
    _check_size(path, entry)
    try:
        with open(path, "rb") as file:
            data = file.read(entry["size"])
    except OSError as error:
        raise _Damaged(f"{path.name}: {error.strerror}") from None
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise _Damaged(f"{path.name}: its sha256 is not the manifest's, some of it has changed")
    return data


# Keeping and clearing.


def prune(root: Path, keep_last: int, keep_every: int = 0) -> list[Path]:
    """Remove checkpoints that are no longer wanted; call it after a save that succeeded.

    Kept are the newest ``keep_last`` whose files have the right sizes, every one whose step is a
    multiple of ``keep_every`` (0: none), and all from the newest one on that verifies in full.

    Returns:
        The directories removed.
    """
    newest_first = list_checkpoints(root)[::-1]
    sound = next((step for step, path in newest_first if not verify(path)), None)
    if sound is None:
        return []
    removed, kept = [], 0
    for step, path in newest_first:
        whole = _looks_whole(path)
        wanted = whole and kept < keep_last
        kept += whole
        if wanted or step >= sound or (whole and keep_every and step % keep_every == 0):
            continue
        if _remove(path):
            removed.append(path)
    return removed


def _looks_whole(path: Path) -> bool:
    try:
        for name, entry in _read_manifest(path)[1].items():
            _check_size(path / name, entry)
    except _Damaged:
        return False
    return True


def _remove(path: Path) -> bool:
    # Renamed first: a kill while its files go leaves a stale directory, not half a checkpoint.
    doomed = path.with_name(f".tmp-{uuid.uuid4().hex}")
    try:
        os.rename(path, doomed)
    except OSError as error:
        _log.warning("the old checkpoint %s was not removed: %s", path, error.strerror)
        return False
    shutil.rmtree(doomed, ignore_errors=True)
    return True


def clean_stale(root: Path) -> None:
    """Clear what dead writers left in ``root``; only for the process that holds the run's lock."""
    root = Path(root)
    if not root.is_dir():
        return
    for path in root.glob(".old-step-*"):
        final = root / path.name.removeprefix(".old-")
        if final.exists():
            shutil.rmtree(path, ignore_errors=True)
        else:
            os.rename(path, final)
    for path in root.glob(".tmp-*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
