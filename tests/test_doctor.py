"""python -m robustdm.doctor: what it says, and that it notices a backend that is broken."""

import json
import re
import warnings
from pathlib import Path

import pytest
import torch

from robustdm import doctor, ops
from robustdm.ops import native, reference


@pytest.fixture
def sound(monkeypatch):
    """A cpp backend that is on and right on every machine: the reference under its name."""
    monkeypatch.setattr(native, "status", lambda: {"cpu": (True, "on"), "cuda": (False, "no GPU")})
    for op in ops.OPS:
        for name in (op, f"{op}_forward", f"{op}_backward"):
            if hasattr(native, name):
                monkeypatch.setattr(native, name, getattr(reference, name))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    why_off = ops.why_off
    monkeypatch.setattr(ops, "why_off", lambda backend, op, device: (
        "it needs a GPU" if backend == "triton" else why_off(backend, op, device)))


def test_a_sound_installation(sound, capsys):
    assert doctor.main([]) == 0
    out = capsys.readouterr().out
    assert "noise_perturb, cpp on cpu" in out and "FAIL" not in out
    for name in ("python", "torch", "GPU", "triton", "C++ compiler", "nvcc", "xformers"):
        assert name in out
    assert "csrc for CUDA     off: no GPU" in out
    assert "triton is off for every op: it needs a GPU" in out


def test_json(sound, capsys):
    assert doctor.main(["--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] and set(found["ops"]) == {"cpu"} and set(found["ops"]["cpu"]) == set(ops.OPS)
    assert found["ops"]["cpu"]["fgsm_project"]["auto"] == "cpp"
    assert found["ops"]["cpu"]["group_norm_act"] == {
        "auto": "cpp", "off": {"triton": "it needs a GPU"},
    }
    assert {(c["op"], c["backend"]) for c in found["self_check"]} == (
        {(op, backend) for op in ops.OPS for backend in ("torch", "cpp")})
    assert all(0 <= c["error"] <= c["tolerance"] for c in found["self_check"])


@pytest.mark.parametrize("wrong", ["a little", "nan", "raises"])
def test_a_broken_backend(sound, monkeypatch, capsys, wrong):
    def broken(*arguments):
        if wrong == "raises":
            raise RuntimeError("no such symbol")
        x_adv, delta = reference.fgsm_project(*arguments)
        return x_adv * (1.01 if wrong == "a little" else float("nan")), delta

    monkeypatch.setattr(native, "fgsm_project", broken)
    assert doctor.main([]) == 1
    out = capsys.readouterr().out
    assert "FAIL  fgsm_project, cpp on cpu" in out and out.count("FAIL  ") == 1
    assert "FAILED: cpp" in out
    if wrong == "raises":
        assert "RuntimeError: no such symbol" in out


def test_the_real_libraries_are_right():
    assert all(check["passed"] for check in doctor.self_check())


def test_components_that_are_missing_or_broken(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_HOME", "")
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)

    def import_module(name):
        raise OSError("libcudart is broken")

    monkeypatch.setattr(doctor.importlib, "import_module", import_module)
    found = doctor.environment()
    assert found["C++ compiler"] == "none: 'no-such-compiler', named by CXX, is not there"
    assert found["nvcc"].startswith("none")
    assert found["triton"] == "off: libcudart is broken"
    assert found["torch-fidelity"] == 'not installed (optional): pip install -e ".[eval]"'


def test_the_users_random_state_is_left_alone(sound):
    before = torch.random.get_rng_state()
    doctor.self_check()
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("version, tested", [
    ("2.10.1", False), ("2.11.0+cu130", True), ("2.13.9", True), ("2.14.0a0+git1", False),
    ("3.0.0", False)])
def test_a_torch_that_was_never_tested_is_named(monkeypatch, version, tested):
    monkeypatch.setattr(torch, "__version__", version)
    shown = doctor.environment()["torch"]
    assert shown == version if tested else "untested: tests have passed on 2.11 to 2.13" in shown


def test_the_installed_torch_was_tested():
    if untested := doctor.untested_torch():
        warnings.warn(f"torch {torch.__version__}: {untested}", stacklevel=1)


def test_the_newest_tested_torch_is_the_newest_allowed():
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    (low, high), = re.findall(r'"torch>=([0-9.]+),<([0-9.]+)"', text)
    newest = doctor.TESTED_TORCH[1]
    assert low == "2.11" and high == f"{newest[0]}.{newest[1] + 1}"
