"""Training and sampling of digits on an idle machine and beside one busy process.

    python benchmarks/busy.py --out FILE.json [--steps 150] [--repeats 3]

Each row is a whole command's own img/s, with the default choice of threads and with given numbers.
Rows are interleaved; medians are shown. Run it on an idle machine: it makes its own load.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from run import cpu_model  # noqa: E402

from robustdm.runs.rundir import provenance  # noqa: E402


def command(module: str, *flags: object, threads: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    environment["PYTHONPATH"] = str(ROOT)
    if threads != "default":
        environment["OMP_NUM_THREADS"] = threads
    subprocess.run([sys.executable, "-m", f"robustdm.{module}", *map(str, flags)], check=True,
                   env=environment, stdout=subprocess.DEVNULL)


def train(out: Path, steps: int, threads: str) -> float:
    command("train", "--out", out, "--steps", steps, "--final-steps", 2, "--sample-every", 0,
            "--checkpoint-every", 0, threads=threads)
    return json.loads((out / "summary.json").read_text())["img_per_s"]


def sample(run: Path, out: Path, threads: str) -> float:
    command("sample", "--run", run, "--num", 128, "--steps", 100, "--sampler", "ddim", "--out", out,
            threads=threads)
    return json.loads((out / "sample.json").read_text())["img_per_s"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    choices = ["default", "1", str(os.cpu_count())]
    load_before = os.getloadavg()[0]
    found: dict[tuple[str, str, str], list[float]] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for repeat in range(options.repeats):
            for machine in ("idle", "busy"):
                load = None
                if machine == "busy":
                    load = subprocess.Popen([sys.executable, "-c", "while True: pass"])
                try:
                    for threads in choices:
                        name = f"{repeat}-{machine}-{threads}"
                        speed = train(folder / name, options.steps, threads)
                        found.setdefault(("train", machine, threads), []).append(speed)
                        speed = sample(folder / name, folder / f"{name}-samples", threads)
                        found.setdefault(("sample", machine, threads), []).append(speed)
                finally:
                    if load is not None:
                        load.kill()
                        load.wait()
    rows = []
    for what in ("train", "sample"):
        for threads in choices:
            idle, busy = (statistics.median(found[what, machine, threads])
                          for machine in ("idle", "busy"))
            rows.append({"what": what, "threads": threads, "idle_img_per_s": round(idle, 1),
                         "busy_img_per_s": round(busy, 1), "times_as_long": round(idle / busy, 2)})
            print(f"{what:7}threads {threads:8} idle {idle:7.1f} img/s, beside a busy process "
                  f"{busy:7.1f} img/s: {idle / busy:.2f} times as long")
    record = {
        "schema": "robustdm-busy-1", "rows": rows, "load_before": load_before,
        "samples": {" ".join(key): values for key, values in found.items()},
        "cpu": cpu_model(), "cores": os.cpu_count(), "torch": torch.__version__,
        "steps": options.steps,
        "provenance": {**provenance(), "command": f"python benchmarks/busy.py --steps "
                       f"{options.steps} --repeats {options.repeats}"},
    }
    if options.out:
        options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
