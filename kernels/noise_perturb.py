"""Diffuse a batch and perturb it at random, with all noise made in registers.

    x_t = signal x0 + noise eps        x_ran = x_t + noise delta_ran        (Briglia et al., Eq. 7)

eps is standard normal, delta_ran uniform in the l-inf ball of ``radius``, both from the stream of
`philox.py`. Specification: `robustdm.ops.reference.noise_perturb`.

Bytes per element: read x0, write x_t and x_ran; 12 in float32, 6 in half precision.
"""

import torch
import triton
import triton.language as tl

from robustdm.kernels.philox import (
    element_noise,
    memory_offsets,
    plan,
    stream_channels,
    this_sample,
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
