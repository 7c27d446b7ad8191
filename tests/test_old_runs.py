"""Runs that an earlier revision began: today's code goes on with them as that one did."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import robustdm
from robustdm import sample
from robustdm.cli import parse_train
from robustdm.ops import native
from robustdm.runs.files import read_run
from robustdm.runs.rundir import read_metrics
from robustdm.training.loop import train

FIXTURE = Path(__file__).parent / "fixtures" / "run-261452b"
EXPECTED = load_file(FIXTURE / "expected.safetensors")
AVERAGE = "checkpoints/step-{:08d}/ema_0.5.safetensors"
# On the processor that made the fixture the bits are the same. Others, with narrower vectors, were
# up to 1.3e-6 away.
CLOSE = 1e-5


@pytest.fixture(params=["points", "images"])
def kind(request):
    return request.param


@pytest.fixture
def old_run(kind, tmp_path):
    return Path(shutil.copytree(FIXTURE / kind, tmp_path / kind))


def distance(x, wanted):
    return float((x - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_an_old_run_goes_on_as_it_would_have(kind, old_run, backend):
    if backend == "cpp" and not native.status()["cpu"][0]:
        pytest.skip("the C++ library is not built")
    lines = (old_run / "metrics.jsonl").read_text()
    train(parse_train(["--resume", "--out", str(old_run), "--backend", backend]), "off")
    found = dict(sorted(load_file(old_run / AVERAGE.format(8)).items()))
    wanted = EXPECTED[f"{kind} {backend}"].split([x.numel() for x in found.values()])
    for (name, x), y in zip(found.items(), wanted, strict=True):
        # The bias of attention's keys has no gradient but for rounding, which AdamW blows up.
        if not name.endswith("to_k.bias"):
            assert distance(x.flatten(), y) < CLOSE, name
    assert (old_run / "metrics.jsonl").read_text().startswith(lines)
    assert [line["step"] for line in read_metrics(old_run / "metrics.jsonl")] == [*range(1, 9)]
    assert len(json.loads((old_run / "run.json").read_text())["sessions"]) == 2


def test_an_old_run_draws_the_same_samples(kind, old_run):
    out = sample.generate(sample.SampleConfig(old_run, num=3, steps=4, seed=1, device="cpu"))
    samples = torch.from_numpy(np.load(out / "samples.npz")["samples"])
    assert distance(samples, EXPECTED[f"{kind} samples"]) < CLOSE


def test_an_old_run_is_loaded_and_read(kind, old_run):
    run = robustdm.load_run(old_run)
    weights = load_file(old_run / AVERAGE.format(4))
    assert run.step == 4 and run.is_image == (kind == "images")
    assert all(torch.equal(x, weights[name]) for name, x in run.model.state_dict().items())
    read = read_run(old_run)
    assert read.step == 4 and read.config == run.config and not read.finished and not read.notes
