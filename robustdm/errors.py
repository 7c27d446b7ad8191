"""The errors a user can cause or meet; each carries the exit code the command line ends with."""

import contextlib
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
        while root.__cause__ or root.__context__:
            root = root.__cause__ or root.__context__
        place = root.__traceback__
        while place.tb_next:
            place = place.tb_next
        # A missing one is told by the error, a broken one by where it was raised.
        missing = root.name if isinstance(root, ModuleNotFoundError) else None
        broken = missing or place.tb_frame.f_globals.get("__name__", package)
        broken = broken.partition(".")[0]
        reason = (str(root).strip().splitlines() or [type(root).__name__])[0][:200]
        raise UsageError(
            f"{package} cannot be imported, for {broken} is broken here ({reason}): install the "
            f"{broken} that fits this torch, or uninstall it if nothing of yours needs it"
        ) from error
