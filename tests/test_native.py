"""The C++ backend against the reference, and how its libraries are built, found and refused."""

import ctypes
import math
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest
import torch

from robustdm.ops import native, reference, stream
from tests import group_norm

ROOT = Path(__file__).parent.parent
AVAILABLE, REASON = native.status()["cpu"]
needs_library = pytest.mark.skipif(not AVAILABLE, reason=f"csrc: {REASON}")
VARIANTS = native.LEVELS[: native.LEVELS.index(native.level()) + 1] if AVAILABLE else ("base",)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [
    (2, 3, 16, 17), (3, 3, 7, 5), (5,), (4, 3), (2, 1, 1, 1), (0, 3, 4, 4), (2, 3, 2, 3, 2),
    (1, 6, 9, 9), (9, 4, 2, 2), (7, 2, 5), (2, 200, 3, 1), (70, 1, 8, 8), (1,), (2, 800),
]
KEY = torch.tensor([2**32 - 5, 2**31 + 3, 11])


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Memory that an op forgets to write is NaN."""
    empty, empty_like = torch.empty, torch.empty_like

    def fill(x):
        return x.fill_(math.nan if x.is_floating_point() else -1)

    monkeypatch.setattr(torch, "empty", lambda *a, **k: fill(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: fill(empty_like(*a, **k)))


@pytest.fixture(params=VARIANTS)
def variant(request, monkeypatch):
    monkeypatch.setattr(native, "level", lambda: request.param)
    return request.param


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def laid_out(x, last):
    """The same values in channels-last memory, where there is such a thing."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.contiguous(memory_format=formats[x.ndim]) if last and x.ndim in formats else x


def batch(shape, dtype=torch.float32, last=False, count=1):
    return [laid_out(normal(*shape, dtype=dtype, seed=i), last) for i in range(count)]


def per_sample(count, dtype=torch.float32):
    """signal, noise, radius, lambda; the radius holds values of the dtype."""
    signal, noise, radius, lam = torch.rand(4, count, generator=torch.Generator().manual_seed(9))
    return signal, noise + 0.1, (radius * 0.5).to(dtype).float(), 3 * lam


def relative(got, wanted):
    got, wanted = got.double(), wanted.double()
    return float((got - wanted).norm() / wanted.norm().clamp(min=1e-30)) if got.numel() else 0.0


def assert_same(got, wanted):
    assert got.dtype == wanted.dtype and got.shape == wanted.shape
    assert torch.equal(got.isnan(), wanted.isnan())
    assert torch.equal(got.nan_to_num(), wanted.nan_to_num())


everywhere = pytest.mark.parametrize(
    "shape, dtype, last", [(s, d, last) for s in SHAPES for d in DTYPES for last in (False, True)]
)


# Perturbation.


@needs_library
@everywhere
def test_noise_perturb(shape, dtype, last):
    (x0,) = batch(shape, dtype, last)
    signal, noise, radius, _ = per_sample(shape[0], dtype)
    got = native.noise_perturb(x0, signal, noise, radius, KEY, dtype)
    wanted = reference.noise_perturb(x0, signal, noise, radius, KEY, dtype)
    exact = reference.noise_perturb(
        x0.double(), signal.double(), noise.double(), radius.double(), KEY, torch.float64
    )
    for a, b, c in zip(got, wanted, exact, strict=True):
        assert a.dtype == dtype and a.shape == x0.shape and a.stride() == x0.stride()
        if dtype == torch.float32:
            assert relative(a, c) < 1e-6
        elif a.numel():
            # One unit of the larger of what was added: eps differs by a few ulp of float32.
            bound = torch.finfo(dtype).eps * torch.maximum(wanted[0].abs(), b.abs()).float()
            assert ((a.float() - b.float()).abs() <= bound).all()
            assert (a != b).float().mean() < 0.02


@needs_library
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_eps_and_delta_are_those_of_the_stream(shape, last, variant):
    (x0,) = batch(shape, last=last)
    zero, one = torch.zeros(shape[0]), torch.ones(shape[0])
    eps, unit = stream.element_noise(KEY, shape)
    got, _ = native.noise_perturb(x0, zero, one, zero, KEY, torch.float32)
    assert not got.numel() or (got - eps).abs().max() <= 2e-6
    # x_t = 0, so x_ran is delta_ran itself.
    radius = per_sample(shape[0])[2]
    _, got = native.noise_perturb(laid_out(torch.zeros(shape), last), zero, zero, radius, KEY,
                                  torch.float32)
    assert (got == 0).all()
    _, got = native.fgsm_project(torch.zeros_like(x0), torch.zeros_like(x0), one, radius, KEY)
    assert_same(got, reference._per_sample(radius, x0) * unit)


HEADER = """
#include "philox.h"
extern "C" void normals(const uint32_t* w0, const uint32_t* w1, int n, float* cosine, float* sine) {
  for (int i = 0; i < n; ++i) normal_pair(w0[i], w1[i], cosine + i, sine + i);
}
"""


def test_normals_of_the_header_at_the_edges_and_in_general(tmp_path):
    compiler = shutil.which("g++") or shutil.which("clang++")
    if not compiler:
        pytest.skip("no C++ compiler")
    subprocess.run(
        [compiler, "-O1", "-shared", "-fPIC", "-ffp-contract=off", f"-I{ROOT / 'csrc'}", "-x",
         "c++", "-", "-o", tmp_path / "philox.so"], input=HEADER, text=True, check=True,
    )
    library = ctypes.CDLL(str(tmp_path / "philox.so"))
    edge = torch.tensor([0, 1, 2, 2**29, 2**30 - 1, 2**30, 2**31, 3 * 2**30, 2**32 - 129,
                         2**32 - 128, 2**32 - 1])
    w0, w1, _, _ = stream.philox(1, 2, torch.arange(100_000), 0)
    w0 = torch.cat((edge.repeat(len(edge)), w0))
    w1 = torch.cat((edge.repeat_interleave(len(edge)), w1))
    got = torch.zeros(2, len(w0))
    kept = [w.to(torch.uint32) for w in (w0, w1)]
    addresses = [ctypes.c_void_p(w.data_ptr()) for w in kept]
    library.normals(*addresses, len(w0), *(ctypes.c_void_p(z.data_ptr()) for z in got))
    # The inputs are rounded to float32 as everywhere; log, sine and cosine are then exact.
    u = (w0.float() * 2.0**-32).clamp(min=2.0**-33).double()
    angle = ((w1.float() * 2.0**-32) * (2 * math.pi)).double()
    length = (-2 * u.log()).sqrt()
    assert got.isfinite().all() and got.abs().max() < 6.8
    for z, wave in zip(got, (angle.cos(), angle.sin()), strict=True):
        error = (z.double() - length * wave).abs()
        assert (error <= 2.4e-7 * length).all()
        assert (error / length.clamp(min=1e-9)).square().mean().sqrt() < 5e-8


@needs_library
def test_every_instruction_set_gives_the_same_bits(monkeypatch):
    x0, gradient, o, adv = batch((3, 3, 17, 9), torch.bfloat16, count=4)
    signal, noise, radius, lam = per_sample(3, torch.bfloat16)
    results = []
    for name in VARIANTS:
        monkeypatch.setattr(native, "level", lambda name=name: name)
        results.append((
            *native.noise_perturb(x0, signal, noise, radius, KEY, torch.float32),
            *native.fgsm_project(x0, gradient, noise, radius, KEY),
            *native.equivariance_loss(o, adv, None, radius, lam, KEY, torch.float16, False, False),
        ))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_same(a, b)


@needs_library
@pytest.mark.parametrize("other", [torch.float16, torch.float64])
def test_dtypes_may_be_mixed(other):
    x0, gradient, delta = batch((2, 3, 5, 5), other, count=3)
    o, adv = batch((2, 3, 5, 5), torch.bfloat16, count=2)
    signal, noise, radius, lam = per_sample(2, torch.bfloat16)

    def run(convert):
        x, g, d = (convert(v) for v in (x0, gradient, delta))
        return (
            *native.noise_perturb(x, signal, noise, radius, KEY, torch.bfloat16),
            *native.fgsm_project(o, g, noise, radius, KEY),
            *native.equivariance_loss(o, adv, d, radius, lam, KEY, o.dtype, False, False),
        )

    for a, b in zip(run(lambda v: v), run(torch.Tensor.float), strict=True):
        assert_same(a, b)


@needs_library
@pytest.mark.parametrize("first", [0, 2**31 - 2, 2**33 + 1])
@pytest.mark.parametrize("last", [False, True])
def test_a_split_batch_is_the_whole_batch(first, last):
    x0, gradient = batch((5, 3, 7, 11), last=last, count=2)
    signal, noise, radius, lam = per_sample(5)

    def run(rows):
        key = torch.tensor([3, 4, first + rows.start])
        x, g, s, n, r, la = (v[rows] for v in (x0, gradient, signal, noise, radius, lam))
        loss = native.equivariance_loss(x, g, None, r, la, key, x.dtype, False, False)
        return (*native.noise_perturb(x, s, n, r, key, x.dtype),
                *native.fgsm_project(x, g, n, r, key), *loss[1:3])

    whole, *parts = (run(slice(a, b)) for a, b in ((0, 5), (0, 1), (1, 4), (4, 5)))
    for a, *b in zip(whole, *parts, strict=True):
        assert_same(a, torch.cat(b))
    key = torch.tensor([3, 4, first])
    assert_same(whole[3], reference.fgsm_project(x0, gradient, noise, radius, key)[1])


# Projection.


@needs_library
@everywhere
def test_fgsm_project_is_the_reference_bit_for_bit(shape, dtype, last):
    xt, gradient = batch(shape, dtype, last, count=2)
    gradient[gradient.abs() < 0.2] = 0
    _, noise, radius, _ = per_sample(shape[0], dtype)
    for g in (gradient, gradient.float(), None):
        got = native.fgsm_project(xt, g, noise, radius, KEY)
        wanted = reference.fgsm_project(xt, g, noise, radius, KEY)
        for a, b in zip(got, wanted, strict=True):
            assert_same(a, b)
            assert a.stride() == xt.stride()
        if xt.numel():
            excess = got[1].float().abs() - reference._per_sample(radius, xt)
            assert excess.max() <= 0


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nan_gradient_gives_a_nan_delta_there_and_nowhere_else(dtype, variant):
    xt, gradient = batch((2, 3, 5, 7), dtype, count=2)
    gradient[0, 1, 2, 3], gradient[1, 2, 4, 6], gradient[1, 0, 0, 0] = math.nan, -math.nan, math.inf
    _, noise, radius, _ = per_sample(2, dtype)
    x_adv, delta = native.fgsm_project(xt, gradient, noise, radius, KEY)
    assert torch.equal(delta.isnan(), gradient.isnan())
    assert torch.equal(x_adv.isnan(), gradient.isnan())
    other = ~gradient.isnan()
    _, wanted = reference.fgsm_project(xt, gradient.nan_to_num(), noise, radius, KEY)
    assert_same(delta[other], wanted[other])


@needs_library
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_conversions_of_every_half_and_of_the_edges(dtype, variant):
    """Stores round as torch does, at ties, overflow, subnormals and NaN; loads are exact."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    values = every.float()
    between = (values[1:].double() + values[:-1].double()) / 2
    odd_nan = torch.tensor([2**31 - 1, -1], dtype=torch.int32).view(torch.float32)
    edges = torch.tensor([65519.9, 65520, 3.4e38, 1e-45])
    values = torch.cat((values, between.float(), edges, odd_nan))
    one, zero = torch.ones(1), torch.zeros(1)
    got, _ = native.noise_perturb(values[None], one, zero, zero, KEY, dtype)
    assert_same(got[0], (values + 0.0).to(dtype))
    back, _ = native.noise_perturb(every[None], one, zero, zero, KEY, torch.float32)
    assert_same(back[0], every.float() + 0.0)


@needs_library
def test_an_error_of_the_library_is_an_exception(monkeypatch):
    monkeypatch.setattr(native, "_function", lambda name, variant: lambda *arguments: 1)
    one = torch.ones(1)
    with pytest.raises(RuntimeError, match="noise_perturb: out of memory"):
        native.noise_perturb(one, one, one, one, KEY, torch.float32)


# The loss.


@needs_library
@everywhere
def test_equivariance_loss(shape, dtype, last):
    o, adv, delta = batch(shape, dtype, last, count=3)
    _, _, radius, lam = per_sample(shape[0], dtype)
    cases = [
        (None, None, False, False), (adv, delta, False, False), (adv, delta, False, True),
        (adv, None, False, False), (adv, None, True, False), (adv, delta, True, True),
    ]
    for a, d, invariance, detach in cases:
        got = native.equivariance_loss(o, a, d, radius, lam, KEY, dtype, invariance, detach)
        start = reference._per_sample(radius, o) * stream.element_noise(KEY, shape)[1]
        wide_delta = (start.to(dtype) if d is None else d).double()
        wanted = reference.equivariance_loss(
            o.double(), None if a is None else a.double(), wide_delta, radius.double(),
            lam.double(), KEY, torch.float64, invariance, detach,
        )
        stored = torch.float32 if dtype == torch.float16 else dtype
        assert [x.dtype for x in got] == [torch.float32] * 3 + [stored] * 2
        for value, exact in zip(got[:3], wanted[:3], strict=True):
            assert value.shape == exact.shape
            assert relative(value.nan_to_num(), exact.nan_to_num()) < 1e-6
            assert torch.equal(value.isnan(), exact.isnan())
        bound = 1e-6 if stored == torch.float32 else 4e-3
        for value, exact in zip(got[3:], wanted[3:], strict=True):
            assert value.shape == exact.shape
            assert relative(value, exact) < bound
        assert got[3].stride() == o.stride()
        if a is not None:
            assert got[4].stride() == o.stride()


@needs_library
def test_loss_of_mixed_dtypes_and_of_values_that_are_not_finite(variant):
    o, adv, delta = batch((2, 3, 5, 7), torch.float32, count=3)
    _, _, radius, lam = per_sample(2)
    arguments = (radius, lam, KEY, torch.float32, False)
    half = native.equivariance_loss(o, adv, delta.bfloat16(), *arguments, False)
    wide = native.equivariance_loss(o, adv, delta.bfloat16().float(), *arguments, False)
    for a, b in zip(half, wide, strict=True):
        assert_same(a, b)
    adv[0, 0, 0, 0] = math.inf
    total, fit, reg, grad, _ = native.equivariance_loss(o, adv, delta, *arguments, True)
    assert total.isinf() and reg[0].isinf() and fit.isfinite().all() and reg[1].isfinite()
    assert grad.isfinite().all()  # detached: what is wrong with adv does not reach it


@needs_library
def test_sums_are_accurate_over_many_blocks():
    o = normal(1, 3, 100, 101)
    lam = torch.ones(1)
    got = native.equivariance_loss(o, None, None, lam, lam, KEY, o.dtype, False, False)
    wanted = reference.equivariance_loss(
        o.double(), None, None, lam.double(), lam.double(), KEY, torch.float64, False, False
    )
    assert abs(float(got[0]) / float(wanted[0]) - 1) < 2e-7


# Group normalisation.

BIG = [((2, 40, 33, 50), 4, group_norm.ALL), ((1, 96, 40, 40), 32, ("affine", "silu")),
       ((1, 300, 16, 17), 3, ("affine", "add", "dropout")), ((3, 7, 9, 70), 1, ("silu",)),
       ((2, 12), 4, group_norm.ALL)]


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, groups, features", group_norm.CASES + BIG)
def test_group_norm_act(variant, shape, groups, features, dtype):
    """Against the float64 oracle; in slabs, in stretches of several positions, and odd ones."""
    parameters = torch.float32 if groups % 2 else dtype
    tensors, options = group_norm.arguments(shape, features, dtype, parameters)
    dy = group_norm.images(shape, dtype, 4)
    wanted_y, wanted = group_norm.oracle(tensors, options, groups, dy)
    y, *saved = group_norm.forward(native, tensors, options, groups)
    _, mean, rstd = saved
    dx, sums = group_norm.backward(native, tensors, options, groups, saved, dy)
    forward, backward = {
        torch.float32: (1e-6, 1e-5), torch.bfloat16: (2**-8, 2**-7), torch.float16: (2**-11, 2**-10)
    }[dtype]
    assert y.dtype == dx.dtype == dtype and y.stride() == dx.stride() == tensors["x"].stride()
    assert mean.dtype == rstd.dtype == sums.dtype == torch.float32
    assert group_norm.error(y, wanted_y) < forward
    # With one value per group, and for the sum of dx with one channel, all but rounding cancels.
    scale = rstd.max() if math.prod(shape[1:]) == groups else wanted["x"].norm()
    assert group_norm.error(dx, wanted["x"], scale) < backward
    for name, got in group_norm.gradients(tensors, sums).items():
        if name in wanted:
            assert group_norm.error(got, wanted[name], scale) < backward, name
    alone, none = group_norm.backward(
        native, tensors, options, groups, saved, dy, need_sums=False)
    assert none.numel() == 0 and torch.equal(alone, dx)


@needs_library
@pytest.mark.parametrize("first", [0, 2**33 + 5])
@pytest.mark.parametrize("shape", [(3, 12, 4, 5), (3, 130, 40, 41), (2, 64, 8, 8)])
def test_group_norm_act_drops_what_the_reference_drops(variant, shape, first):
    tensors, options = group_norm.arguments(shape, ("affine", "dropout"), torch.float32)
    options |= {"layer": 70, "dropout": 0.4, "key": torch.tensor([2**32 - 1, 9, first])}
    y, *saved = group_norm.forward(native, tensors, options, 2)
    mask = stream.dropout_mask(options["key"], shape, 70, 0.4)
    assert torch.equal(y != 0, mask)
    options["key"] = options["key"] + torch.tensor([0, 0, 1])
    tensors["x"] = tensors["x"][1:]
    assert torch.equal(group_norm.forward(native, tensors, options, 2)[0], y[1:])


@needs_library
def test_group_norm_act_of_a_large_mean(variant):
    """An error of 3e-5 is that of a mean of 1000 in float32; a naive variance loses everything."""
    shape = (2, 12, 25, 30)
    tensors, options = group_norm.arguments(shape, ("affine", "silu"), torch.float32)
    tensors["x"] += 1000
    dy = group_norm.images(shape, torch.float32, 4)
    wanted_y, wanted = group_norm.oracle(tensors, options, 3, dy)
    y, *saved = group_norm.forward(native, tensors, options, 3)
    dx, _ = group_norm.backward(native, tensors, options, 3, saved, dy)
    assert group_norm.error(y, wanted_y) < 1e-4 and group_norm.error(dx, wanted["x"]) < 3e-4


@needs_library
def test_group_norm_act_of_extreme_values(variant):
    tensors, options = group_norm.arguments((2, 24, 3, 3), ("affine", "silu"), torch.float32)
    clean = group_norm.forward(native, tensors, options, 6)[0]
    tensors["x"][0, 5, 1, 1] = torch.nan
    y = group_norm.forward(native, tensors, options, 6)[0]
    assert torch.isnan(y[0, 4:8]).all() and torch.equal(y[1], clean[1])
    assert torch.equal(y[0, 8:], clean[0, 8:]) and torch.equal(y[0, :4], clean[0, :4])
    # Activations from far left to far right of zero.
    tensors["x"] = torch.linspace(-300, 300, 24 * 50).view(1, 50, 24).movedim(-1, 1)
    tensors["weight"], tensors["bias"] = torch.full((24,), 100.0), torch.zeros(24)
    y = group_norm.forward(native, tensors, options, 1)[0]
    wanted = group_norm.oracle(tensors, options, 1)[0]
    assert torch.isfinite(y).all() and group_norm.error(y, wanted) < 1e-6
    u = group_norm.oracle(tensors, options | {"silu": False}, 1)[0]
    left = (u < -5) & (u > -80)  # where the activation is tiny, and e^u normal
    assert left.any() and ((y[left] - wanted[left]).abs() <= 1e-4 * wanted[left].abs()).all()


@needs_library
@pytest.mark.parametrize("shape", [(0, 8, 3, 3), (2, 8, 0, 3)])
def test_group_norm_act_of_nothing(shape):
    tensors, options = group_norm.arguments(shape, group_norm.ALL, torch.float32)
    y, *saved = group_norm.forward(native, tensors, options, 2)
    dx, _ = group_norm.backward(native, tensors, options, 2, saved, tensors["x"])
    assert y.shape == dx.shape == shape


# Threads.


@needs_library
@pytest.mark.parametrize("op", [
    "noise_perturb", "fgsm_project", "equivariance_loss", "group_norm_act", "adamw_ema",
])
def test_the_number_of_threads_changes_no_bit(op, monkeypatch):
    monkeypatch.setattr(native, "SERIAL", 0)
    x, y, z = batch((2, 3, 31, 33), count=3)
    signal, noise, radius, lam = per_sample(2)

    def run(threads):
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        if op == "noise_perturb":
            return native.noise_perturb(x, signal, noise, radius, KEY, torch.float32)
        if op == "fgsm_project":
            return native.fgsm_project(x, y, noise, radius, KEY)
        if op == "equivariance_loss":
            return native.equivariance_loss(x, y, z, radius, lam, KEY, x.dtype, False, False)
        if op == "group_norm_act":
            shape = (3, 128, 25, 40)
            tensors, options = group_norm.arguments(shape, group_norm.ALL, torch.float32)
            out, *saved = group_norm.forward(native, tensors, options, 8)
            dy = group_norm.images(shape, torch.float32, 4)
            return [out, *saved, *group_norm.backward(native, tensors, options, 8, saved, dy)]
        state = optimizer_state([(40_000,), (3,), (20_000,)])
        native.adamw_ema(*state.values(), *scalars(), *OPTIONS)
        return sum(state.values(), [])

    for a, b in zip(run(1), run(2), strict=True):
        assert_same(a, b)


@needs_library
def test_work_goes_to_the_threads_of_torch(monkeypatch):
    """The runtime is called with torch's number of threads, above a size, and does all the work."""
    asked = []
    body = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    def runtime(function, data, threads, flags):
        asked.append(threads)
        team = [threading.Thread(target=body(function), args=(data,)) for _ in range(threads)]
        for thread in team:
            thread.start()
        for thread in team:
            thread.join()

    address = ctypes.cast(runtime, ctypes.c_void_p).value
    assert native._runtime(), "torch's own OpenMP was not found"
    monkeypatch.setattr(native, "_runtime", lambda: address)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    signal, noise, radius, _ = per_sample(1)
    for size, wanted in ((native.SERIAL, []), (native.SERIAL + 1, [3])):
        (x,) = batch((1, size))
        got = native.noise_perturb(x, signal, noise, radius, KEY, torch.float32)[1]
        assert asked == wanted and not got.isnan().any()


# The optimizer.

OPTIONS = (0.9, 0.999, 1e-8, 0.01)  # beta1, beta2, tiny, weight decay


def optimizer_state(shapes, averages=True, copies=True, offset=0):
    def tensors(seed):
        flat = [normal(math.prod(s) + offset, seed=seed + 10 * i) for i, s in enumerate(shapes)]
        return [x[offset:].view(s) for x, s in zip(flat, shapes, strict=True)]

    p, g, m, v, a = (tensors(seed) for seed in range(5))
    return {
        "params": p, "grads": g, "exp_avgs": m, "exp_avg_sqs": [x.square_() for x in v],
        "averages": a if averages else [],
        "copies": [x.bfloat16() for x in p] if copies else [],
    }


def scalars(lr=1e-2, step=1, decay=0.9, factor=0.7, skip=0, dtype=torch.float32):
    return [torch.tensor(x, dtype=torch.float32).to(dtype) for x in (lr, step, decay, factor, skip)]


@needs_library
@pytest.mark.parametrize("averages, copies", [(True, True), (True, False), (False, True),
                                              (False, False)])
@pytest.mark.parametrize("offset", [0, 1])
def test_adamw_ema(averages, copies, offset, variant):
    shapes = [(3, 5, 3), (1,), (0,), (257,), (16_385,), (2, 64)]
    state = optimizer_state(shapes, averages, copies, offset)
    exact = {name: [x.double() for x in tensors] for name, tensors in state.items()}
    for step in (1, 2, 3, 1000):
        change = dict(lr=0.5, step=step, decay=0.9 if step < 3 else 0.3, skip=float(step == 2))
        native.adamw_ema(*state.values(), *scalars(**change), *OPTIONS)
        reference.adamw_ema(*exact.values(), *scalars(**change, dtype=torch.float64), *OPTIONS)
        for name in ("params", "exp_avgs", "exp_avg_sqs", "averages"):
            for a, b in zip(state[name], exact[name], strict=True):
                assert relative(a, b) < 1e-6, (name, step)
        for copy, p in zip(state["copies"], state["params"], strict=False):
            assert_same(copy, p.bfloat16())


@needs_library
def test_a_skipped_step_changes_nothing_but_average_and_copy():
    state = optimizer_state([(100,), (7,)])
    state["grads"][0][3] = math.nan
    before = {name: [x.clone() for x in tensors] for name, tensors in state.items()}
    native.adamw_ema(*state.values(), *scalars(factor=math.nan, skip=1), *OPTIONS)
    for name in ("params", "grads", "exp_avgs", "exp_avg_sqs"):
        for a, b in zip(state[name], before[name], strict=True):
            assert_same(a, b)
    for average, old, p in zip(state["averages"], before["averages"], state["params"], strict=True):
        assert relative(average, old.lerp(p, 0.1)) < 1e-6


@needs_library
def test_adamw_ema_of_channels_last_weights_and_of_none():
    state = optimizer_state([(4, 3, 2, 5)])
    wanted = optimizer_state([(4, 3, 2, 5)])
    state = {name: [laid_out(x, True) for x in tensors] for name, tensors in state.items()}
    native.adamw_ema(*state.values(), *scalars(), *OPTIONS)
    native.adamw_ema(*wanted.values(), *scalars(), *OPTIONS)
    for a, b in zip(sum(state.values(), []), sum(wanted.values(), []), strict=True):
        assert_same(a, b)
    native.adamw_ema([], [], [], [], [], [], *scalars(), *OPTIONS)


# The build.


@pytest.fixture
def tree(tmp_path):
    """A copy of what setup.py needs, without built libraries."""
    ignore = shutil.ignore_patterns("_native", "__pycache__", "*.egg-info")
    for name in ("robustdm", "kernels", "csrc"):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def setup(tree, *arguments, **environment):
    # No nvcc: PATH holds nothing but what a test puts there.
    clean = {"PATH": str(tree / "bin"), "CUDA_HOME": "/nowhere", "CXX": "", **environment}
    done = subprocess.run(
        [sys.executable, "setup.py", *arguments], cwd=tree, text=True, capture_output=True,
        env={**os.environ, **clean},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [line for line in done.stdout.splitlines() if line.startswith("robustdm: ")]


def compiler(tree, script):
    """A compiler that runs a shell script, with the file to write as $out."""
    path = tree / "fake-compiler"
    loop = 'while [ $# -gt 0 ]; do [ "$1" = -o ] && out=$2; all="$all $1"; shift; done'
    path.write_text(f"#!/bin/sh\n{loop}\n{script}\n")
    path.chmod(0o755)
    return str(path)


def native_files(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))


def test_without_compilers_the_install_succeeds_and_says_why(tree):
    lines = setup(tree, "build_ext", "--inplace")
    folder = tree / "robustdm" / "_native"
    assert native_files(folder) == ["cpu.txt", "cuda.txt"]
    reasons = ["no C++ compiler: neither g++ nor clang++ is on PATH, and CXX is not set",
               "no nvcc on PATH or under CUDA_HOME"]
    assert lines == [f"robustdm: the {name} library is off: {reason}"
                     for name, reason in zip(("cpu", "cuda"), reasons, strict=True)]
    assert [native._open(name, folder) for name in ("cpu", "cuda")] == [(None, r) for r in reasons]


def test_a_compiler_that_fails_is_named_and_leaves_nothing_behind(tree, monkeypatch):
    broken = compiler(tree, 'echo half > "$out"; case $out in *.so) echo x.o: error: bad >&2; '
                      "exit 3;; esac")
    folder = tree / "robustdm" / "_native"
    folder.mkdir()
    (folder / "librobustdm_cpu.so").write_text("an older library")
    os.utime(folder / "librobustdm_cpu.so", (1, 1))
    (line, _) = setup(tree, "build_ext", "--inplace", CXX=broken)
    assert native_files(folder) == ["cpu.txt", "cuda.txt"]
    assert line.endswith(f"{broken} failed with exit code 3: x.o: error: bad")
    monkeypatch.setattr(native, "FOLDER", folder)
    assert native.status()["cpu"] == (False, f"{broken} failed with exit code 3: x.o: error: bad")
    with pytest.raises(RuntimeError, match="exit code 3"):
        native._library("cpu")


@pytest.mark.parametrize("name", ["/bin/false", "/nowhere/g++"])
def test_build_with_a_useless_compiler(tree, name):
    lines = setup(tree, "build", CXX=name)
    assert len(lines) == 2 and f"{name}" in lines[0]
    (folder,) = (tree / "build").rglob("_native")
    assert native_files(folder) == ["cpu.txt", "cuda.txt"]


def test_libraries_are_rebuilt_when_sources_are_newer_and_packed_into_the_wheel(tree):
    good = compiler(tree, f'echo built > "$out"; echo "$all" >> {tree}/calls')

    def build(*arguments):
        (tree / "calls").write_text("")
        setup(tree, *arguments, CXX=good)
        return (tree / "calls").read_text().splitlines()

    library = tree / "robustdm" / "_native" / "librobustdm_cpu.so"
    assert any("-shared" in call for call in build("build_ext", "--inplace"))
    assert library.exists() and build("build_ext", "--inplace") == []
    later = library.stat().st_mtime + 5
    os.utime(tree / "csrc" / "philox.h", (later, later))
    assert build("build_ext", "--inplace") != []
    build("-q", "bdist_wheel")
    (wheel,) = (tree / "dist").glob("*.whl")
    assert "none-any" not in wheel.name
    packed = [n for n in zipfile.ZipFile(wheel).namelist() if "_native/" in n]
    assert sorted(packed) == ["robustdm/_native/cuda.txt", "robustdm/_native/librobustdm_cpu.so"]


def test_libraries_of_other_sources_or_that_do_not_load_are_refused(tmp_path):
    assert native._open("cpu", tmp_path) == (None, "not built: run pip install")
    library = tmp_path / "other" / "librobustdm_cpu.so"
    library.parent.mkdir()
    library.write_text("nonsense")
    found, reason = native._open("cpu", library.parent)
    assert found is None and reason.startswith("cannot be loaded: ")
    compiler = shutil.which("g++") or shutil.which("clang++")
    if not compiler:
        pytest.skip("no C++ compiler")
    library = tmp_path / "librobustdm_cuda.so"
    source = 'extern "C" int abi_cuda() { return -1; }'
    subprocess.run([compiler, "-shared", "-fPIC", "-x", "c++", "-", "-o", library], input=source,
                   text=True, check=True)
    assert native._open("cuda", tmp_path) == (None, "built by another version: reinstall")


def test_the_abi_numbers_agree():
    for name in ("cpu.h", "adamw_ema.cu"):
        assert f"#define ROBUSTDM_ABI {native.ABI} " in (ROOT / "csrc" / name).read_text()
    assert f"PHILOX_LAYOUT = {stream.LAYOUT_VERSION};" in (ROOT / "csrc" / "philox.h").read_text()


def test_importing_loads_no_library():
    code = "from robustdm.ops import native; print('librobustdm' in open('/proc/self/maps').read())"
    if not Path("/proc/self/maps").exists():
        pytest.skip("no /proc")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.parametrize("architecture", ["80", "90", "100"])
def test_the_cuda_source_compiles_without_spills(architecture, tmp_path):
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if not nvcc:
        pytest.skip("no nvcc")
    done = subprocess.run(
        [nvcc, "-std=c++17", "-O3", "--fmad=false", "-cubin", f"-arch=sm_{architecture}",
         "-Xptxas=-v", ROOT / "csrc" / "adamw_ema.cu", "-o", tmp_path / "out.cubin"],
        capture_output=True, text=True,
    )
    assert done.returncode == 0, done.stderr
    spills = [line for line in done.stderr.splitlines() if "spill" in line]
    assert len(spills) == 4 and all("0 bytes spill stores" in line for line in spills)
    print(done.stderr)


@needs_library
@pytest.mark.parametrize("rate", [2.5 / 65536, 3.5 / 65536])
def test_dropout_thresholds_between_two_integers_are_rounded_as_the_reference_s(variant, rate):
    """To even: 2 and 4. One value in 65,536 decides, hence many."""
    shape, key = (4, 64, 64, 64), torch.tensor([5, 6, 7])
    tensors, options = group_norm.arguments(shape, ("dropout",), torch.float32)
    y = group_norm.forward(native, tensors, options | {"dropout": rate, "key": key}, 2)[0]
    assert torch.equal(y != 0, stream.dropout_mask(key, shape, options["layer"], rate))
