"""The cost of training, against the paper's factor of 2.5: runs `benchmarks/run.py --suite step`.

Source: Briglia et al. 2026, section 3.1, "Time complexity".
"""

import json
import subprocess
import sys
from pathlib import Path

from robustdm.errors import RunError, UsageError
from robustdm.studies.claims import Claim
from robustdm.studies.study import Study

PAPER_LOOP = "paper's loop, fp32"
MODELS = {"tiny": ("digits", 6), "small": ("cifar", 8), "full": ("cifar", 8)}


class TimeCost(Study):
    """Ratios of the steps of DDPM, robust_ran and robust_adv, in the paper's loop and in ours."""

    title = "The cost of a training step"
    notes = (
        "Medians of interleaved repeats within one run. The paper-style loop is eager fp32 with a "
        "read-back of the loss in every step and an average of the weights tensor by tensor.",)

    def records(self):
        script, out = Path(__file__).parents[2] / "benchmarks/run.py", self.scale.out
        if not script.is_file():
            raise UsageError("timecost runs the benchmark suite, which an installed package does "
                             "not have: run it from a checkout of the repository")
        model, minutes = MODELS[self.scale.name]
        flags = f"--suite step --model {model} --minutes {minutes} --steps 0"
        self.commands = [f"python benchmarks/run.py {flags}"]
        out.mkdir(parents=True, exist_ok=True)
        path = out / "step.json"
        path.unlink(missing_ok=True)  # an earlier record must not pass for this one
        done = subprocess.run([sys.executable, str(script), *flags.split(), "--out", str(path)],
                              check=False)
        # A missed target is an exit code too; the record says what was measured.
        if not path.is_file():
            raise RunError(f"the benchmark suite failed with exit code {done.returncode} and wrote "
                           "no record")
        record = json.loads(path.read_text())
        self.differs = [f"Network: the {model} model of benchmarks/run.py, "
                        f"{record['parameters']:,} weights, batches of {record['batch']}; on "
                        f"{record['gpu'] or record['cpu']}."]
        return [record]

    def tables(self, of):
        rows, plain = _steps(of), _steps(of)[PAPER_LOOP]["ddpm"]
        return {"Training steps": {name: {
            **{f"{kind}, ms": float(ms) for kind, ms in found.items()},
            **{f"{kind} / own DDPM": ms / found["ddpm"]
               for kind, ms in found.items() if kind != "ddpm" and "ddpm" in found},
            **{f"{kind} / paper's loop DDPM": ms / plain
               for kind, ms in found.items() if name != PAPER_LOOP},
        } for name, found in rows.items()}}

    def compare(self, of):
        rows = _steps(of)
        ddpm, ran, adv = (rows[PAPER_LOOP][k] for k in ("ddpm", "robust_ran", "robust_adv"))
        ms, best = min((found["robust_adv"], name) for name, found in rows.items()
                       if "robust_adv" in found)
        return [
            Claim("paper-style loop: robust_adv / DDPM", adv / ddpm, "2.1 to 2.9",
                  2.1 <= adv / ddpm <= 2.9, paper="2.5"),
            Claim("paper-style loop: robust_ran / DDPM", ran / ddpm, "below robust_adv's",
                  ran < adv, paper="less than robust_adv, no number"),
            Claim(f"not in the paper: our fastest robust_adv ({best}), times as fast as the "
                  "paper-style one", adv / ms, "above 1", adv > ms)]


def _steps(of) -> dict[str, dict[str, float]]:
    """Name -> objective -> milliseconds."""
    rows: dict[str, dict] = {}
    for row in of.records[0]["rows"]:
        if row["status"] == "ok" and row["section"] == "ladder":
            rows.setdefault(row["name"], {})[row["objective"]] = row["ms"]
    return rows
