"""Noise left against signal kept: a method is better than a shrunk DDPM only at equal signal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from robustdm import plots
from robustdm.studies.claims import Claim, Spread, by_seed, ratio_claim, untested

PLAIN, SHRUNK = "DDPM", "DDPM, shrunk "


def _curve(names: Sequence[str]) -> list[str]:
    return [n for n in dict.fromkeys(names) if n == PLAIN or n.startswith(SHRUNK)]


def shrunk_noise(
    records: Sequence[dict], group: str, name: str, noise: str, signal: str
) -> list[float] | None:
    """Noise of a DDPM that is shrunk until it keeps as much signal as an arm, a value per seed.

    Interpolated between the measured strengths, logarithmically in the noise; None where an arm
    keeps less signal than the strongest or more than none.
    """
    curve = _curve([r["name"] for r in records if r["group"] == group])
    x, y = (np.array([by_seed(records, group, n, m) for n in curve]).T for m in (signal, noise))
    found = []
    for kept, xs, ys in zip(by_seed(records, group, name, signal), x, y, strict=True):
        order = np.argsort(xs)
        if not xs.min() <= kept <= xs.max():
            return None
        found.append(float(np.exp(np.interp(kept, xs[order], np.log(ys[order])))))
    return found


def equal_signal_claim(
    records: Sequence[dict], group: str, name: str, noise: str, signal: str
) -> Claim:
    """Whether an arm leaves less noise than a shrunk DDPM that keeps as much signal."""
    text = (f"{group}, not in the paper: noise left, {name} / DDPM shrunk until it keeps as much "
            "signal")
    shrunk = shrunk_noise(records, group, name, noise, signal)
    if shrunk is None:
        return untested(f"{text} (outside the strengths tried)", "")
    return ratio_claim(text, by_seed(records, group, name, noise), shrunk)


def figure(
    rows: Mapping[str, Mapping[str, Spread]], noise: str, signal: str, clean: float = 1.0
) -> Figure:
    """Shrunk DDPMs as a line, every other row as a point; down and to the truth is better.

    Args:
        rows: name -> measures.
        noise, signal: which of them.
        clean: signal of clean data.
    """
    made, axes = plots.figure(1, 1, size=(5.6, 4.0))
    ax = axes[0, 0]
    curve = sorted(_curve(list(rows)), key=lambda n: rows[n][signal].mean)
    ax.plot([rows[n][signal].mean for n in curve], [rows[n][noise].mean for n in curve],
            color=plots.INK, marker=".", linewidth=1, label="DDPM, shrunk (lam 0 to 0.5)")
    others = [n for n in rows if n not in curve and noise in rows[n] and signal in rows[n]]
    for i, name in enumerate(others):
        row = rows[name]
        ax.errorbar(row[signal].mean, row[noise].mean, row[noise].sd, row[signal].sd, fmt="os^Dv"[
            i // len(plots.COLOURS)], color=plots.COLOURS[i % len(plots.COLOURS)], markersize=4,
            label=name)
    ax.axvline(clean, color=plots.INK, linestyle=":", linewidth=1)
    ax.set(xlabel=f"{signal} (dotted: clean data)", ylabel=noise, yscale="log")
    ax.legend(fontsize=6)
    return made
