"""F10: a rank that dies, hangs, sees other data, or is not there any more when the run goes on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from robustdm import distributed
from robustdm.runs.checkpoint import load_newest
from robustdm.runs.config import TrainConfig
from robustdm.training import loop

from .campaign import Found, Trial
from .runs import (
    Child,
    Done,
    Reference,
    bits,
    call,
    config_of,
    draw_pictures,
    ending,
    last_step,
    newest_sound,
    once,
    resumed,
    train,
)

KILLS, STOPS, UNEQUAL, PORTS = 20, 5, 5, 2
SECONDS = 30
"""In which a job without one of its ranks has to end."""
_START = 120.0
"""Seconds for torchrun and its ranks to start and train on a busy machine."""


class Job:
    """Ranks, forked from this process, which keeps their store as torchrun does.

    Args:
        count: how many.
        work: ``work(rank)`` is what each of them does, as an entry point.
        before: the job that this one is the restart of.
    """

    def __init__(self, count: int, work: Callable[[int], int], before: Job | None = None):
        self.attempt = before.attempt + 1 if before else 0
        self.store = before.store if before else dist.TCPStore(
            "127.0.0.1", 0, None, True, wait_for_workers=False)
        self.ranks = [Child(partial(self._be, work, rank, count)) for rank in range(count)]

    def _be(self, work: Callable[[int], int], rank: int, count: int) -> int:
        torch.set_num_threads(1)  # a forked OpenMP has no threads
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": f"job {os.getppid()}",
            "TORCHELASTIC_RESTART_COUNT": str(self.attempt),
        }
        return work(rank)

    def wait(self, limit: float = 300.0) -> list[Done]:
        """How all of them ended."""
        end = time.monotonic() + limit
        return [rank.wait(max(0.1, end - time.monotonic())) for rank in self.ranks]

    def wait_for_first(self, limit: float = 120.0) -> None:
        """Wait until one has ended."""
        end = time.monotonic() + limit
        while time.monotonic() < end and not any(map(_ended, self.ranks)):
            time.sleep(0.01)


def _ended(rank: Child) -> bool:
    flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
    return os.waitid(os.P_PID, rank.process, flags) is not None


def whole(kind: str, shared: Path, count: int = 2, **fields) -> Reference:
    """The uninterrupted run of a kind on several ranks, made once."""
    def make(folder: Path) -> None:
        config = config_of(kind, folder / "run", shared, **fields)
        started = time.monotonic()
        done = Job(count, lambda _: train(config)).wait()
        if any(one.code for one in done):
            raise RuntimeError(f"the run without a fault failed: {done}")
        facts = dict(end=ending(config.out), seconds=time.monotonic() - started, written=0)
        (folder / "facts.json").write_text(json.dumps(facts))

    name = "-".join(map(str, [kind, *fields.values()]))
    place = once(shared / f"ranks-{count}-{name}", make)
    return Reference(place / "run", **json.loads((place / "facts.json").read_text()))


def fail(trial: Trial) -> Found:
    """F10: each of its kinds in turn."""
    number = trial.number
    for count, kind in ((KILLS, _kill), (STOPS, _stop), (UNEQUAL, _unequal), (PORTS, _port)):
        if number < count:
            return kind(trial, number)
        number -= count
    return _other_count(trial, number)


# A rank dies, or hangs. Each moment: what is replaced, and before which call of it.

_MOMENTS = {
    "while the ranks meet": (distributed.dist, "new_group", 0),
    "while data are loaded": (loop.Trainer, "__init__", 0),
    "before the first step": (loop.Trainer, "train_step", 0),
    "in a step": (loop.Trainer, "train_step", 7),
    "before the all-reduce": (distributed.Ranks, "all_sum", 5),
    "when weights are compared": (loop.Trainer, "check_ranks", 2),
    "in the sampling of a preview": (loop._Session, "_sample", 0),
    "in the final sampling": (loop._Session, "_sample", 2),
    "when samples are joined": (distributed.Ranks, "gather", 1),
}
_OF_RANK_0 = {
    "in a save": (loop, "save_checkpoint", 1),
    "when the run is recorded": (loop.RunDir, "record", 0),
    "while the last files are written": (loop, "write_json", 0),
}


def _ready(moments: dict, moment: str, number: signal.Signals) -> None:
    """Let this process send itself a signal at a moment."""
    owner, name, left = moments[moment]
    real, calls = getattr(owner, name), []

    def deadly(*arguments, **options):
        calls.append(1)
        if len(calls) == left + 1:
            Path("sent").write_text(str(time.monotonic()))
            os.kill(os.getpid(), number)
        return real(*arguments, **options)

    setattr(owner, name, deadly)


def _kill(trial: Trial, number: int) -> Found:
    """SIGKILL of a rank; the launcher ends the others, or does not have to."""
    kind = ("points", "digits", "points", "pictures")[number % 4]
    lost, moments = number // 2 % 2, _MOMENTS
    if lost == 0:
        moments = _MOMENTS | _OF_RANK_0
    moment = trial.random.choice(list(moments)) if number < 14 else None
    # torchrun sends the others SIGTERM at once; without it they have to find out.
    launcher = moment == "while the ranks meet" or number % 3 == 0
    reference = whole(kind, trial.shared)
    config = config_of(kind, trial.folder / "run", trial.shared)

    def work(rank: int) -> int:
        if moment and rank == lost:
            _ready(moments, moment, signal.SIGKILL)
        return train(config)

    job = Job(2, work)
    where = moment or f"at {(share := trial.random.random()):.0%} of the run's time"
    if moment is None:
        time.sleep(share * reference.seconds)
        job.ranks[lost].kill()
    job.wait_for_first()
    began = time.monotonic()
    if launcher:
        job.ranks[1 - lost].kill(signal.SIGTERM)
    rest = job.ranks[1 - lost].wait(2 * SECONDS)
    took = time.monotonic() - began
    dead = job.ranks[lost].wait()
    named = f"rank {lost} is lost" in rest.last and rest.code == 1 or (
        # It had not even begun, or has saved and stopped as it was told.
        launcher and rest.code in (-signal.SIGTERM, 0))
    reached, sound = last_step(config.out), newest_sound(config.out)
    # All steps were saved, and only rank 0 had something left to write.
    named |= rest.code == 0 and sound == config.steps
    over = rest.code == 0 and (config.out / "summary.json").exists()
    if number % 2:
        again = Job(2, lambda _: train(config), before=job).wait()
        how = "restarted by the launcher"
    else:
        again = Job(2, lambda _: train(resumed(config))).wait()
        how = "with --resume"
    finished = over or all(one.code == 0 and one.clean for one in again)
    same = finished and ending(config.out) == reference.end
    killed = over or dead.code == -signal.SIGKILL
    passed = (same and (named or over) and took <= SECONDS and rest.clean and killed
              and reached - sound <= config.checkpoint_every)
    seen = (f"the other ended after {took:.1f} s with {rest.code}: {rest.last}; step {sound} of "
            f"{reached} saved; {how}: "
            + ("final bits equal" if same else f"final bits differ: {[a.last for a in again]}"))
    return Found(f"SIGKILL of rank {lost}{', then SIGTERM' if launcher else ''}",
                 f"{kind}, {where}", "named, at most 30 s, final bits equal", seen, passed)


def _stop(trial: Trial, number: int) -> Found:
    """SIGSTOP of a rank: it is alive, and never answers."""
    kind, lost = ("points", "digits")[number % 2], (number + 1) % 2
    moments = {name: _MOMENTS[name] for name in (
        "in a step", "before the all-reduce", "when weights are compared", "when samples are joined"
    )} | {"in a save": _OF_RANK_0["in a save"]}
    moment = list(moments)[number]
    if moment == "in a save":
        lost = 0
    reference = whole(kind, trial.shared)
    config = config_of(kind, trial.folder / "run", trial.shared, rank_timeout=0.1)

    def work(rank: int) -> int:
        if rank == lost:
            _ready(moments, moment, signal.SIGSTOP)
        return train(config)

    job = Job(2, work)
    rest = job.ranks[1 - lost].wait()
    took = time.monotonic() - float(Path("sent").read_text())
    os.kill(job.ranks[lost].process, signal.SIGKILL)
    job.ranks[lost].wait()
    sound, reached = newest_sound(config.out), last_step(config.out)
    again = Job(2, lambda _: train(resumed(replace(config, rank_timeout=10.0)))).wait()
    same = all(one.code == 0 and one.clean for one in again) and (
        ending(config.out) == reference.end)
    passed = (rest.code == 1 and f"rank {lost} is lost" in rest.last and rest.clean and same
              and took <= SECONDS)
    seen = (f"exit code {rest.code} after {took:.1f} s: {rest.last}; step {sound} of "
            f"{reached} saved; resumed: "
            + ("final bits equal" if same else f"final bits differ: {[a.last for a in again]}"))
    return Found(f"SIGSTOP of rank {lost}", f"{kind}, {moment}, --rank-timeout 0.1",
                 "named, at most 30 s, final bits equal", seen, passed)


# Ranks that do not see the same.


def _unequal(trial: Trial, number: int) -> Found:
    what = ("a point more", "noisier points", "a picture fewer", "a picture of another length",
            "other corruption")[number]
    kind = ("points", "points", "pictures", "pictures", "digits")[number]
    config = config_of(kind, trial.folder / "run", trial.shared)
    if kind == "pictures":
        mine = trial.folder / "pictures"
        shutil.copytree(config.data_dir, mine)
        file = sorted(mine.iterdir())[trial.random.randrange(30)]
        file.unlink() if number == 2 else draw_pictures(trial.folder, 1, 11)
        if number == 3:
            os.replace(trial.folder / "000.png", file)
        other = replace(config, data_dir=mine)
    else:
        changed = [dict(num_points=121), dict(point_noise_level=1.5), {}, {},
                   dict(corrupt_sigma=0.3)][number]
        other = replace(config, **changed)
    done = Job(2, lambda rank: train(other if rank else config)).wait()
    said = done[0].output
    # What they were told may differ already, or else what they see.
    refused = ("the training data differs between ranks" in said if kind == "pictures" else
               any(f"'{name}': " in said for name in changed))
    passed = (all(one.code == 1 and one.clean for one in done) and not config.out.exists()
              and refused and "on rank 1" in said)
    return Found("unequal data", f"{kind}: rank 1 sees {what}",
                 "refused, the rank named, nothing written", f"exit code {done[0].code}: {said}",
                 passed)


# The launcher.


def _launch(port: int, *arguments, **environment) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
               "--master-port", str(port), "-m", "robustdm.train", "--device", "cpu", *arguments]
    root = str(Path(__file__).parents[2])
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": root} | environment)


def _flags(out: Path, steps: int) -> list[str]:
    return ["--preset", "plane", "--num-points", "200", "--mlp-width", "8", "--batch-size", "24",
            "--log-every", "5", "--checkpoint-every", "50", "--sample-every", "0", "--num-samples",
            "8", "--final-steps", "2", "--steps", str(steps), "--out", str(out)]


def _port(trial: Trial, number: int) -> Found:
    """Two jobs on one port, or a port that some other program holds; with torchrun itself."""
    first = None
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        port = other.getsockname()[1]
        if number == 0:
            other.listen()
            where = "another program listens there"
        else:
            other.close()
            where = "the launcher of another run listens there"
            first = _launch(port, *_flags(trial.folder / "first", 100))
            _until_open(port)
        began = time.monotonic()
        second = _launch(port, *_flags(trial.folder / "second", 100))
        try:
            said = second.communicate(timeout=_START)[0]
            unharmed = first is None or first.wait(_START) == 0
        finally:
            for one in (second, first):
                with suppress(AttributeError):
                    one.kill()
    took = time.monotonic() - began
    done = first is None or (trial.folder / "first" / "summary.json").exists()
    refused = str(port) in said and ("in use" in said or "EADDRINUSE" in said)
    out = trial.folder / "second"
    refused &= second.returncode != 0 and not out.exists()
    after = second.returncode == 0 and (out / "summary.json").exists()  # the other was over
    passed = (refused or number == 1 and after) and unharmed and done
    line = next((line for line in said.splitlines() if "EADDRINUSE" in line), said[-200:])
    return Found("port in use", f"torchrun, {where}",
                 "ends and names the port, nothing written, the other unharmed",
                 f"exit code {second.returncode} after {took:.0f} s: {line.strip()}", passed)


def _until_open(port: int) -> None:
    end = time.monotonic() + _START
    while time.monotonic() < end:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)


# Other numbers of ranks.


def _other_count(trial: Trial, number: int) -> Found:
    """Resume on another number of ranks, in as many pieces in all where two can be compared."""
    kind = ("points", "digits")[number % 2]
    before, after = ((1, 2), (2, 1), (2, 4))[number // 2]
    stop = trial.random.randrange(1, 12)
    pieces = {1: 2, 2: 1, 4: 1}
    reference = whole(kind, trial.shared, accumulate=1)

    def run(count: int, config: TrainConfig) -> list[Done]:
        config = replace(config, accumulate=pieces[count])
        if count == 1:
            return [call(lambda: train(config))]
        return Job(count, lambda _: train(config)).wait()

    config = config_of(kind, trial.folder / "run", trial.shared)
    first = run(before, replace(config, stop_after=stop))
    sound = newest_sound(config.out)
    with suppress(FileNotFoundError):  # the report is about an unfinished run
        (config.out / "summary.json").unlink()
    rest = run(after, resumed(config))
    good = all(one.code == 0 and one.clean for one in (*first, *rest)) and sound == stop
    same = good and bits(config.out) == bits(reference.out)
    apart = _distance(config.out, reference.out) if good else float("nan")
    passed = same if after < 4 else good and apart < 1e-4
    seen = (f"exit codes {[one.code for one in rest]}, "
            + ("final bits equal" if same else f"weights {apart:.1g} apart: {rest[0].last}"))
    return Found(f"resumed on {after} ranks instead of {before}", f"{kind}, after step {stop}",
                 "final bits equal" if after < 4 else "equal but for rounding", seen, passed)


def _distance(a: Path, b: Path) -> float:
    """Largest difference between the weights and averages of two runs, of their largest."""
    a, b = (load_newest(out / "checkpoints").tensors for out in (a, b))
    pairs = [(value, b[file][name]) for file, group in a.items() if file != "optimizer"
             for name, value in group.items()]
    return max(((x - y).abs().max() / y.abs().max().clamp(min=1e-3)).item() for x, y in pairs)
