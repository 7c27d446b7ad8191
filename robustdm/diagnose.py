"""Entry point: `python -m robustdm.diagnose DATA` says what noise is in a data set, and what to do.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from robustdm.cli import guard
from robustdm.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from robustdm.metrics.noise import Diagnosis

# Images that are looked at: half a gigabyte of 32x32 in colour.
_NUMBERS = 50_000 * 3 * 32 * 32
_SHOWN = 32


@dataclass(frozen=True)
class DiagnoseConfig:
    """Which data, and where to write what was found."""

    path: tyro.conf.Positional[Path]
    """A folder, zip, lmdb, .npy, .npz, CIFAR archive, or hf:NAME[:SPLIT]; an .npz of samples."""
    data: Literal["images", "cifar10", "cifar100"] = "images"
    """What it is; images finds out, except for CIFAR in folders."""
    resolution: int | None = None
    """Side of the images in pixels; by default that of most of them, at most 256. Noise that is
    resized is weaker, and no longer white."""
    crop: int = 0
    """Side of the square cut out of the middle of every picture before it is resized."""
    channels: Literal[1, 3, 4] | None = None
    """Channels of the images; by default what the files have."""
    value_range: tuple[float, float] | None = None
    """.npy, .npz: the two values that become -1 and 1; what lies beyond them is kept."""
    seed: int = 0
    """Decides which items are looked at, where there are too many for all."""
    out: Path | None = None
    """Folder for diagnosis.json, diagnosis.html, and flagged.txt, the names of the items that carry
    noise or stand apart."""
    json: bool = False
    """Print one JSON object instead of the screen."""


def main(argv: Sequence[str] | None = None) -> None:
    """Parse flags, look, print.

    Raises:
        UsageError: for a wrong flag, or data that cannot be read or are too few.
        RunError: if reading fails.
    """
    run(tyro.cli(
        DiagnoseConfig, args=argv, prog="python -m robustdm.diagnose",
        description="What noise is in a data set, and the cheapest method that removes it.",
    ))


def run(config: DiagnoseConfig) -> dict:
    """Diagnose a data set; print, and write the page if ``out`` is given.

    Returns:
        What ``--json`` prints.

    Raises:
        UsageError: for data that cannot be read or are too few.
        RunError: if reading fails.
    """
    from robustdm.metrics.noise import TooFewItems, diagnose

    items, names, total, flags = _read(config)
    if not bool(items.isfinite().all()):
        bad = names[int((~items.isfinite()).flatten(1).any(1).nonzero()[0])]
        raise UsageError(f"path is {str(config.path)!r}: {bad} holds NaN or infinity; the run that "
                         "made it has diverged")
    try:
        found = diagnose(items)
    except TooFewItems as error:
        raise UsageError(f"path is {str(config.path)!r}: {error}") from None
    record = report(found, total, flags)
    if config.out is not None:
        _write(config.out, record, found, items, names)
    print(json.dumps(record) if config.json else screen(record, config.out))
    return record


def report(found: Diagnosis, total: int, flags: str | None) -> dict:
    """A diagnosis as a JSON-able record, with what to do.

    Args:
        total: items of the set.
        flags: that name it to ``robustdm.train``; None for samples, which are not trained on.
    """
    from robustdm.data.noise import ADVICE, MEANING

    objective, baseline, why = ADVICE[found.kind]
    commands = []
    if objective is not None and flags is not None:
        commands.append(f"python -m robustdm.train --preset folder {flags} "
                        f"--objective {objective} --out RUN")
    if baseline is not None:
        commands.append(f"python -m robustdm.sample --run RUN --baseline {baseline}")
    return found.record() | {
        "of": total, "meaning": MEANING[found.kind],
        "objective": objective, "baseline": baseline, "recommended": " && ".join(commands),
        "why": why,
    }


def screen(record: dict, out: Path | None = None) -> str:
    """The record in words."""
    of = "" if record["of"] == record["items"] else f" of {record['of']}, drawn at random"
    lines = [f"{record['items']} items{of}: {record['meaning']}", ""]
    if record["kind"] not in ("constant", "unknown"):
        lines += [
            f"  noise          sd {record['sigma']:.3f} on {record['share']:.0%} of the items, "
            f"{record['rms']:.3f} root mean square over all",
            f"  neighbours     correlation {record['correlation']:.2f} between pixels, "
            f"{record['channel_correlation']:.2f} between channels (0 is white)",
            f"  tails          excess kurtosis {record['kurtosis']:.2f} (0 is Gaussian)",
            f"  single pixels  {record['impulses']:.2%} black or white against their surroundings",
            f"  blocks         steps at borders of 8x8 {record['blocking']:.2f} times the others",
            f"  apart          {record['isolated']:.1%} of the items",
        ]
    else:
        lines.append(f"  smallest sd in any direction: {record['rms']:.3g}")
    lines += ["", f"{record['why']}:" if record["recommended"] else record["why"]]
    lines += [f"  {command}" for command in record["recommended"].split(" && ") if command]
    if out is not None:
        lines += ["", f"page: {out / 'diagnosis.html'}"]
    return "\n".join(lines)


def _read(config: DiagnoseConfig) -> tuple[Tensor, list[str], int, str | None]:
    """Items in random order, their names, how many there are in all, and the flags of `report`."""
    import torch

    from robustdm.data.images import image_set
    from robustdm.data.read import written_samples
    from robustdm.ops.stream import shuffled

    samples = written_samples(config.path)
    if samples is not None:
        order = shuffled(config.seed, 0, len(samples))
        order = order[: max(2, _NUMBERS // samples[0].numel())]
        return samples[order], [f"item {k}" for k in order.tolist()], len(samples), None
    fields = {name: getattr(config, name)
              for name in ("data", "resolution", "crop", "channels", "value_range", "seed")}
    _, data, _ = image_set(fields | {"data_dir": config.path, "corrupt_fraction": 0.0})
    order = shuffled(config.seed, 0, len(data))
    order = order[: max(2, _NUMBERS // max(1, torch.Size(data.shape).numel()))]
    flags = {"data": "" if config.data == "images" else config.data, "data-dir": config.path,
             "resolution": data.shape[-1], "crop": config.crop, "channels": config.channels or "",
             "value-range": "{:g} {:g}".format(*config.value_range) if config.value_range else ""}
    words = " ".join(f"--{name} {value if name == 'value-range' else shlex.quote(str(value))}"
                     for name, value in flags.items() if value)
    items = torch.cat([data.clean(part) for part in order.split(256)])
    return items, data.names(order), len(data), words


def _write(out: Path, record: dict, found: Diagnosis, items: Tensor,
           names: list[str] | None) -> None:
    from robustdm.runs.rundir import write_text

    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"out is {str(out)!r}: it cannot be made ({error.strerror})") from None
    write_text(out / "diagnosis.json", json.dumps(record, indent=1) + "\n")
    flagged = [names[k] for k in found.flagged.nonzero().flatten().tolist()]
    write_text(out / "flagged.txt", "".join(f"{name}\n" for name in flagged))
    write_text(out / "diagnosis.html", page(record, found, items))


def page(record: dict, found: Diagnosis, items: Tensor) -> str:
    """A page: the record, the noisiest and the cleanest items, and how the noise is spread."""
    from robustdm.reporting import plots, webpage
    from robustdm.reporting.images import grid_png

    sections = [webpage.Section("Found", code=screen(record))]
    if len(found.levels):
        order = found.levels.argsort(descending=True)
        if items.ndim == 4:
            sections.append(webpage.Section("Items", columns="wide", pictures=[
                webpage.Picture(grid_png(items[chosen].clamp(-1, 1)), caption)
                for caption, chosen in (("noisiest items", order[:_SHOWN]),
                                        ("cleanest items", order.flip(0)[:_SHOWN]))]))
        made, axes = plots.figure(1, 1, size=(5.0, 3.0))
        axes[0, 0].hist(found.levels.numpy(), bins=60, color=plots.COLOURS[0])
        axes[0, 0].axvline(record["sigma"], color=plots.INK, linestyle=":")
        axes[0, 0].set(xlabel="noise of an item, standard deviation", ylabel="items")
        sections.append(webpage.Section(
            "Spread", pictures=[webpage.Picture(plots.png_bytes(made), "noise of the items")],
            notes=["The noise of a single item is rough: texture counts as noise. The dotted line "
                   "is the noise of those that carry it, measured over the set."]))
    return webpage.page(f"Noise in {record['of']} items", sections)


if __name__ == "__main__":
    guard(main)
