"""Entry point: `python -m robustdm.memorise` asks how near samples are to single training images.

Similarity alone proves nothing: smoothing moves it too. So two controls stand beside it: images
that were never trained on, and training images that were blurred.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from robustdm.cli import guard
from robustdm.errors import UsageError
from robustdm.flags import DrawFlags, ExtractorFlags, parse_flags

PAIRS = 16


@dataclass(frozen=True)
class MemoriseConfig(DrawFlags, ExtractorFlags):
    """Whose samples to compare with which training images."""

    run: Path | None = None
    """Run directory: samples are made, and compared with its own clean training images."""
    samples: Path | None = None
    """Samples that are there: a folder, zip, .npy or .npz; needs --train."""
    train: Path | None = None
    """Training images: a folder, zip, .npy, .npz or a copy of CIFAR-10."""
    heldout: Path | None = None
    """Images of the same kind that were not trained on; the run's held-out part if not given."""
    value_range: tuple[float, float] | None = None
    """samples, train and heldout as .npy or .npz: the two values that become -1
    and 1; what lies beyond them is kept."""
    blur: float = 0.5
    """Standard deviation in pixels of the blur of the second control."""
    num: int = 1000
    """Samples to make, or at most to read."""
    sampler: Literal["ddpm", "ddim"] = "ddpm"
    """ddpm is ancestral sampling."""
    steps: int | None = None
    """Timesteps to visit; all if not given."""
    checkpoint: int | None = None
    """Step of the checkpoint to use."""
    out: Path | None = None
    """Folder for memorise.json and memorise.html; RUN/memorise, or runs/memorise."""


def main(argv: Sequence[str] | None = None) -> None:
    """Parse flags, compare, write.

    Raises:
        UsageError: for a wrong flag, source or training set.
        RunError: if sampling fails or weights are out of reach.
    """
    memorise(parse_flags(
        MemoriseConfig, argv, prog="python -m robustdm.memorise",
        description="How near are samples to single training images?",
    ))


def memorise(config: MemoriseConfig) -> dict:
    """Nearest training image of every sample and of the controls; prints, writes, returns.

    Returns:
        What memorise.json holds.

    Raises:
        UsageError: for a wrong source or setting.
        RunError: if sampling fails or weights are out of reach.
    """
    import torch

    from robustdm.data.read import read_images
    from robustdm.device import resolve_device
    from robustdm.evaluation import measure
    from robustdm.evaluation.features import cache_directory, load_extractor
    from robustdm.method.baselines import blur
    from robustdm.method.sampling import batch_or_default
    from robustdm.metrics import nearest, nearness
    from robustdm.reporting.progress import sampling_progress
    from robustdm.reporting.tables import text_table
    from robustdm.runs.rundir import provenance

    if (config.run is None) == (config.samples is None):
        raise UsageError("give one of --run and --samples")
    if config.num < 1:
        raise UsageError(f"num is {config.num}: it must be at least 1")
    if not 0 < config.blur < 100:
        raise UsageError(f"blur is {config.blur}: it must be positive, in pixels")
    out = config.out or (Path("runs") if config.run is None else config.run) / "memorise"
    measure.check_out(out)
    device = resolve_device(config.device)
    generator = heldout = None
    if config.run is not None:
        generator = measure.open_run(config.run, device, config.ema, config.checkpoint)
        if not generator.is_image:
            raise UsageError(f"run is {str(config.run)!r}: it was trained on points; memorisation "
                             "is measured on images")
        data = generator.data
        train = data.clean(torch.arange(len(data)))
        if data.heldout is not None:
            heldout = data.heldout.clean(torch.arange(len(data.heldout)))
    if config.train is not None:
        train = read_images(config.train, "train", config.value_range)
    elif generator is None:
        raise UsageError("train is not given: name the images that were trained on")
    if config.heldout is not None:
        heldout = read_images(config.heldout, "heldout", config.value_range)
    samples = None
    if config.samples is not None:
        samples = read_images(config.samples, "samples", config.value_range)
    shape = tuple(train.shape[1:])
    for name, images in (("samples", samples), ("heldout", heldout)):
        if images is not None and tuple(images.shape[1:]) != shape:
            raise UsageError(f"{name} has shape {tuple(images.shape[1:])}, the training images "
                             f"{shape}: bring them to one size first")
    extractor = load_extractor(config.features, shape, config.weights, device)
    cache = cache_directory()
    reference = measure.features_of(extractor, train, cache).features
    if generator is not None:
        config = replace(config, batch_size=batch_or_default(config.batch_size, shape))
        with sampling_progress(config.num) as progress:
            features, samples = measure.extract(extractor, measure.generate(
                generator, config.num, batch_size=config.batch_size, seed=config.seed,
                device=device, progress=progress, sampler=config.sampler, steps=config.steps))
        features = features.features
    else:
        samples = samples[: config.num]
        features = measure.features_of(extractor, samples, cache).features
    found = {"samples": nearest(features, reference)}
    if heldout is not None:
        found["held-out images"] = nearest(
            measure.features_of(extractor, heldout, cache).features, reference)
    blurred = blur(train[: config.num], config.blur)
    found["blurred training images"] = nearest(
        measure.features_of(extractor, blurred).features, reference)
    # Not a control but a scale: how near the training images are to one another.
    found["training images, themselves left out"] = nearest(
        reference[: config.num], reference, exclude_self=True)
    rows = {name: {"images": len(s)} | nearness(s) for name, (s, _) in found.items()}
    print(f"nearest of {len(train)} training images, {extractor.name} features, cosine similarity")
    print(text_table(rows))
    record = {
        "features": extractor.identity, "train": len(train), "rows": rows,
        "similarities": {name: [round(v, 4) for v in s.tolist()] for name, (s, _) in found.items()},
        "config": {k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items()},
        "provenance": provenance(),
    }
    _write(out, record, rows, found, samples, train, extractor)
    print(f"page: {out / 'memorise.html'}")
    return record


def _write(out: Path, record, rows, found, samples, train, extractor) -> None:
    import torch

    from robustdm.reporting import plots
    from robustdm.reporting.images import grid_png
    from robustdm.reporting.tables import table_lines
    from robustdm.reporting.webpage import Picture, Section, page
    from robustdm.runs.rundir import write_text

    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"out is {str(out)!r}: it cannot be made ({error.strerror})") from None
    similarities = {name: s for name, (s, _) in found.items()}
    made = plots.similarities(similarities, f"{extractor.name} features")
    plots.save(made, out / "memorise.png")
    similarity, index = found["samples"]
    top = similarity.argsort(descending=True)[:PAIRS]
    pairs = torch.stack([samples[top], train[index[top]]], 1).flatten(0, 1)
    made_by = json.dumps({k: record[k] for k in ("config", "provenance")}, indent=1)
    sections = [
        Section("Table", [
            "Samples are near training images beyond what their kind explains only where they "
            "exceed the held-out images; and a method that smooths moves the histogram as blurring "
            "does, without having memorised less."], table_lines(rows, digits=4)),
        Section("Histogram", pictures=[Picture(plots.png_bytes(made))]),
        Section("The most similar pairs", ["Sample, then training image."],
                pictures=[Picture(grid_png(pairs, 8), "pairs")]),
        Section("How it was made", code=made_by),
    ]
    write_text(out / "memorise.html", page("Nearest training images", sections))
    write_text(out / "memorise.json", json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    guard(main)
