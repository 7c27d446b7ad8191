"""Everything that a GPU is first asked, in two calls that fit into 13 minutes and lose nothing.

    python benchmarks/gpu_session.py A --out FOLDER
    python benchmarks/gpu_session.py B --out FOLDER --data CIFAR10
    python benchmarks/gpu_session.py A --rehearse --out FOLDER    # on a CPU, at tiny size
    python benchmarks/gpu_session.py A --wheels                   # what to bring where no index is

A takes at most 290 s, B at most 450 s. Each stage is a process of its own, with its own limit;
FOLDER/session-A.json is replaced after every stage, so that whatever ends a stage, or this program,
costs nothing that was measured before. Late stages are left out when time runs short. B reads A's
record: where A's smoke test saw no CUDA graph work, B times the compiled step without one.

Predictions stand beside what is measured: a GPU is there to refute them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SECONDS = {"A": 290.0, "B": 450.0}
MARGIN = 10.0  # for what comes after the last stage
TAIL, LOG = 3000, 400_000  # characters of a stage's output that are kept
# Pure Python, 6.4 MB in all: what a machine with torch and the usual packages for tests lacks.
WHEELS = ("diffusers", "importlib_metadata", "tyro", "docstring_parser", "typeguard",
          "lazy_importer")
PREDICTED = {
    "step, compiled and graph": {
        "robust_adv over the paper's DDPM with torch's defaults": {"predicted": 0.69,
                                                                   "target": "<= 0.64"},
        "paper's robust_adv over ours": {"predicted": 3.5, "target": ">= 3.5"},
    },
    "kernels": {
        "GroupNorm + SiLU, forward and backward, over torch.compile": {"predicted": 1.5,
                                                                       "target": ">= 1.5"},
        "share of a copy's bandwidth, forward": {"predicted": 0.79, "target": None},
        "share of a copy's bandwidth, forward and backward": {"predicted": 0.5, "target": None},
    },
    "sampling": {
        "diffusers' compiled pipeline, as a graph, over ours": {"predicted": 2.0, "target": ">= 2"},
    },
}


@dataclass(frozen=True)
class Stage:
    """A command with its limits.

    Attributes:
        least: seconds below which it is not begun.
        most: seconds after which it is killed.
        json: whether it prints a JSON object that the record should hold.
        reads: JSON or JSON-lines files that it writes, whose content the record should hold.
        keeps: a file that it writes -> the name under which it is copied beside the record.
    """

    name: str
    least: float
    most: float
    command: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)
    json: bool = False
    reads: tuple[Path, ...] = ()
    keeps: dict[Path, str] = field(default_factory=dict)


def stages(
    part: str, out: Path, scratch: Path, data: Path | None, graph: bool, rehearse: bool
) -> list[Stage]:
    """The stages of a call, in order of value.

    Args:
        out: folder of what they write, of few files.
        scratch: folder for what is not kept.
        data: CIFAR-10, in any form that training reads.
        graph: whether CUDA graphs work.
        rehearse: the same on a CPU, at tiny size.
    """
    python, device = sys.executable, "cpu" if rehearse else "cuda"
    small = ("--tiny",) if rehearse else ()
    run = scratch / "run"

    def bench(suite: str, *flags: str, file: str) -> tuple[str, ...]:
        return (python, "benchmarks/run.py", "--suite", suite, *flags, *small, "--out",
                str(out / file))

    if part == "A":
        tests = ("tests/test_gpu.py", "-k", "smoke") if rehearse else ("-m", "gpu", "-n", "12",
                                                                     "--dist", "worksteal")
        return [
            Stage("machine", 1, 20, (python, "-c", "import platform; print(platform.platform())")
                  if rehearse else ("nvidia-smi",)),
            Stage("doctor", 5, 40, (python, "-m", "robustdm.doctor", "--json"), json=True),
            Stage("graph smoke", 10, 60, (python, "benchmarks/graph_smoke.py", "--device", device,
                                          *small), json=True),
            Stage("tests", 30, 120, (python, "-m", "pytest", "-q", "-p", "no:cacheprovider",
                                     *tests), {"NVIDIA_TF32_OVERRIDE": "0"}),
            Stage("step, eager", 40, 90, bench(
                "step", *(() if rehearse else ("--model", "cifar")), "--no-compile", "--steps", "0",
                "--repeats", "1" if rehearse else "4", "--minutes", "0.9", "--only", "+ adamw_ema",
                file="step-eager.json"), reads=(out / "step-eager.json",)),
        ]
    wanted = "+ CUDA graph" if graph else "whole step compiled"
    if rehearse:
        trained = ("--steps", "3", "--final-steps", "2", "--preview-steps", "2", "--num-samples",
                   "4", "--sample-every", "0", "--log-every", "1")
    else:
        trained = ("--preset", "cifar10", "--data-dir", str(data), "--compile", "--steps", "100000",
                   "--max-time", "1.5", "--log-every", "50", "--sample-every", "0",
                   "--checkpoint-every", "0", "--num-samples", "64", "--final-sampler", "ddim",
                   "--final-steps", "50")
    return [
        Stage("train", 60, 130, (python, "-m", "robustdm.train", *trained, "--out", str(run)),
              reads=(run / "summary.json", run / "metrics.jsonl"),
              keeps={run / "samples" / "final.png": "grid.png"}),
        Stage("step, compiled and graph", 80, 190, bench(
            "step", *(() if rehearse else ("--model", "cifar")), "--steps",
            "0" if rehearse else "20", "--repeats", "1" if rehearse else "4", "--minutes", "2.8",
            "--only", "+ adamw_ema" if rehearse else wanted,
            *(("--no-compile",) if rehearse else ()), file="step-graph.json"),
            reads=(out / "step-graph.json",)),
        Stage("kernels", 40, 80, bench(
            "kernels", "--minutes", "1", "--repeats", "1" if rehearse else "7", "--only",
            "fgsm_project" if rehearse else "bf16", file="kernels.json"),
            reads=(out / "kernels.json",)),
        Stage("sampling", 40, 80, bench(
            "sampling", *(() if rehearse else ("--model", "cifar10")), "--steps",
            "2" if rehearse else "10", "--repeats", "1" if rehearse else "3", "--minutes", "1",
            "--only", "ours fused" if rehearse else "graph", file="sampling.json"),
            reads=(out / "sampling.json",)),
    ]


def read(path: Path) -> object:
    """Content of a JSON file, or the last lines of a JSON-lines file; None if it has none."""
    with contextlib.suppress(OSError, ValueError):
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in path.read_text().splitlines()[-20:]]
        return json.loads(path.read_text())
    return None


def _state(path: Path) -> tuple[int, int] | None:
    """What changes when a file is written or replaced; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def printed_json(text: str) -> object:
    """The JSON object in what a program printed; None if there is none."""
    with contextlib.suppress(ValueError):
        return json.JSONDecoder().raw_decode(text, text.index("{"))[0]
    return None


def run_stage(stage: Stage, left: float, out: Path, threads: int = 1) -> tuple[dict, str]:
    """Run a stage for at most ``left`` seconds: its entry in the record, and what it printed."""
    given = {"OMP_NUM_THREADS": str(threads), **stage.environment}
    entry: dict = {"name": stage.name, "command": shlex.join(_relative(stage.command)),
                   "environment": given, "left_s": round(left, 1)}
    if left < stage.least:
        return entry | {"rc": None, "reason": f"left out: {left:.0f} s left of the {stage.least:g} "
                                              "that it takes"}, ""
    begin, text = time.monotonic(), ""
    before = {path: _state(path) for path in stage.reads}  # an earlier call may have left some
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join(
        filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))), **given}
    try:
        process = subprocess.Popen(
            stage.command, cwd=ROOT, env=environment, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True)
    except OSError as error:
        return entry | {"rc": None, "reason": f"cannot start: {error}"}, ""
    limit = min(stage.most, left)
    try:
        try:
            text = process.communicate(timeout=limit)[0].decode(errors="replace")
        except subprocess.TimeoutExpired:
            entry["reason"] = f"killed after {limit:.0f} s"
            _kill(process)
            with contextlib.suppress(subprocess.TimeoutExpired):
                text = process.communicate(timeout=10)[0].decode(errors="replace")
    finally:
        _kill(process)  # whatever it has started and left
    entry |= {"rc": process.returncode, "seconds": round(time.monotonic() - begin, 1),
              "tail": text[-TAIL:]}
    if stage.json:
        entry["json"] = printed_json(text)
        if entry["json"] is None and "reason" not in entry:
            entry["reason"] = "printed no JSON object"
    for path in stage.reads:
        entry.setdefault("files", {})[path.name] = (
            read(path) if _state(path) != before[path] else None)
    for path, name in stage.keeps.items():
        with contextlib.suppress(OSError):
            shutil.copyfile(path, out / name)
    if stage.name in PREDICTED:
        entry["predictions"] = judged(stage.name, entry.get("files", {}))
    return entry, text


def _kill(process: subprocess.Popen) -> None:
    with contextlib.suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)


def _relative(command: tuple[str, ...]) -> list[str]:
    """A command without the paths of this machine."""
    return [Path(word).name if os.path.isabs(word) else word for word in command]


def judged(name: str, files: dict) -> dict:
    """The predictions of a stage, each with what was measured; None where nothing was."""
    found: dict[str, float | None] = {}
    if name == "step, compiled and graph":
        rows = [r for r in (files.get("step-graph.json") or {}).get("rows", [])
                if r.get("objective") == "robust_adv" and r.get("ms") and r.get("compile")]
        best = min(rows, key=lambda r: r["ms"], default={})
        found = {"robust_adv over the paper's DDPM with torch's defaults":
                 best.get("vs_paper_ddpm"),
                 "paper's robust_adv over ours": best.get("faster_than_paper")}
    elif name == "kernels":
        cases = [c for c in (files.get("kernels.json") or {}).get("cases", [])
                 if c.get("op") == "group_norm_act" and c.get("priority") == 0
                 and not any(word in c["name"] for word in ("no dropout", "AdaGN"))]
        for case in cases:
            rows = {r["provider"]: r for r in case["rows"]}
            both = "forward+backward" in case["name"]
            of_copy = rows.get("triton", {}).get("of_copy")
            found["share of a copy's bandwidth, forward" + (" and backward" if both else "")] = (
                of_copy)
            if both:
                found["GroupNorm + SiLU, forward and backward, over torch.compile"] = rows.get(
                    "triton", {}).get("vs_compile")
    elif name == "sampling":
        rows = [r for r in (files.get("sampling.json") or {}).get("rows", [])
                if r.get("ours") and r.get("vs_best")]
        found = {"diffusers' compiled pipeline, as a graph, over ours":
                 max((r["vs_best"] for r in rows), default=None)}
    return {text: {**wanted, "measured": found.get(text)}
            for text, wanted in PREDICTED[name].items()}


def machine() -> dict:
    """What the numbers depend on. Other processes find it: importing torch, or this package, may be
    what fails."""
    code = ("import json, torch\nfound = {'torch': torch.__version__, 'cuda': torch.version.cuda, "
            "'gpu': torch.cuda.get_device_name() if torch.cuda.is_available() else None}\n"
            "try:\n    import triton\n    found['triton'] = triton.__version__\n"
            "except Exception:\n    found['triton'] = None\nprint(json.dumps(found))")
    found: dict = {"python": platform.python_version(), "cores": os.cpu_count()}
    for key, command in (
        ("versions", [sys.executable, "-c", code]),
        ("driver", ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]),
        ("git", ["git", "-C", str(ROOT), "rev-parse", "HEAD"]),
    ):
        text = None
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            text = subprocess.run(command, capture_output=True, text=True, timeout=60,
                                  check=True).stdout.strip()
        found[key] = printed_json(text) if key == "versions" and text else text
    return found


def write(path: Path, record: dict) -> None:
    """Replace the record: a reader, or a crash, finds the old one or the new one."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    new.replace(path)


def session(
    part: str, chosen: list[Stage], out: Path, seconds: float, begun: float, threads: int = 1
) -> dict:
    """Run stages, and write the record after each; returns it.

    A SIGTERM ends the running stage and leaves out the others.
    """
    path = out / f"session-{part}.json"
    record: dict = {"schema": "robustdm-gpu-session-1", "part": part,
                    "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "seconds": seconds,
                    "complete": False, "stages": []}
    write(path, record)

    def end(number, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        record |= machine()
        for stage in chosen:
            left = seconds - MARGIN - (time.monotonic() - begun)
            text = ""
            try:
                entry, text = run_stage(stage, left, out, threads)
            except KeyboardInterrupt:
                entry = {"name": stage.name, "rc": None, "reason": "the session was ended"}
                raise
            except Exception as error:  # a stage must not cost the next ones
                entry = {"name": stage.name, "rc": None,
                         "reason": f"{type(error).__name__}: {error}"}
            finally:
                record["stages"].append(entry)
                write(path, record)
            with contextlib.suppress(OSError), open(out / f"log-{part}.txt", "a") as log:
                log.write(f"\n=== {stage.name}\n{text[-LOG:]}")
            print(f"{stage.name}: {entry.get('reason') or entry['rc']}, "
                  f"{entry.get('seconds', 0):g} s", flush=True)
        record["complete"] = True
    finally:
        signal.signal(signal.SIGTERM, before)
        write(path, record)
    return record


def works(record: object) -> bool:
    """Whether CUDA graphs replay: what part A's record says, True where there is none, because
    part B may run in a folder of its own."""
    found = record.get("stages", []) if isinstance(record, dict) else []
    smoke = next((s for s in found if s.get("name") == "graph smoke"), None)
    return smoke is None or bool((smoke.get("json") or {}).get("replayed"))


def main() -> int:
    begun = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=sorted(SECONDS))
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "gpu-session")))
    parser.add_argument("--data", type=Path, help="B: CIFAR-10, to train on")
    parser.add_argument("--seconds", type=float, help="of the whole call; A 290, B 450")
    parser.add_argument("--only", default="", help="stages whose name holds this")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, at tiny size")
    parser.add_argument("--wheels", action="store_true", help="print what to bring, and stop")
    options = parser.parse_args()
    if options.wheels:
        print(*WHEELS)
        return 0
    if options.part == "B" and options.data is None and not options.rehearse:
        parser.error("part B trains on CIFAR-10: name its folder with --data")
    if options.data is not None and not options.data.exists():
        parser.error(f"--data is {str(options.data)!r}: there is nothing of that name")
    out = options.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    data = options.data.absolute() if options.data else None
    graph = works(read(out / "session-A.json"))
    with tempfile.TemporaryDirectory(prefix="gpu-session-") as scratch:
        made = stages(options.part, out, Path(scratch), data, graph, options.rehearse)
        chosen = [s for s in made if options.only in s.name]
        if not chosen:
            parser.error(f"--only is {options.only!r}: the stages are "
                         f"{', '.join(s.name for s in made)}")
        seconds = options.seconds or SECONDS[options.part]
        if options.rehearse:  # beside other work, on any machine
            chosen, seconds = [replace(s, most=3 * s.most) for s in chosen], 3 * seconds
        try:
            record = session(options.part, chosen, out, seconds, begun,
                             1 if options.rehearse else 4)
        except KeyboardInterrupt:
            print(f"ended early; {out / f'session-{options.part}.json'} holds what was measured")
            return 130
    failed = [s["name"] for s in record["stages"] if s["rc"] != 0 or "reason" in s]
    print(f"{len(record['stages']) - len(failed)} of {len(record['stages'])} stages ended well"
          + (f"; not {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
