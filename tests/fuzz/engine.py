"""Which inputs lead somewhere new: by atheris where it is installed, else by tracing lines."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from robustdm.errors import RobustDMError

from .guard import check
from .mutate import mutate

if TYPE_CHECKING:
    from .targets import Target

MAX_BYTES = 1 << 16  # of an input


class Session:
    """A target, its inputs so far and what they found.

    Args:
        target: what to run.
        out: keeps ``corpus/`` and ``findings/``; nothing is kept if None.
    """

    def __init__(self, target: Target, out: Path | None = None):
        self.target, self.out = target, out
        self.executions = 0
        self.findings: dict[str, str] = {}
        self.lines: set[tuple[str, int]] = set()
        self._folder = Path(tempfile.mkdtemp(prefix=f"fuzz-{target.name}-"))
        target.prepare(self._folder)
        for data in target.seeds():  # what is imported now takes no time later
            with contextlib.suppress(RobustDMError):
                target.run(data, self._folder)
        for name in ("corpus", "findings") if out else ():
            (out / name).mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def seeds(self) -> list[bytes]:
        """The target's own inputs and those that are kept."""
        kept = sorted(self.out.glob("corpus/*")) if self.out else []
        return self.target.seeds() + [path.read_bytes() for path in kept]

    def run(self, data: bytes) -> None:
        """One input; a fault is noted once."""
        self.executions += 1
        fault = check(lambda folder: self.target.run(data, folder), self._folder)
        if fault and (name := fault.splitlines()[0]) not in self.findings:
            self.findings[name] = fault
            if self.out:
                stem = self.out / "findings" / f"{len(self.findings):02d}"
                stem.with_suffix(".bin").write_bytes(data)
                stem.with_suffix(".txt").write_text(fault, errors="backslashreplace")

    def traced(self, data: bytes) -> bool:
        """One input; whether it reached a line of the target's modules as the first one."""
        known = len(self.lines)

        def line(frame, event, _):
            if event == "line":
                self.lines.add((frame.f_code.co_filename, frame.f_lineno))
            return line

        def call(frame, event, _):
            return line if self.target.covers(frame.f_code.co_filename) else None

        sys.settrace(call)
        try:
            self.run(data)
        finally:
            sys.settrace(None)
        return len(self.lines) > known

    def report(self) -> dict:
        """What was done, JSON-able."""
        return {"target": self.target.name, "executions": self.executions,
                "lines": len(self.lines), "findings": sorted(self.findings)}


def explore(session: Session, seed: int, seconds: float = 0, executions: int = 0,
            trace: bool = True) -> None:
    """Mutate for so many seconds or executions, keeping what leads somewhere new if ``trace``."""
    draw, end = Random(seed), time.process_time() + seconds
    step = session.traced if trace else session.run
    corpus = session.seeds()
    for data in corpus:
        step(data)
    end_count = session.executions + executions
    while session.executions < end_count or time.process_time() < end:
        data = mutate(draw.choice(corpus), draw, corpus)[:MAX_BYTES]
        if step(data):
            corpus.append(data)
            if session.out:
                name = f"{len(corpus):06d}"
                (session.out / "corpus" / name).write_bytes(data)


def explore_with_atheris(session: Session, seed: int, seconds: float, finish) -> None:
    """The same by atheris, which never returns: ``finish`` is called when the time is over."""
    import atheris

    corpus = session.out / "corpus"
    seeds = session.seeds()
    for k, data in enumerate(session.target.seeds()):
        (corpus / f"seed-{k}").write_bytes(data)
    end = time.process_time() + seconds

    def change(data, max_size, number):
        draw = Random(number)
        if not data or draw.random() < 0.3:
            return atheris.Mutate(data or b"\0", max_size)
        return mutate(data, draw, seeds)[:max_size]

    def one_input(data):
        if time.process_time() > end:
            for path in sorted(corpus.iterdir()):
                session.traced(path.read_bytes())
            finish()
        if data:
            session.run(data)

    options = [f"-seed={seed + 1}", f"-max_len={MAX_BYTES}", "-timeout=600", "-rss_limit_mb=0",
               "-print_final_stats=0", "-verbosity=0", "-reload=0", str(corpus)]
    atheris.Setup([sys.argv[0], *options], one_input, custom_mutator=change)
    atheris.Fuzz()


def main(make_target, seconds: float, seed: int, out: Path, engine: str) -> None:
    """Fuzz one target, print a line of JSON and exit, with 1 if there are findings."""
    faulthandler.enable()
    logging.disable()
    session = Session(make_target(), out)

    def finish():
        session.__exit__()
        line = json.dumps({**session.report(), "engine": engine, "seed": seed})
        print(line, flush=True)
        with open(out / "log.jsonl", "a") as log:
            log.write(line + "\n")
        os._exit(bool(session.findings))

    if engine == "atheris":
        explore_with_atheris(session, seed, seconds, finish)
    else:
        explore(session, seed, seconds)
        finish()
