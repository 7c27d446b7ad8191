"""Attacks on the trajectory: their formulas, their cost, and that they attack."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from robustdm import NoiseSchedule, Objective, Perturbation, UsageError, fast_network
from robustdm.method.sampling import Respaced, sample, timesteps
from robustdm.method.trajectory_attack import TrajectoryAttack, attacked_steps
from robustdm.models import PointMLP
from robustdm.ops.stream import Stream, element_index, normal, philox

SCHEDULE = NoiseSchedule.linear(1000)
CHAIN = Respaced(SCHEDULE, timesteps(SCHEDULE, 10))
METHODS = ("fgsm", "pgd", "eot", "random")
SHAPE = (1, 6, 6)
NUMBERS = range(4)


def conv_network(seed=0):
    torch.manual_seed(seed)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(1, 8, 3, padding=1), torch.nn.SiLU(), torch.nn.Conv2d(8, 1, 3, padding=1)
    )

    class Timed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.calls = net, 0

        def forward(self, x, t):
            self.calls += len(x)
            return self.net(x) + 0.01 * (t / 1000).view(-1, 1, 1, 1)

    return Timed()


def state(seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(4, *SHAPE, generator=g), torch.randn(4, *SHAPE, generator=g)


def attack(method, **fields):
    return TrajectoryAttack(method, **fields)


@pytest.mark.parametrize("steps, share, count", [(1000, 0.25, 250), (10, 0.5, 5), (7, 1.0, 7),
                                                 (7, 0.0, 0), (3, 0.5, 2)])
def test_the_share_of_attacked_steps(steps, share, count):
    for where in ("stride", "random", "first", "last"):
        assert sum(attacked_steps(steps, share, where)) == count
    first, last = (attacked_steps(steps, share, where) for where in ("first", "last"))
    assert all(first[:count]) and last == first[::-1]
    spread = [k for k, hit in enumerate(attacked_steps(steps, share)) if hit]
    gaps = {b - a for a, b in zip(spread, spread[1:], strict=False)}
    assert len(gaps) <= 2 and (not gaps or max(gaps) - min(gaps) <= 1)
    if 0 < count < steps - 1:
        seeds = {tuple(attacked_steps(steps, share, "random", seed)) for seed in range(20)}
        assert len(seeds) > 1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_no_attack_is_plain_sampling_bit_for_bit(method, sampler):
    settings = dict(num=4, sampler=sampler, steps=6, batch_size=3)
    plain = sample(conv_network(), SCHEDULE, SHAPE, **settings)
    for none in (dict(size=0.0), dict(share=0.0)):
        made = attack(method, iterations=2, **none)
        attacked = sample(conv_network(), SCHEDULE, SHAPE, **settings, attack=made)
        assert torch.equal(attacked, plain)
    attacked = sample(conv_network(), SCHEDULE, SHAPE, **settings,
                      attack=attack(method, iterations=2))
    assert (attacked - plain).abs().max() > 0.01


@pytest.mark.parametrize("method", METHODS)
def test_an_attack_does_not_depend_on_the_batch(method):
    settings = dict(num=4, steps=4, attack=attack(method, iterations=2))
    whole = sample(conv_network(), SCHEDULE, SHAPE, **settings, batch_size=4)
    split = sample(conv_network(), SCHEDULE, SHAPE, **settings, batch_size=3)
    assert torch.allclose(whole, split, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("variance", ["fixed_large", "fixed_small"])
def test_the_perturbation_stays_in_the_ball(method, variance):
    x, z = state()
    for k in (0, 5, 9):
        sigma = CHAIN.std[variance][k].item() * 0.5
        made = attack(method, size=0.5, variance=variance)
        delta = made.perturbation(conv_network(), CHAIN, k, NUMBERS, x, z)
        assert delta.abs().max() <= sigma * (1 + 1e-6)
        if method in ("fgsm", "random"):
            assert torch.allclose(delta.abs(), torch.full_like(x, sigma))


def start_of(method, k):
    """The attack's random start d0, taken from a run whose gradient is zero everywhere."""
    made = attack("pgd", iterations=1, objective="eps")
    x, z = state()
    # A constant network has no gradient, and clamp(d0) is d0 where |d0| < sigma.
    return made.perturbation(lambda x, t: 0 * x, CHAIN, k, NUMBERS, x, z)


@pytest.mark.parametrize("objective", ["mu", "eps"])
def test_fgsm_on_a_linear_network(objective):
    """Where the output is linear, L = |m d|^2 and its gradient has the sign of d0."""
    x, z = state()
    k = 4
    d0 = start_of("fgsm", k)
    sigma = CHAIN.std["fixed_large"][k].item()
    delta = attack("fgsm", objective=objective).perturbation(
        lambda x, t: 0.3 * x, CHAIN, k, NUMBERS, x, z)
    assert torch.allclose(delta, sigma * d0.sign())


def test_fgsm_is_the_sign_of_the_gradient_of_L():
    """Against finite differences in float64, through the posterior mean."""
    net = conv_network().double()
    x, z = (v.double() for v in state())
    k = 3
    made = attack("fgsm", phi=0.5)
    delta = made.perturbation(net, CHAIN, k, NUMBERS, x, z)
    # |d0| < sigma / 2 for most elements; take d0 from pgd on a constant network.
    constant = attack("pgd", iterations=1, phi=0.5, objective="eps")
    d0 = constant.perturbation(lambda x, t: 0 * x, CHAIN, k, NUMBERS, x, z)
    sigma = CHAIN.std["fixed_large"][k].item()
    inside = (d0.abs() < sigma).flatten(1).all(1)
    assert inside.any()
    t = torch.full((4,), CHAIN.timesteps[k].item())
    abar = CHAIN.alphas_cumprod[k].item()

    def mu(x):
        x0 = (x - (1 - abar) ** 0.5 * net(x, t)) / abar**0.5
        return CHAIN.mean_x0[k].item() * x0 + CHAIN.mean_x[k].item() * x

    with torch.no_grad():
        for place in ((0, 0, 0), (0, 2, 3), (0, 5, 5)):
            step = torch.zeros_like(x)
            step[(slice(None), *place)] = 1e-6
            loss = [(mu(x) - mu(x + d0 + sign * step)).square().flatten(1).sum(1)
                    for sign in (1, -1)]
            slope = (loss[0] - loss[1])[inside]
            assert torch.equal(delta[(inside, *place)].sign(), slope.sign())


@pytest.mark.parametrize("objective", ["mu", "eps"])
def test_the_objective_is_how_far_the_posterior_mean_or_the_prediction_moves(objective):
    """Written out from the forward process: neither x0 nor the state enters alone."""
    net, (x, delta), k = conv_network(), state(), 3
    abar, before = (float(v[k]) for v in (CHAIN.alphas_cumprod, CHAIN.alphas_cumprod_prev))
    beta = 1 - abar / before

    def output(x):
        eps = net(x, torch.full((len(x),), int(CHAIN.timesteps[k])))
        if objective == "eps":
            return eps
        x0 = (x - (1 - abar) ** 0.5 * eps) / abar**0.5
        return (before**0.5 * beta * x0 + (1 - beta) ** 0.5 * (1 - before) * x) / (1 - abar)

    with torch.no_grad():
        expected = (output(x) - output(x + delta)).square().flatten(1).sum(1).double()
    found = attack("fgsm", objective=objective).measure(net, CHAIN, k, x, delta)
    assert torch.allclose(found, expected, rtol=1e-4)


def test_one_step_of_pgd_is_the_start_plus_fgsm_clamped():
    x, z = state()
    k = 5
    sigma = CHAIN.std["fixed_large"][k].item()
    d0 = start_of("pgd", k)
    fgsm = attack("fgsm").perturbation(conv_network(), CHAIN, k, NUMBERS, x, z)
    pgd = attack("pgd", iterations=1).perturbation(conv_network(), CHAIN, k, NUMBERS, x, z)
    inside = d0.abs() < sigma  # start_of clamps
    assert inside.float().mean() > 0.5
    assert torch.allclose(pgd[inside], (d0 + fgsm).clamp(-sigma, sigma)[inside], atol=1e-7)


@pytest.mark.parametrize("k", [0, 6, 9])
def test_the_expectation_in_one_pass_equals_the_naive_one(k):
    """The mean of the gradients is the gradient from the mean cotangent, in float64 and float32."""
    for dtype, most in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        net = conv_network().to(dtype)
        x, z = (v.to(dtype) for v in state())
        shared = attack("eot")
        sigma = CHAIN.std["fixed_large"][k].item()
        moved, _ = shared._moved(net, CHAIN, k, x)
        offsets = [0.3 * torch.randn_like(x) for _ in range(5)]
        delta = 0.5 * sigma * torch.randn_like(x)
        one = shared._mean_gradient(moved, delta, offsets)
        naive = attack("eot", shared=False)._mean_gradient(moved, delta, offsets)
        assert (one - naive).norm() <= most * naive.norm()
    both = [attack("eot", shared=shared, iterations=4).perturbation(net.double(), CHAIN, k, NUMBERS,
                                                                  x.double(), z.double())
            for shared in (True, False)]
    assert torch.allclose(*both, atol=1e-12)


def test_the_printed_loss_of_eot_leads_away_from_the_state():
    """Its gradient, written out: that of ||x - (mu(x + d) + sigma z)||^2, averaged over z."""
    net, k = conv_network().double(), 4
    x, z = (v.double() for v in state())
    made = attack("eot", eot_loss="printed", iterations=1, draws=1)
    sigma = CHAIN.std["fixed_large"][k].item()
    index = element_index(0, tuple(x.shape))
    words = philox(made.seed, CHAIN.timesteps[k].item(), index, Stream.ATTACK)
    start = sigma * normal(*words[:2], torch.float64)
    zeta = normal(*philox(made.seed, CHAIN.timesteps[k].item(), index, Stream.ATTACK + 256)[:2],
                  torch.float64)
    d = start.clone().requires_grad_()
    t = torch.full((len(x),), CHAIN.timesteps[k].item())
    with torch.enable_grad():
        mu = CHAIN.posterior_mean(k, x + d, CHAIN.predict_x0(k, x + d, net(x + d, t)))
        (gradient,) = torch.autograd.grad((x - (mu + sigma * zeta)).square().sum(), d)
    expected = (start + sigma * gradient.sign()).clamp(-sigma, sigma)
    found = made.perturbation(net, CHAIN, k, NUMBERS, x, z)
    assert torch.allclose(found, expected)
    # It does not take back the sampler's own noise z, which the corrected loss compares with.
    assert torch.equal(found, made.perturbation(net, CHAIN, k, NUMBERS, x, -z))
    other = attack("eot", iterations=1, draws=1)
    assert not torch.equal(*(other.perturbation(net, CHAIN, k, NUMBERS, x, v) for v in (z, -z)))


def test_the_cost_of_an_attacked_step():
    x, z = state()
    for made, forwards in ((attack("fgsm"), 2), (attack("pgd"), 21), (attack("eot"), 21),
                           (attack("eot", eot_loss="printed"), 21),
                           (attack("eot", shared=False), 101), (attack("random"), 0)):
        net = conv_network()
        made.perturbation(net, CHAIN, 2, NUMBERS, x, z)
        assert net.calls == forwards * len(x)
        # A forward without gradient counts one, one with its input gradient two, the step one.
        assert made.passes() == (1 if not forwards else 1 + 2 * (forwards - 1) + 1)


class Backwards(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.masks = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution_backward.default:
            self.masks.append(tuple(args[-1]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["fgsm", "pgd", "eot"])
def test_no_weight_gradients(method):
    """Even of a network whose weights ask for them."""
    net = conv_network()
    x, z = state()
    with Backwards() as seen:
        attack(method, iterations=2).perturbation(net, CHAIN, 2, NUMBERS, x, z)
    assert seen.masks and all(mask[1:] == (False, False) for mask in seen.masks)
    assert all(p.grad is None for p in net.parameters())


def test_attacks_raise_the_objective_over_the_random_control_in_every_batch():
    """On a trained network. Not at the last step: so near clean data x0 is x, and all sign patterns
    move it equally far.
    """
    torch.manual_seed(0)
    net = PointMLP(16, 48, 2)
    objective = Objective("ddpm", SCHEDULE, Perturbation())
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    scale = torch.linspace(1, 0.05, 16)
    for step in range(300):
        x0 = scale * torch.randn(128, 16)
        objective(net, x0, objective.draw(x0, seed=0, step=step)).total.backward()
        optimizer.step()
        optimizer.zero_grad()
    raised = total = 0
    x = torch.randn(64, 16)
    for k in range(len(CHAIN) - 1):
        numbers, z = range(64), torch.randn_like(x)
        values = {}
        for method in METHODS:
            made = attack(method, iterations=10)
            delta = made.perturbation(net, CHAIN, k, numbers, x, z)
            values[method] = made.measure(net, CHAIN, k, x, delta).sum()
        for method in ("fgsm", "pgd"):
            total += 1
            raised += values[method] > values["random"]
        with torch.no_grad():
            eps = net(x, torch.full((64,), CHAIN.timesteps[k].item()))
        x = CHAIN.ddpm_step(k, x, eps, z, "fixed_large", False)
    assert raised == total == 18


@pytest.mark.parametrize("fields, words", [
    (dict(method="cw"), "method is 'cw'"),
    (dict(share=1.5), "steps_attacked is 1.5"),
    (dict(where="middle"), "where is 'middle'"),
    (dict(phi=0.0), "phi is 0.0"),
    (dict(size=-1.0), "size is -1.0"),
    (dict(size=float("nan")), "size is nan"),
    (dict(iterations=0), "iterations is 0"),
    (dict(objective="x0"), "objective is 'x0'"),
    (dict(eot_loss="other"), "eot_loss is 'other'"),
    (dict(method="eot", objective="eps"), "objective is 'eps': eot compares states"),
])
def test_bad_settings_are_named(fields, words):
    with pytest.raises(UsageError, match=words):
        TrajectoryAttack(**{"method": "fgsm", **fields})


@pytest.mark.parametrize("compile", [False, True])
def test_attacks_run_through_the_fast_network(compile):
    """Compiled once, for a smaller last batch too; its weights never have gradients."""
    net = PointMLP(8, 16, 1)
    fast = fast_network(net, compile=compile, differentiable=True)
    settings = dict(num=6, steps=3, batch_size=4, attack=attack("fgsm"))
    slow = sample(net, SCHEDULE, (8,), **settings)
    assert torch.allclose(sample(fast, SCHEDULE, (8,), **settings), slow, atol=1e-4)
    assert "compile" not in fast.off
    plain = fast_network(net)
    x = torch.zeros(2, 8, requires_grad=True)
    assert not plain(x, torch.zeros(2, dtype=torch.int64)).requires_grad
    with pytest.raises(UsageError, match="CUDA device|differentiable"):
        fast_network(net, cuda_graph=True, differentiable=True)
