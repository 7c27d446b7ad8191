"""Trials and groups; each trial in a process of its own; one JSON line for each."""

from __future__ import annotations

import gc
import json
import os
import random
import selectors
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

LIMIT = 400.0
"""Seconds after which a trial that has not ended counts as a failure."""


class Skip(Exception):
    """The trial cannot be made on this machine; the text says why."""


@dataclass
class Trial:
    """One trial: what it is, and a place to work in.

    Attributes:
        group, number, seed: all that decides what it does.
        folder: empty directory of its own.
        shared: directory of all trials of a campaign, for what many need.
    """

    group: str
    number: int
    seed: int
    folder: Path
    shared: Path
    random: random.Random = field(init=False)

    def __post_init__(self):
        self.random = random.Random(f"{self.seed} {self.group} {self.number}")


@dataclass
class Found:
    """What a trial saw.

    Attributes:
        fault: what went wrong on purpose.
        where: the place or moment of it.
        expected: the rule.
        seen: what happened.
        passed: whether that is what the rule says.
    """

    fault: str
    where: str
    expected: str
    seen: str
    passed: bool


@dataclass(frozen=True)
class Group:
    """Trials of one kind: ``run(trial)`` makes trial 0 to ``count`` - 1."""

    name: str
    title: str
    count: int
    run: Callable[[Trial], Found]
    limit: float = LIMIT


@dataclass
class Record:
    """One line of the record."""

    group: str
    trial: int
    fault: str
    where: str
    expected: str
    seen: str
    verdict: str
    seconds: float


def choose(groups: Iterable[Group], tenth: bool, seed: int) -> list[tuple[Group, int]]:
    """The trials to make: all, or a seeded tenth of every group and at least one of it."""
    chosen = []
    for group in groups:
        numbers = range(group.count)
        if tenth:
            count = max(1, group.count // 10)
            numbers = sorted(random.Random(f"{seed} {group.name}").sample(numbers, count))
        chosen += [(group, number) for number in numbers]
    return chosen


def run_all(
    chosen: list[tuple[Group, int]], seed: int, jobs: int, base: Path | None = None
) -> Iterator[Record]:
    """Make the trials, ``jobs`` at a time, and yield their records as they end."""
    with tempfile.TemporaryDirectory(prefix="faults-", dir=base, ignore_cleanup_errors=True) as top:
        shared = Path(top, "shared")
        shared.mkdir()
        gc.collect()
        gc.freeze()  # else the collector of every child would copy all that was imported
        waiting, running = list(reversed(chosen)), {}
        with selectors.DefaultSelector() as selector:
            try:
                while waiting or running:
                    while waiting and len(running) < jobs:
                        group, number = waiting.pop()
                        folder = Path(top, f"{group.name}-{number}")
                        folder.mkdir()
                        cell = _Cell(group, Trial(group.name, number, seed, folder, shared))
                        running[cell.pipe] = cell
                        selector.register(cell.pipe, selectors.EVENT_READ)
                    ended = [running[key.fd] for key, _ in selector.select(timeout=0.2)]
                    ended = [cell for cell in ended if cell.read()]
                    ended += [cell for cell in running.values() if cell.late and cell not in ended]
                    for cell in ended:
                        selector.unregister(cell.pipe)
                        del running[cell.pipe]
                        yield cell.end()
            finally:
                for cell in running.values():
                    cell.end()


class _Cell:
    """The process of one trial, and the pipe that its answer comes through."""

    def __init__(self, group: Group, trial: Trial):
        self.group, self.trial = group, trial
        self.started = time.monotonic()
        self.answer = b""
        self.pipe, writing = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        self.process = os.fork()
        if self.process == 0:
            os.close(self.pipe)
            _work(group, trial, writing)
        os.close(writing)

    @property
    def late(self) -> bool:
        return time.monotonic() - self.started > self.group.limit

    def read(self) -> bool:
        """Read what has come; whether that was all."""
        content = os.read(self.pipe, 1 << 16)
        self.answer += content
        # A data worker that outlives its killed run keeps the pipe open for some seconds.
        return not content or self.answer.endswith(b"\n")

    def end(self) -> Record:
        # The trial's own processes are in its group: none of them outlives it.
        try:
            os.killpg(self.process, signal.SIGKILL)
        except ProcessLookupError:
            pass
        code = os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])
        os.close(self.pipe)
        seconds = round(time.monotonic() - self.started, 2)
        try:
            values = json.loads(self.answer)
        except ValueError:
            seen = f"no end within {self.group.limit:.0f} s" if self.late else (
                f"the trial's process ended with {code}")
            values = {"fault": "", "where": "", "expected": "", "seen": seen, "verdict": "FAIL"}
        if values["verdict"] != "FAIL":
            shutil.rmtree(self.trial.folder, ignore_errors=True)
        return Record(self.trial.group, self.trial.number, **values, seconds=seconds)


def _work(group: Group, trial: Trial, writing: int) -> None:
    """The child: make the trial, write what was found, and be gone."""
    try:
        os.setpgid(0, 0)
        quiet = os.open(trial.folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        os.chdir(trial.folder)
        try:
            found = group.run(trial)
            values = asdict(found)
            values["verdict"] = "pass" if values.pop("passed") else "FAIL"
        except Skip as reason:
            values = {"fault": "", "where": "", "expected": "", "seen": str(reason),
                      "verdict": "skip"}
        except BaseException as error:
            traceback.print_exc()
            last = traceback.extract_tb(error.__traceback__)[-1]
            values = {"fault": "", "where": f"{Path(last.filename).name}:{last.lineno}",
                      "expected": "", "seen": f"{type(error).__name__}: {error}",
                      "verdict": "FAIL"}
        for key in ("fault", "where", "expected", "seen"):
            text = " ".join(str(values[key]).split())
            for place in (trial.folder, trial.shared):  # names below them, not where they lie
                text = text.replace(f"{place}/", "").replace(str(place), "")
            values[key] = text[:300]
        sys.stdout.flush()
        sys.stderr.flush()
        data = json.dumps(values).encode() + b"\n"
        while data:
            data = data[os.write(writing, data):]
    finally:
        os._exit(0)
