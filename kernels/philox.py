"""The random stream of `robustdm.ops.stream` in Triton, and how elementwise kernels divide a batch.

    words(seed, step, low, high, stream) = Philox4x32-10, key (seed, step),
                                           counter (low, high, stream, LAYOUT_VERSION)

Words and uniforms equal those of `robustdm.ops.stream` bit for bit, normals to a few ulp:
logarithm, sine and cosine are the polynomials of Cephes, the same as in csrc/philox.h, since the
GPU's own logarithm is too coarse near one, and may even be positive below it.

A program serves ``QUADS`` consecutive fours of one sample's elements in channels-last order: one
call of the generator gives a four its eps, another its delta. A thread makes the ``VECTOR``
neighbours that it loads and stores at a time, 16 bytes: no number passes through shared memory.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"; Moshier, Cephes library
(logf, sinf, cosf); Box & Muller 1958.
"""

import torch
import triton
import triton.language as tl

# 16 elements a thread: what a program computes once, keys of ten rounds and addresses, then costs
# little, and its calls hide each other's latency. Twice as many save no more but half the threads
# of a multiprocessor. 1024 elements divide samples of 3x32x32 and all larger powers of two.
QUADS = 256
WARPS = 2
# The largest extent of a grid's second and third axis.
GRID_LIMIT = tl.constexpr(65535)

# Equal to robustdm.ops.stream; kernels do not import it, a test compares them.
LAYOUT_VERSION = tl.constexpr(2)
ELEMENT = tl.constexpr(0)
SAMPLE = tl.constexpr(1)
BATCH = tl.constexpr(2)
FLIP = tl.constexpr(5)
CORRUPT_CHOICE = tl.constexpr(6)
CORRUPT_NOISE = tl.constexpr(7)
DROPOUT_MASK = tl.constexpr(11)
DELTA = tl.constexpr(12)


@triton.jit
def words(seed, step, low, high, stream):
    """Philox4x32-10 of uint32 scalars seed, step, stream and uint32 blocks or scalars low, high."""
    # Products of two words in 64 bits are one instruction, mul.wide.u32; high and low halves apart
    # would be two.
    k0, k1 = seed, step
    c0, c1 = low, high
    # Scalars as long as they are: the first rounds are then partly done once for all.
    c2, c3 = tl.cast(stream, tl.uint32), tl.full((), LAYOUT_VERSION, tl.uint32)
    for _ in tl.static_range(10):
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = p1.to(tl.uint32)
        c3 = p0.to(tl.uint32)
        k0 = k0 + tl.full((), 0x9E3779B9, tl.uint32)
        k1 = k1 + tl.full((), 0xBB67AE85, tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def indexed_words(seed, step, first, offset, stream, ALIGNED: tl.constexpr = False):
    """Words of the indices ``first`` + ``offset``: an int64 scalar and a block of small int32.

    ALIGNED promises that the sum does not carry into the high word.
    """
    base = first.to(tl.uint32)
    low = base + offset.to(tl.uint32)
    high = (first >> 32).to(tl.uint32)
    if not ALIGNED:
        high += (low < base).to(tl.uint32)
    return words(seed, step, low, high, stream)


@triton.jit
def read_key(key):
    """Seed and step of a (3,) int64 key as uint32, first_index as int64."""
    return tl.load(key).to(tl.uint32), tl.load(key + 1).to(tl.uint32), tl.load(key + 2)


@triton.jit
def uniform(word):
    """Uniform float32 in [0, 1) from the top 24 bits."""
    return (word >> 8).to(tl.float32) * (2.0**-24)


@triton.jit
def signed_uniform(word):
    """Uniform float32 in (-1, 1), never zero, from the top 23 bits."""
    # As the fraction of a number in [1, 2): every step is exact, and none a slow conversion.
    one_to_two = ((word >> 9) | 0x3F800000).to(tl.float32, bitcast=True)
    return tl.fma(one_to_two - 1.5, 2.0, 2.0**-23)


@triton.jit
def _polynomial(x, high, a, b):
    return tl.fma(tl.fma(high, x, a), x, b)


@triton.jit
def box_muller_length(word):
    """sqrt(-2 log u) in float32, u = word / 2^32 but at least 2^-33."""
    # 2^32 u = 2^exponent m with m in [sqrt 1/2, sqrt 2): then log u has no cancellation, and it is
    # not positive. The factor 2^-32 is subtracted from the exponent, and -2 is in the coefficients:
    # powers of two, so that the result is that of Cephes.
    scaled = tl.maximum(word.to(tl.float32), 0.5)
    bits = scaled.to(tl.int32, bitcast=True) - (0x3F3504F3 + (32 << 23))
    exponent = (bits >> 23).to(tl.float32)
    z = ((bits & 0x7FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    square = z * z
    p = _polynomial(z, tl.full(z.shape, -2 * 7.0376836292e-2, tl.float32),
                    -2 * -1.1514610310e-1, -2 * 1.1676998740e-1)
    p = _polynomial(z, p, -2 * -1.2420140846e-1, -2 * 1.4249322787e-1)
    p = _polynomial(z, p, -2 * -1.6668057665e-1, -2 * 2.0000714765e-1)
    p = _polynomial(z, p, -2 * -2.4999993993e-1, -2 * 3.3333331174e-1)
    p = tl.fma(p, z * square, exponent * (-2 * -2.12194440e-4)) + square
    p = tl.fma(exponent, -2 * 0.693359375, tl.fma(z, -2.0, p))
    # To 1 ulp. The IEEE root has a branch for subnormal numbers, of which p is none, that keeps the
    # compiler from interleaving a thread's calls: an eighth more instructions, and more registers.
    return tl.sqrt(p)


@triton.jit
def sine_cosine(word):
    """sin and cos of 2 pi word / 2^32, rounded to float32 as in robustdm.ops.stream, in float32."""
    # Factors of two are exact, so that one product by 2 pi / 2^32 rounds like two.
    f = word.to(tl.float32)
    # Adding 1.5 * 2^23 leaves the nearest number of quarter turns, 0 to 4, in the lowest bits.
    shifted = tl.fma(f, 2.0**-30, 12582912.0)
    quarter = shifted.to(tl.int32, bitcast=True)
    count = shifted - 12582912.0
    x = f * (6.2831854820251465 * 2.0**-32)
    x = tl.fma(count, -1.5703125, x)
    x = tl.fma(count, -4.837512969970703125e-4, x)
    x = tl.fma(count, -7.54978995489188216e-8, x)
    square = x * x
    s = _polynomial(square, tl.full(x.shape, -1.9515295891e-4, tl.float32),
                    8.3321608736e-3, -1.6666654611e-1)
    s = tl.fma(s * square, x, x)
    c = _polynomial(square, tl.full(x.shape, 2.443315711809948e-5, tl.float32),
                    -1.388731625493765e-3, 4.166664568298827e-2)
    c = tl.fma(tl.fma(c, square, -0.5), square, 1.0)
    odd = (quarter & 1) != 0
    sine = tl.where(odd, c, s).to(tl.int32, bitcast=True)
    cosine = tl.where(odd, s, c).to(tl.int32, bitcast=True)
    sine = (sine ^ ((quarter & 2) << 30)).to(tl.float32, bitcast=True)
    cosine = (cosine ^ (((quarter + 1) & 2) << 30)).to(tl.float32, bitcast=True)
    return sine, cosine


@triton.jit
def normal_pair(word0, word1):
    """Two independent standard normals in float32 from two words."""
    length = box_muller_length(word0)
    sine, cosine = sine_cosine(word1)
    return length * cosine, length * sine


@triton.jit
def _four_numbers(
    key, sample, calls, K: tl.constexpr, QUADS: tl.constexpr, VECTOR: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    # The K-th four of every VECTOR elements: normals and uniforms.
    seed, step, first_index = read_key(key)
    first = (first_index + sample) * calls + tl.program_id(0).to(tl.int64) * QUADS
    offset = tl.arange(0, 4 * QUADS // VECTOR) * (VECTOR // 4) + K
    w0, w1, w2, w3 = indexed_words(seed, step, first, offset, ELEMENT, ALIGNED)
    n0, n1 = normal_pair(w0, w1)
    n2, n3 = normal_pair(w2, w3)
    w0, w1, w2, w3 = indexed_words(seed, step, first, offset, DELTA, ALIGNED)
    u0, u1, u2, u3 = signed_uniform(w0), signed_uniform(w1), signed_uniform(w2), signed_uniform(w3)
    return n0, n1, n2, n3, u0, u1, u2, u3


@triton.jit
def _woven(a, b, c, d, QUADS: tl.constexpr):
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (4 * QUADS,))


@triton.jit
def element_noise(
    key, sample, calls, QUADS: tl.constexpr, VECTOR: tl.constexpr, ALIGNED: tl.constexpr
):
    """eps and the signed uniform of the program's 4 QUADS elements; ``calls`` are a sample's.

    What a kernel does not use of it, the compiler removes, the calls of the generator included.
    """
    # One call for each four of a vector, joined last: then the layout of the noise is that of the
    # loads. Calls in one long block would be exchanged between threads through shared memory.
    a, b, c, d, u, v, w, x = _four_numbers(key, sample, calls, 0, QUADS, VECTOR, ALIGNED)
    if VECTOR == 8:
        e, f, g, h, p, q, r, s = _four_numbers(key, sample, calls, 1, QUADS, VECTOR, ALIGNED)
        a, b, c, d = tl.join(a, e), tl.join(b, f), tl.join(c, g), tl.join(d, h)
        u, v, w, x = tl.join(u, p), tl.join(v, q), tl.join(w, r), tl.join(x, s)
    return _woven(a, b, c, d, QUADS), _woven(u, v, w, x, QUADS)


@triton.jit
def this_sample():
    """Which sample (int64) the program serves, in a grid made by `grid_of`."""
    return tl.program_id(1) + tl.program_id(2).to(tl.int64) * GRID_LIMIT


@triton.jit
def memory_offsets(
    sample, numel, area, CHANNELS: tl.constexpr, QUADS: tl.constexpr, VECTOR: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Where the program's 4 QUADS elements lie, and which of them exist.

    With CHANNELS 1 memory is in the stream's order; else it is (B, CHANNELS, area).
    """
    first = tl.program_id(0).to(tl.int64) * (4 * QUADS)
    # Where loads are narrower than stores, the hint keeps a thread's share the same.
    i = tl.max_contiguous(tl.arange(0, 4 * QUADS), VECTOR)
    inside = i < (4 * QUADS if ALIGNED else numel - first)  # the compiler sees that all are
    if CHANNELS == 1:
        return (sample * numel + first) + i, inside
    # Only the program's own elements are divided, in 32 bits.
    within = (first % CHANNELS).to(tl.int32) + i
    channel = (within % CHANNELS).to(tl.int64)
    return (sample * numel + first // CHANNELS) + channel * area + within // CHANNELS, inside


def stream_channels(x: torch.Tensor) -> int:
    """Number of channels that memory order separates, 1 where it is channels-last order."""
    if x.ndim < 3 or x.shape[1] == 1 or x.stride(1) == 1:
        return 1
    return x.shape[1]


def plan(stored: torch.Tensor, channels: int) -> tuple[tuple[int, int, int], int, dict[str, int]]:
    """How to launch a kernel that stores tensors like ``stored``, (B, ...).

    Returns:
        The grid of (blocks, samples), the calls that a sample takes, and the constants QUADS,
        VECTOR, ALIGNED and num_warps. Small samples get small programs. ALIGNED: they divide a
        sample, so that a program's first index is a multiple of QUADS, a power of two.
    """
    batch, limit = len(stored), GRID_LIMIT.value
    numel = stored.numel() // batch
    calls = (numel + 3) // 4
    block = min(QUADS, triton.next_power_of_2(calls))
    vector = 16 // stored.element_size()
    if channels > 1 or numel % vector or vector > 4 * block:
        vector = 4
    grid = (triton.cdiv(calls, block), min(batch, limit), triton.cdiv(batch, limit))
    warps = max(1, WARPS * block // QUADS)
    aligned = numel % (4 * block) == 0
    return grid, calls, {
        "QUADS": block, "VECTOR": vector, "ALIGNED": aligned, "num_warps": warps
    }
