"""``robustdm COMMAND ...`` and ``python -m robustdm COMMAND ...``: all commands under one name."""

import sys
from collections.abc import Sequence
from importlib import import_module

import robustdm
from robustdm.cli import guard
from robustdm.errors import UsageError

COMMANDS = {
    "train": "train or fine-tune a diffusion model",
    "sample": "draw samples from a run",
    "data": "look at a data set before training on it",
    "diagnose": "say what noise is in a data set, and what to do",
    "denoise": "remove the noise of your own pictures with a trained run",
    "plan": "choose settings from what is known of the data",
    "evaluate": "measure samples against clean data",
    "memorise": "look for training items among the samples",
    "attack": "sample under an attack on the network's input",
    "steps": "compare samplers and numbers of steps",
    "convert": "turn improved-diffusion weights into a diffusers pipeline",
    "reproduce": "run one of the studies behind the documentation",
    "report": "write a run's page again",
    "doctor": "show what this installation can do",
}
_MODULES = {"data": "robustdm.data.__main__"}


def usage() -> str:
    """The commands, one a line."""
    lines = [f"  {name:<10} {does}" for name, does in COMMANDS.items()]
    return "\n".join(["usage: robustdm COMMAND [FLAGS]", "", *lines, "",
                      "robustdm COMMAND --help lists a command's flags."])


def main(argv: Sequence[str] | None = None) -> int | None:
    """Run the command that the first argument names; returns its exit code.

    Raises:
        UsageError: for an unknown command.
    """
    name, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("--help", "-h"):
        print(usage())
        return 0
    if name == "--version":
        print(f"robustdm {robustdm.__version__}")
        return 0
    if name not in COMMANDS:
        raise UsageError(f"command is {name!r}: choose one of {', '.join(COMMANDS)}")
    return import_module(_MODULES.get(name, f"robustdm.{name}")).main(rest)


def run() -> None:
    """Entry point of the console script."""
    guard(main)


if __name__ == "__main__":
    run()
