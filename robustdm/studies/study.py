"""A study: arms, comparisons among them, and the page that follows from both."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence

import torch
from matplotlib.figure import Figure

from robustdm.reporting import plots, webpage
from robustdm.reporting.images import grid_png
from robustdm.reporting.tables import Rows, table_lines, text_table
from robustdm.reporting.webpage import Picture, Section
from robustdm.runs.rundir import provenance, write_text
from robustdm.studies.claims import Claim, Ratio, Results, Spread, spread
from robustdm.studies.runner import Arm, load_samples, write_results
from robustdm.studies.scales import Scale
from robustdm.studies.tradeoff import EqualSignal

Figures = dict[str, tuple[Figure | bytes, str]]


class Study:
    """One entry of ``python -m robustdm.reproduce``; a subclass says what is its own.

    Attributes:
        title: what is reproduced or measured.
        scale: how large the runs are.
        differs: what is not as in the paper, a sentence each; by default the scale's.
        grid: arguments of ``Scale.arms``, a tuple each: what is trained and sampled.
        comparisons: of the arms, each with a method ``claim``.
        columns: measures that the tables show.
        references: whether the data themselves stand beside the arms.
        contrast: of a sheet of the arms' samples, if they are images; 0 draws none.
        paper: heading -> rows, the paper's own numbers.
        notes: how to read the page, a sentence each.
        commands: besides the one that runs, commands that are part of it.
    """

    title: str
    grid: Sequence[tuple] = ()
    comparisons: Sequence[Ratio | EqualSignal] = ()
    columns: Sequence[str] = ()
    differs: Sequence[str] | None = None
    references = False
    contrast = 0.0
    paper: Mapping[str, Rows] = {}
    notes: Sequence[str] = ()
    commands: Sequence[str] = ()

    def __init__(self, scale: Scale):
        self.scale = scale
        self.columns = self.columns or [
            "frechet", scale.noise, "signal", *scale.signal[-1:], "precision", "recall", "coverage",
            "inception_score"]
        if self.differs is None:
            self.differs = scale.differs

    def arms(self) -> list[Arm]:
        """Those of the grid, in the order of the tables' rows."""
        return [arm for part in self.grid for arm in self.scale.arms(*part)]

    def probe(self, arm: Arm) -> dict[str, float]:
        """Further measures of a finished arm."""
        return {}

    def compare(self, of: Results) -> list[Claim]:
        """The claims: those of the comparisons, and what a subclass adds."""
        return [comparison.claim(of) for comparison in self.comparisons]

    def records(self) -> list[dict]:
        """What was measured: of every arm, and of the data if they stand beside them."""
        arms = self.arms()
        records = self.scale.run(arms)
        for arm, record in zip(arms, records, strict=True):
            record["measures"] |= self.probe(arm)
        return records + (self.scale.references(arms) if self.references else [])

    def tables(self, of: Results) -> Mapping[str, Rows]:
        """Heading -> rows; by default one table per group."""
        return of.tables(self.columns)

    def read(self, of: Results) -> Sequence[str]:
        """The notes, if they depend on the results."""
        return self.notes

    def figures(self, of: Results) -> Figures:
        """Name -> figure or PNG, and its caption."""
        if not self.contrast or not self.scale.is_image:
            return {}
        shown = [arm for arm in self.arms() if arm.config.seed == 0]
        sheet = torch.cat([load_samples(arm, self.scale.out)[:16] for arm in shown])
        caption = "Rows: " + "; ".join(f"{arm.group}, {arm.name}" for arm in shown)
        return {"samples": (grid_png(self.contrast * sheet, 16), caption)}

    def run(self) -> list[Claim]:
        """Train, measure and judge; print the tables and write the page."""
        return self.write(self.records())

    def write(self, records: list[dict]) -> list[Claim]:
        """Write page.html, table.md, results.json and the figures of what was measured."""
        of, out = Results(records, self.scale.noise), self.scale.out
        out.mkdir(parents=True, exist_ok=True)
        title = f"{self.title} ({self.scale.name})"
        claims, notes = self.compare(of), self.read(of)
        verdicts = [["claim", "here (mean ± sd over seeds)", "holds if", "paper", "verdict"]]
        for c in claims:
            found = f"{c.value:.3g}" if isinstance(c.value, float) else str(c.value or "-")
            verdicts.append([c.text, found, c.target or "-", c.paper or "-", c.verdict])
        sections = [Section("Verdicts", table=verdicts, plain=True)] if claims else []
        if self.differs:
            sections.append(Section("What is not as in the paper", self.differs))
        text = [f"# {title}", *(f"- {line}" for line in self.differs)]
        for heading, rows in {**self.paper, **self.tables(of)}.items():
            sections.append(Section(heading, table=table_lines(rows)))
            text += [f"## {heading}", text_table(rows, markdown=True)]
            print(f"{heading}\n{text_table(rows)}\n")
        if notes:
            sections.append(Section("How to read it", notes))
        pictures = []
        for name, (made, caption) in self.figures(of).items():
            png = made if isinstance(made, bytes) else plots.png_bytes(made)
            (out / f"{name}.png").write_bytes(png)
            pictures.append(Picture(png, caption, name))
        if pictures:
            sections.append(Section("Figures", pictures=pictures))
        command = f"python -m robustdm.reproduce {' '.join(sys.argv[1:])}".rstrip()
        made_with = [[key, value] for key, value in provenance().items()
                     if not isinstance(value, dict | list)]
        sections += [Section("Commands", code="\n".join([command, *self.commands])),
                     Section("Made with", table=made_with, head=False, plain=True)]
        write_text(out / "page.html", webpage.page(title, sections))
        write_results(out, [*text, *notes], claims, records)
        return claims


@dataclasses.dataclass(frozen=True)
class Line:
    """Of a figure: arms (group, name) of a measure against ``x``, a value each."""

    label: str
    x: Sequence[float]
    arms: Sequence[tuple[str, str]]
    colour: str | None = None
    style: str | tuple = "-"


def line_figure(of: Results, measures: Sequence[str], lines: Sequence[Line], xlabel: str,
                xscale: str = "linear") -> Figure:
    """A panel per measure, with mean and standard deviation over the seeds."""
    made, axes = plots.figure(1, len(measures), size=(4.8, 3.6))
    for ax, measure in zip(axes[0], measures, strict=True):
        for line in lines:
            found = [spread(of(*arm, measure)) for arm in line.arms]
            ax.errorbar(line.x, [v.mean for v in found], [v.sd for v in found], color=line.colour,
                        linestyle=line.style, marker="o", markersize=3, label=line.label)
        ax.set(xlabel=xlabel, title=measure, xscale=xscale)
    axes[0, 0].legend(fontsize=6)
    return made


def bar_figure(of: Results, measures: Sequence[str]) -> Figure:
    """A panel per measure with a bar per arm, the groups side by side."""
    made, axes = plots.figure(1, len(measures), size=(5.4, 3.4))
    for ax, measure in zip(axes[0], measures, strict=True):
        tables = of.tables([measure])
        names = list(dict.fromkeys(name for rows in tables.values() for name in rows))
        width = 0.8 / len(tables)
        for i, (group, rows) in enumerate(tables.items()):
            found = [rows.get(name, {}).get(measure, Spread(0, 0)) for name in names]
            ax.bar([k + i * width for k in range(len(names))], [v.mean for v in found], width,
                   yerr=[v.sd for v in found], label=group, color=plots.COLOURS[i])
        ax.set_xticks([k + width / 2 for k in range(len(names))], names, rotation=40, ha="right",
                      fontsize=6)
        ax.set(title=measure, yscale="log" if measure == "rho" else "linear")
        ax.legend(fontsize=6)
    return made
