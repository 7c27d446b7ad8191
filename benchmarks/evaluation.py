"""``--suite evaluation``: how fast samples are measured.

- features: images of 32x32 through the ResNet-56 extractor (random weights: the work is the same);
- overlap: samples drawn and extracted, one after the other against batch by batch side by side, as
  ``python -m robustdm.evaluate`` does it; both must find the same features;
- memory: what streamed Frechet statistics of 2048 features hold, after few and after many.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from timing import one_line, spread

from robustdm.evaluation.features import CifarResNet, Extractor
from robustdm.evaluation.measure import Generator, extract, features_of, generate
from robustdm.host import keep_freed_memory
from robustdm.method.schedule import NoiseSchedule
from robustdm.metrics import FeatureStatistics
from robustdm.models import build_model
from robustdm.runs.config import TrainConfig, preset_values

SCHEMA = "robustdm-evaluation-1"
TARGET_S = 120.0
DIMS = 2048


def names(config, device: torch.device) -> list[str]:
    """What ``--list`` prints."""
    return ["features", "overlap", "memory"]


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
    """
    begin = time.perf_counter()
    keep_freed_memory()
    torch.manual_seed(0)
    few = config.tiny
    extractor = Extractor("resnet56", CifarResNet(1 if few else 9), "random", channels=3,
                          resolution=32, device=device)
    record = {"schema": SCHEMA, **head, "tiny": few, "weights": "random"}
    record |= {"memory": [], "failed": []}
    stages = {
        "features": lambda: _features(extractor, 500 if few else 10_000, device),
        "overlap": lambda: _overlap(extractor, device, few, config.repeats),
        "memory": lambda: [_memory(n) for n in ((2000, 6000) if few else (10_000, 100_000))],
    }
    for name, measured in stages.items():
        try:
            record[name] = measured()
        except Exception as error:  # no memory, say: the others can still be measured
            record["failed"].append(f"{name}: FAILED {one_line(error)}")
        save(record)
    record["load_after"] = os.getloadavg()[0]
    record["seconds"] = time.perf_counter() - begin
    return record


def _features(extractor: Extractor, count: int, device: torch.device) -> dict:
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8).float() / 127.5 - 1
    extractor(images[:250])
    begin = time.perf_counter()
    features_of(extractor, images)
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    return {"images": count, "seconds": seconds, "img_per_s": count / seconds}


def _overlap(extractor: Extractor, device: torch.device, few: bool, repeats: int) -> dict:
    fields = preset_values("cifar10") | dict(
        block_channels=(32, 32) if few else (64, 128), norm_groups=8, layers_per_block=1,
        attention_resolutions=(), dropout=0.0)
    model = build_model(TrainConfig(**fields), (3, 32, 32)).to(device).eval().requires_grad_(False)
    generator = Generator("random", model, NoiseSchedule.linear(1000), (3, 32, 32), True, True,
                          None, None)
    batch, batches, steps = (4, 2, 2) if few else (64, 4, 10)

    def samples():
        return generate(generator, batch * batches, batch_size=batch, steps=steps, device=device)

    def after():
        made = list(samples())
        return torch.cat([extractor(part).features.cpu() for part in made])

    def beside():
        return extract(extractor, samples())[0].features

    error = (after() - beside()).abs().max().item()
    times: dict[str, list[float]] = {"after": [], "beside": []}
    for _ in range(2 if few else min(repeats, 7)):
        for name, call in (("after", after), ("beside", beside)):
            begin = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - begin))
    return {
        "samples": batch * batches, "steps": steps, "error": error, "same": error < 1e-4,
        **{name: spread(found) for name, found in times.items()},
        "gain": statistics.median(times["after"]) / statistics.median(times["beside"]),
    }


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
    if "overlap" in record and not record["overlap"]["same"]:
        found.append(f"overlapped features differ by {record['overlap']['error']:.3g}")
    if len({m["held_mib"] for m in record["memory"]}) > 1:
        found.append("the memory of the statistics grows with their number")
    return found


def print_record(record: dict) -> None:
    """The numbers, and all that was wrong."""
    console = Console()
    made = Table(show_edge=False, pad_edge=False)
    for name in ("what", "result"):
        made.add_column(name, no_wrap=True)
    if f := record.get("features"):
        verdict = "reached" if f["seconds"] < TARGET_S else "MISSED"
        made.add_row("ResNet-56 features", f"{f['images']:,} images in {f['seconds']:.1f} s, "
                     f"{f['img_per_s']:.0f} img/s (target {TARGET_S:.0f} s: {verdict})")
    if o := record.get("overlap"):
        made.add_row("sampling, then features", f"{o['after']['ms']:.0f} ms")
        made.add_row("features beside sampling", f"{o['beside']['ms']:.0f} ms, {o['gain']:.2f}x")
    for m in record["memory"]:
        made.add_row(f"statistics of {m['features']:,}", f"{m['held_mib']:.0f} MiB, features "
                     f"themselves {m['kept_would_be_mib']:,.0f} MiB")
    console.print(made)
    for line in failures(record):
        console.print(f"[bold red]{line}")
