"""Samplers: against diffusers, against the closed form for Gaussian data, and their contracts."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from robustdm.errors import UsageError
from robustdm.method.perturbation import Perturbation
from robustdm.method.predict import predict_noise
from robustdm.method.sampling import Respaced, sample, stream_noise, timesteps
from robustdm.method.schedule import NoiseSchedule
from robustdm.ops.stream import Stream, normal, philox

SCHEDULE = NoiseSchedule.linear(1000)
SPACINGS = ("linspace", "leading", "trailing")
SHAPE = (3, 4, 5)


def toy_model(x, t):
    """Non-linear in x, different at every t, and able to leave [-1, 1]: clipping matters."""
    scale = (1 + t.to(x.dtype) / 500).view(-1, *[1] * (x.ndim - 1))
    return torch.tanh(x * scale) + 0.2 * torch.sin(3 * x)


def diffusers_scheduler(kind, **config):
    schedulers = pytest.importorskip("diffusers.schedulers")
    config = {"beta_start": 1e-4, "beta_end": 0.02, "clip_sample": False, **config}
    return getattr(schedulers, kind)(1000, **config)


def exact(scheduler):
    """Give a diffusers scheduler float64 tables, so that only the formulas are compared."""
    scheduler.alphas_cumprod = SCHEDULE.alphas_cumprod
    scheduler.one = scheduler.final_alpha_cumprod = torch.ones((), dtype=torch.float64)
    return scheduler


def feed(monkeypatch, noises):
    """Make DDPMScheduler.step take its noise from the list."""
    import diffusers.schedulers.scheduling_ddpm as module

    monkeypatch.setattr(module, "randn_tensor", lambda *args, **kwargs: noises.pop(0))


# Timesteps and respacing.


@pytest.mark.parametrize("spacing", SPACINGS)
def test_timesteps_are_those_of_diffusers(spacing):
    for total in (1000, 37):
        schedulers = pytest.importorskip("diffusers.schedulers")
        reference = schedulers.DDPMScheduler(total, timestep_spacing=spacing)
        for steps in range(1, total + 1):
            reference.set_timesteps(steps)
            # At some lengths diffusers' "trailing" has an extra timestep -1 (float rounding).
            expected = reference.timesteps[:steps]
            assert torch.equal(timesteps(total, steps, spacing), expected), (total, steps)


def test_timesteps_all_and_truncated():
    for spacing in (*SPACINGS, "truncate"):
        assert torch.equal(timesteps(SCHEDULE, None, spacing), torch.arange(999, -1, -1))
    assert timesteps(1000, 3, "truncate").tolist() == [2, 1, 0]
    assert timesteps(1000, 3, "linspace").dtype == torch.int64


def test_respaced_full_chain_has_the_schedule_s_betas():
    chain = Respaced(SCHEDULE, timesteps(SCHEDULE))
    torch.testing.assert_close(chain.betas.flip(0), SCHEDULE.betas, rtol=1e-10, atol=1e-14)
    # Table of the specification: sqrt(beta) and the posterior's deviation, to its printed digits.
    for index, large, small in [(1, 0.0110, 0.0074), (10, 0.0173, 0.0161), (50, 0.0331, 0.0325),
                                (100, 0.0457, 0.0453), (250, 0.0713, 0.0711),
                                (999, 0.1414, 0.1414)]:
        assert round(chain.std["fixed_large"][999 - index].item(), 4) == large
        assert round(chain.std["fixed_small"][999 - index].item(), 4) == small
    # improved-diffusion's sigma at index 0, for whoever perturbs by it.
    assert chain.std["fixed_large"][-1] == chain.std["fixed_small"][-2]


def test_respaced_posterior_is_bayes_rule():
    chain = Respaced(SCHEDULE, torch.tensor([900, 350, 20]))
    after, before, beta = chain.alphas_cumprod[1], chain.alphas_cumprod_prev[1], chain.betas[1]
    # Prior N(sqrt(before) x0, 1 - before), likelihood N(x; sqrt(1 - beta) x_prev, beta).
    x0, x = torch.tensor(0.7, dtype=torch.float64), torch.tensor(-1.3, dtype=torch.float64)
    precision = 1 / (1 - before) + (1 - beta) / beta
    mean = (before.sqrt() * x0 / (1 - before) + (1 - beta).sqrt() * x / beta) / precision
    torch.testing.assert_close(chain.posterior_mean(1, x, x0), mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(chain.std["fixed_small"][1] ** 2, 1 / precision, rtol=1e-12, atol=0)
    assert after == SCHEDULE.alphas_cumprod[350] and before == SCHEDULE.alphas_cumprod[20]
    assert chain.alphas_cumprod_prev[-1] == 1


# Agreement with diffusers.


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("variance", ["fixed_large", "fixed_small"])
@pytest.mark.parametrize("spacing,steps", [(s, n) for s in SPACINGS for n in (50, 7)]
                         + [("leading", 1000)])
def test_ddpm_agrees_with_diffusers(monkeypatch, spacing, steps, variance, clip):
    scheduler = diffusers_scheduler("DDPMScheduler", variance_type=variance,
                                    timestep_spacing=spacing, clip_sample=clip)
    compare_ddpm(monkeypatch, exact(scheduler), torch.float64, 1e-12, steps=steps,
                 spacing=spacing, variance=variance, clip=clip)


def test_ddpm_agrees_with_diffusers_in_float32(monkeypatch):
    # Unpatched: its tables are float32, and its error grows over 1000 steps.
    scheduler = diffusers_scheduler("DDPMScheduler", variance_type="fixed_large")
    compare_ddpm(monkeypatch, scheduler, torch.float32, 5e-5, steps=1000, spacing="leading")


def compare_ddpm(monkeypatch, scheduler, dtype, tolerance, steps, spacing, variance="fixed_large",
                 clip=False):
    noise = stream_noise(3, SHAPE, dtype=dtype)
    scheduler.set_timesteps(steps)
    numbers = range(2)
    noises = [noise(t, numbers) for t in scheduler.timesteps.tolist()]
    if spacing == "trailing":
        # The list ends above 0, and diffusers then adds noise to its result; we do not.
        noises[-1] = torch.zeros_like(noises[-1])
    feed(monkeypatch, noises)
    x = noise(None, numbers)
    for t in scheduler.timesteps:
        x = scheduler.step(toy_model(x, t.expand(2)), t, x).prev_sample
    ours = sample(toy_model, SCHEDULE, SHAPE, num=2, steps=steps, spacing=spacing,
                  variance=variance, clip=clip, seed=3, dtype=dtype)
    assert ours.dtype == dtype and (ours - x).norm() <= tolerance * x.norm()


@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("spacing,steps", [("leading", 50), ("leading", 7), ("trailing", 50),
                                           ("linspace", 50), ("leading", 1000)])
def test_ddim_agrees_with_diffusers(spacing, steps, clip, eta):
    scheduler = exact(diffusers_scheduler("DDIMScheduler", timestep_spacing=spacing,
                                          clip_sample=clip))
    compare_ddim(scheduler, torch.float64, 1e-12, steps, spacing, clip, eta)


def test_ddim_agrees_with_diffusers_in_float32():
    compare_ddim(diffusers_scheduler("DDIMScheduler"), torch.float32, 5e-5, 1000, "leading",
                 False, 0.0)


def compare_ddim(scheduler, dtype, tolerance, steps, spacing, clip, eta):
    noise = stream_noise(3, SHAPE, dtype=dtype)
    scheduler.set_timesteps(steps)
    visited = [*scheduler.timesteps.tolist(), -1]
    x = noise(None, range(2))
    for t, t_next in zip(visited[:-1], visited[1:], strict=True):
        # diffusers goes to t - T // steps, which is not always the next timestep of its own list:
        # with "linspace" it leaves the list. Have it compute the step that was meant.
        if t_next >= 0:
            gap = t - t_next
            scheduler.num_inference_steps = next(n for n in range(1, 1001) if 1000 // n == gap)
        out = toy_model(x, torch.full((2,), t))
        x = scheduler.step(out, t, x, eta=eta, variance_noise=noise(t, range(2))).prev_sample
    ours = sample(toy_model, SCHEDULE, SHAPE, num=2, sampler="ddim", steps=steps, spacing=spacing,
                  eta=eta, clip=clip, seed=3, dtype=dtype)
    assert (ours - x).norm() <= tolerance * x.norm()


def test_ddim_follows_the_exact_flow_where_diffusers_leaves_its_list():
    # Unit Gaussian data: eps = s x is optimal, the flow is the identity and so is any DDIM step
    # in which the next noise level is the true one, up to the discretisation of one step.
    def model(x, t):
        return SCHEDULE.at("sqrt_one_minus_alphas_cumprod", t, x) * x

    start = stream_noise(0, (50,), dtype=torch.float64)(None, range(1))
    for spacing in ("linspace", "trailing"):
        out = sample(model, SCHEDULE, (50,), num=1, sampler="ddim", steps=300, spacing=spacing,
                     dtype=torch.float64)
        assert (out / start - 1).abs().max() < 0.01


def test_ddim_with_full_noise_is_ddpm_with_small_variance():
    kwargs = dict(num=2, steps=20, dtype=torch.float64)
    ddim = sample(toy_model, SCHEDULE, SHAPE, sampler="ddim", eta=1.0, **kwargs)
    ddpm = sample(toy_model, SCHEDULE, SHAPE, variance="fixed_small", **kwargs)
    torch.testing.assert_close(ddim, ddpm, rtol=1e-9, atol=1e-9)


def test_defaults_are_the_paper_s_sampler():
    kwargs = dict(num=1, seed=0)
    spelt_out = sample(toy_model, SCHEDULE, (2,), sampler="ddpm", steps=1000, eta=0.0, clip=False,
                       variance="fixed_large", **kwargs)
    assert torch.equal(sample(toy_model, SCHEDULE, (2,), **kwargs), spelt_out)
    small = sample(toy_model, SCHEDULE, (2,), variance="fixed_small", **kwargs)
    assert not torch.equal(small, spelt_out)


# The closed form: Gaussian data of variance v, for which the optimal network is linear in x.

RANDOM_ENERGY, ADVERSARIAL_ENERGY = 1 / 3, 0.84653
VARIANCES = torch.tensor([1e-3, 0.009, 0.036, 0.1, 0.25, 1.0], dtype=torch.float64)
# Specification A.3, fixed-large variance: generated / data deviation for each of VARIANCES.
TABLE = {
    (None, 0.0): (0.999, 1.008, 1.005, 1.003, 1.002, 1.000),
    ("literal", RANDOM_ENERGY): (0.871, 0.947, 0.964, 0.967, 0.964, 0.954),
    ("literal", ADVERSARIAL_ENERGY): (0.727, 0.866, 0.908, 0.918, 0.916, 0.898),
    ("std", RANDOM_ENERGY): (0.844, 0.934, 0.956, 0.961, 0.960, 0.950),
    ("std", ADVERSARIAL_ENERGY): (0.681, 0.838, 0.890, 0.905, 0.905, 0.889),
    ("ray", RANDOM_ENERGY): (0.020, 0.087, 0.328, 0.603, 0.783, 0.900),
    ("ray", ADVERSARIAL_ENERGY): (0.008, 0.027, 0.109, 0.315, 0.554, 0.776),
    ("x", RANDOM_ENERGY): (0.074, 0.236, 0.500, 0.694, 0.807, 0.888),
    ("x", ADVERSARIAL_ENERGY): (0.030, 0.091, 0.233, 0.431, 0.603, 0.756),
}


def regulariser_weight(mode, energy):
    """c_t = E_b[lambda_t E delta^2] by the midpoint rule over b in U[0.5, 2]: (T,) float64."""
    if mode is None:
        return torch.zeros(len(SCHEDULE), dtype=torch.float64)
    pert = Perturbation(lambda_mode=mode)
    t = torch.arange(len(SCHEDULE))
    total = 0
    for b in torch.linspace(0.5, 2, 401, dtype=torch.float64).unfold(0, 2, 1).mean(1):
        beta = b.expand(len(t))
        total += pert.lambda_t(SCHEDULE, t, beta) * energy * pert.radius(SCHEDULE, t, beta) ** 2
    return total / 400


def optimal_gain(mode, energy, variances):
    """w with E(x, t) = w x, the optimum of the loss on Gaussian data: (T, V) float64."""
    abar, s = SCHEDULE.alphas_cumprod, SCHEDULE.sqrt_one_minus_alphas_cumprod
    noise = s**2 * (1 + regulariser_weight(mode, energy))
    return (noise / s)[:, None] / (abar[:, None] * variances + noise[:, None])


def generated_deviation(gain, variance, steps=None):
    """Deviation of the samples: the sampler's own coefficients applied to a deviation."""
    chain = Respaced(SCHEDULE, timesteps(SCHEDULE, steps))
    power = torch.ones(gain.shape[1], dtype=torch.float64)
    for k, t in enumerate(chain.timesteps.tolist()):
        one, none = torch.ones_like(power), torch.zeros_like(power)
        factor = chain.ddpm_step(k, one, gain[t], none, variance, clip=False)
        added = chain.ddpm_step(k, none, none, one, variance, clip=False)
        power = factor**2 * power + added**2
    return power.sqrt()


@pytest.mark.parametrize("mode,energy", TABLE)
def test_closed_form_table(mode, energy):
    gain = optimal_gain(mode, energy, VARIANCES)
    ratio = generated_deviation(gain, "fixed_large") / VARIANCES.sqrt()
    # Half a unit of the last digit, and a little: two entries are exactly .96451 and .95451.
    assert ratio.tolist() == pytest.approx(TABLE[mode, energy], abs=5.2e-4)


def test_closed_form_small_variance():
    gain = optimal_gain(None, 0.0, VARIANCES)
    ratio = generated_deviation(gain, "fixed_small") / VARIANCES.sqrt()
    assert ratio[:2].numpy().round(3).tolist() == [0.883, 0.961]


@pytest.mark.parametrize("variance", ["fixed_large", "fixed_small"])
def test_monte_carlo_agrees_with_the_closed_form(variance):
    gain = torch.cat([optimal_gain(None, 0.0, VARIANCES),
                      optimal_gain("ray", ADVERSARIAL_ENERGY, VARIANCES)], 1)
    table = gain.float()
    num = 1500
    out = sample(lambda x, t: table[t] * x, SCHEDULE, (12,), num=num, steps=100, variance=variance,
                 batch_size=num)
    expected = generated_deviation(gain, variance, steps=100)
    # The deviation of num normals is known to 1 / sqrt(2 num); 12 of them: four such errors.
    assert ((out.std(0) / expected - 1).abs() < 4 / math.sqrt(2 * num)).all()
    assert (out.mean(0).abs() < 4 * expected / math.sqrt(num)).all()


# Noise, batches and callbacks.


def test_noise_is_that_of_the_streams():
    noise = stream_noise(5, (2, 3))
    index = torch.arange(6) + 7 * 6
    expected = normal(*philox(5, 0, index, Stream.SAMPLER_INIT)[:2]).view(1, 2, 3)
    assert torch.equal(noise(None, range(7, 8)), expected)
    expected = normal(*philox(5, 42, index, Stream.SAMPLER_STEP)[:2]).view(1, 2, 3)
    assert torch.equal(noise(42, range(7, 8)), expected)


def test_many_small_samples_are_computed_at_once():
    sizes = []

    def model(x, t):
        sizes.append(len(x))
        return x

    sample(model, SCHEDULE, (3,), num=3000, steps=1)
    sample(model, SCHEDULE, (3, 32, 32), num=129, steps=1)
    sample(model, SCHEDULE, (3, 256, 256), num=16, steps=1)
    assert sizes == [2048, 952, 128, 1, 16]


@pytest.mark.parametrize("settings", [dict(), dict(sampler="ddim", eta=0.5)])
def test_samples_do_not_depend_on_the_batch_size(settings):
    torch.manual_seed(0)
    net = nn.Conv2d(3, 3, 3, padding=1)
    settings = dict(settings, steps=10, seed=1)

    def model(x, t):  # a good prediction with an error from a network: samples of order 1
        return 0.9 * x + SCHEDULE.at("sqrt_alphas_cumprod", t, x) * net(x)

    def run(num, batch_size, first_index=0):
        return sample(model, SCHEDULE, SHAPE, num=num, batch_size=batch_size,
                      first_index=first_index, **settings)

    whole = run(7, 7)
    for batch_size in (1, 3):
        torch.testing.assert_close(run(7, batch_size), whole, rtol=0, atol=1e-5)
    torch.testing.assert_close(run(2, 2, first_index=5), whole[5:], rtol=0, atol=1e-5)
    assert (whole[0] - whole[1]).abs().max() > 0.1


def test_callbacks():
    states, reports = [], []
    out = sample(toy_model, SCHEDULE, (2,), num=3, steps=4, batch_size=2, first_index=10,
                 trajectory=lambda t, numbers, x: states.append((t, numbers, x.clone())),
                 progress=lambda done, total: reports.append((done, total)))
    visited = timesteps(SCHEDULE, 4).tolist()
    assert [s[0] for s in states] == [*visited, -1] * 2
    assert states[0][1] == range(10, 12) and states[-1][1] == range(12, 13)
    assert torch.equal(states[4][2], out[:2]) and torch.equal(states[-1][2], out[2:])
    assert torch.equal(states[0][2], stream_noise(0, (2,))(None, range(10, 12)))
    assert reports == [(2, 12), (4, 12), (6, 12), (8, 12), (9, 12), (10, 12), (11, 12), (12, 12)]


def test_own_noise_is_used():
    zero = sample(toy_model, SCHEDULE, (2,), num=1, steps=4,
                  noise=lambda t, numbers: torch.zeros(len(numbers), 2))
    assert torch.equal(zero, torch.zeros(1, 2))


def test_model_runs_in_eval_mode_without_gradient_and_gets_its_modes_back():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.frozen, self.live = nn.Dropout(0.5).eval(), nn.Dropout(0.5)
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, x, t):
            assert not self.training and not self.live.training and not torch.is_grad_enabled()
            return self.live(self.weight * x)

    net = Net()
    out = sample(net, SCHEDULE, (2,), num=1, steps=2)
    assert not out.requires_grad
    assert net.training and net.live.training and not net.frozen.training
    with pytest.raises(UsageError):
        sample(lambda x, t: x[:, :1], SCHEDULE, (2,), num=1, steps=2)


def test_network_outputs_of_every_form():
    x, t = torch.randn(2, 3, 4, 4), torch.zeros(2, dtype=torch.int64)

    class Output:
        sample = 2 * x

    assert torch.equal(predict_noise(lambda x, t: Output(), x, t), 2 * x)
    assert torch.equal(predict_noise(lambda x, t: torch.cat([x, 5 * x], 1), x, t), x)
    assert predict_noise(lambda x, t: x.bfloat16(), x, t).dtype == torch.bfloat16
    with pytest.raises(UsageError, match=r"\(2, 1, 4, 4\)"):
        predict_noise(lambda x, t: x[:, :1], x, t)


class Transfers(TorchDispatchMode):
    """Operations between the host and the device."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
        if len({x.device for x in tensors}) > 1:
            self.found.append(str(func))
        return out


@pytest.mark.parametrize("settings", [dict(), dict(sampler="ddim"), dict(sampler="ddim", eta=0.5)])
def test_no_step_waits_for_the_device(settings):
    """On tensors without values whatever would ask for one raises."""
    class Done(Exception):
        pass

    def trajectory(timestep, numbers, x):
        assert x.is_meta
        if timestep < 0:
            raise Done

    with Transfers() as transfers, pytest.raises(Done):
        sample(toy_model, SCHEDULE, SHAPE, num=2, steps=3, clip=True, device="meta",
               trajectory=trajectory, **settings)
    assert transfers.found == []


def test_clipping_keeps_the_result_in_range():
    def wild(x, t):
        return -3 * x

    out = sample(wild, SCHEDULE, (50,), num=2, steps=10, clip=True)
    assert out.abs().max() <= 1
    assert sample(wild, SCHEDULE, (50,), num=2, steps=10).abs().max() > 1


@pytest.mark.parametrize("name,value", [
    ("num", 0), ("batch_size", 0), ("first_index", -1), ("sampler", "euler"), ("steps", 0),
    ("steps", 1001), ("spacing", "karras"), ("variance", "learned"), ("eta", 0.5), ("seed", -1),
    ("seed", 2**32)])
def test_bad_arguments_name_field_and_value(name, value):
    with pytest.raises(UsageError, match=name) as caught:
        sample(toy_model, SCHEDULE, (2,), **{"num": 1, "steps": 2, name: value})
    assert str(value) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("eta", [-0.1, 1.5, float("nan")])
def test_eta_out_of_range(eta):
    with pytest.raises(UsageError, match="eta"):
        sample(toy_model, SCHEDULE, (2,), num=1, steps=2, sampler="ddim", eta=eta)


@pytest.mark.parametrize("bad", [[], [1, 5], [5, 5], [1000], [5, -1], [[3, 2]]])
def test_respaced_refuses_lists_that_do_not_decrease(bad):
    with pytest.raises(UsageError, match="decreases"):
        Respaced(SCHEDULE, torch.tensor(bad, dtype=torch.int64))


def test_one_step():
    chain = Respaced(SCHEDULE, torch.tensor([999]))
    assert np.isfinite(chain.std["fixed_large"].numpy()).all()
    out = sample(toy_model, SCHEDULE, (2,), num=1, steps=1, spacing="trailing")
    x = stream_noise(0, (2,))(None, range(1))
    torch.testing.assert_close(out, chain.predict_x0(0, x, toy_model(x, torch.tensor([999]))))
