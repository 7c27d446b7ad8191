"""Write one self-contained page about a run, from the files of its directory alone.

``python -m robustdm.report RUN_DIR`` writes RUN_DIR/report.html, during a run or after it, with
whatever is there; `robustdm.reporting.run_page` makes the page.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from robustdm.cli import guard
from robustdm.reporting.run_page import write_report


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m robustdm.report``."""
    import argparse

    parser = argparse.ArgumentParser(
        prog="python -m robustdm.report", description="Write RUN_DIR/report.html, one page about "
        "a training run, from the files in RUN_DIR.",
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="the run's --out directory")
    print(write_report(parser.parse_args(argv).run_dir))


if __name__ == "__main__":
    guard(main)
