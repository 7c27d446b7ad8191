"""The objectives: their definition, gradients, attack, and independence of splits and precision."""

import copy
import math

import pytest
import torch
from torch import nn

from robustdm import NoiseSchedule, Objective, Perturbation, UsageError, ops
from robustdm.method.objectives import OBJECTIVES, seeded
from robustdm.method.schedule import expand
from robustdm.models import PointMLP, build_model
from robustdm.runs.config import TrainConfig
from tests.conftest import relative_error

SCHEDULE = NoiseSchedule.linear(1000)
ROBUST = [name for name in OBJECTIVES if name != "ddpm"]


def points(batch=6, shape=(5,), dtype=torch.float64):
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


def network(dim=5, dtype=torch.float64):
    torch.manual_seed(0)
    return PointMLP(dim, width=16, depth=2, embedding=8).to(dtype)


class Counting(nn.Module):
    """Counts forward passes, and the dropout masks they used."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.inputs = inner, []

    def forward(self, x, t):
        self.inputs.append(x.detach().clone())
        return self.inner(x, t)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_loss_is_its_equation(name):
    """Every objective against its formula written out with plain tensors."""
    model, x0 = network(), points()
    pert = Perturbation(lambda_mode="x", lam=0.4)
    objective = Objective(name, SCHEDULE, pert)
    draw = objective.draw(x0, seed=3, step=5)
    out = objective(model, x0, draw)

    a = SCHEDULE.alphas_cumprod[draw.t].sqrt()[:, None]
    s = (1 - SCHEDULE.alphas_cumprod[draw.t]).sqrt()[:, None]
    xt = a * x0 + s * draw.eps
    r = pert.radius(SCHEDULE, draw.t, draw.beta)[:, None]
    clean = model(xt, draw.t)
    fit = ((clean - draw.eps) ** 2).mean(1)
    assert torch.allclose(out.xt, xt) and torch.allclose(out.fit, fit)
    if name == "ddpm":
        assert out.delta is None and out.x_adv is None and not out.reg.any()
        wanted = fit.mean()
    else:
        start = draw.delta
        if name in ("robust_adv", "invariance"):
            probe = start.clone().requires_grad_()
            change = ((model(xt + s * probe, draw.t) - clean.detach()) ** 2).sum()
            step = torch.autograd.grad(change, probe)[0].sign()
        else:
            step = start.sign() if name == "outward_ran" else torch.zeros_like(start)
        delta = (start + r / math.sqrt(3) * step).clamp(-r, r)
        shift = 0 if name == "invariance" else delta
        weight = pert.lambda_t(SCHEDULE, draw.t, draw.beta)
        reg = weight * ((model(xt + s * delta, draw.t) - clean - shift) ** 2).mean(1)
        assert torch.allclose(out.delta, delta) and torch.allclose(out.x_adv, xt + s * delta)
        assert torch.allclose(out.reg, reg)
        wanted = (fit + reg).mean()
    assert torch.allclose(out.total, wanted)
    got = torch.autograd.grad(out.total, list(model.parameters()))
    for g, w in zip(got, torch.autograd.grad(wanted, list(model.parameters())), strict=True):
        assert torch.allclose(g, w, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ROBUST)
def test_a_perfect_denoiser_pays_no_regulariser(name):
    """E(x) = (x - a x0) / s predicts x0 whatever the input: equivariant, hence not invariant."""
    x0 = points(8, (2, 3))
    objective = Objective(name, SCHEDULE)
    draw = objective.draw(x0, seed=0, step=0)
    a = SCHEDULE.at("sqrt_alphas_cumprod", draw.t, x0)
    s = SCHEDULE.at("sqrt_one_minus_alphas_cumprod", draw.t, x0)
    out = objective(lambda x, t: (x - a * x0) / s, x0, draw)
    assert out.fit.max() < 1e-18
    if name == "invariance":
        assert out.reg.min() > 1e-3
    else:
        assert out.reg.max() < 1e-18


BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(
        ops.why_off(name, "noise_perturb", torch.device("cpu")) is not None,
        reason=str(ops.why_off(name, "noise_perturb", torch.device("cpu")))))
    for name in ("torch", "cpp", "triton")
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name, options", [
    *((name, {}) for name in OBJECTIVES), ("robust_adv", dict(attack="equivariance")),
    ("robust_ran", dict(detach_clean=True, lambda_max=1.0, beta_per="batch")),
])
def test_every_backend_computes_the_same_step(name, options, backend):
    """Loss, perturbation and weight gradients of a small network, against the float64 reference."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, 3, 3, padding=1)]
    model = nn.Sequential(*layers).to(memory_format=torch.channels_last)
    batch = torch.randn(3, 3, 6, 5).contiguous(memory_format=torch.channels_last)

    def step(backend, dtype):
        objective = Objective(name, SCHEDULE, backend=backend, **options)
        x0 = batch.to(dtype)
        draw = objective.draw(x0, seed=3, step=5, first_index=2)
        net = copy.deepcopy(model).to(dtype)
        out = objective(lambda x, t: net(x), x0, draw)
        delta = out.delta if out.delta is not None else torch.zeros(1)
        return out, delta, torch.autograd.grad(out.total, list(net.parameters()))

    out, delta, grads = step(backend, torch.float32)
    exact, exact_delta, exact_grads = step("torch", torch.float64)
    assert out.xt.is_contiguous(memory_format=torch.channels_last)
    # The attack may take the other sign where its gradient is all but zero.
    assert ((delta - exact_delta).abs() > 1e-5).double().mean() < 0.02
    for value in ("total", "fit", "reg", "xt"):
        error = relative_error(getattr(out, value), getattr(exact, value))
        assert error < 1e-5 or name == "ddpm" and value == "reg", value
    for g, e in zip(grads, exact_grads, strict=True):
        assert relative_error(g, e) < 1e-4


def test_the_residual_is_the_change_of_the_predicted_data():
    """o' - o - delta = -(a / s) (x0_hat' - x0_hat), for any network."""
    model, x0 = network(), points(64)
    objective = Objective("robust_adv", SCHEDULE)
    draw = objective.draw(x0, seed=1, step=2)
    out = objective(model, x0, draw)
    clean, adv = model(out.xt, draw.t), model(out.x_adv, draw.t)
    change = SCHEDULE.predict_x0(out.x_adv, draw.t, adv) - SCHEDULE.predict_x0(
        out.xt, draw.t, clean)
    a = SCHEDULE.at("sqrt_alphas_cumprod", draw.t, x0)
    s = SCHEDULE.at("sqrt_one_minus_alphas_cumprod", draw.t, x0)
    assert (adv - clean - out.delta + a / s * change).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ROBUST)
def test_the_perturbation_stays_in_the_ball(name, dtype):
    x0 = points(64, (3, 4, 4), dtype)
    objective = Objective(name, SCHEDULE)
    draw = objective.draw(x0, seed=2, step=9)
    model = nn.Conv2d(3, 3, 3, padding=1).to(dtype)
    out = objective(lambda x, t: model(x), x0, draw)
    r = expand(draw.radius, x0)
    assert draw.delta.dtype == out.delta.dtype == dtype
    assert torch.equal(draw.radius.to(dtype).to(draw.radius.dtype), draw.radius)
    assert (draw.delta.abs() <= r).all() and (out.delta.abs() <= r).all()
    if name != "robust_ran":
        assert (out.delta.abs() == r).double().mean() > 0.2  # and many reach its surface


def test_energies():
    """E delta^2 / r^2: 1/3 random; 0.468 after a step of random sign; 0.8465 outwards."""
    x0 = torch.zeros(400, 500, dtype=torch.float64)
    draw = Objective("robust_adv", SCHEDULE).draw(x0, seed=0, step=0)
    r = draw.radius[:, None]
    g = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0), dtype=x0.dtype)

    def energy(delta):
        return float(((delta / r) ** 2).mean())

    assert abs(energy(draw.delta) - 1 / 3) < 0.003
    _, stepped = ops.fgsm_project(x0, g, draw.noise, draw.radius, draw.key)
    assert abs(energy(stepped) - 0.468) < 0.003
    _, outward = ops.fgsm_project(x0, None, draw.noise, draw.radius, draw.key)
    assert abs(energy(outward) - 0.8465) < 0.003
    assert abs(float((outward.abs() == r).double().mean()) - 0.577) < 0.004


def test_a_zero_gradient_leaves_the_random_start():
    """A network with a zero output layer has no gradient yet: sign(0) must move nothing."""
    model, x0 = network(), points()
    nn.init.zeros_(model.outlet.weight)
    objective = Objective("robust_adv", SCHEDULE)
    draw = objective.draw(x0, seed=0, step=0)
    assert torch.equal(objective(model, x0, draw).delta, draw.delta)


def test_zero_radius_is_plain_ddpm():
    model, x0 = network(), points()
    tiny = Perturbation(omega=200.0, gamma=0.0, lambda_mode="x", lam=0.0)
    robust, plain = Objective("robust_adv", SCHEDULE, tiny), Objective("ddpm", SCHEDULE)
    draw = robust.draw(x0, seed=4, step=4)
    assert torch.equal(robust(model, x0, draw).total, plain(model, x0, draw).total)


def test_lambda_max_bounds_the_weight():
    model, x0 = network(), points(256)
    free, bound = (Objective("robust_ran", SCHEDULE, lambda_max=m) for m in (None, 2.0))
    draw = free.draw(x0, seed=0, step=0)
    weight = free.perturbation.lambda_t(SCHEDULE, draw.t, draw.beta)
    a, b = free(model, x0, draw).reg, bound(model, x0, bound.draw(x0, seed=0, step=0)).reg
    assert (weight > 2).any() and torch.allclose(b, a * (2 / weight).clamp(max=1))


def test_detached_clean_stops_one_gradient():
    """Same value; the regulariser's gradient goes through the adversarial branch alone."""
    model, x0 = network(), points()
    both, one = (Objective("robust_ran", SCHEDULE, detach_clean=d) for d in (False, True))
    draw = both.draw(x0, seed=0, step=0)
    a, b = both(model, x0, draw), one(model, x0, draw)
    assert torch.equal(a.total, b.total)
    weights = list(model.parameters())
    clean = model(a.xt, draw.t).detach()
    weight = both.perturbation.lambda_t(SCHEDULE, draw.t, draw.beta)
    reg = (weight * ((model(a.x_adv, draw.t) - clean - a.delta) ** 2).mean(1)).mean()
    wanted = torch.autograd.grad(reg, weights)
    fit = torch.autograd.grad(Objective("ddpm", SCHEDULE)(model, x0, draw).total, weights)
    got = torch.autograd.grad(b.total, weights)
    for g, f, w in zip(got, fit, wanted, strict=True):
        assert torch.allclose(g - f, w, atol=1e-10)
    free = torch.autograd.grad(a.total, weights)
    assert any(not torch.allclose(g, f) for g, f in zip(got, free, strict=True))


def test_the_equivariance_attack_raises_the_residual_more():
    model, x0 = network(), points(512)
    regs = {}
    for attack in ("output", "equivariance"):
        objective = Objective("robust_adv", SCHEDULE, attack=attack)
        draw = objective.draw(x0, seed=0, step=0)
        regs[attack] = objective(model, x0, draw).reg.sum()
    random = Objective("robust_ran", SCHEDULE)(model, x0, draw).reg.sum()
    assert regs["equivariance"] > regs["output"] and regs["equivariance"] > 1.5 * random


@pytest.mark.parametrize("name, passes", [
    ("ddpm", 1), ("robust_ran", 2), ("outward_ran", 2), ("robust_adv", 3), ("invariance", 3)
])
def test_forward_passes(name, passes):
    model, x0 = Counting(network()), points()
    objective = Objective(name, SCHEDULE)
    out = objective(model, x0, objective.draw(x0, seed=0, step=0))
    assert [len(x) for x in model.inputs] == [len(x0)] * passes
    assert torch.equal(model.inputs[0], out.xt)
    if passes > 1:
        assert torch.equal(model.inputs[-1], out.x_adv)


def test_the_regulariser_on_a_share_of_the_batch():
    """The first samples get it, with the weight that keeps its expectation; the others do not."""
    model, x0 = Counting(network()), points(8)
    exact = Objective("robust_adv", SCHEDULE)
    part = Objective("robust_adv", SCHEDULE, reg_fraction=0.4)
    draw = exact.draw(x0, seed=1, step=2)
    whole, out = exact(model.inner, x0, draw), part(model, x0, draw)
    assert [len(x) for x in model.inputs] == [8, 3, 3]  # clean, attack, adversarial
    assert torch.allclose(out.fit, whole.fit)
    assert torch.allclose(out.reg[:3], 8 / 3 * whole.reg[:3]) and not out.reg[3:].any()
    assert torch.allclose(out.delta, whole.delta[:3]) and torch.allclose(out.x_adv, whole.x_adv[:3])
    wanted = (whole.fit + torch.where(torch.arange(8) < 3, 8 / 3, 0.0) * whole.reg).mean()
    assert torch.allclose(out.total, wanted.to(out.total))
    # The gradient: the plain one of all, and the mean regulariser's of three.
    plain, three = Objective("ddpm", SCHEDULE), draw.part(0, 3)
    total = (plain(model, x0, draw).total + exact(model, x0[:3], three).total
             - plain(model, x0[:3], three).total)
    for a, b in zip(*(torch.autograd.grad(loss, list(model.parameters()))
                      for loss in (out.total, total)), strict=True):
        assert torch.allclose(a, b)
    one = Objective("robust_adv", SCHEDULE, reg_fraction=1e-3)(model, x0, draw)
    assert len(one.delta) == 1 and torch.allclose(one.reg[0], 8 * whole.reg[0])


def test_the_regulariser_in_some_of_the_steps():
    model, x0 = Counting(network()), points()
    exact, plain = Objective("robust_adv", SCHEDULE), Objective("ddpm", SCHEDULE)
    some = Objective("robust_adv", SCHEDULE, reg_every=3, reg_from=6)
    for step in range(13):
        draw = some.draw(x0, seed=1, step=step)
        with_it = step in (6, 9, 12)
        assert draw.regularised == some.regularises(step) == with_it
        model.inputs.clear()
        out = some(model, x0, draw)
        wanted = (exact if with_it else plain)(network(), x0, exact.draw(x0, seed=1, step=step))
        assert len(model.inputs) == (3 if with_it else 1)
        assert torch.allclose(out.fit, wanted.fit) and torch.allclose(out.reg, 3 * wanted.reg)
        assert torch.allclose(out.total, (out.fit + out.reg).mean())
        assert (out.delta is None) != with_it
    assert not plain.regularises(0)


def test_an_attack_on_a_share_of_the_perturbed_samples():
    model, x0 = Counting(network()), points(8)
    exact = Objective("robust_adv", SCHEDULE)
    draw = exact.draw(x0, seed=1, step=2)
    whole = exact(network(), x0, draw)
    for options, attacked, count in ((dict(attack_fraction=0.25), 2, 8),
                                     (dict(attack_fraction=0.5, reg_fraction=0.5), 2, 4)):
        model.inputs.clear()
        out = Objective("robust_adv", SCHEDULE, **options)(model, x0, draw)
        assert [len(x) for x in model.inputs] == [8, attacked, count]
        assert torch.allclose(out.delta[:attacked], whole.delta[:attacked])
        assert torch.allclose(out.delta[attacked:], draw.delta[attacked:count])


@pytest.mark.parametrize("name, options, units", [
    ("ddpm", {}, 3), ("robust_ran", {}, 6), ("outward_ran", {}, 6), ("robust_adv", {}, 8),
    ("invariance", {}, 8), ("robust_adv", dict(reg_fraction=0.25), 4.25),
    ("robust_adv", dict(attack_fraction=0.5), 7), ("robust_adv", dict(reg_every=4), 4.25),
    ("robust_adv", dict(reg_fraction=0.5, attack_fraction=0.5, reg_every=2), 4),
])
def test_units(name, options, units):
    objective = Objective(name, SCHEDULE, **options)
    assert objective.units() == units
    steps = [objective.units(step) for step in range(4)]
    assert sum(steps) / 4 == units
    late = Objective(name, SCHEDULE, reg_from=2, **options)
    assert late.units() == units and late.units(1) == 3


@pytest.mark.parametrize("bf16", [False, True])
def test_the_attack_computes_no_weight_gradient(bf16):
    """Counted in the backward graph itself: convolutions are asked for input gradients alone. Under
    autocast, too, which keeps the casts of the weights from one pass of a step to the next."""
    from torch.utils._python_dispatch import TorchDispatchMode

    masks = []

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.convolution_backward.default:
                masks.append(tuple(args[-1]))
            return func(*args, **(kwargs or {}))

    config = TrainConfig(block_channels=(8, 8), norm_groups=4)
    model = build_model(config, (1, 8, 8))
    objective = Objective("robust_adv", SCHEDULE)
    x0 = torch.randn(2, 1, 8, 8)
    with Spy():
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            out = objective(model, x0, objective.draw(x0, seed=0, step=0))
        attack = list(masks)
        masks.clear()
        out.total.backward()
    convolutions = sum(isinstance(m, nn.Conv2d) for m in model.modules())
    assert len(attack) == convolutions and all(m == (True, False, False) for m in attack)
    assert len(masks) == 2 * convolutions and all(m[1] for m in masks)
    assert all(p.requires_grad and p.grad is not None for p in model.parameters())
    # Only the network runs in bf16: its input, the attack's result and the losses are float32.
    for name in ("total", "fit", "reg", "delta", "xt", "x_adv"):
        assert getattr(out, name).dtype == torch.float32, name
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


class Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5)
        self.masks = []

    def forward(self, x, t):
        out = self.drop(torch.ones_like(x))
        self.masks.append(out == 0)
        return out * x


@pytest.mark.parametrize("share", [True, False])
def test_dropout_masks(share):
    model, x0 = Dropping(), points(4, (50,))
    objective = Objective("robust_adv", SCHEDULE, share_dropout=share)
    before = torch.random.get_rng_state()
    objective(model, x0, objective.draw(x0, seed=0, step=0))
    first = list(model.masks)
    same = [[torch.equal(a, b) for a in first] for b in first]
    assert same == ([[True] * 3] * 3 if share else torch.eye(3).bool().tolist())
    assert torch.equal(before, torch.random.get_rng_state())  # the user's stream is untouched
    for seed, step, index in ((0, 1, 0), (1, 0, 0), (0, 0, 4), (0, 0, 0)):
        model.masks.clear()
        torch.rand(1)  # nor do the masks depend on it
        objective(model, x0, objective.draw(x0, seed=seed, step=step, first_index=index))
        same = [torch.equal(a, b) for a, b in zip(first, model.masks, strict=True)]
        assert same == [(seed, step, index) == (0, 0, 0)] * 3


def test_dropout_is_seeded_on_the_gpu_that_holds_the_batch(monkeypatch):
    """Not on the current one: with fake generators of two GPUs, of which cuda:0 is current."""
    gpus = [torch.Generator(), torch.Generator()]
    monkeypatch.setattr(torch.cuda, "default_generators", gpus)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: gpus[device.index].get_state())
    monkeypatch.setattr(torch.cuda, "set_rng_state",
                        lambda state, device: gpus[device.index].set_state(state))
    before = [gpu.get_state() for gpu in gpus]
    with seeded(5, torch.device("cuda:1")):
        assert [gpu.initial_seed() == 5 for gpu in gpus] == [False, True]
    assert all(torch.equal(gpu.get_state(), state) for gpu, state in zip(gpus, before, strict=True))


@pytest.mark.parametrize("beta_per", ["sample", "batch"])
def test_a_split_batch_draws_what_the_whole_does(beta_per):
    model, x0 = network(), points(10)
    objective = Objective("robust_adv", SCHEDULE, beta_per=beta_per)
    whole = objective.draw(x0, seed=9, step=3)
    total = objective(model, x0, whole)
    for start, stop in ((0, 4), (4, 10)):
        draw = objective.draw(x0[start:stop], seed=9, step=3, first_index=start)
        part = objective(model, x0[start:stop], draw)
        for a, b in ((draw.t, whole.t), (draw.beta, whole.beta), (draw.eps, whole.eps),
                     (draw.delta, whole.delta), (part.delta, total.delta)):
            assert torch.equal(a, b[start:stop])
        assert torch.allclose(part.reg, total.reg[start:stop])
    assert (whole.beta == whole.beta[0]).all() == (beta_per == "batch")


def test_draws_repeat_and_differ():
    x0 = points(32)
    objective = Objective("robust_adv", SCHEDULE)
    first, again = (objective.draw(x0, seed=1, step=1) for _ in range(2))
    assert torch.equal(first.eps, again.eps) and torch.equal(first.t, again.t)
    for other in (objective.draw(x0, seed=2, step=1), objective.draw(x0, seed=1, step=2)):
        assert not torch.equal(first.t, other.t) and not torch.equal(first.eps, other.eps)
        assert not torch.equal(first.delta, other.delta)


def test_laws_of_the_draw():
    x0 = torch.zeros(40_000, 2)
    draw = Objective("robust_adv", SCHEDULE).draw(x0, seed=0, step=0)
    counts = torch.bincount(draw.t, minlength=1000)
    assert draw.t.min() == 0 and draw.t.max() == 999 and counts.min() > 10
    assert draw.beta.min() >= 0.5 and draw.beta.max() < 2
    assert abs(draw.beta.mean() - 1.25) < 0.01 and abs((1 / draw.beta).mean() - 0.9242) < 0.01
    unit = draw.delta / draw.radius[:, None]
    values = torch.stack([draw.eps[:, 0], draw.eps[:, 1], unit[:, 0], unit[:, 1],
                          draw.t.float(), draw.beta.float()])
    assert (torch.corrcoef(values) - torch.eye(6)).abs().max() < 0.02
    assert abs(draw.eps.var() - 1) < 0.02 and abs(unit.var() - 1 / 3) < 0.01


@pytest.mark.parametrize("shape", [(1,), (3,), (3, 8, 8), (2, 3, 4, 5), ()])
@pytest.mark.parametrize("name", ["ddpm", "robust_adv"])
def test_any_trailing_shape(name, shape):
    x0 = points(4, shape)
    objective = Objective(name, SCHEDULE)
    out = objective(lambda x, t: x.sin() * 0.5, x0, objective.draw(x0, seed=0, step=0))
    assert out.xt.shape == x0.shape and out.fit.shape == (4,) and out.total.dtype == x0.dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_mlp_tells_timesteps_apart(dtype):
    model = PointMLP(2, width=64, depth=1).to(dtype)
    out = model(torch.zeros(1000, 2, dtype=dtype), torch.arange(1000))
    assert out.dtype == dtype and (out[1:] != out[:-1]).any(dim=1).double().mean() > 0.9


def test_diffusers_networks_work_as_they_are():
    config = TrainConfig(block_channels=(8, 8), norm_groups=4)
    model = build_model(config, (1, 8, 8))
    x0 = torch.randn(2, 1, 8, 8)
    objective = Objective("robust_adv", SCHEDULE)
    draw = objective.draw(x0, seed=0, step=0)
    wrapped = objective(lambda x, t: model(x, t).sample, x0, draw)
    assert torch.equal(objective(model, x0, draw).total, wrapped.total)


@pytest.mark.parametrize("arguments, match", [
    (("robust_adv", dict(reg_fraction=0.0)), "reg_fraction is 0.0: it is a share, above 0 and up"),
    (("robust_adv", dict(attack_fraction=1.5)), "attack_fraction is 1.5: it is a share"),
    (("robust_adv", dict(reg_every=0)), "reg_every is 0, reg_from 0: give a number of steps"),
    (("robust_adv", dict(reg_from=-1)), "reg_every is 1, reg_from -1: give"),
    (("robust",), "objective is 'robust'"),
    (("ddpm", {"backend": "cuda"}), "backend is 'cuda'"),
    (("ddpm", {"beta_per": "image"}), "beta_per is 'image'"),
    (("ddpm", {"attack": "pgd"}), "attack is 'pgd'"),
    (("ddpm", {"lambda_max": -1.0}), "lambda_max is -1.0"),
])
def test_unknown_options_are_refused(arguments, match):
    name, *rest = arguments
    with pytest.raises(UsageError, match=match):
        Objective(name, SCHEDULE, **(rest[0] if rest else {}))


def test_wrong_tensors_are_refused():
    objective = Objective("ddpm", SCHEDULE)
    x0 = points()
    draw = objective.draw(x0, seed=0, step=0)
    with pytest.raises(UsageError, match=r"torch.int64 of shape \(2, 2\)"):
        objective.draw(torch.zeros(2, 2, dtype=torch.int64), seed=0, step=0)
    with pytest.raises(UsageError, match="draw has shape .* is torch.float64, x0 .* torch.float32"):
        objective(network(), x0.float(), draw)
    for t in (torch.tensor([-1] * 6), torch.tensor([1000] * 6), torch.zeros(6), torch.tensor([1])):
        with pytest.raises(UsageError, match="one timestep per sample, int64 from 0 to 999"):
            objective.draw(x0, seed=0, step=0, t=t)
    with pytest.raises(UsageError, match="the model returns tuple: it must return the predicted"):
        objective(lambda x, t: (x,), x0, draw)
    with pytest.raises(UsageError, match="the model returns torch.int64 numbers"):
        objective(lambda x, t: x.long(), x0, draw)
    with pytest.raises(UsageError, match=r"draw has shape \(6, 5\) and is .*, x0 \(3, 5\)"):
        objective(network(), x0[:3], draw)
    with pytest.raises(UsageError, match=r"shape \(6, 4\) for samples of shape \(6, 5\)"):
        objective(lambda x, t: x[:, 1:], x0, draw)
