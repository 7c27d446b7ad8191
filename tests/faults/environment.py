"""F12: what a machine lacks or has broken, and what happens to a run's directory."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import yaml

from robustdm import train as command
from robustdm.runs import checkpoint
from robustdm.runs.checkpoint import list_checkpoints, verify
from robustdm.runs.config import TrainConfig
from robustdm.runs.rundir import read_metrics
from robustdm.training import loop, outputs

from .campaign import Found, Trial
from .runs import (
    Child,
    Done,
    bits,
    call,
    config_of,
    ending,
    last_step,
    mount_tmpfs,
    newest_sound,
    own_mounts,
    reference,
    remount,
    resumed,
    train,
)


def spoil(trial: Trial) -> Found:
    """F12: each environment once."""
    return (_no_gpu, _no_triton, _no_compiler, _broken_torchvision, _broken_xformers, _offline,
            _read_only, _other_device, _clock, _private, _two_runs, _deleted)[trial.number](trial)


def _refused(done: Done, code: int, *words: str) -> bool:
    """Whether it ended with a line that has these words."""
    line = (done.output.strip().splitlines() or [""])[-1]
    return done.code == code and done.clean and line.startswith("error: ") and all(
        word in line for word in words)


def _same(done: Done, config: TrainConfig, end: str) -> bool:
    return done.code == 0 and done.clean and ending(config.out) == end


def _verdict(same: bool) -> str:
    return "final bits equal" if same else "final bits DIFFER"


# What is not there.


def _no_gpu(trial: Trial) -> Found:
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    out = trial.folder / "run"
    done = call(lambda: command.main(["--preset", "plane", "--device", "cuda", "--out", str(out)]))
    passed = _refused(done, 2, "device is 'cuda'", "use cpu") and not out.exists()
    return Found("no GPU", "--device cuda", "exit code 2, one line, nothing written",
                 f"exit code {done.code}: {done.last}", passed)


def _no_triton(trial: Trial) -> Found:
    whole = reference("digits", trial.shared)
    config = config_of("digits", trial.folder / "run", trial.shared)
    asked = replace(config, out=trial.folder / "asked", backend="triton")

    def without() -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] == "triton"]:
            sys.modules[name] = None
        sys.modules["triton"] = None
        os.environ["TRITON_INTERPRET"] = "1"

    done = call(lambda: without() or train(config))
    refused = call(lambda: without() or train(asked))
    same = _same(done, config, whole.end)
    passed = same and _refused(refused, 2, "backend is 'triton'", "triton cannot be imported",
                               "backend='auto'")
    return Found("no triton", "digits; then --backend triton",
                 "goes on, final bits equal; refused where asked for",
                 f"{_verdict(same)}; exit code {refused.code}: {refused.last}", passed)


def _no_compiler(trial: Trial) -> Found:
    whole = reference("points", trial.shared)
    config = config_of("points", trial.folder / "run", trial.shared, compile=True)
    os.environ |= {"PATH": "/nonexistent", "CXX": "/nonexistent/c++",
                   "TORCHINDUCTOR_CACHE_DIR": str(trial.folder / "cache"),
                   "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    done = call(lambda: train(config))
    same, told = _same(done, config, whole.end), "--compile does not work here" in done.output
    return Found("no compiler", "points, --compile", "a warning, goes on, final bits equal",
                 f"exit code {done.code}, {'warned' if told else 'NO warning'}, {_verdict(same)}",
                 same and told)


def _broken(trial: Trial, package: str, error: str) -> Found:
    """A package that is installed, by its metadata, and cannot be imported; in a new process.

    diffusers imports it if it is there, hence cannot be imported itself: the line has to say whose
    fault that is. Runs without diffusers do not notice.
    """
    fake = trial.folder / "fake"
    for path, text in ((fake / package / "__init__.py", f"raise {error}\n"),
                       (fake / f"{package}-9.9.dist-info" / "METADATA",
                        f"Metadata-Version: 2.1\nName: {package}\nVersion: 9.9\n")):
        path.parent.mkdir(parents=True)
        path.write_text(text)
    root = str(Path(__file__).parents[2])

    def start(kind: str) -> tuple[Done, TrainConfig]:
        config = config_of(kind, trial.folder / kind, trial.shared)
        file = trial.folder / f"{kind}.yaml"
        file.write_text(yaml.safe_dump(config.to_dict()))
        done = subprocess.run(
            [sys.executable, "-m", "robustdm.train", "--config", str(file)], text=True,
            timeout=180, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONPATH": f"{fake}:{root}", "OMP_NUM_THREADS": "1"})
        return Done(done.returncode, done.stdout, 0.0, 0.0, 0), config

    points, config = start("points")
    digits, other = start("digits")
    same = _same(points, config, reference("points", trial.shared).end)
    named = _refused(digits, 2, "diffusers cannot be imported", f"{package} is broken",
                     error[-12:-2], "uninstall") and not other.out.exists()
    return Found(f"broken {package}", "new processes: points, digits",
                 "points: final bits equal; digits: one line that names it, exit code 2",
                 f"points: {_verdict(same)}; digits: exit code {digits.code}: {digits.last}",
                 same and named)


def _broken_torchvision(trial: Trial) -> Found:
    return _broken(trial, "torchvision",
                   "RuntimeError('operator torchvision::nms does not exist')")


def _broken_xformers(trial: Trial) -> Found:
    return _broken(trial, "xformers", "ImportError('undefined symbol: _ZN3c104cuda')")


def _offline(trial: Trial) -> Found:
    from huggingface_hub import constants

    whole = reference("digits", trial.shared)
    out = trial.folder / "run"

    def start(model: str) -> Callable[[], int]:
        def work() -> int:
            constants.HF_HUB_OFFLINE = True  # what HF_HUB_OFFLINE=1 sets at the import
            constants.HF_HUB_CACHE = str(trial.folder / "cache")
            outputs.write_report = lambda _: None
            return command.main([
                "--preset", "finetune", "--init-from", model, "--data", "digits", "--out", str(out),
                "--batch-size", "8", "--steps", "2", "--num-samples", "2", "--final-steps", "2"])
        return work

    hub = call(start("owner/model"))
    refused = _refused(hub, 2, "init_from is 'owner/model'", "--local-dir") and not out.exists()
    local = call(start(str(whole.out / "pipeline")))
    trained = local.code == 0 and local.clean and newest_sound(out) == 2
    return Found("HF_HUB_OFFLINE", "--init-from owner/model; then a folder",
                 "exit code 2, one line with the remedy; a folder works",
                 f"exit code {hub.code}: {hub.last}; folder: exit code {local.code}",
                 refused and trained)


# The directory.


def _read_only(trial: Trial) -> Found:
    own_mounts()
    whole = reference("points", trial.shared)
    place = trial.folder / "disk"
    mount_tmpfs(place, 24 * 2**20)
    config = config_of("points", place / "run", trial.shared)
    new = replace(config, out=place / "new")
    call(lambda: train(replace(config, stop_after=5)))
    (config.out / "summary.json").unlink()
    remount(place, read_only=True)
    first, again = call(lambda: train(new)), call(lambda: train(resumed(config)))
    remount(place, read_only=False)
    rest = call(lambda: train(resumed(config)))
    same = _same(rest, config, whole.end)
    passed = same and all(
        _refused(done, 1, f"cannot write to {one.out}", "Read-only", "--out")
        for done, one in ((first, new), (again, config)))
    return Found("read-only directory", "a new run; then --resume",
                 "exit code 1, one line; writable again: final bits equal",
                 f"exit codes {first.code}, {again.code}: {again.last}; {_verdict(same)}", passed)


def _other_device(trial: Trial) -> Found:
    """EXDEV, as overlay file systems give it for directories of a lower layer."""
    whole = reference("points", trial.shared)
    config = config_of("points", trial.folder / "run", trial.shared)

    def work(bad: Callable[[int], bool]) -> int:
        real, calls = os.rename, []

        def rename(*arguments, **options):
            calls.append(1)
            if bad(len(calls)):
                raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
            return real(*arguments, **options)

        checkpoint.os.rename = rename
        return train(config)

    forever = call(lambda: work(lambda n: n > 1))
    steps = list_checkpoints(config.out / "checkpoints")
    kept = [step for step, _ in steps] == [3] and not verify(steps[0][1])
    told = forever.code == 1 and forever.clean and str(config.out) in forever.last
    shutil.rmtree(config.out)
    once = call(lambda: work(lambda n: n == 2))
    same = _same(once, config, whole.end)
    warned = "warning: the checkpoint of step 6 was not written" in once.output
    return Found("EXDEV on rename", "from the second checkpoint on; then at the second alone",
                 "exit code 1, the first kept; a warning, final bits equal",
                 f"exit code {forever.code}: {forever.last}; {_verdict(same)}",
                 kept and told and warned and same)


def _clock(trial: Trial) -> Found:
    """The clock is set back by a year, and forward by ten."""
    whole = reference("points", trial.shared)
    config = config_of("points", trial.folder / "run", trial.shared, max_time=60.0,
                       checkpoint_minutes=30.0)

    def work() -> int:
        real, step, calls = time.time, loop.Trainer.train_step, []

        def train_step(self, *arguments):
            calls.append(1)
            return step(self, *arguments)

        year = 365 * 86400.0
        time.time = lambda: real() + (0.0 if len(calls) < 4 else -year if len(calls) < 8
                                      else 10 * year)
        loop.Trainer.train_step = train_step
        return train(config)

    done = call(work)
    same = _same(done, config, whole.end)
    times = [line["time"] for line in read_metrics(config.out / "metrics.jsonl")]
    sane = times == sorted(times) and times[0] >= 0 and times[-1] < 600
    return Found("clock jumps", "a year back, ten years forward, --max-time 60",
                 "goes on, times in order, final bits equal",
                 f"exit code {done.code}, {_verdict(same)}, times from {times[0]} to {times[-1]} s",
                 same and sane)


def _private(trial: Trial) -> Found:
    """Files are as private as the umask says, neither more nor less."""
    whole = reference("digits", trial.shared)
    wrong, same = [], True
    for mask in (0o077, 0o022):
        config = config_of("digits", trial.folder / f"run-{mask:o}", trial.shared)
        done = call(lambda mask=mask, config=config: os.umask(mask) and 0 or train(config))
        same &= _same(done, config, whole.end)
        for path in (config.out, *config.out.rglob("*")):
            wanted = (0o777 if path.is_dir() else 0o666) & ~mask
            if stat.S_IMODE(path.stat().st_mode) != wanted:
                wrong.append(f"{path.name}: {stat.S_IMODE(path.stat().st_mode):o}")
    return Found("umask 077", "and 022", "files and folders of that mode, final bits equal",
                 f"{_verdict(same)}; others: {', '.join(wrong) or 'none'}", same and not wrong)


def _two_runs(trial: Trial) -> Found:
    whole = reference("points", trial.shared)
    config = config_of("points", trial.folder / "run", trial.shared)

    def stopping() -> int:
        real, calls = loop.Trainer.train_step, []

        def train_step(self, *arguments):
            calls.append(1)
            if len(calls) == 8:
                os.kill(os.getpid(), signal.SIGSTOP)
            return real(self, *arguments)

        loop.Trainer.train_step = train_step
        return train(config)

    first = Child(stopping)
    os.waitid(os.P_PID, first.process, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    fresh, again = call(lambda: train(config)), call(lambda: train(resumed(config)))
    first.kill(signal.SIGCONT)
    done = first.wait()
    same = _same(done, config, whole.end)
    held = _refused(again, 2, f"pid {first.process}", str(config.out), "--out")
    held &= _refused(fresh, 2, str(config.out), "--out")
    # And two that begin at once: one of them gets it.
    both = replace(config, out=trial.folder / "both")
    ends = [one.wait() for one in [Child(lambda: train(both)) for _ in range(2)]]
    codes = sorted(one.code for one in ends)
    loser = max(ends, key=lambda one: one.code)
    fair = codes == [0, 2] and _refused(loser, 2, str(both.out)) and (
        ending(both.out) == whole.end)
    return Found("two runs in one directory", "one after the other; both at once",
                 "the second exits with 2 and names the first, final bits equal",
                 f"{again.last}; {_verdict(same)}; at once: exit codes {codes}, {loser.last}",
                 held and same and fair)


def _deleted(trial: Trial) -> Found:
    """The directory is deleted while the run trains; and moved, another run in its place."""
    whole = reference("digits", trial.shared)
    config = config_of("digits", trial.folder / "run", trial.shared)
    moved = trial.folder / "moved"

    def work(what: Callable[[], None]) -> int:
        real, calls = loop.Trainer.train_step, []

        def train_step(self, *arguments):
            calls.append(1)
            if len(calls) == 5:
                what()
            return real(self, *arguments)

        loop.Trainer.train_step = train_step
        return train(config)

    done = call(lambda: work(lambda: shutil.rmtree(config.out)))
    same = done.code == 0 and done.clean and bits(config.out) == bits(whole.out)
    warned = f"warning: {config.out} was deleted or moved away" in done.output
    complete = all((config.out / name).exists() for name in (
        "config.yaml", "run.json", "report.html", "samples/final.npz", "samples/reference.npz"))
    complete &= last_step(config.out) == 12
    shutil.rmtree(config.out)

    def replaced() -> None:
        os.rename(config.out, moved)
        shutil.copytree(whole.out, config.out)

    other = call(lambda: work(replaced))
    untouched = ending(config.out) == whole.end
    refused = other.code == 2 and other.clean and str(config.out) in other.last
    rest = call(lambda: train(resumed(replace(config, out=moved))))
    again = _same(rest, replace(config, out=moved), whole.end)
    return Found("deleted run directory", "at step 4; then moved away for another run's",
                 "a warning, made anew, final bits equal; the other run untouched",
                 f"exit code {done.code}, {_verdict(same)}, "
                 f"{'complete' if complete else 'NOT complete'}; {other.last}; resumed where it "
                 f"was moved to: {_verdict(again)}",
                 same and warned and complete and refused and untouched and again)
