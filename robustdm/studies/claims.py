"""Claims and verdicts: judged by the interval that the seeds give, not by their mean."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
EFFECT = 0.05
"""A ratio that differs from 1 by less is no effect, however sure it is."""


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation (divisor n - 1) over seeds."""

    mean: float
    sd: float

    def __str__(self) -> str:
        if not self.sd:
            return f"{self.mean:.0f}" if float(self.mean).is_integer() else f"{self.mean:.3g}"
        return f"{self.mean:.3g} ±{self.sd:.2g}"


def spread(values: Sequence[float]) -> Spread:
    """Of a value per seed."""
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0)


@dataclass(frozen=True)
class Claim:
    """A number that a study is held to, or a claim of the paper.

    Attributes:
        text: what is compared.
        value: what was found: a number, its spread over seeds, or words; None if not tested.
        target: what it should be.
        holds: whether it is; None if that is undecided or was not tested.
        paper: the paper's own number; with one, the verdict speaks of reproduction.
        tested: whether this scale can tell at all.
    """

    text: str
    value: float | Spread | str | None
    target: str
    holds: bool | None
    paper: str = ""
    tested: bool = True

    @property
    def verdict(self) -> str:
        """In words."""
        if not self.tested:
            return "not tested at this scale"
        if self.holds is None:
            return "undecided"
        if self.paper:
            return "reproduced" if self.holds else "NOT reproduced"
        return "holds" if self.holds else "FAILS"

    def __str__(self) -> str:
        value = f"{self.value:.3g}" if isinstance(self.value, float) else self.value
        found = "" if self.value is None else f": {value}"
        paper = f"; paper: {self.paper}" if self.paper else ""
        limits = f"({self.target}{paper})" if self.tested else f"(paper: {self.paper or '-'})"
        return f"{self.verdict}: {self.text}{found} {limits}"


def untested(text: str, paper: str) -> Claim:
    """A claim that this scale says nothing about."""
    return Claim(text, None, "", None, paper, tested=False)


def interval(values: Sequence[float], ratio: bool = False) -> tuple[float, float]:
    """Student's interval of confidence ``CONFIDENCE`` for the mean over seeds.

    Args:
        values: positive, if they are ratios.
        ratio: that of the logarithms, so that a ratio and its inverse are judged alike.

    One seed says nothing: the interval is then unbounded.
    """
    from scipy.stats import t

    x = np.asarray(values, dtype=float)
    if len(x) < 2:
        return (0.0 if ratio else -np.inf), np.inf
    x = np.log(x) if ratio else x
    half = t.ppf(0.5 + CONFIDENCE / 2, len(x) - 1) * x.std(ddof=1) / len(x) ** 0.5
    low, high = x.mean() - half, x.mean() + half
    return (float(np.exp(low)), float(np.exp(high))) if ratio else (float(low), float(high))


def judge(
    text: str, values: Sequence[float], at_most: float | None = None,
    at_least: float | None = None, paper: str = "", ratio: bool = False,
) -> Claim:
    """A claim on a measure: it holds if the interval over seeds lies within the limits, fails if it
    lies outside, and is undecided if it contains one.

    Args:
        values: one per seed.
        at_most, at_least: the limits, one or both.
        paper: the paper's value.
        ratio: see ``interval``.
    """
    low, high = interval(values, ratio)
    lower = -np.inf if at_least is None else at_least
    upper = np.inf if at_most is None else at_most
    if lower <= low and high <= upper:
        holds = True
    elif high < lower or low > upper:
        holds = False
    else:
        holds = None
    if at_least is None:
        target = f"at most {at_most:g}"
    elif at_most is None:
        target = f"at least {at_least:g}"
    else:
        target = f"{at_least:g} to {at_most:g}"
    within = f"95 % in {low:.3g} to {high:.3g}" if len(values) > 1 else "one seed gives no verdict"
    return Claim(text, f"{spread(values)}; {within}", target, holds, paper)


def ratio_claim(
    text: str, above: Sequence[float], below: Sequence[float], at_most: float | None = None,
    at_least: float | None = None, paper: str = "",
) -> Claim:
    """A claim on the ratio of two measures, a value per seed; see ``judge``.

    Without limits: smaller by ``EFFECT`` at least. Not tested where a measure is not positive, such
    as the noise of samples that are smoother than clean ones.
    """
    if min(*above, *below) <= 0:
        return untested(f"{text} (a measure is not positive)", paper)
    if at_most is None and at_least is None:
        at_most = 1 - EFFECT
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    return judge(text, ratios, at_most, at_least, paper, ratio=True)


class Results:
    """Records of arms, looked up by group, name and measure.

    Args:
        records: each with group, name, seed and measures.
        noise: measure that is meant by "noise".
    """

    def __init__(self, records: Sequence[dict], noise: str = "noise"):
        self.records, self.noise = list(records), noise

    def __call__(self, group: str, name: str, measure: str) -> list[float]:
        """One arm's measure, a value per seed in rising order."""
        measure = self.noise if measure == "noise" else measure
        found = [r for r in self.records if (r["group"], r["name"]) == (group, name)]
        return [r["measures"][measure] for r in sorted(found, key=lambda r: r["seed"])]

    def rows(self, group: str, columns: Sequence[str]) -> dict[str, dict[str, Spread]]:
        """Rows of a table: arm name -> {measure: spread over its seeds}."""
        rows: dict[str, dict[str, Spread]] = {}
        for name in dict.fromkeys(r["name"] for r in self.records if r["group"] == group):
            mine = [r for r in self.records if (r["group"], r["name"]) == (group, name)]
            rows[name] = {}
            for column in columns:
                values = [r["measures"].get(column, r.get(column)) for r in mine]
                values = [v for v in values if v is not None]
                if values:
                    rows[name][column] = spread(values)
        return rows

    def tables(self, columns: Sequence[str]) -> dict[str, dict[str, dict[str, Spread]]]:
        """A table per group."""
        return {group: self.rows(group, columns)
                for group in dict.fromkeys(record["group"] for record in self.records)}


@dataclass(frozen=True)
class Ratio:
    """A comparison of a measure of two arms: the claim on the ratio; see ``ratio_claim``.

    Attributes:
        text: what is compared; the names of the arms fill its braces.
        paper: the paper's own number.
    """

    text: str
    group: str
    above: str
    below: str
    measure: str
    paper: str = ""
    at_most: float | None = None
    at_least: float | None = None

    def claim(self, of: Results) -> Claim:
        """What the results say."""
        return ratio_claim(
            self.text.format(self.above, self.below), of(self.group, self.above, self.measure),
            of(self.group, self.below, self.measure), self.at_most, self.at_least, self.paper)
