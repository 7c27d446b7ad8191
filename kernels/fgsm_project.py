"""One sign-gradient step from the random start, projected to the ball, and the batch it moves.

    delta = clamp(delta_ran + r / sqrt3 sign(gradient), -r, r)        x_adv = x_t + noise delta

(Briglia et al. 2026, Eq. 8.) delta_ran comes from the stream of `philox.py`, so that it is never
stored. Zeros in the gradient move nothing, NaN stays NaN. Specification:
`robustdm.ops.reference.fgsm_project`.

Bytes per element: read gradient and x_t, write x_adv and delta; 16 in float32, 8 in half precision.
Outwards, without a gradient, 12 and 6.
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

INVERSE_SQRT3 = tl.constexpr(3**-0.5)


@triton.jit(do_not_specialize=["batch"])  # a last batch may be smaller
def _fgsm_project_kernel(
    xt, gradient,  # (B, numel) in the order of memory; without a gradient the step is outwards
    noise, radius,  # (B,) float32
    key,  # (3,) int64
    x_adv, delta,  # like xt
    batch, numel, calls, area,
    CHANNELS: tl.constexpr, QUADS: tl.constexpr, VECTOR: tl.constexpr, ALIGNED: tl.constexpr,
):
    sample = this_sample()
    if sample >= batch:
        return
    offsets, inside = memory_offsets(sample, numel, area, CHANNELS, QUADS, VECTOR, ALIGNED)
    x = tl.load(xt + offsets, inside).to(tl.float32)
    if gradient is not None:
        direction = tl.load(gradient + offsets, inside).to(tl.float32)
    _, unit = element_noise(key, sample, calls, QUADS, VECTOR, ALIGNED)
    noise_here, limit = tl.load(noise + sample), tl.load(radius + sample)
    start = (limit * unit).to(xt.dtype.element_ty).to(tl.float32)
    if gradient is None:
        direction = start

    # sign(direction) * step without the product; zero and NaN pass through.
    step = limit * INVERSE_SQRT3
    step = tl.where(direction > 0, step, tl.where(direction < 0, -step, direction))
    moved = tl.maximum(start + step, -limit, propagate_nan=tl.PropagateNan.ALL)
    moved = tl.minimum(moved, limit, propagate_nan=tl.PropagateNan.ALL)
    moved = moved.to(delta.dtype.element_ty)
    tl.store(delta + offsets, moved, inside)
    tl.store(
        x_adv + offsets, (x + noise_here * moved.to(tl.float32)).to(x_adv.dtype.element_ty), inside
    )


def fgsm_project(
    xt: torch.Tensor, gradient: torch.Tensor | None, noise: torch.Tensor, radius: torch.Tensor,
    key: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `robustdm.ops.reference.fgsm_project`, in one launch.

    Args:
        xt: (B, ...) float, dense: contiguous or channels-last.
        gradient: (B, ...) of any float dtype in the memory format of xt; None steps outwards.
        noise, radius: (B,) float32 contiguous.
        key: (3,) int64: seed, step, first_index.

    Returns:
        x_adv and delta, in the dtype and memory format of xt.
    """
    x_adv, delta = torch.empty_like(xt), torch.empty_like(xt)
    if xt.numel() == 0:
        return x_adv, delta
    numel, channels = xt.numel() // len(xt), stream_channels(xt)
    grid, calls, constants = plan(xt, channels)
    with torch.cuda.device_of(xt):
        _fgsm_project_kernel[grid](
            xt, gradient, noise, radius, key, x_adv, delta, len(xt), numel, calls,
            numel // channels, CHANNELS=channels, **constants, enable_fp_fusion=False,
        )
    return x_adv, delta
