"""What a plain DDPM can do against noise, on Gaussians, for which the answers are known."""

import math

import pytest
import torch

from robustdm import NoiseSchedule, UsageError
from robustdm.method.baselines import DEFAULT_STRENGTH, Baseline, Shrunk
from robustdm.method.closed_form import Setting, generated_deviation
from robustdm.method.perturbation import Perturbation
from robustdm.method.sampling import sample, timesteps

SCHEDULE = NoiseSchedule.linear(1000)
SDS = torch.tensor([0.03, 0.1, 0.3, 1.0])


class Optimal(torch.nn.Module):
    """The DDPM optimum for independent Gaussians of these standard deviations."""

    def forward(self, x, t):
        a = SCHEDULE.sqrt_alphas_cumprod[t].float()[:, None]
        s = SCHEDULE.sqrt_one_minus_alphas_cumprod[t].float()[:, None]
        return s * x / (a**2 * SDS**2 + s**2)


def drawn(num=4000, **settings):
    return sample(settings.pop("model", Optimal()), SCHEDULE, (4,), num=num, batch_size=num,
                  steps=250, **settings)


def test_shrinking_a_ddpm_is_the_regularised_optimum_on_gaussians():
    """Hence the strongest baseline there is for such data."""
    setting = Setting("robust_adv", Perturbation(lam=0.3))
    predicted = generated_deviation(SCHEDULE, [setting], SDS.double() ** 2, steps=250)[0]
    made = drawn(model=Baseline("shrink", 0.3).network(Optimal(), SCHEDULE)).std(0)
    assert torch.allclose(made.double(), predicted, rtol=0.06)
    assert made[0] < 0.3 * drawn().std(0)[0], "and not that of the DDPM"


def test_no_excess_changes_nothing():
    t = torch.arange(1000)
    x = torch.randn(1000, 4)
    same = Shrunk(Optimal(), SCHEDULE, torch.zeros(1000, dtype=torch.float64))
    assert torch.equal(same.seen_as, t)
    assert torch.allclose(same(x, t), Optimal()(x, t), atol=1e-4)


def test_a_state_counts_as_one_of_the_excess_noise():
    excess = torch.full((1000,), 3.0, dtype=torch.float64)
    made = Shrunk(Optimal(), SCHEDULE, excess)
    noise = SCHEDULE.sqrt_one_minus_alphas_cumprod / SCHEDULE.sqrt_alphas_cumprod
    for t in (50, 200, 500):
        assert noise[made.seen_as[t]] == pytest.approx(2 * noise[t].item(), rel=0.02)
    assert made.seen_as[999] == 999, "no more noise to be had"


def test_stopping_early_ends_at_the_corruption_with_clean_data():
    visited = timesteps(SCHEDULE, 250, stop=0.2)
    noise = SCHEDULE.sqrt_one_minus_alphas_cumprod / SCHEDULE.sqrt_alphas_cumprod
    assert noise[visited[-1]] >= 0.2 > noise[visited[-1] - 5] and len(visited) < 250
    assert torch.equal(visited, timesteps(SCHEDULE, 250)[:len(visited)])
    made = drawn(stop=0.2).std(0)
    # The mean of clean data given a state of noise s has the variance v^2 / (v + s^2).
    expected = SDS**2 / (SDS**2 + noise[visited[-1]].float() ** 2).sqrt()
    assert torch.allclose(made, expected, rtol=0.06)
    assert torch.equal(drawn(num=50, stop=0.0), drawn(num=50))


def test_a_stop_needs_noise_as_strong():
    with pytest.raises(UsageError, match=r"stop is 1000.*first noise scale, 157"):
        timesteps(SCHEDULE, 250, stop=1000)
    with pytest.raises(UsageError, match="stop is -1"):
        timesteps(SCHEDULE, 250, stop=-1)


def test_strengths():
    assert Baseline("blur").strength == DEFAULT_STRENGTH["blur"]
    assert Baseline("shrink").stop == 0 and Baseline("early_stop", 0.1).stop == 0.1
    model = Optimal()
    assert Baseline("blur", 1).network(model, SCHEDULE) is model
    shaped = (Baseline("shrink", 0.3, shape).network(model, SCHEDULE).seen_as
              for shape in ((2.0, 8 / 255), (3.0, 8 / 255), (2.0, 1 / 255)))
    assert len({tuple(seen.tolist()) for seen in shaped}) == 3
    x = torch.randn(3, 1, 8, 8)
    assert Baseline("blur", 1).finish(x).std() < 0.6 * x.std()
    assert torch.equal(Baseline("shrink").finish(x), x)
    for strength in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(UsageError, match="baseline_strength is"):
            Baseline("blur", strength)
    with pytest.raises(UsageError, match="baseline is 'sharpen'"):
        Baseline("sharpen")
    with pytest.raises(UsageError, match="only images can be blurred"):
        Baseline("blur").finish(torch.zeros(2, 3))
