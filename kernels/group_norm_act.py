"""Channels-last group normalisation with its block around it: AdaGN, SiLU, dropout.

Forward, with the mean and variance of a sample's group over its channels and positions::

    v = x + add                     (rounded to the activation's dtype)
    xhat = (v - mean) rstd          rstd = 1 / sqrt(variance + tiny)
    u = xhat w + b                  w = weight (1 + scale)    b = bias (1 + scale) + shift
    y = dropout(silu(u))

Backward, with du = dy d dropout(silu(u)) / d u and means over the group::

    dx = rstd (w du - mean(w du) - xhat mean(w du xhat))

`robustdm.ops.reference.group_norm_act` is the specification; the dropout mask is bit for bit that
of `robustdm.ops.stream.dropout_mask`. Activations are (B, C, *spatial) with channels-last strides,
in float32, bfloat16 or float16; arithmetic is in float32; no atomics, so results repeat bitwise.

Bytes through device memory per element, in sizes of the activation's dtype: forward 2 (x; y),
backward 3 (dy, x; dx). With dropout, the forward also stores one bit per element, whether it was
kept, which the backward reads: to draw the mask again would take more instructions than all else.

Three paths, chosen by `plan`. Resident: a program holds all positions of a few groups in registers
and reads each byte once. Loop: it goes over them twice, the second time out of the cache. Split:
groups too large for one program are cut by positions, with partial statistics in between, and the
batch is worked through in chunks, so that the second time they come from the L2 cache.

Source: Wu & He 2018; Chan et al. 1983 (merging variances); Salmon et al. 2011 (Philox).
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# random.Stream.DROPOUT_MASK and random.LAYOUT_VERSION: the third and fourth counter words.
_STREAM = 11
_LAYOUT: tl.constexpr = tl.constexpr(2)

_LOG2E: tl.constexpr = tl.constexpr(math.log2(math.e))
_LOG2: tl.constexpr = tl.constexpr(math.log(2))

# Elements a thread holds per tile. 64 in float32, twice (v and its square or y), and the channels'
# constants fit 128 registers; the backward holds two tiles, hence half.
_FORWARD_PER_THREAD = 64
_BACKWARD_PER_THREAD = 32
# In a loop, a thread's tile is two rows of eight channels: sums are kept per element of the tile.
# Programs of 4 warps, for the dropout's registers vary with the compiler: 168 of them still leave
# three programs, 12 warps, per SM, where 8 warps would leave one.
_LOOP_PER_THREAD, _LOOP_WARPS = 16, 4
# A tile that stays in registers: 8 warps forward, 4 backward, so that several programs share an SM
# and some compute while others load. Larger ones lose more by waiting than by reading L1 again.
_RESIDENT_FORWARD = 8 * 32 * _FORWARD_PER_THREAD
_RESIDENT_BACKWARD = 4 * 32 * _BACKWARD_PER_THREAD
# Bytes one program may read twice in a loop: two fit the L1 cache of an SM; what three or four
# per SM lose of it comes from L2, which holds all of them.
_LOOP_BYTES = 96 * 2**10
# A slab's row is one sector of 32 bytes at least; while tiles stay small, up to a cache line.
_SECTOR, _LINE = 32, 128
_SMALL_TILE = 2048
# Bytes read twice per chunk of the split path: well inside the L2 of 40 (A100) to 60 MB.
_CHUNK_BYTES = 32 * 2**20
# Programs per chunk: about 8 blocks of 4 warps on each of 132 SMs; more splits than 128 would make
# every program spend longer on merging the partials than on its own rows.
_PROGRAMS = 1024
_MAX_SPLITS = 128


class Plan(NamedTuple):
    """How a call is cut into programs: (sample, slab of groups), or also by rows."""

    path: str  # "resident", "loop" or "split"
    slab: int  # groups per program
    slabs: int
    rows: int  # of a tile
    cols: int  # channels of a tile, padded to a power of two
    num_warps: int
    splits: int = 1
    split_rows: int = 0
    chunk: int = 0  # samples per pair of launches


def plan(shape: tuple[int, int, int], groups: int, itemsize: int, reads: int, limit: int,
         per_thread: int) -> Plan:
    """Choose path and tile.

    Args:
        shape: B, S, C.
        itemsize: bytes of an element.
        reads: how many tensors are read, each twice on the loop and split paths.
        limit: elements of a tile that may stay in registers.
        per_thread: elements of such a tile per thread.
    """
    batch, positions, channels = shape
    size = channels // groups
    # Slabs start at multiples of eight channels: whole Philox calls, and 16-byte loads.
    slab = min(groups, 8 // math.gcd(size, 8))
    while slab * size * itemsize < _SECTOR and slab < groups:
        slab = min(groups, 2 * slab)
    rows = triton.next_power_of_2(positions)

    def width(slab: int) -> int:
        return max(8, triton.next_power_of_2(slab * size))

    def finish(path: str, rows: int, per_thread: int, **rest: int) -> Plan:
        elements = rows * width(slab)
        warps = max(elements // (32 * per_thread), min(4, elements // 256), 1)
        slabs = triton.cdiv(groups, slab)
        return Plan(path, slab, slabs, rows, width(slab), min(16, warps), **rest)

    def widen(line: int, limit: int) -> int:
        wide = slab
        while 2 * wide * size * itemsize <= line and rows * width(2 * wide) <= limit:
            wide = 2 * wide
        return min(groups, wide)

    slab = widen(_LINE, _SMALL_TILE)
    if rows * width(slab) <= limit:
        return finish("resident", rows, per_thread)
    loop_rows = min(rows, max(1, _LOOP_WARPS * 32 * _LOOP_PER_THREAD // width(slab)))
    if positions * slab * size * itemsize * reads <= _LOOP_BYTES:
        return finish("loop", loop_rows, _LOOP_PER_THREAD)
    rows = 1
    slab = widen(2 * _SECTOR, _SMALL_TILE)
    rows = max(1, _LOOP_WARPS * 32 * _LOOP_PER_THREAD // width(slab))
    blocks = triton.cdiv(positions, rows)
    sample_bytes = positions * channels * itemsize * reads
    # A sample that does not fit gains nothing from chunks, which cost two launches each.
    chunk = min(batch, _CHUNK_BYTES // sample_bytes) or batch
    wanted = triton.cdiv(_PROGRAMS, chunk * triton.cdiv(groups, slab))
    split_rows = rows * triton.cdiv(blocks, min(blocks, wanted, _MAX_SPLITS))
    return finish("split", rows, _LOOP_PER_THREAD, splits=triton.cdiv(positions, split_rows),
                  split_rows=split_rows, chunk=chunk)


@triton.jit
def _channels(slab, C: tl.constexpr, GROUPS: tl.constexpr, SLAB: tl.constexpr, COLS: tl.constexpr,
              GP: tl.constexpr):
    """Channels and groups of a slab, which of them exist, and which channel is in which group."""
    SIZE: tl.constexpr = C // GROUPS
    cols = tl.arange(0, COLS)
    channel = slab * (SLAB * SIZE) + cols
    exists = (cols < SLAB * SIZE) & (channel < C)
    group = slab * SLAB + tl.arange(0, GP)
    group_exists = (tl.arange(0, GP) < SLAB) & (group < GROUPS)
    member = ((cols // SIZE)[:, None] == tl.arange(0, GP)[None, :]) & exists[:, None]
    return channel, exists, group, group_exists, member


@triton.jit
def _group_sum(values, member):
    """[COLS] summed within groups: [GP]."""
    return tl.sum(tl.where(member, values[:, None], 0.0), 0)


@triton.jit
def _spread(values, member):
    """[GP] handed to the groups' channels: [COLS]."""
    return tl.sum(tl.where(member, values[None, :], 0.0), 1)


@triton.jit
def _affine(weight, bias, scale, shift, sample, channel, exists, C: tl.constexpr):
    """w and b of u = xhat w + b: [COLS] each."""
    w = tl.where(exists, 1.0, 0.0)
    b = tl.zeros_like(w)
    if weight is not None:
        w = tl.load(weight + channel, exists, other=0.0).to(tl.float32)
        b = tl.load(bias + channel, exists, other=0.0).to(tl.float32)
    if scale is not None:
        factor = 1 + tl.load(scale + sample * C + channel, exists, other=0.0).to(tl.float32)
        w = w * factor
        b = b * factor + tl.load(shift + sample * C + channel, exists, other=0.0).to(tl.float32)
    return w, b


@triton.jit
def _place(sample, row, channel, exists, HW: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr):
    """Start (int64), offsets and mask of the tile of positions row to row + ROWS."""
    rows = tl.arange(0, ROWS)[:, None]
    mask = (row + rows < HW) & exists[None, :]
    return (sample * HW + row) * C, rows * C + channel[None, :], mask


@triton.jit
def _load_v(x, add, sample, channel, exists, start, offset, mask, C: tl.constexpr):
    """x + add, rounded to the dtype of x, as float32."""
    v = tl.load(x + start + offset, mask, other=0.0).to(tl.float32)
    if add is not None:
        v += tl.load(add + sample * C + channel, exists, other=0.0).to(tl.float32)[None, :]
        v = v.to(x.dtype.element_ty).to(tl.float32)
    return v


@triton.jit
def _inverse(e, k):
    """1 / (k (1 + e)), for e from 0 to infinity: without what a division must guard."""
    h = tl.rsqrt(e * k + k)
    return h * h


@triton.jit
def _bits(key, stream, threshold, sample, row, channel, HW: tl.constexpr, C: tl.constexpr,
          ROWS: tl.constexpr, COLS: tl.constexpr):
    """`robustdm.ops.stream.dropout_mask` of a tile: one Philox call, and one byte, per row and
    eight channels, of which the first is the lowest bit."""
    CALLS: tl.constexpr = (C + 7) // 8
    seed = tl.load(key) + (tl.load(key + 1) << 32)
    first = ((tl.load(key + 2) + sample) * HW + row) * CALLS + tl.min(channel, 0) // 8
    site = first + (tl.arange(0, ROWS)[:, None] * CALLS + tl.arange(0, COLS // 8)[None, :])
    low, high = site.to(tl.int32), (site >> 32).to(tl.int32)
    zero = tl.zeros_like(low)
    w0, w1, w2, w3 = tl.philox(seed, low, high, zero + stream, zero + _LAYOUT)
    return (_pair(w0, threshold) + (_pair(w1, threshold) << 2)
            + (_pair(w2, threshold) << 4) + (_pair(w3, threshold) << 6))


@triton.jit
def _pair(word, threshold):
    low, high = (word & 0xFFFF).to(tl.int32), (word >> 16).to(tl.int32)
    return tl.where(low >= threshold, 1, 0) + tl.where(high >= threshold, 2, 0)


@triton.jit
def _place_bits(sample, row, channel, exists, HW: tl.constexpr, C: tl.constexpr,
                ROWS: tl.constexpr, COLS: tl.constexpr):
    """Offsets and mask of a tile's bytes."""
    CALLS: tl.constexpr = (C + 7) // 8
    rows, calls = tl.arange(0, ROWS)[:, None], tl.arange(0, COLS // 8)[None, :]
    first = tl.min(channel, 0) // 8
    used = tl.max(tl.reshape(exists.to(tl.int32), [COLS // 8, 8]), 1) > 0
    mask = (row + rows < HW) & used[None, :]
    return (sample * HW + row) * CALLS + first + (rows * CALLS + calls), mask


@triton.jit
def _kept(bits, ROWS: tl.constexpr, COLS: tl.constexpr):
    """[ROWS, COLS // 8] bytes to [ROWS, COLS] truths."""
    one = (1 << tl.arange(0, 8))[None, None, :]
    return tl.reshape((bits[:, :, None] & one) != 0, [ROWS, COLS])


@triton.jit
def _draw(keep, key, stream, threshold, sample, row, channel, exists, HW: tl.constexpr,
          C: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """A tile's bytes, stored; None without dropout."""
    bits = None
    if key is not None:
        bits = _bits(key, stream, threshold, sample, row, channel, HW, C, ROWS, COLS)
        at, found = _place_bits(sample, row, channel, exists, HW, C, ROWS, COLS)
        tl.store(keep + at, bits.to(tl.uint8), found)
    return bits


@triton.jit
def _write_y(y, bits, centred, w, b, start, offset, mask, inv_keep, SILU: tl.constexpr,
             ROWS: tl.constexpr, COLS: tl.constexpr):
    """y of a tile, from v - mean."""
    survive = 1 / inv_keep
    if SILU:
        # silu(u) = -z / (log2(e) (1 + 2^z)); what dropout divides by goes into the same constant.
        z = centred * (w * -_LOG2E)[None, :] + (b * -_LOG2E)[None, :]
        u = -z * _inverse(tl.exp2(z), _LOG2E * survive)
    else:
        u = centred * (w * inv_keep)[None, :] + (b * inv_keep)[None, :]
    if bits is not None:
        u = tl.where(_kept(bits, ROWS, COLS), u, 0.0)
    tl.store(y + start + offset, u.to(y.dtype.element_ty), mask)


@triton.jit
def _resident_forward_kernel(
    x, add,  # (B, S, C), (B, C)
    weight, bias, scale, shift, key,  # (C,), (C,), (B, C), (B, C), (3,) int64
    y, keep, mean_out, rstd_out,  # (B, S, C), (B, S, CALLS) uint8, (B, GROUPS), (B, GROUPS)
    stream, threshold, inv_keep, tiny,
    HW: tl.constexpr, C: tl.constexpr, GROUPS: tl.constexpr, SLAB: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, GP: tl.constexpr, SILU: tl.constexpr,
):
    SLABS: tl.constexpr = (GROUPS + SLAB - 1) // SLAB
    COUNT: tl.constexpr = HW * (C // GROUPS)
    sample = (tl.program_id(0) // SLABS).to(tl.int64)
    slab = tl.program_id(0) % SLABS
    channel, exists, group, group_exists, member = _channels(slab, C, GROUPS, SLAB, COLS, GP)
    start, offset, mask = _place(sample, 0, channel, exists, HW, C, ROWS)
    # Before v, so that the generator's registers are free when v takes them.
    bits = _draw(keep, key, stream, threshold, sample, 0, channel, exists, HW, C, ROWS, COLS)
    v = _load_v(x, add, sample, channel, exists, start, offset, mask, C)
    mean = _group_sum(tl.sum(tl.where(mask, v, 0.0), 0), member) / COUNT
    centred = tl.where(mask, v - _spread(mean, member)[None, :], 0.0)
    rstd = 1 / tl.sqrt(_group_sum(tl.sum(centred * centred, 0), member) / COUNT + tiny)
    tl.store(mean_out + sample * GROUPS + group, mean, group_exists)
    tl.store(rstd_out + sample * GROUPS + group, rstd, group_exists)
    w, b = _affine(weight, bias, scale, shift, sample, channel, exists, C)
    _write_y(y, bits, centred, w * _spread(rstd, member), b, start, offset, mask, inv_keep, SILU,
             ROWS, COLS)


@triton.jit
def _statistics(x, add, sample, begin, channel, exists, member, HW: tl.constexpr, C: tl.constexpr,
                GROUPS: tl.constexpr, LENGTH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Mean and sum of squared deviations of groups over positions begin to begin + LENGTH.

    Every element of the tile keeps the running mean and deviation of the positions it has seen
    (Welford); they are merged once, after the loop.
    """
    mean = tl.zeros([ROWS, COLS], tl.float32)
    squares = tl.zeros([ROWS, COLS], tl.float32)
    seen = tl.zeros([ROWS, 1], tl.float32)
    for step in tl.range(0, LENGTH, ROWS, disable_licm=True):
        row = begin + step
        start, offset, mask = _place(sample, row, channel, exists, HW, C, ROWS)
        v = _load_v(x, add, sample, channel, exists, start, offset, mask, C)
        seen += tl.where(row + tl.arange(0, ROWS)[:, None] < HW, 1.0, 0.0)
        change = tl.where(mask, v - mean, 0.0)
        mean += change * (1 / tl.maximum(seen, 1.0))
        squares += change * tl.where(mask, v - mean, 0.0)
    count = tl.sum(tl.sum(seen, 1), 0) * (C // GROUPS)
    group_mean = _group_sum(tl.sum(mean * seen, 0), member) / count
    deviation = mean - _spread(group_mean, member)[None, :]
    squares += tl.where(exists[None, :], deviation * deviation * seen, 0.0)
    return group_mean, _group_sum(tl.sum(squares, 0), member)


@triton.jit
def _apply(x, add, y, keep, sample, begin, channel, exists, mean, w, b, key, stream, threshold,
           inv_keep, HW: tl.constexpr, C: tl.constexpr, LENGTH: tl.constexpr, SILU: tl.constexpr,
           ROWS: tl.constexpr, COLS: tl.constexpr):
    """y of positions begin to begin + LENGTH."""
    for step in tl.range(0, LENGTH, ROWS, disable_licm=True):
        row = begin + step
        start, offset, mask = _place(sample, row, channel, exists, HW, C, ROWS)
        v = _load_v(x, add, sample, channel, exists, start, offset, mask, C)
        bits = _draw(keep, key, stream, threshold, sample, row, channel, exists, HW, C, ROWS, COLS)
        _write_y(y, bits, v - mean[None, :], w, b, start, offset, mask, inv_keep, SILU, ROWS, COLS)


@triton.jit
def _loop_forward_kernel(
    x, add, weight, bias, scale, shift, key, y, keep, mean_out, rstd_out,
    stream, threshold, inv_keep, tiny,
    HW: tl.constexpr, C: tl.constexpr, GROUPS: tl.constexpr, SLAB: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, GP: tl.constexpr, SILU: tl.constexpr,
):
    """As `_resident_forward_kernel`; the second read hits the cache."""
    SLABS: tl.constexpr = (GROUPS + SLAB - 1) // SLAB
    sample = (tl.program_id(0) // SLABS).to(tl.int64)
    slab = tl.program_id(0) % SLABS
    channel, exists, group, group_exists, member = _channels(slab, C, GROUPS, SLAB, COLS, GP)
    mean, squares = _statistics(x, add, sample, 0, channel, exists, member, HW, C, GROUPS, HW, ROWS,
                                COLS)
    rstd = 1 / tl.sqrt(squares / (HW * (C // GROUPS)) + tiny)
    tl.store(mean_out + sample * GROUPS + group, mean, group_exists)
    tl.store(rstd_out + sample * GROUPS + group, rstd, group_exists)
    w, b = _affine(weight, bias, scale, shift, sample, channel, exists, C)
    mean, w = _spread(mean, member), w * _spread(rstd, member)
    _apply(x, add, y, keep, sample, 0, channel, exists, mean, w, b, key, stream, threshold,
           inv_keep, HW, C, HW, SILU, ROWS, COLS)


@triton.jit(do_not_specialize=["first_sample"])
def _split_statistics_kernel(
    x, add, partial,  # partial: (B, SPLITS, GROUPS, 2) mean, squares
    first_sample,
    HW: tl.constexpr, C: tl.constexpr, GROUPS: tl.constexpr, SLAB: tl.constexpr,
    SPLITS: tl.constexpr, LENGTH: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, GP: tl.constexpr,
):
    SLABS: tl.constexpr = (GROUPS + SLAB - 1) // SLAB
    sample = first_sample + (tl.program_id(0) // (SLABS * SPLITS)).to(tl.int64)
    split = tl.program_id(0) // SLABS % SPLITS
    slab = tl.program_id(0) % SLABS
    channel, exists, group, group_exists, member = _channels(slab, C, GROUPS, SLAB, COLS, GP)
    mean, squares = _statistics(x, add, sample, split * LENGTH, channel, exists, member, HW, C,
                                GROUPS, LENGTH, ROWS, COLS)
    at = partial + ((sample * SPLITS + split) * GROUPS + group) * 2
    tl.store(at, mean, group_exists)
    tl.store(at + 1, squares, group_exists)


@triton.jit(do_not_specialize=["first_sample"])
def _split_apply_kernel(
    x, add, weight, bias, scale, shift, key, partial, y, keep, mean_out, rstd_out,
    stream, threshold, inv_keep, tiny, first_sample,
    HW: tl.constexpr, C: tl.constexpr, GROUPS: tl.constexpr, SLAB: tl.constexpr,
    SPLITS: tl.constexpr, SPLITS_P: tl.constexpr, LENGTH: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, GP: tl.constexpr, SILU: tl.constexpr,
):
    SLABS: tl.constexpr = (GROUPS + SLAB - 1) // SLAB
    sample = first_sample + (tl.program_id(0) // (SLABS * SPLITS)).to(tl.int64)
    split = tl.program_id(0) // SLABS % SPLITS
    slab = tl.program_id(0) % SLABS
    channel, exists, group, group_exists, member = _channels(slab, C, GROUPS, SLAB, COLS, GP)
    splits = tl.arange(0, SPLITS_P)[:, None]
    found = (splits < SPLITS) & group_exists[None, :]
    at = partial + ((sample * SPLITS + splits) * GROUPS + group[None, :]) * 2
    means, squares = tl.load(at, found, other=0.0), tl.load(at + 1, found, other=0.0)
    length = tl.maximum(tl.minimum(HW - splits * LENGTH, LENGTH), 0).to(tl.float32)
    mean = tl.sum(means * length, 0) / HW
    deviation = tl.where(found, means - mean[None, :], 0.0)
    squares += deviation * deviation * (length * (C // GROUPS))
    rstd = 1 / tl.sqrt(tl.sum(squares, 0) / (HW * (C // GROUPS)) + tiny)
    if split == 0:
        tl.store(mean_out + sample * GROUPS + group, mean, group_exists)
        tl.store(rstd_out + sample * GROUPS + group, rstd, group_exists)
    w, b = _affine(weight, bias, scale, shift, sample, channel, exists, C)
    _apply(x, add, y, keep, sample, split * LENGTH, channel, exists, _spread(mean, member),
           w * _spread(rstd, member), b, key, stream, threshold, inv_keep,
           HW, C, LENGTH, SILU, ROWS, COLS)


@triton.jit
def _tile_gradient(dy, x, add, sample, row, channel, exists, mean, w, b, start, offset, mask,
                   keep, inv_keep, HW: tl.constexpr, C: tl.constexpr,
                   SILU: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """du of a tile without dropout's factor, and its v - mean, or v if mean is None; u = w times
    that, + b."""
    v = _load_v(x, add, sample, channel, exists, start, offset, mask, C)
    du = tl.load(dy + start + offset, mask, other=0.0).to(tl.float32)
    if mean is not None:
        v -= mean[None, :]
    if keep is not None:
        at, found = _place_bits(sample, row, channel, exists, HW, C, ROWS, COLS)
        bits = tl.load(keep + at, found, other=0).to(tl.int32)
        du = tl.where(_kept(bits, ROWS, COLS), du, 0.0)
    if SILU:
        # With z = -log2(e) u, silu'(u) = gate (1 + z log(2) (gate - 1)).
        z = v * (w * -_LOG2E)[None, :] + (b * -_LOG2E)[None, :]
        gate = _inverse(tl.exp2(z), 1.0)
        du *= gate + z * (gate * _LOG2 - _LOG2) * gate
    return du, v


@triton.jit
def _write_dx(dx_out, du, v, w, a, q, start, offset, mask):
    dx = du * w[None, :] - a[None, :] - v * q[None, :]
    tl.store(dx_out + start + offset, dx.to(dx_out.dtype.element_ty), mask)
    return tl.where(mask, dx, 0.0)


@triton.jit
def _sample_constants(mean, rstd, weight, bias, scale, shift, sample, channel, exists,
                      C: tl.constexpr, GROUPS: tl.constexpr):
    """mean, rstd, w rstd and b of channels."""
    own = sample * GROUPS + channel // (C // GROUPS)
    r = tl.load(rstd + own, exists, other=0.0)
    w, b = _affine(weight, bias, scale, shift, sample, channel, exists, C)
    return tl.load(mean + own, exists, other=0.0), r, w * r, b


@triton.jit
def _backward_kernel(
    dy, x, add, mean, rstd, weight, bias, scale, shift, keep, dx_out,
    sums,  # (B, C, 3)
    inv_keep,
    HW: tl.constexpr, C: tl.constexpr, GROUPS: tl.constexpr, SLAB: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, GP: tl.constexpr, SILU: tl.constexpr,
):
    """Resident if the tile holds all positions; else the second read hits the cache."""
    SLABS: tl.constexpr = (GROUPS + SLAB - 1) // SLAB
    COUNT: tl.constexpr = HW * (C // GROUPS)
    sample = (tl.program_id(0) // SLABS).to(tl.int64)
    slab = tl.program_id(0) % SLABS
    channel, exists, group, group_exists, member = _channels(slab, C, GROUPS, SLAB, COLS, GP)
    m, r, w, b = _sample_constants(mean, rstd, weight, bias, scale, shift, sample, channel, exists,
                                   C, GROUPS)
    if ROWS >= HW:
        start, offset, mask = _place(sample, 0, channel, exists, HW, C, ROWS)
        du, centred = _tile_gradient(dy, x, add, sample, 0, channel, exists, m, w, b, start, offset,
                                     mask, keep, inv_keep, HW, C, SILU,
                                     ROWS, COLS)
        sum_du, sum_du_xhat = tl.sum(du, 0) * inv_keep, tl.sum(du * centred, 0) * (r * inv_keep)
    else:
        sum_du, sum_du_xhat = _gradient_sums(
            dy, x, add, sample, 0, channel, exists, m, r, w, b, keep, inv_keep,
            HW, C, HW, SILU, ROWS, COLS)
    if sums is not None:  # now, so that they need no registers any longer
        tl.store(sums + (sample * C + channel) * 3, sum_du, exists)
        tl.store(sums + (sample * C + channel) * 3 + 1, sum_du_xhat, exists)
    a = _spread(_group_sum(sum_du * w, member), member) / COUNT
    q = _spread(_group_sum(sum_du_xhat * w, member), member) * r / COUNT
    if ROWS >= HW:
        sum_dx = tl.sum(_write_dx(dx_out, du, centred, w * inv_keep, a, q, start, offset, mask), 0)
    else:
        sum_dx = _apply_gradient(
            dy, x, add, dx_out, sample, 0, channel, exists, m, w, b, a, q, keep, inv_keep, HW, C,
            HW, SILU, ROWS, COLS)
    if sums is not None:
        tl.store(sums + (sample * C + channel) * 3 + 2, sum_dx, exists)


@triton.jit
def _gradient_sums(dy, x, add, sample, begin, channel, exists, mean, rstd, w, b, keep, inv_keep,
                   HW: tl.constexpr, C: tl.constexpr, LENGTH: tl.constexpr, SILU: tl.constexpr,
                   ROWS: tl.constexpr, COLS: tl.constexpr):
    """Sums of du and du xhat over positions begin to begin + LENGTH, per channel."""
    sum_du = tl.zeros([ROWS, COLS], tl.float32)
    sum_du_centred = tl.zeros([ROWS, COLS], tl.float32)
    for step in tl.range(0, LENGTH, ROWS, disable_licm=True):
        row = begin + step
        start, offset, mask = _place(sample, row, channel, exists, HW, C, ROWS)
        du, centred = _tile_gradient(dy, x, add, sample, row, channel, exists, mean, w, b, start,
                                     offset, mask, keep, inv_keep, HW, C, SILU,
                                     ROWS, COLS)
        sum_du += du
        sum_du_centred += du * centred
    return tl.sum(sum_du, 0) * inv_keep, tl.sum(sum_du_centred, 0) * (rstd * inv_keep)


@triton.jit
def _apply_gradient(dy, x, add, dx_out, sample, begin, channel, exists, mean, w, b, a, q, keep,
                    inv_keep, HW: tl.constexpr, C: tl.constexpr, LENGTH: tl.constexpr,
                    SILU: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """dx of positions begin to begin + LENGTH, and its sum per channel."""
    # Without v - mean, a thread holds fewer constants per channel.
    b -= mean * w
    a -= mean * q
    sum_dx = tl.zeros([ROWS, COLS], tl.float32)
    for step in tl.range(0, LENGTH, ROWS, disable_licm=True):
        row = begin + step
        start, offset, mask = _place(sample, row, channel, exists, HW, C, ROWS)
        du, v = _tile_gradient(dy, x, add, sample, row, channel, exists, None, w, b, start,
                                     offset, mask, keep, inv_keep, HW, C, SILU,
                                     ROWS, COLS)
        sum_dx += _write_dx(dx_out, du, v, w * inv_keep, a, q, start, offset, mask)
    return tl.sum(sum_dx, 0)


@triton.jit(do_not_specialize=["first_sample"])
def _split_sums_kernel(
    dy, x, add, mean, rstd, weight, bias, scale, shift, keep,
    partial, sums,  # (B, SPLITS, GROUPS, 2) group sums of w du, w du xhat; (B, SPLITS, C, 3)
    inv_keep, first_sample,
    HW: tl.constexpr, C: tl.constexpr, GROUPS: tl.constexpr, SLAB: tl.constexpr,
    SPLITS: tl.constexpr, LENGTH: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, GP: tl.constexpr, SILU: tl.constexpr,
):
    SLABS: tl.constexpr = (GROUPS + SLAB - 1) // SLAB
    sample = first_sample + (tl.program_id(0) // (SLABS * SPLITS)).to(tl.int64)
    split = tl.program_id(0) // SLABS % SPLITS
    slab = tl.program_id(0) % SLABS
    channel, exists, group, group_exists, member = _channels(slab, C, GROUPS, SLAB, COLS, GP)
    m, r, w, b = _sample_constants(mean, rstd, weight, bias, scale, shift, sample, channel, exists,
                                   C, GROUPS)
    sum_du, sum_du_xhat = _gradient_sums(
        dy, x, add, sample, split * LENGTH, channel, exists, m, r, w, b, keep, inv_keep, HW, C,
        LENGTH, SILU, ROWS, COLS)
    at = partial + ((sample * SPLITS + split) * GROUPS + group) * 2
    tl.store(at, _group_sum(sum_du * w, member), group_exists)
    tl.store(at + 1, _group_sum(sum_du_xhat * w, member), group_exists)
    if sums is not None:
        at = sums + ((sample * SPLITS + split) * C + channel) * 3
        tl.store(at, sum_du, exists)
        tl.store(at + 1, sum_du_xhat, exists)


@triton.jit(do_not_specialize=["first_sample"])
def _split_gradient_kernel(
    dy, x, add, mean, rstd, weight, bias, scale, shift, keep, partial, dx_out, sums,
    inv_keep, first_sample,
    HW: tl.constexpr, C: tl.constexpr, GROUPS: tl.constexpr, SLAB: tl.constexpr,
    SPLITS: tl.constexpr, SPLITS_P: tl.constexpr, LENGTH: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, GP: tl.constexpr, SILU: tl.constexpr,
):
    SLABS: tl.constexpr = (GROUPS + SLAB - 1) // SLAB
    COUNT: tl.constexpr = HW * (C // GROUPS)
    sample = first_sample + (tl.program_id(0) // (SLABS * SPLITS)).to(tl.int64)
    split = tl.program_id(0) // SLABS % SPLITS
    slab = tl.program_id(0) % SLABS
    channel, exists, group, group_exists, member = _channels(slab, C, GROUPS, SLAB, COLS, GP)
    m, r, w, b = _sample_constants(mean, rstd, weight, bias, scale, shift, sample, channel, exists,
                                   C, GROUPS)
    splits = tl.arange(0, SPLITS_P)[:, None]
    found = (splits < SPLITS) & group_exists[None, :]
    at = partial + ((sample * SPLITS + splits) * GROUPS + group[None, :]) * 2
    a = _spread(tl.sum(tl.load(at, found, other=0.0), 0), member) / COUNT
    q = _spread(tl.sum(tl.load(at + 1, found, other=0.0), 0), member) * r / COUNT
    sum_dx = _apply_gradient(
        dy, x, add, dx_out, sample, split * LENGTH, channel, exists, m, w, b, a, q, keep, inv_keep,
        HW, C, LENGTH, SILU, ROWS, COLS)
    if sums is not None:
        tl.store(sums + ((sample * SPLITS + split) * C + channel) * 3 + 2, sum_dx, exists)


def _on(x: Tensor):
    """Triton launches on the current device, whatever device the tensors are on."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _random(key: Tensor | None, layer: int, dropout: float):
    """key, stream, threshold, inv_keep; a key of None means no dropout."""
    if not dropout:
        return None, 0, 0, 1.0
    return key, _STREAM + 256 * layer, round(65536 * dropout), 1 / (1 - dropout)


def new_keep(x: Tensor) -> Tensor:
    """Room for dropout's bits, one per element: (B, positions, ceil(C / 8)) uint8."""
    batch, positions, channels = _shape(x)
    return x.new_empty((batch, positions, -(-channels // 8)), dtype=torch.uint8)


def _shape(x: Tensor) -> tuple[int, int, int]:
    return x.shape[0], math.prod(x.shape[2:]), x.shape[1]


def _constants(cut: Plan, shape: tuple[int, int, int], groups: int) -> dict:
    """Compile-time arguments that all kernels share, and num_warps."""
    return dict(
        HW=shape[1], C=shape[2], GROUPS=groups, SLAB=cut.slab, ROWS=cut.rows, COLS=cut.cols,
        GP=triton.next_power_of_2(cut.slab), num_warps=cut.num_warps,
    )


def group_norm_act_forward(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, scale: Tensor | None,
    shift: Tensor | None, add: Tensor | None, silu: bool, dropout: float, key: Tensor | None,
    layer: int, tiny: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the forward.

    Args:
        x: (B, C, *spatial) with channels-last strides.
        weight, bias, scale, shift, add, silu, dropout, key, layer, tiny: as in
            `robustdm.ops.reference.group_norm_act`; contiguous.

    Returns:
        y like x; keep (B, positions, ceil(C / 8)) uint8, a bit per element that dropout kept, empty
        without dropout; mean and rstd (B, groups) float32.
    """
    shape = batch, _, _ = _shape(x)
    y = torch.empty_like(x)
    keep = new_keep(x) if dropout else x.new_empty(0, dtype=torch.uint8)
    mean = x.new_empty((batch, groups), dtype=torch.float32)
    rstd = x.new_empty((batch, groups), dtype=torch.float32)
    if x.numel() == 0:
        return y, keep, mean, rstd
    key, *rest = _random(key, layer, dropout)
    cut = plan(shape, groups, x.element_size(), 1, _RESIDENT_FORWARD, _FORWARD_PER_THREAD)
    constants = _constants(cut, shape, groups)
    affine = weight, bias, scale, shift, key
    with _on(x):
        if cut.path != "split":
            kernel = (
                _resident_forward_kernel if cut.path == "resident" else _loop_forward_kernel
            )
            kernel[(batch * cut.slabs,)](
                x, add, *affine, y, keep, mean, rstd, *rest, tiny, SILU=silu, **constants
            )
            return y, keep, mean, rstd
        constants |= dict(SPLITS=cut.splits, LENGTH=cut.split_rows)
        partial = x.new_empty((batch, cut.splits, groups, 2), dtype=torch.float32)
        for first in range(0, batch, cut.chunk):
            grid = (min(cut.chunk, batch - first) * cut.slabs * cut.splits,)
            _split_statistics_kernel[grid](x, add, partial, first, **constants)
            _split_apply_kernel[grid](
                x, add, *affine, partial, y, keep, mean, rstd, *rest, tiny, first,
                SPLITS_P=triton.next_power_of_2(cut.splits), SILU=silu, **constants,
            )
    return y, keep, mean, rstd


def group_norm_act_backward(
    dy: Tensor, x: Tensor, keep: Tensor, mean: Tensor, rstd: Tensor, groups: int,
    weight: Tensor | None, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None,
    add: Tensor | None, silu: bool, dropout: float, key: Tensor | None, layer: int,
    need_sums: bool,
) -> tuple[Tensor, Tensor]:
    """Launch the backward.

    Args:
        dy: gradient with respect to y; channels-last strides, as is x.
        keep, mean, rstd: from the forward.
        key, layer: unused here, as ``keep`` holds the mask.
        need_sums: whether anything but dx is wanted.

    Returns:
        dx like x, and (B, C, 3) float32 sums over positions of du, du xhat and dx, or an empty
        tensor without ``need_sums``.
    """
    shape = batch, _, channels = _shape(x)
    dx = torch.empty_like(x)
    sums = x.new_empty((batch, channels, 3) if need_sums else 0, dtype=torch.float32)
    if x.numel() == 0:
        return dx, sums.zero_()
    inv_keep = 1 / (1 - dropout)
    cut = plan(shape, groups, x.element_size(), 2, _RESIDENT_BACKWARD, _BACKWARD_PER_THREAD)
    constants = _constants(cut, shape, groups) | dict(SILU=silu)
    inputs = dy, x, add, mean, rstd, weight, bias, scale, shift, keep if dropout else None
    with _on(x):
        if cut.path != "split":
            _backward_kernel[(batch * cut.slabs,)](
                *inputs, dx, sums if need_sums else None, inv_keep, **constants
            )
            return dx, sums
        constants |= dict(SPLITS=cut.splits, LENGTH=cut.split_rows)
        partial = x.new_empty((batch, cut.splits, groups, 2), dtype=torch.float32)
        parts = None
        if need_sums:
            parts = x.new_empty((batch, cut.splits, channels, 3), dtype=torch.float32)
        for first in range(0, batch, cut.chunk):
            grid = (min(cut.chunk, batch - first) * cut.slabs * cut.splits,)
            _split_sums_kernel[grid](*inputs, partial, parts, inv_keep, first, **constants)
            _split_gradient_kernel[grid](
                *inputs, partial, dx, parts, inv_keep, first,
                SPLITS_P=triton.next_power_of_2(cut.splits), **constants,
            )
        return dx, parts.sum(1) if need_sums else sums
