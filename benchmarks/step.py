"""The step suite: what a training step costs, one change after the other.

A ladder leads from a loop like the paper's to everything the package does; each row is timed for
plain DDPM, the random and the adversarial perturbation. Before that, a row's gradient and attack
must be those of the float32 reference.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import paper_loop
import torch
from report import BUSY, STYLES
from rich.console import Console
from rich.table import Table
from timing import Sensors, one_line, spread
from torch import Tensor
from torch._dynamo.utils import counters

from robustdm.data import batches
from robustdm.data.base import ImageTensor
from robustdm.errors import RunError, UsageError
from robustdm.host import keep_freed_memory
from robustdm.method.gradients import GradientStep
from robustdm.method.objectives import Objective
from robustdm.method.schedule import NoiseSchedule
from robustdm.models import build_model
from robustdm.models.fuse import FusedResnetBlock2D, PaddedConv2d, unfuse
from robustdm.runs.config import TrainConfig
from robustdm.runs.presets import preset_values
from robustdm.training.optimizer import SkippingAdamW
from robustdm.training.trainer import Trainer

SCHEMA = "robustdm-step-1"
MINUTES = {"cpu": 15.0, "cuda": 8.0}
BATCH = {"cifar": 128, "celeba64": 64, "lsun256": 16, "tiny": 16, "digits": 64}
TINY = dict(data="images", resolution=32, block_channels=(64, 128, 128), layers_per_block=2,
            attention_resolutions=(16,), norm_groups=32, lr=2e-4, warmup_steps=0, dropout=0.1)
SMALLEST = dict(data="images", resolution=8, block_channels=(8,), norm_groups=4, warmup_steps=0,
                dropout=0.1)
OBJECTIVES = ("ddpm", "robust_ran", "robust_adv")
BY_VALUE = ("robust_adv", "ddpm", "robust_ran")  # the order in which a row's are made
PAPER, STRICT, REFERENCE = "paper's loop, fp32", "paper's loop, no TF32", "our loop, fp32"
# Relative error of the whole gradient, and share of the elements where attacks agree. TF32 rounds
# the operands of a convolution to 10 bits: emulated on a CPU, robust_adv's gradient moves by 7e-3.
LIMITS = {"fp32": (1e-3, 0.999), "tf32": (2e-2, 0.995), "bf16": (0.1, 0.97)}
OVERLAY_LIMIT = 0.03  # of the loss
GRAPHS = 64  # that a process may compile of a step: dynamo's 8 are fewer than the rows need
FEWEST = 3  # rounds, whatever the time
COMPILING = 0.6  # share of the time after which nothing more is compiled


@dataclass(frozen=True)
class Options:
    """What a row of the ladder switches on."""

    paper: bool = False
    defaults: bool = False  # TF32 as torch sets it: in convolutions, not in matrix products
    tf32: bool = False
    channels_last: bool = False
    bf16: bool = False
    allocator: bool = False
    elementwise: bool = False
    norms: bool = False
    optimizer: bool = False
    compile: bool = False
    graph: bool = False
    attention: str = "auto"
    without: str = ""  # a default that is switched off: one of TOGGLES, or SEARCH
    # Fields of TrainConfig: an approximation.
    fields: tuple[tuple[str, float | str], ...] = ()

    @property
    def precision(self) -> str:
        return "bf16" if self.bf16 else "fp32"

    @property
    def limits(self) -> tuple[float, float]:
        """What the row's gradient and attack are held to, against strict float32."""
        return LIMITS["bf16" if self.bf16 else "tf32" if self.tf32 else "fp32"]

    @property
    def weights(self) -> Options:
        """The options that decide the trainer: a CUDA graph only wraps a step."""
        return replace(self, graph=False)

    @property
    def searches(self) -> bool:
        """Whether cuDNN times its algorithms; torch's default is not to."""
        return not self.paper and self.without != SEARCH


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        section: "ladder", "variants", "leave one out" or "approximations".
        objectives: those that it is timed for.
    """

    section: str
    name: str
    options: Options
    objectives: tuple[str, ...] = OBJECTIVES


NAMES = {
    "tf32": "TF32", "channels_last": "channels-last", "bf16": "bf16 weights",
    "allocator": "memory kept", "elementwise": "elementwise ops", "norms": "GroupNorm ops",
    "optimizer": "adamw_ema", "compile": "whole step compiled", "graph": "CUDA graph",
}


SEARCH = "cudnn.benchmark"


def _unpad(network: torch.nn.Module) -> None:
    for module in network.modules():
        if type(module) is PaddedConv2d and module.out_channels % 8:
            module.pad = False


def _unfold(network: torch.nn.Module) -> None:
    for module in network.modules():
        if type(module) is FusedResnetBlock2D:
            module.fold_bias = False


# What a variant changes in the fused network.
TOGGLES: dict[str, Callable[[torch.nn.Module], None]] = {
    "padded conv_out": _unpad, "folded conv1 bias": _unfold,
}


def rows(device: str) -> list[Row]:
    """The ladder, then variants of its last row, single steps left out, and approximations.

    On a CPU what is compiled is the last row of the ladder alone: a compilation takes a minute, and
    the other rows are compared without.
    """
    gpu = device == "cuda"
    climbed = [n for n in NAMES if n not in (("allocator",) if gpu else ("tf32", "graph"))]
    made = [Row("ladder", PAPER, Options(paper=True, defaults=True)),
            Row("ladder", REFERENCE, Options())]
    if gpu:
        made.insert(1, Row("ladder", STRICT, Options(paper=True)))
    options, last = Options(), Options()
    for name in climbed:
        options = replace(options, **{name: True})
        made.append(Row("ladder", f"+ {NAMES[name]}", options))
        if gpu or name != "compile":
            last = options
    adversarial = ("robust_adv",)
    made.append(Row("variants", "xformers", replace(last, attention="xformers"), adversarial))
    if gpu:
        made.append(Row("variants", "xformers, not compiled",
                        replace(last, attention="xformers", compile=False, graph=False),
                        adversarial))
    for name in (SEARCH, *TOGGLES) if gpu else ():
        made.append(Row("variants", f"no {name}", replace(last, without=name), adversarial))
    both = ("ddpm", "robust_adv")
    for name in climbed:
        # Kept memory can't be left out of a process; the row without a graph is in the ladder.
        if getattr(last, name) and name not in ("tf32", "allocator", "graph"):
            made.append(Row("leave one out", f"all but {NAMES[name]}",
                            replace(last, **{name: False}), both))
    for fields in (dict(reg_fraction=0.5), dict(reg_fraction=0.25), dict(reg_every=4),
                   dict(attack_fraction=0.5), dict(objective="outward_ran")):
        ((key, value),) = fields.items()
        label = value if key == "objective" else f"{key} {value}"
        made.append(Row("approximations", str(label), replace(last, fields=((key, value),)),
                        ("robust_adv",)))
    return made


def groups(chosen: list[Row], gpu: bool) -> list[list[Row]]:
    """Rows in the order in which they are made and timed, those that decide first.

    On a GPU the trainers and graphs of a group are freed before the next one's are made. On a CPU,
    whose speed drifts more, all rows are timed in turns.
    """
    ladder = [r for r in chosen if r.section == "ladder"]
    compiled = [r for r in ladder if r.options.compile]
    # The most complete row, which is the headline, before what it is compared with inside.
    first = [r for r in ladder if r.name in (PAPER, REFERENCE)] + compiled[::-1]
    parts = [first, [r for r in ladder if r not in first],
             *([r for r in chosen if r.section == section]
               for section in ("variants", "leave one out", "approximations"))]
    parts = [part for part in parts if part]
    return parts if gpu else [[row for part in parts for row in part]]


class Ladder(Trainer):
    """A trainer that can leave out what is on by default."""

    def __init__(self, config: TrainConfig, data, options: Options):
        super().__init__(config, data)
        self.options = options
        if not options.norms:
            for network in (self.model, self.network, *(e.model for e in self.emas)):
                unfuse(network)
        if options.without in TOGGLES:
            TOGGLES[options.without](self.network)
        if not options.channels_last:
            for network in (self.model, self.network, *(e.model for e in self.emas)):
                network.to(memory_format=torch.contiguous_format)
        if not options.optimizer:
            copies = [] if self.network is self.model else list(self.network.parameters())
            self.optimizer = SkippingAdamW(self.model, config.lr, config.weight_decay,
                                           self.emas, copies, "torch")
        self.steps: dict[str, GradientStep] = {}
        self.compiled: dict[str, dict] = {}

    def use(self, name: str, graph: bool = False) -> None:
        """Train with another objective, on the same weights; ``graph`` replays it as one."""
        if name not in self.steps:
            config, old = self.config, self.objective
            objective = Objective(
                name, old.schedule, old.perturbation,
                backend="auto" if self.options.elementwise else "torch",
                reg_fraction=config.reg_fraction, reg_every=config.reg_every,
                attack_fraction=config.attack_fraction,
            )
            self.steps[name] = GradientStep(self.network, objective)
        self.gradient_step = self.steps[name]
        self.objective = self.gradient_step.objective
        if graph and not hasattr(self.gradient_step, "graph"):
            self.use_cuda_graph(_raise)
            self.gradient_step.graph = self._graph
        self._graph = self.gradient_step.graph if graph else None

    def _laid_out(self, x0):
        if isinstance(x0, Tensor) and not self.options.channels_last:
            return x0.contiguous()
        return super()._laid_out(x0)


def _raise(reason: str) -> None:
    raise RunError(reason)


@dataclass(frozen=True)
class Task:
    """What is trained, and where."""

    model: str
    batch: int
    device: str
    tiny: bool = False

    def config(self, options: Options) -> TrainConfig:
        names = {"cifar": "cifar10"}
        fields = SMALLEST if self.tiny else TINY if self.model == "tiny" else preset_values(
            names.get(self.model, self.model))
        given = dict(options.fields)
        given.pop("objective", None)
        return TrainConfig.from_dict({
            **fields, "batch_size": self.batch, "accumulate": 1, "holdout": 0.0,
            "cudnn_benchmark": options.searches,
            "precision": options.precision, "device": self.device, "objective": "robust_adv",
            "warmup_steps": 0, "attention": options.attention, **given,
        })

    def data(self, config: TrainConfig) -> ImageTensor:
        """Random images, held where the network is."""
        channels = 1 if config.data == "digits" else 3
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(
            0, 256, (max(512, 2 * self.batch), channels, config.resolution, config.resolution),
            dtype=torch.uint8, generator=generator,
        )
        return ImageTensor("random", images, None, 0.0, 0)


class Bench:
    """Runs in a process of its own: builds rows, checks and times them.

    Args:
        keep: keep freed memory, see `robustdm.host.keep_freed_memory`.
    """

    def __init__(self, task: Task, keep: bool, threads: int):
        torch.set_num_threads(threads)
        if keep:
            keep_freed_memory()
        # Of its own: a compilation that finds the kernels of an earlier run takes no time.
        self._cache = tempfile.TemporaryDirectory()
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = self._cache.name
        torch._dynamo.config.recompile_limit = GRAPHS
        self.task = task
        self.built: dict[tuple[Options, str], object] = {}
        self.trainers: dict[Options, Ladder] = {}
        self.reference: dict[str, tuple[list[Tensor], Tensor | None]] = {}
        self.sensors = Sensors(torch.device(task.device))

    def build(self, options: Options, name: str) -> dict:
        """Make a row ready to run, and check it; returns what is known of it."""
        if options.paper:
            config, before = self.task.config(options), self._allocated()
            shape = self.task.data(config).shape
            model = build_model(config, shape).to(self.task.device)
            made = self.built[options, name] = paper_loop.PaperLoop(model, name, config.lr)
            made.held = self._allocated() - before
            return {"status": "ok", "parameters": sum(p.numel() for p in model.parameters())}
        trainer = self._trainer(options.weights)
        self._settings(options)  # a trainer has settings of its own
        trainer.use(name)
        if name in trainer.compiled:  # and checked: this row only wraps that step
            found = {k: v for k, v in trainer.compiled[name].items() if k != "compile_s"}
        else:
            found = {"status": "ok", **self._check(trainer, options, name)}
            if options.compile:
                try:
                    self._compile(trainer, options, found)
                except Exception:
                    del trainer.steps[name]  # the next row that shares it compiles and checks it
                    raise
                trainer.compiled[name] = found
        self.built[options, name] = trainer
        return dict(found)

    def _compile(self, trainer: Ladder, options: Options, found: dict) -> None:
        eager = self._gradient(trainer)
        before, begin = counters["stats"]["unique_graphs"], time.perf_counter()
        trainer.gradient_step.compile()
        for kind in {trainer.objective.regularises(s) for s in range(8)}:
            trainer.probe(self._batch(trainer), [kind])
        found["compile_s"] = time.perf_counter() - begin
        found["graphs"] = counters["stats"]["unique_graphs"] - before
        found["compiled_error"] = _error(self._gradient(trainer), eager)
        if not found["compiled_error"] <= options.limits[0]:
            found["status"] = "WRONG"

    def _trainer(self, options: Options) -> Ladder:
        if options not in self.trainers:
            before = self._allocated()
            config = self.task.config(options)
            made = self.trainers[options] = Ladder(config, self.task.data(config), options)
            made.held = self._allocated() - before
        return self.trainers[options]

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated() if self.task.device == "cuda" else 0

    def drop(self) -> None:
        """Free the rows that were built, so that the next ones find the memory empty."""
        self.built.clear()
        self.trainers.clear()
        gc.collect()
        if self.task.device == "cuda":
            torch.cuda.empty_cache()

    def _settings(self, options: Options) -> None:
        torch.backends.cudnn.benchmark = options.searches
        torch.backends.cudnn.allow_tf32 = options.tf32 or options.defaults
        torch.backends.cuda.matmul.allow_tf32 = options.tf32

    def _batch(self, trainer: Ladder) -> Tensor:
        if not hasattr(trainer, "fixed"):
            trainer.fixed = next(batches(trainer.data, trainer.config, 0, trainer.device))[0]
        return trainer.fixed

    # Checks.

    def _check(self, trainer: Ladder, options: Options, name: str) -> dict:
        # Without dropout: layers that are not fused draw other masks.
        trainer.network.eval()
        try:
            return self._check_in_eval(trainer, options, name)
        finally:
            trainer.network.train()

    def _check_in_eval(self, trainer: Ladder, options: Options, name: str) -> dict:
        if options == Options():
            self.reference[name] = self._gradient(trainer), self._delta(trainer)
            return {"error": 0.0, "agreement": 1.0}
        if name not in self.reference:
            self._exact(name)
            self._settings(options)
        found = {"error": _error(self._gradient(trainer), self.reference[name][0])}
        delta, wanted = self._delta(trainer), self.reference[name][1]
        if delta is not None and wanted is not None:
            found["agreement"] = (
                (delta.sign() == wanted[: len(delta)].sign()).double().mean().item())
        most, least = options.limits
        exact = not options.fields  # an approximation has other gradients
        if exact and not (found["error"] <= most and found.get("agreement", 1.0) >= least):
            found["status"] = "WRONG"
        return found

    def _exact(self, name: str) -> None:
        """The reference of a process that does not time it."""
        options = Options()
        config = self.task.config(options)
        trainer = Ladder(config, self.task.data(config), options)
        self._settings(options)
        trainer.use(name)
        self._check(trainer, options, name)

    def _gradient(self, trainer: Ladder) -> list[Tensor]:
        x0 = trainer._laid_out(self._batch(trainer))
        return trainer.gradient_step(x0, trainer._key(0)).weights

    def _delta(self, trainer: Ladder) -> Tensor | None:
        x0 = trainer._laid_out(self._batch(trainer))
        draw = trainer.objective.draw_from(x0, trainer._key(0))
        delta = trainer.objective(trainer.network, x0, draw).delta
        return None if delta is None else delta.detach().float()

    # Times.

    def time(self, options: Options, name: str, steps: int) -> dict:
        """Milliseconds of a step, from ``steps`` of them; on a GPU joules, and what throttled it
        behind the last."""
        self._settings(options)
        run = self._stepper(options, name)
        before = self.sensors.read().get("joules")
        self._wait()
        begin = time.perf_counter()
        for _ in range(steps):
            run()
        self._wait()
        found = {"ms": (time.perf_counter() - begin) / steps * 1e3}
        after = self.sensors.read()
        if before is not None and "joules" in after:
            found["joules"] = (after["joules"] - before) / steps
        if after:
            found["throttled"] = after["throttled"]
        return found

    def memory(self, options: Options, name: str) -> dict:
        """MiB that a row takes on a GPU: what its trainer holds, and what its first steps add, a
        graph's pool included. Call it before the row's first step."""
        if self.task.device != "cuda":
            return {}
        self._settings(options)
        run = self._stepper(options, name)
        before = self._allocated()
        torch.cuda.reset_peak_memory_stats()
        for _ in range(3):  # warm-up, capture, replay
            run()
        self._wait()
        held = self.built[options, name].held
        return {"peak_mib": (held + torch.cuda.max_memory_allocated() - before) / 2**20}

    def _stepper(self, options: Options, name: str):
        built = self.built[options, name]
        if isinstance(built, paper_loop.PaperLoop):
            config = self.task.config(options)
            x0 = next(batches(self.task.data(config), config, 0, self.task.device))[0]
            x0 = x0.contiguous()
            return lambda: built.step(x0)
        built.use(name, options.graph)
        x0 = self._batch(built)
        return lambda: built.train_step(x0)

    def _wait(self) -> None:
        if self.task.device == "cuda":
            torch.cuda.synchronize()

    def recompiled(self) -> int:
        """Graphs that this process has compiled so far."""
        return counters["stats"]["unique_graphs"]

    def flops(self) -> float:
        """Floating-point operations of one pass through the network for one sample."""
        from torch.utils.flop_counter import FlopCounterMode

        config = self.task.config(Options())
        shape = self.task.data(config).shape
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            model = build_model(config, shape)
            model(torch.empty(1, *shape), torch.zeros(1, dtype=torch.int64))
        return float(counter.get_total_flops())

    def overlay(self, options: Options, steps: int) -> dict:
        """Losses of ``steps`` adversarial steps, of a row and of float32 with the same masks."""
        curves = []
        for each in (Options(norms=options.norms), options):
            config = self.task.config(each)
            trainer = Ladder(config, self.task.data(config), each)
            self._settings(each)
            trainer.use("robust_adv")
            if each.compile:
                trainer.gradient_step.compile()
            stream, losses = batches(trainer.data, config, 0, trainer.device), []
            for _ in range(steps):
                trainer.train_step(next(stream)[0])
                losses.append(trainer.window().get("loss"))
            curves.append(losses)
        # A few timesteps near 0 outweigh all others in a mean of losses: compare step by step.
        last = list(zip(*curves, strict=True))[-max(1, steps // 4):]
        return {"steps": steps, "reference": curves[0], "fastest": curves[1],
                "difference": statistics.median(b / a for a, b in last) - 1}

    def feeding(self, options: Options, steps: int) -> dict:
        """Ratio of the time of a step fed by the training stream to that with a batch at hand: of
        medians over ``steps`` each, in random order."""
        self._settings(options)
        trainer = self.built[options, "robust_adv"]
        trainer.use("robust_adv", options.graph)
        fixed, times = self._batch(trainer), {"stream": [], "fixed": []}
        stream = batches(trainer.data, trainer.config, 0, trainer.device)
        for kind in random.sample(["stream", "fixed"] * (steps + 2), 2 * (steps + 2)):
            self._wait()
            begin = time.perf_counter()
            trainer.train_step(next(stream)[0] if kind == "stream" else fixed)
            self._wait()
            times[kind].append((time.perf_counter() - begin) * 1e3)
        found = {kind: spread(values[2:]) for kind, values in times.items()}
        return {"ratio": found["stream"]["ms"] / found["fixed"]["ms"], **found}


def _error(got: list[Tensor], exact: list[Tensor]) -> float:
    """Relative error of a whole gradient."""
    squared = sum((g - e).double().square().sum() for g, e in zip(got, exact, strict=True))
    return float((squared / sum(e.double().square().sum() for e in exact)).sqrt())


def serve(pipe, *arguments) -> None:
    """The process of a `Bench`: calls come in and answers go out."""
    bench = None
    while True:
        name, args = pipe.recv()
        if name == "quit":
            return
        try:
            if bench is None:
                bench = Bench(*arguments)
            pipe.send(("ok", getattr(bench, name)(*args)))
        except Exception as error:
            status = "error" if _gpu_answers() else "fatal"
            pipe.send((status, one_line(error)))


def _gpu_answers() -> bool:
    """Whether this process can go on: an illegal access, say, ends its use of a GPU for good."""
    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except Exception:
        return False
    return True


@dataclass
class Worker:
    """A `Bench` at the other end of a pipe; a call waits for its answer."""

    task: Task
    keep: bool
    process: object = field(init=False)
    starts: int = field(init=False, default=0)

    def __post_init__(self):
        self._start()

    def _start(self) -> None:
        self.starts += 1
        context = get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(
            target=serve, args=(other, self.task, self.keep, torch.get_num_threads()), daemon=True)
        self.process.start()

    def __call__(self, name: str, *args):
        try:
            self.pipe.send((name, args))
            status, answer = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join(5)
            code = self.process.exitcode
            self._start()
            raise RunError(f"its process ended with exit code {code}, killed for memory?") from None
        if status == "fatal":
            self.process.terminate()
            self.process.join(20)
            self._start()
        if status != "ok":
            raise RunError(answer)
        return answer

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.pipe.send(("quit", ()))
        self.process.join(20)


# The suite.


def make_task(config, device: torch.device) -> Task:
    """What to train.

    Raises:
        UsageError: for an unknown model or a batch below 1.
    """
    name = config.model or ("cifar" if device.type == "cuda" else "tiny")
    if name not in BATCH:
        raise UsageError(f"model is {name!r}: choose one of {', '.join(BATCH)}")
    batch = config.batch if config.batch is not None else 4 if config.tiny else BATCH[name]
    if batch < 1:
        raise UsageError(f"batch is {batch}: it must be at least 1")
    return Task(name, batch, device.type, config.tiny)


def select(config, device: torch.device) -> list[Row]:
    """The rows whose name holds ``--only``, and the two that all are compared with."""
    found = rows(device.type)
    return [r for r in found if config.only in r.name or r.name in (PAPER, REFERENCE)]


def names(config, device: torch.device) -> list[str]:
    """What ``--list`` prints."""
    return [f"{row.section}: {row.name}" for row in select(config, device)]


def run(
    config, device: torch.device, head: dict, save: Callable[[dict], None] = lambda record: None
) -> dict:
    """Check every row, then time those that are right, in turn.

    A row that raises is FAILED and costs no other row; so is one whose process is killed.

    Args:
        config: a ``BenchmarkConfig``.
        head: what the record begins with.
        save: called with the record after every row, and after every round of times.

    Returns:
        The record, JSON-able: one row per line of the ladder and objective, with status "ok",
        "WRONG", "FAILED" or "off", and for "ok" ms (median), p20, p80, samples.
    """
    begin = time.perf_counter()
    seconds = 60 * (config.minutes or MINUTES[device.type])
    task, chosen = make_task(config, device), select(config, device)
    gpu = device.type == "cuda"
    # Freed memory is kept for good, and so are the algorithms that cuDNN has once found, searched
    # for or not: rows with and without have a process each, started when it's needed.
    workers: dict[bool, Worker] = {}

    def worker_of(options: Options) -> Worker:
        kind = not options.searches if gpu else options.allocator
        if kind not in workers:
            workers[kind] = Worker(task, kind and not gpu)
        return workers[kind]

    record = {"schema": SCHEMA, **head, "model": task.model, "batch": task.batch,
              "tiny": task.tiny, "rows": [], "failed": []}
    places = {(row.section, row.name): i for i, row in enumerate(chosen)}

    def keep_record() -> None:
        record["rows"].sort(key=lambda r: (places[r["section"], r["name"]],
                                           OBJECTIVES.index(r["objective"])))
        record["parameters"] = next(
            (r["parameters"] for r in record["rows"] if "parameters" in r), None)
        record["load_after"] = os.getloadavg()[0]
        record["seconds"] = time.perf_counter() - begin
        derive(record)
        save(record)

    def attempt(what: str, worker: Worker, *args) -> object:
        try:
            return worker(what, *args)
        except RunError as error:
            record["failed"].append(f"{what}: {error}")
            return None

    try:
        record["flops"] = attempt("flops", worker_of(Options()))
        parts = groups(chosen, gpu)
        for number, part in enumerate(parts, 1):
            end = begin + seconds * number / len(parts)
            timed = []
            for row in part:
                worker = worker_of(row.options)
                for name in sorted(row.objectives, key=BY_VALUE.index):
                    late = time.perf_counter() > begin + COMPILING * (end - begin)
                    entry, shown = _build(row, name, worker, config, late, begin)
                    record["rows"].append(entry)
                    keep_record()
                    if entry["status"] == "ok":
                        timed.append((entry, worker, row.options, shown, worker.starts))
            before = {keep: attempt("recompiled", w) for keep, w in workers.items()}
            for _ in _time(timed, config, end):
                keep_record()
            for keep, worker in workers.items():
                after = attempt("recompiled", worker)
                for entry, other, options, *_ in timed:
                    if other is worker and options.compile and None not in (after, before[keep]):
                        entry["recompiles"] = after - before[keep]
            if number == 1:
                _train(record, timed, config, task, attempt, begin)
            keep_record()
            if number < len(parts):
                for worker in workers.values():
                    attempt("drop", worker)
    finally:
        for worker in workers.values():
            worker.close()
    keep_record()
    return record


def _build(
    row: Row, name: str, worker: Worker, config, late: bool, begin: float
) -> tuple[dict, str]:
    """The entry of a row and objective, built and checked, and the objective that it trains."""
    entry = {"section": row.section, "name": row.name, "objective": name,
             "precision": row.options.precision, "compile": row.options.compile,
             "fields": dict(row.options.fields)}
    shown = dict(row.options.fields).get("objective", name)
    print(f"[{time.perf_counter() - begin:4.0f} s] {row.name}, {shown}", flush=True)
    if missing := _missing(row.options, worker.task):
        return entry | {"status": "off", "reason": missing}, shown
    if row.options.compile and (late or not config.compile):
        return entry | {"status": "off", "reason": "no time left to compile"
                        if late else "--no-compile"}, shown
    try:
        entry |= worker("build", row.options, shown)
        entry |= worker("memory", row.options, shown)
    except RunError as error:
        entry |= {"status": "FAILED", "reason": str(error)}
    return entry, shown


def _missing(options: Options, task: Task) -> str | None:
    """Why a row cannot run here."""
    if options.compile and not options.norms and task.config(options).dropout > 0:
        return "without the GroupNorm ops the passes of a compiled step cannot share dropout masks"
    if options.attention != "xformers":
        return None
    if task.device != "cuda":
        return "xformers needs a GPU"
    return None if find_spec("xformers") else "xformers is not installed"


def _train(record, timed, config, task: Task, attempt, begin: float) -> None:
    """Compare the fastest exact row's losses, and its feeding, with what they should be."""
    fastest = [(e, w, o) for e, w, o, n, _ in timed if n == "robust_adv" and not o.fields
               and not o.paper and e["section"] == "ladder" and "ms" in e]
    if not fastest or config.steps == 0:
        return
    entry, worker, options = min(fastest, key=lambda found: found[0]["ms"])
    count = config.steps or (4 if task.tiny else 30 if task.model == "tiny" else 200)
    feeding = attempt("feeding", worker, options, min(100, count))
    print(f"[{time.perf_counter() - begin:4.0f} s] {count} steps of training", flush=True)
    overlay = attempt("overlay", worker, options, count)
    if feeding is not None:
        record["feeding"] = feeding
    if overlay is not None:
        record["overlay"] = {"row": entry["name"], **overlay}


def _time(timed: list[tuple], config, end: float) -> Iterator[None]:
    """Time in rounds, each in another order, so that a disturbance hits all alike.

    Entries get their medians after every round; one that raises is FAILED.
    """
    samples: dict[int, list[dict]] = {}

    def call(i: int, steps: int) -> dict | None:
        entry, worker, options, name, start = timed[i]
        if worker.starts != start and "ms" in entry:  # it has a median of earlier rounds
            return None
        try:
            if worker.starts != start:
                raise RunError("its process ended while another row was timed")
            return worker("time", options, name, steps)
        except RunError as error:
            entry.update(status="FAILED", reason=str(error))
            for key in ("ms", "p20", "p80", "samples"):
                entry.pop(key, None)
            return None

    counts = {}
    for i, (entry, _, options, name, _) in enumerate(timed):  # two, of which the first warms up
        print(f"warming up {entry['name']}, {name}", flush=True)
        if call(i, 4 if options.graph else 1) is None or (once := call(i, 1)) is None:
            continue
        every = dict(options.fields).get("reg_every", 1)  # whole periods
        counts[i] = every * (1 if config.tiny else max(1, round(250 / once["ms"] / every)))
        samples[i] = []
    longest = 0.0
    for done in range(config.repeats):
        started = time.perf_counter()
        if done >= FEWEST and started + longest > end:
            break
        for i in random.sample(sorted(samples), len(samples)):
            found = call(i, counts[i])
            if found is None:
                del samples[i]
            else:
                samples[i].append(found)
        for i, found in samples.items():
            entry = timed[i][0]
            entry.update(spread([f["ms"] for f in found]))
            if "joules" in found[0]:
                entry["joules"] = statistics.median(f["joules"] for f in found)
            if "throttled" in found[0]:
                known = [f["throttled"] for f in found if f["throttled"] is not None]
                entry["throttled"] = sorted({*sum(known, [])}) if known else None
        longest = max(longest, time.perf_counter() - started)
        yield


# What the numbers come to.


def derive(record: dict) -> None:
    """Add img/s, TFLOP/s and the ratios to both denominators to the rows, and the targets."""
    rows = [r for r in record["rows"] if "ms" in r]
    times = {(r["section"], r["name"], r["objective"]): r["ms"] for r in rows}
    paper = times.get(("ladder", PAPER, "ddpm"))
    paper_at = times.get(("ladder", PAPER, "robust_adv"))
    # The approximations' own DDPM: the last row of the ladder that is compiled as they are.
    ladder = {r["compile"]: r["ms"] for r in rows
              if r["section"] == "ladder" and r["objective"] == "ddpm"
              and r["name"] not in (PAPER, STRICT)}
    for row in rows:
        row["img_per_s"] = record["batch"] / row["ms"] * 1e3
        own = times.get((row["section"], row["name"], "ddpm")) or ladder.get(row["compile"])
        for key, base in (("vs_own_ddpm", own), ("vs_paper_ddpm", paper)):
            if base:
                row[key] = row["ms"] / base
        if paper_at and row["objective"] == "robust_adv":
            row["faster_than_paper"] = paper_at / row["ms"]
        objective = row["fields"].get("objective", row["objective"])
        options = {k: v for k, v in row["fields"].items() if k != "objective"}
        row["units"] = Objective(objective, NoiseSchedule.linear(1000), **options).units()
        if record["flops"]:
            row["tflops"] = record["flops"] * record["batch"] * row["units"] / row["ms"] / 1e9
        if "joules" in row:
            row["joules_per_image"] = row["joules"] / record["batch"]
    record["targets"] = targets(record)


def targets(record: dict) -> list[dict]:
    """The numbers that the step is held to, as far as this machine can tell."""
    rows = [r for r in record["rows"] if "ms" in r and r["section"] == "ladder"]
    exact = [r for r in rows if r["objective"] == "robust_adv"
             and r["name"] not in (PAPER, STRICT)]
    found = []

    def target(text: str, value: float | None, limit: float, at_most: bool) -> None:
        if value is not None:
            reached = value <= limit if at_most else value >= limit
            found.append({"text": text, "value": value, "limit": limit, "at_most": at_most,
                          "reached": bool(reached)})

    paper = next((r for r in rows if r["name"] == PAPER and r["objective"] == "robust_adv"), None)
    if paper:
        target("the paper's loop: robust_adv / DDPM (the paper says 2.5)",
               paper.get("vs_own_ddpm"), 2.9, True)
    if exact:
        best = min(exact, key=lambda r: r["ms"])
        gpu = record["device"] == "cuda"
        target(f"{best['name']}: times faster than the paper-style robust_adv",
               best.get("faster_than_paper"), 3.5 if gpu else 2.0, False)
        target(f"{best['name']}: robust_adv / own DDPM", best.get("vs_own_ddpm"),
               2.7 if gpu else 2.9, True)
        if gpu:
            target(f"{best['name']}: robust_adv / paper-style DDPM", best.get("vs_paper_ddpm"),
                   0.64, True)
    for row in record["rows"]:
        if row["fields"].get("reg_fraction") == 0.25 and record["device"] == "cuda":
            target("reg_fraction 0.25 / own DDPM", row.get("vs_own_ddpm"), 1.45, True)
        if row.get("compile_s") and row["objective"] == "robust_adv":
            target(f"{row['name']}: seconds to compile", row["compile_s"],
                   90 if record["device"] == "cuda" else 180, True)
    if "feeding" in record:
        target("step fed by the training stream / step with a batch at hand",
               record["feeding"]["ratio"], 1.02, True)
    if "overlay" in record:
        target(f"loss after {record['overlay']['steps']} steps against fp32's, |difference|",
               abs(record["overlay"]["difference"]), OVERLAY_LIMIT, True)
    return found


def failures(record: dict) -> list[str]:
    """Rows whose gradient or attack was wrong, or that raised."""
    wrong = [
        f"{row['name']}, {row['objective']}: {row['status']} "
        + (row.get("reason") or f"error {row.get('compiled_error', row.get('error'))}, agreement "
           f"{row.get('agreement')}")
        for row in record["rows"] if row["status"] in ("WRONG", "FAILED")
    ]
    wrong += record.get("failed", [])
    if not any("ms" in row for row in record["rows"]):
        wrong.append("nothing was measured")
    overlay = record.get("overlay")
    if overlay and not abs(overlay["difference"]) <= OVERLAY_LIMIT:
        wrong.append(f"{overlay['row']}: the loss leaves that of float32 by "
                     f"{overlay['difference']:+.1%} in {overlay['steps']} steps")
    return wrong


def table(record: dict) -> tuple[list[str], list[list[str]]]:
    """The columns and cells of the table, a line per row; a wrong result shows no speed."""
    gpu = record["device"] == "cuda"
    columns = ["row", "ddpm ms", "ran ms", "adv ms", "p20-p80", "adv img/s", "adv / own ddpm",
               "adv / paper's ddpm", "x paper's adv", "TFLOP/s", *(("MiB", "J/img") if gpu else ()),
               "compile s", "recompiles", "grad error", "agreement"]
    lines = []
    for section, name in dict.fromkeys((r["section"], r["name"]) for r in record["rows"]):
        mine = {r["objective"]: r for r in record["rows"]
                if (r["section"], r["name"]) == (section, name)}
        row = mine.get("robust_adv") or {"status": "off", "fields": {}}
        if all(r["status"] == "off" for r in mine.values()):
            continue

        def ms(objective: str, mine=mine) -> str:
            found = mine.get(objective)
            if found is None:
                return ""
            return f"{found['ms']:.4g}" if found["status"] == "ok" else found["status"]

        def number(key: str, form: str, row=row) -> str:
            shown = row["status"] == "ok" or key in ("error", "agreement")
            return form.format(row[key]) if shown and row.get(key) is not None else ""

        lines.append([
            name, *map(ms, OBJECTIVES), number("p20", "{:.4g}-") + number("p80", "{:.4g}"),
            number("img_per_s", "{:.4g}"), number("vs_own_ddpm", "{:.2f}"),
            number("vs_paper_ddpm", "{:.2f}"), number("faster_than_paper", "{:.2f}"),
            number("tflops", "{:.3g}"),
            *((number("peak_mib", "{:.0f}"), number("joules_per_image", "{:.3g}")) if gpu else ()),
            number("compile_s", "{:.0f}"), number("recompiles", "{}"),
            # Of an approximation they say nothing: its gradient is another.
            *(("", "") if row["fields"] else
              (number("error", "{:.1e}"), number("agreement", "{:.4f}"))),
        ])
    return columns, lines


def print_record(record: dict) -> None:
    """The table, the targets, and all that was wrong or is off."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=170)
    columns, lines = table(record)
    made = Table(show_edge=False, pad_edge=False)
    for i, name in enumerate(columns):
        made.add_column(name, justify="left" if i == 0 else "right", overflow="fold")
    sections = {r["name"]: r["section"] for r in record["rows"]}
    for line, after in zip(lines, [*lines[1:], None], strict=True):
        wrong = next((STYLES[cell] for cell in line if cell in STYLES), "")
        last = after is not None and sections[after[0]] != sections[line[0]]
        made.add_row(*line, style=wrong, end_section=last)
    console.print(made)
    where = record["gpu"] or (
        f"{record['cpu']}, {record['threads']} threads on {record['cores']} cores")
    console.print(
        f"{where}; {record['model']}, {(record['parameters'] or 0) / 1e6:.2f} M weights, batch "
        f"{record['batch']}; torch {record['versions']['torch']}; load {record['load_before']:.1f} "
        f"before, {record['load_after']:.1f} after; {record['seconds']:.0f} s", highlight=False)
    if record["load_before"] > BUSY * record["cores"]:
        console.print(f"the machine was busy before this began (load {record['load_before']:.1f} "
                      f"on {record['cores']} cores): repeat it on an idle one", style="bold yellow",
                      highlight=False)
    for t in record["targets"]:
        sign, verdict = "<=" if t["at_most"] else ">=", "reached" if t["reached"] else "MISSED"
        console.print(f"{verdict:8}{t['text']}: {t['value']:.3g} ({sign} {t['limit']})",
                      highlight=False)
    reasons = {(r["name"], r["reason"]) for r in record["rows"] if r["status"] == "off"}
    for name, reason in sorted(reasons):
        console.print(f"off: {name}: {reason}", style="dim", highlight=False)
    for text in failures(record):
        console.print(text, style="bold red", highlight=False)


def plot(record: dict, path: Path) -> None:
    """The losses of the reference and of the fastest row, one over the other."""
    from robustdm.reporting import plots

    overlay = record.get("overlay")
    if overlay is None:
        raise UsageError(f"plot is {path}, but --steps 0 leaves the loss curves out")
    made, axes = plots.figure(1, 1, size=(7.0, 3.6))
    ax = axes[0, 0]
    for key, label, width in (("reference", REFERENCE, 2.5), ("fastest", overlay["row"], 0.9)):
        ax.plot(overlay[key], label=label, linewidth=width)
    ax.set(xlabel="step", ylabel="loss of robust_adv", yscale="log")
    ax.legend()
    plots.save(made, path)


def markdown(path: Path) -> str:
    """The table of a record, for a page."""
    columns, lines = table(json.loads(path.read_text()))
    body = [columns, ["---"] + ["--:"] * (len(columns) - 1), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in body)


if __name__ == "__main__":
    print(markdown(Path(sys.argv[1])))
