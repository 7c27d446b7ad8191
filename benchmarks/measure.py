"""Check and time the providers of one case, within a time budget."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict

import torch
from case import Case, Provider, Setup
from timing import (
    Sensors,
    Timer,
    copies_needed,
    cpu_timer,
    cuda_timer,
    duplicate,
    host_ms,
    one_line,
    peak_mib,
    spread,
)

from robustdm import ops

# Seconds of timing per case, and first guesses of what a case and a compilation take in all.
SECONDS = {"cpu": 2.0, "cuda": 0.5}
CASE_GUESS = {"cpu": 4.0, "cuda": 1.5}
COMPILE_GUESS = {"cpu": 12.0, "cuda": 6.0}
FEWEST = 3  # samples, unless each takes longer than SLOW
SLOW = 1.0  # seconds


class Budget:
    """How the time of a suite is shared out: every case first, what is over goes to compiling."""

    def __init__(self, seconds: float, cases: int, kind: str):
        self.end = time.perf_counter() + seconds
        self.cases_left = cases
        self._cases, self._compiled = [CASE_GUESS[kind]], [COMPILE_GUESS[kind]]

    @property
    def left(self) -> float:
        return self.end - time.perf_counter()

    @property
    def needed(self) -> float:
        """Seconds that the cases still to come need, without compiling."""
        return self.cases_left * self._mean(self._cases)

    def has_room(self) -> bool:
        return self.left > self._mean(self._cases)

    def may_compile(self, wanted: bool) -> bool:
        """Whether to compile; what a target needs goes before the cases that come last."""
        reserved = 0.3 * self.needed if wanted else self.needed
        return self.left - reserved > 1.5 * self._mean(self._compiled)

    def case_done(self, seconds: float, compiling: Sequence[float]) -> None:
        self.cases_left -= 1
        self._cases.append(seconds - sum(compiling))
        self._compiled += compiling

    @staticmethod
    def _mean(values: list[float]) -> float:
        # The first guess counts until there is something better.
        known = values[1:] or values
        return sum(known) / len(known)


@torch.no_grad()
def measure(
    case: Case, device: torch.device, repeats: int, sensors: Sensors,
    may_compile: Callable[[bool], bool] = lambda wanted: True,
) -> dict:
    """Check every provider of a case, then time those that are right; JSON-able.

    Args:
        repeats: samples of each provider at most; slow ones get fewer.
        may_compile: whether there is time left to compile, for a target of the issue or not.

    Returns:
        The case with one row per provider: status "ok", "WRONG", "FAILED" or "off", and for "ok"
        ms (median), p20, p80, gb_s; on a GPU of cold caches, with warm_ms, host_ms and peak_mib.
    """
    torch._dynamo.reset()  # its limit of recompilations is for one case, not for all
    begin, before = time.perf_counter(), sensors.read()
    try:
        setup = case.build(device)
        sets = [setup.inputs]
        if device.type == "cuda":
            sets += [tuple(map(duplicate, setup.inputs))
                     for _ in range(copies_needed(case.nbytes, device) - 1) if setup.inputs]
    except Exception as error:  # out of memory, say: the other cases can still be measured
        setup = Setup((), [], {})
        broken = [{"provider": "inputs", **_broken(None, error)}]
    else:
        broken = []
    rows = broken + [{"provider": name, "status": "off", "reason": why}
                     for name, why in setup.off.items()]
    timers: list[tuple[dict, str, Timer]] = []
    providers = {provider.name: provider for provider in setup.providers}
    for provider in setup.providers:
        wanted = case.priority == 0 and provider.name == "compile"
        row = _checked(provider, setup, not provider.compiles or may_compile(wanted))
        rows.append(row)
        if row["status"] == "ok":
            try:
                timers += _timers(row, provider, sets, device)
            except Exception as error:  # out of memory, say
                row.update(_broken(provider, error))
    for row, key, samples in _interleaved(timers, repeats, SECONDS[device.type]):
        if isinstance(samples, Exception):
            row.update(_broken(providers[row["provider"]], samples))
        if row["status"] != "ok":
            for timed in ("ms", "p20", "p80", "samples", "gb_s", "warm_ms"):
                row.pop(timed, None)
            continue
        measured = spread(samples)
        if key == "warm":
            row["warm_ms"] = measured["ms"]
        else:
            row.update(measured, gb_s=case.nbytes / measured["ms"] / 1e6)
    after = sensors.read()
    joules = {"case_joules": after["joules"] - before["joules"]} if (
        "joules" in before.keys() & after.keys()) else {}
    compiling = sum(row.get("compile_s", 0) for row in rows)
    return {
        **{k: v for k, v in asdict(case).items() if k not in ("build", "dtype")},
        "dtype": str(case.dtype).removeprefix("torch."),
        "auto": ops.resolve(case.op, "auto", device, case.dtype),
        "seconds": time.perf_counter() - begin, "compile_s": compiling,
        "sensors": {**after, **joules}, "rows": rows,
    }


def _checked(provider: Provider, setup: Setup, in_time: bool) -> dict:
    if not in_time:
        return {"provider": provider.name, "status": "off", "reason": "no time left to compile"}
    begin = time.perf_counter()
    try:
        got = provider.call(*setup.inputs)
        seconds = time.perf_counter() - begin
        verdict = provider.check(setup.inputs, got)
    except Exception as error:  # no compiler, no memory, an unknown version of a peer
        return {"provider": provider.name, **_broken(provider, error)}
    return {
        "provider": provider.name, "status": "ok" if verdict.right else "WRONG",
        "error": verdict.error, "limit": verdict.limit, "how": verdict.how,
        **({"compile_s": seconds} if provider.compiles else {}),
    }


def _broken(provider: Provider | None, error: Exception) -> dict:
    ours = provider is None or provider.ours
    return {"status": "FAILED" if ours else "off", "reason": one_line(error)}


def _timers(
    row: dict, provider: Provider, sets: list[tuple], device: torch.device
) -> list[tuple[dict, str, Timer]]:
    if device.type == "cpu":
        return [(row, "ms", cpu_timer(provider.call, sets[0]))]
    row["peak_mib"] = peak_mib(provider.call, sets[0])
    row["host_ms"] = host_ms(provider.call, sets[0])
    cold = cuda_timer(provider.call, sets)
    if cold.note:
        row["note"] = cold.note
    warm = cuda_timer(provider.call, sets[:1]) if len(sets) > 1 else cold
    return [(row, "ms", cold), (row, "warm", warm)]


def _interleaved(timers: list, repeats: int, seconds: float):
    """Sample all timers in rounds, in random order, so that a disturbance hits all alike.

    Yields:
        (row, key, samples in ms, or the error that ended them) of each timer.
    """
    share = seconds / max(1, len(timers))
    plan, samples = [], [[] for _ in timers]
    broken: dict[int, Exception] = {}
    for i, (_, _, timer) in enumerate(timers):
        begin = time.perf_counter()
        try:
            timer.sample()  # the warm-up
        except Exception as error:
            broken[i] = error
            continue
        taken = time.perf_counter() - begin
        count = min(repeats, max(FEWEST if taken < SLOW else 1, int(share / taken)))
        # Spread over the whole time, however few.
        plan += [((k + random.random()) / count, i) for k in range(count)]
    for _, i in sorted(plan):
        if i in broken:
            continue
        try:
            samples[i].append(timers[i][2].sample())
        except Exception as error:
            broken[i] = error
    for i, (row, key, _) in enumerate(timers):
        yield row, key, broken.get(i, samples[i])
