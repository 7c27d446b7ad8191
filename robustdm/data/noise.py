"""The noise of a training set, and of the set that a run was trained on."""

from __future__ import annotations

import json
from pathlib import Path

from robustdm.data import load_data
from robustdm.data.base import Data
from robustdm.errors import RobustDMError, UsageError
from robustdm.metrics.noise import ITEMS, Diagnosis, TooFewItems, diagnose
from robustdm.ops.stream import shuffled
from robustdm.runs.config import TrainConfig
from robustdm.runs.rundir import read_config

RECORD = "noise.json"


def noise_of(data: Data, seed: int = 0, count: int = ITEMS) -> Diagnosis:
    """What noise is in a training set as it is learned from.

    Args:
        seed, count: of the items that are looked at.

    Raises:
        UsageError: for a set of too few items.
    """
    try:
        return diagnose(data.batch(shuffled(seed, 0, len(data))[:count], "cpu"))
    except TooFewItems as error:
        raise UsageError(f"the noise of {data.name} cannot be measured: {error}") from None


def noise_of_run(directory: Path, data: Data | None = None) -> float:
    """Standard deviation of the noise in the data that a run was trained on, root mean square over
    their items: from its record, else by measurement, else by the corruption of its configuration.

    Args:
        data: the set, if it is loaded.

    Raises:
        UsageError: if none of them is to be had.
    """
    try:
        found = json.loads((Path(directory) / RECORD).read_text(encoding="utf-8"))
        kind, rms = found["kind"], float(found["rms"])
    except (OSError, ValueError, TypeError, KeyError):  # an older run
        config = TrainConfig.from_dict(read_config(directory), str(directory))
        try:
            measured = noise_of(load_data(config) if data is None else data, config.seed)
            kind, rms = measured.kind, measured.rms
        except RobustDMError:
            noisy = config.corrupt_kind == "gaussian" and config.data not in ("plane", "gaussians")
            if noisy and config.corrupt_fraction:
                return config.corrupt_fraction**0.5 * config.corrupt_sigma
            raise
    if kind == "unknown":
        raise UsageError(f"the noise of the data of {directory} is not known: points vary in all "
                         "directions; give its standard deviation as --baseline-strength")
    return rms
