"""What the numbers come to: ratios, the issue's targets, the table, the picture."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from robustdm.errors import UsageError

SCHEMA = "robustdm-kernels-1"
OURS = ("torch", "cpp", "triton")
# Other jobs than the case's: without autograd, or with noise that was kept from an earlier op.
OTHER_JOBS = (" alone", " stored")
BUSY = 0.3  # load per core
TIE = 1.05  # times that are no further apart are called equal
BEYOND_CACHE = 2**27  # bytes
STYLES = {"WRONG": "bold red", "FAILED": "bold red"}


# What follows from the times.


def derive(record: dict) -> None:
    """Add ratios to the rows, the fastest provider to the cases, the targets to the record."""
    ceiling = copy_ceiling(record)
    for case in record["cases"]:
        times = measured(case)
        for row in case["rows"]:
            if row["provider"] not in times:
                continue
            row["of_copy"] = row["gb_s"] / ceiling
            for base in ("eager", "compile"):
                if base in times:
                    row[f"vs_{base}"] = times[base] / row["ms"]
        same_job = {p: ms for p, ms in times.items() if not p.endswith(OTHER_JOBS)}
        case["fastest"] = min(same_job, key=same_job.get, default=None)
        if same_job:
            best = TIE * same_job[case["fastest"]]
            case["auto_is_fastest"] = same_job.get(case["auto"], float("inf")) <= best
        kept = [ms for p, ms in times.items() if p.endswith(" stored")]
        if kept and case["auto"] in times:
            # Above 1, keeping the noise of an earlier op in memory would be faster.
            case["auto_against_stored"] = times[case["auto"]] / min(kept)
    record["targets"] = targets(record)


def copy_ceiling(record: dict) -> float:
    """GB/s of a copy that no cache holds."""
    sizes = [c for c in record["copy"] if c["bytes"] >= BEYOND_CACHE] or record["copy"][-1:]
    return max(c["gb_s"] for c in sizes)


def measured(case: dict) -> dict[str, float]:
    """Provider -> median ms, of the providers of a case that have one."""
    return {row["provider"]: row["ms"] for row in case["rows"] if "ms" in row}


# Bound by arithmetic, not by memory: 66 instructions an element, 65 % of a copy at best.
ARITHMETIC = [("noise_perturb", "bf16")]


def failures(record: dict) -> list[str]:
    """Rows whose numbers were wrong, or that raised although they are ours."""
    if not any("ms" in row for case in record["cases"] for row in case["rows"]):
        return ["nothing was measured", *_failed(record)]
    return _failed(record)


def _failed(record: dict) -> list[str]:
    return [
        f"{case['name']}, {row['provider']}: {row['status']} "
        + (row.get("reason") or f"error {row['error']:.3g} > {row['limit']:.3g} ({row['how']})")
        for case in record["cases"] for row in case["rows"] if row["status"] in ("WRONG", "FAILED")
    ]


def targets(record: dict) -> list[dict]:
    """The numbers that issue 3 asks for: text, value, target, holds; None where unmeasured."""
    cases = {case["name"]: case for case in record["cases"]}
    found = []

    def value(name: str, provider: str, key: str) -> float | None:
        rows = {row["provider"]: row for row in cases.get(name, {"rows": []})["rows"]}
        return rows.get(provider, {}).get(key)

    def add(text: str, got: float | None, target: float, at_most: bool = False) -> None:
        holds = None if got is None else got <= target if at_most else got >= target
        sign = "<=" if at_most else ">="
        found.append({"text": text, "value": got, "target": f"{sign} {target}", "holds": holds})

    def ratios(name: str, provider: str, eager: float, compiled: bool = True) -> None:
        add(f"{name}: {provider} against eager", value(name, provider, "vs_eager"), eager)
        if compiled:
            add(f"{name}: {provider} against compile", value(name, provider, "vs_compile"), 1.0)

    optimizer = next((name for name in cases if name.startswith("adamw_ema 35.7M")), "adamw_ema")
    if record["device"] == "cpu":
        for op in ("noise_perturb", "fgsm_project", "equivariance_loss robust"):
            ratios(f"{op} 128x3x32x32 fp32", "cpp", 3.0)
        ratios(optimizer, "cpp", 1.1, compiled=False)
    else:
        for op in ("noise_perturb", "fgsm_project", "equivariance_loss robust"):
            for dtype in ("fp32", "bf16"):
                name = f"{op} 32x3x256x256 {dtype}"
                alone = "triton alone" if op.startswith("equivariance_loss") else "triton"
                if (op, dtype) not in ARITHMETIC:
                    add(f"{name}: share of copy, {alone}", value(name, alone, "of_copy"), 0.85)
                ratios(name, "triton", 4.0)
        _norm_targets(value, add)
        ratios(optimizer, "cpp", 1.0, compiled=False)
    for dtype, target in (("float32", 1e-6), ("bfloat16", 4e-3)):
        errors = [row["error"] for case in record["cases"] if case["dtype"] == dtype
                  for row in case["rows"]
                  if row["provider"].split()[0] in OURS and row.get("error") is not None]
        add(f"largest error of our backends, {dtype}", max(errors, default=None), target, True)
    return found


def _norm_targets(value, add) -> None:
    forward, whole = (f"group_norm_act {part} 128x128x32x32 bf16"
                      for part in ("forward", "forward+backward"))
    add(f"{forward}: triton against compile", value(forward, "triton", "vs_compile"), 1.2)
    add(f"{forward}: share of copy", value(forward, "triton", "of_copy"), 0.8)
    times = {p: [value(name, p, "ms") for name in (whole, forward)] for p in ("triton", "compile")}
    known = all(ms is not None for pair in times.values() for ms in pair)
    backward = {p: pair[0] - pair[1] for p, pair in times.items()} if known else {}
    add("group_norm_act backward 128x128x32x32 bf16 (difference): triton against compile",
        backward["compile"] / backward["triton"] if known else None, 1.3)


# On screen.


def print_record(record: dict) -> None:
    """The table, the targets, and all that was wrong or left out."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=150)
    gpu = record["device"] == "cuda"
    console.print(table(record, gpu))
    where = f"{record['gpu']}, driver {record['driver']}" if gpu else (
        f"{record['cpu']}, {record['threads']} threads on {record['cores']} cores")
    ceiling = copy_ceiling(record)
    console.print(f"{where}; copy {ceiling:.0f} GB/s; load {record['load_before']:.1f} before, "
                  f"{record['load_after']:.1f} after; {record['seconds']:.0f} s", highlight=False)
    if record["load_before"] > BUSY * record["cores"]:
        console.print(f"the machine was busy before this began (load {record['load_before']:.1f} "
                      f"on {record['cores']} cores): repeat it on an idle one", style="bold yellow",
                      highlight=False)
    for case in record["cases"]:
        if case.get("auto_is_fastest") is False:
            times = measured(case)
            slower = times[case["auto"]] / times[case["fastest"]] if case["auto"] in times else None
            console.print(
                f"auto is not the fastest: {case['name']}: {case['auto']}, "
                + (f"{slower:.2f} x the time of {case['fastest']}" if slower else "not measured"),
                style="yellow", highlight=False)
        if case.get("auto_against_stored", 0) > 1:
            console.print(
                f"keeping the noise is faster: {case['name']}: {case['auto']} takes "
                f"{case['auto_against_stored']:.2f} x the time of plain torch with stored noise",
                style="yellow", highlight=False)
    for name in record["left_out"]:
        console.print(f"left out for want of time: {name}", style="yellow", highlight=False)
    for (provider, reason), names in reasons_off(record).items():
        which = names[0] if len(names) == 1 else f"{len(names)} cases"
        console.print(f"off: {provider} in {which}: {reason}", style="dim", highlight=False)
    for target in record["targets"]:
        got = "unmeasured" if target["value"] is None else f"{target['value']:.3g}"
        word, style = {True: ("reached", "green"), False: ("MISSED ", "red"),
                       None: ("        ", "dim")}[target["holds"]]
        console.print(f"{word}  {target['text']}: {got} ({target['target']})", style=style,
                      highlight=False)
    for text in failures(record):
        console.print(text, style="bold red", highlight=False)


def reasons_off(record: dict) -> dict[tuple[str, str], list[str]]:
    """(provider, why it is off) -> names of the cases."""
    found: dict[tuple[str, str], list[str]] = {}
    for case in record["cases"]:
        for row in case["rows"]:
            if row["status"] == "off":
                found.setdefault((row["provider"], row["reason"]), []).append(case["name"])
    return found


def table(record: dict, gpu: bool) -> Table:
    """One line per case and provider that is on."""
    made = Table(show_edge=False, pad_edge=False)
    made.add_column("case", overflow="fold")
    made.add_column("provider", no_wrap=True)
    columns = ["ms", "p20-p80", *(("warm ms", "host ms") if gpu else ()), "GB/s", "of copy",
               "vs eager", "vs compile", *(("MiB",) if gpu else ()), "error"]
    for column in columns:
        made.add_column(column, justify="right", no_wrap=True)
    for case in sorted(record["cases"], key=lambda c: c["name"]):
        for i, row in enumerate(r for r in case["rows"] if r["status"] != "off"):
            made.add_row(case["name"] if i == 0 else "", row["provider"],
                         *_cells(row, gpu, len(columns)), style=STYLES.get(row["status"], ""))
        made.add_section()
    return made


def _cells(row: dict, gpu: bool, columns: int) -> list[str]:
    if row["status"] != "ok":  # no speed of a wrong result
        error = "" if row.get("error") is None else f"{row['error']:.1e}"
        return [row["status"], *[""] * (columns - 2), error]

    def number(key: str, form: str) -> str:
        return "" if row.get(key) is None else form.format(row[key])

    return [
        number("ms", "{:.4g}"), f"{row['p20']:.3g}-{row['p80']:.3g}",
        *((number("warm_ms", "{:.4g}"), number("host_ms", "{:.4g}")) if gpu else ()),
        number("gb_s", "{:.4g}"), number("of_copy", "{:.0%}"), number("vs_eager", "{:.2f}"),
        number("vs_compile", "{:.2f}"), *((number("peak_mib", "{:.4g}"),) if gpu else ()),
        "statistics" if row["how"] == "statistics" else f"{row['error']:.1e}",
    ]


# As a picture.


def plot(record: dict, path: Path) -> None:
    """Bandwidth over the bytes a case has to move, one point per row, under that of a copy.

    Raises:
        UsageError: if the file cannot be written.
    """
    from robustdm.reporting.plots import COLOURS, INK, figure

    made, axes = figure(size=(7.2, 4.4))
    ax = axes[0, 0]
    copy = record["copy"]
    ax.plot([c["bytes"] for c in copy], [c["gb_s"] for c in copy], color=INK, label="copy")
    ceiling = copy_ceiling(record)
    ax.axhline(ceiling, color=INK, linestyle="--", linewidth=0.8)
    rows = [(case["nbytes"], row) for case in record["cases"] for row in case["rows"]
            if "gb_s" in row and not row["provider"].endswith(OTHER_JOBS)]
    for colour, provider in zip(COLOURS, ("eager", "compile", *OURS), strict=False):
        points = [(nbytes, row["gb_s"]) for nbytes, row in rows if row["provider"] == provider]
        if points:
            ax.scatter(*zip(*points, strict=True), s=14, color=colour, label=provider)
    ax.set(xscale="log", yscale="log", xlabel="bytes that have to move",
           ylabel="GB/s over those bytes",
           title=f"{record['gpu'] or record['cpu']}: copy {ceiling:.0f} GB/s")
    ax.grid(True, which="major")
    ax.legend(frameon=False, ncols=3)
    try:
        made.savefig(path, format="png", facecolor="white")
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}") from None


# From a file.


def read_record(path: Path) -> dict:
    """A record that run.py wrote.

    Raises:
        UsageError: if it is missing or is something else.
    """
    remedy = "write one with: python benchmarks/run.py --suite cpu --out FILE.json"
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist: {remedy}") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}; {remedy}") from None
    except ValueError:
        raise UsageError(f"{path} is not JSON: {remedy}") from None
    schema = record.get("schema") if isinstance(record, dict) else None
    if schema != SCHEMA:
        raise UsageError(f"{path} is no record of benchmarks/run.py (its schema is {schema!r}, "
                         f"wanted {SCHEMA!r}): {remedy}")
    return record
