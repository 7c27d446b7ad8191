"""Resources of this process on the host: threads that compute, and memory that is kept."""

from __future__ import annotations

import contextlib
import ctypes
import os
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator

ROUNDS = 5
BUDGET = 4.0
"""Seconds after which no further round of `fastest_threads` starts."""
HOPELESS = 1.5
"""Ratio of times at which `fastest_threads` tries no smaller number of threads."""
WINDOW = 16
SLOWDOWN = 2.0
"""Ratio of step times above which `Slowdown` reports."""


def keep_freed_memory() -> None:
    """Let this process keep the host memory it frees, for the next tensor of that size.

    The C library returns large blocks to the system when they are freed and asks for them again
    page by page. Measured on a CPU: up to a tenth of a training step, and two fifths of sampling.
    The process then holds its peak of memory until it ends. Every command calls this; a program
    that uses robustdm as a library calls it if it wants to. Does nothing where the C library is not
    glibc.
    """
    trim_threshold, mmap_threshold = -1, -3
    if not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        # Older releases refuse more than 32 MiB. Where both are refused, the other setting alone
        # would stop the library from adapting the threshold, which is worse than none.
        if any(libc.mallopt(mmap_threshold, size) for size in (1 << 30, 32 << 20)):
            libc.mallopt(trim_threshold, 2**31 - 1)


def thread_choices(limit: int) -> list[int]:
    """Numbers of threads worth timing: ``limit``, and the powers of two below it, largest first."""
    return [limit, *(2**k for k in reversed(range(limit.bit_length())) if 2**k < limit)]


def threads_are_given() -> bool:
    """Whether OMP_NUM_THREADS decides the number of threads, as it does under torchrun."""
    return bool(os.environ.get("OMP_NUM_THREADS", "").strip())


def fastest_threads(compute: Callable[[], object], limit: int, calls: int) -> int:
    """Set torch's number of threads to the one that computes fastest on this machine now.

    Small networks beside another busy process want one thread: threads wait for each other, and
    OpenMP's waiting threads take the cores that the others need. Each number of threads gets its
    turn in every round, so that a load that comes and goes meets all of them. A number that takes
    `HOPELESS` times as long as a larger one ends the choices: one thread of sixteen would keep a
    large network waiting for minutes.

    Args:
        compute: the work to time. It must not change state.
        limit: the most threads to use.
        calls: calls of ``compute`` to come. Timing takes a few hundredths of them; where they are
            too few for that, ``limit`` it is.

    Returns:
        The number of threads, which is also set.
    """
    import torch

    choices = thread_choices(limit)
    rounds = min(ROUNDS, calls // (25 * len(choices)))
    if len(choices) == 1 or not rounds:
        torch.set_num_threads(limit)
        return limit

    def seconds(n: int) -> float:
        torch.set_num_threads(n)
        start = time.perf_counter()
        compute()
        return time.perf_counter() - start

    begin = time.perf_counter()
    compute()  # libraries choose their algorithms in the first call
    times: dict[int, list[float]] = {}
    for n in choices:
        times[n] = [seconds(n)]
        if times[n][0] > HOPELESS * min(first for first, in times.values()):
            break
    for _ in range(rounds - 1):
        if time.perf_counter() - begin > BUDGET:
            break
        for n, found in times.items():
            found.append(seconds(n))
    best = min(times, key=lambda n: statistics.median(times[n]))
    torch.set_num_threads(best)
    return best


@contextlib.contextmanager
def threads_restored() -> Iterator[None]:
    """Give the caller's process its number of threads back."""
    import torch

    before = torch.get_num_threads()
    try:
        yield
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)


class Slowdown:
    """Finds out that steps have become slower than the same kind of step was before.

    Compares medians of windows of `WINDOW` steps: a checkpoint or a short load does not count.
    """

    def __init__(self) -> None:
        self._times: dict[object, deque[float]] = {}
        self._best: dict[object, float] = {}
        self._reported = False

    def add(self, kind: object, seconds: float) -> tuple[float, float] | None:
        """Take the time of one step.

        Args:
            kind: steps of different kinds do different work, and are not compared.
            seconds: time of the step.

        Returns:
            Once per object: (seconds now, seconds at best) when a window takes more than
            `SLOWDOWN` times as long as the best one.
        """
        times = self._times.setdefault(kind, deque(maxlen=WINDOW))
        times.append(seconds)
        if len(times) < WINDOW or self._reported:
            return None
        now = statistics.median(times)
        best = self._best[kind] = min(now, self._best.get(kind, now))
        if now <= SLOWDOWN * best:
            return None
        self._reported = True
        return now, best
