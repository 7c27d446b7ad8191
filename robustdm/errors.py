"""The errors a user can cause or meet; each carries the exit code the command line ends with."""


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
