"""What trials share: tiny runs, processes to make them in, and the comparison of their ends."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from robustdm.cli import guard
from robustdm.runs.checkpoint import list_checkpoints, load_newest, verify
from robustdm.runs.config import TrainConfig
from robustdm.runs.presets import preset_values
from robustdm.runs.rundir import read_metrics, write_text
from robustdm.training import loop, outputs

from .campaign import Skip, Trial

STEPS, INTERVAL = 12, 3
_TINY = dict(batch_size=8, steps=STEPS, log_every=1, checkpoint_every=INTERVAL, sample_every=5,
             num_samples=2, preview_steps=2, final_steps=2, checkpoint_minutes=0.0,
             final_sampler="ddim")
_NETWORK = dict(block_channels=(8,), norm_groups=4, dropout=0.1, flip=True, ema_rates=(0.9,),
                holdout=0.0)
KINDS = ("points", "digits", "points", "pictures", "points", "digits")


def config_of(kind: str, out: Path, shared: Path, **fields) -> TrainConfig:
    """A tiny run: points (an MLP), digits (a U-Net), or pictures that two workers decode."""
    if kind == "points":
        values = preset_values("plane") | _TINY | dict(num_points=120, ema_rates=(0.9, 0.5))
    elif kind == "digits":
        values = _TINY | _NETWORK | dict(accumulate=2)
    else:
        values = preset_values("folder") | _TINY | _NETWORK | dict(
            data_dir=pictures(shared), resolution=8, resident_gib=0.0, workers=2,
            corrupt_fraction=0.5)
    return TrainConfig(**{**values, "out": out, **fields})


def pictures(shared: Path) -> Path:
    """A folder of 30 small pictures, made once."""
    return once(shared / "pictures", lambda folder: draw_pictures(folder, 30))


def draw_pictures(folder: Path, count: int, side: int = 10) -> None:
    generator = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(count):
        pixels = generator.integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{k:03d}.png")


def once(place: Path, make: Callable[[Path], object]) -> Path:
    """What ``make(directory)`` writes, made by the first who asks for it."""
    if not place.exists():
        mine = Path(tempfile.mkdtemp(dir=place.parent))
        make(mine / "new")
        with contextlib.suppress(OSError):  # another trial was faster
            os.rename(mine / "new", place)
        shutil.rmtree(mine)
    return place


# Processes.


@dataclass
class Done:
    """How a process ended.

    Attributes:
        code: its exit code, negative for a signal.
        output: what it wrote to stdout and stderr.
        seconds, cpu_s: elapsed time, and time of the processor with that of its children.
        rss: its largest resident memory in bytes.
    """

    code: int
    output: str
    seconds: float
    cpu_s: float
    rss: int

    @property
    def last(self) -> str:
        """The last line of the output: an error's, where there was one."""
        lines = self.output.strip().splitlines()
        return lines[-1][:200] if lines else ""

    @property
    def clean(self) -> bool:
        """Whether there was no traceback."""
        return "Traceback" not in self.output


class Child:
    """A forked process that calls a function as an entry point would be called."""

    def __init__(self, function: Callable[[], int | None]):
        # A pipe: a limit on files, or a full disk, is to meet the run and not its output.
        self.pipe, writing = os.pipe()
        os.set_blocking(self.pipe, False)
        self.output = b""
        self.started = time.monotonic()
        sys.stdout.flush()
        sys.stderr.flush()
        self.process = os.fork()
        if self.process == 0:
            self._be(function, writing)
        os.close(writing)

    def _be(self, function: Callable[[], int | None], writing: int) -> None:
        code = 70
        try:
            os.dup2(writing, 1)
            os.dup2(writing, 2)
            os.close(writing)
            sys.stdout.reconfigure(line_buffering=True)
            guard(function)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
            code = 1
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.process, number)

    def wait(self, limit: float = 300.0) -> Done:
        """Wait for the end; who is late is killed, with code -9."""
        end = time.monotonic() + limit
        while True:
            found, status, usage = os.wait4(self.process, os.WNOHANG)
            with contextlib.suppress(BlockingIOError):
                while content := os.read(self.pipe, 1 << 16):
                    self.output += content
            if found:
                break
            if time.monotonic() > end:
                self.kill()
                end += limit
            time.sleep(0.002)
        os.close(self.pipe)
        output = self.output.decode("utf-8", "replace")
        return Done(os.waitstatus_to_exitcode(status), output, time.monotonic() - self.started,
                    usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def call(function: Callable[[], int | None], limit: float = 300.0) -> Done:
    """Call a function in a forked process and wait for its end."""
    return Child(function).wait(limit)


def train(config: TrainConfig) -> int:
    """Train as ``python -m robustdm.train`` does; the exit code.

    The report's curves and the estimate of memory would take longer than the run: they are left
    out.
    """
    outputs.write_report = lambda out: write_text(out / "report.html", "a report\n")
    loop.estimate_bytes = lambda *_: {"weights": 0, "activations": 0, "total": 0}
    return loop.train(config, progress_mode="off").exit_code


def resumed(config: TrainConfig) -> TrainConfig:
    """The configuration that goes on with a run, or begins one that never wrote anything."""
    return replace(config, resume=(config.out / "config.yaml").exists())


# Ends.


def bits(out: Path) -> str:
    """A digest of where a run has come to: step, and all tensors' bits."""
    checkpoint = load_newest(out / "checkpoints")
    digest = hashlib.sha256(str(checkpoint.step).encode())
    for name in sorted(checkpoint.tensors):
        for key, tensor in sorted(checkpoint.tensors[name].items()):
            digest.update(f"{name} {key} {tensor.dtype}".encode())
            digest.update(tensor.contiguous().reshape(-1).numpy().tobytes())
    return digest.hexdigest()[:16]


def ending(out: Path) -> str:
    """A digest of `bits`, and of every loss on the way."""
    digest = hashlib.sha256(bits(out).encode())
    for line in read_metrics(out / "metrics.jsonl"):
        kept = {key: line.get(key) for key in ("step", "loss", "fit", "reg", "grad_norm")}
        digest.update(json.dumps(kept).encode())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Reference:
    """The same run without a fault.

    Attributes:
        out: its directory, which nobody may change.
        end: its `ending`.
        seconds: how long it took.
        written: bytes of checkpoints that it wrote.
    """

    out: Path
    end: str
    seconds: float
    written: int


def reference(kind: str, shared: Path, name: str = "", **fields) -> Reference:
    """The uninterrupted run of a kind, made once."""
    def make(folder: Path) -> None:
        config = config_of(kind, folder / "run", shared, **fields)
        done = call(lambda: train(config))
        if done.code:
            raise RuntimeError(f"the run without a fault failed: {done.output}")
        saves = -(-config.steps // config.checkpoint_every)
        newest = list_checkpoints(config.out / "checkpoints")[-1][1]
        size = sum(file.stat().st_size for file in newest.iterdir())
        facts = dict(end=ending(config.out), seconds=done.seconds, written=saves * size)
        (folder / "facts.json").write_text(json.dumps(facts))

    place = once(shared / f"reference-{kind}{name}", make)
    return Reference(place / "run", **json.loads((place / "facts.json").read_text()))


def newest_sound(out: Path) -> int:
    """Step of the newest checkpoint that verifies, 0 if there is none."""
    sound = [step for step, path in list_checkpoints(out / "checkpoints") if not verify(path)]
    return max(sound, default=0)


def last_step(out: Path) -> int:
    """The last step that metrics.jsonl tells of, 0 if there is none."""
    path = out / "metrics.jsonl"
    return max((line["step"] for line in read_metrics(path)), default=0) if path.exists() else 0


# The system.

_libc = ctypes.CDLL(None, use_errno=True)
_READ_ONLY, _REMOUNT = 1, 32
_NEWNS, _PRIVATE = 0x00020000, 0x00040000 | 0x00004000


def own_mounts() -> None:
    """From here on this process's mounts are its own, and go when it ends.

    Raises:
        Skip: this machine does not allow it.
    """
    if _libc.unshare(_NEWNS) or _libc.mount(b"none", b"/", None, _PRIVATE, None):
        raise Skip(f"mounting is not allowed here ({os.strerror(ctypes.get_errno())})")


def mount_tmpfs(place: Path, size: int) -> None:
    """Mount a file system of ``size`` bytes in memory; `own_mounts` first."""
    place.mkdir(parents=True, exist_ok=True)
    if _libc.mount(b"tmpfs", os.fsencode(place), b"tmpfs", 0, f"size={size}".encode()):
        raise Skip(f"mounting is not allowed here ({os.strerror(ctypes.get_errno())})")


def remount(place: Path, read_only: bool) -> None:
    """Make a mounted file system, of which no file is open, read-only or writable again."""
    flags = _REMOUNT | (_READ_ONLY if read_only else 0)
    if _libc.mount(b"none", os.fsencode(place), None, flags, None):
        raise Skip(f"mounting is not allowed here ({os.strerror(ctypes.get_errno())})")


def kind_of(trial: Trial) -> str:
    """Each kind of run in turn."""
    return KINDS[trial.number % len(KINDS)]
