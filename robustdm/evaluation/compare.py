"""Several runs, each sampled in several ways, side by side: shared by attack and steps."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from robustdm.distributed import ALONE, Ranks
from robustdm.errors import UsageError
from robustdm.evaluation import measure
from robustdm.evaluation.features import cache_directory
from robustdm.method.sampling import batch_or_default
from robustdm.reporting import plots, webpage
from robustdm.reporting.images import grid_png
from robustdm.reporting.progress import sampling_progress
from robustdm.reporting.tables import table_lines, text_table
from robustdm.reporting.webpage import Picture, Section
from robustdm.runs.rundir import provenance, write_text

SHOWN = 16
METRICS = ("frechet", "precision", "recall", "deviation")


def names_of(runs: Sequence[Path]) -> list[str]:
    """The last parts of the paths, or the whole paths where those are the same."""
    short = [Path(run).name for run in runs]
    return short if len(set(short)) == len(short) else [str(run) for run in runs]


def open_runs(runs: Sequence[Path], device, ema: float | None,
              ranks: Ranks = ALONE) -> dict[str, measure.Generator]:
    """The generators of runs, by name.

    Raises:
        UsageError: if there are none, or one is no run.
        RunError: if other ranks have opened others.
    """
    if not runs:
        raise UsageError("runs is empty: name one or more run directories")
    with ranks.together():
        found = {name: measure.open_run(run, device, ema)
                 for name, run in zip(names_of(runs), runs, strict=True)}
    for name, generator in found.items():
        ranks.same_weights(f"the bits of the weights of {name}", generator.model.parameters())
    return found


class Comparison:
    """Measures of every run, sampled in every way.

    Args:
        config: of the entry point: num, batch_size, seed, precision, compile, features, weights and
            quantise are used, and all of it is written down.
        device: where to compute.
        ranks: those that share the samples; rank 0 alone measures and has something to write.

    Attributes:
        rows: row name -> {column: value}, for the screen.
        entries: what the record holds of each.
        label: name of the Frechet distance in the feature space.
    """

    def __init__(self, config, device, ranks: Ranks = ALONE):
        self.config, self.device, self.ranks = config, device, ranks
        self.rows: dict[str, dict] = {}
        self.entries: list[dict] = []
        self.pictures: dict[str, torch.Tensor] = {}
        self.identity: dict = {}
        self.label = "frechet"
        self._reference: dict[str, tuple] = {}

    def add(self, name: str, generator: measure.Generator, what: str, facts: Mapping,
            progress_text: str, **sampling) -> None:
        """Sample and measure.

        Args:
            name, generator: the run.
            what: how it is sampled, in words.
            facts: what the record and the table say of it.
            sampling: what ``evaluation.generate`` takes besides.

        Raises:
            UsageError, RunError: like ``evaluation.generate`` and ``measure``.
        """
        config, ranks = self.config, self.ranks
        if name not in self._reference:
            extractor = measure.shared_extractor(
                ranks, config.features, generator.shape, config.weights, self.device,
                config.quantise)
            clean = generator.data.clean(torch.arange(len(generator.data))) if ranks.main else None
            self._reference[name] = extractor, measure.features_of(
                extractor, clean, cache_directory(), ranks=ranks)
            self.identity = extractor.identity
            self.label = measure.label("frechet", extractor)
        extractor, reference = self._reference[name]
        batch_size = batch_or_default(config.batch_size, generator.shape)
        with sampling_progress(config.num, progress_text, ranks.main) as progress:
            features, samples = measure.extract(extractor, measure.generate(
                generator, config.num, batch_size=batch_size, seed=config.seed,
                precision=config.precision, compile=config.compile, progress=progress,
                device=self.device, ranks=ranks, **sampling),
                measure.affordable(generator.shape), ranks)
        if not ranks.main:
            return
        results = measure.measure(features, reference.features,
                                     ("frechet", "manifold", "deviation"), splits=4)
        measures = generator.data.measure(samples)
        row = {measure.label(k, extractor): float(results[k]["value"]) for k in METRICS}
        self.rows[f"{name}, {what}"] = dict(facts) | row | measures
        self.entries.append({"run": name, "what": what, **facts, "batch_size": batch_size,
                             "results": results, "measures": measures})
        self.pictures[f"{name}, {what}"] = samples[:SHOWN]
        print(f"{progress_text}: {self.label} {row[self.label]:.4g}", flush=True)

    def record(self, **more) -> dict:
        """All of it, JSON-able."""
        return {
            "config": {k: _plain(v) for k, v in asdict(self.config).items()},
            "runs": list(self._reference), "features": self.identity, "entries": self.entries,
            **more, "ranks": self.ranks.size, "provenance": provenance(),
        }

    def table(self) -> str:
        """The rows as text."""
        return text_table(self.rows)

    def lines(self, line: str, x: str, xlabel: str, log: bool = False):
        """A figure: Frechet distance and recall against ``x``, one line per run and ``line``.

        Args:
            line, x: keys of the entries; entries whose ``line`` is None belong to every line.
        """
        made, axes = plots.figure(1, 2, size=(4.6, 3.4))
        kinds = list(dict.fromkeys(e[line] for e in self.entries if e[line] is not None))
        for ax, metric in zip(axes[0], ("frechet", "recall"), strict=True):
            for colour, run in zip(plots.COLOURS, self._reference, strict=False):
                for style, kind in zip(("-", "--", ":", "-."), kinds, strict=False):
                    points = [(e[x], e["results"][metric]["value"]) for e in self.entries
                              if e["run"] == run and e[line] in (kind, None)]
                    ax.plot(*zip(*sorted(points), strict=True), style, marker="o", markersize=3,
                            color=colour, label=f"{run}, {kind}")
            ax.set(xlabel=xlabel, title=self.label if metric == "frechet" else metric,
                   xscale="log" if log else "linear")
        axes[0, 0].legend(fontsize=6)
        return made

    def write(self, name: str, title: str, note: str, figure, record: dict) -> None:
        """Write NAME.html, NAME.json and NAME.png into ``config.out``.

        Raises:
            UsageError: if that cannot be made.
        """
        out = self.config.out
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"out is {str(out)!r}: it cannot be made ({error.strerror})") from None
        plots.save(figure, out / f"{name}.png")
        made_by = json.dumps({k: record[k] for k in ("config", "provenance")}, indent=1)
        cards = [Picture(grid_png(samples), what) for what, samples in self.pictures.items()
                 if samples.ndim == 4]
        sections = [
            Section("Table", [note], table_lines(self.rows, digits=4)),
            Section("Plot", pictures=[Picture(plots.png_bytes(figure))]),
            *([Section("Samples, from the same noise", pictures=cards, columns="small")]
              if cards else []),
            Section("How it was made", code=made_by),
        ]
        write_text(out / f"{name}.html", webpage.page(title, sections))
        write_text(out / f"{name}.json", json.dumps(record, indent=1) + "\n")
        print(f"page: {out / f'{name}.html'}")


def _plain(value):
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value
