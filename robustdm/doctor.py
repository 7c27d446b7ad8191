"""``python -m robustdm.doctor``: what is installed, what runs each fused op, and is it right?

The self-check runs every op on every backend that is on, on small batches, against the float64
reference.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import tyro

import robustdm
from robustdm.cli import guard

if TYPE_CHECKING:
    import torch

TESTED_TORCH = ((2, 11), (2, 13))
"""Oldest and newest release of torch that the tests have passed on."""
# name on screen -> (module, distribution, how to get it)
OPTIONAL = {
    "xformers": ("xformers", "xformers", 'pip install -e ".[xformers]"'),
    "torch-fidelity": ("torch_fidelity", "torch-fidelity", 'pip install -e ".[eval]"'),
    "pynvml": ("pynvml", "nvidia-ml-py", 'pip install -e ".[gpu]"'),
}
TOLERANCE = {"float32": 1e-6, "bfloat16": 4e-3}  # relative; half a bf16 step is 2e-3
INTERPRETED = 2.0**-7  # Triton's interpreter cuts bf16 off instead of rounding it


@dataclass(frozen=True)
class DoctorConfig:
    """Print what is available, which backend each op takes and why, and check the numbers."""

    json: bool = False
    """Print one JSON object instead of text."""


def main(argv: Sequence[str] | None = None) -> int:
    """Print the state of the installation; returns 1 if a backend computes wrong numbers."""
    config = tyro.cli(DoctorConfig, args=argv, prog="python -m robustdm.doctor")
    found = examine()
    print(json.dumps(found, indent=1) if config.json else as_text(found))
    return 0 if found["ok"] else 1


def examine() -> dict:
    """All that the doctor says, JSON-able: environment, ops, self_check, ok."""
    checks = self_check()
    return {
        "environment": environment(),
        "ops": {device.type: choices(device) for device in devices()},
        "self_check": checks,
        "ok": all(check["passed"] for check in checks),
    }


def devices() -> list[torch.device]:
    """The CPU, and the GPU if torch sees one."""
    import torch

    return [torch.device(name) for name in ("cpu", "cuda")[: 1 + torch.cuda.is_available()]]


# What is installed.


def environment() -> dict[str, str]:
    """Component -> its version, or why it is off."""
    import torch

    from robustdm.ops import native

    libraries = native.status()
    return {
        "robustdm": robustdm.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__ + (f" ({untested})" if (untested := untested_torch()) else ""),
        "GPU": _gpu(),
        "triton": _imported("triton"),
        "C++ compiler": _compiler(),
        "nvcc": _nvcc(),
        **{
            f"csrc for {name}": "on" if libraries[key][0] else f"off: {libraries[key][1]}"
            for key, name in (("cpu", "the CPU"), ("cuda", "CUDA"))
        },
        **{name: _optional(*where) for name, where in OPTIONAL.items()},
    }


def untested_torch() -> str | None:
    """One line if the installed torch is newer than any that the tests have passed on, or older."""
    import torch

    oldest, newest = (".".join(map(str, version)) for version in TESTED_TORCH)
    found = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if TESTED_TORCH[0] <= found <= TESTED_TORCH[1]:
        return None
    return f"untested: tests have passed on {oldest} to {newest}"


def _gpu() -> str:
    import torch

    if not torch.cuda.is_available():
        return "none that torch can use"
    try:
        major, minor = torch.cuda.get_device_capability()
        return f"{torch.cuda.get_device_name()}, sm_{major}{minor}, CUDA {torch.version.cuda}"
    except Exception as error:  # a broken driver raises anything
        return f"off: {_line(error)}"


def _imported(module: str) -> str:
    try:
        return importlib.import_module(module).__version__
    except Exception as error:  # a broken installation raises anything
        return f"off: {_line(error)}"


def _optional(module: str, distribution: str, remedy: str) -> str:
    # Never imported just for its version: some of these pull in torchvision, and may break on it.
    if importlib.util.find_spec(module) is None:
        return f"not installed (optional): {remedy}"
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "installed, version unknown"


def _compiler() -> str:
    named = os.environ.get("CXX", "").split()[:1]
    found = next(filter(None, map(shutil.which, named or ("g++", "clang++", "c++"))), None)
    return _said(found, "--version", 0) if found else (
        f"none: {named[0]!r}, named by CXX, is not there" if named else
        "none: neither g++ nor clang++ is on PATH, and CXX is not set"
    )


def _nvcc() -> str:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    found = shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")
    return _said(found, "--version", -2) if found else "none on PATH or under CUDA_HOME"


def _said(program: str, argument: str, line: int) -> str:
    """One line of what a program prints about itself."""
    try:
        done = subprocess.run([program, argument], capture_output=True, text=True, timeout=20)
        return done.stdout.strip().splitlines()[line].strip()
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        return f"{program} does not run: {_line(error)}"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


# What runs each op.


def choices(device: torch.device) -> dict[str, dict]:
    """Op -> {"auto": the backend it takes for float32, "off": {other backend: why not}}."""
    import torch

    from robustdm import ops

    found = {}
    for op in ops.OPS:
        reasons = {b: ops.why_off(b, op, device) for b in ops.BACKENDS if b != "auto"}
        found[op] = {
            "auto": ops.resolve(op, "auto", device, torch.float32),
            "off": {backend: reason for backend, reason in reasons.items() if reason},
        }
    return found


# Whether it is right.


def self_check() -> list[dict]:
    """Run every op on every device and backend that is on; one result each, its worst dtype's.

    Returns:
        For each: op, backend, device, error (relative), tolerance, passed, and problem if it
        raised.
    """
    from robustdm import ops

    return [
        _check(op, backend, device)
        for device in devices() for op in ops.OPS for backend in ops.BACKENDS[1:]
        if ops.why_off(backend, op, device) is None
    ]


def _check(op: str, backend: str, device: torch.device) -> dict:
    import torch

    interpreted = backend == "triton" and device.type == "cpu"
    result = {"op": op, "backend": backend, "device": device.type}
    worst = dict(result, error=0.0, tolerance=TOLERANCE["float32"])
    # The optimizer's weights are float32, whatever the batch is.
    halves = () if op == "adamw_ema" else (torch.bfloat16,)
    for dtype in (torch.float32, *halves):
        tolerance = TOLERANCE[str(dtype).removeprefix("torch.")]
        if interpreted and dtype == torch.bfloat16:
            tolerance = INTERPRETED
        try:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(0)
                pairs = PROBES[op](device, dtype, backend)
            error = max(relative_error(got, expected) for got, expected in pairs)
        except Exception as failure:  # of any kind: saying which is what this command is for
            return dict(result, error=None, tolerance=tolerance, passed=False,
                        problem=f"{type(failure).__name__}: {_line(failure)}")
        if not error / tolerance <= worst["error"] / worst["tolerance"]:
            worst = dict(result, error=error, tolerance=tolerance)
    # NaN compares as false, hence fails.
    return dict(worst, passed=worst["error"] <= worst["tolerance"])


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """||got - expected|| / ||expected||, Frobenius norms in float64."""
    got, expected = got.detach().double().cpu(), expected.detach().double().cpu()
    norm = expected.norm().item()
    return (got - expected).norm().item() / (norm or 1.0)


# One function per op: pairs of what it computed and what the float64 reference says.


def _batch(device: torch.device, dtype: torch.dtype) -> tuple:
    """Two batches (4, 3, 9, 8), signal, noise, radius (4,), and a key."""
    import torch

    a, b = (torch.randn(4, 3, 9, 8).to(device, dtype) for _ in range(2))
    noise = torch.linspace(0.1, 0.9, 4, device=device)
    signal = (1 - noise**2).sqrt()
    radius = (0.2 + noise).to(dtype).float()
    return a, b, signal, noise, radius, torch.tensor([7, 11, 5], device=device)


def _wide(*tensors):
    return [t.double() for t in tensors]


def _probe_noise_perturb(device, dtype, backend):
    import torch

    from robustdm import ops
    from robustdm.ops import reference

    x0, _, *scales, key = _batch(device, dtype)
    got = ops.noise_perturb(x0, *scales, key, backend=backend)
    expected = reference.noise_perturb(*_wide(x0, *scales), key, torch.float64)
    return zip(got, expected, strict=True)


def _probe_fgsm_project(device, dtype, backend):
    from robustdm import ops
    from robustdm.ops import reference

    xt, gradient, _, noise, radius, key = _batch(device, dtype)
    got = ops.fgsm_project(xt, gradient, noise, radius, key, backend=backend)
    expected = reference.fgsm_project(*_wide(xt, gradient, noise, radius), key)
    return zip(got, expected, strict=True)


def _probe_equivariance_loss(device, dtype, backend):
    import torch

    from robustdm import ops
    from robustdm.ops import reference

    o, adv, _, noise, radius, key = _batch(device, dtype)
    o, adv = o.requires_grad_(), adv.requires_grad_()
    got = ops.equivariance_loss(o, adv, None, radius, noise, key, backend=backend)
    grads = torch.autograd.grad(got[0], (o, adv))
    expected = reference.equivariance_loss(
        *_wide(o, adv), None, *_wide(radius, noise), key, dtype, False, False
    )
    return zip((*got, *grads), expected, strict=True)


def _probe_group_norm_act(device, dtype, backend):
    import torch

    from robustdm import ops
    from robustdm.ops import reference

    x, dy = (torch.randn(2, 32, 5, 4).to(device, dtype) for _ in range(2))
    x = x.requires_grad_()
    weight, bias = (torch.randn(32, device=device).requires_grad_() for _ in range(2))
    key = torch.tensor([7, 11, 5], device=device)
    y = ops.group_norm_act(x, 8, weight, bias, dropout=0.2, key=key, backend=backend)
    got = (y, *torch.autograd.grad(y, (x, weight, bias), dy))
    leaves = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    y = reference.group_norm_act(leaves[0], 8, *leaves[1:], dropout=0.2, key=key)
    return zip(got, (y, *torch.autograd.grad(y, leaves, dy.double())), strict=True)


def _probe_adamw_ema(device, dtype, backend):
    import torch

    from robustdm import ops
    from robustdm.ops import reference

    def state(work):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(1)
            made = [[torch.randn(n).to(device, work) for n in (3, 130)] for _ in range(5)]
        made[3] = [v**2 for v in made[3]]  # second moments
        return (*made, [torch.zeros(n, device=device, dtype=torch.bfloat16) for n in (3, 130)])

    values = dict(lr=1e-2, step=3.0, decay=0.9, factor=0.5, skip=0.0)
    scalars = {k: torch.tensor(v, device=device) for k, v in values.items()}
    got, expected = state(torch.float32), state(torch.float64)
    ops.adamw_ema(*got, **scalars, weight_decay=0.1, backend=backend)
    # The same float32 scalars in float64: 0.9 is not the same number in both.
    reference.adamw_ema(*expected, *_wide(*scalars.values()), 0.9, 0.999, 1e-8, 0.1)
    pairs = [(torch.cat(a), torch.cat(b)) for a, b in zip(got[:5], expected[:5], strict=True)]
    # What the copy must be is the rounded weight.
    return [*pairs, (torch.cat(got[5]), torch.cat(got[0]).bfloat16())]


PROBES: dict[str, Callable] = {
    "noise_perturb": _probe_noise_perturb,
    "fgsm_project": _probe_fgsm_project,
    "equivariance_loss": _probe_equivariance_loss,
    "group_norm_act": _probe_group_norm_act,
    "adamw_ema": _probe_adamw_ema,
}


# On screen.


def as_text(found: dict) -> str:
    """What `examine` found, for people."""
    from robustdm.reporting.tables import text_table

    width = max(map(len, found["environment"]))
    lines = [f"{name:{width}}  {value}" for name, value in found["environment"].items()]
    for device, chosen in found["ops"].items():
        lines += ["", f'What runs each op on {device} tensors with backend="auto":']
        width = max(map(len, chosen))
        lines += [f"  {op:{width}}  {choice['auto']}" for op, choice in chosen.items()]
        reasons: dict[tuple[str, str], list[str]] = {}
        for op, choice in chosen.items():
            for backend, reason in choice["off"].items():
                reasons.setdefault((backend, reason), []).append(op)
        for (backend, reason), those in reasons.items():
            others = [op for op in chosen if op not in those]
            which = ", ".join(those)
            if len(others) < len(those):
                which = f"all but {', '.join(others)}" if others else "every op"
            lines.append(f"  {backend} is off for {which}: {reason}")
    lines += ["", "Self-check: relative error to the float64 reference"]
    rows = {
        f"  {'PASS' if c['passed'] else 'FAIL'}  {c['op']}, {c['backend']} on {c['device']}": {
            "error": c["error"], "allowed": c["tolerance"]} for c in found["self_check"]
    }
    lines.append(text_table(rows))
    failed = [c for c in found["self_check"] if not c["passed"]]
    lines += [f"  {c['op']}, {c['backend']} on {c['device']}: {c['problem']}"
              for c in failed if "problem" in c]
    if failed:
        wrong = sorted({c["backend"] for c in failed})
        lines += ["", f"FAILED: {', '.join(wrong)}. Build again with pip install -e . and, for "
                  "triton, empty its cache (~/.triton); until then choose another --backend."]
    return "\n".join(lines)


if __name__ == "__main__":
    guard(main)
