"""Entry point: `python -m robustdm.evaluate` measures samples against clean data."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from robustdm.cli import guard
from robustdm.errors import UsageError
from robustdm.flags import ComputeFlags, FeatureFlags, SamplingFlags, parse_flags

GRID_SAMPLES = 64
NEIGHBOUR_ROWS = 8


@dataclass(frozen=True)
class EvaluateConfig(ComputeFlags, SamplingFlags, FeatureFlags):
    """What to measure, against what, and how."""

    run: Path | None = None
    """Run directory of `python -m robustdm.train`: samples are made. One of run, samples and
    pipeline."""
    samples: Path | None = None
    """Samples that are there: a folder, zip, .npy or .npz."""
    pipeline: str | None = None
    """A diffusers DDPMPipeline, as a folder or a name on the Hub: samples are made."""
    reference: Path | None = None
    """Clean data to compare with: a folder, zip, .npy, .npz, CIFAR-10, or an .npz of Frechet
    statistics (mu, sigma); the run's own clean training data if not given."""
    value_range: tuple[float, float] | None = None
    """samples and reference as .npy or .npz: the two values that become -1
    and 1; what lies beyond them is kept."""
    metrics: tuple[str, ...] = ("frechet", "kernel", "manifold", "sliced_wasserstein", "deviation",
                                "inception_score")
    """What to measure; manifold is precision, recall, density and coverage."""
    allow_pickle: bool = False
    """pipeline: read pickle files (.bin) too; tensors only, no code is run."""
    save_reference: Path | None = None
    """Write the reference's Frechet statistics to this .npz, in EDM's form."""
    num: int = 1000
    """Samples to make, and with --samples the most to read."""
    checkpoint: int | None = None
    """Step of the checkpoint to use; the newest sound one if not given."""
    batch_size: int | None = None
    """Samples computed at once: speed and memory, not the samples. If not given: 128 images of
    3x32x32, and of others as many as hold as many numbers, from 16 to 2048. Also images of
    --samples and of the reference whose features are computed at once: at most, and if not given,
    256."""
    out: Path | None = None
    """Folder for evaluation.json and evaluation.html; RUN/evaluation, or runs/evaluation."""


def main(argv: Sequence[str] | None = None) -> None:
    """Parse flags, evaluate, write.

    Raises:
        UsageError: for a wrong flag, source or reference.
        RunError: if sampling fails or weights are out of reach.
    """
    evaluate(parse_flags(
        EvaluateConfig, argv, prog="python -m robustdm.evaluate",
        description="Measure samples against clean data.",
    ))


def evaluate(config: EvaluateConfig) -> dict:
    """Make or read samples, measure them, print a table and write a record and a page.

    Started by torchrun, each process makes its part of the samples and of the features; rank 0
    reads what is to be read, measures and writes.

    Returns:
        What evaluation.json holds; empty on other ranks than 0.

    Raises:
        UsageError: for a wrong source, reference or setting.
        RunError: if sampling fails or weights are out of reach.
    """
    from robustdm.distributed import join

    with join(config.device) as ranks:
        return _evaluate(config, ranks)


def _evaluate(config: EvaluateConfig, ranks) -> dict:
    import torch

    from robustdm.data.noise import noise_of_run
    from robustdm.data.read import read_images
    from robustdm.device import resolve_device
    from robustdm.evaluation import measure
    from robustdm.evaluation.features import cache_directory
    from robustdm.method.baselines import from_flags
    from robustdm.method.sampling import batch_or_default
    from robustdm.reporting.progress import sampling_progress
    from robustdm.runs.rundir import provenance

    given = [n for n in ("run", "samples", "pipeline") if getattr(config, n) is not None]
    if len(given) != 1:
        raise UsageError(f"give one of --run, --samples and --pipeline, not {len(given)}")
    if config.num < 2:
        raise UsageError(f"num is {config.num}: it takes at least 2 samples")
    if config.batch_size is not None and config.batch_size < 1:
        raise UsageError(f"batch_size is {config.batch_size}: it must be at least 1")
    extracted = config.batch_size or measure.EXTRACTED
    out = config.out or (Path("runs") if config.run is None else config.run) / "evaluation"
    with ranks.together():
        if ranks.main:
            measure.check_out(out)
    measure.check_metrics(config.metrics)
    if config.run is None and config.reference is None:
        raise UsageError("reference is not given: only a run knows its own clean data; name a "
                         "folder, zip, .npy or .npz")
    device = resolve_device(config.device)
    generator = samples = shape = None
    if config.pipeline is not None:  # of the Hub, it is fetched once
        generator = ranks.main_first(
            lambda: measure.open_pipeline(config.pipeline, device, config.allow_pickle))
    with ranks.together():
        if config.run is not None:
            generator = measure.open_run(config.run, device, config.ema, config.checkpoint)
        elif config.samples is not None and ranks.main:
            samples = read_images(config.samples, "samples", config.value_range)[: config.num]
            shape = tuple(samples.shape[1:])
        if generator is None and config.baseline != "none":
            raise UsageError(f"baseline is {config.baseline!r}: it needs a network to sample "
                             "from; give --run or --pipeline")
        noise = None
        if config.run is not None:
            noise = functools.partial(noise_of_run, config.run, generator.data)
        baseline = from_flags(config, noise, getattr(generator, "objective", None))
    if generator is not None:
        ranks.same_weights("the bits of the weights", generator.model.parameters())
        shape = generator.shape
    shape = ranks.exchange(shape)[0]
    if generator is not None:
        config = replace(config, batch_size=batch_or_default(config.batch_size, shape))

    # The reference first: it is quick to find wrong.
    clean = reference = None
    with ranks.together():
        if ranks.main:
            clean, reference, where = _reference(config, generator, shape)
    extractor = measure.shared_extractor(ranks, config.features, shape, config.weights, device,
                                            config.quantise)
    cache = cache_directory()
    if ranks.exchange(reference is None)[0]:
        reference = measure.features_of(extractor, clean, cache, extracted, ranks)
        reference = reference and reference.features
    with ranks.together():
        if ranks.main and config.save_reference is not None:
            _save_reference(reference, config.save_reference)

    if generator is not None:
        name = generator.name + ("" if baseline is None else f", {config.baseline}")
        with sampling_progress(config.num, shown=ranks.main) as progress:
            features, samples = measure.extract(extractor, measure.generate(
                generator, config.num, batch_size=config.batch_size, seed=config.seed,
                precision=config.precision, compile=config.compile, device=device,
                progress=progress, ranks=ranks, sampler=config.sampler, steps=config.steps,
                spacing=config.spacing, variance=config.variance, eta=config.eta,
                baseline=baseline), measure.affordable(shape), ranks)
    else:
        name = str(config.samples)
        features = measure.features_of(extractor, samples, cache, extracted, ranks)
    if not ranks.main:
        return {}
    results = measure.measure(features, reference, config.metrics)
    own = {}
    if generator is not None and generator.data is not None:
        data = generator.data
        everything = torch.arange(min(len(data), measure.affordable(shape)))
        own = {"samples": data.measure(samples), "training data": data.measure(
            data.batch(everything)), "clean data": data.measure(data.clean(everything))}
    record = {
        "name": name, "reference": where, "features": extractor.identity, "results": results,
        "measures": own, "ranks": ranks.size, "provenance": provenance(),
        "config": {k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items()},
    }
    rows = table_rows(results, extractor)
    from robustdm.reporting.tables import text_table

    print(f"{len(features.features)} samples of {name} against {where}, features {extractor.name}")
    print(text_table(rows))
    if own:
        print(text_table({k: {place: own[place].get(k) for place in own} for k in own["samples"]}))
    _write(out, record, _page(record, rows, samples, clean, features, reference, extractor))
    print(f"page: {out / 'evaluation.html'}")
    return record


def _save_reference(reference, path: Path) -> None:
    from robustdm.metrics import FeatureStatistics

    statistics = reference if isinstance(reference, FeatureStatistics) else (
        FeatureStatistics.of(reference))
    try:
        statistics.save(path)
    except OSError as error:
        raise UsageError(f"save_reference is {str(path)!r}: it cannot be written "
                         f"({error.strerror})") from None


def _reference(config: EvaluateConfig, generator, shape: tuple[int, ...]) -> tuple:
    """Clean data or None, statistics that stand for it or None, and where they are from."""
    import torch

    from robustdm.data.read import read_images

    if config.reference is None:
        if generator is None or generator.data is None:
            raise UsageError("reference is not given: only a run knows its own clean data; name a "
                             "folder, zip, .npy or .npz")
        clean = generator.data.clean(torch.arange(len(generator.data)))
        where = "the run's clean training data"
    else:
        where = str(config.reference)
        statistics = _statistics(config.reference)
        if statistics is not None:
            return None, statistics, where
        clean = read_images(config.reference, "reference", config.value_range)
    if tuple(clean.shape[1:]) != shape:
        raise UsageError(f"reference has shape {tuple(clean.shape[1:])}, the samples {shape}: "
                         "bring it to their resolution and channels first")
    return clean, None, where


def table_rows(results: dict, extractor) -> dict[str, dict]:
    """The results as rows of a table."""
    from robustdm.evaluation.measure import label

    rows = {}
    for metric, r in results.items():
        row = {"value": float(r["value"]), "samples": r["samples"]}
        if "error" in r:
            row["standard error"] = float(r["error"])
        if "parts" in r:
            row[f"{r['parts']} parts"] = f"{r['part_mean']:.3g} ±{r['part_sd']:.2g}"
        rows[label(metric, extractor)] = row
    return rows


def _statistics(path: Path):
    """Frechet statistics if the file holds them, else None."""
    from robustdm.metrics import FeatureStatistics
    from robustdm.untrusted import open_npz

    if path.suffix != ".npz" or not path.is_file():
        return None
    try:
        with open_npz(path) as file:
            known = "mu" in file and "sigma" in file
    except Exception:  # read_images says what is wrong
        return None
    return FeatureStatistics.load(path) if known else None


def _page(record, rows, samples, clean, features, reference, extractor) -> str:
    import torch

    from robustdm.evaluation.measure import MEANINGS, label
    from robustdm.metrics import nearest
    from robustdm.reporting import plots
    from robustdm.reporting.images import grid_png
    from robustdm.reporting.tables import table_lines
    from robustdm.reporting.webpage import Picture, Section, page

    sections = [Section(
        "Metrics",
        [f"Against {record['reference']}; features {extractor.name} ({extractor.digest[:12]}), "
         f"images {'' if extractor.quantise else 'not '}rounded to 8 bits. Parts are disjoint and "
         "smaller: their Frechet distance is larger."],
        table_lines(rows, "metric", digits=4),
        notes=[f"{label(m, extractor)}: {text}." for m, text in MEANINGS.items()
               if label(m, extractor) in rows])]
    if record["measures"]:
        measures = {k: {place: own.get(k) for place, own in record["measures"].items()}
                    for k in record["measures"]["samples"]}
        sections.append(Section("Where the clean law is known",
                                table=table_lines(measures, "measure", digits=4)))
    known = clean is not None
    if samples.ndim == 4:
        cards = [Picture(grid_png(samples[:GRID_SAMPLES]), "samples")]
        if known:
            cards.append(Picture(grid_png(clean[:GRID_SAMPLES]), "clean data"))
        sections.append(Section("Samples", pictures=cards, columns="wide"))
        if known:
            similarity, index = nearest(features.features[:NEIGHBOUR_ROWS * 2], reference)
            pairs = torch.stack([samples[:len(index)], clean[index]], 1).flatten(0, 1)
            sections.append(Section("Nearest clean images", [
                "Samples, each followed by the most similar clean image (cosine similarity of the "
                f"features, {similarity.mean():.2f} on average)."],
                pictures=[Picture(grid_png(pairs, 8), "pairs")]))
    elif known:
        made = plots.point_scatter({"samples": samples.numpy(), "clean data": clean.numpy()},
                                   plots.point_view(clean.numpy()))
        sections.append(Section("Samples", pictures=[Picture(plots.png_bytes(made), "points")]))
    if known:
        made, axes = plots.figure(1, 1, size=(5.0, 3.2))
        for colour, (name, x) in zip(plots.COLOURS, (("samples", features.features),
                                                    ("clean data", reference)), strict=False):
            axes[0, 0].plot(_spectrum(x), color=colour, label=name)
        axes[0, 0].set(xlabel="principal axis", ylabel="standard deviation", yscale="log",
                       title="spread of the features along their own principal axes")
        axes[0, 0].legend(fontsize=7)
        sections.append(Section("Spread", pictures=[Picture(plots.png_bytes(made))]))
    made_by = json.dumps({k: record[k] for k in ("config", "provenance")}, indent=1)
    sections.append(Section("How it was made", code=made_by))
    return page(f"Evaluation of {record['name']}", sections)


def _spectrum(x):
    import torch

    values = torch.linalg.eigvalsh(torch.cov(x.double().T).reshape(x.shape[1], -1))
    return values.clamp(min=1e-12).sqrt().flip(0).numpy()


def _write(out: Path, record: dict, page: str) -> None:
    from robustdm.runs.rundir import write_text

    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"out is {str(out)!r}: it cannot be made ({error.strerror})") from None
    write_text(out / "evaluation.json", json.dumps(record, indent=1) + "\n")
    write_text(out / "evaluation.html", page)


if __name__ == "__main__":
    guard(main)
