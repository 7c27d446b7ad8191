"""One self-contained page about a run, made from the files of its directory alone.

It shows whatever is there, during a run or after it, and needs no network, no script and no other
file.
"""

from __future__ import annotations

import io
import math
import shlex
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from robustdm.reporting import plots
from robustdm.reporting.images import grid, to_pil
from robustdm.reporting.progress import duration
from robustdm.reporting.webpage import document, escape, picture, section, soft, table
from robustdm.runs.config import TrainConfig
from robustdm.runs.files import Run, column, is_number, read_run, to_array
from robustdm.runs.rundir import write_text

# The page stays small enough to mail: of many previews, this many evenly spaced ones are shown.
MAX_PREVIEWS = 12
# Pixels of one sheet of samples before enlargement; fewer large pictures, more small ones.
SHEET_PIXELS = 512 * 512
PREVIEW_PIXELS = 256 * 256
MAX_PICTURES = 64

PLACES = ("samples", "training data", "clean data")
PLAIN_OBJECTIVES = ("ddpm",)  # without a perturbation


REDUCED_CONTRAST = 2 / 3
# What the measures of the data sets say, and where a good value lies.
MEANINGS = {
    "noise_rms": "rms deviation on the pixels that are constant in clean data; near the clean "
                 "value is good, the training data's value means the noise was learnt",
    "residual": "rms outside the 20 leading principal components of the clean data; near the "
                "clean value is good",
    "pixel_std": "spread of the samples, mean over pixels; well below the clean value means that "
                 "signal was removed with the noise",
    "noise_level": "white-noise estimate from neighbouring pixels, texture included; compare "
                   "with the other columns",
    "sliced_wasserstein": "distance of the whole distribution to the clean one; lower is better, "
                          "but it also falls with the number of samples",
    "distance": "mean distance to the clean set; lower is better, and rewards shrinkage, so read "
                "it with the spread",
    "in_plane_std": "spread within the plane over the truth; 1 is right",
    "far_share": "share of samples far from every mode; lower is better",
    "mode": "share of the samples nearest to each mode; a third each is right",
    "off_subspace_sd": "standard deviation outside the clean subspace; 0 is clean",
    "component_ratio": "standard deviation along each component over the truth; 1 is right",
    "rho": "mean distance from the clean subspace; 0 is clean",
    "psnr": "signal to off-subspace noise in dB; higher is better",
    "finite_share": "share of the samples that are finite numbers",
}


def write_report(run_dir: Path) -> Path:
    """Write run_dir/report.html from the files in run_dir.

    Returns:
        The path of the page.

    Raises:
        UsageError: if run_dir is no directory of a run.
    """
    run = read_run(Path(run_dir))
    path = run.path / "report.html"
    write_text(path, page(run))
    return path


def page(run: Run) -> str:
    """The whole page as HTML."""
    body = [
        _header(run), _warnings(run), _key_numbers(run), _measures(run), _samples(run),
        _previews(run), _curves(run), _schedule(run), _commands(run), _config(run),
        _provenance(run),
    ]
    return document(_title(run), body)


def _title(run: Run) -> str:
    if not run.config_found:
        return f"{run.path.name}, {_steps(run)} steps"
    return f"{run.config.objective} on {run.config.preset}, {_steps(run)} steps"


def _steps(run: Run) -> str:
    if run.finished or not run.config_found:
        return f"{run.step:,}"
    return f"{run.step:,} of {run.config.steps:,}"


def _header(run: Run) -> str:
    config = run.config
    line = []
    if run.config_found:
        line.append(f"data {config.data}")
        if config.data in ("plane", "gaussians"):
            line.append(f"{config.point_noise} noise, level {config.point_noise_level:g}")
        else:
            how = f"with sigma {config.corrupt_sigma:g}" if config.corrupt_kind == "gaussian" else (
                f"({config.corrupt_kind.replace('_', ' and ')})")
            line.append(f"{config.corrupt_fraction:.0%} corrupted {how}")
        if config.objective not in PLAIN_OBJECTIVES:
            line.append(f"lambda {config.lam:g}, mode {config.lambda_mode}")
        line.append(f"seed {config.seed}")
    tiles = []
    for name, values in list(run.measures.items())[:4]:
        beside = ", ".join(
            f"{where} {_num(values[where])}" for where in PLACES[1:]
            if where in values
        )
        if "samples" in values:
            tiles.append(
                f'<div class="tile"><span>{escape(_words(name))}, samples</span>'
                f"<b>{escape(_num(values['samples']))}</b><span>{escape(beside)}</span></div>"
            )
    return (
        f"<header><h1>{escape(_title(run))}</h1>"
        + (f'<p class="soft">{escape("; ".join(line))}</p>' if line else "")
        + (f'<div class="tiles">{"".join(tiles)}</div>' if tiles else "") + "</header>"
    )


def _warnings(run: Run) -> str:
    told = run.summary.get("warnings")
    lines = [str(text) for text in told] if isinstance(told, list) else []
    lines += run.notes
    if not run.finished:
        lines.append(f"The run has not finished: {_steps(run)} steps. The command that continues "
                     "it is below.")
    skipped = run.last("skipped")
    if skipped:
        lines.append(f"{skipped:g} step(s) were skipped: the loss or its gradient was not finite.")
    return "".join(f'<p class="warn">{escape(line)}</p>' for line in lines)


def _key_numbers(run: Run) -> str:
    summary = run.summary
    seconds = summary.get("time_s", run.last("time"))
    rate = summary.get("img_per_s", run.last("img_per_s"))
    parameters = summary.get("parameters", run.provenance.get("parameters"))
    rows = {
        "steps": _steps(run),
        "time": duration(seconds) if is_number(seconds) and math.isfinite(seconds) else None,
        "images per second": _num(rate) if is_number(rate) else None,
        "device": summary.get("device", run.provenance.get("device")),
        "parameters": f"{parameters:,}" if is_number(parameters) else None,
    }
    for label, key in (("loss (last logged)", "loss"), ("fit, mean squared error of eps", "fit"),
                       ("regulariser, with lambda_t", "reg"), ("held-out fit", "heldout_loss"),
                       ("gradient norm", "grad_norm"), ("learning rate", "lr")):
        value = run.last(key)
        rows[label] = None if value is None else _num(value)
    known = {label: value for label, value in rows.items() if value is not None}
    return section("Key numbers", table(([label, value] for label, value in known.items())))


def _measures(run: Run) -> str:
    if not run.measures:
        return section("How close to the clean data", soft(
            "No measures yet: they are taken when the run ends, where the clean law is known."))
    places = [place for place in PLACES
              if any(place in values for values in run.measures.values())]
    rows = [[_words(name), *(_num(values.get(place)) for place in places)]
            for name, values in run.measures.items()]
    return section(
        "How close to the clean data",
        soft("The samples beside the corrupted data they were learnt from and beside the same "
             "data without corruption."),
        table(rows, ["measure", *places], numbers=True),
        *(soft(f"{_words(key)}: {meaning}.") for key, meaning in MEANINGS.items()
          if any(name.startswith(key) for name in run.measures)),
    )


def _samples(run: Run) -> str:
    panels = {"training data, as corrupted": run.reference.get("train"),
              "clean data, the same items": run.reference.get("clean")}
    if run.samples is None and run.previews:
        panels["samples (latest preview)"] = run.previews[-1][1]
    else:
        panels["samples"] = run.samples
    shown = {name: array for name, array in panels.items() if _drawable(array)}
    text = []
    if not any(name.startswith("samples") for name in shown):
        text.append(soft("No samples yet."))
    if not run.reference:
        text.append(soft("samples/reference.npz, the data to compare with, is not there."))
    elif "clean" not in run.reference:
        text.append(soft("No clean data beside them: the training data carry no added noise."))
    if not run.config.clip_samples and any(v.ndim == 4 for v in shown.values()):
        text.append(soft("Drawn at two thirds of the contrast, so that noise on black shows."))
    return section("Training data, clean data, samples", *text,
                   _pictures(run, shown, SHEET_PIXELS))


def _previews(run: Run) -> str:
    drawable = [(step, array) for step, array in run.previews if _drawable(array)]
    if not drawable:
        return section("Samples over training", soft("No samples were made during training."))
    picked = sorted({round(i) for i in np.linspace(0, len(drawable) - 1,
                                                   min(MAX_PREVIEWS, len(drawable)))})
    note = "The same noise each time, from the averaged weights."
    if len(picked) < len(drawable):
        note += (f" {len(picked)} of {len(drawable)} previews are shown; all are in "
                 f"{run.path / 'samples'}.")
    panels = {f"step {drawable[i][0]:,}": drawable[i][1] for i in picked}
    return section("Samples over training", soft(note),
                   _pictures(run, panels, PREVIEW_PIXELS, small=True))


def _pictures(run: Run, panels: Mapping[str, np.ndarray], pixels: int, small: bool = False) -> str:
    """Cards of pictures or of point plots, depending on the shape of the arrays."""
    cards = []
    view = None
    points = [array for array in panels.values() if array.ndim == 2]
    if points:
        clean, train = (run.reference.get(name) for name in ("clean", "train"))
        known = [array for array in (clean, train)
                 if _drawable(array) and array.shape[1:] == points[0].shape[1:]]
        view = plots.point_view(*(known or points))
    for name, array in panels.items():
        caption = name
        broken = int((~np.isfinite(array.reshape(len(array), -1)).all(1)).sum())
        if array.ndim == 2:
            made = plots.point_scatter({"": array}, view)
            data, caption = plots.png_bytes(made), f"{name}: {len(array):,} points"
        else:
            count = int(np.clip(pixels // math.prod(array.shape[2:]), 4, MAX_PICTURES))
            count = min(len(array), math.isqrt(count) ** 2)
            buffer = io.BytesIO()
            # Unclipped samples reach beyond [-1, 1]: at full contrast a black ground would hide it.
            contrast = 1.0 if run.config.clip_samples else REDUCED_CONTRAST
            to_pil(grid(array[:count] * contrast)).save(buffer, format="png")
            data = buffer.getvalue()
            if count < len(array) and not small:
                caption += f": {count} of {len(array):,}"
        if broken:
            caption += f" ({broken} with values that are not finite)"
        cards.append(picture(data, caption))
    return f'<div class="cards{" small" if small else ""}">{"".join(cards)}</div>' if cards else ""


def _curves(run: Run) -> str:
    if not run.rows:
        return section("Curves", soft("metrics.jsonl holds no lines yet."))
    steps = [row["step"] for row in run.rows]
    quarter = run.config.timesteps / 4
    bands = {f"t {math.ceil(i * quarter)} to {math.ceil((i + 1) * quarter) - 1}": f"fit_band{i}"
             for i in range(4)}
    wanted = [
        ("loss", {"total": "loss", "fit": "fit", "regulariser": "reg"}, True, {}),
        ("fit by timestep (low t: little noise)", bands, True, {}),
        ("held-out fit", {"held-out": "heldout_loss", "training": "fit"}, True, {}),
        ("gradient norm, before clipping", {"gradient norm": "grad_norm"}, True,
         {f"clipped at {run.config.clip_norm:g}": run.config.clip_norm}
         if run.config_found and run.config.clip_norm else {}),
        ("images per second", {"img/s": "img_per_s"}, False, {}),
    ]
    columns = []
    for title, keys, log, levels in wanted:
        series = {label: column(run.rows, key) for label, key in keys.items()}
        if title == "held-out fit" and not np.isfinite(series["held-out"]).any():
            continue
        columns.append((title, series, log, levels))
    columns += measure_columns(run)
    cards = []
    for title, series, log, levels in columns:
        series = {label: values for label, values in series.items() if np.isfinite(values).any()}
        if series:
            made = plots.curves(steps, series, title, log, levels)
            cards.append(picture(plots.png_bytes(made), alt=title))
    return section("Curves", soft("Faint: as logged. Bold: moving average."),
                   f'<div class="cards">{"".join(cards)}</div>')


def measure_columns(run: Run) -> list[tuple[str, dict[str, np.ndarray], bool, dict[str, float]]]:
    """Each measure of the samples over training: title, series, log axis, levels to compare."""
    lines = [row["samples"] if isinstance(row.get("samples"), dict) else {} for row in run.rows]
    if not lines[-1] and run.summary.get("step") == run.rows[-1]["step"]:
        # The samples made at the end are measured in the summary.
        lines[-1] = {name: values.get("samples") for name, values in run.measures.items()}
    columns = []
    for name in dict.fromkeys(key for line in lines for key in line):
        values = to_array(line.get(name) for line in lines)
        levels = {place: value for place, value in run.measures.get(name, {}).items()
                  if place != "samples" and is_number(value)}
        # Early samples may be far off by orders of magnitude.
        log = bool((values[np.isfinite(values)] > 0).all()) and min(levels.values(), default=1) > 0
        columns.append((f"samples: {_words(name)}", {"samples": values}, log, levels))
    return columns


def _schedule(run: Run) -> str:
    title = "The ray schedule"
    config = run.config
    if not run.config_found:
        return ""
    if config.objective in PLAIN_OBJECTIVES:
        return section(title, soft(f"{config.objective} uses no perturbation."))
    from robustdm.models.load_run import perturbation_of, schedule_of

    schedule, perturbation = schedule_of(config), perturbation_of(config)
    cards = [
        picture(plots.png_bytes(plots.schedule_figure(schedule, perturbation, [panel],
                                                      config.lambda_max)), alt=alt)
        for panel, alt in (("eps", "radius of the perturbation in units of eps"),
                           ("x", "radius of the perturbation in units of x"),
                           ("lambda", "weight of the regulariser"))
    ]
    low, high = config.beta_range
    return section(
        title,
        soft(f"Radius of the perturbation and weight of its regulariser at every timestep, for "
             f"three values of the random factor b (training draws b from {low:g} to {high:g}); "
             f"schedule {config.schedule}, omega {config.omega:g}, gamma {config.gamma:.4g}."),
        f'<div class="cards">{"".join(cards)}</div>',
    )


def _commands(run: Run) -> str:
    here = shlex.quote(str(run.path))
    out = shlex.quote(str(run.path / "more-samples"))
    if run.finished:
        resume = ("Train on (give the new total)",
                  f"python -m robustdm.train --resume --out {here} "
                  f"--steps {2 * run.step}")
    else:
        resume = "Continue the run", f"python -m robustdm.train --resume --out {here}"
    commands = (
        resume,
        ("Make more samples", f"python -m robustdm.sample --run {here} --num 64 --sampler ddim "
                              f"--steps {min(run.config.preview_steps, run.config.timesteps)} "
                              f"--out {out}"),
        ("Make this page again", f"python -m robustdm.report {here}"),
    )
    return section("Commands", *(f"{soft(label)}<pre>{escape(command)}</pre>"
                                 for label, command in commands))


def _config(run: Run) -> str:
    if not run.config_found:
        return ""
    defaults = TrainConfig().to_dict()
    values = run.config.to_dict()
    rows = [[key, _plain(value)] for key, value in values.items()]
    changed = [row for row in rows if values[row[0]] != defaults[row[0]]]
    return section(
        "Configuration",
        soft("What differs from the defaults:") if changed else soft("All defaults."),
        table(changed),
        f"<details><summary>All fields</summary>{table(rows)}</details>",
    )


def _provenance(run: Run) -> str:
    facts = dict(run.provenance)
    if not facts:
        return section("Provenance", soft("run.json is not there: the origin is not known."))
    starts = facts.pop("sessions", None)
    starts = [item for item in starts if isinstance(item, dict)] if isinstance(starts, list) else []
    parts = [table(_leaves(facts))]
    for number, start in enumerate(starts, start=1):
        parts.append(soft(f"Start {number} of {len(starts)}"))
        parts.append(table(_leaves(start)))
    return section("Provenance", *parts)


def _leaves(values: Mapping, prefix: str = "") -> list[list[str]]:
    rows = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            rows.extend(_leaves(value, f"{prefix}{key}: "))
        else:
            rows.append([f"{prefix}{key}", _plain(value)])
    return rows


def _drawable(array: np.ndarray | None) -> bool:
    """Pictures (N, C, H, W) or points (N, D), at least one of them finite."""
    if array is None or array.size == 0 or array.ndim not in (2, 4):
        return False
    if array.ndim == 4 and array.shape[1] not in (1, 3, 4):
        return False
    return bool(np.isfinite(array.reshape(len(array), -1)).all(1).any())


def _num(value) -> str:
    """A number to four significant digits, with separators from 10,000 up."""
    if not is_number(value):
        return "" if value is None else str(value)
    if math.isfinite(value) and 10_000 <= abs(value) < 1e12:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def _plain(value) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(_plain(item) for item in value)
    return "none" if value is None else str(value)


def _words(name: str) -> str:
    return name.replace("_", " ")
