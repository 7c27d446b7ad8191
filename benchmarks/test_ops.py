"""``pytest benchmarks``: the ops on the CPU by pytest-benchmark, one small batch; no assertions on
speed. benchmarks/run.py is the real measurement."""

import pytest
import torch

from robustdm import NoiseSchedule, Objective, ops

SHAPE = (32, 3, 32, 32)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def batch():
    torch.manual_seed(0)
    x0 = torch.randn(SHAPE)
    draw = Objective("robust_adv", NoiseSchedule.linear(1000), backend="torch").draw(
        x0, seed=0, step=0)
    return {"x0": x0, "gradient": torch.randn(SHAPE), "signal": draw.signal, "noise": draw.noise,
            "radius": draw.radius, "lambda_t": draw.lambda_t, "key": draw.key}


@pytest.fixture(params=["torch", "cpp"])
def backend(request):
    reason = ops.why_off(request.param, "noise_perturb", CPU)
    if reason is not None:
        pytest.skip(f"{request.param} is off: {reason}")
    return request.param


def test_noise_perturb(benchmark, batch, backend):
    arguments = [batch[name] for name in ("x0", "signal", "noise", "radius", "key")]
    xt, x_ran = benchmark(ops.noise_perturb, *arguments, backend=backend)
    assert xt.shape == x_ran.shape == SHAPE


def test_fgsm_project(benchmark, batch, backend):
    arguments = [batch[name] for name in ("x0", "gradient", "noise", "radius", "key")]
    _, delta = benchmark(ops.fgsm_project, *arguments, backend=backend)
    assert (delta.flatten(1).abs().amax(1) <= batch["radius"]).all()


def test_equivariance_loss(benchmark, batch, backend):
    o, adv = (batch[name].clone().requires_grad_() for name in ("x0", "gradient"))

    def loss_and_gradients():
        total, _, _ = ops.equivariance_loss(
            o, adv, None, batch["radius"], batch["lambda_t"], batch["key"], backend=backend)
        return torch.autograd.grad(total, (o, adv))

    assert all(g.shape == SHAPE for g in benchmark(loss_and_gradients))


def test_adamw_ema(benchmark, backend):
    state = [[torch.zeros(100_000)] for _ in range(5)]
    copies = [torch.zeros(100_000, dtype=torch.bfloat16)]
    names = ("lr", "step", "decay", "factor", "skip")
    scalars = {k: torch.tensor(v) for k, v in zip(names, (1e-3, 1.0, 0.9, 1.0, 0.0), strict=True)}
    benchmark(ops.adamw_ema, *state, copies, **scalars, backend=backend)
