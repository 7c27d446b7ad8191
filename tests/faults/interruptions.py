"""F1, kill -9 at any moment, and F2, signals."""

from __future__ import annotations

import os
import signal
import threading
import time

from robustdm.data import images
from robustdm.runs import checkpoint
from robustdm.training import loop, outputs
from tests.faults.deadly import kill_after_bytes

from .campaign import Found, Trial
from .runs import (
    INTERVAL,
    Child,
    call,
    config_of,
    ending,
    kind_of,
    last_step,
    newest_sound,
    reference,
    resumed,
    train,
)

RANDOM_KILLS, BYTE_KILLS, CALL_KILLS = 60, 28, 12
_CALLS = ("fsync", "rename", "unlink", "rmdir")


def kill(trial: Trial) -> Found:
    """F1: kill a run, resume it, and compare its end with that of a run left alone."""
    kind = kind_of(trial)
    whole = reference(kind, trial.shared)
    config = config_of(kind, trial.folder / "run", trial.shared)
    if trial.number < RANDOM_KILLS:
        share = trial.random.random()
        where = f"{kind}, at {share:.0%} of the run's time"

        def die() -> None:
            child = Child(lambda: train(resumed(config)))
            time.sleep(share * whole.seconds)
            child.kill()
            child.wait()
    elif trial.number < RANDOM_KILLS + BYTE_KILLS:
        count = trial.random.randrange(whole.written)
        where = f"{kind}, after {count} bytes of {whole.written}"

        def die() -> None:
            def work() -> int:
                kill_after_bytes(count)
                return train(resumed(config))

            call(work)
    else:
        name = _CALLS[trial.number % len(_CALLS)]
        number = trial.random.randrange(12)
        where = f"{kind}, before call {number} of os.{name}"

        def die() -> None:
            call(lambda: train_until_call(resumed(config), name, number))

    lost, steps = 0, []
    for _ in range(1 + (trial.number % 5 == 4)):  # some die twice
        die()
        reached, sound = last_step(config.out), newest_sound(config.out)
        steps.append(reached)
        lost = max(lost, reached - sound)
    done = call(lambda: finish(config))
    same = done.code == 0 and ending(config.out) == whole.end
    seen = (f"killed after step {', '.join(map(str, steps))}; {lost} steps lost; "
            f"{'final bits equal' if same else f'final bits differ: {done.last}'}")
    return Found("SIGKILL", where, f"final bits equal, at most {INTERVAL} steps lost", seen,
                 same and lost <= INTERVAL)


def finish(config) -> int:
    """Resume to the end; a run that was killed after its end is left as it is."""
    if (config.out / "summary.json").exists():
        return 0
    return train(resumed(config))


def train_until_call(config, name: str, number: int) -> int:
    """Train, and die before a call of the system."""
    real, left = getattr(os, name), [number]

    def deadly(*arguments, **options):
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        return real(*arguments, **options)

    setattr(os, name, deadly)
    return train(config)


# Signals. Each moment: what is replaced so that the run sends itself the signal there.

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def _before(place, name: str, number: int, send) -> None:
    """Send before call ``number`` of a function."""
    real, left = getattr(place, name), [number]

    def interrupted(*arguments, **options):
        if left[0] == 0:
            send()
        left[0] -= 1
        return real(*arguments, **options)

    setattr(place, name, interrupted)


_MOMENTS = {
    "in a step": lambda n, send: _before(loop.Trainer, "train_step", n % 12, send),
    "between files of a save": lambda n, send: _before(checkpoint, "_write_file", n % 18, send),
    "while old checkpoints are pruned": lambda n, send: _before(loop, "prune", n % 4, send),
    "in the sampling of a preview": lambda n, send: _before(
        loop._Session, "_sample", n % 2, send),
    "in the final sampling": lambda n, send: _before(loop._Session, "_sample", 2, send),
    "in the reference samples": lambda n, send: _before(
        outputs.Outputs, "write_reference", 0, send),
    "while the pipeline or the summary is written": lambda n, send: _before(
        *((outputs, "save_pipeline") if n % 2 else (outputs, "write_json")), 0, send),
    "while workers start": lambda n, send: _before(images, "decode_in_workers", 0, send),
    "while metrics are written": lambda n, send: _before(
        loop.RunDir, "append_metrics", n % 12, send),
}
COMPILED = 3


def signalled(trial: Trial) -> Found:
    """F2: a signal, or two, at a certain moment; then the rest of the run."""
    number = _SIGNALS[trial.number % len(_SIGNALS)]
    if trial.number < COMPILED:
        return _while_compiling(trial, number)
    moment = list(_MOMENTS)[trial.number % len(_MOMENTS)]
    kind = "pictures" if "workers" in moment else "digits" if "pipeline" in moment else (
        kind_of(trial))
    again = trial.random.choice((None, None, signal.SIGTERM, signal.SIGUSR1))
    to_group = trial.random.random() < 0.3
    whole = reference(kind, trial.shared)
    config = config_of(kind, trial.folder / "run", trial.shared)
    count, stamp = trial.random.randrange(1000), trial.folder / "sent"

    def send() -> None:
        stamp.write_text(str(time.monotonic()))
        for one in (number, again):
            if one is not None:
                # As a terminal or a batch system does: to the data workers as well.
                (os.killpg if to_group else os.kill)(os.getpid(), one)

    def work() -> int:
        os.setpgid(0, 0)
        _MOMENTS[moment](count, send)
        return train(config)

    done = call(work)
    took = time.monotonic() - float(stamp.read_text()) if stamp.exists() else None
    sound, reached = newest_sound(config.out), last_step(config.out)
    rest = call(lambda: finish(config))
    same = rest.code == 0 and ending(config.out) == whole.end
    expected_code = 128 + number
    # Once the samples are made, what is left of the run is written to its end.
    codes = (expected_code,) if done.code else (0, expected_code)
    passed = (took is not None and done.code in codes and done.clean and took <= 10
              and sound >= reached and same and (done.code or sound == config.steps))
    seen = (f"exit code {done.code}, " + (f"{took:.1f} s" if took is not None else "not sent")
            + f", saved at step {sound} of {reached}, "
            + ("final bits equal" if same else f"final bits differ: {rest.last}"))
    twice = f", then {again.name}" if again else ""
    return Found(f"{number.name}{twice}{' to the group' if to_group else ''}", f"{kind}, {moment}",
                 f"saved, exit code {expected_code}, at most 10 s, final bits equal", seen, passed)


def _while_compiling(trial: Trial, number: signal.Signals) -> Found:
    """A signal while the step is compiled: nothing is done yet that could be lost."""
    config = config_of("points", trial.folder / "run", trial.shared, compile=True)
    stamp = trial.folder / "sent"
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(trial.folder / "cache")
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"

    def work() -> int:
        def send() -> None:
            stamp.write_text(str(time.monotonic()))
            os.kill(os.getpid(), number)

        timer = threading.Timer(1.0 + trial.random.random(), send)
        _before(loop, "compile_step", 0, timer.start)
        return train(config)

    done = call(work)
    took = time.monotonic() - float(stamp.read_text()) if stamp.exists() else None
    passed = took is not None and took <= 10 and done.code == 128 + number and done.clean
    seen = f"exit code {done.code}, " + (
        f"{took:.1f} s" if took is not None else "not sent") + f": {done.last}"
    return Found(number.name, "points, while the step is compiled",
                 f"exit code {128 + number}, at most 10 s", seen, passed)


