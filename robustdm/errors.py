"""The errors a user can cause or meet; each carries the exit code the command line ends with."""

import contextlib
import traceback
from collections.abc import Iterator


class RobustDMError(Exception):
    """Base of every error that robustdm raises on purpose: one clear line, no traceback needed."""

    exit_code = 1


class UsageError(RobustDMError):
    """The call was wrong: the message names the field, the value given and the remedy."""

    exit_code = 2


class RunError(RobustDMError, RuntimeError):
    """The call was right but the run cannot go on: the message says what is safe and what to do."""

    exit_code = 1


class PeerError(RunError):
    """Another of the processes that share a job has failed and says why: this one ends silently."""


@contextlib.contextmanager
def importing(package: str) -> Iterator[None]:
    """Turn what a broken installation raises, which may be anything, into one line.

    Args:
        package: what is imported inside; often it is another that it needs which is broken.

    Raises:
        UsageError: that names the package at fault.
    """
    try:
        yield
    except Exception as error:
        root = error
        while root.__cause__ is not None:
            root = root.__cause__
        # A missing one is told by the error, a broken one by where it was raised.
        broken = root.name if isinstance(root, ModuleNotFoundError) else None
        for frame, _ in traceback.walk_tb(root.__traceback__) if broken is None else ():
            broken = frame.f_globals.get("__name__")
        broken = (broken or package).partition(".")[0]
        reason = (str(root).strip().splitlines() or [type(root).__name__])[0][:200]
        raise UsageError(
            f"{package} cannot be imported, for {broken} is broken here ({reason}): install the "
            f"{broken} that fits this torch, or uninstall it if nothing of yours needs it"
        ) from error
