"""The random stream: Philox itself, its numbers' laws, and independence of how work is split."""

import os
import subprocess
import sys

import pytest
import torch

from robustdm.errors import UsageError
from robustdm.ops import stream
from robustdm.ops.stream import Stream


def philox_scalar(key, counter):
    """Philox4x32-10 in Python integers, straight from the paper's definition."""
    (k0, k1), c = key, list(counter)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k0, p1 & 0xFFFFFFFF, (p0 >> 32) ^ c[3] ^ k1, p0 & 0xFFFFFFFF]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c


def test_scalar_reference_gives_the_published_vector():
    # Random123's known-answer file, philox4x32 with 10 rounds, all zeros.
    assert philox_scalar((0, 0), (0, 0, 0, 0)) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.mark.parametrize("seed, step", [(0, 0), (7, 3), (2**32 - 1, 2**31 + 5)])
def test_words_equal_the_scalar_reference(seed, step):
    indices = [0, 1, 2**31 - 1, 2**31, 2**32 + 7, 2**40 + 9]
    words = stream.philox(seed, step, torch.tensor(indices), Stream.FLIP)
    for i, index in enumerate(indices):
        counter = (index & 0xFFFFFFFF, index >> 32, Stream.FLIP, stream.LAYOUT_VERSION)
        assert [int(w[i]) for w in words] == philox_scalar((seed, step), counter)


TRITON = """
import torch, triton, triton.language as tl
from robustdm.ops import stream

@triton.jit
def kernel(low, high, out, seed, stream, layout, N: tl.constexpr):
    i = tl.arange(0, N)
    zero = tl.zeros_like(i)
    a, b, c, d = tl.philox(seed, tl.load(low + i), tl.load(high + i), zero + stream, zero + layout)
    tl.store(out + i, a.to(tl.int64))
    tl.store(out + N + i, b.to(tl.int64))
    tl.store(out + 2 * N + i, c.to(tl.int64))
    tl.store(out + 3 * N + i, d.to(tl.int64))

index = torch.tensor([0, 1, 5, 2**31 - 1, 2**31 + 1, 2**32 - 1, 2**32 + 7, 2**40 + 9])
low = (index & 0xFFFFFFFF).to(torch.uint32).view(torch.int32)
high = (index >> 32).to(torch.uint32).view(torch.int32)
seed, step, number = 2**31 + 12345, 77, 4
out = torch.zeros(4, len(index), dtype=torch.int64)
kernel[(1,)](low, high, out, seed + (step << 32), number, stream.LAYOUT_VERSION, len(index))
ours = torch.stack(stream.philox(seed, step, index, number))
assert torch.equal(out & 0xFFFFFFFF, ours), (out & 0xFFFFFFFF, ours)
"""


def test_words_equal_triton(tmp_path):
    pytest.importorskip("triton")
    script = tmp_path / "philox_kernel.py"  # triton reads a kernel's source from its file
    script.write_text(TRITON)
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]


def words(count=200_000, number=Stream.ELEMENT):
    return stream.philox(1, 2, torch.arange(count), number)


def test_uniforms_have_their_law_and_range():
    w = words()
    for i, word in enumerate(w):
        u, v = stream.uniform(word), stream.signed_uniform(word)
        assert 0 <= u.min() and u.max() < 1, i
        assert -1 < v.min() and v.max() < 1 and (v != 0).all(), i
        assert abs(u.mean() - 0.5) < 0.004 and abs(u.var() - 1 / 12) < 0.001, i
        assert abs(v.mean()) < 0.008 and abs(v.var() - 1 / 3) < 0.004, i


def test_extreme_words_stay_in_range():
    edge = torch.tensor([0, 1, 2**31, 2**32 - 1])
    assert stream.uniform(edge).tolist() == [0, 0, 0.5, 1 - 2**-24]
    assert stream.signed_uniform(edge).tolist() == [2**-23 - 1, 2**-23 - 1, 2**-23, 1 - 2**-23]
    z = stream.normal(edge.repeat(4), edge.repeat_interleave(4))
    assert torch.isfinite(z).all() and z.abs().max() < 6.8


def test_normals_are_standard_normal():
    w = words()
    z = stream.normal(w[0], w[1], torch.float64)
    moments = [float((z**k).mean()) for k in (1, 2, 3, 4)]
    for got, wanted, bound in zip(moments, (0, 1, 0, 3), (0.01, 0.015, 0.03, 0.1), strict=True):
        assert abs(got - wanted) < bound
    tail = float((z.abs() > 3).double().mean())
    assert abs(tail - 0.0027) < 0.0004


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_normals_are_rounded_float32_normals(dtype):
    w = words()
    z = stream.normal(w[0], w[1], dtype)
    assert z.dtype == dtype and torch.equal(z, stream.normal(w[0], w[1]).to(dtype))


def test_words_streams_steps_and_seeds_are_uncorrelated():
    index = torch.arange(100_000)
    columns = [
        *stream.philox(1, 2, index, Stream.ELEMENT),
        stream.philox(1, 2, index, Stream.SAMPLE)[0],
        stream.philox(1, 3, index, Stream.ELEMENT)[0],
        stream.philox(2, 2, index, Stream.ELEMENT)[0],
        stream.philox(1, 2, index + 1, Stream.ELEMENT)[0],
    ]
    values = torch.stack([stream.uniform(c, torch.float64) for c in columns])
    off = torch.corrcoef(values) - torch.eye(len(columns))
    assert off.abs().max() < 0.02


def test_float32_uniforms_are_exact():
    word = words(10_000)[2]
    assert torch.equal(stream.signed_uniform(word).double(),
                       stream.signed_uniform(word, torch.float64))
    assert torch.equal(stream.uniform(word).double(), stream.uniform(word, torch.float64))


def test_element_index_continues_over_a_split():
    whole = stream.element_index(0, (6, 2, 3))
    parts = [stream.element_index(k, (2, 2, 3)) for k in (0, 2, 4)]
    assert torch.equal(whole, torch.cat(parts))
    assert whole.shape == (6, 2, 3) and whole.flatten().tolist() == list(range(36))


def test_shuffles_are_permutations_that_differ_by_seed_and_epoch():
    a = stream.shuffled(0, 0, 1000)
    assert sorted(a.tolist()) == list(range(1000))
    assert torch.equal(a, stream.shuffled(0, 0, 1000))
    for other in (stream.shuffled(0, 1, 1000), stream.shuffled(1, 0, 1000), torch.arange(1000)):
        assert (a == other).float().mean() < 0.02


@pytest.mark.parametrize("seed, step", [(-1, 0), (2**32, 0), (0, -1), (0, 2**32)])
def test_keys_beyond_a_word_are_refused(seed, step):
    with pytest.raises(UsageError, match="4294967295"):
        stream.philox(seed, step, torch.arange(2), 0)


def test_a_key_in_a_tensor_gives_the_same_words_whatever_its_upper_half():
    index = torch.arange(5)
    words = stream.philox(7, 9, index, Stream.ELEMENT)
    for seed, step in ((7, 9), (7 + 2**40, 9 - 2**33)):
        again = stream.philox(torch.tensor(seed), torch.tensor(step), index, Stream.ELEMENT)
        assert all(torch.equal(a, b) for a, b in zip(words, again, strict=True))
    one = stream.philox_int(7, 9, 3, Stream.ELEMENT)
    assert one == tuple(int(w[3]) for w in words)
