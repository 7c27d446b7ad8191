"""Train many small runs side by side, keep what each measured, and sum them up."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from robustdm.data import Data, batches, load_data
from robustdm.errors import RunError
from robustdm.models import build_model
from robustdm.sampling import sample
from robustdm.training.config import TrainConfig
from robustdm.training.progress import duration
from robustdm.training.rundir import CHANGEABLE, git_revision, provenance
from robustdm.training.trainer import Trainer


@dataclass(frozen=True)
class Arm:
    """One training run of a study and how it is measured.

    Attributes:
        group: data set the arm belongs to; one table each.
        name: row of the table.
        config: its training configuration; ``seed`` tells repeats apart.
        samples: number of samples that are measured.
        sampler, sampling_steps: how they are drawn; None visits every timestep.
        make_data: builds the data from the configuration; a module-level function.
    """

    group: str
    name: str
    config: TrainConfig
    samples: int
    sampler: str = "ddpm"
    sampling_steps: int | None = None
    make_data: Callable[[TrainConfig], Data] = load_data

    @property
    def key(self) -> str:
        """Name of the arm's files: what it is, and a hash of everything that decides it."""
        # Not what a resumed run may change, such as logging: that leaves the weights as they are.
        bookkeeping = set(CHANGEABLE) - {"steps", "lr", "clip_samples", "data_dir"}
        config = {k: v for k, v in self.config.to_dict().items() if k not in bookkeeping}
        values = {**dataclasses.asdict(self), "config": config,
                  "make_data": self.make_data.__qualname__}
        digest = hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode())
        name = self.name.replace(" ", "-").replace("(", "").replace(")", "").replace("/", "-")
        return f"{self.group}-{name}-seed{self.config.seed}-{digest.hexdigest()[:8]}"


def run_arm(arm: Arm, kept: Path, threads: int) -> dict:
    """Train and measure one arm; writes its record, weights and samples into ``kept``."""
    torch.set_num_threads(threads)
    begin, begin_cpu = time.perf_counter(), time.process_time()
    trainer = Trainer(arm.config, arm.make_data(arm.config))
    stream = batches(trainer.data, arm.config, 0, trainer.device)
    for _ in range(arm.config.steps):
        trainer.train_step(next(stream)[0])
    window = trainer.window()
    if trainer.device.type == "cuda":
        torch.cuda.synchronize()
    trained, train_cpu = time.perf_counter(), time.process_time() - begin_cpu
    samples = sample(
        trainer.emas[0].model, trainer.schedule, trainer.data.shape, num=arm.samples,
        sampler=arm.sampler, steps=arm.sampling_steps, seed=arm.config.seed,
        clip=arm.config.clip_samples, batch_size=2000, device=trainer.device,
    )
    record = {
        "group": arm.group,
        "name": arm.name,
        "seed": arm.config.seed,
        "measures": trainer.data.measure(samples),
        "fit": window.get("fit"),
        "reg": window.get("reg"),
        "skipped": window["skipped"],
        "train_s": trained - begin,
        # What other work on the machine does not stretch.
        "train_cpu_s": train_cpu,
        "sample_s": time.perf_counter() - trained,
        "config": arm.config.to_dict(),
        "git": git_revision(),
    }
    weights = {k: v.contiguous() for k, v in trainer.emas[0].model.state_dict().items()}
    save_file(weights, kept / f"{arm.key}.safetensors")
    save_file({"samples": samples.contiguous()}, kept / f"{arm.key}-samples.safetensors")
    # Last: the record is what says that the arm is done.
    (kept / f"{arm.key}.json").write_text(json.dumps(record, indent=1))
    return record


def run_arms(arms: Sequence[Arm], out: Path, jobs: int = 0) -> list[dict]:
    """Run the arms that ``out`` has no record of, several at a time, and return all records.

    Args:
        arms: what to run.
        out: directory of the study. Arms are kept in ``arms`` beside it, so that an interrupted
            study goes on where it stopped, and studies share the arms they have in common.
        jobs: processes side by side; 0 is one per CPU core, or one on a GPU.

    Raises:
        RunError: if an arm failed; the finished ones are kept.
    """
    kept = arms_directory(out)
    kept.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if not jobs:
        jobs = 1 if torch.cuda.is_available() else cores
    threads = max(1, cores // jobs)
    records: dict[Arm, dict] = {}
    for arm in arms:
        path = kept / f"{arm.key}.json"
        if path.exists():
            records[arm] = json.loads(path.read_text())
    missing = [arm for arm in arms if arm not in records]
    if records:
        print(f"{len(records)} of {len(arms)} arms are done already", flush=True)
    begin = time.perf_counter()
    # A fresh interpreter per process: forking one that holds threads or a GPU can hang.
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        running = {pool.submit(run_arm, arm, kept, threads): arm for arm in missing}
        try:
            for done, future in enumerate(as_completed(running), 1):
                arm = running[future]
                records[arm] = future.result()
                left = (time.perf_counter() - begin) / done * (len(missing) - done)
                taken = records[arm]["train_s"] + records[arm]["sample_s"]
                print(f"[{done}/{len(missing)}] {arm.group} / {arm.name}, seed {arm.config.seed}: "
                      f"{taken:.0f} s; {duration(left)} left", flush=True)
        except Exception as error:
            pool.shutdown(wait=False, cancel_futures=True)
            text = " ".join(str(error).split()) or type(error).__name__
            raise RunError(
                f"{arm.group} / {arm.name}, seed {arm.config.seed} failed: {text}; finished arms "
                f"are kept in {kept}, the same command goes on from there"
            ) from error
    return [records[arm] for arm in arms]


def arms_directory(out: Path) -> Path:
    """Where the studies whose directories stand side by side keep their arms."""
    return out.parent / "arms"


def load_model(arm: Arm, out: Path) -> torch.nn.Module:
    """The averaged weights of a finished arm, in eval mode on the CPU."""
    model = build_model(arm.config, arm.make_data(arm.config).shape)
    model.load_state_dict(load_file(arms_directory(out) / f"{arm.key}.safetensors"))
    return model.eval().requires_grad_(False)


def load_samples(arm: Arm, out: Path) -> torch.Tensor:
    """The samples of a finished arm, as drawn."""
    return load_file(arms_directory(out) / f"{arm.key}-samples.safetensors")["samples"]


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation (divisor n - 1) over seeds."""

    mean: float
    sd: float

    def __str__(self) -> str:
        if not self.sd and float(self.mean).is_integer():
            return f"{self.mean:.0f}"
        return f"{self.mean:.3g} ±{self.sd:.2g}"


def summarise(records: Sequence[dict], columns: Sequence[str]) -> dict[str, dict[str, Spread]]:
    """Rows of one table: arm name -> {measure: spread over its seeds}."""
    rows: dict[str, dict[str, Spread]] = {}
    for name in dict.fromkeys(record["name"] for record in records):
        mine = [record for record in records if record["name"] == name]
        rows[name] = {}
        for column in columns:
            values = [r["measures"].get(column, r.get(column)) for r in mine]
            values = [v for v in values if v is not None]
            if values:
                sd = statistics.stdev(values) if len(values) > 1 else 0.0
                rows[name][column] = Spread(statistics.fmean(values), sd)
    return rows


@dataclass(frozen=True)
class Claim:
    """A number that a study is held to."""

    text: str
    value: float
    target: str
    holds: bool

    def __str__(self) -> str:
        verdict = "reached" if self.holds else "MISSED "
        return f"{verdict}  {self.text}: {self.value:.3g} ({self.target})"


def write_results(out: Path, sections: Sequence[str], claims: Sequence[Claim], records) -> None:
    """Write the study's page (table.md) and everything behind it (results.json)."""
    text = "\n\n".join([*sections, "\n".join(f"- {claim}" for claim in claims)])
    (out / "table.md").write_text(text + "\n", encoding="utf-8")
    results = {
        "provenance": provenance(),
        "claims": [dataclasses.asdict(claim) for claim in claims],
        "arms": list(records),
    }
    (out / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
