"""The training loop, to be read from top to bottom: set up, step, write, finish."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from robustdm import __version__
from robustdm.data import batches
from robustdm.device import device_name, is_out_of_memory
from robustdm.distributed import Ranks, join, supervised
from robustdm.errors import RobustDMError, RunError, UsageError
from robustdm.host import Slowdown, keep_freed_memory, threads_restored
from robustdm.models.compilation import compile_network, compile_step
from robustdm.models.pretrained import settle
from robustdm.reporting.progress import Progress
from robustdm.runs.checkpoint import (
    clean_stale,
    load_newest,
    prune,
    save_checkpoint,
)
from robustdm.runs.config import TrainConfig
from robustdm.runs.rundir import RunDir, check_use, parse_json
from robustdm.training.auto import choose_objective
from robustdm.training.memory import (
    available_bytes,
    check_fits,
    estimate_bytes,
    finer_pieces,
)
from robustdm.training.outputs import Outputs
from robustdm.training.signals import SIGNALS, Stopped, StopSignals, exit_code
from robustdm.training.trackers import make_loggers
from robustdm.training.trainer import Trainer


@dataclass
class Result:
    """What a call of `train` did.

    Attributes:
        directory: the run directory.
        step: optimizer steps done in all.
        stopped: None if the run is complete, else why it stopped early.
        exit_code: what the process should end with.
        summary: the content of summary.json; empty if stopped by a signal, and on other ranks
            than 0.
    """

    directory: Path
    step: int
    stopped: str | None = None
    exit_code: int = 0
    summary: dict = field(default_factory=dict)


def train(config: TrainConfig, progress_mode: str = "auto") -> Result:
    """Train, or continue, the run that a configuration describes.

    Started by torchrun, each process does its part of every batch, and rank 0 writes.

    Args:
        config: the configuration; ``out`` is the run directory.
        progress_mode: "auto", "live", "plain" or "off"; see `Progress`.

    Raises:
        UsageError: for anything wrong with the configuration, the data or the directory.
        RunError: if the run cannot go on; what was saved before stays sound.

    Source: Briglia et al. 2026, Algorithm 1.
    """
    try:
        with threads_restored(), join(
                config.device, config.rank_timeout,
                "checkpoints are as they were, go on with --resume") as ranks:
            return _train(config, progress_mode if ranks.main else "off", ranks)
    except RuntimeError as error:
        if isinstance(error, RunError):
            raise
        if "DataLoader worker" in str(error):  # torch raises it wherever the main process is
            raise RunError(
                f"a data worker died ({' '.join(str(error).split())[:200]}): continue with "
                "--resume, with fewer --workers if memory was short"
            ) from error
        if not is_out_of_memory(error):
            raise
        finer = finer_pieces(config, int(os.environ.get("WORLD_SIZE", 1)))
        remedy = f"try --accumulate {finer[0]}, which gives the same result with less memory" if (
            finer) else "use a smaller network or a larger machine"
        raise RunError(
            f"out of memory at batch_size {config.batch_size} in {config.accumulate} pieces: "
            f"{remedy}"
        ) from error


def _train(config: TrainConfig, progress_mode: str, ranks: Ranks) -> Result:
    begun = f"begun{config.out.absolute()}"
    again = ranks.recall(begun)
    if again:  # this job has begun the run, before it failed: it goes on
        config = replace(config, resume=True)
    with ranks.together():
        config = settle(choose_objective(config, progress_mode != "off"))
        check_parts(config, ranks.size)
    ranks.same("what was asked for", _asked(config))
    with ranks.together():
        if ranks.main:  # before the data, which may take minutes
            check_use(config.out, config, config.resume)
    with ranks.together():
        trainer = Trainer(config, ranks=ranks)
        if trainer.device.type == "cpu":
            keep_freed_memory()
        estimate = estimate_bytes(config, trainer.data.shape, ranks.size)
        tight = check_fits(config, estimate, available_bytes(trainer.device), ranks.size)
        recorded, offered = config.threads, torch.get_num_threads()
        config = replace(config, threads=trainer.choose_threads())
        plan = describe(trainer, estimate)
        if config.threads != recorded > 0:
            plan += (f"\nwarning: threads is {recorded}: this machine offers {offered}; computing "
                     f"with {torch.get_num_threads()}, which rounds differently")
        if tight:
            plan += f"\nwarning: {tight}"
    ranks.same("the training data", trainer.data.identity())
    if config.dry_run:
        if ranks.main:
            print(plan)
        return Result(config.out, 0, "dry run")

    with contextlib.ExitStack() as open_things:
        signals = open_things.enter_context(StopSignals())
        run = None
        with ranks.together():
            if ranks.main:
                run = open_things.enter_context(RunDir.open(config.out, config, config.resume))
                clean_stale(run.checkpoints)
        with ranks.together():
            # Read into host memory and let go of: the device holds what the run itself needs.
            checkpoint = load_newest(config.out / "checkpoints") if config.resume else None
            if checkpoint is not None:
                trainer.restore(checkpoint)
            new = checkpoint is None
            del checkpoint
            finished = trainer.step >= config.steps and (
                _finished_step(config.out) == trainer.step)
            if finished and not again:
                raise UsageError(
                    f"the run in {config.out} has done its {trainer.step} steps: raise --steps to "
                    "extend it"
                )
        trainer.check_ranks()
        if finished:  # a rank died after its work was done
            return Result(config.out, trainer.step)
        progress = open_things.enter_context(
            Progress(config.steps, trainer.step, config.batch_size, mode=progress_mode)
        )
        with ranks.together():
            if run is not None:
                run.truncate_metrics(trainer.step)
                run.record(
                    config,
                    data=trainer.data.identity(),
                    parameters=trainer.parameters,
                    trained=trainer.trained,
                    memory_estimate=estimate,
                    ranks=ranks.size,
                )
                ranks.remember(begun)
                if new:
                    trainer.keep_origin(run.checkpoints)
                progress.message(plan)
                if config.resume:
                    progress.message(f"continuing {config.out} after step {trainer.step}")
            session = _Session(trainer, run, signals, progress)
            open_things.callback(session.close)
            if session.outputs is not None:
                session.outputs.write_first()
        with ranks.watched():
            return session.run()


def _asked(config: TrainConfig) -> dict:
    """What has to be the same on all ranks: all fields but paths, and versions."""
    paths = ("out", "data_dir", "corrupt_with", "init_from", "config")
    fields = {name: value for name, value in config.to_dict().items() if name not in paths}
    return fields | {"robustdm": __version__, "torch": torch.__version__}


def check_parts(config: TrainConfig, ranks: int) -> None:
    """Raise a UsageError unless the batch divides among the ranks and their pieces."""
    parts = ranks * config.accumulate
    if config.batch_size % parts:
        raise UsageError(
            f"batch_size is {config.batch_size}: it is that of all {ranks} ranks together, in "
            f"{config.accumulate} pieces each, and must be a multiple of {parts}"
        )


def _finished_step(path: Path) -> int | None:
    """The step that summary.json was written at; None if the run never got that far."""
    return _read_json(path / "summary.json").get("step")


def _read_json(path: Path) -> dict:
    try:
        found = parse_json(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


class _Interrupted(Exception):
    """A signal came while samples were drawn."""


class _Session:
    """One process's share of a run: the loop, and what is written while it turns.

    Only rank 0 has a directory to write to; what the others do is what all must do together.
    """

    def __init__(
        self, trainer: Trainer, run: RunDir | None, signals: StopSignals, progress: Progress
    ):
        self.trainer, self.run_dir, self.signals, self.progress = trainer, run, signals, progress
        self.config, self.ranks = trainer.config, trainer.ranks
        self.warnings: list[str] = []
        self.loggers = self.outputs = None
        if run is not None:
            self.loggers = make_loggers(self.config, run.path, trainer.step, progress.message)
            self.outputs = Outputs(trainer, run, self.loggers, self.warn)
        self.started = time.monotonic()
        self.before = trainer.elapsed
        self.first_step = trainer.step
        self.saved, self.saved_step = self.started, trainer.step
        self.compile_s: float | None = None
        self.waited = 0.0
        self.logged = self.started
        self.slowdown = Slowdown() if trainer.device.type == "cpu" else None
        # Waiting for a step's numbers would leave a GPU idle: they are read when it has got the
        # next step to do, and on every device alike.
        self.late: list[Callable[[], None]] = []
        self.wished: Callable[[], set] = set
        self.stop_signal: signal.Signals | None = None

    def warn(self, text: str) -> None:
        if text not in self.warnings:
            self.warnings.append(text)
            where = "" if self.ranks.main else f"rank {self.ranks.rank}: "
            self.progress.message(f"{where}warning: {text}")

    def _warn_of_slowdown(self, found: tuple[float, float] | None) -> None:
        if found is None:
            return
        now, best = found
        # Fewer threads round differently: a run resumed from before could not repeat the bits.
        remedy = "end them"
        if self.ranks.size == 1 and torch.get_num_threads() > 1:
            remedy += ", or stop this run and continue it with --resume --threads 1"
        self.warn(f"a step takes {now:.2g} s, {now / best:.1f} times as long as before "
                  f"({best:.2g} s): other processes use the cores; {remedy}")

    def close(self) -> None:
        if self.run_dir is not None:
            self.loggers.close()
            self.outputs.write_quarantine()

    def run(self) -> Result:
        trainer, config, every = self.trainer, self.config, self.config.log_every
        stream = batches(trainer.data, config, trainer.step, trainer.device, self.ranks)
        alone = self.ranks.size == 1
        if config.compile and trainer.step < config.steps and not (
                alone and self.signals.received):
            first = next(stream)
            # Minutes, in which there is nothing new that would have to be saved.
            with contextlib.suppress(Stopped), (
                    self.signals.raising() if alone else contextlib.nullcontext()):
                self._compile(first[0])
            stream = itertools.chain([first], stream)
        stopped = None
        if alone and self.signals.received:
            self.stop_signal = self.signals.received
            stopped = self.stop_signal.name
        self.progress.restart()
        self.logged = time.monotonic()
        while trainer.step < config.steps and stopped is None:
            begin = time.monotonic()
            x0, indices = next(stream)
            self.waited += time.monotonic() - begin
            begin, kind = time.monotonic(), trainer.objective.regularises(trainer.step)
            trainer.train_step(x0, self._wishes() if self.ranks.size > 1 else ())
            if self.slowdown is not None:
                self._warn_of_slowdown(self.slowdown.add(kind, time.monotonic() - begin))
            trainer.elapsed = self.before + time.monotonic() - self.started
            step, last = trainer.step, trainer.step == config.steps
            self._read_late()
            self._look_at_skips(indices)
            stopped, due = self._decide()
            sampled = bool(config.sample_every) and step % config.sample_every == 0 and not last
            if step % every == 0 or last or sampled or stopped:
                self._log(sampled)
            else:
                self.progress.update(step)
            due |= bool(config.checkpoint_every) and step % config.checkpoint_every == 0
            if due or last or sampled or stopped:
                self._read_late()
            if due or last or stopped:
                self._save(required=bool(last or stopped))
        result = Result(config.out, trainer.step, stopped)
        if self.stop_signal is None:
            try:
                result.summary = self._finish(complete=stopped is None)
            except _Interrupted:
                result.stopped = self.stop_signal.name
        if not supervised():  # else the run that was to stop would be started again
            result.exit_code = exit_code(self.stop_signal or self.signals.received)
        return result

    def _wishes(self) -> set:
        """What this process wants to happen; see `trainer.WISHES`."""
        config, now = self.config, time.monotonic()
        wishes = {self.signals.received} - {None}
        if self.ranks.main:  # clocks differ
            if config.max_time is not None and now - self.started > 60 * config.max_time:
                wishes.add("stop")
            if config.checkpoint_minutes and now - self.saved > 60 * config.checkpoint_minutes:
                wishes.add("save")
        return wishes

    def _decide(self) -> tuple[str | None, bool]:
        """Why to stop after this step, if so, and whether to save: the same on all ranks.

        Other ranks hear of a wish with the gradients of the step before, which are there by now.
        """
        if self.ranks.size == 1:
            known = self._wishes()
        else:
            known, self.wished = self.wished(), self.trainer.agreed()
        self.stop_signal = next((s for s in SIGNALS if s in known), None)
        config, done = self.config, self.trainer.step - self.first_step
        stopped = None
        if self.stop_signal is not None:
            stopped = self.stop_signal.name
        elif config.stop_after is not None and done >= config.stop_after:
            stopped = f"--stop-after {config.stop_after}"
        elif "stop" in known:
            stopped = f"--max-time {config.max_time}"
        # Known a step later, the wish of the step after a save was made before it.
        late = self.ranks.size > 1 and self.saved_step == self.trainer.step - 1
        return stopped, "save" in known and not late

    def _sample(self, sampler: str, steps: int, **settings) -> Tensor | None:
        """Samples for a preview or the report; a signal ends them between two steps.

        Returns:
            None on other ranks than 0.
        """
        shown = time.monotonic()

        def progress(done: int, total: int) -> None:
            nonlocal shown
            if any(self.trainer.parallel.agree(self.signals.received)):
                raise _Interrupted
            if time.monotonic() - shown > 10:
                shown = time.monotonic()
                self.progress.message(f"sampling: {done / total:.0%}")

        mine = None
        with contextlib.suppress(_Interrupted):
            mine = self.trainer.generate(sampler, steps, progress, **settings)
        received = self.ranks.exchange(self.signals.received)
        self.stop_signal = next((s for s in SIGNALS if s in received), None)
        if self.stop_signal is not None:
            raise _Interrupted
        samples = self.ranks.gather(mine)
        return None if samples is None else samples[: self.config.num_samples]

    def _read_late(self) -> None:
        """Read the numbers of the steps that nobody has waited for yet."""
        late, self.late = self.late, []
        for read in late:
            read()

    def _look_at_skips(self, indices: Tensor) -> None:
        """Say so, later, if the step just done was skipped, and end a run that skips all of them.

        Args:
            indices: of this rank's part of the batch.
        """
        step, skips = self.trainer.step, self.trainer.in_a_row()
        to_blame = self.trainer.to_blame(indices)

        def read() -> None:
            if in_a_row := skips():
                self._skipped(step, in_a_row, to_blame())

        self.late.append(read)

    def _skipped(self, step: int, in_a_row: int, items: list[str]) -> None:
        named = ", ".join(items[:16]) + (f" and {len(items) - 16} more" if items[16:] else "")
        if self.ranks.main:
            self.progress.message(f"warning: step {step} skipped: loss or gradient is not finite "
                                  f"({in_a_row} in a row), items {named}")
        if in_a_row >= self.config.max_skipped:
            with self.ranks.together():
                raise RunError(
                    f"{in_a_row} steps in a row gave a loss or gradient that is not finite, the "
                    f"last with the items {named}: look at these data, lower --lr, or set "
                    "--lambda-max; the weights were not touched, and checkpoints are kept in "
                    f"{self.config.out / 'checkpoints'}"
                )

    def _log(self, sampled: bool) -> None:
        """Write a line of metrics.jsonl, with samples if there are any; later."""
        trainer = self.trainer
        read = trainer.close_window()
        now = time.monotonic()
        extras: dict = {"data_wait": round(self.waited / max(now - self.logged, 1e-9), 4)}
        self.waited = 0.0
        if (rate := self.progress.img_per_s) is not None:
            extras["img_per_s"] = rate
        if sampled or trainer.step == self.config.steps:
            heldout = trainer.heldout_loss()
            if heldout is not None:
                extras["heldout_loss"] = heldout
        if sampled:
            with contextlib.suppress(_Interrupted):
                samples = self._sample("ddim", self.config.preview_steps)
                if samples is not None:
                    name = f"step-{trainer.step:08d}"
                    extras["samples"] = self.outputs.write_samples(samples, name)
        self.logged = time.monotonic()  # what samples take is not the data's
        self.late.append(lambda: self._write_line(read() | extras))

    def _write_line(self, record: dict) -> None:
        if self.run_dir is not None:
            self.run_dir.append_metrics(record)
            self.loggers.log(record["step"], record)
        shown = {k: record[k] for k in ("loss", "fit", "reg") if k in record}
        self.progress.update(self.trainer.step, shown)

    def _compile(self, x0: Tensor) -> None:
        """Compile for a batch of the stream: the whole step, else the network, else nothing."""
        trainer, config = self.trainer, self.config
        kinds = sorted({trainer.objective.regularises(s)
                        for s in range(trainer.step, config.steps)})
        graphs = "two graphs" if len(kinds) > 1 else "one graph"
        if self.ranks.main:
            self.progress.message(f"compiling the training step, {graphs}: minutes the first time, "
                                  "seconds from the cache ...")
        begin = time.monotonic()

        def probe() -> None:
            trainer.probe(x0, kinds)

        what, reason = "the training step", compile_step(trainer.gradient_step, probe)
        if reason is not None:
            self.warn(f"the step cannot be compiled as a whole ({reason}): compiling the network")
            what, reason = "the network", compile_network(trainer.network, probe)
        if reason is None:
            self.compile_s = time.monotonic() - begin
            if self.ranks.main:
                self.progress.message(f"compiled {what} in {self.compile_s:.0f} s")
        else:
            self.warn(f"--compile does not work here, running eagerly ({reason})")
        if config.cuda_graph and trainer.device.type == "cuda":
            trainer.use_cuda_graph(self.warn)

    def _save(self, required: bool) -> None:
        trainer = self.trainer
        # However it ends: where there is no room now, there is none in the next step.
        self.saved, self.saved_step = time.monotonic(), trainer.step
        trainer.check_ranks()
        with self.ranks.together():
            trainer.check_finite()
        with self.ranks.together() if required else contextlib.nullcontext():
            if self.run_dir is not None:
                try:
                    self._renew()
                    save_checkpoint(self.run_dir.checkpoints, trainer.step, *trainer.state())
                except RunError as error:
                    if required:
                        raise
                    # The one before is untouched; the next interval may find room again.
                    self.warn(str(error))
                    return
                prune(self.run_dir.checkpoints, self.config.keep_last, self.config.keep_every)
            else:
                trainer.parallel.accompany(lambda: trainer.state()[0])
        self.saved = time.monotonic()

    def _renew(self) -> None:
        """Make the run's directory anew if somebody has deleted it."""
        try:
            if self.run_dir.renew():
                self.warn(f"{self.run_dir.path} was deleted or moved away: it is made anew, "
                          "without what it held")
                self.outputs.write_reference()
                self.outputs.write_quarantine()
        except RobustDMError:
            self.trainer.parallel.accompany(lambda: self.trainer.state()[0])  # as the others do
            raise

    def _finish(self, complete: bool) -> dict:
        """Samples, pipeline, summary and report from what has been trained so far."""
        trainer, config = self.trainer, self.config
        if self.ranks.main:
            self.progress.message("sampling for the report ...")
        if complete:
            settings = self.outputs.correction() if self.outputs is not None else {}
            samples = self._sample(config.final_sampler, config.final_steps,
                                   **self.ranks.exchange(settings)[0])
        else:
            samples = self._sample("ddim", config.preview_steps)
        averaged = trainer.averaged() if trainer.data.is_image else None
        if self.outputs is None:
            return {}
        return self.outputs.finish(
            samples, averaged, ranks=self.ranks.size, warnings=self.warnings,
            compile_s=self.compile_s and round(self.compile_s, 1),
            img_per_s=self.progress.img_per_s,
        )


def describe(trainer: Trainer, estimate: dict[str, int]) -> str:
    """The plan of a run in a few lines."""
    config = trainer.config
    gib = {key: f"{value / 2**30:.2f} GiB" if value > 2**27 else f"{value / 2**20:.1f} MiB"
           for key, value in estimate.items()}
    ranks = trainer.ranks.size
    pieces = f" in {config.accumulate} pieces" if config.accumulate > 1 else ""
    pieces += f" on each of {ranks} ranks" if ranks > 1 else ""
    pieces += trainer.parallel.note
    trained = f", {trainer.trained:,} of them trained" if config.freeze or config.lora else ""
    if config.lora:  # the adapters, their averages, and two moments of each number
        size = 4 * trainer.trained * (3 + len(config.ema_rates)) / 2**20
        trained += f" (adapters of rank {config.lora}; {size:.2f} MiB in a checkpoint)"
    lines = (
        f"data       {trainer.data.describe()}",
        f"network    {config.network}, {trainer.parameters / 1e6:.2f} M parameters{trained}",
        f"objective  {config.objective}, lambda {config.lam} ({config.lambda_mode}), "
        f"{trainer.schedule.name} schedule",
        f"training   {config.steps} steps of {config.batch_size} items{pieces}, "
        f"{config.precision} on {device_name(trainer.device)}",
        f"memory     about {gib['total']} ({gib['weights']} weights and optimizer, "
        f"{gib['activations']} activations)",
        trainer.origin,
        f"out        {config.out}",
    )
    return "\n".join(line for line in lines if line)
