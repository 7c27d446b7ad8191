"""``--suite evaluation``: how fast samples are measured.

- features: images of 32x32 through the ResNet-56 extractor (random weights: the work is the same);
- metrics: all of them, of as many features as images;
- overlap: samples drawn and extracted, one after the other against batch by batch side by side, as
  ``python -m robustdm.evaluate`` does it; both must find the same features;
- whole: samples, features and metrics, drawn by each provider of the sampling suite, ours with
  features side by side and diffusers' pipelines without;
- memory: what streamed Frechet statistics of 2048 features hold, after few and after many.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable

import sampling
import torch
from rich.console import Console
from rich.table import Table
from timing import one_line, spread
from torch import nn
from torch._dynamo import config as dynamo

from robustdm.errors import UsageError
from robustdm.evaluation.features import CifarResNet, Extractor, Features
from robustdm.evaluation.measure import (
    EXTRACTED,
    METRICS,
    Generator,
    extract,
    features_of,
    generate,
    measure,
)
from robustdm.host import keep_freed_memory
from robustdm.method.schedule import NoiseSchedule
from robustdm.metrics import FeatureStatistics
from robustdm.models import build_model
from robustdm.runs.config import TrainConfig
from robustdm.runs.presets import preset_values

SCHEMA = "robustdm-evaluation-1"
TARGET_S = 120.0
MINUTES = {"cpu": 5.0, "cuda": 3.0}  # for the whole evaluations
DIMS = 2048
SHAPE = (3, 32, 32)
SAMPLES, BATCH = 256, 64  # drawn in all, and at once
STAGES = ("features", "metrics", "overlap", "whole", "memory")


def names(config, device: torch.device) -> list[str]:
    """The stages whose name holds ``--only``.

    Raises:
        UsageError: if there is none.
    """
    found = [name for name in STAGES if config.only in name]
    if not found:
        raise UsageError(f"only is {config.only!r}: choose one of {', '.join(STAGES)}")
    return found


def run(
    config, device: torch.device, head: dict, save: Callable[[dict], None] = lambda record: None
) -> dict:
    """Measure; see the module.

    Args:
        config: a ``BenchmarkConfig``.
        head: what the record begins with.
        save: called with the record after every stage.

    Returns:
        The record, JSON-able.

    Raises:
        UsageError: for a stage or a batch that does not exist.
    """
    begin = time.perf_counter()
    wanted, few = names(config, device), config.tiny
    if config.batch is not None and config.batch < 1:
        raise UsageError(f"batch is {config.batch}: it must be at least 1")
    batch = config.batch or (4 if few else BATCH)
    batches = -(-(8 if few else SAMPLES) // batch)
    keep_freed_memory()  # for diffusers as for us
    torch.manual_seed(0)
    extractor = Extractor("resnet56", CifarResNet(1 if few else 9), "random", channels=3,
                          resolution=32, device=device)
    record = {"schema": SCHEMA, **head, "tiny": few, "weights": "random", "batch": batch}
    record |= {"memory": [], "failed": []}
    count = 500 if few else 10_000
    task = sampling.Task(_network(few).to(device), SHAPE, batch, 2 if few else 5, device)
    stages = {
        "features": lambda: _features(extractor, count, config.batch or EXTRACTED, device),
        "metrics": lambda: _metrics(count, device),
        "overlap": lambda: _overlap(extractor, task, batches, config.repeats),
        "whole": lambda: _whole(extractor, task, batches, config),
        "memory": lambda: [_memory(n) for n in ((2000, 6000) if few else (10_000, 100_000))],
    }
    for name in wanted:
        try:
            record[name] = stages[name]()
        except Exception as error:  # no memory, say: the others can still be measured
            record["failed"].append(f"{name}: FAILED {one_line(error)}")
        save(record)
    record["load_after"] = os.getloadavg()[0]
    record["seconds"] = time.perf_counter() - begin
    return record


def _network(few: bool) -> nn.Module:
    fields = preset_values("cifar10") | dict(
        block_channels=(8, 8) if few else (64, 128), norm_groups=8, layers_per_block=1,
        attention_resolutions=(), dropout=0.0)
    return build_model(TrainConfig(**fields), SHAPE).eval().requires_grad_(False)


def _features(extractor: Extractor, count: int, batch: int, device: torch.device) -> dict:
    images = torch.randint(0, 256, (count, *SHAPE), dtype=torch.uint8).float() / 127.5 - 1
    extractor(images[:batch])
    begin = time.perf_counter()
    features_of(extractor, images, batch_size=batch)
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    return {"images": count, "seconds": seconds, "img_per_s": count / seconds, "batch": batch}


def _metrics(count: int, device: torch.device) -> dict:
    features, reference = torch.randn(2, count, 64, device=device)
    begin = time.perf_counter()
    measure(Features(features, torch.randn(count, 10, device=device)), reference)
    return {"features": count, "seconds": time.perf_counter() - begin}


def _overlap(extractor: Extractor, task: sampling.Task, batches: int, repeats: int) -> dict:
    generator = Generator("random", task.model, NoiseSchedule.linear(1000), SHAPE, True, True,
                          None, None)
    batch, steps = task.batch, 2 * task.steps

    def samples():
        return generate(generator, batch * batches, batch_size=batch, steps=steps,
                        device=task.device)

    def after():
        made = list(samples())
        return torch.cat([extractor(part).features.cpu() for part in made])

    def beside():
        return extract(extractor, samples())[0].features

    error = (after() - beside()).abs().max().item()
    times: dict[str, list[float]] = {"after": [], "beside": []}
    for _ in range(min(repeats, 7)):
        for name, call in (("after", after), ("beside", beside)):
            begin = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - begin))
    return {
        "samples": batch * batches, "steps": steps, "error": error, "same": error < 1e-4,
        **{name: spread(found) for name, found in times.items()},
        "gain": statistics.median(times["after"]) / statistics.median(times["beside"]),
    }


def _whole(extractor: Extractor, task: sampling.Task, batches: int, config) -> dict:
    """Rows as of the sampling suite, but ms, and img_per_s, are those of the whole evaluation."""
    count, rows, timers = task.batch * batches, [], []
    reference = torch.randn(4 * count, 64)
    metrics = tuple(m for m in METRICS if m != "frechet" or count > 64)
    begin, seconds = time.perf_counter(), 60 * (config.minutes or MINUTES[task.device.type])

    def evaluating(generate: sampling.Generate, ours: bool) -> sampling.Generate:
        def evaluated(sampler: str, steps: int) -> None:
            made = (2 * generate(sampler, steps) - 1 for _ in range(batches))
            if ours:
                features, _ = extract(extractor, made, keep=0)
            else:
                parts = zip(*[extractor(images) for images in list(made)], strict=True)
                features = Features(*(torch.cat(part).cpu() for part in parts))
            measure(features, reference, metrics)

        return evaluated

    # Past its limit dynamo would run eagerly without a word.
    with dynamo.patch(fail_on_recompile_limit_hit=True):
        for found, generate in sampling.checked(sampling.providers(task.device), task,
                                                begin + sampling.COMPILING * seconds):
            row = next(r for r in found if r["sampler"] == "ddpm")
            rows.append(row)
            if row["status"] == "ok":
                timers.append((row, evaluating(generate, row["ours"])))
        for _ in sampling.timed(timers, config.repeats, begin + seconds, task):
            pass
    sampling.derive({"rows": rows, "batch": count, "full_steps": task.steps})
    return {"samples": count, "steps": task.steps, "rows": rows}


def _memory(count: int) -> dict:
    """Numbers that the statistics hold after ``count`` features."""
    stream = FeatureStatistics()
    for _ in range(count // 1000):
        stream.update(torch.randn(1000, DIMS))
    held = sum(v.numel() * v.element_size() for v in vars(stream).values()
               if isinstance(v, torch.Tensor))
    return {"features": count, "dims": DIMS, "held_mib": held / 2**20,
            "kept_would_be_mib": count * DIMS * 8 / 2**20}


def failures(record: dict) -> list[str]:
    """What was wrong."""
    found = list(record.get("failed", []))
    if "whole" in record:
        found += [f"whole, {text}" for text in sampling.failures(record["whole"])]
    if "overlap" in record and not record["overlap"]["same"]:
        found.append(f"overlapped features differ by {record['overlap']['error']:.3g}")
    if len({m["held_mib"] for m in record["memory"]}) > 1:
        found.append("the memory of the statistics grows with their number")
    return found


def print_record(record: dict) -> None:
    """The numbers, and all that was wrong."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=130)
    made = Table(show_edge=False, pad_edge=False)
    for name in ("what", "result"):
        made.add_column(name, no_wrap=True)
    if f := record.get("features"):
        verdict = "reached" if f["seconds"] < TARGET_S else "MISSED"
        made.add_row("ResNet-56 features", f"{f['images']:,} images in {f['seconds']:.1f} s, "
                     f"{f['batch']} at once, {f['img_per_s']:.0f} img/s (target {TARGET_S:.0f} s: "
                     f"{verdict})")
    if m := record.get("metrics"):
        made.add_row("metrics", f"of {m['features']:,} features in {m['seconds']:.1f} s")
    if o := record.get("overlap"):
        made.add_row("sampling, then features", f"{o['after']['ms']:.0f} ms")
        made.add_row("features beside sampling", f"{o['beside']['ms']:.0f} ms, {o['gain']:.2f}x")
    if w := record.get("whole"):
        made.add_row("whole evaluations", f"{w['samples']} samples of {w['steps']} steps, "
                     f"{record['batch']} at once; against the fastest diffusers")
        for row in w["rows"]:
            made.add_row(f"- {row['provider']}", row["status"] if "ms" not in row else
                         f"{row['img_per_s']:.1f} img/s, {row['vs_best']:.2f}x")
    for m in record["memory"]:
        made.add_row(f"statistics of {m['features']:,}", f"{m['held_mib']:.0f} MiB, features "
                     f"themselves {m['kept_would_be_mib']:,.0f} MiB")
    console.print(made)
    for line in failures(record):
        console.print(f"[bold red]{line}")
