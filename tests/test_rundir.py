"""Run directories: one writer, one run, and lines that survive; signals that only set a flag."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import fields, replace
from importlib.metadata import version

import numpy as np
import pytest
import torch

from robustdm.errors import RunError, UsageError
from robustdm.runs import rundir
from robustdm.runs.config import TrainConfig
from robustdm.runs.rundir import (
    CHANGEABLE,
    RunDir,
    check_same_data,
    git_revision,
    read_config,
    read_metrics,
    write_json,
)
from robustdm.training.signals import StopSignals, exit_code

CONFIG = TrainConfig()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "runs" / "one"


def start(path, config=CONFIG, steps=3):
    with RunDir.open(path, config, resume=False) as run:
        run.record(config, data={"name": "digits"})
        for step in range(1, steps + 1):
            run.append_metrics({"step": step, "loss": 1 / step})


# Who may use a directory.


def test_a_new_run_describes_itself(path):
    config = TrainConfig(stop_after=5, max_time=1.0, lr=2e-5)
    with RunDir.open(path, config, resume=False) as run:
        run.record(config, data={"shape": (1, 8, 8)}, parameters=12)
        assert run.checkpoints == path / "checkpoints" and run.samples == path / "samples"
    facts = json.loads((path / "run.json").read_text())
    assert facts["data"] == {"shape": [1, 8, 8]} and facts["parameters"] == 12
    (session,) = facts["sessions"]
    assert session["versions"]["torch"] == version("torch")
    assert "python" in session["command"] and session["platform"]
    # What concerned that command alone does not come back with a bare --resume.
    assert TrainConfig.from_dict(read_config(path)) == TrainConfig(lr=2e-5)

    with RunDir.open(path, config, resume=True) as run:
        run.record(config, parameters=12)
    assert len(json.loads((path / "run.json").read_text())["sessions"]) == 2


def test_a_directory_that_holds_a_run_is_refused(path):
    start(path)
    before = sorted((file.name, file.read_bytes()) for file in path.iterdir() if file.is_file())
    with pytest.raises(UsageError, match="holds a run; add --resume"):
        RunDir.open(path, CONFIG, resume=False)
    assert sorted((file.name, file.read_bytes()) for file in path.iterdir()
                  if file.is_file()) == before
    RunDir.open(path, CONFIG, resume=True).close()


def test_a_run_with_checkpoints_alone_is_refused_too(path):
    start(path, steps=0)
    (path / "checkpoints" / ".old-step-00000002").mkdir(parents=True)
    with pytest.raises(UsageError, match="holds a run"):
        RunDir.open(path, CONFIG, resume=False)


def test_a_run_that_died_before_its_first_step_may_start_again(path):
    start(path, steps=0)
    start(path, replace(CONFIG, batch_size=2))
    assert read_config(path)["batch_size"] == 2


def test_other_directories_are_refused(path):
    path.mkdir(parents=True)
    (path / "thesis.tex").write_text("mine")
    with pytest.raises(UsageError, match="not empty .it holds 'thesis.tex'. and no run"):
        RunDir.open(path, CONFIG, resume=False)
    with pytest.raises(UsageError, match="cannot resume .*no config.yaml"):
        RunDir.open(path, CONFIG, resume=True)
    assert os.listdir(path) == ["thesis.tex"]
    with pytest.raises(UsageError, match="that is a file"):
        RunDir.open(path / "thesis.tex", CONFIG, resume=False)


def test_resuming_nothing_is_refused_and_creates_nothing(path):
    with pytest.raises(UsageError, match="cannot resume .*does not exist"):
        RunDir.open(path, CONFIG, resume=True)
    assert not path.exists()


def test_a_directory_that_cannot_be_made_is_a_clear_error(path, monkeypatch):
    def refused(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(type(path), "mkdir", refused)
    with pytest.raises(RunError, match="cannot write to .*Permission denied; choose another --out"):
        RunDir.open(path, CONFIG, resume=False)


HOLDER = """
import os, sys, time
from robustdm.runs.config import TrainConfig
from robustdm.runs.rundir import RunDir
run = RunDir.open(sys.argv[1], TrainConfig(), resume=False)
if os.fork() == 0:  # like a data worker, which outlives a killed run for some seconds
    print("held", flush=True)
    time.sleep(60)
    os._exit(0)
sys.stdin.read()
"""


def test_one_process_at_a_time_and_a_killed_one_leaves_no_lock(path):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UsageError, match=rf"another process \(pid {holder.pid}\) is writing"):
            RunDir.open(path, CONFIG, resume=False)
        holder.kill()
        holder.wait()
        RunDir.open(path, CONFIG, resume=False).close()
    finally:
        os.killpg(holder.pid, signal.SIGKILL)
        holder.communicate()


def test_the_lock_is_held_until_close(path):
    first = RunDir.open(path, CONFIG, resume=False)
    with pytest.raises(UsageError, match=f"pid {os.getpid()}"):
        RunDir.open(path, CONFIG, resume=False)
    first.close()
    first.close()
    RunDir.open(path, CONFIG, resume=False).close()


def test_a_directory_that_is_gone_is_made_anew(path):
    with RunDir.open(path, CONFIG, resume=False) as run:
        run.record(CONFIG, parameters=12)
        run.append_metrics({"step": 1})
        assert not run.renew()
        shutil.rmtree(path)
        assert run.renew() and not run.renew()
        with pytest.raises(UsageError, match=f"pid {os.getpid()}"):
            RunDir.open(path, CONFIG, resume=True)
        (path / "run.lock").unlink()  # that alone is no reason
        assert not run.renew()
        (path / "run.lock").write_text(f"{os.getpid()}\n")
        run.append_metrics({"step": 2})
        assert [line["step"] for line in read_metrics(path / "metrics.jsonl")] == [2]
        assert json.loads((path / "run.json").read_text())["parameters"] == 12
        os.rename(path, path.with_name("moved"))
        start(path)
        (path / "run.lock").write_text("1\n")  # of another process
        with pytest.raises(UsageError, match="it holds a run"):
            run.renew()
    RunDir.open(path, CONFIG, resume=True).close()
    assert len(read_metrics(path / "metrics.jsonl")) == 3


def test_a_refused_resume_leaves_no_lock(path):
    start(path)
    with pytest.raises(UsageError):
        RunDir.open(path, replace(CONFIG, seed=1), resume=True)
    RunDir.open(path, CONFIG, resume=True).close()


# What a resumed run may change.


def test_changes_that_make_another_run_are_refused(path):
    start(path)
    asked = replace(CONFIG, batch_size=32, ema_rates=(0.5,))
    with pytest.raises(UsageError) as info:
        RunDir.open(path, asked, resume=True)
    message = str(info.value)
    assert "batch_size is 64 there, 32 was asked for" in message
    assert "ema_rates is [0.995] there, [0.5] was asked for" in message
    assert "another --out" in message and "\n" not in message


@pytest.mark.parametrize("change", [
    dict(steps=900), dict(lr=1e-5), dict(device="cpu"), dict(workers=0), dict(accumulate=2),
    dict(data_dir="elsewhere"), dict(stop_after=3), dict(resume=True), dict(keep_last=9),
])
def test_other_changes_are_welcome(path, change):
    start(path)
    RunDir.open(path, replace(CONFIG, **change), resume=True).close()


def test_every_changeable_field_exists():
    names = {field.name for field in fields(TrainConfig)}
    assert CHANGEABLE.keys() <= names
    for name in ("seed", "data", "batch_size", "objective", "network", "warmup_steps", "holdout",
                 "precision", "corrupt_sigma", "num_points", "clip_norm", "timesteps"):
        assert name in names - CHANGEABLE.keys()


def test_a_field_that_an_old_run_did_not_know_has_its_default(path):
    start(path)
    file = path / "config.yaml"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(line for line in lines if not line.startswith("gamma:")))
    RunDir.open(path, CONFIG, resume=True).close()
    with pytest.raises(UsageError, match="gamma is"):
        RunDir.open(path, replace(CONFIG, gamma=0.5), resume=True)


@pytest.mark.parametrize("text, problem", [
    ("a: [", "is not YAML"),
    ("- 1", "not the configuration of a run"),
    ("1: 2", "not the configuration of a run"),
    ("", "not the configuration of a run"),
    ("!!python/object/apply:os.system ['touch evil']", "is not YAML"),
    ("\x00", "is not YAML"),
    ("a: &a [1]\nb: *a", "is not YAML: it has an alias, \\*a"),
    ("a: 2001-99-99", "is not YAML"),
    ("#" * (2 << 20), "is not YAML: it is longer than"),
])
def test_damaged_configurations_are_one_clear_line(path, text, problem, monkeypatch):
    start(path)
    monkeypatch.chdir(path)
    (path / "config.yaml").write_text(text)
    with pytest.raises(UsageError, match=problem) as info:
        RunDir.open(path, CONFIG, resume=True)
    assert "\n" not in str(info.value) and "config.yaml" in str(info.value)
    assert not (path / "evil").exists()


def test_read_config_names_what_is_missing(path):
    with pytest.raises(UsageError, match="no such directory"):
        read_config(path)
    path.mkdir(parents=True)
    with pytest.raises(UsageError, match="has no config.yaml"):
        read_config(path)


def test_other_data_are_refused(path):
    saved = {"name": "images", "count": 10, "shape": [3, 8, 8], "sha256": "ab"}
    check_same_data(saved, {**saved, "shape": (3, 8, 8)}, path)
    with pytest.raises(UsageError, match="count was 10 and is 11; sha256 was 'ab' and is 'cd'"):
        check_same_data(saved, {**saved, "count": 11, "sha256": "cd"}, path)
    with pytest.raises(UsageError, match="sigma was None and is 0.2"):
        check_same_data(saved, {**saved, "sigma": 0.2}, path)


def test_data_may_move_but_not_change(path):
    saved = {"name": "pictures", "count": 10, "sha256": "ab"}
    check_same_data(saved, {**saved, "name": "pictures.zip"}, path)
    with pytest.raises(UsageError, match="name was 'pictures' and is 'others'"):
        check_same_data(saved, {**saved, "name": "others", "sha256": "cd"}, path)
    unknown = {"name": "plane", "count": 10}
    with pytest.raises(UsageError, match="name was 'plane'"):
        check_same_data(unknown, {**unknown, "name": "gaussians"}, path)


# Lines and files.


def test_metrics_are_json_whatever_the_numbers(path):
    with RunDir.open(path, CONFIG, resume=False) as run:
        run.append_metrics({"step": 1, "loss": float("nan"), "samples": {"d": np.float32(0.5)},
                            "t": torch.tensor([1.0, float("inf")])})
        # A reader sees the line while the run goes on.
        (line,) = read_metrics(path / "metrics.jsonl")
    assert line == {"step": 1, "loss": None, "samples": {"d": 0.5}, "t": [1.0, None]}


def test_resuming_drops_the_lines_after_the_checkpoint(path):
    start(path, steps=5)
    with open(path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')
    with RunDir.open(path, CONFIG, resume=True) as run:
        assert run.truncate_metrics(3) == {"step": 3, "loss": 1 / 3}
        run.append_metrics({"step": 4})
    assert [line["step"] for line in read_metrics(path / "metrics.jsonl")] == [1, 2, 3, 4]
    assert (path / "metrics.jsonl").read_bytes().count(b"\n") == 4
    with RunDir.open(path, CONFIG, resume=True) as run:
        assert run.truncate_metrics(0) is None
    assert (path / "metrics.jsonl").read_bytes() == b""


def test_without_metrics_there_is_nothing_to_drop(path):
    with RunDir.open(path, CONFIG, resume=False) as run:
        assert run.truncate_metrics(3) is None


def test_a_full_disk_costs_a_line_and_not_the_run(path, monkeypatch, caplog):
    write = os.write
    with RunDir.open(path, CONFIG, resume=False) as run:
        run.append_metrics({"step": 1})
        monkeypatch.setattr(os, "write", lambda handle, data: write(handle, data[:4]))
        run.append_metrics({"step": 2})
        assert "metrics.jsonl was lost: only part" in caplog.messages[0]

        def full(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "write", full)
        run.append_metrics({"step": 3})
        assert "No space left" in caplog.messages[1]
        monkeypatch.setattr(os, "write", write)
        run.append_metrics({"step": 4})
    assert [line["step"] for line in read_metrics(path / "metrics.jsonl")] == [1, 4]


def test_write_json_replaces_in_one_piece(tmp_path, monkeypatch):
    file = tmp_path / "summary.json"
    write_json(file, {"a": (1, float("inf"))})
    assert json.loads(file.read_text()) == {"a": [1, None]}

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(rundir.os, "fsync", full)
    with pytest.raises(RunError, match="summary.json was not written: No space left"):
        write_json(file, {"a": 2})
    assert os.listdir(tmp_path) == ["summary.json"]
    assert json.loads(file.read_text()) == {"a": [1, None]}


def test_the_revision_is_that_of_this_package_or_none(tmp_path, monkeypatch):
    def git(*arguments):
        subprocess.run(["git", "-C", tmp_path, "-c", "user.name=n", "-c", "user.email=e",
                        *arguments], check=True, capture_output=True)

    try:
        git("init")
    except OSError:
        pytest.skip("git is not installed")
    module = tmp_path / "rundir.py"
    module.write_text("")
    monkeypatch.setattr(rundir, "__file__", str(module))
    (tmp_path / "own.py").write_text("")
    git("add", "own.py")
    git("commit", "-m", "somebody else's repository")
    assert git_revision() is None
    git("add", ".")
    git("commit", "-m", "with the package")
    revision = git_revision()
    assert len(revision) == 40
    module.write_text("changed")
    assert git_revision() == f"{revision}-dirty"


# Signals.


@pytest.mark.parametrize("number, code", [
    (signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 138)])
def test_a_signal_sets_a_flag(number, code):
    before = signal.getsignal(number)
    with StopSignals() as stop:
        assert stop.received is None and exit_code(stop.received) == 0
        os.kill(os.getpid(), number)
        assert stop.received == number and exit_code(stop.received) == code
        # The first one decides, and more of them change nothing.
        os.kill(os.getpid(), signal.SIGTERM)
        assert exit_code(stop.received) == code
    assert signal.getsignal(number) is before


def test_a_second_interrupt_is_obeyed_at_once():
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert exit_code(stop.received) == 143


def test_other_threads_may_train_without_signals():
    codes = []

    def work():
        with StopSignals() as stop:
            codes.append(exit_code(stop.received))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert codes == [0]


WORKER = """
import os, signal, time
from robustdm.training.signals import StopSignals
with StopSignals():
    child = os.fork()
    if child == 0:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
        os._exit(0)
    time.sleep(0.3)
    assert os.waitpid(child, os.WNOHANG) == (0, 0)
    os.kill(child, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 143
"""


def test_a_data_worker_survives_the_group_s_signals_until_it_is_told_again():
    done = subprocess.run([sys.executable, "-c", WORKER], capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_what_a_dead_writer_left_is_cleared_away(tmp_path):
    """Killed in its first milliseconds, a run can be started anew by the same command."""
    left = f".tmp-{'0a' * 16}"
    (tmp_path / f"{left}-pipeline").mkdir()
    for path in (f"{left}-pipeline/x", f"{left}-config.yaml"):
        (tmp_path / path).write_text("half")
    RunDir.open(tmp_path, TrainConfig(), resume=False).close()
    assert [path.name for path in tmp_path.iterdir()] == ["run.lock"]
    (tmp_path / ".tmp-mine").write_text("")
    with pytest.raises(UsageError, match="not empty .it holds '.tmp-mine'"):
        RunDir.open(tmp_path, TrainConfig(), resume=False)
