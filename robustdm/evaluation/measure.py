"""Samples, made or read, and what is measured on them: shared by evaluate, attack and memorise."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from robustdm.data import load_data
from robustdm.data.base import Data, sha256_of
from robustdm.distributed import ALONE, Ranks
from robustdm.errors import RunError, UsageError
from robustdm.evaluation.features import Extractor, Features, load_extractor
from robustdm.host import threads_restored
from robustdm.method.baselines import Baseline
from robustdm.method.sampling import (
    batch_or_default,
    check_settings,
    enough_memory,
    sample,
    timesteps,
)
from robustdm.method.schedule import NoiseSchedule
from robustdm.metrics import (
    FeatureStatistics,
    deviation_ratios,
    frechet_distance,
    inception_score,
    kernel_distance,
    kernel_sums,
    manifold,
    neighbour_radii,
    sliced_wasserstein,
)
from robustdm.models.inference import fast_network

METRICS = ("frechet", "kernel", "manifold", "sliced_wasserstein", "deviation", "inception_score")
SPLITS = 5
# Metrics that hold a matrix over pairs are measured on this many features at most.
_MAX_REFERENCE = 50_000
EXTRACTED = 256
"""Samples that an extractor takes at once, at most."""


@dataclass(frozen=True)
class Generator:
    """A trained network and what is needed to draw from it.

    Attributes:
        name: where it came from.
        model: predicts noise; in eval mode.
        schedule: its noise schedule.
        shape: of one sample.
        is_image: whether samples are images in [-1, 1].
        clip: whether predicted images are clipped while sampling.
        data: the run's training set, None for a pipeline.
        seed, objective: of its training, None if unknown.
    """

    name: str
    model: nn.Module
    schedule: NoiseSchedule
    shape: tuple[int, ...]
    is_image: bool
    clip: bool
    data: Data | None
    seed: int | None
    objective: str | None = None


def open_run(directory: Path, device: torch.device | str, ema: float | None = None,
             checkpoint: int | None = None) -> Generator:
    """The generator of a run of `robustdm.train`; raises like ``load_run`` and ``load_data``."""
    from robustdm.models.load_run import load_run

    run = load_run(directory, ema, device, checkpoint)
    return Generator(str(directory), run.model, run.schedule, run.shape, run.is_image,
                     run.config.clip_samples and run.is_image, load_data(run.config),
                     run.config.seed, run.config.objective)


def open_pipeline(
    name: str, device: torch.device | str, allow_pickle: bool = False
) -> Generator:
    """The generator of a diffusers DDPM pipeline, a folder or a name on the Hub.

    Raises:
        UsageError: if there is none, or its network does not predict noise of square images.
    """
    from robustdm.models.pipeline import schedule_from
    from robustdm.models.pretrained import network_of, open_source

    # Not diffusers' own loader: some versions run Python files that lie in the folder, and it gives
    # old models a wrong number of heads.
    source = open_source(name, allow_pickle=allow_pickle, field="pipeline")
    side = source.unet and source.unet["sample_size"]
    if source.format != "diffusers" or source.scheduler is None:
        raise UsageError(f"pipeline is {name!r}: it is no diffusers pipeline with a scheduler; a "
                         "run is named by --run")
    if not isinstance(side, int):
        raise UsageError(f"pipeline is {name!r}: its images are {side}, only square ones work")
    return Generator(name, network_of(source).to(device), schedule_from(source.scheduler),
                     (source.unet["in_channels"], side, side), True,
                     source.fields["clip_samples"], None, None)


def generate(
    generator: Generator, num: int, *, batch_size: int | None = None, seed: int = 0,
    precision: str = "fp32", compile: bool = False, attack=None,
    baseline: Baseline | None = None,
    progress: Callable[[int, int], None] | None = None, device: torch.device | str = "cpu",
    ranks: Ranks = ALONE, **settings,
) -> Iterator[Tensor]:
    """Batches of samples (B, *shape), on the CPU, as they are made.

    Args:
        batch_size: see `batch_or_default`.
        attack: an attack on the trajectory; the network is then differentiable.
        baseline: what is done to a plain DDPM against noise.
        progress: called as progress(done, total), in sample-steps of all ranks.
        ranks: those that share the samples; each iterates over its part, to the end, which comes
            when all are done. Sample k is the same on any number of ranks.
        settings: sampler, steps, spacing, variance and eta of ``sampling.sample``.

    Raises:
        UsageError: for a setting out of range.
        RunError: if samples are not finite, or memory runs out.
        PeerError: if another rank has failed.
    """
    defaults = dict(sampler="ddpm", steps=None, spacing="linspace", variance="fixed_large", eta=0.0)
    settings = defaults | settings
    if baseline is not None:
        settings |= baseline.settings
        baseline.finish(torch.zeros(1, *generator.shape))
    batch_size = batch_or_default(batch_size, generator.shape)
    check_settings(generator.schedule, num=num, batch_size=batch_size, **settings)
    network = fast = fast_network(generator.model, precision=precision, compile=compile,
                                  device=device, differentiable=attack is not None)
    if baseline is not None:
        network = baseline.network(fast, generator.schedule).to(device)
    steps = len(timesteps(generator.schedule, settings["steps"], settings["spacing"],
                          settings.get("stop", 0.0)))
    part, batch_size = ranks.batches(num, batch_size)
    with threads_restored(), ranks.apart(num * steps, progress) as report:
        if part:
            fast.choose_threads(batch_size, generator.shape, steps * -(-len(part) // batch_size))
        for first in range(part.start, part.stop, batch_size):
            before = (first - part.start) * steps
            count = min(batch_size, part.stop - first)
            with enough_memory(count):
                made = sample(network, generator.schedule, generator.shape, num=count,
                              first_index=first, batch_size=count, seed=seed, clip=generator.clip,
                              device=device, attack=attack,
                              progress=lambda done, _, b=before: report(b + done), **settings)
            if not bool(torch.isfinite(made).all()):
                raise RunError(f"samples of {generator.name} are not finite numbers: the run has "
                               "diverged, use an earlier --checkpoint")
            yield made if baseline is None else baseline.finish(made)


def shared_extractor(ranks: Ranks, *arguments) -> Extractor:
    """``load_extractor`` on every rank: what is kept in a cache is made, or fetched, once.

    Raises:
        UsageError, RunError: like ``load_extractor``; RunError if the ranks' extractors differ.
    """
    extractor = ranks.main_first(lambda: load_extractor(*arguments))
    ranks.same("the feature extractor", extractor.identity)
    return extractor


def check_metrics(metrics: Sequence[str]) -> None:
    """Raise a UsageError for a metric that is not known."""
    for name in metrics:
        if name not in METRICS:
            raise UsageError(f"metrics has {name!r}: choose of {', '.join(METRICS)}")


def check_out(out: Path) -> None:
    """Raise a UsageError if ``out`` cannot be made a folder: what goes there may take hours."""
    place = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not place.is_dir():
        raise UsageError(f"out is {str(out)!r}: {place} is a file, name a folder")


def affordable(shape: tuple[int, ...]) -> int:
    """How many samples of a shape are kept for pictures and the data's own measures: 1 GiB."""
    return max(64, 2**28 // math.prod(shape))


def extract(
    extractor: Extractor, batches: Iterator[Tensor], keep: int | None = None, ranks: Ranks = ALONE
) -> tuple[Features, Tensor] | tuple[None, None]:
    """Features of a stream of samples, and the samples; a batch's features are computed while the
    next batch is made.

    Args:
        batches: (B, *shape) each.
        keep: samples to return, the first ones; all if None. What is not kept takes no memory.
        ranks: those that have a part of the samples each, in their order.

    Returns:
        Those of all ranks on rank 0, (None, None) on the others.

    Raises:
        UsageError: if the extractor does not take such samples.
    """
    kept, futures, left, count = [], [], keep, 0
    with ThreadPoolExecutor(1) as pool:
        for batch in batches:
            count += len(batch)
            kept.append(batch if left is None else batch[:left].clone())
            left = None if left is None else left - len(kept[-1])
            # Many small samples are made at once, but a network may bring them to 299x299.
            if futures:
                futures[-1].result()  # an error stops the sampling
            futures += [pool.submit(extractor, part) for part in batch.split(EXTRACTED)]
        parts = [future.result() for future in futures]

    def gathered(values: list[Tensor], first: int | None = None) -> Tensor | None:
        return ranks.gather(torch.cat([v.cpu() for v in values])[:first] if values else None)

    before = sum(ranks.exchange(count)[: ranks.rank])
    samples = gathered(kept, None if keep is None else max(0, keep - before))
    features = gathered([p.features for p in parts])
    logits = gathered([p.logits for p in parts if p.logits is not None])
    return (Features(features, logits), samples) if ranks.main else (None, None)


def features_of(extractor: Extractor, images: Tensor | None, cache: Path | None = None,
                batch_size: int = EXTRACTED, ranks: Ranks = ALONE) -> Features | None:
    """Features of a set of images, from the cache if the very same were computed before.

    Args:
        images: the set on rank 0, None on the others.
        cache: folder of kept features; a file's name is a hash of the images and the extractor, so
            another setting can never find it. None keeps nothing.
        batch_size: images at once, `EXTRACTED` at most.
        ranks: those that share the work.

    Returns:
        None on other ranks than 0.
    """
    from safetensors.torch import load_file, save_file

    path = found = None
    if cache is not None and ranks.main:
        key = json.dumps([sha256_of(images), list(images.shape), extractor.identity])
        path = cache / f"features-{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"
        with contextlib.suppress(Exception):  # missing or damaged: compute
            kept = load_file(path)
            found = Features(kept["features"], kept.get("logits"))
    if ranks.exchange(found is not None)[0]:
        return found
    mine = ranks.scatter(images, batch_size)
    batches = mine.split(batch_size) if len(mine) else ()
    found, _ = extract(extractor, iter(batches), keep=0, ranks=ranks)
    if path is not None:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({k: v.contiguous() for k, v in found._asdict().items() if v is not None},
                      path)
    return found


def measure(
    features: Features, reference: Tensor | FeatureStatistics, metrics: tuple[str, ...] = METRICS,
    splits: int = SPLITS,
) -> dict[str, dict]:
    """Metrics of samples against a reference, with their spread over parts of the samples.

    Args:
        features: of the samples.
        reference: features (M, D) of the clean data, or their statistics.
        metrics: of METRICS; those that cannot be had (no logits, statistics alone) are left out.
        splits: disjoint parts of the samples. Frechet and kernel distances of parts are measured
            against the whole reference; a Frechet distance of fewer samples is larger.

    Returns:
        metric -> {"value": over all samples, "samples": N, "parts": their number, "part_mean",
        "part_sd"}, and "error" for the kernel distance: its standard error.

    Raises:
        UsageError: for an unknown metric, or fewer samples than a Frechet distance takes.
    """
    check_metrics(metrics)
    count, dims = features.features.shape
    known = isinstance(reference, FeatureStatistics)
    if "frechet" in metrics:
        for what, number in (("samples", count), ("reference images",
                             reference.count if known else len(reference))):
            if number is not None and number <= dims:
                raise UsageError(
                    f"{number} {what} are too few for a Frechet distance of {dims} features: take "
                    f"more than {dims}, or leave frechet out of --metrics")
    dims_there = len(reference.mean) if known else reference.shape[1]
    if dims_there != dims:
        raise UsageError(f"reference has {dims_there} features and the samples {dims}: it was made "
                         "by another extractor or of images of another size")
    statistics = reference if known else FeatureStatistics.of(reference)
    points = None if known else reference[:_MAX_REFERENCE].to(features.features.device)
    # Of the reference alone: all parts are measured against it.
    sums = kernel_sums(points) if "kernel" in metrics and not known else None
    radii = neighbour_radii(points) if "manifold" in metrics and not known else None

    def values(part: Features) -> dict[str, float]:
        x, made = part.features, {}
        if "frechet" in metrics and len(x) > dims:
            made["frechet"] = frechet_distance(x, statistics)
        if "inception_score" in metrics and part.logits is not None:
            made["inception_score"] = inception_score(part.logits, min(10, len(x))).value
        if sums is not None:
            made["kernel"], made["kernel_error"] = kernel_distance(x, points, sums=sums)
        if radii is not None:
            made |= manifold(x, points, radii=radii)._asdict()
        if "sliced_wasserstein" in metrics and not known:
            made["sliced_wasserstein"] = sliced_wasserstein(x, points)
        ratios = deviation_ratios(x, statistics) if "deviation" in metrics else ()
        if len(ratios):  # a reference may not vary at all
            made["deviation"] = ratios[: max(1, len(ratios) // 4)].mean().item()
        return made

    whole = values(features)
    error = whole.pop("kernel_error", None)
    # Every splits-th sample: a folder may be sorted by class.
    parts = [
        values(Features(*(None if v is None else v[i::splits] for v in features)))
        for i in range(splits)
    ] if splits > 1 and count // splits > 10 else []
    results = {}
    for name, value in whole.items():
        results[name] = {"value": value, "samples": count}
        known_parts = torch.tensor([p[name] for p in parts if name in p], dtype=torch.float64)
        if len(known_parts) > 1:
            results[name] |= {"parts": len(known_parts), "part_mean": known_parts.mean().item(),
                              "part_sd": known_parts.std().item()}
    if "kernel" in results:
        results["kernel"]["error"] = error
    return results


MEANINGS = {
    "frechet": "Frechet distance of the features to the reference's; lower is better, falls with "
               "the number of samples. FID only if the features are Inception's",
    "kernel": "kernel distance (KID if Inception's), unbiased: 0 is the same law",
    "precision": "share of samples that lie among the reference; shrinkage raises it",
    "recall": "share of the reference that lies among the samples; the spread measure to read "
              "beside every distance",
    "density": "reference balls around a sample; 1 is the same law",
    "coverage": "share of the reference with a sample near by",
    "sliced_wasserstein": "sliced Wasserstein distance of the features; lower is better",
    "deviation": "standard deviation of the samples over the reference's along its leading quarter "
                 "of principal axes; 1 is right, below it signal was lost",
    "inception_score": "exp of the mean KL of class probabilities to their marginal",
}


def label(metric: str, extractor: Extractor) -> str:
    """Name of a metric in a feature space; only Inception's have the short names."""
    if extractor.name == "inception":
        short = {"frechet": "FID", "kernel": "KID", "inception_score": "IS"}
        return short.get(metric, metric)
    return "class_score" if metric == "inception_score" else metric
