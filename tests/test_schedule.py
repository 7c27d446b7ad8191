"""The noise schedule's tables and maps."""

import pytest
import torch

from robustdm.errors import UsageError
from robustdm.method.schedule import NoiseSchedule


def test_linear_tables():
    schedule = NoiseSchedule.linear(1000)
    s = schedule.sqrt_one_minus_alphas_cumprod
    # spec: noise scale of the linear schedule, DDPM's endpoints
    for index, value in {0: 0.01, 1: 0.01483, 10: 0.04683, 100: 0.32382, 999: 0.99998}.items():
        assert abs(s[index] - value) < 6e-6
    assert schedule.betas.dtype == torch.float64
    assert schedule.betas[0] == 1e-4 and abs(schedule.betas[-1] - 0.02) < 1e-15


def test_other_lengths_end_at_the_same_noise():
    for steps in (100, 250, 4000):
        final = NoiseSchedule.linear(steps).alphas_cumprod[-1].log()
        assert abs(final / NoiseSchedule.linear(1000).alphas_cumprod[-1].log() - 1) < 0.2


def test_cosine_follows_its_formula():
    schedule = NoiseSchedule.cosine(1000)
    u = (torch.arange(1, 1001, dtype=torch.float64) / 1000 + 0.008) / 1.008 * torch.pi / 2
    start = torch.cos(torch.tensor(0.008 / 1.008 * torch.pi / 2, dtype=torch.float64)) ** 2
    wanted = torch.cos(u) ** 2 / start
    assert torch.allclose(schedule.alphas_cumprod[:990], wanted[:990], rtol=1e-9, atol=0)
    assert schedule.betas.max() == 0.999


@pytest.mark.parametrize("name", ["linear", "squaredcos_cap_v2"])
def test_tables_agree_with_diffusers(name):
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(1000, beta_schedule=name)
    ours = NoiseSchedule.linear() if name == "linear" else NoiseSchedule.cosine()
    theirs = NoiseSchedule.from_diffusers(scheduler)
    assert torch.allclose(ours.betas, theirs.betas, rtol=1e-4, atol=1e-8)
    assert torch.allclose(ours.alphas_cumprod.float(), scheduler.alphas_cumprod, rtol=1e-3)


def test_q_sample_and_predict_x0_are_inverse():
    schedule = NoiseSchedule.linear(1000)
    g = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(9, 3, 5, dtype=torch.float64, generator=g) for _ in range(2))
    t = torch.tensor([0, 1, 10, 100, 250, 500, 750, 900, 999])
    xt = schedule.q_sample(x0, t, eps)
    assert torch.allclose(schedule.predict_x0(xt, t, eps), x0, atol=1e-10)
    a, s = schedule.at("sqrt_alphas_cumprod", t, x0), schedule.at(
        "sqrt_one_minus_alphas_cumprod", t, x0)
    assert a.shape == (9, 1, 1) and torch.allclose(a**2 + s**2, torch.ones_like(a))
    assert torch.equal(xt, a * x0 + s * eps)


def test_at_casts_to_the_batch():
    schedule = NoiseSchedule.linear(10)
    t = torch.tensor([0, 9])
    assert schedule.at("betas", t).dtype == torch.float64
    assert schedule.at("betas", t, torch.zeros(2, 1, 4, 4)).dtype == torch.float32


@pytest.mark.parametrize("betas", [[], [[0.1]], [0.0, 0.1], [0.1, 1.0], [0.1, float("nan")]])
def test_impossible_betas_are_refused(betas):
    with pytest.raises(UsageError, match="betas"):
        NoiseSchedule(torch.tensor(betas))
    with pytest.raises(UsageError, match="betas is 'linear': it must be a vector"):
        NoiseSchedule("linear")


def test_wrong_schedulers_are_refused():
    from diffusers import DDPMScheduler

    with pytest.raises(UsageError, match="prediction_type is 'v_prediction'"):
        NoiseSchedule.from_diffusers(DDPMScheduler(prediction_type="v_prediction"))
    with pytest.raises(UsageError, match="has no betas"):
        NoiseSchedule.from_diffusers(object())
    with pytest.raises(UsageError, match="steps is 0"):
        NoiseSchedule.linear(0)
