"""Train many small runs side by side, keep what each measured, and sum them up."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from robustdm.data import Data, batches, load_data
from robustdm.device import resolve_device
from robustdm.errors import RunError, UsageError
from robustdm.evaluation.features import cache_directory, load_extractor
from robustdm.evaluation.measure import Generator, features_of, generate, measure
from robustdm.host import keep_freed_memory
from robustdm.method.baselines import Baseline
from robustdm.method.trajectory_attack import TrajectoryAttack
from robustdm.models import build_model
from robustdm.models.load_run import schedule_of
from robustdm.models.pretrained import ORIGIN_FIELDS
from robustdm.reporting.progress import duration
from robustdm.runs.config import TrainConfig
from robustdm.runs.rundir import CHANGEABLE, git_revision, parse_json, provenance
from robustdm.studies.claims import Claim
from robustdm.training.trainer import Trainer

SHRUNK_LAM = (0.1, 0.3)
SHRUNK_SWEEP = (0.03, 0.05, 0.1, 0.2, 0.3, 0.5)
"""Strengths of the shrunk DDPM: of every table, and where its whole curve is drawn."""
EQUAL_WORK = "DDPM, equal work"
# Fields at the value at which they do nothing: left out of keys, which they would only change.
_IDLE = {"crop": 0, "channels": None, "stream": False, "shuffle_buffer": 4096,
         "corrupt_kind": "gaussian", "corrupt_pixels": 0.1, "corrupt_quality": 10,
         "corrupt_with": None, "freeze": (), "lora": 0, "lora_alpha": None,
         "lora_targets": TrainConfig.lora_targets, "parallel": "ddp"}
KEPT = 2500
"""Samples of an arm that stay on disk."""
ADV_UNITS, DDPM_UNITS = 8, 3
"""Work of a step in forward passes; see ``Objective.units``."""


@dataclass(frozen=True)
class Arm:
    """One training run of a study, and one way of sampling from it and measuring the samples.

    Arms of the same training share its weights: only the first of them trains.

    Attributes:
        group: data set the arm belongs to; one table each.
        name: row of the table.
        config: its training configuration; ``seed`` tells repeats apart.
        samples: number of samples that are measured.
        sampler, sampling_steps, spacing: how they are drawn; steps None visits every timestep.
        make_data: builds the data from the configuration; a module-level function.
        baseline: what is done against noise while sampling.
        attack: what is done to the sampling trajectory.
        features, weights: feature space in which Frechet distance, precision and recall to the
            clean data are added to the data's own measures; see ``load_extractor``.
        batch_size: samples drawn at once.
        start: of another training of the same data, whose averaged weights this one starts from.
    """

    group: str
    name: str
    config: TrainConfig
    samples: int
    sampler: str = "ddpm"
    sampling_steps: int | None = None
    make_data: Callable[[TrainConfig], Data] = load_data
    spacing: str = "linspace"
    baseline: Baseline | None = None
    attack: TrajectoryAttack | None = None
    features: str | None = None
    weights: Path | None = None
    batch_size: int = 2000
    start: TrainConfig | None = None

    @property
    def training_key(self) -> str:
        """Name of the files of the training alone."""
        # Not what a resumed run may change, such as logging: that leaves the weights as they are.
        bookkeeping = set(CHANGEABLE) - {"steps", "lr", "data_dir"}
        if self.config.init_from is None:
            bookkeeping |= set(ORIGIN_FIELDS)
        bookkeeping |= {k for k, v in _IDLE.items() if getattr(self.config, k) == v}
        config = {k: v for k, v in self.config.to_dict().items() if k not in bookkeeping}
        decides = [config, self.make_data.__qualname__]
        if self.config.data_dir is not None:
            decides.append(_stamp(self.config.data_dir))
        if self.start is not None:
            decides.append(self.started_from.training_key)
        return (f"{self.config.data}-{self.config.objective}-seed{self.config.seed}-"
                f"{_digest(decides)}")

    @property
    def started_from(self) -> Arm:
        """The training that ``start`` names."""
        return dataclasses.replace(self, config=self.start, start=None)

    @property
    def key(self) -> str:
        """Name of the arm's files: what it is, and a hash of everything that decides it."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)
                  if f.name not in ("config", "make_data", "start")}
        values |= {"training": self.training_key, "clip": self.config.clip_samples}
        if self.weights is not None:
            values["weights"] = _stamp(self.weights)
        words = re.sub(r"[^\w.,=-]+", "-", f"{self.group}-{self.name}").strip("-")
        return f"{words}-seed{self.config.seed}-{_digest(values)}"


def shrunk_arms(plain: Arm, strengths: Sequence[float]) -> list[Arm]:
    """The network of an arm of plain DDPM, shrunk."""
    return [dataclasses.replace(plain, name=f"DDPM, shrunk {lam:g}",
                                baseline=Baseline("shrink", lam)) for lam in strengths]


KNOWN = "DDPM, noise known"


def baseline_arms(plain: Arm, shrunk: Sequence[float] = SHRUNK_LAM) -> list[Arm]:
    """What the paper leaves out beside an arm of plain DDPM: its network queried otherwise (shrunk;
    corrected for noise whose strength it is told), its samples blurred, if images, and as much work
    as robust_adv takes.

    Noise of points gives no strength to correct for; clean data get neither that nor the work.

    Args:
        shrunk: strengths of the shrunk DDPM.
    """
    points = plain.config.data in ("plane", "gaussians")
    sigma = 0.0 if points else plain.config.corrupt_sigma
    known = {}
    if sigma:
        # Of items that nobody has flagged, what counts is the root mean square over all.
        known[KNOWN] = Baseline("known", plain.config.corrupt_fraction**0.5 * sigma)
    if plain.config.data in ("digits", "images", "cifar10"):
        known["DDPM, blurred"] = Baseline("blur")
    made = shrunk_arms(plain, shrunk) + [
        dataclasses.replace(plain, name=name, baseline=baseline)
        for name, baseline in known.items()]
    if sigma or points:
        steps = round(plain.config.steps * ADV_UNITS / DDPM_UNITS)
        made.append(dataclasses.replace(
            plain, name=EQUAL_WORK, config=dataclasses.replace(plain.config, steps=steps)))
    return made


def _stamp(path: Path) -> list:
    """Tells another file in the same place apart: what was measured with it must not pass."""
    try:
        found = Path(path).stat()
    except OSError:  # whoever reads it says so
        return [str(path)]
    return [str(path), found.st_size, found.st_mtime_ns]


def _digest(values) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:8]


def _train(arm: Arm, kept: Path, data: Data) -> dict:
    """Train, unless that is done; returns what is known of the training."""
    path = kept / f"{arm.training_key}.json"
    if path.exists():
        return json.loads(path.read_text())
    begin, begin_cpu = time.perf_counter(), time.process_time()
    weights = None
    if arm.start is not None:
        _train(arm.started_from, kept, data)
        weights = load_file(kept / f"{arm.started_from.training_key}.safetensors")
    trainer = Trainer(arm.config, data, weights)
    stream = batches(trainer.data, arm.config, 0, trainer.device)
    for _ in range(arm.config.steps):
        trainer.train_step(next(stream)[0])
    window = trainer.window()
    if trainer.device.type == "cuda":
        torch.cuda.synchronize()
    record = {
        "fit": window.get("fit"),
        "reg": window.get("reg"),
        "skipped": window["skipped"],
        "train_s": time.perf_counter() - begin,
        # What other work on the machine does not stretch.
        "train_cpu_s": time.process_time() - begin_cpu,
        "trained_git": git_revision(),
    }
    weights = {k: v.contiguous() for k, v in trainer.averaged().state_dict().items()}
    save_file(weights, kept / f"{arm.training_key}.safetensors")
    # Last: the record is what says that the training is done.
    path.write_text(json.dumps(record, indent=1))
    return record


def run_arm(arm: Arm, kept: Path) -> dict:
    """Train, sample and measure one arm; writes record, weights and samples into ``kept``."""
    data = arm.make_data(arm.config)
    device = resolve_device(arm.config.device)
    trained = _train(arm, kept, data)
    begin = time.perf_counter()
    generator = Generator(
        arm.name, _load_model(arm, kept, data).to(device), schedule_of(arm.config), data.shape,
        data.is_image, arm.config.clip_samples, data, arm.config.seed)
    settings = dict(sampler=arm.sampler, steps=arm.sampling_steps, spacing=arm.spacing)
    samples = torch.cat(list(generate(
        generator, arm.samples, batch_size=arm.batch_size, seed=arm.config.seed, device=device,
        precision=arm.config.precision, compile=arm.config.compile, attack=arm.attack,
        baseline=arm.baseline, **settings)))
    measures, identity = _measured(arm, data, samples, device)
    record = {
        "group": arm.group,
        "name": arm.name,
        "seed": arm.config.seed,
        "measures": measures,
        "features": identity,
        **trained,
        "sample_s": time.perf_counter() - begin,
        "samples": arm.samples,
        "sampling": settings | {
            "baseline": arm.baseline and dataclasses.asdict(arm.baseline),
            "attack": arm.attack and dataclasses.asdict(arm.attack)},
        "config": arm.config.to_dict(),
        "git": git_revision(),
    }
    save_file({"samples": samples[:KEPT].clone()}, kept / f"{arm.key}-samples.safetensors")
    # Last: the record is what says that the arm is done.
    (kept / f"{arm.key}.json").write_text(json.dumps(record, indent=1))
    return record


def measures_of(arm: Arm, data: Data, samples: torch.Tensor) -> dict[str, float]:
    """What is measured of an arm's samples, of any others (N, *shape)."""
    return _measured(arm, data, samples, resolve_device(arm.config.device))[0]


def _measured(
    arm: Arm, data: Data, samples: torch.Tensor, device
) -> tuple[dict[str, float], dict | None]:
    """The data's own measures and those in the arm's feature space; which space that is."""
    if arm.features is None:
        return data.measure(samples), None
    extractor = load_extractor(arm.features, data.shape, arm.weights, device)
    clean = data.clean(torch.arange(len(data)))
    found = measure(
        features_of(extractor, samples),
        features_of(extractor, clean, cache_directory()).features,
        ("frechet", "manifold", "inception_score"), splits=1)
    measures = {k: float(result["value"]) for k, result in found.items()}
    return data.measure(samples) | measures, extractor.identity


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
    records: dict[Arm, dict] = {}
    for arm in arms:
        path = kept / f"{arm.key}.json"
        if path.exists():
            records[arm] = json.loads(path.read_text())
    missing = [arm for arm in arms if arm not in records]
    # First one arm of every training, then those that start from its weights, then those that only
    # sample from them.
    first = {arm.training_key: arm for arm in reversed(missing)}
    trains = [a for a in missing if first[a.training_key] is a]
    order = [[a for a in trains if a.start is None], [a for a in trains if a.start is not None],
             [a for a in missing if first[a.training_key] is not a]]
    if records:
        print(f"{len(records)} of {len(arms)} arms are done already", flush=True)
    here = git_revision()
    others = {r for record in records.values() for r in revisions(record)
              if r != here or r.endswith("-dirty")}
    if others:
        print("some were made by another revision of the code "
              f"({', '.join(sorted(r[:10] for r in others))}): --fresh runs them again",
              flush=True)
    begin = time.perf_counter()
    for done, (arm, record) in enumerate(_finished(order, kept, jobs, max(1, cores // jobs)), 1):
        records[arm] = record
        left = (time.perf_counter() - begin) / done * (len(missing) - done)
        print(f"[{done}/{len(missing)}] {arm.group} / {arm.name}, seed {arm.config.seed}; "
              f"at most {duration(left)} left", flush=True)
    return [records[arm] for arm in arms]


def revisions(record: dict) -> set[str]:
    """The revisions of the code that trained and that measured an arm, as far as known."""
    return {record[key] for key in ("git", "trained_git") if record.get(key)}


def _begin_worker(parent: int, threads: int) -> None:
    """Take a share of the cores, and end when the parent is gone: killed, it cannot tell."""
    torch.set_num_threads(threads)
    keep_freed_memory()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _finished(
    order: Sequence[Sequence[Arm]], kept: Path, jobs: int, threads: int
) -> Iterator[tuple[Arm, dict]]:
    """Arms and their records, as they finish; a part begins when the one before is done."""
    arm = None
    try:
        if jobs == 1:
            for arm in (arm for part in order for arm in part):
                yield arm, run_arm(arm, kept)
            return
        # A fresh interpreter per process: forking one that holds threads or a GPU can hang.
        spawn, share = get_context("spawn"), (os.getpid(), threads)
        with ProcessPoolExecutor(jobs, spawn, _begin_worker, share) as pool:
            for part in order:
                running = {pool.submit(run_arm, arm, kept): arm for arm in part}
                try:
                    for future in as_completed(running):
                        arm = running[future]
                        yield arm, future.result()
                except Exception:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise RunError(
            f"{arm.group} / {arm.name}, seed {arm.config.seed} failed: {text}; finished arms are "
            f"kept in {kept}, the same command goes on from there"
        ) from error


def arms_directory(out: Path) -> Path:
    """Where the studies whose directories stand side by side keep their arms."""
    return out.parent / "arms"


def load_model(arm: Arm, out: Path) -> torch.nn.Module:
    """The averaged weights of a finished arm, in eval mode on the CPU."""
    return _load_model(arm, arms_directory(out), arm.make_data(arm.config))


def _load_model(arm: Arm, kept: Path, data: Data) -> torch.nn.Module:
    model = build_model(arm.config, data.shape)
    model.load_state_dict(load_file(kept / f"{arm.training_key}.safetensors"))
    return model.eval().requires_grad_(False)


def load_samples(arm: Arm, out: Path) -> torch.Tensor:
    """The first ``KEPT`` samples of a finished arm, as drawn."""
    return load_file(arms_directory(out) / f"{arm.key}-samples.safetensors")["samples"]


def write_results(out: Path, sections: Sequence[str], claims: Sequence[Claim], records) -> None:
    """Write the study's page (table.md) and everything behind it (results.json)."""
    text = "\n\n".join([*sections, "\n".join(f"- {claim}" for claim in claims)])
    (out / "table.md").write_text(text + "\n", encoding="utf-8")
    configs = [record["config"] for record in records if "config" in record]
    # What all arms have in common is written once.
    common = {k: v for k, v in configs[0].items()
              if all(k in c and c[k] == v for c in configs)} if configs else {}
    results = {
        "provenance": provenance(),
        "revisions": sorted(set().union(*map(revisions, records))),
        "claims": [dataclasses.asdict(claim) for claim in claims],
        "config": common,
        "arms": [record | ({"config": {k: v for k, v in record["config"].items()
                                       if k not in common}} if "config" in record else {})
                 for record in records],
    }
    (out / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")


def read_arms(path: Path, name: str) -> list[dict]:
    """The arms of a results.json, each with its whole configuration.

    Args:
        path: the file.
        name: of the flag that gave it, for errors.

    Raises:
        UsageError: if the file is no such thing.
    """
    try:
        results = parse_json(Path(path).read_bytes())
        common = results.get("config", {})
        return [arm | ({"config": common | arm["config"]} if "config" in arm else {})
                for arm in results["arms"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{name} is {str(path)!r}: no results.json of a study "
                         f"({type(error).__name__})") from None
