"""Figures in one restrained style, for the run report and the reproduce scripts.

Figures have no background and grey ink, so that they read on a light and on a dark page. They are
made without pyplot: nothing global changes and no window can open. Matplotlib is imported late.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

    from robustdm.method.perturbation import Perturbation
    from robustdm.method.schedule import NoiseSchedule

# Colours of middle lightness: each stands out from white and from near black.
COLOURS = ("#3f8fd2", "#e0872b", "#3fa672", "#c85f9a", "#8f79d6", "#9a8a3c")
INK = "#7b7f85"
SIZE = (3.7, 2.6)
DPI = 160
# More points than this are drawn as a density: a scatter plot would be one blot.
SCATTER_LIMIT = 4000

_STYLE = {
    "font.size": 9, "axes.titlesize": 9.5, "axes.labelsize": 9,
    "axes.edgecolor": INK, "axes.labelcolor": INK, "axes.titlecolor": INK, "text.color": INK,
    "xtick.color": INK, "ytick.color": INK, "axes.linewidth": 0.7, "xtick.major.width": 0.7,
    "ytick.major.width": 0.7, "xtick.minor.width": 0.4, "ytick.minor.width": 0.4,
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
    "grid.color": INK, "grid.alpha": 0.25, "grid.linewidth": 0.5, "lines.linewidth": 1.6,
    "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none",
    "figure.dpi": DPI,
}


def figure(rows: int = 1, columns: int = 1, size: tuple[float, float] = SIZE):
    """A figure in the house style.

    Args:
        rows, columns: panels.
        size: width and height of one panel, inches.

    Returns:
        The Figure and a (rows, columns) array of its Axes.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        made = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
        return made, made.subplots(rows, columns, squeeze=False)


def png_bytes(made: Figure) -> bytes:
    """The figure as a PNG with a transparent background."""
    buffer = io.BytesIO()
    made.savefig(buffer, format="png", dpi=DPI, transparent=True)
    return buffer.getvalue()


def save(made: Figure, path: Path) -> None:
    """Write the figure; the suffix decides the format."""
    made.savefig(path, dpi=DPI, transparent=True)


def curves(
    steps: Sequence[float],
    series: Mapping[str, Sequence[float]],
    title: str,
    log: bool = False,
    levels: Mapping[str, float] | None = None,
    xlabel: str = "step",
) -> Figure:
    """Curves over training: faint as measured, bold smoothed; gaps (NaN) are bridged.

    Args:
        steps: (N,) positions on the x axis.
        series: label -> (N,) values, NaN where there is none.
        title: what is plotted, with its unit.
        log: logarithmic y axis (used only if something is positive).
        levels: label -> value drawn as a dashed horizontal line.
        xlabel: label of the x axis.
    """
    made, axes = figure()
    ax = axes[0, 0]
    steps = np.asarray(steps, dtype=float)
    positive = False
    for colour, (label, values) in zip(_colours(len(series)), series.items(), strict=True):
        values = np.asarray(values, dtype=float)
        known = np.isfinite(values)
        x, y = steps[known], values[known]
        positive |= bool((y > 0).any())
        window = len(y) // 25
        if window >= 2:
            ax.plot(x, y, color=colour, alpha=0.3, linewidth=0.7)
            ax.plot(x, smooth(y, window), color=colour, label=label)
        else:
            ax.plot(x, y, color=colour, label=label, marker="o" if len(y) <= 12 else None,
                    markersize=3)
    dashes = ((4, 3), (1, 2), (6, 2, 1, 2))
    for index, (label, value) in enumerate((levels or {}).items()):
        if np.isfinite(value):
            ax.axhline(value, color=INK, linewidth=1, dashes=dashes[index % 3], label=label)
    if log and positive:
        _log_axis(ax)
    _finish(ax, title, xlabel, legend=len(series) + len(levels or {}) > 1)
    return made


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centred moving average over 2 * window + 1 values, fewer at the ends: (N,) -> (N,)."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low, high = np.maximum(index - window, 0), np.minimum(index + window + 1, len(values))
    return (total[high] - total[low]) / (high - low)


def schedule_figure(
    schedule: NoiseSchedule,
    perturbation: Perturbation,
    panels: Sequence[str] = ("eps", "x", "lambda"),
    lambda_max: float | None = None,
    betas: Sequence[float] = (0.5, 1.0, 2.0),
) -> Figure:
    """The ray schedule: radius in eps-units, radius in x-units and lambda_t, over t.

    Args:
        schedule: the noise schedule.
        perturbation: gives radius and lambda_t.
        panels: which of "eps", "x", "lambda", side by side.
        lambda_max: upper bound of lambda_t, if one is in force.
        betas: values of the random factor b, one line each.
    """
    import torch

    made, axes = figure(1, len(panels))
    t = torch.arange(len(schedule))
    s = schedule.sqrt_one_minus_alphas_cumprod.numpy()
    for ax, panel in zip(axes[0], panels, strict=True):
        for colour, beta in zip(_colours(len(betas)), betas, strict=True):
            factor = torch.full((len(schedule),), beta, dtype=torch.float64)
            if panel == "lambda":
                values = perturbation.lambda_t(schedule, t, factor).numpy()
                values = values if lambda_max is None else np.minimum(values, lambda_max)
            else:
                values = perturbation.radius(schedule, t, factor).numpy()
                values = values * s if panel == "x" else values
            ax.plot(t.numpy(), values, color=colour, label=f"b = {beta:g}")
        title = {"eps": "radius r_b(t), eps-units", "x": "radius s r_b(t), x-units",
                 "lambda": f"lambda_t, mode {perturbation.lambda_mode}"}[panel]
        if perturbation.lam > 0 or panel != "lambda":
            _log_axis(ax)
        _finish(ax, title, "timestep t", legend=True)
    return made


@dataclass(frozen=True)
class PointView:
    """Two planes on which point sets are drawn, the same for every set that is compared.

    Attributes:
        centre: (D,) subtracted first.
        planes: (D, 2) orthonormal axes of each plane.
        labels: names of each plane's axes.
        limits: ((x low, x high), (y low, y high)) of each plane.
    """

    centre: np.ndarray
    planes: tuple[np.ndarray, ...]
    labels: tuple[tuple[str, str], ...]
    limits: tuple[tuple[tuple[float, float], tuple[float, float]], ...]

    def project(self, points: np.ndarray, plane: int) -> np.ndarray:
        """Coordinates on a plane: (..., D) -> (..., 2)."""
        return (points - self.centre) @ self.planes[plane]


def point_view(axes_from: np.ndarray, *also_show: np.ndarray) -> PointView:
    """Look along the principal axes of a point set: the first two, and the first and the last.

    The last axis is where clean data vary least, so it is where noise shows.

    Args:
        axes_from: (N, D) points, best the clean data; decides axes and centre.
        also_show: further (N, D) points that the limits take in (but for 0.2 % of them).
    """
    points = _finite(axes_from)
    centre = points.mean(0)
    some = (points[:20_000] - centre).astype(np.float64)
    some /= np.abs(some).max() or 1.0  # a sampler that diverged: squares must not overflow
    rows = np.linalg.eigh(some.T @ some)[1].T[::-1]  # most variance first
    # A sign convention, so that the same data are always drawn the same way round.
    rows = rows * np.where(rows[np.arange(len(rows)), np.abs(rows).argmax(1)] < 0, -1, 1)[:, None]
    if len(rows) == 1:  # one dimension: a row of points on a flat plane
        rows = np.concatenate([rows, np.zeros_like(rows)])
    last = len(rows) - 1
    pairs = [(0, 1)] if last == 1 else [(0, 1), (0, last)]
    planes = tuple(rows[list(pair)].T for pair in pairs)
    shown = np.concatenate([points, *(_finite(more) for more in also_show)]) - centre
    limits = tuple(
        tuple(_span(shown @ plane[:, side]) for side in (0, 1)) for plane in planes
    )
    labels = tuple((f"axis {a + 1}", f"axis {b + 1}") for a, b in pairs)
    return PointView(centre, planes, labels, limits)


def point_scatter(panels: Mapping[str, np.ndarray], view: PointView | None = None) -> Figure:
    """Point sets side by side: a column each, a row for each plane of the view.

    Args:
        panels: title -> (N, D) points. Many points are drawn as a density.
        view: planes and limits; by default made from all the points.
    """
    if view is None:
        view = point_view(np.concatenate([_finite(points) for points in panels.values()]))
    made, axes = figure(len(view.planes), len(panels), size=(3.0, 2.8))
    for column, (title, points) in enumerate(panels.items()):
        points = _finite(points)
        for row in range(len(view.planes)):
            ax = axes[row, column]
            (x0, x1), (y0, y1) = view.limits[row]
            x, y = view.project(points, row).T
            if len(points) > SCATTER_LIMIT:
                _density(ax, x, y, view.limits[row])
            else:
                size = 9 if len(points) < 200 else 3
                ax.scatter(x, y, s=size, color=COLOURS[0], alpha=0.45, linewidths=0)
            outside = int(((x < x0) | (x > x1) | (y < y0) | (y > y1)).sum())
            if outside:
                ax.text(0.98, 0.98, f"{outside} outside", transform=ax.transAxes, ha="right",
                        va="top", fontsize=7.5, color=INK)
            ax.set_xlim(x0, x1)
            ax.set_ylim(y0, y1)
            _finish(ax, title if row == 0 else "", view.labels[row][0])
            ax.set_ylabel(view.labels[row][1])
    return made


def trajectories(ax: Axes, trajectory: np.ndarray, projection) -> None:
    """Paths of samples, as thin lines coloured by sampling time, with their ends as dots.

    Args:
        ax: where to draw.
        trajectory: (steps, N, D) positions, noise first.
        projection: two coordinate numbers, or a (D, 2) matrix.
    """
    from matplotlib.collections import LineCollection

    flat = _project(np.asarray(trajectory), projection)
    steps = len(flat)
    if steps > 1:
        pieces = np.stack([flat[:-1], flat[1:]], axis=2)  # (steps - 1, N, 2 ends, 2)
        time = np.repeat(np.linspace(0, 1, steps - 1), flat.shape[1])
        ax.add_collection(LineCollection(
            pieces.reshape(-1, 2, 2), array=time, cmap=_heat(), linewidths=0.6, alpha=0.6,
        ))
    ax.scatter(*flat[-1].T, s=6, color=COLOURS[1], linewidths=0, zorder=3)
    ax.autoscale_view()


def score_field(ax: Axes, grid: np.ndarray, vectors: np.ndarray, colorbar: bool = True):
    """A vector field as arrows of equal length, their colour the magnitude (logarithmic).

    Args:
        ax: where to draw.
        grid: (N, 2) positions.
        vectors: (N, 2) vectors, such as the score.
        colorbar: add the scale of the magnitude.

    Returns:
        The quiver.

    Source: drawn like Briglia et al. 2026, Figure 2 (b).
    """
    from matplotlib.colors import LogNorm

    grid, vectors = np.asarray(grid, dtype=float), np.asarray(vectors, dtype=float)
    magnitude = np.linalg.norm(vectors, axis=1)
    positive = magnitude[np.isfinite(magnitude) & (magnitude > 0)]
    low, high = (positive.min(), positive.max()) if len(positive) else (0.1, 1.0)
    unit = vectors / np.where(magnitude > 0, magnitude, 1)[:, None]
    arrows = ax.quiver(
        grid[:, 0], grid[:, 1], unit[:, 0], unit[:, 1], np.clip(magnitude, low, high),
        norm=LogNorm(low, max(high, low * 1.01)), cmap=_heat(), pivot="mid", angles="xy",
        width=0.005,
    )
    ax.set_aspect("equal")
    if colorbar:
        bar = ax.figure.colorbar(arrows, ax=ax, shrink=0.85, pad=0.02)
        bar.outline.set_visible(False)
        bar.ax.tick_params(which="both", colors=INK, labelsize=7.5)
        bar.set_label("magnitude", color=INK)
    return arrows


def _project(points: np.ndarray, projection) -> np.ndarray:
    projection = np.asarray(projection)
    return points[..., projection] if projection.ndim == 1 else points @ projection


def _finite(points: np.ndarray) -> np.ndarray:
    points = np.asarray(points, dtype=np.float64)
    points = points.reshape(len(points), -1)
    return points[np.isfinite(points).all(1)]


def _span(values: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, (0.001, 0.999))
    margin = 0.08 * (high - low) or 1.0
    return float(low - margin), float(high + margin)


def _density(ax: Axes, x: np.ndarray, y: np.ndarray, limits) -> None:
    from matplotlib.colors import LogNorm

    counts, xs, ys = np.histogram2d(x, y, bins=90, range=limits)
    if counts.max() > 0:
        ax.pcolormesh(xs, ys, np.ma.masked_equal(counts.T, 0), rasterized=True,
                      cmap=_heat(), norm=LogNorm(1, counts.max() + 1))


def _heat():
    """Blue to orange through pink: unlike the usual maps, no end is near black or near white."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("heat", [COLOURS[0], COLOURS[3], COLOURS[1]])


def _colours(count: int) -> list[str]:
    return [COLOURS[index % len(COLOURS)] for index in range(count)]


def _log_axis(ax: Axes) -> None:
    """Logarithmic y axis in plain numbers, with enough ticks where the range is short."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    ax.set_yscale("log")
    low, high = ax.get_ylim()
    decades = np.log10(high / low)
    subs = (1,) if decades > 3 else (1, 3) if decades > 1.5 else (1, 2, 3, 5, 7)
    ax.yaxis.set_major_locator(LogLocator(subs=subs, numticks=12))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())


def _finish(ax: Axes, title: str, xlabel: str, legend: bool = False) -> None:
    ax.set_title(title, loc="left")
    ax.set_xlabel(xlabel)
    ax.grid(True)
    if legend:
        ax.legend(frameon=False, labelcolor=INK, fontsize=8, handlelength=1.4)


def similarities(found: Mapping[str, Tensor], title: str) -> Figure:
    """Histograms of similarities to the nearest training image, with the first threshold.

    Args:
        found: name -> (N,) similarities.
    """
    from robustdm.metrics.neighbours import THRESHOLDS

    made, axes = figure(1, 1, size=(6.0, 3.6))
    edges = np.linspace(min(0.85, *(float(s.min()) for s in found.values())), 1, 60)
    for colour, (name, s) in zip(COLOURS, found.items(), strict=False):
        axes[0, 0].hist(s.numpy(), bins=edges, density=True, histtype="step", color=colour,
                        label=name)
    axes[0, 0].axvline(THRESHOLDS[0], color=INK, linestyle=":", linewidth=1)
    axes[0, 0].set(xlabel="cosine similarity to the nearest training image", ylabel="density",
                   title=title)
    axes[0, 0].legend(fontsize=7)
    return made
