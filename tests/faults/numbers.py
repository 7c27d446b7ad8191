"""F9: NaN and infinity in data, loss, gradient, perturbation and weights."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import torch

from robustdm import load_run
from robustdm.method import objectives
from robustdm.runs.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from robustdm.runs.config import TrainConfig
from robustdm.training import loop

from .campaign import Found, Trial
from .ranks import Job
from .runs import call, config_of, ending, newest_sound, reference, resumed, train

NAN, INF = float("nan"), float("inf")
PLACES = ("data", "loss", "gradient", "delta", "weights")
_FIRST = 4
"""Step, from 0, that an endless fault begins with. The checkpoint before it is step 3; the second
skipped step is due for one, so its numbers are read before the next step begins."""


def poison(trial: Trial) -> Found:
    """F9: five of each place, then each place on one of two ranks."""
    place, way = PLACES[trial.number // 5 % 5], trial.number % 5
    if trial.number >= 25:
        return _on_one_rank(trial, PLACES[way])
    return (_weights if place == "weights" else _passing)(trial, place, way)


# What a step did.


def _tensors(trainer) -> dict[str, torch.Tensor]:
    return {f"{file} {name}": value.clone() for file, group in trainer.state()[0].items()
            for name, value in group.items()}


def _put(tensor: torch.Tensor, value: float) -> None:
    tensor[(0,) * tensor.dim()] = value


def _watch(record: Path, now: dict) -> None:
    """Write, for every step, whether it was skipped, and what became of all that is saved.

    A skipped step leaves weights and moments as they are; averages go on towards the weights.
    """
    real, lines = loop.Trainer.train_step, []

    def train_step(self, *arguments, **options):
        now["step"], before = self.step, _tensors(self)
        real(self, *arguments, **options)
        after = _tensors(self)
        digest = hashlib.sha256()
        for value in after.values():
            digest.update(value.contiguous().reshape(-1).numpy().tobytes())
        lines.append({
            "step": now["step"], "skipped": bool(self.metrics.skipped_in_a_row),
            "untouched": all(torch.equal(value.view(torch.int32),  # a NaN equals itself
                                         before.get(name, value * 0).view(torch.int32))
                             for name, value in after.items() if not name.startswith("ema")),
            "finite": all(bool(value.isfinite().all()) for value in after.values()),
            "digest": digest.hexdigest(),
        })
        record.write_text(json.dumps(lines))

    loop.Trainer.train_step = train_step


# Places. Each returns a function that sets the fault, for the steps it is to be in.


def _in_data(steps, value: float, rows: list[int], now: dict, named: Path) -> None:
    real = loop.batches

    def batches(data, config, start, *rest):
        for step, (x, indices) in enumerate(real(data, config, start, *rest), start):
            if step in steps:
                x = x.clone()
                for row in rows:
                    _put(x[row], value)
                items = [int(data.members[indices[row]]) for row in rows]
                named.write_text(json.dumps([
                    str(item) if config.data != "images" else data.pictures.names[item]
                    for item in items]))
            yield x, indices

    loop.batches = batches


def _in_loss(steps, value: float, whole: bool, now: dict) -> None:
    real = objectives.ops.equivariance_loss

    def loss(*arguments, **options):
        total, fit, reg = real(*arguments, **options)
        if now["step"] in steps:
            # Added to the total, it leaves the gradient finite; as a factor it spoils both.
            total = total + value if whole else total * value
            fit = fit.clone()
            fit[0] = value
        return total, fit, reg

    objectives.ops.equivariance_loss = loss


def _in_gradient(steps, value: float, everywhere: bool, now: dict) -> None:
    real = loop.Trainer._differentiate

    def piece(self, *arguments, **options):
        found = real(self, *arguments, **options)
        if now["step"] in steps:
            for number, gradient in enumerate(found.weights):
                if everywhere or number == len(found.weights) // 2:
                    _put(gradient, value)
        return found

    loop.Trainer._differentiate = piece


def _in_delta(steps, value: float, what: str, now: dict) -> None:
    real = objectives.ops.fgsm_project

    def project(xt, gradient, *arguments, **options):
        if now["step"] in steps and what == "the attack's gradient":
            gradient = gradient.clone()
            gradient[0] = value  # of the whole first sample
        x_adv, delta = real(xt, gradient, *arguments, **options)
        if now["step"] in steps and what == "delta":
            delta = delta.clone()
            _put(delta[1], value)
        if now["step"] in steps and what == "x_adv":
            x_adv = x_adv.clone()
            _put(x_adv[-1], value)
        return x_adv, delta

    objectives.ops.fgsm_project = project


def _passing(trial: Trial, place: str, way: int) -> Found:
    """A fault in some steps is skipped and counted; one in all of them ends the run."""
    random = trial.random
    kind = "points" if way % 2 == 0 else "pictures" if place == "data" else "digits"
    endless = way == 4
    steps = [{0}, {random.randrange(1, 11)}, {11}, {5, 6, random.choice((2, 9))},
             set(range(_FIRST, 100))][way]
    value = (NAN, INF, -INF, NAN, INF)[way]
    harmless = False
    named, now = trial.folder / "named", {}
    rows = sorted(random.sample(range(8), 1 + way % 3))
    if place == "data":
        detail = f"{len(rows)} of 8 items"
        inject = lambda: _in_data(steps, value, rows, now, named)  # noqa: E731
    elif place == "loss":
        detail = "alone" if way % 2 else "and gradient"
        inject = lambda: _in_loss(steps, value, way % 2 == 1, now)  # noqa: E731
    elif place == "gradient":
        value = 3e38 if way == 2 else value  # finite, but its square is not
        detail = "every tensor" if way == 3 else "one number"
        inject = lambda: _in_gradient(steps, value, way == 3, now)  # noqa: E731
    else:
        detail = ("the attack's gradient", "the attack's gradient", "x_adv", "delta", "delta")[way]
        harmless = way == 1  # infinity has a sign
        inject = lambda: _in_delta(steps, value, detail, now)  # noqa: E731
    whole = reference(kind, trial.shared)
    config = config_of(kind, trial.folder / "run", trial.shared, max_skipped=2 if endless else 10)
    record = trial.folder / "steps.json"

    def work() -> int:
        inject()
        _watch(record, now)
        return train(config)

    done = call(work)
    lines = json.loads(record.read_text())
    skipped = [line["step"] for line in lines if line["skipped"]]
    expected = sorted(step for step in steps if step < 12 and not harmless)
    kept = all(line["untouched"] == line["skipped"] and line["finite"] for line in lines)
    said = done.last if endless else done.output
    blamed = place != "data" or all(name in said for name in json.loads(named.read_text()))
    passed = kept and blamed and done.clean
    seen = f"exit code {done.code}, skipped {skipped}, {'kept' if kept else 'NOT kept'}"
    if endless:
        sound = newest_sound(config.out)
        rest = call(lambda: train(resumed(config)))
        same = rest.code == 0 and ending(config.out) == whole.end
        passed &= (skipped == expected[:2] and done.code == 1 and sound == 3 and same
                   and "with the items" in said and said.startswith("error: "))
        seen += f"; {done.last}; resumed without it: " + (
            "final bits equal" if same else f"final bits differ: {rest.last}")
    else:
        summary = json.loads((config.out / "summary.json").read_text()) if not done.code else {}
        warned = done.output.count("skipped: loss or gradient is not finite")
        passed &= (skipped == expected and done.code == 0 and warned == len(expected)
                   and summary["skipped"] == len(expected))
        seen += f", counted {summary.get('skipped')}, {warned} warnings"
    return Found(f"{value:g} in {place}", f"{kind}, {detail}, " + (
        f"from step {_FIRST} on" if endless else f"steps {sorted(steps)}"),
        "skipped, counted, state untouched" + ("; ends, names items" if endless else ""), seen,
        passed)


# Weights.


def _spoil(config: TrainConfig, file: str, value: float) -> tuple[Path, str]:
    """Write the newest checkpoint anew, sound but for one number; its place and the tensor."""
    path = list_checkpoints(config.out / "checkpoints")[-1][1]
    found = load_checkpoint(path)
    name = sorted(found.tensors[file])[0]
    _put(found.tensors[file][name], value)
    save_checkpoint(path.parent, found.step, found.tensors, found.state)
    return path, name


def _in_memory(what: str, step: int, value: float) -> None:
    """After a step, one number in this process's memory is another."""
    real = loop.Trainer.train_step

    def train_step(self, *arguments, **options):
        real(self, *arguments, **options)
        if self.step == step:
            if what == "model":
                tensor = next(self.model.parameters())
            else:
                tensor = next(iter(self.optimizer.state.values()))["exp_avg"]
            with torch.no_grad():
                _put(tensor, value)

    loop.Trainer.train_step = train_step


def _weights(trial: Trial, place: str, way: int) -> Found:
    kind = ("points", "digits")[way % 2]
    whole = reference(kind, trial.shared)
    config = config_of(kind, trial.folder / "run", trial.shared)
    value = (NAN, INF, NAN, -INF, NAN)[way]
    where = ("a weight in memory", "a moment in memory", "a weight of the newest checkpoint",
             "an average of the newest checkpoint", "an average of the run to start from")[way]
    if way < 2:
        what = ("model", "optimizer")[way]

        def work() -> int:
            _in_memory(what, 5, value)
            return train(config)

        done = call(work)
        sound = newest_sound(config.out)
        rest = call(lambda: train(resumed(config)))
        named = "is not finite" in done.last and sound == 3
    elif way < 4:
        file = ("model", "ema_0.9")[way - 2]
        shutil.copytree(whole.out, config.out)
        (config.out / "summary.json").unlink()
        path, name = _spoil(config, file, value)
        before = _files(config.out)
        done = call(lambda: train(resumed(config)))
        named = path.name in done.last and f"{name} in {file}" in done.last
        named &= _files(config.out) == before
        if file != "model":
            named &= call(lambda: load_run(config.out) and 0).code == 1
        shutil.move(path, trial.folder)
        rest = call(lambda: train(resumed(config)))
    else:
        source = replace(config, out=trial.folder / "source")
        shutil.copytree(whole.out, source.out)
        path, name = _spoil(source, "ema_0.9", value)
        start = replace(config, init_from=str(source.out))
        done = call(lambda: train(start))
        named = f"{name} in ema_0.9" in done.last and not config.out.exists()
        rest = call(lambda: train(config))
    same = rest.code == 0 and ending(config.out) == whole.end
    passed = done.code == 1 and done.clean and named and same
    return Found(f"{value:g} in weights", f"{kind}, {where}",
                 "exit code 1, named, good checkpoints untouched",
                 f"exit code {done.code}: {done.last}; without it: "
                 + ("final bits equal" if same else f"final bits differ: {rest.last}"), passed)


def _files(out: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in out.rglob("*")
            if path.is_file() and path.name != "run.lock"}


# Ranks.


def _on_one_rank(trial: Trial, place: str) -> Found:
    """On rank 1 alone: both skip the step, and stay equal bit for bit."""
    kind = "points"
    endless = place in ("delta", "weights")
    steps = set(range(_FIRST, 100)) if endless else {0, 7}
    config = config_of(kind, trial.folder / "run", trial.shared, max_skipped=2 if endless else 10)
    named = trial.folder / "named"

    def work(rank: int) -> int:
        now = {}
        _watch(trial.folder / f"steps-{rank}.json", now)
        if rank == 1 and place == "data":
            _in_data(steps, NAN, [2], now, named)
        elif rank == 1 and place == "loss":
            _in_loss(steps, INF, True, now)
        elif rank == 1 and place == "gradient":
            _in_gradient(steps, NAN, False, now)
        elif rank == 1 and place == "delta":
            _in_delta(steps, NAN, "the attack's gradient", now)
        elif rank == 1:
            _in_memory("model", 5, NAN)
        return train(config)

    done = Job(2, work).wait()
    lines = [json.loads((trial.folder / f"steps-{rank}.json").read_text()) for rank in range(2)]
    skipped = [line["step"] for line in lines[0] if line["skipped"]]
    agree = [line["skipped"] for line in lines[0]] == [line["skipped"] for line in lines[1]]
    kept = all(line["untouched"] == line["skipped"] for part in lines for line in part)
    clean = all(one.clean for one in done)
    codes = [one.code for one in done]
    seen = f"exit codes {codes}, both skipped {skipped}, "
    if place == "weights":
        # Its loss is not finite on that rank, hence on none is a step taken, until they compare.
        agree &= skipped == [5]
        passed = codes == [1, 1] and "differs between ranks" in done[0].last
        passed &= newest_sound(config.out) == 3
    elif endless:
        passed = codes == [1, 1] and skipped == [_FIRST, _FIRST + 1]
        passed &= "with the items" in done[0].last and not done[1].output
        passed &= newest_sound(config.out) == 3
    else:
        passed = codes == [0, 0] and skipped == sorted(steps)
        passed &= all(line["finite"] for part in lines for line in part)
        blamed = json.loads(named.read_text()) if place == "data" else []
        passed &= all(name in done[0].output for name in blamed)
    if place != "weights":
        equal = [line["digest"] for line in lines[0]] == [line["digest"] for line in lines[1]]
        seen += f"state {'equal' if equal else 'NOT equal'} after every step; "
        passed &= equal
    seen += done[0].last
    return Found(f"not finite in {place} of rank 1 of 2", f"{kind}, " + (
        f"from step {_FIRST} on" if endless else f"steps {sorted(steps)}"),
        "both skip, agree bit for bit; endless ones end and name items", seen,
        bool(passed and agree and kept and clean))
