"""What a plain DDPM can do against noise, on Gaussians, for which the answers are known."""

import math
from types import SimpleNamespace

import pytest
import torch

from robustdm import NoiseSchedule, UsageError
from robustdm.method.baselines import DEFAULT_STRENGTH, Baseline, Shrunk, from_flags
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


def test_a_chain_that_stops_early_ends_with_its_own_prediction():
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


def impulses(timestep, samples):
    """Sample k + 1 has noise in the k-th step alone, sample 0 in the initial state: the chain of a
    linear network is linear in its noise, so squares of the samples add up to their variance."""
    k = 0 if timestep is None else 1000 - timestep
    return (torch.arange(samples.start, samples.stop) == k).double()[:, None].expand(-1, 5).clone()


@pytest.mark.parametrize("share, left, kept", [
    # Share of the noise that is corrected for; noise left over the noise, and the deviations left
    # at three variances, at a stop of twice the noise (spectra of linear T = 1000).
    (0.5, 0.335, (0.716, 0.835, 0.940)), (0.8, 0.161, (0.576, 0.788, 0.926)),
    (1.0, 0.000, (0.447, 0.745, 0.913)), (1.25, 0.252, (0.246, 0.678, 0.892)),
])
def test_known_noise_leaves_what_the_closed_form_says(share, left, kept):
    sigma, stop = 0.2, 0.4
    variances = torch.tensor([0.0, 0.05, 0.25, 1.0, 4.0], dtype=torch.float64)

    def network(x, t):
        a = SCHEDULE.sqrt_alphas_cumprod[t][:, None]
        s = SCHEDULE.sqrt_one_minus_alphas_cumprod[t][:, None]
        return s * x / (a**2 * (variances + sigma**2) + s**2)

    made = sample(network, SCHEDULE, (5,), num=1001, batch_size=1001, stop=stop,
                  data_noise=share * sigma, noise=impulses, dtype=torch.float64)
    sds = made.square().sum(0).sqrt()
    noise = SCHEDULE.sqrt_one_minus_alphas_cumprod / SCHEDULE.sqrt_alphas_cumprod
    end = noise[timesteps(SCHEDULE, stop=stop)[-1]]
    # E[x0 | state] of a network that takes all but the share for data.
    gain = (variances + (1 - share**2) * sigma**2) / (variances + sigma**2 + end**2)
    expected = gain.abs() * (variances + sigma**2 + end**2).sqrt()
    # The chain itself is off by 5e-3 at most.
    assert torch.allclose(sds, expected, rtol=6e-3, atol=1e-3 * sigma)
    assert (sds[0] / sigma).item() == pytest.approx(left, abs=3e-3)
    for found, wanted in zip((sds / variances.sqrt())[1:4].tolist(), kept, strict=True):
        assert found == pytest.approx(wanted, abs=6e-3)


def test_known_noise_costs_no_call_and_changes_the_last_step_alone():
    calls = []

    def network(x, t):
        calls.append(int(t[0]))
        return Optimal()(x, t)

    settings = Baseline("known", 0.2).settings
    assert settings == {"stop": pytest.approx(0.2), "data_noise": pytest.approx(0.18)}
    states = {}
    for name, wanted in (("plain", {}), ("known", settings)):
        drawn(model=network, num=5, **wanted,
              trajectory=lambda t, _, x, name=name: states.setdefault(name, []).append((t, x)))
    assert len(calls) == 250 + len(timesteps(SCHEDULE, 250, stop=0.2))
    for (t, x), (other, y) in zip(states["known"][:-1], states["plain"], strict=False):
        assert t == other and torch.equal(x, y)
    assert Baseline("shrink").settings == Baseline("blur").settings == {}


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_clipping_comes_after_the_correction(sampler):
    def network(x, t):
        return torch.full_like(x, -3.0)

    made = sample(network, SCHEDULE, (4,), num=2, steps=20, stop=0.2, data_noise=0.2, clip=True,
                  sampler=sampler)
    assert made.abs().max() == 1


def flags(method="known", **others):
    names = ("strength", "shape", "stop", "safety")
    return SimpleNamespace(baseline=method, **{f"baseline_{n}": others.get(n) for n in names})


def test_the_strength_is_what_the_data_say():
    made = from_flags(flags(), lambda: 0.19, "ddpm")
    assert made == Baseline("known", 0.19, stop=1.0, safety=0.9)
    assert from_flags(flags(strength=0.2, stop=0.5, safety=1.0), lambda: 0.19) == Baseline(
        "known", 0.2, stop=0.5, safety=1.0)
    assert from_flags(flags("none")) is None

    def unknown():
        raise UsageError("the data are gone")

    assert from_flags(flags(strength=3.0), unknown).strength == 3, "there is nothing to bound it"
    assert from_flags(flags(strength=3.0)).strength == 3


@pytest.mark.parametrize("given, measured, words", [
    (flags(strength=0.3), 0.19, "baseline_strength is 0.3: the data vary by no more than 0.19"),
    (flags(), 0.012, "look clean: their noise has a standard deviation of 0.012"),
    (flags(strength=math.nan), 0.19, "baseline_strength is nan"),
    (flags(strength=-0.1), 0.19, "baseline_strength is -0.1"),
    (flags(strength=0.0), 0.19, "baseline_strength is 0.0"),
    (flags(strength=0.1, stop=-1.0), 0.19, "baseline_stop is -1.0"),
    (flags(strength=0.1, safety=1.5), 0.19, "baseline_safety is 1.5"),
    (flags("blur", safety=0.9), 0.19, "only --baseline known has one"),
    (flags("none", strength=0.1), 0.19, "without a baseline"),
    (flags("known", shape=(2.0, 0.1)), 0.19, "only --baseline shrink has one"),
])
def test_wrong_flags(given, measured, words):
    with pytest.raises(UsageError, match=words):
        from_flags(given, lambda: measured)


@pytest.mark.parametrize("method", ["known", "shrink"])
def test_a_model_that_removes_noise_itself_gets_no_second_correction(method):
    with pytest.raises(UsageError, match=f"'{method}', and the model was trained with robust_adv"):
        from_flags(flags(method), lambda: 0.2, "robust_adv")


def test_noise_that_nobody_knows():
    with pytest.raises(UsageError, match="'known', and the noise of the training data is not"):
        from_flags(flags())
    with pytest.raises(UsageError, match="'early_stop', which is gone.*'known'"):
        Baseline("early_stop", 0.2)


def test_strengths():
    assert Baseline("blur").strength == DEFAULT_STRENGTH["blur"]
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
