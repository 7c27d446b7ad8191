"""Noise left against signal kept: a method is better than a shrunk DDPM only at equal signal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from robustdm.reporting import plots
from robustdm.studies.claims import Claim, Results, Spread, ratio_claim, untested

PLAIN, SHRUNK = "DDPM", "DDPM, shrunk "


def _curve(names: Iterable[str]) -> list[str]:
    """The plain and the shrunk DDPMs, by strength."""
    found = {n for n in names if n == PLAIN or n.startswith(SHRUNK)}
    return sorted(found, key=lambda n: 0.0 if n == PLAIN else float(n.removeprefix(SHRUNK)))


def at_equal_signal(
    of: Results, group: str, name: str, measure: str, signal: str = "signal"
) -> list[float] | None:
    """A measure of a DDPM that is shrunk until it keeps as much signal as an arm, per seed.

    Interpolated between the measured strengths, logarithmically in the measure; that of the plain
    DDPM for an arm that keeps even more than it. None where that cannot be: an arm keeps less
    signal than the strongest, the signal does not fall with the strength, or the measure is not
    positive.
    """
    curve = _curve(r["name"] for r in of.records if r["group"] == group)
    x, y = (np.array([of(group, n, m) for n in curve]).T for m in (signal, measure))
    found = []
    for kept, xs, ys in zip(of(group, name, signal), x, y, strict=True):
        if (np.diff(xs) >= 0).any() or (ys <= 0).any() or kept < xs[-1]:
            return None
        found.append(float(np.exp(np.interp(kept, xs[::-1], np.log(ys[::-1])))))
    return found


@dataclass(frozen=True)
class EqualSignal:
    """A comparison of an arm with a shrunk DDPM that keeps as much signal: has it less noise?

    Attributes:
        words: what ``measure`` is.
    """

    group: str
    name: str
    measure: str = "noise"
    signal: str = "signal"
    words: str = "noise left"

    def claim(self, of: Results) -> Claim:
        """What the results say."""
        text = (f"{self.group}, not in the paper: {self.words}, {self.name} / DDPM shrunk until it "
                "keeps as much signal")
        shrunk = at_equal_signal(of, self.group, self.name, self.measure, self.signal)
        if shrunk is None:
            return untested(f"{text} (cannot be compared over the strengths tried)", "")
        return ratio_claim(text, of(self.group, self.name, self.measure), shrunk)


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
    curve = _curve(rows)
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
