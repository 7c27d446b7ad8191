"""``--suite scaling``: what two ranks on this CPU can say of the scaling table in docs/training.md.

- the flat all-reduce of a step against its size, and latency and bandwidth fitted to it;
- training steps, the same batch a rank: by one rank while the other waits ("alone"), by both
  without a word ("beside"), and by both as one step ("together"), with the all-reduces and bytes of
  a step counted;
- so the efficiency that the table's formula, t / (t + all-reduce), predicts, and the measured one.

Both ranks have one thread. Samples are taken in rounds of random order, ratios within a round.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from timing import one_line, spread

from robustdm.data import batches
from robustdm.distributed import ALONE, Ranks, join
from robustdm.errors import RunError
from robustdm.reporting.tables import text_table
from robustdm.runs.config import TrainConfig
from robustdm.runs.presets import preset_values
from robustdm.training.trainer import WISHES, Trainer

SCHEMA = "robustdm-scaling-1"
MINUTES = 4.0
RANKS = 2
SIZES = [4**k for k in range(6, 14)]  # bytes, 4 KiB to 64 MiB
FEWEST = 3  # rounds, whatever the time
ALL_REDUCE = "all-reduce"
COMMON = dict(dropout=0.0, holdout=0.0, warmup_steps=0, device="cpu")
WIDE = dict(preset_values("plane"), mlp_width=1024, mlp_depth=4)
# Name and configuration; batches are those of a rank. The last two are mostly all-reduce: they have
# millions of weights and little work.
TASKS = {
    "digits, batch 4": dict(preset_values("digits"), batch_size=4),
    "digits, batch 32": dict(preset_values("digits"), batch_size=32),
    "MLP, batch 64": dict(WIDE, batch_size=64),
    "MLP, batch 8": dict(WIDE, batch_size=8),
}
TINY = {"MLP, batch 4": dict(WIDE, mlp_width=16, batch_size=4)}


def names(config, device: torch.device) -> list[str]:
    """What ``--list`` prints."""
    return [ALL_REDUCE, *TASKS]


def run(
    config, device: torch.device, head: dict, save: Callable[[dict], None] = lambda record: None
) -> dict:
    """Measure; see the module.

    Args:
        config: a ``BenchmarkConfig``.
        head: what the record begins with.
        save: called with the record after the all-reduces, and after every network.

    Returns:
        The record, JSON-able; ``failed`` has a line for each part that raised.
    """
    begin = time.perf_counter()
    tasks = TINY if config.tiny else TASKS
    share = 60 * (config.minutes or MINUTES) / (len(tasks) + 1)
    record = {"schema": SCHEMA, **head, "tiny": config.tiny, "ranks": RANKS,
              "threads_a_rank": 1, "backend": "gloo", "all_reduce": [], "steps": [], "failed": []}
    for name in (ALL_REDUCE, *tasks):
        try:
            found = _on_ranks(name, config, share)
        except RunError as error:
            record["failed"].append(f"{name}: FAILED {error}")
        else:
            if name == ALL_REDUCE:
                record["all_reduce"] = found
                record["fit"] = fit([s["bytes"] for s in found], [s["ms"] for s in found])
            else:
                record["steps"].append(_predicted(found, record.get("fit")))
        record["load_after"] = os.getloadavg()[0]
        record["seconds"] = time.perf_counter() - begin
        save(record)
    return record


def _predicted(row: dict, fitted: dict | None) -> dict:
    """A network's row with what the all-reduces' fit says of it, if there is one."""
    if fitted is None:
        return row
    ms = fitted["latency_ms"] + row["bytes"] / fitted["gb_s"] / 1e6
    return {**row, "fitted_ms": ms, **{
        f"predicted_{mode}": row[mode]["ms"] / (row[mode]["ms"] + ms)
        for mode in ("alone", "beside")}}


def fit(sizes: list[int], ms: list[float]) -> dict[str, float]:
    """Latency and bandwidth of t = latency + bytes / bandwidth, by least squares of the relative
    errors, and the largest of those."""
    sizes, ms = np.array(sizes, float), np.array(ms)
    (latency, slope), *_ = np.linalg.lstsq(
        np.stack([1 / ms, sizes / ms], 1), np.ones(len(ms)), rcond=None)
    return {"latency_ms": float(latency), "gb_s": float(1e-6 / slope),
            "error": float(np.abs((latency + slope * sizes) / ms - 1).max())}


def _on_ranks(name: str, config, seconds: float) -> list[dict] | dict:
    """What `_measure` returns on rank 0, of processes forked for it.

    Raises:
        RunError: if a rank raises, or ends without a word.
    """
    context = multiprocessing.get_context("fork")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    ours, theirs = context.Pipe()
    processes = [context.Process(target=_rank, args=(rank, port, theirs, name, config, seconds))
                 for rank in range(RANKS)]
    for process in processes:
        process.start()
    theirs.close()
    try:
        status, answer = ours.recv()
    except EOFError:
        raise RunError("a rank has ended early, killed for memory?") from None
    finally:
        for process in processes:
            process.join(10)
            process.kill()
    if status != "ok":
        raise RunError(answer)
    return answer


def _rank(rank: int, port: int, end, name: str, config, seconds: float) -> None:
    torch.set_num_threads(1)  # a forked OpenMP has no other
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with join("cpu", 5) as ranks:
        try:
            found = _measure(ranks, name, config, seconds)
            if ranks.main:
                end.send(("ok", found))
        except Exception as error:  # told before the other rank fails for want of this one
            end.send(("error", one_line(error)))
    end.close()


def _measure(ranks: Ranks, name: str, config, seconds: float) -> list[dict] | dict:
    if name != ALL_REDUCE:
        fields = (TINY if config.tiny else TASKS)[name]
        return _steps(ranks, name, TrainConfig(**fields | COMMON), config.repeats, seconds)
    flats = {size: torch.ones(size // 4) for size in (SIZES[:2] if config.tiny else SIZES)}
    times = _rounds(ranks, config.repeats, seconds, {
        size: _repeated(ranks, flat) for size, flat in flats.items()})
    return [{"bytes": size, **spread(times[size]), "sent": _sent(ranks, flat)}
            for size, flat in flats.items()]


def _repeated(ranks: Ranks, flat: torch.Tensor) -> Callable[[], float]:
    """Milliseconds of one of several all-reduces in a row, copies included as in a step."""
    count = max(1, min(20, 2**22 // flat.nbytes))

    def sample() -> float:
        begin = time.perf_counter()
        for _ in range(count):
            ranks.all_sum([flat])
        return 1e3 * (time.perf_counter() - begin) / count

    return sample


def _sent(ranks: Ranks, flat: torch.Tensor) -> int | None:
    """Bytes that both ranks put on the loopback device for one all-reduce, others' included: so the
    least of five; None where the system does not tell."""
    def counted() -> int:
        lines = Path("/proc/net/dev").read_text().splitlines()
        return int(next(x for x in lines if x.strip().startswith("lo:")).split(":")[1].split()[8])

    found = []
    with contextlib.suppress(OSError, StopIteration, ValueError, IndexError):
        for _ in range(5):
            ranks.exchange(0)
            before = counted()
            ranks.all_sum([flat])
            ranks.exchange(0)
            found.append(counted() - before)
    return min(found, default=None)


def _rounds(
    ranks: Ranks, repeats: int, seconds: float, samples: dict
) -> dict[object, list[float]]:
    """Samples of each kind, in ms, the slower rank's: ``repeats`` rounds in random order, or as
    many as there is time for."""
    order, times = random.Random(0), {key: [] for key in samples}
    end = time.monotonic() + seconds
    for done in range(-1, repeats):  # the first is the warm-up
        if ranks.exchange(done >= FEWEST and time.monotonic() > end)[0]:
            break
        for key in order.sample(list(samples), len(samples)):
            ranks.exchange(0)
            slowest = max(ranks.exchange(samples[key]()))
            if done >= 0:
                times[key].append(slowest)
    return times


def _steps(ranks: Ranks, name: str, alone: TrainConfig, repeats: int, seconds: float) -> dict:
    """Steps of one network: alone, beside each other, and together."""
    together = replace(alone, batch_size=RANKS * alone.batch_size)
    trainers = [Trainer(config, ranks=found)
                for config, found in ((alone, ALONE), (together, ranks))]
    one, both = ((trainer, next(batches(trainer.data, trainer.config, 0, trainer.device,
                                        trainer.ranks))[0]) for trainer in trainers)

    def timed(trainer: Trainer, x0) -> float:
        begin = time.perf_counter()
        trainer.train_step(x0)
        return 1e3 * (time.perf_counter() - begin)

    with _counted() as calls:
        timed(*both)
    size = sum(calls)
    times = _rounds(ranks, repeats, seconds, {
        "alone": lambda: timed(*one) if ranks.main else 0.0,
        "beside": lambda: timed(*one),
        "together": lambda: timed(*both),
        "all_reduce": _repeated(ranks, torch.ones(size // 4)),
    })
    both[0].check_ranks()

    def ratio(mode: str) -> float:
        return statistics.median(a / b for a, b in zip(times[mode], times["together"],
                                                       strict=True))

    return {
        "name": name, "parameters": both[0].parameters,
        "all_reduces": len(calls), "bytes": size,
        **{mode: spread(found) for mode, found in times.items()},
        "measured_alone": ratio("alone"), "measured_beside": ratio("beside"),
    }


@contextlib.contextmanager
def _counted() -> Iterator[list[int]]:
    """Bytes of every all-reduce inside."""
    real, calls = dist.all_reduce, []

    def counting(tensor, *arguments, **names):
        calls.append(tensor.nbytes)
        return real(tensor, *arguments, **names)

    dist.all_reduce = counting
    try:
        yield calls
    finally:
        dist.all_reduce = real


def failures(record: dict) -> list[str]:
    """What was wrong or raised: a step has one all-reduce, of its gradients, its loss and the
    wishes."""
    found = list(record.get("failed", []))
    for row in record["steps"]:
        wanted = 4 * (row["parameters"] + 1 + len(WISHES))
        if row["all_reduces"] != 1 or row["bytes"] != wanted:
            found.append(f"{row['name']}: {row['all_reduces']} all-reduces of {row['bytes']} "
                         f"bytes, not one of {wanted}")
    return found


def print_record(record: dict) -> None:
    """The numbers, and all that was wrong."""
    if fitted := record.get("fit"):
        print(f"all-reduce of {RANKS} ranks: {fitted['latency_ms']:.3g} ms + bytes / "
              f"{fitted['gb_s']:.3g} GB/s, within {fitted['error']:.0%}")
    print(text_table({f"{size['bytes']:,} B": {
        "ms": size["ms"], "p20": size["p20"], "p80": size["p80"],
        "sent / bytes": size["sent"] and size["sent"] / size["bytes"],
    } for size in record["all_reduce"]}))
    print(text_table({row["name"]: {
        "MB": row["bytes"] / 1e6,
        **{f"{mode} ms": row[mode]["ms"] for mode in ("alone", "beside", "together")},
        "all-reduce ms": row["all_reduce"]["ms"], "fitted": row.get("fitted_ms"),
        **{f"{mode} / together": row[f"measured_{mode}"] for mode in ("alone", "beside")},
        **{f"formula, {mode}": row.get(f"predicted_{mode}") for mode in ("alone", "beside")},
    } for row in record["steps"]}))
    for line in failures(record):
        Console().print(line, style="bold red", highlight=False, markup=False)
