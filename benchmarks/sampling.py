"""The sampling suite: our sampler and `fast_network` against diffusers' pipelines.

Each provider draws a batch of images, end to end. First it gets the noise of the others and must
arrive at the images of diffusers' eager pipeline; then all of them are timed in turn.
"""

from __future__ import annotations

import copy
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from unittest.mock import patch

import torch
from case import relative_error
from report import BUSY, STYLES
from rich.console import Console
from rich.table import Table
from timing import one_line, spread
from torch import Tensor, nn
from torch._dynamo import config as dynamo
from torch._inductor.utils import fresh_cache

from robustdm.errors import RunError, UsageError
from robustdm.host import keep_freed_memory
from robustdm.method.sampling import sample, stream_noise, timesteps
from robustdm.method.schedule import NoiseSchedule
from robustdm.models import build_model
from robustdm.models.inference import fast_network
from robustdm.runs.config import TrainConfig
from robustdm.runs.presets import PRESETS, preset_values

SCHEMA = "robustdm-sampling-1"
SAMPLERS = ("ddim", "ddpm")
MINUTES = {"cpu": 5.0, "cuda": 8.0}
BATCH = {"cpu": 16, "cuda": 128}
STEPS = {"cpu": 5, "cuda": 50}
FULL = 50  # steps of the sampler that img/s is given for
# Steps of the check. Over hundreds the images of a bf16 pipeline, which rounds its state too, leave
# those of float32 by several per cent, and ours those of diffusers, whose tables are float32.
CHECKED = 5
FEWEST = 3  # rounds, whatever the time
COMPILING = 0.6  # share of the time after which nothing more is compiled
# Allowed relative error of the images. GPUs convolve float32 in TF32 unless told otherwise.
LIMITS = {"cpu": {"fp32": 1e-5, "bf16": 1e-2}, "cuda": {"fp32": 3e-3, "bf16": 2e-2}}
# Random weights do not predict noise: the usual schedule would blow samples up 150-fold, and hide
# the network's part in them. One this mild keeps them of order 1; speed does not depend on it.
BETAS = dict(beta_start=1e-4, beta_end=1e-3)
TINY = dict(resolution=32, block_channels=(64, 128, 128), layers_per_block=2,
            attention_resolutions=(16,), norm_groups=32, data="images")
SMALLEST = dict(resolution=8, block_channels=(8, 16), norm_groups=4, data="images")

# (sampler, steps) -> images (B, C, H, W) in [0, 1], on the CPU
Generate = Callable[[str, int], Tensor]


class Off(Exception):
    """A provider that cannot run here; the text says why."""


@dataclass(frozen=True)
class Task:
    """What every provider has to do.

    Attributes:
        model: the network, on its device; providers copy it.
        shape: of one sample.
        batch: samples to draw at once.
        steps: sampling steps of a timing.
    """

    model: nn.Module
    shape: tuple[int, ...]
    batch: int
    steps: int
    device: torch.device


@dataclass(frozen=True)
class Provider:
    """One way to draw samples. ``build`` may raise `Off`."""

    name: str
    build: Callable[[Task], Generate]
    precision: str = "fp32"
    ours: bool = False
    compiles: bool = False


# The providers.


def providers(device: torch.device) -> list[Provider]:
    """Eager diffusers first, which the others are compared with; then what needs no compiler."""
    gpu = device.type == "cuda"
    best = dict(dtype=torch.bfloat16, channels_last=True)
    found = [
        _diffusers("diffusers"),
        _diffusers("diffusers channels-last", channels_last=True),
        _diffusers("diffusers bf16", dtype=torch.bfloat16),
        Provider("ours", _plain, ours=True),
        _ours("ours fused"),
        _ours("ours bf16", "bf16"),
        _diffusers("diffusers compile", compile={}),
        _ours("ours compile", compile=True),
        _diffusers("diffusers bf16 compile", **best, compile={}),
        _ours("ours bf16 compile", "bf16", compile=True),
    ]
    if gpu:
        found += [
            _ours("ours graph", cuda_graph=True),
            _ours("ours bf16 graph", "bf16", cuda_graph=True),
            _ours("ours bf16 compile graph", "bf16", compile=True, cuda_graph=True),
            _diffusers("diffusers bf16 compile graph", **best,
                       compile={"mode": "reduce-overhead"}),
        ]
    return found


def _diffusers(
    name: str, dtype: torch.dtype = torch.float32, channels_last: bool = False,
    compile: dict | None = None,
) -> Provider:
    """A pipeline as its documentation has it; ``compile`` holds options of torch.compile."""

    def build(task: Task) -> Generate:
        from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler

        unet = copy.deepcopy(task.model).to(dtype)
        if channels_last:
            unet.to(memory_format=torch.channels_last)
        if compile is not None:
            unet.compile(**compile)
        kinds = {"ddim": (DDIMPipeline, DDIMScheduler(clip_sample=False, **BETAS)),
                 "ddpm": (DDPMPipeline, DDPMScheduler(clip_sample=False,
                                                      variance_type="fixed_large", **BETAS))}
        pipelines = {key: kind(unet, scheduler) for key, (kind, scheduler) in kinds.items()}
        for pipeline in pipelines.values():
            pipeline.set_progress_bar_config(disable=True)

        def generate(sampler: str, steps: int) -> Tensor:
            images = pipelines[sampler](
                batch_size=task.batch, num_inference_steps=steps, output_type="pt"
            ).images
            return images.float().cpu()

        return generate

    precision = "bf16" if dtype == torch.bfloat16 else "fp32"
    return Provider(name, build, precision, compiles=compile is not None)


def _ours(
    name: str, precision: str = "fp32", compile: bool = False, cuda_graph: bool = False
) -> Provider:
    def build(task: Task) -> Generate:
        network = fast_network(
            task.model, precision=precision, compile=compile, cuda_graph=cuda_graph
        )
        network.prepare(task.batch, task.shape)
        for wanted in ("compile", "cuda_graph"):
            if wanted in network.off:
                raise Off(network.off[wanted])
        return _sampler(network, task)

    return Provider(name, build, precision, ours=True, compiles=compile)


def _plain(task: Task) -> Generate:
    return _sampler(copy.deepcopy(task.model), task)


def _sampler(network: nn.Module, task: Task) -> Generate:
    schedule = _schedule()

    def generate(sampler: str, steps: int) -> Tensor:
        x = sample(
            network, schedule, task.shape, num=task.batch, batch_size=task.batch, sampler=sampler,
            steps=steps, spacing="leading", device=task.device,
        )
        return (x / 2 + 0.5).clamp(0, 1)

    return generate


def _schedule() -> NoiseSchedule:
    from diffusers import DDPMScheduler

    return NoiseSchedule.from_diffusers(DDPMScheduler(**BETAS))


@contextmanager
def our_noise(task: Task) -> Iterator[None]:
    """Let diffusers draw the numbers that our sampler draws for seed 0, in their order."""
    from diffusers.pipelines.ddim import pipeline_ddim
    from diffusers.pipelines.ddpm import pipeline_ddpm
    from diffusers.schedulers import scheduling_ddpm

    visited = timesteps(_schedule(), CHECKED, "leading").tolist()
    order = iter([None, *visited])
    source = stream_noise(0, task.shape, task.device)

    def draw(shape, generator=None, device=None, dtype=None, **rest) -> Tensor:
        return source(next(order), range(task.batch)).to(dtype)

    with (patch.object(pipeline_ddim, "randn_tensor", draw),
          patch.object(pipeline_ddpm, "randn_tensor", draw),
          patch.object(scheduling_ddpm, "randn_tensor", draw)):
        yield


# The measurement.


def names(config, device: torch.device) -> list[str]:
    """What ``--list`` prints."""
    return [p.name for p in select(config, device)]


def select(config, device: torch.device) -> list[Provider]:
    """The providers whose name holds ``--only``, behind the one they are compared with.

    Raises:
        UsageError: if there is none.
    """
    first, *rest = providers(device)
    found = [p for p in rest if config.only in p.name]
    if not found and config.only not in first.name:
        raise UsageError(f"only is {config.only!r}: no provider's name holds that; --list prints "
                         "all of them")
    return [first, *found]


def make_task(config, device: torch.device) -> Task:
    """The network with random weights, and how much to draw.

    Raises:
        UsageError: for an unknown model, or one that is not for images.
    """
    name = config.model or "tiny"
    known = ["tiny", *(p for p, v in PRESETS.items() if v.get("network", "unet") == "unet")]
    if name not in known:
        raise UsageError(f"model is {name!r}: choose one of {', '.join(known)}")
    fields = SMALLEST if config.tiny else TINY if name == "tiny" else preset_values(name)
    settings = TrainConfig.from_dict(fields)
    channels = 1 if settings.data == "digits" else 3
    shape = (channels, settings.resolution, settings.resolution)
    batch, steps = (2, 3) if config.tiny else (BATCH[device.type], STEPS[device.type])
    task = Task(
        build_model(settings, shape).to(device).eval().requires_grad_(False), shape,
        batch if config.batch is None else config.batch,
        steps if config.steps is None else config.steps, device,
    )
    for field, value in (("batch", task.batch), ("steps", task.steps)):
        if value < 1:
            raise UsageError(f"{field} is {value}: it must be at least 1")
    timesteps(_schedule(), task.steps, "leading")
    return task


def run(
    config, device: torch.device, head: dict, save: Callable[[dict], None] = lambda record: None
) -> dict:
    """Check every provider, then time those that are right, in turn.

    Args:
        config: a ``BenchmarkConfig``.
        head: what the record begins with.
        save: called with the record after every provider, and after every round of times.

    Returns:
        The record, JSON-able: one row per sampler and provider, with status "ok", "WRONG", "FAILED"
        or "off", and for "ok" ms per sampling step (median), p20, p80, samples and img_per_s.
    """
    keep_freed_memory()  # for diffusers as for us
    begin = time.perf_counter()
    seconds = 60 * (config.minutes or MINUTES[device.type])
    found, task = select(config, device), make_task(config, device)
    record = {
        "schema": SCHEMA, **head,
        "model": config.model or "tiny", "tiny": config.tiny, "weights": "random", "betas": BETAS,
        "parameters": sum(p.numel() for p in task.model.parameters()),
        "shape": list(task.shape), "batch": task.batch, "steps": task.steps, "full_steps": FULL,
        "checked_steps": CHECKED,
        "rows": [],
    }
    print(f"{record['model']}: {record['parameters'] / 1e6:.2f} M weights, {task.batch} samples of "
          f"{'x'.join(map(str, task.shape))}, {task.steps} steps", flush=True)
    timers = []
    # Past its limit dynamo would run eagerly without a word.
    with dynamo.patch(fail_on_recompile_limit_hit=True):
        for rows, generate in checked(found, task, begin + COMPILING * seconds):
            record["rows"] += rows
            save(record)
            timers += [(row, generate) for row in rows if row["status"] == "ok"]
        print(f"timing, at most {config.repeats} rounds of {len(timers)}", flush=True)
        for _ in timed(timers, config.repeats, begin + seconds, task):
            derive(record)
            save(record)
    record["load_after"] = os.getloadavg()[0]
    record["seconds"] = time.perf_counter() - begin
    derive(record)
    return record


def checked(
    found: list[Provider], task: Task, compiling: float
) -> Iterator[tuple[list[dict], Generate | None]]:
    """Rows of each provider, and its way to generate; what begins to compile after ``compiling``
    (of perf_counter) is off.

    Raises:
        RunError: if the first, which the others are compared with, does not run; after its rows.
    """
    from diffusers.utils import logging

    logging.set_verbosity_error()  # it explains what .to(bfloat16) may do
    references: dict[str, Tensor] = {}
    for number, provider in enumerate(found, 1):
        print(f"[{number}/{len(found)}] {provider.name}", flush=True)
        # Of its own: a compilation that finds kernels of an earlier one takes no time.
        with fresh_cache() if provider.compiles else nullcontext():
            rows, generate = _checked(provider, task, references, time.perf_counter() > compiling)
        yield rows, generate
        if number == 1 and rows[0]["status"] != "ok":
            raise RunError("diffusers' eager pipeline, which all are compared with, does not "
                           f"run: {rows[0].get('reason', 'its images are not finite')}")


def _checked(
    provider: Provider, task: Task, references: dict[str, Tensor], late: bool
) -> tuple[list[dict], Generate | None]:
    """Rows of a provider, and its way to generate.

    The images of the first provider become the reference, one set per sampler.
    """
    head = {"provider": provider.name, "precision": provider.precision, "ours": provider.ours}
    rows = [{"sampler": s, **head} for s in SAMPLERS]
    if provider.compiles and late:
        reason = "no time left to compile; give more --minutes"
        return [{**row, "status": "off", "reason": reason} for row in rows], None
    before, begin = _memory(task.device), time.perf_counter()
    limit = LIMITS[task.device.type][provider.precision]
    try:
        generate = provider.build(task)
        for row in rows:
            with our_noise(task):
                images = generate(row["sampler"], CHECKED).double()
            error = relative_error([images], [references.setdefault(row["sampler"], images)])
            row.update(status="ok" if error <= limit else "WRONG", error=error, limit=limit)
            if provider.compiles and row is rows[0]:
                row["compile_s"] = time.perf_counter() - begin
    except Exception as error:  # no compiler, no memory
        failed = provider.ours and not isinstance(error, Off)
        reason = str(error) if isinstance(error, Off) else one_line(error)
        for row in rows:
            row.update(status="FAILED" if failed else "off", reason=reason)
        return rows, None
    if task.device.type == "cuda":
        for row in rows:
            row["peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    return rows, generate


def _memory(device: torch.device) -> int:
    """Bytes in use, from where the peak is counted."""
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def timed(
    timers: list[tuple[dict, Generate]], rounds: int, end: float, task: Task
) -> Iterator[None]:
    """Time in rounds, each in another order, so that a disturbance hits all alike.

    Rows get their medians after every round; one that raises is FAILED.

    Args:
        rounds: at most; fewer where another would not end before ``end``, but never below FEWEST.
    """
    samples: dict[int, list[float]] = {i: [] for i in range(len(timers))}
    longest = 0.0
    for done in range(rounds):
        started = time.perf_counter()
        if done >= FEWEST and started + longest > end:
            break
        for i in random.sample(sorted(samples), len(samples)):
            row, generate = timers[i]
            begin = time.perf_counter()
            try:
                generate(row["sampler"], task.steps)  # its copy to the CPU waits for the GPU
            except Exception as error:  # no memory, say
                row.update(status="FAILED", reason=one_line(error))
                for key in ("ms", "p20", "p80", "samples"):
                    row.pop(key, None)
                del samples[i]
                continue
            samples[i].append((time.perf_counter() - begin) / task.steps * 1e3)
        longest = max(longest, time.perf_counter() - started)
        for i, found in samples.items():
            timers[i][0].update(spread(found))
        yield


# What the numbers come to.


def derive(record: dict) -> None:
    """Add img/s, and the ratios to eager, compiled and the fastest diffusers, to the rows."""
    for sampler in SAMPLERS:
        rows = [r for r in record["rows"] if r["sampler"] == sampler and "ms" in r]
        times = {r["provider"]: r["ms"] for r in rows}
        theirs = [r["ms"] for r in rows if not r["ours"]]
        for row in rows:
            row["img_per_s"] = record["batch"] / (row["ms"] * record["full_steps"] / 1e3)
            for key, base in (("vs_eager", "diffusers"), ("vs_compile", "diffusers compile")):
                if base in times:
                    row[key] = times[base] / row["ms"]
            if theirs:
                row["vs_best"] = min(theirs) / row["ms"]


def failures(record: dict) -> list[str]:
    """Rows whose images were wrong, or that raised although they are ours."""
    nothing = [] if any("ms" in row for row in record["rows"]) else ["nothing was measured"]
    return nothing + [
        f"{row['sampler']}, {row['provider']}: {row['status']} "
        + (row.get("reason") or f"error {row['error']:.3g} > {row['limit']:.3g}")
        for row in record["rows"] if row["status"] in ("WRONG", "FAILED")
    ]


def print_record(record: dict) -> None:
    """The table, and all that was wrong or is off."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=130)
    gpu = record["device"] == "cuda"
    made = Table(show_edge=False, pad_edge=False)
    for name in ("sampler", "provider"):
        made.add_column(name, no_wrap=True)
    columns = ["ms/step", "p20-p80", f"img/s ({record['full_steps']} steps)", "vs eager",
               "vs compile", "vs best", *(("MiB",) if gpu else ()), "compile s", "error"]
    for column in columns:
        made.add_column(column, justify="right", no_wrap=True)
    for sampler in SAMPLERS:
        shown = [r for r in record["rows"] if r["sampler"] == sampler and r["status"] != "off"]
        for i, row in enumerate(shown):
            made.add_row(sampler if i == 0 else "", row["provider"], *_cells(row, gpu),
                         style=STYLES.get(row["status"], ""))
        made.add_section()
    console.print(made)
    where = record["gpu"] if gpu else (
        f"{record['cpu']}, {record['threads']} threads on {record['cores']} cores")
    console.print(f"{where}; {record['model']}, random weights; load {record['load_before']:.1f} "
                  f"before, {record['load_after']:.1f} after; {record['seconds']:.0f} s",
                  highlight=False)
    if record["load_before"] > BUSY * record["cores"]:
        console.print(f"the machine was busy before this began (load {record['load_before']:.1f} "
                      f"on {record['cores']} cores): repeat it on an idle one", style="bold yellow",
                      highlight=False)
    reasons = {(r["provider"], r["reason"]) for r in record["rows"] if r["status"] == "off"}
    for provider, reason in sorted(reasons):
        console.print(f"off: {provider}: {reason}", style="dim", highlight=False)
    for text in failures(record):
        console.print(text, style="bold red", highlight=False)


def _cells(row: dict, gpu: bool) -> list[str]:
    error = "" if row.get("error") is None else f"{row['error']:.1e}"
    if row["status"] != "ok":  # no speed of a wrong result
        return [row["status"], *[""] * (7 if gpu else 6), error]

    def number(key: str, form: str) -> str:
        return "" if row.get(key) is None else form.format(row[key])

    return [
        number("ms", "{:.4g}"), f"{row['p20']:.3g}-{row['p80']:.3g}", number("img_per_s", "{:.4g}"),
        *(number(key, "{:.2f}") for key in ("vs_eager", "vs_compile", "vs_best")),
        *((number("peak_mib", "{:.4g}"),) if gpu else ()), number("compile_s", "{:.0f}"), error,
    ]
