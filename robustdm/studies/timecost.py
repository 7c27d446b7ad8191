"""The cost of training, against the paper's factor of 2.5: runs `benchmarks/run.py --suite step`.

Source: Briglia et al. 2026, section 3.1, "Time complexity".
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from robustdm.errors import RunError, UsageError
from robustdm.studies.claims import Claim
from robustdm.studies.page import write_page
from robustdm.studies.scales import Scale

PAPER_LOOP = "paper's loop, fp32"
MODELS = {"tiny": ("digits", 6), "small": ("cifar", 8), "full": ("cifar", 8)}


def timecost(scale: Scale) -> list[Claim]:
    """Ratios of the steps of DDPM, robust_ran and robust_adv, in the paper's loop and in ours."""
    script = Path(__file__).parents[2] / "benchmarks" / "run.py"
    if not script.is_file():
        raise UsageError("timecost runs the benchmark suite, which an installed package does not "
                         "have: run it from a checkout of the repository")
    model, minutes = MODELS[scale.name]
    scale.out.mkdir(parents=True, exist_ok=True)
    path = scale.out / "step.json"
    path.unlink(missing_ok=True)  # an earlier record must not pass for this one
    command = ["benchmarks/run.py", "--suite", "step", "--model", model, "--minutes", str(minutes),
               "--steps", "0"]
    done = subprocess.run([sys.executable, str(script), *command[1:], "--out", str(path)],
                          check=False)
    # A missed target is an exit code too; the record says what was measured.
    if not path.is_file():
        raise RunError(f"the benchmark suite failed with exit code {done.returncode} and wrote no "
                       "record")
    record = json.loads(path.read_text())
    rows: dict[str, dict] = {}
    for row in record["rows"]:
        if row["status"] == "ok" and row["section"] == "ladder":
            rows.setdefault(row["name"], {})[row["objective"]] = row
    table = {name: {
        **{f"{kind}, ms": float(row["ms"]) for kind, row in found.items()},
        **{f"{kind} / own DDPM": row["ms"] / found["ddpm"]["ms"]
           for kind, row in found.items() if kind != "ddpm" and "ddpm" in found},
        **{f"{kind} / paper's loop DDPM": row["ms"] / rows[PAPER_LOOP]["ddpm"]["ms"]
           for kind, row in found.items() if name != PAPER_LOOP},
    } for name, found in rows.items()}
    loop = rows[PAPER_LOOP]
    adv = loop["robust_adv"]["ms"] / loop["ddpm"]["ms"]
    ran = loop["robust_ran"]["ms"] / loop["ddpm"]["ms"]
    best = min((n for n in rows if "robust_adv" in rows[n]), key=lambda n:
               rows[n]["robust_adv"]["ms"])
    gain = loop["robust_adv"]["ms"] / rows[best]["robust_adv"]["ms"]
    claims = [
        Claim("paper-style loop: robust_adv / DDPM", adv, "2.1 to 2.9", 2.1 <= adv <= 2.9,
              paper="2.5"),
        Claim("paper-style loop: robust_ran / DDPM", ran, "below robust_adv's", ran < adv,
              paper="less than robust_adv, no number"),
        Claim(f"not in the paper: our fastest robust_adv ({best}), times as fast as the "
              "paper-style one", gain, "above 1", gain > 1),
    ]
    return write_page(
        scale.out, f"The cost of a training step ({scale.name})", {"Training steps": table}, claims,
        [record], (
            f"Network: the {model} model of benchmarks/run.py, {record['parameters']:,} weights, "
            f"batches of {record['batch']}; on {record['gpu'] or record['cpu']}.",
        ), (
            "Medians of interleaved repeats within one run. The paper-style loop is eager fp32 "
            "with a read-back of the loss in every step and an average of the weights tensor by "
            "tensor.",
        ), commands=[f"python {' '.join(command)}"])
