"""What all tests share."""

import io
import os
from pathlib import Path
from unittest.mock import patch

import pytest

# Tensors here are tiny: threads would only wait for each other, and badly so on a busy machine.
# Set before torch loads, and inherited by the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"
# Triton decides when a kernel's file is loaded whether it compiles or interprets it.
HAS_GPU = Path("/dev/nvidiactl").exists()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402
from hypothesis import settings  # noqa: E402
from PIL import Image  # noqa: E402

# TF32, torch's default in convolutions on a GPU, rounds to 10 bits what tests hold to 20.
torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False

# The same examples in every run, however slow the machine; --hypothesis-profile=default draws anew.
settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=50)
settings.load_profile("repeatable")

# Relative error ||out - ref|| / ||ref|| of a kernel against the float64 reference. The interpreter
# truncates bfloat16 where a GPU rounds.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-6,
    torch.bfloat16: 4e-3 if HAS_GPU else 2**-7,
    torch.float16: 1e-3,
}


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    """||out - ref|| / ||ref||; NaN never passes a comparison with it."""
    out, reference = out.detach().double().cpu(), reference.detach().double().cpu()
    return float((out - reference).norm() / reference.norm().clamp(min=1e-30))


def gradients_of(trainer, x0, key) -> None:
    """Leave every weight the gradient of a batch, and update nothing."""
    zero = torch.zeros(())
    with (patch.object(trainer.optimizer, "clip_and_step", lambda *_: (zero, zero)),
          patch.object(trainer.metrics, "add", lambda *_: None)):
        trainer._update(x0, key, True)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests that take minutes")


# Files of few but long tests: begun last, they would keep one worker of several busy at the end.
LONG = ("test_faults", "test_studies", "test_distributed", "test_step", "test_cubins", "test_docs",
        "test_evaluate", "test_train")


def pytest_configure(config):
    if hasattr(config.option, "loadscopereorder"):  # xdist's own order is by the number of tests
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: LONG.index(name) if (name := item.module.__name__) in LONG else len(
        LONG))
    for item in items:
        if "gpu" in item.keywords and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="takes minutes: pytest --slow"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """``-n auto``: all tests share one GPU, and what they measure of it."""
    return 0 if HAS_GPU else None


@pytest.fixture(scope="module", autouse=True)
def figures_undrawn(request):
    """Drawing takes most of a tiny run's time: only the tests of reports and studies do it."""
    if request.module.__name__ in ("test_report", "test_studies"):
        yield
        return
    dot = io.BytesIO()
    Image.new("L", (1, 1)).save(dot, "png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("robustdm.reporting.plots.png_bytes", lambda figure: dot.getvalue())
        yield


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """More of them round otherwise, in the files that run after this one."""
    yield
    assert torch.get_num_threads() == 1


@pytest.fixture(scope="module", autouse=True)
def compiled_apart():
    """The compiler gives up on code that it has compiled too often: each file starts anew."""
    yield
    torch.compiler.reset()
