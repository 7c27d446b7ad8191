"""What a run directory holds, read so that a missing or damaged file costs only itself.

Nothing here needs torch, so a report can be made of a run on any machine, while it goes on.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from robustdm.errors import UsageError
from robustdm.runs import rundir
from robustdm.runs.config import TrainConfig
from robustdm.untrusted import open_npz


@dataclass
class Run:
    """What could be read of a run directory; ``notes`` says in words what could not."""

    path: Path
    config: TrainConfig
    config_found: bool
    provenance: dict
    rows: list[dict]
    summary: dict
    previews: list[tuple[int, np.ndarray]]
    samples: np.ndarray | None
    reference: dict[str, np.ndarray]
    notes: list[str] = field(default_factory=list)

    @property
    def step(self) -> int:
        """Steps done, as far as the files know."""
        step = self.summary.get("step")
        if rundir.is_step(step):
            return step
        return self.rows[-1]["step"] if self.rows else 0

    @property
    def finished(self) -> bool:
        """Whether every step that was asked for is done."""
        return self.config_found and self.step >= self.config.steps

    @property
    def measures(self) -> dict[str, dict[str, float]]:
        """Measure -> {"samples": ..., "training data": ..., "clean data": ...}."""
        measures: dict[str, dict[str, float]] = {}
        for place, values in _mapping(self.summary.get("measures")).items():
            for name, value in _mapping(values).items():
                measures.setdefault(name, {})[place] = value
        return measures

    def last(self, key: str) -> float | None:
        """Newest value of a metric, or None."""
        return next((row[key] for row in reversed(self.rows) if is_number(row.get(key))), None)


def read_run(run_dir: Path) -> Run:
    """Read what a run directory holds; what is missing or damaged is left out with a note.

    Raises:
        UsageError: if run_dir is no directory of a run.
    """
    if not run_dir.is_dir():
        raise UsageError(f"{run_dir} is not a directory: name the directory of a run (its --out)")
    if not any((run_dir / name).exists() for name in ("config.yaml", "run.json", "metrics.jsonl")):
        raise UsageError(
            f"{run_dir} holds no run (no config.yaml, run.json or metrics.jsonl): name the "
            "directory given to training as --out"
        )
    notes: list[str] = []
    config = _read_config(run_dir, notes)
    previews = []
    for file in sorted(run_dir.glob("samples/step-*.npz")):
        match = re.fullmatch(r"step-(\d+)\.npz", file.name)
        arrays = _read_npz(file, notes) if match else {}
        if "samples" in arrays:
            previews.append((int(match[1]), arrays["samples"]))
    return Run(
        path=run_dir,
        config=config or TrainConfig(),
        config_found=config is not None,
        provenance=_read_json(run_dir / "run.json", notes),
        rows=read_metrics(run_dir / "metrics.jsonl", notes),
        summary=_read_json(run_dir / "summary.json", notes),
        previews=previews,
        samples=_read_npz(run_dir / "samples/final.npz", notes).get("samples"),
        reference=_read_npz(run_dir / "samples/reference.npz", notes),
        notes=notes,
    )


def read_metrics(path: Path, notes: list[str]) -> list[dict]:
    """The lines of metrics.jsonl in the order of their steps; a repeated step keeps the newest."""
    if not path.exists():
        return []
    rows: dict[int, dict] = {}
    lines = rundir.read_metrics(path)
    for line in lines:
        if rundir.is_step(line.get("step")):
            rows.setdefault(line["step"], {}).update(line)
    torn = sum(1 for line in path.read_bytes().splitlines() if line.strip()) - len(lines)
    if torn > 0:
        notes.append(f"{torn} unreadable line(s) of metrics.jsonl are left out.")
    return [rows[step] for step in sorted(rows)]


def _read_config(path: Path, notes: list[str]) -> TrainConfig | None:
    try:
        return TrainConfig.from_dict(rundir.read_config(path), "config.yaml")
    except (UsageError, TypeError, ValueError) as error:
        notes.append(f"The configuration is not known: {error}")
        return None


def _read_json(path: Path, notes: list[str]) -> dict:
    if not path.exists():
        return {}
    try:
        values = rundir.parse_json(path.read_bytes())
        if not isinstance(values, dict):
            raise ValueError("not an object")
        return values
    except (OSError, ValueError) as error:
        notes.append(f"{path.name} cannot be read ({type(error).__name__}).")
        return {}


def _read_npz(path: Path, notes: list[str]) -> dict[str, np.ndarray]:
    if not path.exists():
        return {}
    try:
        with open_npz(path) as file:
            return {name: file[name] for name in file.files}
    except Exception as error:  # numpy and zipfile raise a dozen kinds for a damaged file
        notes.append(f"samples/{path.name} cannot be read ({type(error).__name__}).")
        return {}


def _mapping(value) -> dict:
    return value if isinstance(value, dict) else {}


def column(rows: list[dict], key: str) -> np.ndarray:
    """One metric of all rows, NaN where it is missing: (N,) float64."""
    return to_array(row.get(key) for row in rows)


def to_array(values: Iterable) -> np.ndarray:
    """Numbers as float64, anything else as NaN."""
    return np.array([value if is_number(value) else math.nan for value in values], dtype=float)


def is_number(value) -> bool:
    """Whether a value read from JSON is a number (true and false are not)."""
    return isinstance(value, int | float) and not isinstance(value, bool)
