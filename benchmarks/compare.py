"""``python benchmarks/compare.py OLD.json NEW.json``: how times changed between two records."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# The checkout's own package, whatever is installed.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import report
import tyro
from rich.console import Console
from rich.table import Table

from robustdm.cli import guard

NOISE = 0.05  # changes within 5 % are not coloured
MACHINE = ("device", "gpu", "driver", "cpu", "cores", "threads", "versions")


@dataclass(frozen=True)
class CompareConfig:
    """Compare two records of benchmarks/run.py: old time over new time, more than 1 is faster."""

    old: tyro.conf.Positional[Path]
    """Record to compare with."""
    new: tyro.conf.Positional[Path]
    """Record to judge."""


def main(argv: Sequence[str] | None = None) -> int:
    """Print the ratio of every case and provider that both records have."""
    config = tyro.cli(CompareConfig, args=argv, prog="python benchmarks/compare.py")
    old, new = report.read_record(config.old), report.read_record(config.new)
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    for key in MACHINE:
        if old.get(key) != new.get(key):
            console.print(f"warning: the machines differ: {key} {old.get(key)} -> {new.get(key)}",
                          style="yellow", highlight=False)
    before, after = times(old), times(new)
    made = Table(show_edge=False, pad_edge=False)
    for name, justify in (("case", "left"), ("provider", "left"), ("old ms", "right"),
                          ("new ms", "right"), ("old / new", "right")):
        made.add_column(name, justify=justify)
    for key in (k for k in after if k in before):
        change = before[key] / after[key]
        style = "green" if change > 1 + NOISE else "red" if change < 1 - NOISE else ""
        made.add_row(*key, f"{before[key]:.4g}", f"{after[key]:.4g}", f"{change:.3f}", style=style)
    console.print(made)
    for word, one, other in (("old", before, after), ("new", after, before)):
        alone = [" ".join(key) for key in one if key not in other]
        if alone:
            console.print(f"only in the {word} record: {len(alone)}, such as {alone[0]}",
                          highlight=False)
    return 0


def times(record: dict) -> dict[tuple[str, str], float]:
    """(case, provider) -> median ms."""
    return {
        (case["name"], provider): ms
        for case in record["cases"] for provider, ms in report.measured(case).items()
    }


if __name__ == "__main__":
    guard(main)
