"""One self-contained page about a run, made from the files of its directory alone.

It shows whatever is there, during a run or after it, and needs no network, no script and no other
file.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from robustdm.reporting import plots
from robustdm.reporting.images import grid_png
from robustdm.reporting.progress import duration
from robustdm.reporting.webpage import Picture, render
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
    title = f"{run.path.name}, {_steps(run)} steps"
    if run.config_found:
        title = f"{run.config.objective} on {run.config.preset}, {_steps(run)} steps"
    places = [place for place in PLACES
              if any(place in values for values in run.measures.values())]
    measures = [[_words(name), *(_num(values.get(place)) for place in places)]
                for name, values in run.measures.items()]
    panels = _panels(run)
    previews = [(step, array) for step, array in run.previews if _drawable(array)]
    facts = dict(run.provenance)
    starts = facts.pop("sessions", None)
    starts = [item for item in starts if isinstance(item, dict)] if isinstance(starts, list) else []
    config, defaults = run.config.to_dict(), TrainConfig().to_dict()
    fields = {key: _plain(value) for key, value in config.items()}
    return render(
        "run.html.j2", run=run, title=title, about=_about(run), tiles=_tiles(run),
        warnings=_warnings(run), key_numbers=_key_numbers(run),
        measures=[["measure", *places], *measures] if measures else [],
        meanings=[f"{_words(key)}: {meaning}." for key, meaning in MEANINGS.items()
                  if any(name.startswith(key) for name in run.measures)],
        panels=_pictures(run, panels, SHEET_PIXELS, count=True),
        dimmed=_contrast(run) < 1 and any(array.ndim == 4 for array in panels.values()),
        previews=_previews(run, previews), preview_count=len(previews), curves=_curves(run),
        perturbed=run.config.objective not in PLAIN_OBJECTIVES, schedule=_schedule(run),
        here=shlex.quote(str(run.path)), out=shlex.quote(str(run.path / "more-samples")),
        fields=list(fields.items()),
        changed=[(key, text) for key, text in fields.items() if config[key] != defaults[key]],
        facts=_leaves(facts), starts=[_leaves(start) for start in starts])


def _steps(run: Run) -> str:
    if run.finished or not run.config_found:
        return f"{run.step:,}"
    return f"{run.step:,} of {run.config.steps:,}"


def _about(run: Run) -> list[str]:
    config = run.config
    if not run.config_found:
        return []
    if config.data in ("plane", "gaussians"):
        noise = f"{config.point_noise} noise, level {config.point_noise_level:g}"
    else:
        how = f"with sigma {config.corrupt_sigma:g}" if config.corrupt_kind == "gaussian" else (
            f"({config.corrupt_kind.replace('_', ' and ')})")
        noise = f"{config.corrupt_fraction:.0%} corrupted {how}"
    weight = [f"lambda {config.lam:g}, mode {config.lambda_mode}"]
    return [f"data {config.data}", noise,
            *(weight if config.objective not in PLAIN_OBJECTIVES else []), f"seed {config.seed}"]


def _tiles(run: Run) -> list[tuple[str, str, str]]:
    """Name and value of the samples' first measures, and the values beside them."""
    return [
        (_words(name), _num(values["samples"]),
         ", ".join(f"{where} {_num(values[where])}" for where in PLACES[1:] if where in values))
        for name, values in list(run.measures.items())[:4] if "samples" in values]


def _warnings(run: Run) -> list[str]:
    told = run.summary.get("warnings")
    lines = [str(text) for text in told] if isinstance(told, list) else []
    lines += run.notes
    if not run.finished:
        lines.append(f"The run has not finished: {_steps(run)} steps. The command that continues "
                     "it is below.")
    skipped = run.last("skipped")
    if skipped:
        lines.append(f"{skipped:g} step(s) were skipped: the loss or its gradient was not finite.")
    return lines


def _key_numbers(run: Run) -> list[list[str]]:
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
    return [[label, value] for label, value in rows.items() if value is not None]


def _panels(run: Run) -> dict[str, np.ndarray]:
    """The training data, clean data and samples, as far as they are there; samples last."""
    panels = {"training data, as corrupted": run.reference.get("train"),
              "clean data, the same items": run.reference.get("clean")}
    if run.samples is None and run.previews:
        panels["samples (latest preview)"] = run.previews[-1][1]
    else:
        panels["samples"] = run.samples
    return {name: array for name, array in panels.items() if _drawable(array)}


def _previews(run: Run, previews: list[tuple[int, np.ndarray]]) -> list[Picture]:
    """At most MAX_PREVIEWS of the samples made during training."""
    picked = sorted({round(i) for i in np.linspace(0, len(previews) - 1,
                                                   min(MAX_PREVIEWS, len(previews)))})
    panels = {f"step {previews[i][0]:,}": previews[i][1] for i in picked}
    return _pictures(run, panels, PREVIEW_PIXELS)


def _pictures(run: Run, panels: Mapping[str, np.ndarray], pixels: int,
              count: bool = False) -> list[Picture]:
    """Pictures or point plots, depending on the shape of the arrays; ``count`` tells how many of
    the pictures are shown."""
    made = []
    view = None
    points = [array for array in panels.values() if array.ndim == 2]
    if points:
        clean, train = (run.reference.get(name) for name in ("clean", "train"))
        known = [array for array in (clean, train)
                 if _drawable(array) and array.shape[1:] == points[0].shape[1:]]
        view = plots.point_view(*(known or points))
    for name, array in panels.items():
        broken = int((~np.isfinite(array.reshape(len(array), -1)).all(1)).sum())
        if array.ndim == 2:
            png = plots.png_bytes(plots.point_scatter({"": array}, view))
            caption = f"{name}: {len(array):,} points"
        else:
            shown = int(np.clip(pixels // math.prod(array.shape[2:]), 4, MAX_PICTURES))
            shown = min(len(array), math.isqrt(shown) ** 2)
            png = grid_png(array[:shown] * _contrast(run))
            caption = f"{name}: {shown} of {len(array):,}" if count and shown < len(array) else name
        if broken:
            caption += f" ({broken} with values that are not finite)"
        made.append(Picture(png, caption))
    return made


def _contrast(run: Run) -> float:
    # Unclipped samples reach beyond [-1, 1]: at full contrast a black ground would hide it.
    return 1.0 if run.config.clip_samples else REDUCED_CONTRAST


def _curves(run: Run) -> list[Picture]:
    if not run.rows:
        return []
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
    made = []
    for title, series, log, levels in columns:
        series = {label: values for label, values in series.items() if np.isfinite(values).any()}
        if series:
            drawn = plots.curves(steps, series, title, log, levels)
            made.append(Picture(plots.png_bytes(drawn), alt=title))
    return made


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


def _schedule(run: Run) -> list[Picture]:
    if not run.config_found or run.config.objective in PLAIN_OBJECTIVES:
        return []
    from robustdm.models.load_run import perturbation_of, schedule_of

    schedule, perturbation = schedule_of(run.config), perturbation_of(run.config)
    return [
        Picture(plots.png_bytes(plots.schedule_figure(schedule, perturbation, [panel],
                                                      run.config.lambda_max)), alt=alt)
        for panel, alt in (("eps", "radius of the perturbation in units of eps"),
                           ("x", "radius of the perturbation in units of x"),
                           ("lambda", "weight of the regulariser"))
    ]


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
