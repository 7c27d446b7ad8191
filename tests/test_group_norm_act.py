"""The GroupNorm kernels against the float64 oracle, in Triton's interpreter."""

import math
import os
from contextlib import contextmanager

import pytest
import torch

pytest.importorskip("triton")

from torch.utils.checkpoint import checkpoint  # noqa: E402

from robustdm import ops  # noqa: E402
from robustdm.kernels import group_norm_act as kernels  # noqa: E402
from robustdm.ops import stream  # noqa: E402
from tests import group_norm  # noqa: E402
from tests.group_norm import ALL, CASES, arguments, error, gradients, images, oracle  # noqa: E402

if os.environ.get("TRITON_INTERPRET") != "1":  # set by conftest where there is no GPU
    pytest.skip("on a GPU, tests/test_ops.py runs the compiled kernels", allow_module_level=True)

# Relative Frobenius errors; the interpreter truncates to bfloat16, hence a whole ulp.
FORWARD = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
BACKWARD = {torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}

# Limits that send small tensors down each path, in several steps, splits and chunks.
PATHS = {
    "resident": {},
    "loop": {"_RESIDENT_FORWARD": 0, "_RESIDENT_BACKWARD": 0, "_LOOP_PER_THREAD": 4,
             "_LOOP_WARPS": 1},
    "split": {"_RESIDENT_FORWARD": 0, "_RESIDENT_BACKWARD": 0, "_LOOP_PER_THREAD": 4,
              "_LOOP_WARPS": 1, "_LOOP_BYTES": 0, "_PROGRAMS": 6, "_CHUNK_BYTES": 10000},
}
@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Fill every new output with NaN or nonsense, so that an element left unwritten is noticed."""
    def poisoned(make):
        def call(*args, **kwargs):
            out = make(*args, **kwargs)
            return out.fill_(torch.nan if out.is_floating_point() else 0xAA)

        return call

    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    for name, value in PATHS[request.param].items():
        assert hasattr(kernels, name)
        monkeypatch.setattr(kernels, name, value)
    return request.param


@contextmanager
def recorded_plans():
    """Collect the plans that the launch functions make."""
    original, plans = kernels.plan, []

    def record(*args):
        plans.append(original(*args))
        return plans[-1]

    kernels.plan = record
    try:
        yield plans
    finally:
        kernels.plan = original


def forward(*args, **options):
    return group_norm.forward(kernels, *args, **options)


def backward(*args, **options):
    return group_norm.backward(kernels, *args, **options)


def unpacked(keep, shape):
    """The mask that the forward stored, a bit per element, as (B, C, *spatial)."""
    bits = keep[..., None].bitwise_and(1 << torch.arange(8)).ne(0).flatten(2)[..., :shape[1]]
    return bits.movedim(-1, 1).reshape(shape)


def check(shape, groups, features, dtype, parameter_dtype=torch.float32):
    tensors, options = arguments(shape, features, dtype, parameter_dtype)
    dy = images(shape, dtype, 4)
    wanted_y, wanted = oracle(tensors, options, groups, dy)
    with recorded_plans() as plans:
        y, keep, mean, rstd = forward(tensors, options, groups)
        dx, sums = backward(tensors, options, groups, (keep, mean, rstd), dy)

    assert y.dtype == dx.dtype == dtype and y.stride() == dx.stride() == tensors["x"].stride()
    assert mean.dtype == rstd.dtype == sums.dtype == torch.float32
    assert error(y, wanted_y) < FORWARD[dtype]
    if "dropout" in features:
        assert torch.equal(unpacked(keep, shape), stream.dropout_mask(
            options["key"], shape, options["layer"], options["dropout"]))
    else:
        assert keep.numel() == 0
    # With one value per group, and for the sum of dx with one channel, all but rounding cancels.
    scale = rstd.max() if math.prod(shape[1:]) == groups else wanted["x"].norm()
    assert error(dx, wanted["x"], scale) < BACKWARD[dtype]
    for name, got in gradients(tensors, sums).items():
        if name in wanted:
            assert error(got, wanted[name], scale) < BACKWARD[dtype], name
    return plans


@pytest.mark.parametrize("shape, groups, features", CASES)
def test_forward_and_backward_equal_the_oracle(path, shape, groups, features):
    plans = check(shape, groups, features, torch.float32)
    if shape[2:] not in ((1, 1), ()):
        assert {p.path for p in plans} == {path}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(path, dtype):
    check((2, 24, 5, 3), 4, ALL, dtype)
    check((2, 24, 5, 3), 2, ("affine", "add", "silu"), dtype, parameter_dtype=dtype)


def test_paths_are_exercised_in_pieces(monkeypatch):
    """The limits above do cut: several loop steps, splits and chunks, a last tile that is short."""
    for name, value in PATHS["split"].items():
        monkeypatch.setattr(kernels, name, value)
    forward_plan, backward_plan = check((3, 6, 7, 5), 3, ALL, torch.float32)
    assert backward_plan.splits > 1 and 35 % backward_plan.split_rows
    monkeypatch.setattr(kernels, "_CHUNK_BYTES", 8000)
    plans = check((3, 24, 7, 5), 2, ("affine", "silu", "dropout"), torch.float32)
    assert all(p.chunk < 3 and p.splits > 1 for p in plans)
    assert any(p.split_rows > p.rows for p in plans)


def test_without_sums_the_input_gradient_is_the_same(path):
    shape, groups = (2, 12, 5, 3), 3
    tensors, options = arguments(shape, ALL, torch.float32)
    _, *saved = forward(tensors, options, groups)
    dy = images(shape, torch.float32, 4)
    with_sums, _ = backward(tensors, options, groups, saved, dy)
    dx, sums = backward(tensors, options, groups, saved, dy, need_sums=False)
    assert sums.numel() == 0 and torch.equal(dx, with_sums)


@pytest.mark.parametrize("first", [0, 2**33 + 5])
def test_dropout_is_that_of_the_reference_however_the_batch_is_split(path, first):
    shape, groups, layer, rate = (3, 12, 4, 5), 3, 70, 0.4
    tensors, options = arguments(shape, ("affine", "dropout"), torch.float32)
    options |= {"layer": layer, "dropout": rate, "key": torch.tensor([2**32 - 1, 9, first])}
    y = forward(tensors, options, groups)[0]
    assert torch.equal(y != 0, stream.dropout_mask(options["key"], shape, layer, rate))
    tensors["x"], options["key"] = tensors["x"][1:], options["key"] + torch.tensor([0, 0, 1])
    assert torch.allclose(forward(tensors, options, groups)[0], y[1:], rtol=1e-6, atol=1e-6)


def test_a_large_mean_keeps_accuracy(path):
    """An error of 3e-5 is that of a mean of 1000 in float32; a naive variance loses everything."""
    shape, groups = (2, 12, 5, 3), 3
    tensors, options = arguments(shape, ("affine", "silu"), torch.float32)
    tensors["x"] += 1000
    dy = images(shape, torch.float32, 4)
    wanted_y, wanted = oracle(tensors, options, groups, dy)
    y, *saved = forward(tensors, options, groups)
    dx, _ = backward(tensors, options, groups, saved, dy)
    assert error(y, wanted_y) < 1e-4 and error(dx, wanted["x"]) < 3e-4


def test_a_constant_input_gives_the_activated_bias(path):
    shape = (2, 12, 5, 3)
    tensors, options = arguments(shape, ("affine", "silu"), torch.float32)
    tensors["x"].fill_(0.7)
    y, *saved = forward(tensors, options, 3)
    bias = torch.nn.functional.silu(tensors["bias"]).view(1, -1, 1, 1).expand(shape)
    assert torch.allclose(y, bias, atol=2e-4)
    dx, sums = backward(tensors, options, 3, saved, images(shape, torch.float32, 4))
    assert torch.isfinite(dx).all() and torch.isfinite(sums).all()


def test_tiny_is_added_to_the_variance(path):
    tensors, options = arguments((1, 8, 3, 3), (), torch.float32)
    y, _, mean, rstd = forward(tensors, options, 2, tiny=0.5)
    grouped = tensors["x"].double().reshape(1, 2, -1)
    assert error(mean, grouped.mean(-1)) < 1e-6
    assert error(rstd, (grouped.var(-1, unbiased=False) + 0.5).rsqrt()) < 1e-6


def test_statistics_are_those_of_the_rounded_sum(path):
    """Else the backward, which sees the rounded v, would use the statistics of something else."""
    tensors, options = arguments((2, 24, 3, 3), ("add",), torch.float16)
    mean = forward(tensors, options, 6)[2]
    rounded = (tensors["x"].float() + tensors["add"][..., None, None]).half().double()
    assert error(mean, rounded.reshape(2, 6, -1).mean(-1)) < 1e-6


def test_nan_inputs_stay_in_their_group(path):
    tensors, options = arguments((2, 24, 3, 3), ("affine", "silu"), torch.float32)
    clean = forward(tensors, options, 6)[0]
    tensors["x"][0, 5, 1, 1] = torch.nan
    y = forward(tensors, options, 6)[0]
    assert torch.isnan(y[0, 4:8]).all()
    assert torch.equal(y[0, 8:], clean[0, 8:]) and torch.equal(y[1], clean[1])
    assert torch.equal(y[0, :4], clean[0, :4])


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_extreme_activations(path, dropout):
    """Far beyond where the exponential overflows, SiLU is 0 or the identity, and so its slope."""
    tensors, options = arguments((2, 8, 3, 3), ("affine", "silu", "dropout"), torch.float32)
    options["dropout"] = dropout
    extremes = torch.tensor([-1e30, -1e4, -100.0, -20.0, 20.0, 100.0, 1e4, 1e30])
    tensors["weight"], tensors["bias"] = torch.ones(8), extremes
    dy = images((2, 8, 3, 3), torch.float32, 4)
    wanted_y, wanted = oracle(tensors, options, 2, dy)
    y, *saved = forward(tensors, options, 2)
    dx, sums = backward(tensors, options, 2, saved, dy)
    assert torch.allclose(y.double(), wanted_y, rtol=1e-6, atol=1e-6)
    assert error(dx, wanted["x"]) < 1e-5
    for name in ("weight", "bias"):
        assert error(gradients(tensors, sums)[name], wanted[name]) < 1e-5


def test_empty_batch():
    tensors, options = arguments((0, 8, 3, 3), ALL, torch.float32)
    y, *saved = forward(tensors, options, 2)
    dx, sums = backward(tensors, options, 2, saved, tensors["x"])
    assert y.shape == dx.shape == (0, 8, 3, 3) and sums.shape == (0, 8, 3)


def test_dropout_constants_are_those_of_the_random_module():
    assert kernels._STREAM == stream.Stream.DROPOUT_MASK
    assert kernels._LAYOUT.value == stream.LAYOUT_VERSION


@pytest.mark.parametrize("itemsize", [2, 4])
def test_every_plan_covers_its_tensor(itemsize):
    sides = (1, 2, 7, 8, 16, 32, 50, 64, 128, 256)
    widths = ((32, 32), (64, 32), (96, 32), (128, 32), (384, 32), (640, 32), (1024, 32), (6, 3),
              (20, 1), (60, 12), (512, 1))
    for batch in (1, 32):
        for side in sides:
            for channels, groups in widths:
                size = channels // groups
                for reads, limit, each in ((1, 2**14, 64), (2, 2**12, 32)):
                    p = kernels.plan((batch, side**2, channels), groups, itemsize, reads, limit,
                                     each)
                    assert p.slab * p.slabs >= groups > p.slab * (p.slabs - 1)
                    assert p.slab * size <= p.cols and (p.slabs == 1 or p.slab * size % 8 == 0)
                    for n in (p.rows, p.cols, p.num_warps):
                        assert n > 0 and n & (n - 1) == 0
                    assert p.rows * p.cols <= 2**14 and p.num_warps <= 8
                    assert p.path != "resident" or p.rows >= side**2
                    if p.path == "split":
                        assert p.splits <= 128 and p.split_rows % p.rows == 0 and p.chunk >= 1
                        assert p.splits * p.split_rows >= side**2 > (p.splits - 1) * p.split_rows


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_recomputed_forward_drops_the_same_elements(backend, reentrant):
    """Gradient checkpointing runs the forward twice: the bits that it stores must be the same."""
    torch.manual_seed(0)
    leaves = [torch.randn(2, 16, 4, 4).contiguous(memory_format=torch.channels_last),
              torch.randn(16), torch.randn(16), torch.randn(2, 16)]
    key, cotangent = torch.tensor([3, 5, 0]), torch.randn(2, 16, 4, 4)

    def run(wrapped):
        mine = [v.clone().requires_grad_() for v in leaves]
        y = wrapped(lambda x, w, b, add: ops.group_norm_act(
            x, 4, w, b, add=add, dropout=0.5, key=key, backend=backend), mine)
        (y * cotangent).sum().backward()
        return y, *(v.grad for v in mine)

    plain = run(lambda function, mine: function(*mine))
    again = run(lambda function, mine: checkpoint(function, *mine, use_reentrant=reentrant))
    assert 0.3 < (plain[0] == 0).float().mean() < 0.7
    assert all(torch.equal(a, b) for a, b in zip(again, plain, strict=True))
