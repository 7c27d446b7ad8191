"""``python benchmarks/run.py --suite kernels|cpu``: time every fused op against plain torch;
``--suite sampling``: draw samples, against diffusers; ``--suite step``: whole training steps,
against a loop like the paper's; ``--suite evaluation``: measuring samples; ``--suite scaling``: two
ranks on this CPU against one.

Every provider is checked first: no speed is printed for a wrong result, and the exit code is 1.
benchmarks/README.md explains the columns.
"""

from __future__ import annotations

import os
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Literal

# The checkout's own package, whatever is installed.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import elementwise
import evaluation
import network
import report
import sampling
import scaling
import step
import torch
import tyro
from case import Case
from measure import Budget, measure
from timing import Sensors, copy_curve

from robustdm.cli import guard
from robustdm.errors import UsageError
from robustdm.reporting.progress import duration
from robustdm.runs.rundir import git_revision, write_json

MINUTES = {"cuda": 4.0, "cpu": 3.0}
SLACK = 12.0  # seconds for the imports, and for what comes after the last case
COPY_SIZES = {"cuda": [2**k for k in range(20, 32)], "cpu": [2**k for k in range(20, 29)]}
TINY_COPY = [2**20]
# Suites that time whole programs: modules with names(config, device), run(config, device, head,
# save), which saves the record as it grows and returns it, print_record(record) and
# failures(record).
PROGRAMS = {"sampling": sampling, "step": step, "evaluation": evaluation, "scaling": scaling}
# Suites that have these options.
WITH = {"model": ("sampling", "step"), "batch": ("sampling", "step", "evaluation"),
        "steps": ("sampling", "step")}


@dataclass(frozen=True)
class BenchmarkConfig:
    """Time the fused ops against eager torch, torch.compile and each other, or whole programs."""

    suite: Literal["kernels", "cpu", "sampling", "step", "evaluation", "scaling"]
    """kernels: on the GPU if there is one, else on the CPU; cpu: on the CPU; sampling: drawing
    samples, step: training steps, evaluation: measuring samples, where kernels runs; scaling: two
    ranks, on the CPU."""
    model: str | None = None
    """sampling: tiny (6.5 M weights, the default), or a preset for images: digits, cifar10 ...;
    step: tiny, digits, cifar, celeba64 or lsun256 (by default tiny, on a GPU cifar)."""
    batch: int | None = None
    """sampling: samples drawn at once; by default 128 on a GPU, 16 on a CPU. step: images of a
    step; by default 128 for cifar, 64 for celeba64 and digits, 16 for the others. evaluation:
    samples drawn, and images whose features are computed, at once; by default 64 and 256."""
    steps: int | None = None
    """sampling: sampling steps of a timing; by default 50 on a GPU, 5 on a CPU. step: training
    steps of the loss curves that are compared; by default 200, for tiny 30; 0 leaves them out."""
    compile: bool = True
    """step: also the rows that are compiled."""
    only: str = ""
    """Only cases (sampling: providers, evaluation: stages) whose name holds this."""
    repeats: int = 15
    """Samples of each provider at most; slow ones get fewer, to stay within the time."""
    minutes: float | None = None
    """Time for the suite; by default 4 on a GPU, 3 on a CPU (sampling: 8 and 5, step: 8 and 15,
    scaling: 4; evaluation: 3 and 5 for the whole evaluations).
    More time compiles more cases."""
    out: Path | None = None
    """Write the record, JSON, to this file."""
    plot: Path | None = None
    """Write a picture, PNG: bandwidth over bytes, with that of a copy; step: the loss curves."""
    list: bool = False
    """Only print the cases, with the bytes that each has to move."""
    tiny: bool = False
    """Tiny shapes, to try the program itself."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a suite; returns 1 if a result was wrong, else 0."""
    config = tyro.cli(BenchmarkConfig, args=argv, prog="python benchmarks/run.py")
    if config.repeats < 1:
        raise UsageError(f"repeats is {config.repeats}: it must be at least 1")
    gpu = config.suite not in ("cpu", "scaling") and torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    for field, suites in WITH.items():
        if config.suite not in suites and getattr(config, field) is not None:
            raise UsageError(f"{field} is {getattr(config, field)!r}: the suite {config.suite} has "
                             f"none; leave it out, or use --suite {' or '.join(suites)}")
    if config.suite in PROGRAMS:
        return run_program(PROGRAMS[config.suite], device, config, argv)
    cases = select(device, config.only, config.tiny)
    if config.list:
        for case in cases:
            print(f"{case.name}: {case.nbytes:,} B; {case.formula}")
        return 0
    check_outputs(config)
    if config.suite == "kernels" and not gpu:
        print("torch sees no GPU: the CPU's backends are timed instead")
    record = run(cases, device, config, command(argv))
    report.print_record(record)
    if config.plot is not None:
        report.plot(record, config.plot)
    return 1 if report.failures(record) else 0


def run_program(
    program: ModuleType, device: torch.device, config: BenchmarkConfig, argv: Sequence[str] | None
) -> int:
    """Run one of ``PROGRAMS``; returns the exit code."""
    if config.list:
        print(*program.names(config, device), sep="\n")
        return 0
    if config.plot is not None and not hasattr(program, "plot"):
        raise UsageError(f"plot is {config.plot}: the suite {config.suite} has no picture; leave "
                         "it out")
    check_outputs(config)
    # Written as it grows: what fails later, or is killed, costs no row that was measured.
    save = (lambda record: None) if config.out is None else partial(write_json, config.out)
    record = program.run(config, device, head(device, Sensors(device), command(argv)), save)
    save(record)
    program.print_record(record)
    if config.plot is not None:
        program.plot(record, config.plot)
    return 1 if program.failures(record) else 0


def check_outputs(config: BenchmarkConfig) -> None:
    """Look for the folders of the files to write, before the minutes of work.

    Raises:
        UsageError: if one is missing.
    """
    for path in (config.out, config.plot):
        if path is not None and not path.absolute().parent.is_dir():
            raise UsageError(f"{path} cannot be written: make the directory {path.parent} first")


def select(device: torch.device, only: str, tiny: bool) -> list[Case]:
    """Cases by name, the most wanted first.

    Raises:
        UsageError: if there is none.
    """
    cases = elementwise.cases(device, tiny) + network.cases(device, tiny)
    found = sorted((c for c in cases if only in c.name), key=lambda case: case.priority)
    if not found:
        raise UsageError(f"only is {only!r}: no case's name holds that; --list prints all of them")
    return found


def run(cases: list[Case], device: torch.device, config: BenchmarkConfig, command: str) -> dict:
    """Measure the cases that there is time for; returns the record, JSON-able."""
    begin, minutes = time.perf_counter(), config.minutes or MINUTES[device.type]
    budget = Budget(60 * minutes - SLACK, len(cases), device.type)
    sensors = Sensors(device)
    record = {
        "schema": report.SCHEMA,
        **head(device, sensors, command),
        "copy": copy_curve(device, TINY_COPY if config.tiny else COPY_SIZES[device.type]),
        "cases": [], "left_out": [],
    }
    print(f"copy: {report.copy_ceiling(record):.0f} GB/s; {len(cases)} cases", flush=True)
    for number, case in enumerate(cases, 1):
        if not budget.has_room():
            record["left_out"].append(case.name)
            continue
        print(f"[{number}/{len(cases)}] {case.name}; at most {duration(max(0, budget.left))} left",
              flush=True)
        done = measure(case, device, config.repeats, sensors, budget.may_compile)
        compiling = [row["compile_s"] for row in done["rows"] if "compile_s" in row]
        budget.case_done(done["seconds"], compiling)
        record["cases"].append(done)
        if config.out is not None:  # one that is killed costs no case before it
            write_json(config.out, finished(record, begin))
        if device.type == "cuda":
            torch.cuda.empty_cache()  # graphs of their own pools
    finished(record, begin)
    if config.out is not None:
        write_json(config.out, record)
    return record


def finished(record: dict, begin: float) -> dict:
    """The record with what follows from its cases so far."""
    record["load_after"] = os.getloadavg()[0]
    record["seconds"] = time.perf_counter() - begin
    report.derive(record)
    return record


def head(device: torch.device, sensors: Sensors, command: str) -> dict:
    """What every record begins with, behind its schema."""
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": command,
        **machine(device, sensors),
        "load_before": os.getloadavg()[0],
    }


def command(argv: Sequence[str] | None) -> str:
    """The command as typed, without the paths of this machine."""
    arguments = sys.argv[1:] if argv is None else argv
    short = [Path(a).name if os.path.isabs(a) else a for a in arguments]
    return shlex.join(["python", "benchmarks/run.py", *short])


def machine(device: torch.device, sensors: Sensors) -> dict:
    """What the numbers depend on besides the code."""
    revision = git_revision()
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    try:
        import triton

        versions["triton"] = triton.__version__
    except Exception:  # a broken installation raises anything
        versions["triton"] = None
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else None
    return {
        "device": device.type, "gpu": gpu, "driver": sensors.driver(), "cuda": torch.version.cuda,
        "sensors_off": sensors.why_off, "cpu": cpu_model(), "cores": os.cpu_count(),
        "threads": torch.get_num_threads(), "versions": versions, "git": revision,
        "dirty": revision is None or revision.endswith("-dirty"),
    }


def cpu_model() -> str:
    """Name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


if __name__ == "__main__":
    guard(main)
