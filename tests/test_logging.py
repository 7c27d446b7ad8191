"""Extra log sinks and live progress: never in the way of a run, one owner of the screen."""

import io
import re
import sys
import types

import numpy as np
import pytest

from robustdm.errors import UsageError
from robustdm.reporting.progress import Progress, duration
from robustdm.runs.config import TrainConfig
from robustdm.training.trackers import Logger, flatten, make_loggers


class Recorder:
    """A sink that keeps its calls and fails on request."""

    def __init__(self, name="recorder", broken=()):
        self.name, self.broken, self.calls = name, broken, []

    def _call(self, method, *arguments):
        self.calls.append((method, *arguments))
        if method in self.broken:
            raise OSError("disk is\nfull")

    def log(self, step, scalars):
        self._call("log", step, scalars)

    def images(self, step, name, grid):
        self._call("images", step, name, grid)

    def close(self):
        self._call("close")


def test_logger_passes_flat_numbers_and_batches_of_pictures():
    sink = Recorder()
    logger = Logger([sink])
    logger.log(5, {"loss": 1, "skip": True, "note": "x", "none": None, "samples": {"rms": 0.5}})
    logger.images(5, "samples", np.zeros((8, 8, 1), np.uint8))
    logger.close()
    logger.close()
    assert sink.calls[0] == ("log", 5, {"loss": 1.0, "samples/rms": 0.5})
    assert sink.calls[1][3].shape == (1, 8, 8, 1)
    assert [call[0] for call in sink.calls] == ["log", "images", "close"]


def test_flatten_keeps_nan_and_depth():
    flat = flatten({"a": {"b": {"c": 2}}, "n": float("nan")})
    assert flat["a/b/c"] == 2 and np.isnan(flat["n"]) and len(flat) == 2


@pytest.mark.parametrize("method", ["log", "images", "close"])
def test_failing_sink_warns_once_and_the_others_go_on(method):
    bad, good, warnings = Recorder("bad", (method,)), Recorder("good"), []
    logger = Logger([bad, good], warnings.append)
    for step in range(3):
        logger.log(step, {"loss": 1.0})
        logger.images(step, "samples", np.zeros((2, 4, 4, 3), np.uint8))
    logger.close()
    assert len(warnings) == 1 and "\n" not in warnings[0]
    assert "bad failed" in warnings[0] and "OSError: disk is full" in warnings[0]
    assert sum(call[0] == method for call in bad.calls) == 1
    assert [call[0] for call in good.calls] == ["log", "images"] * 3 + ["close"]


def test_interrupt_is_not_swallowed():
    class Interrupted(Recorder):
        def log(self, step, scalars):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Logger([Interrupted()]).log(0, {})


def test_no_sinks_by_default(tmp_path):
    before = set(sys.modules)
    logger = make_loggers(TrainConfig(), tmp_path)
    logger.log(1, {"loss": 1.0})
    logger.close()
    assert logger.sinks == [] and not list(tmp_path.iterdir())
    assert not {"tensorboard", "wandb"} & (set(sys.modules) - before)


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_missing_package_names_the_extra(tmp_path, monkeypatch, name):
    for module in [m for m in sys.modules if m.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UsageError) as caught:
        make_loggers(TrainConfig(**{name: True}), tmp_path)
    text = str(caught.value)
    assert 'pip install "robustdm[log]"' in text and f"{name} is True" in text and "\n" not in text
    assert not list(tmp_path.iterdir())  # nothing that would make the directory look used


@pytest.fixture
def fake_tensorboard(monkeypatch):
    events = []

    class SummaryWriter:
        def __init__(self, log_dir, purge_step=None):
            events.append(("open", log_dir, purge_step))

        def add_scalar(self, tag, value, step):
            events.append(("scalar", tag, value, step))

        def add_images(self, tag, pictures, step, dataformats):
            events.append(("images", tag, pictures.shape, step, dataformats))

        def close(self):
            events.append(("close",))

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    return events


def test_tensorboard_sink(tmp_path, fake_tensorboard):
    logger = make_loggers(TrainConfig(tensorboard=True), tmp_path, start_step=40)
    logger.log(41, {"loss": 0.5})
    logger.images(41, "samples", np.zeros((2, 8, 8, 1), np.uint8))
    logger.close()
    assert fake_tensorboard == [
        ("open", str(tmp_path / "tensorboard"), 41), ("scalar", "loss", 0.5, 41),
        ("images", "samples", (2, 8, 8, 1), 41, "NHWC"), ("close",),
    ]


def test_new_tensorboard_run_purges_nothing(tmp_path, fake_tensorboard):
    make_loggers(TrainConfig(tensorboard=True), tmp_path)
    assert fake_tensorboard == [("open", str(tmp_path / "tensorboard"), None)]


def test_real_tensorboard_files(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    warnings = []
    logger = make_loggers(TrainConfig(tensorboard=True), tmp_path, warn=warnings.append)
    logger.log(3, {"loss": 0.25})
    logger.images(3, "samples", np.zeros((8, 8, 1), np.uint8))
    logger.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(3, 0.25)]
    assert events.Tags()["images"] == ["samples"] and not warnings


@pytest.fixture
def fake_wandb(monkeypatch):
    calls = []

    class Run:
        def define_metric(self, name, step_metric):
            calls.append(("metric", name, step_metric))

        def log(self, values):
            calls.append(("log", values))

        def finish(self):
            calls.append(("finish",))

    module = types.ModuleType("wandb")
    module.Image = lambda picture: ("Image", picture.shape)

    def init(**arguments):
        calls.append(("init", arguments))
        return Run()

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return calls


def test_wandb_sink_continues_the_same_run(tmp_path, fake_wandb):
    config = TrainConfig(wandb=True)
    first = make_loggers(config, tmp_path)
    first.log(7, {"loss": 0.5})
    first.images(7, "grey", np.zeros((1, 8, 9, 1), np.uint8))
    first.images(7, "rgb", np.zeros((1, 8, 9, 3), np.uint8))
    first.close()
    make_loggers(config, tmp_path)
    starts = [call[1] for call in fake_wandb if call[0] == "init"]
    assert starts[0]["id"] == starts[1]["id"] and starts[0]["resume"] == "allow"
    assert starts[0]["config"]["lam"] == 0.3 and starts[0]["dir"] == str(tmp_path)
    assert fake_wandb[1:6] == [
        ("metric", "*", "step"), ("log", {"loss": 0.5, "step": 7}),
        ("log", {"grey": [("Image", (8, 9))], "step": 7}),
        ("log", {"rgb": [("Image", (8, 9, 3))], "step": 7}), ("finish",),
    ]


def test_service_that_cannot_start_is_one_line(tmp_path, fake_wandb, monkeypatch):
    def refuse(**_):
        raise RuntimeError("no API\nkey")

    monkeypatch.setattr(sys.modules["wandb"], "init", refuse)
    with pytest.raises(UsageError) as caught:
        make_loggers(TrainConfig(wandb=True), tmp_path)
    assert "no API key" in str(caught.value) and "WANDB_MODE=offline" in str(caught.value)


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_plain_lines_come_seldom_and_at_the_end():
    clock, stream = Clock(), io.StringIO()
    with Progress(100, 0, 64, stream=stream, clock=clock) as progress:
        assert progress.mode == "plain"  # not a terminal
        for step in range(1, 101):
            clock.now += 0.25
            progress.update(step, {"loss": 1 / step} if step % 20 == 0 else None)
        assert "step 100/100" in stream.getvalue()  # before what is said after the last step
    lines = stream.getvalue().splitlines()
    assert [line.split(" | ")[0] for line in lines] == ["step 40/100", "step 80/100",
                                                        "step 100/100"]
    assert lines[0] == "step 40/100 | 15 s left | loss 0.025 | 256 img/s | 250 ms/step"
    assert lines[-1] == "step 100/100 | 0 s left | loss 0.01 | 256 img/s | 250 ms/step"
    assert "\x1b" not in stream.getvalue()


def test_fields_stay_until_new_ones_come():
    clock, stream = Clock(), io.StringIO()
    with Progress(100, stream=stream, clock=clock) as progress:
        progress.update(1, {"loss": 0.5})
        clock.now += 11
        progress.update(2)
    assert "loss 0.5" in stream.getvalue()


def test_stopped_run_still_prints_its_last_step():
    stream = io.StringIO()
    with pytest.raises(ValueError):
        with Progress(100, 10, 1, stream=stream, clock=Clock()) as progress:
            progress.update(11, {"loss": 2.0})
            raise ValueError
    assert stream.getvalue().startswith("step 11/100 | loss 2")


def test_speed_is_a_median_over_a_window():
    clock = Clock()
    progress = Progress(1000, 500, 10, mode="off", clock=clock)
    assert progress.img_per_s is None and progress.seconds_left is None
    with progress:
        clock.now += 300.0
        progress.restart()  # what came before, such as a compilation, is no step
        for step, seconds in ((501, 0.5), (502, 0.5), (503, 0.5), (504, 30.0), (505, 0.5)):
            clock.now += seconds
            progress.update(step)
        assert progress.img_per_s == pytest.approx(20)  # a pause does not count
        assert progress.seconds_left == pytest.approx(495 * 0.5)
        for step in range(506, 606):
            clock.now += 0.1
            progress.update(step)
        assert progress.seconds_per_step == pytest.approx(0.1)  # the past is forgotten

    with Progress(1000, 0, 10, mode="off", clock=clock) as progress:
        clock.now += 2.0
        progress.update(10)
        assert progress.seconds_per_step == pytest.approx(0.2)  # ten steps in two seconds


def test_off_prints_messages_alone():
    stream = io.StringIO()
    with Progress(2, mode="off", stream=stream) as progress:
        progress.update(1, {"loss": 1.0})
        progress.message("saved [bold]here[/bold]")
        progress.update(2)
    assert stream.getvalue() == "saved [bold]here[/bold]\n"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_live_bar_on_a_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    clock, stream = Clock(), Terminal()
    with Progress(200, 0, 64, stream=stream, clock=clock) as progress:
        assert progress.mode == "live"
        for step in range(1, 61):
            clock.now += 0.5
            progress.update(step, {"loss": 0.125})
        progress.message("checkpoint at [step 60] " + "x" * 150)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    last = shown.replace("\r", "\n").rstrip().splitlines()[-1]
    for part in ("step 60/200", "loss 0.125", "128 img/s", "500 ms/step", "1 min 10 s left"):
        assert part in last, last
    # the message is there whole, on a line of its own, before the bar that follows it
    assert any(line.strip() == "checkpoint at [step 60] " + "x" * 150
               for line in shown.replace("\r", "\n").splitlines())
    assert stream.getvalue().count("\x1b[?25h") == stream.getvalue().count("\x1b[?25l") == 1


def test_narrow_terminal_keeps_step_and_time_left(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "50")
    clock, stream = Clock(), Terminal()
    with Progress(200_000, 0, 64, stream=stream, clock=clock) as progress:
        clock.now += 0.5
        progress.update(123_456, {"loss": 0.125, "fit": 0.1, "reg": 0.025})
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    lines = [line.rstrip() for line in shown.replace("\r", "\n").splitlines() if line.strip()]
    assert lines[-1].startswith("step 123456/200000 ") and " left | loss" in lines[-1]
    assert all(len(line) <= 50 for line in lines)


def test_dumb_terminal_gets_plain_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    assert Progress(1, stream=Terminal()).mode == "plain"


@pytest.mark.parametrize("seconds, text", [
    (0.4, "0 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"), (7500, "2 h 05 min"),
    (273600, "3 d 04 h"),
])
def test_duration(seconds, text):
    assert duration(seconds) == text
