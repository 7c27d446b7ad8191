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

MEANING = {
    "clean": "no noise was found",
    "gaussian": "white Gaussian noise on all items",
    "mixture": "white Gaussian noise on some of the items",
    "coloured": "noise that is correlated between neighbouring pixels",
    "other": "white noise that is not Gaussian: large errors are too frequent",
    "salt_pepper": "black and white pixels: salt and pepper",
    "jpeg": "blocks of 8x8 pixels: JPEG",
    "outliers": "items that stand far from all others",
    "constant": "items that do not vary",
    "unknown": "points vary in all directions: noise and signal cannot be told apart",
}
ADVICE = {
    "clean": ("ddpm", None, "clean data need no robust training, which costs quality"),
    "gaussian": ("ddpm", "known", "a plain DDPM and one corrected last step remove white noise of "
                 "known strength, and cost no training"),
    "mixture": ("ddpm", "known", "a plain DDPM and one corrected last step remove white noise of "
                "known strength, and cost no training"),
    "coloured": ("ddpm", "shrink", "the exact correction takes white noise; shrinkage assumes "
                 "nothing, and costs some contrast"),
    "other": ("ddpm", "shrink", "the exact correction takes Gaussian noise; shrinkage assumes "
              "nothing, and costs some contrast"),
    "salt_pepper": ("ddpm", None, "a median filter removes such pixels before training"),
    "jpeg": ("ddpm", "shrink", "the exact correction takes white noise; shrinkage assumes nothing, "
             "and costs some contrast"),
    "outliers": ("ddpm", None, "remove the items listed first: no objective here ignores them"),
    "constant": (None, None, "there is nothing to learn"),
    "unknown": ("robust_adv", None, "nothing can be corrected whose strength is not known"),
}
"""kind -> objective to train, baseline to sample with, and why."""


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
