"""``python -m tests.faults``: make the trials, print how they ended."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=(
        "Make faults happen, and see that nothing is lost and nothing is silent."))
    extent = parser.add_mutually_exclusive_group()
    extent.add_argument("--all", action="store_true", help="every trial (the default)")
    extent.add_argument("--tenth", action="store_true", help="a seeded tenth of every group")
    extent.add_argument("--trial", type=int, help="one trial of one --group")
    parser.add_argument("--group", nargs="+", action="extend", metavar="F1", help="only these")
    parser.add_argument("--seed", type=int, default=0, help="decides what the trials do")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1),
                        help="trials at a time")
    parser.add_argument("--out", type=Path, help="file for one JSON line per trial")
    parser.add_argument("--keep", type=Path, help="existing folder to work in")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch loads
    from .campaign import choose, run_all
    from .groups import GROUPS, warm_up

    names = options.group or list(GROUPS)
    unknown = [name for name in names if name not in GROUPS]
    if unknown or options.trial is not None and len(names) != 1:
        problem = f"no group {unknown[0]}" if unknown else "--trial needs one --group"
        print(f"error: {problem}; groups are {', '.join(GROUPS)}", file=sys.stderr)
        return 2
    groups = [GROUPS[name] for name in names]
    if options.trial is None:
        chosen = choose(groups, options.tenth, options.seed)
    elif 0 <= options.trial < groups[0].count:
        chosen = [(groups[0], options.trial)]
    else:
        print(f"error: {names[0]} has trials 0 to {groups[0].count - 1}", file=sys.stderr)
        return 2
    warm_up()
    records, started = [], time.monotonic()
    file = open(options.out, "w", encoding="utf-8") if options.out else None
    for record in run_all(chosen, options.seed, options.jobs, options.keep):
        records.append(record)
        if file:
            print(json.dumps(asdict(record)), file=file, flush=True)
        _show(record, len(records), len(chosen), time.monotonic() - started)
    if file:
        file.close()
    _table(records, groups, time.monotonic() - started)
    return int(any(record.verdict == "FAIL" for record in records))


def _show(record, done: int, total: int, seconds: float) -> None:
    if record.verdict != "pass":
        _clear()
        print(f"{record.verdict} {record.group} --trial {record.trial}: {record.fault} "
              f"({record.where}): expected {record.expected}; seen: {record.seen}", flush=True)
    text = f"{done}/{total} trials, {seconds / done * (total - done) / 60:.1f} min left"
    if sys.stdout.isatty():
        print(f"\r{text}   ", end="", flush=True)
    elif done % 50 == 0:
        print(text, flush=True)


def _clear() -> None:
    if sys.stdout.isatty():
        print("\r\033[K", end="")


def _table(records, groups, seconds: float) -> None:
    from robustdm.reporting.tables import text_table

    _clear()
    rows = {}
    for group in groups:
        mine = [record for record in records if record.group == group.name]
        verdicts = [record.verdict for record in mine]
        rows[f"{group.name} {group.title}"] = {
            "trials": len(mine), "pass": verdicts.count("pass"), "skip": verdicts.count("skip"),
            "FAIL": verdicts.count("FAIL"), "s": round(sum(record.seconds for record in mine)),
        }
    print(text_table(rows))
    failed = sum(record.verdict == "FAIL" for record in records)
    print(f"{len(records)} trials in {seconds / 60:.1f} min, {failed} failed")


if __name__ == "__main__":
    sys.exit(main())
