"""Live progress of a training run: a bar on a terminal, a plain line now and then elsewhere.

While a ``Progress`` is open it owns the screen: everything else is printed with ``message``.
"""

import contextlib
import os
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Literal

WINDOW = 50
PLAIN_INTERVAL = 10.0


class Progress:
    """Shows step, fields, images per second, ms per step and the time left; a context manager.

    Args:
        total_steps: optimizer steps of the whole run.
        start_step: steps done before this process started (a resumed run).
        batch_size: images per optimizer step.
        mode: "live" is a bar, "plain" lines at most every 10 s, "off" messages alone; "auto" is
            live on a terminal and plain elsewhere.
        stream: where to write; standard output by default.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        batch_size: int = 1,
        mode: Literal["auto", "live", "plain", "off"] = "auto",
        stream: IO[str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.total_steps, self.step, self.batch_size = total_steps, start_step, batch_size
        self._stream = sys.stdout if stream is None else stream
        self._clock = clock
        if mode == "auto":
            terminal = self._stream.isatty() and os.environ.get("TERM", "") != "dumb"
            mode = "live" if terminal else "plain"
        self.mode = mode
        # The median of the latest steps ignores the pauses in which samples and checkpoints are
        # made.
        self._durations: deque[float] = deque(maxlen=WINDOW)
        self._last = self._printed = clock()
        self._pending = ""
        self._fields: dict[str, float | str] = {}
        self._bar = None
        self._task = None

    def __enter__(self) -> "Progress":
        self._last = self._printed = self._clock()
        if self.mode == "live":
            self._start_bar()
        return self

    def __exit__(self, kind, value, traceback) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        if self._pending:
            self._print(self._pending)

    @property
    def seconds_per_step(self) -> float | None:
        """Median over the latest updates; None before the first."""
        return statistics.median(self._durations) if self._durations else None

    @property
    def img_per_s(self) -> float | None:
        """Images per second at the median speed; None before the first update."""
        seconds = self.seconds_per_step
        return self.batch_size / seconds if seconds else None

    @property
    def seconds_left(self) -> float | None:
        """Time to the last step at the median speed; None before the first update."""
        seconds = self.seconds_per_step
        return None if seconds is None else max(0, self.total_steps - self.step) * seconds

    def restart(self) -> None:
        """Count the time of the next step from now: what was done before it was no training."""
        self._last = self._clock()

    def update(self, step: int, fields: Mapping[str, float | str] | None = None) -> None:
        """Tell that ``step`` steps of the run are done.

        Args:
            step: steps done in all.
            fields: further values to show, such as {"loss": 0.1}; by default those given last.
        """
        now = self._clock()
        if step > self.step:
            self._durations.append((now - self._last) / (step - self.step))
        self.step, self._last = step, now
        if self.mode == "off":
            return
        if fields is not None:
            self._fields = dict(fields)
        shown = self._describe()
        if self._bar is not None:
            self._bar.update(self._task, completed=step, shown=shown)
        else:
            self._pending = f"step {step}/{self.total_steps}" + (f" | {shown}" if shown else "")
            if now - self._printed >= PLAIN_INTERVAL or step >= self.total_steps:
                self._print(self._pending)
                self._printed, self._pending = now, ""

    def message(self, text: str) -> None:
        """Print a line without breaking the bar."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            self._print(text)

    def _describe(self) -> str:
        # What a narrow terminal cuts off stands last.
        known = self.img_per_s is not None
        parts = [f"{duration(self.seconds_left)} left"] if known else []
        parts += [
            f"{name} {value:.4g}" if isinstance(value, int | float) else f"{name} {value}"
            for name, value in self._fields.items()
        ]
        if known:
            parts.append(f"{self.img_per_s:.4g} img/s")
            parts.append(f"{1000 * self.seconds_per_step:.3g} ms/step")
        return " | ".join(parts)

    def _print(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def _start_bar(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as RichProgress
        from rich.table import Column

        console = Console(file=self._stream, force_terminal=True)
        total = self.total_steps
        steps = Column(no_wrap=True, min_width=len(f"step {total}/{total}"))
        columns = [
            TextColumn("step {task.completed}/{task.total}", table_column=steps),
            TextColumn("{task.fields[shown]}", markup=False,
                       table_column=Column(no_wrap=True, overflow="ellipsis")),
        ]
        # The numbers matter more than the bar.
        if console.width >= 100:
            columns.insert(1, BarColumn(bar_width=20))
        self._bar = RichProgress(*columns, console=console, refresh_per_second=4)
        self._task = self._bar.add_task(
            "train", total=self.total_steps, completed=self.step, shown=""
        )
        self._bar.start()


def duration(seconds: float) -> str:
    """Seconds in words for people: "8 s", "3 min 05 s", "2 h 05 min", "3 d 04 h"."""
    whole = int(round(seconds))
    for unit, smaller, size, part in (("d", "h", 86400, 3600), ("h", "min", 3600, 60),
                                      ("min", "s", 60, 1)):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // part:02d} {smaller}"
    return f"{whole} s"


@contextlib.contextmanager
def sampling_progress(
    num: int, what: str = "", shown: bool = True
) -> Iterator[Callable[[int, int], None]]:
    """Progress of making samples: a bar on a terminal, a plain line now and then elsewhere.

    Args:
        num: samples to make.
        what: said first, where several sets are made.
        shown: False shows nothing.

    Yields:
        report(done, total), in sample-steps.
    """
    if not shown:
        yield lambda done, total: None
        return
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bars

    live = sys.stdout.isatty()
    started = shown = time.monotonic()
    bar = Bars(BarColumn(), TextColumn("{task.description}", markup=False), disable=not live)
    task = bar.add_task("", total=1)
    prefix = f"{what}: " if what else ""

    def report(done: int, total: int) -> None:
        nonlocal shown
        now = time.monotonic()
        seconds = max(now - started, 1e-9)
        text = (f"{prefix}{done * num // total}/{num} samples | "
                f"{done / total * num / seconds:.3g} img/s | "
                f"{duration(seconds * (total - done) / done)} left")
        bar.update(task, completed=done / total, description=text)
        if not live and now - shown >= PLAIN_INTERVAL:
            print(text, flush=True)
            shown = now

    with bar:
        yield report
