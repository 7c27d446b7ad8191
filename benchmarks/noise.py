"""``python benchmarks/noise.py CIFAR [--data cifar10]``: how well the noise of a set is measured.

A clean set is corrupted with white noise of known strength, and diagnosed blind.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

# The checkout's own package, whatever is installed.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import tyro

from robustdm.cli import guard
from robustdm.data.corruption import Corruption
from robustdm.data.digits import DigitsData
from robustdm.data.images import image_set
from robustdm.metrics.noise import diagnose
from robustdm.ops.stream import shuffled
from robustdm.reporting.tables import text_table


@dataclass(frozen=True)
class NoiseConfig:
    """Which clean set, and which noise."""

    path: tyro.conf.Positional[Path]
    """A clean set: a folder, zip, .npy, .npz or CIFAR; "digits" for scikit-learn's."""
    data: Literal["images", "cifar10", "cifar100"] = "images"
    """What it is."""
    resolution: int | None = None
    """Side of the images in pixels; by default that of most of them."""
    items: int = 10_000
    """Items that are looked at."""
    sigmas: tuple[float, ...] = (0.0, 0.05, 0.1, 0.2)
    """Standard deviations of the noise; images are in [-1, 1]."""
    shares: tuple[float, ...] = (1.0, 0.9, 0.5)
    """Shares of the items that carry it."""
    seed: int = 0
    """Of the items and of the noise."""
    clip: bool = False
    """Round to 8 bits after the noise, as picture files do."""
    out: Path | None = None
    """Write the record, JSON, to this file."""


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print a table, write the record."""
    config = tyro.cli(NoiseConfig, args=argv, prog="python benchmarks/noise.py")
    if str(config.path) == "digits":
        data = DigitsData(None, holdout=0.0, seed=0)
    else:
        _, data, _ = image_set({"data": config.data, "data_dir": config.path,
                                "resolution": config.resolution, "corrupt_fraction": 0.0})
    order = shuffled(config.seed, 0, len(data))[: config.items]
    clean = torch.cat([data.clean(part) for part in order.split(256)])
    rows = {}
    for sigma in config.sigmas:
        for share in config.shares if sigma else (0.0,):
            rows[f"sigma {sigma:g}, share {share:g}"] = measure(clean, sigma, share, config)
    print(f"{data.name}, {len(clean)} items of {tuple(clean.shape[1:])}\n")
    print(text_table(rows))
    if config.out is not None:
        record = {"data": data.name, "shape": list(clean.shape), "seed": config.seed,
                  "clip": config.clip, "rows": rows}
        config.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def measure(clean, sigma: float, share: float, config: NoiseConfig) -> dict:
    """One row: what was found beside what is true."""
    corruption = Corruption(share, sigma, config.seed)
    items = torch.arange(len(clean))
    noisy = corruption.chosen(items) if corruption else torch.zeros(len(clean), dtype=torch.bool)
    x = corruption(clean, items)
    if config.clip:
        x = x.clamp(-1, 1).add(1).mul(127.5).round().div(127.5).sub(1)
    begin = time.perf_counter()
    found = diagnose(x)
    seconds = time.perf_counter() - begin
    true = noisy.double().mean().item() ** 0.5 * sigma
    row = {"kind": found.kind, "rms": found.rms, "rms / true": found.rms / true if true else None,
           "sigma": found.sigma, "share": found.share,
           "true share": noisy.double().mean().item()}
    if 0 < share < 1:
        flagged = found.flagged
        row |= {"noisy found": flagged[noisy].double().mean().item(),
                "clean found": (~flagged[~noisy]).double().mean().item()}
        row["balanced"] = (row["noisy found"] + row["clean found"]) / 2
    return row | {"s": seconds}


if __name__ == "__main__":
    guard(main)
