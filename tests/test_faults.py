"""A tenth of the fault campaign; all of it is ``python -m tests.faults``."""

import io
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[1]


def campaign(*arguments, before="pass"):
    program = f"import sys; {before}; from tests.faults.__main__ import main; sys.exit(main())"
    return subprocess.run([sys.executable, "-c", program, *arguments], cwd=ROOT,
                          capture_output=True, text=True)


def test_a_tenth_of_all_trials_ends_as_its_rules_say(tmp_path):
    # Without the figures of reports, which take most of a tiny run's time.
    dot = io.BytesIO()
    Image.new("L", (1, 1)).save(dot, "png")
    undrawn = f"import robustdm.reporting.plots as p; p.png_bytes = lambda made: {dot.getvalue()!r}"
    done = campaign("--tenth", "--seed", "1", "--out", str(tmp_path / "record.jsonl"),
                    before=undrawn)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    record = [json.loads(line) for line in (tmp_path / "record.jsonl").read_text().splitlines()]
    made = Counter(line["group"] for line in record if line["verdict"] == "pass")
    assert set(made) == {f"F{number}" for number in range(1, 14)} and sum(made.values()) > 70


def test_the_campaign_sees_a_library_that_verifies_nothing():
    blind = "import robustdm.runs.checkpoint as c; c.verify = lambda path: []"
    done = campaign("--group", "F5", "--trial", "0", before=blind)
    assert done.returncode == 1 and "FAIL F5 --trial 0: flipped bit" in done.stdout


def test_all_trials_are_those_of_the_record():
    from tests.faults.groups import GROUPS  # much is imported with them

    counts = {name: group.count for name, group in GROUPS.items()}
    lines = (ROOT / "benchmarks/results/cpu/faults.jsonl").read_text().splitlines()
    record = [json.loads(line) for line in lines]
    assert Counter(line["group"] for line in record) == counts and len(record) == 882
    assert {line["verdict"] for line in record} <= {"pass", "skip"}
    assert not any("<locals>" in line["seen"] for line in record), "a trial's own fault"
