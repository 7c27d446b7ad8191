"""Signals that stop a run: they set a flag, and the loop saves at the end of the step.

Exit codes of ``robustdm.train``: 143 after SIGTERM, 130 after SIGINT (Ctrl-C) and 138 after SIGUSR1
(sent by batch systems before the time is up), each with a checkpoint saved; 0 for a run that is
finished or was stopped by ``--stop-after`` or ``--max-time``; 1 and 2 for errors.
"""

import contextlib
import os
import signal
from collections.abc import Iterator

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def exit_code(received: signal.Signals | None) -> int:
    """128 + number of a signal, by the shell's convention; 0 without one."""
    return 0 if received is None else 128 + received


class Stopped(BaseException):
    """A signal came in work that nothing is lost by leaving."""


class StopSignals:
    """While entered, SIGTERM, SIGINT and SIGUSR1 only set ``received``; a second SIGINT raises.

    Outside the main thread, where Python allows no handlers, it does nothing.
    """

    def __init__(self):
        self.received: signal.Signals | None = None
        self._interrupts = 0
        self._raise = False
        self._process = os.getpid()
        self._previous: dict = {}

    def __enter__(self) -> "StopSignals":
        try:
            for number in SIGNALS:
                self._previous[number] = signal.signal(number, self._handle)
        except ValueError:
            pass
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    @contextlib.contextmanager
    def raising(self) -> Iterator[None]:
        """While entered, a signal also raises `Stopped`, wherever the main thread is."""
        self._raise = True
        try:
            yield
        finally:
            self._raise = False

    def _handle(self, number: int, _frame) -> None:
        first = self.received is None
        if first:
            self.received = signal.Signals(number)
        if os.getpid() != self._process:
            # A data worker inherits the handler. A signal to the whole group must not end it while
            # the main process still needs it for the step to be saved; a SIGTERM after it does.
            if number == signal.SIGTERM and not first:
                os._exit(143)
            return
        self._interrupts += number == signal.SIGINT
        if number == signal.SIGINT and first:
            os.write(2, b"\nstopping after what is under way; Ctrl-C again to abort\n")
        if number == signal.SIGINT and self._interrupts > 1:
            raise KeyboardInterrupt
        if self._raise:
            raise Stopped
