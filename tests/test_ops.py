"""The dispatcher and every op on every backend that is here, against the float64 reference."""

import itertools
import os
import shutil
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from robustdm import NoiseSchedule, Perturbation, ops
from robustdm.errors import UsageError
from robustdm.method.draws import draw_samples
from robustdm.ops import reference, stream
from tests.conftest import HAS_GPU, TOLERANCE, relative_error

CPU = torch.device("cpu")
SCHEDULE = NoiseSchedule.linear(1000)
TABLES = torch.stack((
    SCHEDULE.sqrt_alphas_cumprod, SCHEDULE.sqrt_one_minus_alphas_cumprod,
    SCHEDULE.sqrt_one_minus_alphas_cumprod,
))
SHAPES = [(2, 3, 8, 8), (3, 3, 7, 5), (1, 1, 1, 1), (5,), (4, 3), (2, 3, 2, 3, 2), (0, 3, 4, 4)]
# Small samples share a block of the C++ code: the last block holds one, several, or is full.
SHARED = [(n, 3, 8, 8) for n in range(1, 6)] + [(37, 1, 8, 8)]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def usable(op, device=CPU):
    return [b for b in ("torch", "cpp", "triton") if ops.why_off(b, op, device) is None]


def need(op, backend, device=CPU):
    reason = ops.why_off(backend, op, device)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")


BACKEND = pytest.mark.parametrize("backend", ["torch", "cpp", "triton"])


def draw(shape, dtype, *, first=0, device=CPU):
    """key, signal, noise, radius, lambda_t of a batch."""
    key = torch.tensor([7, 3, first], device=device)
    _, _, *scales = draw_samples(
        key, TABLES.to(device), shape[0], dtype, 8 / 255, 0.3, "x", 0.5, 2.0, None, False
    )
    return key, *scales


def noisy(shape, dtype, seed=0, device=CPU, sliced=True):
    """Random numbers in channels-last order; sliced out of a larger buffer."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)
    if x.ndim == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    if sliced and x.ndim > 1:
        big = torch.full((shape[0], *shape[1:-1], shape[-1] + 2), float("nan"), dtype=dtype)
        big[..., 1:-1] = x
        x = big[..., 1:-1]
    return x.to(device)


@pytest.fixture
def poisoned(monkeypatch):
    """Memory that a kernel leaves unwritten is NaN."""
    def poison(make):
        def made(*args, **kwargs):
            out = make(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out
        return made

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    monkeypatch.setattr(Tensor, "new_empty", poison(Tensor.new_empty))


# Every op against its definition.


@pytest.mark.parametrize("mode", ["ray", "x", "std", "literal"])
@pytest.mark.parametrize("per_batch, top", [(False, None), (True, 0.5)])
def test_draws_are_equal_to_the_last_bit(mode, per_batch, top, poisoned):
    key = torch.tensor([2**32 - 1, 5, 2**33])
    pert = Perturbation(lambda_mode=mode)
    for dtype in (*FLOATS, torch.float64):
        t, beta, signal, noise, radius, lambda_t = draw_samples(
            key, TABLES, 37, dtype, pert.gamma, pert.lam, mode, 0.5, 2.0, top, per_batch
        )
        wide = reference.wide(dtype)
        index = torch.arange(37) + 2**33
        w0, w1, _, _ = stream.philox(2**32 - 1, 5, index, stream.Stream.SAMPLE)
        if per_batch:
            w1 = stream.philox(2**32 - 1, 5, torch.zeros(37).long(), stream.Stream.BATCH)[1]
        assert torch.equal(t, w0 * 1000 >> 32)
        assert torch.equal(beta, 0.5 + 1.5 * stream.uniform(w1, torch.float64))
        assert torch.equal(signal, SCHEDULE.at("sqrt_alphas_cumprod", t).to(wide))
        assert torch.equal(noise, SCHEDULE.at("sqrt_one_minus_alphas_cumprod", t).to(wide))
        assert torch.equal(radius, pert.radius(SCHEDULE, t, beta).to(dtype).to(wide))
        weight = pert.lambda_t(SCHEDULE, t, beta)
        assert torch.equal(lambda_t, weight.clamp(max=top).to(wide) if top else weight.to(wide))


@BACKEND
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_noise_perturb(backend, dtype, shape, poisoned):
    need("noise_perturb", backend)
    key, signal, noise, radius, _ = draw(shape, dtype, first=3)
    x0 = noisy(shape, dtype)
    xt, x_ran = ops.noise_perturb(x0, signal, noise, radius, key, backend=backend)
    eps, unit = stream.element_noise(key, shape, torch.float64)
    s = noise.double().view(-1, *[1] * (len(shape) - 1))
    wanted = signal.double().view_as(s) * x0.double() + s * eps
    assert xt.dtype == x_ran.dtype == dtype and xt.shape == x_ran.shape == shape
    if not x0.numel():
        return
    assert relative_error(xt, wanted) < TOLERANCE[dtype]
    # x_ran follows from x_t and the exact delta_ran, to the last bits.
    unit = stream.element_noise(key, shape, torch.float32)[1]
    delta = (radius.view(s.shape) * unit).to(dtype)
    moved = xt.double() + s * delta.double()
    assert relative_error(x_ran, moved) < TOLERANCE[dtype]
    _, start = ops.fgsm_project(xt, torch.zeros_like(xt), noise, radius, key, backend=backend)
    truncates = backend == "triton" and dtype == torch.bfloat16 and not HAS_GPU
    assert torch.equal(start, delta) or truncates and relative_error(start, delta) < 2**-7


@BACKEND
@pytest.mark.parametrize("source, target", [
    (torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float16, torch.float32)
])
def test_noise_perturb_changes_the_dtype(backend, source, target):
    need("noise_perturb", backend)
    key, signal, noise, radius, _ = draw((2, 3, 4, 4), target)
    x0 = noisy((2, 3, 4, 4), source)
    out = ops.noise_perturb(x0, signal, noise, radius, key, dtype=target, backend=backend)
    ref = reference.noise_perturb(x0.double(), *(v.double() for v in (signal, noise, radius)), key,
                                  torch.float64)
    for a, b in zip(out, ref, strict=True):
        assert a.dtype == target and relative_error(a, b) < 2 * TOLERANCE[target]


@BACKEND
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("outward", [False, True])
def test_fgsm_project(backend, dtype, shape, outward, poisoned):
    need("fgsm_project", backend)
    key, _, noise, radius, _ = draw(shape, dtype, first=1)
    xt, gradient = noisy(shape, dtype), noisy(shape, torch.float32, 1)
    gradient[:1] = 0
    x_adv, delta = ops.fgsm_project(xt, None if outward else gradient, noise, radius, key,
                                    backend=backend)
    wanted = reference.fgsm_project(xt, None if outward else gradient, noise, radius, key)
    if dtype == torch.bfloat16 and backend == "triton" and not HAS_GPU:
        assert not delta.numel() or relative_error(delta, wanted[1]) < 2**-7
    else:
        assert torch.equal(delta, wanted[1]) and torch.equal(x_adv, wanted[0])


@BACKEND
def test_a_gradient_of_nan_stays_nan(backend):
    """A broken step must end in a loss that is not finite, never in an innocent perturbation."""
    need("fgsm_project", backend)
    key, _, noise, radius, _ = draw((2, 3), torch.float32)
    gradient = torch.tensor([[float("nan"), 0.0, -0.0], [float("inf"), -1e-40, 1.0]])
    _, delta = ops.fgsm_project(torch.zeros(2, 3), gradient, noise, radius, key, backend=backend)
    start = radius[:, None] * stream.element_noise(key, (2, 3))[1]
    assert delta.isnan().tolist() == [[True, False, False], [False] * 3]
    assert torch.equal(delta[0, 1:], start[0, 1:])
    step = (radius * reference.INVERSE_SQRT3)[1]
    sign = torch.tensor([1.0, -1.0, 1.0])
    assert torch.equal(delta[1], (start[1] + step * sign).clamp(-radius[1], radius[1]))


VARIANTS = list(itertools.product(["stored", "drawn"], [False, True], [False, True])) + [
    ("ddpm", False, False)
]


@BACKEND
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("delta_from, invariance, detach", VARIANTS)
def test_equivariance_loss(backend, dtype, delta_from, invariance, detach, poisoned):
    need("equivariance_loss", backend)
    for shape in SHAPES[:5] + (SHARED if dtype == torch.float32 and backend != "triton" else []):
        key, _, _, radius, lambda_t = draw(shape, torch.float32, first=2)
        o, o2 = (noisy(shape, dtype, n).requires_grad_() for n in (1, 2))
        delta = noisy(shape, torch.float32, 3) if delta_from == "stored" else None
        ddpm = delta_from == "ddpm"
        total, fit, reg = ops.equivariance_loss(
            o, None if ddpm else o2, delta, radius, lambda_t, key, dtype=torch.float32,
            invariance=invariance, detach_clean=detach, backend=backend,
        )
        p, p2 = (x.detach().double().requires_grad_() for x in (o, o2))
        eps, _ = stream.element_noise(key, shape, torch.float64)
        inner = tuple(range(1, p.ndim))
        per_sample = (-1, *[1] * len(inner))
        if delta is None:
            unit = stream.element_noise(key, shape)[1]
            delta = radius.view(per_sample) * unit
        square = (p - eps) ** 2
        wanted_fit = square.mean(inner) if inner else square
        if ddpm:
            wanted_reg = torch.zeros_like(wanted_fit)
        else:
            residual = p2 - (p.detach() if detach else p) - (0 if invariance else delta.double())
            wanted_reg = lambda_t.double() * (
                (residual**2).mean(inner) if inner else residual**2)
        wanted = (wanted_fit + wanted_reg).mean()
        tight = 1e-6
        for got, ref in ((fit, wanted_fit), (reg, wanted_reg), (total, wanted)):
            assert got.dtype == torch.float32 and not got.isnan().any()
            assert relative_error(got, ref) < tight or not ref.any() and not got.any()
        inputs = [(o, p)] if ddpm else [(o, p), (o2, p2)]
        got = torch.autograd.grad(-3 * total, [a for a, _ in inputs])
        ref = torch.autograd.grad(-3 * wanted, [b for _, b in inputs])
        for a, b in zip(got, ref, strict=True):
            assert a.dtype == dtype
            # Half precision has rounding of the product with the incoming gradient, too.
            assert relative_error(a, b) < (tight if dtype == torch.float32 else 2**-6)


def test_float16_gradients_do_not_vanish():
    """At 1e-7 a float16 gradient is lost; the loss scale comes only after the op."""
    shape = (8, 3, 32, 32)
    key, _, _, radius, lambda_t = draw(shape, torch.float32)
    for backend in usable("equivariance_loss")[:2]:
        o = stream.element_noise(key, shape)[0].add(1e-2).half().requires_grad_()
        total, _, _ = ops.equivariance_loss(o, None, None, radius, lambda_t, key, backend=backend)
        (grad,) = torch.autograd.grad(total * 2**16, o)
        assert (grad != 0).float().mean() > 0.99


@BACKEND
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("full", [False, True])
def test_group_norm_act(backend, dtype, full):
    need("group_norm_act", backend)
    x = noisy((2, 12, 3, 5), dtype).requires_grad_()
    key = torch.tensor([1, 2, 3])
    named = {"weight": noisy((12,), dtype, 1), "bias": noisy((12,), dtype, 2)}
    if full:
        named |= {n: noisy((2, 12), dtype, 3 + i) for i, n in enumerate(("scale", "shift", "add"))}
    rate = 0.25 if full else 0.0
    named = {k: v.requires_grad_() for k, v in named.items()}
    exact = {k: v.detach().double().requires_grad_() for k, v in named.items()}
    x64 = x.detach().double().requires_grad_()
    y = ops.group_norm_act(x, 4, **named, dropout=rate, key=key, layer=2, backend=backend)
    if full:
        y64 = torch.nn.functional.group_norm(
            x64 + exact["add"][..., None, None], 4, exact["weight"], exact["bias"])
        y64 = y64 * (1 + exact["scale"][..., None, None]) + exact["shift"][..., None, None]
        mask = stream.dropout_mask(key, (2, 12, 3, 5), 2, rate)
        assert 0.1 < (~mask).double().mean() < 0.4
        y64 = torch.nn.functional.silu(y64) * mask / (1 - rate)
    else:
        y64 = torch.nn.functional.silu(
            torch.nn.functional.group_norm(x64, 4, exact["weight"], exact["bias"]))
    loose = 1e-6 if dtype == torch.float32 else 1.5 * TOLERANCE[dtype]
    assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
    assert relative_error(y, y64) < loose
    loss, loss64 = (y * noisy(y.shape, dtype, 9)).sum(), (y64 * noisy(y.shape, dtype, 9)).sum()
    grads = torch.autograd.grad(loss, [x, *named.values()])
    wanted = torch.autograd.grad(loss64, [x64, *exact.values()])
    for name, a, b in zip(["x", *named], grads, wanted, strict=True):
        assert a.dtype == dtype
        assert relative_error(a, b) < (1e-5 if dtype == torch.float32 else 0.03), name


@BACKEND
def test_group_norm_act_of_nothing(backend):
    need("group_norm_act", backend)
    for chosen in (backend, "auto"):
        x = torch.zeros(0, 8, 3, 3, requires_grad=True)
        y = ops.group_norm_act(x, 2, backend=chosen)
        y.sum().backward()
        assert y.shape == x.grad.shape == (0, 8, 3, 3)


@pytest.mark.parametrize("built", [True, False])
def test_group_norms_on_a_cpu_by_default(monkeypatch, built):
    """Without csrc they are left to torch, whose gradients are faster than the reference's; the
    numbers are the same."""
    monkeypatch.setattr(ops.dispatch, "_implementations", {})
    if not built:
        monkeypatch.setattr(ops.native, "status", lambda: {"cpu": (False, "it was not built")})
        monkeypatch.setattr(ops.native, "group_norm_act_forward", None)
    x = noisy((2, 12, 3, 5), torch.float32).requires_grad_()
    add = noisy((2, 12), torch.float32, 1).requires_grad_()
    results = []
    for backend in ("torch", "auto"):
        y = ops.group_norm_act(x, 4, add=add, backend=backend)
        assert y.is_contiguous(memory_format=torch.channels_last)
        results.append((y, *torch.autograd.grad((y ** 3).sum(), (x, add))))
    for a, b in zip(*results, strict=True):
        assert relative_error(a, b) < 1e-5


def test_a_second_derivative_is_refused():
    """The gradients are computed in the forward pass: what depends on them would be lost."""
    key, _, _, radius, lambda_t = draw((2, 3), torch.float32)
    o = torch.randn(2, 3, requires_grad=True)
    total, _, _ = ops.equivariance_loss(o, None, None, radius, lambda_t, key)
    with pytest.raises(RuntimeError, match="equivariance_loss has no second derivative"):
        torch.autograd.grad(total, o, create_graph=True)


def test_the_attack_asks_for_no_channel_sums(monkeypatch):
    """Where only x needs a gradient, nothing is computed for the parameters."""
    asked = []
    original = reference.group_norm_act_backward

    def spy(*args):
        asked.append(args[-1])
        return original(*args)

    monkeypatch.setattr(reference, "group_norm_act_backward", spy)
    x, w = torch.randn(2, 4, 3, 3, requires_grad=True), torch.ones(4)
    ops.group_norm_act(x, 2, w, w, backend="torch").sum().backward()
    ops.group_norm_act(x, 2, w.requires_grad_(), w, backend="torch").sum().backward()
    assert asked == [False, True]


@pytest.mark.parametrize("backend", ["torch", "cpp"])
@pytest.mark.parametrize("averages, copies, decay", [(True, True, 0.1), (False, False, 0.0)])
def test_adamw_ema_is_adamw(backend, averages, copies, decay):
    """Against torch's AdamW, a moving average and a cast, with a skipped step in between."""
    need("adamw_ema", backend)
    g = torch.Generator().manual_seed(0)
    shapes = [(7, 3, 3, 3), (5,), (1,), (33, 17)]
    params = [torch.randn(s, generator=g) for s in shapes]
    params[0] = params[0].contiguous(memory_format=torch.channels_last)
    theirs = [p.clone().requires_grad_() for p in params]
    optimizer = torch.optim.AdamW(theirs, lr=1e-2, weight_decay=decay, foreach=False)
    moments, squares = ([torch.zeros_like(p) for p in params] for _ in range(2))
    mine = [p.clone() for p in params] if averages else []
    halves = [p.bfloat16() for p in params] if copies else []
    expected = [p.clone() for p in params]
    for step, skip in enumerate((0, 0, 1, 0)):
        grads = [torch.randn(p.shape, generator=g).contiguous(
            memory_format=torch.channels_last if p.ndim == 4 else torch.contiguous_format)
            for p in params]
        for p, q in zip(theirs, grads, strict=True):
            p.grad = 0.5 * q
        if not skip:
            optimizer.step()
        taken = step + 1 - (step > 1)
        scalars = dict(lr=1e-2, step=taken, decay=0.7, factor=0.5, skip=skip)
        if skip:
            grads[0].fill_(float("nan"))
        ops.adamw_ema(
            params, grads, moments, squares, mine, halves, weight_decay=decay, backend=backend,
            **{k: torch.tensor(float(v)) for k, v in scalars.items()},
        )
        for e, p in zip(expected, theirs, strict=True):
            e.lerp_(p.detach(), 0.3)
    for p, q in zip(params, theirs, strict=True):
        assert relative_error(p, q) < 1e-6
    for a, e in zip(mine, expected, strict=averages):
        assert relative_error(a, e) < 1e-6
    for h, p in zip(halves, params, strict=copies):
        assert torch.equal(h, p.bfloat16())


# Properties.


@settings(max_examples=60)
@given(st.data())
def test_the_perturbation_never_leaves_the_ball(data):
    dtype = data.draw(st.sampled_from([*FLOATS, torch.float64]))
    backend = data.draw(st.sampled_from(usable("fgsm_project")))
    if dtype == torch.float64 or backend == "triton" and dtype == torch.bfloat16:
        backend = "torch"
    shape = data.draw(st.sampled_from([(3, 5), (2, 3, 3, 2), (4,)]))
    size = st.floats(0, 1e4, allow_subnormal=False)
    radius = torch.tensor(data.draw(st.lists(size, min_size=shape[0], max_size=shape[0])))
    wide = reference.wide(dtype)
    radius = radius.double().to(dtype).to(wide)
    key = torch.tensor([data.draw(st.integers(0, 2**32 - 1)), data.draw(st.integers(0, 2**32 - 1)),
                        data.draw(st.integers(0, 2**40))])
    xt, noise = torch.zeros(shape, dtype=dtype), torch.ones(shape[0], dtype=wide)
    bound = radius.view(-1, *[1] * (len(shape) - 1))
    for gradient in (None, torch.randn(shape)):
        x_adv, delta = ops.fgsm_project(xt, gradient, noise, radius, key, backend=backend)
        assert (delta.to(wide).abs() <= bound).all() and torch.equal(x_adv, delta)
    _, x_ran = ops.noise_perturb(xt, noise * 0, noise * 0, radius, key, backend=backend)
    assert not x_ran.any()


@BACKEND
@pytest.mark.parametrize("cut", [1, 2, 4])
def test_a_split_batch_is_the_whole(backend, cut):
    need("noise_perturb", backend)
    shape = (5, 3, 3, 3)
    key, signal, noise, radius, lambda_t = draw(shape, torch.float32)
    x0, o, o2 = (noisy(shape, torch.float32, n) for n in range(3))
    def run(rows, first):
        key = torch.tensor([7, 3, first])
        a, b, c, d = (v[rows] for v in (signal, noise, radius, lambda_t))
        xt, x_ran = ops.noise_perturb(x0[rows], a, b, c, key, backend=backend)
        x_adv, delta = ops.fgsm_project(xt, o[rows], b, c, key, backend=backend)
        _, fit, reg = ops.equivariance_loss(o[rows], o2[rows], delta, c, d, key, backend=backend)
        return xt, x_ran, x_adv, delta, fit, reg
    whole = run(slice(None), 0)
    parts = run(slice(0, cut), 0), run(slice(cut, None), cut)
    for value, *pieces in zip(whole, *parts, strict=True):
        assert torch.equal(value, torch.cat(pieces))


# torch.library and torch.compile.


def samples(dtype):
    shape = (2, 3, 4, 5)
    key, signal, noise, radius, lambda_t = draw(shape, dtype)
    x, o, o2 = (noisy(shape, dtype, n, sliced=False).requires_grad_() for n in range(3))
    vectors = [noisy((2, 3), dtype, n).contiguous().requires_grad_() for n in range(3)]
    weight, bias = (torch.ones(3, dtype=dtype, requires_grad=True) for _ in range(2))
    scalar = torch.tensor(0.5)
    weights = [torch.randn(3, 4), torch.randn(5)]
    like = [[torch.rand_like(p) for p in weights] for _ in range(4)]
    return {
        "noise_perturb": (x, signal, noise, radius, key, dtype, "auto"),
        "fgsm_project": (x, o.detach(), noise, radius, key, "auto"),
        "equivariance_loss": (o, o2, None, radius, lambda_t, key, dtype, False, False, "auto"),
        "group_norm_act": (x, weight, bias, *vectors, key, 3, True, 0.1, 0, 1e-5, "auto"),
        "adamw_ema": (weights, *like, [p.bfloat16() for p in weights],
                      *[scalar.clone() for _ in range(5)], 0.9, 0.99, 1e-8, 0.1, "auto"),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("op", ops.OPS)
def test_opcheck(op, dtype):
    """Schema, autograd registration, fake tensors and tracing, as torch itself checks them."""
    arguments = samples(dtype)[op]
    torch.library.opcheck(getattr(torch.ops.robustdm, op).default, arguments)


def test_gradients_in_float64():
    _, x0, o, o2 = (noisy((2, 3, 3, 2), torch.float64, n, sliced=False).requires_grad_()
                    for n in range(4))
    key, signal, noise, radius, lambda_t = draw((2, 3, 3, 2), torch.float64)
    check = torch.autograd.gradcheck
    assert check(lambda x: ops.noise_perturb(x, signal, noise, radius, key), (x0,))
    assert check(lambda x: ops.fgsm_project(x, o.detach(), noise, radius, key)[0], (x0,))
    for invariance in (False, True):
        assert check(lambda a, b, i=invariance: ops.equivariance_loss(
            a, b, None, radius, lambda_t, key, invariance=i)[0], (o, o2))
    vectors = [noisy((2, 3), torch.float64, n).contiguous().requires_grad_() for n in range(3)]
    weight, bias = (noisy((3,), torch.float64, n).requires_grad_() for n in (4, 5))
    assert check(lambda x, w, b, sc, sh, ad: ops.group_norm_act(
        x, 3, w, b, scale=sc, shift=sh, add=ad, dropout=0.3, key=key),
        (x0, weight, bias, *vectors))
    assert check(lambda x, ad: ops.group_norm_act(x, 1, add=ad, silu=False), (x0, vectors[0]))


def whole(x0, key):
    t, beta, signal, noise, radius, lambda_t = draw_samples(
        key, TABLES, x0.shape[0], x0.dtype, 0.03, 0.3, "x", 0.5, 2.0, None, False)
    xt, x_ran = ops.noise_perturb(x0, signal, noise, radius, key)
    x_adv, delta = ops.fgsm_project(xt, x_ran.sin(), noise, radius, key)
    y = ops.group_norm_act(x_adv, 3)
    return ops.equivariance_loss(xt * 2, y, delta, radius, lambda_t, key)[0]


def test_one_graph_holds_them_all():
    """fullgraph, and no second compilation for another step: the key is a tensor."""
    torch._dynamo.reset()
    compiled = torch.compile(whole, fullgraph=True, backend="aot_eager", dynamic=False)
    x0 = torch.randn(2, 3, 4, 4, requires_grad=True)
    for step in range(3):
        key = torch.tensor([1, step, 0])
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            a, b = whole(x0, key), compiled(x0, key)
        grads = (torch.autograd.grad(v, x0)[0] for v in (a, b))
        assert relative_error(a, b) < 1e-6 and relative_error(*grads) < 1e-5


# Bad input: one error that names the op, the argument and what to do.


def call(op, **changes):
    """The op on good arguments but for ``changes``."""
    shape = (2, 3, 4, 4)
    key, signal, noise, radius, lambda_t = draw(shape, torch.float32)
    x = torch.zeros(shape)
    good = {
        "noise_perturb": dict(x0=x, signal=signal, noise=noise, radius=radius, key=key),
        "fgsm_project": dict(xt=x, gradient=x, noise=noise, radius=radius, key=key),
        "equivariance_loss": dict(eps_pred=x, eps_pred_adv=x, delta=x, radius=radius,
                                  lambda_t=lambda_t, key=key),
        "group_norm_act": dict(x=x, groups=3),
        "adamw_ema": dict(
            params=[x], grads=[x.clone()], exp_avgs=[x.clone()], exp_avg_sqs=[x.clone()],
            averages=[], copies=[], lr=torch.tensor(0.1), step=torch.tensor(1.0),
            decay=torch.tensor(0.0), factor=torch.tensor(1.0), skip=torch.tensor(0.0)),
    }[op]
    return getattr(ops, op)(**good | changes)


@pytest.mark.parametrize("op", ops.OPS)
def test_the_good_arguments_are_good(op):
    call(op)


GAPS = [torch.zeros(4, 5)[:, :2]]
MIXED = [torch.zeros(2), torch.zeros(2).double()]
NAN = torch.tensor([0.1, float("nan")])
BAD = [
    ("noise_perturb", dict(x0=torch.zeros(2, 2, dtype=torch.int64)), r"x0 is torch.int64: give fl"),
    ("noise_perturb", dict(x0=torch.tensor(1.0)), "x0 has no dimension"),
    ("noise_perturb", dict(radius=torch.ones(3)), r"radius has shape \(3,\), x0 \(2, 3, 4, 4\)"),
    ("noise_perturb", dict(radius=-torch.ones(2)), "radius holds -1.0: it must be a number, 0 or"),
    ("noise_perturb", dict(radius=NAN), "radius holds nan"),
    ("noise_perturb", dict(key=torch.zeros(2).long()), r"key is torch.int64 of shape \(2,\)"),
    ("noise_perturb", dict(key=torch.zeros(3)), "key is torch.float32"),
    ("noise_perturb", dict(signal=torch.ones(2, device="meta")), "signal is on meta, x0 on cpu"),
    ("noise_perturb", dict(backend="cuda"), "backend is 'cuda': choose one of auto, torch, cpp"),
    ("fgsm_project", dict(gradient=torch.zeros(2, 3)), r"gradient has shape \(2, 3\), xt \(2"),
    ("fgsm_project", dict(gradient=torch.zeros(2, 3, 4, 4, device="meta")), "gradient is on meta"),
    ("equivariance_loss", dict(eps_pred_adv=torch.zeros(2, 3)), r"eps_pred_adv has shape \(2, 3\)"),
    ("equivariance_loss", dict(eps_pred_adv=torch.zeros(2, 3, 4, 4).half()), "is torch.float16"),
    ("equivariance_loss", dict(delta=torch.zeros(1, 3, 4, 4)), r"delta has shape \(1, 3, 4, 4\)"),
    ("equivariance_loss", dict(lambda_t=NAN), "lambda_t holds NaN"),
    ("group_norm_act", dict(groups=2), "groups is 2: it must divide the 3 channels"),
    ("group_norm_act", dict(weight=torch.ones(3)), "weight and bias go together"),
    ("group_norm_act", dict(weight=torch.ones(2), bias=torch.ones(2)), r"weight has shape \(2,\)"),
    ("group_norm_act", dict(add=torch.ones(2, 3, 1)), r"add has shape \(2, 3, 1\), x .*: give \("),
    ("group_norm_act", dict(dropout=1.0), "dropout is 1.0"),
    ("group_norm_act", dict(dropout=0.5), "dropout needs a key"),
    ("group_norm_act", dict(x=torch.ones(3)), r"x has shape \(3,\): give"),
    ("noise_perturb", dict(noise=torch.ones(2, requires_grad=True)), "noise requires a gradient"),
    ("noise_perturb", dict(dtype=torch.int32), "dtype is torch.int32: give torch.float32"),
    ("adamw_ema", {k: GAPS for k in ("params", "grads", "exp_avgs", "exp_avg_sqs")},
     r"params\[0\] has strides \(5, 1\) and shape \(4, 2\), with gaps"),
    ("adamw_ema", {k: MIXED for k in ("params", "grads", "exp_avgs", "exp_avg_sqs")},
     r"params\[1\] is torch.float64, params\[0\] torch.float32"),
    ("adamw_ema", dict(grads=[]), "grads has 0 tensors, params 1"),
    ("adamw_ema", dict(grads=[torch.zeros(2, 3)]), r"grads\[0\] has shape \(2, 3\), params\[0\]"),
    ("adamw_ema", dict(exp_avgs=[torch.zeros(2, 3, 4, 4).double()]), "is torch.float64: it must"),
    ("adamw_ema", dict(copies=[torch.zeros(2, 3, 4, 4)]), r"copies\[0\] is torch.float32: it must"),
    ("adamw_ema", dict(averages=[torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last)]),
     r"averages\[0\] has strides .*: make it with torch.empty_like"),
    ("adamw_ema", dict(lr=torch.ones(2)), r"lr is torch.float32 of shape \(2,\)"),
]


@pytest.mark.parametrize("op, changes, message", BAD)
def test_bad_input_is_refused(op, changes, message):
    with pytest.raises(UsageError, match=f"^{op}: .*{message}"):
        call(op, **changes)


def test_a_backend_that_is_off_says_why(monkeypatch):
    x = torch.zeros(2, 3, 4, 4, dtype=torch.float64)
    key, signal, noise, radius, _ = draw((2,), torch.float64)
    with pytest.raises(UsageError, match="'cpp', but float64 has the torch backend alone"):
        ops.noise_perturb(x, signal, noise, radius, key, backend="cpp")
    with pytest.raises(UsageError, match="'triton', which is off: there is no such kernel"):
        call("adamw_ema", backend="triton")
    monkeypatch.setattr(ops.dispatch, "_implementations", {})
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(UsageError, match="needs a CUDA device"):
        call("noise_perturb", backend="triton")
    monkeypatch.setattr(ops.native, "status", lambda: {"cpu": (False, "it was not built")})
    with pytest.raises(UsageError, match="which is off: it was not built; use backend="):
        call("noise_perturb", backend="cpp")
    assert ops.resolve("noise_perturb", "auto", CPU, torch.float32) == "torch"


def test_auto_takes_what_is_fast():
    for op in ops.OPS:
        expected = "cpp" if "cpp" in usable(op) else "torch"
        assert ops.resolve(op, "auto", CPU, torch.float32) == expected
        assert ops.resolve(op, "auto", CPU, torch.float64) == "torch"


# On a GPU.


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(128, 3, 32, 32), (8, 3, 256, 256), (3, 3, 77, 5)])
def test_large_batches_repeat_to_the_bit_on_a_gpu(dtype, shape):
    device = torch.device("cuda")
    key, signal, noise, radius, lambda_t = draw(shape, dtype, device=device)
    x0, o, o2 = (noisy(shape, dtype, n, device) for n in range(3))

    def run(backend, convert=lambda v: v):
        a, b, c, d, x, p, q = map(convert, (signal, noise, radius, lambda_t, x0, o, o2))
        xt, x_ran = ops.noise_perturb(x, a, b, c, key, backend=backend)
        x_adv, delta = ops.fgsm_project(xt, p, b, c, key, backend=backend)
        loss = ops.equivariance_loss(p, q, delta, c, d, key, backend=backend)
        return xt, x_ran, x_adv, delta, *loss

    first, again, torch_way = run("triton"), run("triton"), run("torch")
    for a, b, c in zip(first, again, torch_way, strict=True):
        assert torch.equal(a, b) and relative_error(a, c) < 2 * TOLERANCE[dtype]
    exact = run("torch", lambda v: v.double())
    assert torch.equal(first[3], torch_way[3])
    for a, b in zip(first, exact, strict=True):
        assert relative_error(a, b) < 2 * TOLERANCE[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [
    (16, 128, 32, 32), (16, 384, 32, 32), (16, 512, 8, 8), (16, 256, 4, 4), (1, 128, 256, 256),
    (1, 1024, 16, 16), (2, 768, 32, 32), (1, 96, 128, 128),
])
def test_group_norms_of_real_networks_on_a_gpu(dtype, shape):
    device, key = torch.device("cuda"), torch.tensor([1, 2, 3], device="cuda")
    batch, channels = shape[:2]
    x = noisy(shape, dtype, 0, device, sliced=False)
    vectors = {n: noisy((batch, channels), dtype, i, device) for i, n in
               enumerate(("scale", "shift", "add"), 1)}
    weight, bias = (noisy((channels,), torch.float32, i, device) for i in (5, 6))

    def run(backend, convert):
        inputs = [convert(v).requires_grad_() for v in (x, weight, bias, *vectors.values())]
        named = dict(zip(("weight", "bias", *vectors), inputs[1:], strict=True))
        y = ops.group_norm_act(inputs[0], 32, **named, dropout=0.1, key=key, backend=backend)
        cotangent = convert(noisy(shape, dtype, 9, device, sliced=False))
        return y, *torch.autograd.grad(y, inputs, cotangent)

    first, again = (run("triton", lambda v: v.detach().clone()) for _ in range(2))
    exact = run("torch", lambda v: v.detach().double())
    for number, (a, b, c) in enumerate(zip(first, again, exact, strict=True)):
        assert torch.equal(a, b)
        bound = TOLERANCE[dtype] if number == 0 else 10 * TOLERANCE[dtype]
        assert relative_error(a, c) < bound, number


@pytest.mark.gpu
def test_inductor_on_a_gpu():
    compiled = torch.compile(whole, fullgraph=True, dynamic=False)
    global TABLES
    tables, TABLES = TABLES, TABLES.cuda()
    try:
        x0 = torch.randn(2, 3, 16, 16, device="cuda", requires_grad=True)
        key = torch.tensor([1, 2, 0], device="cuda")
        a, b = whole(x0, key), compiled(x0, key)
        assert relative_error(a, b) < 1e-5
        (g,), (h,) = torch.autograd.grad(a, x0), torch.autograd.grad(b, x0)
        assert relative_error(g, h) < 1e-5
    finally:
        TABLES = tables


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements_on_a_gpu():
    shape = (2**16 + 1, 3, 105, 105)  # 2.17e9
    key, signal, noise, radius, _ = draw(shape, torch.bfloat16, device=torch.device("cuda"))
    x0 = torch.zeros(shape, dtype=torch.bfloat16, device="cuda")
    xt, _ = ops.noise_perturb(x0, signal, noise, radius, key)
    tail = torch.tensor([7, 3, shape[0] - 2], device="cuda")
    part, _ = ops.noise_perturb(x0[-2:], signal[-2:], noise[-2:], radius[-2:], tail)
    assert torch.equal(xt[-2:], part)


@pytest.mark.gpu
@pytest.mark.slow
def test_compute_sanitizer():
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        pytest.skip("compute-sanitizer is not installed")
    code = ("import torch; from robustdm import doctor; "
            "assert all(c['passed'] for c in doctor.self_check())")
    done = subprocess.run([tool, "--error-exitcode", "9", sys.executable, "-c", code],
                          capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 0, done.stdout[-2000:]
