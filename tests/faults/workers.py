"""F11: data workers that die, have no shared memory, or cannot go on with a file."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from robustdm.data import files, images
from robustdm.runs.config import TrainConfig
from robustdm.training import loop

from .campaign import Found, Trial
from .ranks import Job, whole
from .runs import (
    Done,
    call,
    config_of,
    draw_pictures,
    ending,
    mount_tmpfs,
    newest_sound,
    own_mounts,
    reference,
    resumed,
    train,
)

KILLS, FULL = 10, 3
SECONDS = 30
"""On top of three times what the run takes alone: a busy machine is no hang."""
_PAGE = os.sysconf("SC_PAGE_SIZE")
_SHARED = Path("/dev/shm")


def fail(trial: Trial) -> Found:
    """F11: each of its kinds in turn."""
    if trial.number < KILLS:
        return _kill(trial)
    if trial.number < KILLS + FULL:
        return _fill(trial, trial.number - KILLS)
    return _raise(trial, trial.number - KILLS - FULL)


def _judge(
    trial: Trial, fault: str, where: str, done: Done, config: TrainConfig, end: str, seconds: float
) -> Found:
    """It goes on with the same bits, or ends with a line that says what to do, to be resumed."""
    sound = newest_sound(config.out)
    rest = done if done.code == 0 else call(lambda: train(resumed(config)))
    same = rest.code == 0 and ending(config.out) == end
    told = done.last.startswith("error: ") and "worker" in done.last and "--resume" in done.last
    passed = (done.code == 0 or done.code == 1 and told) and done.clean and same
    passed &= done.seconds <= 3 * seconds + SECONDS
    seen = (f"exit code {done.code} after {done.seconds:.1f} s: {done.last}; step {sound} saved; "
            + ("final bits equal" if same else f"final bits differ: {rest.last}"))
    return Found(fault, where, "goes on, or one line and exit code 1; final bits equal", seen,
                 passed)


# The run's moments, and before which call of what they are.
_MOMENTS = {
    "in the first step": (loop.Trainer, "train_step", 0),
    "in a step": (loop.Trainer, "train_step", 6),
    "in the last step": (loop.Trainer, "train_step", 11),
    "in a save": (loop, "save_checkpoint", 1),
    "while metrics are written": (loop.RunDir, "append_metrics", 4),
    "in the sampling of a preview": (loop._Session, "_sample", 0),
    "in the final sampling": (loop._Session, "_sample", 2),
    "while batches are awaited": (images.ImageFiles, "_noisy", 3),
}


def _kill(trial: Trial) -> Found:
    """SIGKILL, as the system does when memory is short."""
    number = trial.number
    moment = list(_MOMENTS)[number % len(_MOMENTS)]
    both, on_rank = number == 8, number == 9
    owner, name, left = _MOMENTS[moment]
    end = whole("pictures", trial.shared) if on_rank else reference("pictures", trial.shared)
    config = config_of("pictures", trial.folder / "run", trial.shared)

    def work(rank: int = 0) -> int:
        real, calls = getattr(owner, name), []

        def deadly(*arguments, **options):
            calls.append(1)
            if len(calls) == left + 1 and rank == on_rank:
                workers = multiprocessing.active_children()
                for one in workers if both else workers[number % 2:][:1]:
                    os.kill(one.pid, signal.SIGKILL)
                time.sleep(0.1)
            return real(*arguments, **options)

        setattr(owner, name, deadly)
        return train(config)

    if not on_rank:
        fault = "SIGKILL of both workers" if both else "SIGKILL of a worker"
        return _judge(trial, fault, moment, call(work), config, end.end, end.seconds)
    first, second = Job(2, work).wait()
    rest = Job(2, lambda _: train(resumed(config))).wait()
    same = all(one.code == 0 for one in rest) and ending(config.out) == end.end
    told = "error: rank 1: " in second.last and "worker" in second.last  # for both of them
    passed = [first.code, second.code] == [1, 1] and told and same
    passed &= first.clean and second.clean and first.seconds <= 3 * end.seconds + SECONDS
    return Found("SIGKILL of a worker of rank 1 of 2", moment,
                 "both end, rank and worker named, final bits equal",
                 f"{first.last}; {second.last}; "
                 + ("final bits equal" if same else f"final bits differ: {rest[0].last}"),
                 bool(passed))


def _fill(trial: Trial, number: int) -> Found:
    """/dev/shm, through which workers hand over what they decoded, is full."""
    own_mounts()
    end = reference("pictures", trial.shared)
    config = config_of("pictures", trial.folder / "run", trial.shared)
    pages = (1, 6, 64)[number]
    mount_tmpfs(_SHARED, pages * _PAGE)

    def work() -> int:
        real, calls = loop.Trainer.train_step, []

        def train_step(self, *arguments):
            calls.append(1)
            if len(calls) == 4 and number == 2:
                with suppress(OSError), open(_SHARED / "ballast", "wb", buffering=0) as file:
                    while True:
                        file.write(bytes(_PAGE))
            return real(self, *arguments)

        loop.Trainer.train_step = train_step
        return train(config)

    done = call(work)
    mount_tmpfs(_SHARED, 64 * 2**20)
    where = f"{pages} pages" + (", filled up after step 3" if number == 2 else "")
    return _judge(trial, "/dev/shm full", where, done, config, end.end, end.seconds)


def _raise(trial: Trial, number: int) -> Found:
    """Whatever a file does to a worker, its name is told."""
    kind = ("the file is gone", "the file is cut short", "an error of the disk",
            "an error nobody thought of", "an error nobody thought of, without workers")[number]
    end = reference("pictures", trial.shared)
    mine, kept = trial.folder / "pictures", trial.folder / "kept"
    draw_pictures(mine, 30)
    config = config_of("pictures", trial.folder / "run", trial.shared, data_dir=mine)
    if number == 4:
        config = replace(config, workers=0)
    if number == 1:
        config = replace(config, max_bad=0.5)
    name = f"{trial.random.randrange(30):03d}.png"

    def work() -> int:
        real_open, real_decode = files.Folder.open, files.decode_tensor

        def broken_open(self, asked):
            if asked == name:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real_open(self, asked)

        def broken_decode(file, *arguments):
            if Path(file.name).name == name:
                raise ZeroDivisionError("a slip of a decoder")
            return real_decode(file, *arguments)

        def decode_in_workers(*arguments):
            # Not before: the headers have been read by now.
            if number == 0:
                os.replace(mine / name, kept)
            elif number == 1:
                kept.write_bytes((mine / name).read_bytes())
                os.truncate(mine / name, 60)
            elif number == 2:
                files.Folder.open = broken_open
            else:
                files.decode_tensor = broken_decode
            return real(*arguments)

        real, images.decode_in_workers = images.decode_in_workers, decode_in_workers
        return train(config)

    done = call(work)
    if kept.exists():
        os.replace(kept, mine / name)
    if number == 1:  # half of all may be bad: it goes on
        listed = (config.out / "quarantine.txt").read_text()
        passed = done.code == 0 and done.clean and listed.startswith(f"{name}\t")
        return Found(kind, f"{name}, --max-bad 0.5", "goes on, the file listed in quarantine.txt",
                     f"exit code {done.code}, quarantine.txt: {listed}", passed)
    rest = call(lambda: train(resumed(config)))
    same = rest.code == 0 and ending(config.out) == end.end
    passed = (done.code == 1 and done.clean and name in done.last and "--max-bad" in done.last
              and same)
    return Found(kind, name, "one line that names the file, exit code 1, final bits equal",
                 f"exit code {done.code}: {done.last}; "
                 + ("final bits equal" if same else f"final bits differ: {rest.last}"), passed)
