"""Diffuse a batch and perturb it at random, with all noise made in registers.

    x_t = signal x0 + noise eps        x_ran = x_t + noise delta_ran        (Briglia et al., Eq. 7)

eps is standard normal, delta_ran uniform in the l-inf ball of ``radius``, both from the stream of
`philox.py`. x0 is (B, ...), or rows of a resident uint8 set (N, C, H, W) that are normalised,
corrupted and flipped on the way. Specification: `robustdm.ops.reference.noise_perturb` and
`load_resident`.

Bytes per element: read x0, write x_t and x_ran; 12 in float32, 6 in half precision, 9 and 5 from
a resident set.
"""

import torch
import triton
import triton.language as tl

from robustdm.kernels.philox import (
    CORRUPT_CHOICE,
    CORRUPT_NOISE,
    FLIP,
    box_muller_length,
    element_noise,
    memory_offsets,
    plan,
    read_key,
    sine_cosine,
    stream_channels,
    this_sample,
    uniform,
    words,
)


@triton.jit
def _diffuse_and_store(
    x, eps, unit, signal, noise, radius, xt, x_ran, offsets, inside
):
    noisy = tl.fma(noise, eps, signal * x).to(xt.dtype.element_ty)
    delta = (radius * unit).to(xt.dtype.element_ty).to(tl.float32)
    tl.store(xt + offsets, noisy, inside)
    moved = tl.fma(noise, delta, noisy.to(tl.float32))
    tl.store(x_ran + offsets, moved.to(x_ran.dtype.element_ty), inside)


@triton.jit
def _data_words(seed, index, stream):
    # Step 0: the data set's own noise is the same in every step.
    step = tl.full((), 0, tl.uint32)
    return words(
        tl.cast(seed, tl.uint32), step, index.to(tl.uint32), (index >> 32).to(tl.uint32), stream
    )


@triton.jit
def _corruption(seed, index):
    w0, w1, _, _ = _data_words(seed, index, CORRUPT_NOISE)
    _, cosine = sine_cosine(w1)
    return box_muller_length(w0) * cosine


@triton.jit(do_not_specialize=["batch"])  # a last batch may be smaller
def _noise_perturb_kernel(
    x0,  # (B, numel) in the order of memory
    signal, noise, radius,  # (B,) float32
    key,  # (3,) int64
    xt, x_ran,  # like x0
    batch, numel, calls, area,
    CHANNELS: tl.constexpr, QUADS: tl.constexpr, VECTOR: tl.constexpr, ALIGNED: tl.constexpr,
):
    sample = this_sample()
    if sample >= batch:
        return
    offsets, inside = memory_offsets(sample, numel, area, CHANNELS, QUADS, VECTOR, ALIGNED)
    x = tl.load(x0 + offsets, inside).to(tl.float32)
    eps, unit = element_noise(key, sample, calls, QUADS, VECTOR, ALIGNED)
    _diffuse_and_store(
        x, eps, unit, tl.load(signal + sample), tl.load(noise + sample),
        tl.load(radius + sample), xt, x_ran, offsets, inside,
    )


@triton.jit(do_not_specialize=["batch"])  # a last batch may be smaller
def _noise_perturb_resident_kernel(
    data,  # (N, C, H, W) uint8, contiguous or channels-last
    items,  # (B,) int64
    signal, noise, radius,  # (B,) float32
    key,  # (3,) int64
    xt, x_ran,  # (B, H, W, C)
    batch, numel, calls, corrupt_seed, corrupt_fraction, corrupt_sigma,
    CHANNELS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    DATA_CHANNELS_LAST: tl.constexpr, FLIPS: tl.constexpr, CORRUPTS: tl.constexpr,
    QUADS: tl.constexpr, VECTOR: tl.constexpr, ALIGNED: tl.constexpr,
):
    sample = this_sample()
    if sample >= batch:
        return
    offsets, inside = memory_offsets(sample, numel, 0, 1, QUADS, VECTOR, ALIGNED)
    item = tl.load(items + sample)
    seed, step, first_index = read_key(key)

    # Where each element comes from, in channels-last and in contiguous order.
    source = tl.program_id(0) * (4 * QUADS) + tl.arange(0, 4 * QUADS)
    if FLIPS:
        who = first_index + sample
        word, _, _, _ = words(seed, step, who.to(tl.uint32), (who >> 32).to(tl.uint32), FLIP)
        column = (source // CHANNELS) % WIDTH
        flipped = source + (WIDTH - 1 - 2 * column) * CHANNELS
        source = tl.where(uniform(word) < 0.5, flipped, source)
    contiguous = (source % CHANNELS) * (HEIGHT * WIDTH) + source // CHANNELS
    place = source if DATA_CHANNELS_LAST else contiguous

    byte = tl.load(data + item * numel + place, inside).to(tl.float32)
    # byte / 127.5 in two products instead of a division: the first is exact, and the sum is rounded
    # to the very quotient for each of the 256 bytes (tested).
    x = tl.fma(byte, 0.007843017578125, byte * 1.1967678e-07) - 1.0
    if CORRUPTS:
        chosen, _, _, _ = _data_words(corrupt_seed, item, CORRUPT_CHOICE)
        # One item in many: the branch spares a call of the generator for each element.
        if uniform(chosen) < corrupt_fraction:
            index = item * numel + contiguous
            x = x + corrupt_sigma * _corruption(corrupt_seed, index)

    eps, unit = element_noise(key, sample, calls, QUADS, VECTOR, ALIGNED)
    _diffuse_and_store(
        x, eps, unit, tl.load(signal + sample), tl.load(noise + sample),
        tl.load(radius + sample), xt, x_ran, offsets, inside,
    )


def noise_perturb(
    x0: torch.Tensor, signal: torch.Tensor, noise: torch.Tensor, radius: torch.Tensor,
    key: torch.Tensor, dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `robustdm.ops.reference.noise_perturb`, in one launch.

    Args:
        x0: (B, ...) float, dense: contiguous or channels-last.
        signal, noise, radius: (B,) float32 contiguous.
        key: (3,) int64: seed, step, first_index.
        dtype: of both results.

    Returns:
        x_t and x_ran in the memory format of x0.
    """
    xt, x_ran = torch.empty_like(x0, dtype=dtype), torch.empty_like(x0, dtype=dtype)
    if x0.numel() == 0:
        return xt, x_ran
    numel, channels = x0.numel() // len(x0), stream_channels(x0)
    grid, calls, constants = plan(xt, channels)
    with torch.cuda.device_of(x0):
        _noise_perturb_kernel[grid](
            x0, signal, noise, radius, key, xt, x_ran, len(x0), numel, calls, numel // channels,
            CHANNELS=channels, **constants, enable_fp_fusion=False,
        )
    return xt, x_ran


def noise_perturb_resident(
    data: torch.Tensor, items: torch.Tensor, signal: torch.Tensor, noise: torch.Tensor,
    radius: torch.Tensor, key: torch.Tensor, dtype: torch.dtype, flip: bool,
    corrupt_fraction: float, corrupt_sigma: float, corrupt_seed: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`noise_perturb` of `robustdm.ops.reference.load_resident`, in one launch.

    Args:
        data: (N, C, H, W) uint8, dense: contiguous or channels-last.
        items: (B,) int64 rows of ``data``.
        signal, noise, radius: (B,) float32 contiguous.
        key: (3,) int64: seed, step, first_index.
        dtype: of both results.
        flip: mirror left to right where the step's draw says so.
        corrupt_fraction, corrupt_sigma, corrupt_seed: the set's one noisy realisation.

    Returns:
        x_t and x_ran, (B, C, H, W) with channels-last strides.
    """
    channels, height, width = data.shape[1:]
    shape, layout = (len(items), channels, height, width), torch.channels_last
    xt = torch.empty(shape, dtype=dtype, device=data.device, memory_format=layout)
    x_ran = torch.empty_like(xt)
    if xt.numel() == 0:
        return xt, x_ran
    numel = channels * height * width
    grid, calls, constants = plan(xt, 1)
    corrupts = corrupt_fraction > 0 and corrupt_sigma > 0
    if corrupts:
        # A call of the generator for each element, too: half the elements a thread, or it spills.
        constants["num_warps"] *= 2
    with torch.cuda.device_of(xt):
        _noise_perturb_resident_kernel[grid](
            data, items, signal, noise, radius, key, xt, x_ran, len(items), numel, calls,
            corrupt_seed, corrupt_fraction, corrupt_sigma,
            CHANNELS=channels, HEIGHT=height, WIDTH=width,
            DATA_CHANNELS_LAST=stream_channels(data) == 1, FLIPS=bool(flip),
            CORRUPTS=corrupts, **constants,
            enable_fp_fusion=False,
        )
    return xt, x_ran
