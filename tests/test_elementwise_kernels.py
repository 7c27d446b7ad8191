"""What `test_ops.py` cannot see of the elementwise Triton kernels: their parts, and many programs.

There, every op of every backend is held against the reference on small samples, each one program's
work. Here are the random stream and its functions one by one, samples of several programs, indices
that carry into the high word, grids that wrap, and sums in several tiles.
"""

import math
from functools import cache

import pytest
import torch

from robustdm.ops import reference, stream
from robustdm.ops.stream import Stream
from tests.conftest import HAS_GPU

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
from robustdm.kernels import equivariance_loss, fgsm_project, noise_perturb, philox  # noqa: E402

# On a GPU these are the only checks of the compiled random stream: `pytest -m gpu` runs them too.
pytestmark = [pytest.mark.gpu] if HAS_GPU else []
DEVICE = "cuda" if HAS_GPU else "cpu"
SEED, STEP = 2**32 - 5, 2**31 + 3
EDGES = [0, 1, 2, 255, 256, 2**29 - 1, 2**29, 2**30, 2**31 - 1, 2**31, 3 * 2**30, 2**32 - 129,
         2**32 - 128, 2**32 - 2, 2**32 - 1]


@triton.jit
def _words_kernel(key, out, STREAM: tl.constexpr, COUNT: tl.constexpr, ALIGNED: tl.constexpr):
    seed, step, first = philox.read_key(key)
    i = tl.arange(0, COUNT)
    w0, w1, w2, w3 = philox.indexed_words(seed, step, first, i, STREAM, ALIGNED)
    tl.store(out + i, w0.to(tl.int64))
    tl.store(out + COUNT + i, w1.to(tl.int64))
    tl.store(out + 2 * COUNT + i, w2.to(tl.int64))
    tl.store(out + 3 * COUNT + i, w3.to(tl.int64))


@triton.jit
def _numbers_kernel(word, out, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    w = tl.load(word + i).to(tl.uint32)
    sine, cosine = philox.sine_cosine(w)
    tl.store(out + i, philox.uniform(w))
    tl.store(out + COUNT + i, philox.signed_uniform(w))
    tl.store(out + 2 * COUNT + i, philox.box_muller_length(w))
    tl.store(out + 3 * COUNT + i, sine)
    tl.store(out + 4 * COUNT + i, cosine)


def key_of(first):
    return torch.tensor([SEED, STEP, first], device=DEVICE)


def scales(batch):
    """signal, noise and radius."""
    values = torch.linspace(0.1, 0.9, batch, device=DEVICE)
    return values.flip(0), values, 0.7 * values


def image(shape, channels_last, seed=0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


def test_the_layout_is_that_of_the_reference():
    assert philox.LAYOUT_VERSION.value == stream.LAYOUT_VERSION
    streams = [s for s in Stream if hasattr(philox, s.name)]
    assert {Stream.ELEMENT, Stream.DELTA, Stream.SAMPLE, Stream.FLIP} < set(streams)
    assert all(getattr(philox, s.name).value == s for s in streams)


@pytest.mark.parametrize("first, aligned", [
    (0, True), (2**31 - 8, False), (2**32 - 8, False), (2**32, True), (2**40 - 3, False),
    (2**40, True),
])
def test_words_are_equal_also_where_an_index_carries(first, aligned):
    out = torch.zeros(4, 16, dtype=torch.int64, device=DEVICE)
    _words_kernel[(1,)](key_of(first), out, int(Stream.DELTA), 16, aligned)
    index = torch.arange(first, first + 16, device=DEVICE)
    assert torch.equal(out, torch.stack(stream.philox(SEED, STEP, index, Stream.DELTA)))


def test_uniforms_and_normals_of_words():
    spread = torch.randint(0, 2**32, (4096 - len(EDGES) - 2048,),
                           generator=torch.Generator().manual_seed(0))
    # The logarithm is hardest just below one.
    word = torch.cat([torch.tensor(EDGES), torch.arange(2**32 - 2048 * 64, 2**32, 64), spread])
    word = word.to(DEVICE)
    out = torch.full((5, 4096), float("nan"), device=DEVICE)
    _numbers_kernel[(1,)](word, out, 4096)
    uniform, signed, length, sine, cosine = out
    assert torch.equal(uniform, stream.uniform(word))
    assert torch.equal(signed, stream.signed_uniform(word))

    u = (word.float() * 2.0**-32).clamp(min=2.0**-33).double()
    wanted = (-2 * u.log()).sqrt()
    assert (length[u == 1] == 0).all() and (u == 1).any()
    assert ((length - wanted).abs() <= 4e-7 * wanted).all()
    angle = (word.float() * 2.0**-32).mul(2 * math.pi).double()
    assert (sine - angle.sin()).abs().max() < 1.5e-7
    assert (cosine - angle.cos()).abs().max() < 1.5e-7


@triton.jit
def _residual_kernel(v, product, out):
    tl.store(out, tl.fma(tl.load(v), tl.load(v), -tl.load(product)))


@cache
def fma_rounds_once() -> bool:
    """Whether this Triton's `tl.fma` does: the interpreter of 3.6 rounds the product as well.
    Compiled kernels round once."""
    v = torch.tensor([1 + 2.0**-12], device=DEVICE)
    out = torch.zeros(1, device=DEVICE)
    _residual_kernel[(1,)](v, v * v, out)
    return float(out) == 2.0**-24


# Several programs: 1200 elements leave the last one's tail, 2048 fill two.
BIG = [(2, 3, 20, 20), (2, 2, 32, 32), (1, 5, 15, 15)]


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("shape", BIG)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # 4 and 8 elements at a time
@pytest.mark.parametrize("first", [0, 2**40 + 1])
def test_samples_of_several_programs(shape, channels_last, dtype, first):
    key, (signal, noise, radius) = key_of(first), scales(shape[0])
    radius = radius.to(dtype).float()
    x, g = (image(shape, channels_last, n).to(dtype) for n in range(2))
    for gradient in (g, None):
        got = fgsm_project.fgsm_project(x, gradient, noise, radius, key)
        for a, b in zip(got, reference.fgsm_project(x, gradient, noise, radius, key), strict=True):
            assert torch.equal(a, b) and a.stride() == x.stride()

    got = noise_perturb.noise_perturb(x, signal, noise, radius, key, dtype)
    for a, b in zip(got, reference.noise_perturb(x, signal, noise, radius, key, dtype),
                    strict=True):
        assert (a.float() - b.float()).abs().max() <= (4e-6 if dtype == torch.float32 else 4e-3)
    # x_ran follows from x_t and the rounded delta_ran; twice rounded, hence not always equal.
    _, start = reference.fgsm_project(x, torch.zeros_like(x), noise, radius, key)
    moved = got[0].double() + noise.double().view(-1, 1, 1, 1) * start.double()
    if fma_rounds_once():
        assert (got[1] != moved.to(dtype)).double().mean() < 2e-3
    # x0 = 0 and unit scales leave eps itself.
    one = torch.ones_like(signal)
    eps, _ = noise_perturb.noise_perturb(0 * x.float(), one, one, radius, key, torch.float32)
    assert (eps - stream.element_noise(key, shape)[0]).abs().max() <= 2e-6


def test_an_index_carries_within_a_sample():
    shape = (3, 3, 7, 5)
    calls = (105 + 3) // 4
    key, (_, noise, radius) = key_of(2**32 // calls - 1), scales(3)
    assert any((int(key[2]) + n) * calls < 2**32 < (int(key[2]) + n + 1) * calls for n in range(3))
    x = image(shape, True)
    got = fgsm_project.fgsm_project(x, None, noise, radius, key)
    assert torch.equal(got[1], reference.fgsm_project(x, None, noise, radius, key)[1])


@pytest.mark.skipif(HAS_GPU, reason="a compiled kernel keeps its constants")
def test_more_samples_than_an_axis_of_a_grid_holds(monkeypatch):
    monkeypatch.setattr(philox, "GRID_LIMIT", tl.constexpr(2))
    x, key, (_, noise, radius) = image((5, 3), False), key_of(4), scales(5)
    assert philox.plan(x, 1)[0] == (1, 2, 3)
    got = fgsm_project.fgsm_project(x, x, noise, radius, key)
    wanted = reference.fgsm_project(x, x, noise, radius, key)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("tile", [4, 2048])
@pytest.mark.parametrize("shape", [(7, 3), (2, 3, 20, 20)])
def test_sums_in_any_number_of_tiles(monkeypatch, shape, tile):
    """Rows and columns of partial sums beyond one tile are added, and only those that exist."""
    monkeypatch.setattr(equivariance_loss, "TILE", tile)
    monkeypatch.setattr(philox, "QUADS", 32)  # 128 elements a program: ten partial sums a sample
    key, (lambda_t, _, radius) = key_of(9), scales(shape[0])
    o, o2, delta = (image(shape, len(shape) == 4, n) for n in range(3))
    arguments = (o, o2, delta, radius, lambda_t, key, torch.float32, False, False)
    got = equivariance_loss.equivariance_loss(*arguments)
    for a, b in zip(got, reference.equivariance_loss(*arguments), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-8)
    again = equivariance_loss.equivariance_loss(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))

