"""F3: a full disk, and a limit on the size of files."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

from robustdm.reporting import progress
from robustdm.runs import checkpoint, rundir
from robustdm.runs.checkpoint import list_checkpoints, verify
from robustdm.training import loop, outputs

from .campaign import Found, Trial
from .runs import (
    STEPS,
    call,
    config_of,
    ending,
    mount_tmpfs,
    newest_sound,
    own_mounts,
    reference,
    resumed,
    train,
)

FULL = 20
_LEFT = (0, 4096, 0.25, 0.6, 0.95)
"""What is left of the disk: bytes, or share of the file that is being written."""
_PLACES = ("model", "ema", "optimizer", "the rest")
_REST = ("metrics.jsonl", "a preview", "the final samples", "summary.json", "standard output")


class _Disk:
    """A small file system that can be filled up."""

    def __init__(self, place: Path):
        self.ballast = place / "ballast"

    def fill(self, left: int) -> None:
        """Take all but so many bytes, which the system rounds to pages."""
        statistics = os.statvfs(self.ballast.parent)
        take = max(0, statistics.f_bavail * statistics.f_frsize - left)
        with open(self.ballast, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, take) if take else None

    def free(self) -> None:
        self.ballast.unlink(missing_ok=True)


def fill(trial: Trial) -> Found:
    """F3: the disk is full when a certain file is written, for a while or until the end."""
    if trial.number >= FULL:
        return _limited(trial)
    own_mounts()
    part, left = _PLACES[trial.number % 4], _LEFT[trial.number // 4]
    for_good = trial.random.random() < 0.5
    kind = "digits" if part == "the rest" else ("points", "digits")[trial.number % 2]
    whole = reference(kind, trial.shared)
    place = trial.folder / "disk"
    mount_tmpfs(place, 24 * 2**20)
    config = config_of(kind, place / "run", trial.shared)
    disk, said = _Disk(place), trial.folder / "said"
    place_name = _REST[trial.number // 4] if part == "the rest" else part

    def work() -> int:
        if part == "the rest":
            _full_at(place_name, disk, place, for_good)
        else:
            _full_in_save(part, left, disk, for_good)
        return train(config)

    done = call(work)
    warned = "No space left" in done.output or "are free" in done.output
    # A page that a file has already may hold what is added to it; and where the output itself is
    # on the disk, there is nobody to be warned.
    unharmed = done.code == 0 and ending(config.out) == whole.end
    said.write_text(done.output)
    sound, steps = newest_sound(config.out), list_checkpoints(config.out / "checkpoints")
    all_sound = all(not verify(path) for _, path in steps)
    named = done.code == 0 or str(config.out) in done.last
    disk.free()
    rest = call(lambda: _finish(config))
    same = rest.code == 0 and ending(config.out) == whole.end and _complete(config.out)
    went_on = done.code == 0 or for_good or place_name in ("the final samples", "summary.json")
    passed = ((warned or unharmed) and all_sound and named and same and went_on and done.clean
              and rest.clean)
    where = f"{kind}, {place_name}" + (
        "" if part == "the rest" else f", {left if left >= 1 or not left else f'{left:.0%}'} left")
    seen = (f"exit code {done.code}, {'warned' if warned else 'NO warning'}, sound up to step "
            f"{sound}, {'all' if all_sound else 'NOT all'} verify; with room again "
            f"{'final bits equal' if same else f'NOT as without the fault: {rest.last}'}"
            + (f"; {done.last}" if done.code else ""))
    return Found(f"disk full {'for good' if for_good else 'for a while'}", where,
                 "a warning; it goes on, or exits with the path; all checkpoints verify; final "
                 "bits "
                 "equal", seen, passed)


def _finish(config) -> int:
    return 0 if (config.out / "summary.json").exists() else train(resumed(config))


def _complete(out: Path) -> bool:
    """Whether everything that a run leaves is there, and nothing half written."""
    names = ["summary.json", "report.html", "samples/final.npz", "samples/reference.npz"]
    left_over = [path for path in out.rglob(".tmp-*")]
    return all((out / name).exists() for name in names) and not left_over


def _full_in_save(part: str, left: float, disk: _Disk, for_good: bool) -> None:
    """In the second save, the disk is full when one file is begun."""
    write, seen = checkpoint._write_file, []

    def write_file(path: Path, chunks):
        if path.name.startswith(part):
            seen.append(path)
            if len(seen) == 2 or for_good and len(seen) > 2:
                chunks = list(chunks)
                size = sum(len(chunk) for chunk in chunks)
                disk.fill(int(left * size) if 0 < left < 1 else int(left))
        try:
            return write(path, chunks)
        finally:
            if not for_good:
                disk.free()

    checkpoint._write_file = write_file


def _full_at(name: str, disk: _Disk, place: Path, for_good: bool) -> None:
    """The disk is full when something else than a checkpoint is written."""
    owner, function, count = {
        "metrics.jsonl": (rundir.RunDir, "append_metrics", 4),
        "a preview": (outputs.Outputs, "write_samples", 1),
        "the final samples": (outputs.Outputs, "finish", 1),
        "summary.json": (outputs, "write_json", 1),
        "standard output": (progress.Progress, "update", 1),
    }[name]
    real, calls = getattr(owner, function), []
    if name == "standard output":
        file = open(place / "log.txt", "w", buffering=1)
        os.dup2(file.fileno(), 1)
        progress.PLAIN_INTERVAL = 0.0
        # `train` here is without a progress line; a program under nohup has one.
        make = loop.Progress
        loop.Progress = lambda *arguments, mode, **options: make(*arguments, mode="plain",
                                                                 **options)

    def full(*arguments, **options):
        calls.append(1)
        if len(calls) == count or for_good and len(calls) > count:
            disk.fill(0)
        try:
            return real(*arguments, **options)
        finally:
            if not for_good:
                disk.free()

    setattr(owner, function, full)
    sys.stdout.flush()


def _limited(trial: Trial) -> Found:
    """No file of the run may be larger than so many bytes (``ulimit -f``), from a step on."""
    kind = ("points", "digits")[trial.number % 2]
    whole = reference(kind, trial.shared)
    config = config_of(kind, trial.folder / "run", trial.shared)
    largest = max(path.stat().st_size for path in whole.out.rglob("*") if path.is_file())
    limit = trial.random.choice((100, 1000, 5000, largest // 3, largest - 1))
    step = trial.random.choice((0, 4, 8))

    def work() -> int:
        def lower() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        real, calls = loop.Trainer.train_step, []

        def train_step(*arguments):
            calls.append(1)
            if len(calls) == step:
                lower()
            return real(*arguments)

        loop.Trainer.train_step = train_step
        if not step:
            lower()
        return train(config)

    done = call(work)
    steps = list_checkpoints(config.out / "checkpoints")
    all_sound = all(not verify(path) for _, path in steps)
    kept = not steps or steps[-1][0] == STEPS or step == 0 or steps[-1][0] >= (step - 1) // 3 * 3
    named = str(config.out) in done.last and done.clean
    rest = call(lambda: _finish(config))
    same = rest.code == 0 and rest.clean and ending(config.out) == whole.end
    passed = done.code == 1 and all_sound and kept and named and same
    seen = (f"exit code {done.code}: {done.last}; {len(steps)} checkpoints, "
            f"{'all' if all_sound else 'NOT all'} verify; without the limit "
            f"{'final bits equal' if same else f'NOT as without the fault: {rest.last}'}")
    return Found("RLIMIT_FSIZE", f"{kind}, {limit} bytes from step {step} on",
                 "exits with the path, all checkpoints verify, final bits equal", seen, passed)
