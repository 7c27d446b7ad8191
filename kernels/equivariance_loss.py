"""The equivariance loss per sample, and in the same pass its gradients by both predictions.

    fit = mean (o - eps)^2        res = o' - o - delta        reg = lambda_t mean res^2
    total = mean over the batch of (fit + reg)
    d total / d o  = 2 / (B d) ((o - eps) - lambda_t res)
    d total / d o' = 2 / (B d) lambda_t res

(Briglia et al. 2026, Eq. 6; Ho et al. 2020, Eq. 14.) o and o' are the predictions at x_t and at the
perturbed batch, d the number of elements of a sample. eps, and delta where it is the random start,
come from the stream of `philox.py`. Specification: `robustdm.ops.reference.equivariance_loss`.

Bytes per element: read o, o' and delta, write two gradients; 20 in float32, 10 in bfloat16. The
sums are made in two stages in a fixed order, hence are the same from run to run.
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

# Partial sums that the second stage holds at once: 8 in each of 256 threads.
TILE = 2048
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit(do_not_specialize=["batch"])  # a last batch may be smaller
def _equivariance_loss_kernel(
    eps_pred, eps_pred_adv, delta,  # (B, numel) in the order of memory; the last two may be None
    radius, lambda_t,  # (B,) float32
    key,  # (3,) int64
    grad, grad_adv,  # like eps_pred
    partials,  # (2, B, blocks) float32: sums of (o - eps)^2 and of res^2
    batch, numel, calls, area, scale,
    CHANNELS: tl.constexpr, QUADS: tl.constexpr, VECTOR: tl.constexpr, ALIGNED: tl.constexpr,
    DTYPE: tl.constexpr, INVARIANCE: tl.constexpr, DETACH_CLEAN: tl.constexpr,
):
    sample = this_sample()
    if sample >= batch:
        return
    offsets, inside = memory_offsets(sample, numel, area, CHANNELS, QUADS, VECTOR, ALIGNED)
    clean = tl.load(eps_pred + offsets, inside, other=0).to(tl.float32)
    if eps_pred_adv is not None:
        residual = tl.load(eps_pred_adv + offsets, inside, other=0).to(tl.float32) - clean
        if delta is not None and not INVARIANCE:
            residual -= tl.load(delta + offsets, inside, other=0).to(tl.float32)
    eps, unit = element_noise(key, sample, calls, QUADS, VECTOR, ALIGNED)

    blocks = tl.num_programs(0)
    place = sample * blocks + tl.program_id(0)
    error = tl.where(inside, clean - eps, 0.0)
    tl.store(partials + place, tl.sum(error * error))
    slope = error
    if eps_pred_adv is not None:
        if delta is None and not INVARIANCE:
            start = (tl.load(radius + sample) * unit).to(DTYPE).to(tl.float32)
            residual = tl.where(inside, residual - start, 0.0)
        tl.store(partials + tl.cast(batch, tl.int64) * blocks + place, tl.sum(residual * residual))
        pull = tl.load(lambda_t + sample) * residual
        tl.store(grad_adv + offsets, (scale * pull).to(grad_adv.dtype.element_ty), inside)
        if not DETACH_CLEAN:
            slope = error - pull
    tl.store(grad + offsets, (scale * slope).to(grad.dtype.element_ty), inside)


@triton.jit
def _finish_kernel(
    partials,  # (2, B, blocks) float32
    lambda_t,  # (B,) float32
    total,  # () float32
    fit, reg,  # (B,) float32
    batch, blocks, numel,
    ADVERSARIAL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ROW_TILES: tl.constexpr, COLUMN_TILES: tl.constexpr,
):
    # One program: it sums in one order, and has little to read.
    sums = tl.zeros((ROWS,), tl.float32)
    for row_tile in range(ROW_TILES):
        row = row_tile * ROWS + tl.arange(0, ROWS)
        here = row < batch
        fits = tl.zeros((ROWS,), tl.float32)
        regs = tl.zeros((ROWS,), tl.float32)
        for column_tile in range(COLUMN_TILES):
            column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
            inside = here[:, None] & (column < blocks)[None, :]
            place = partials + row.to(tl.int64)[:, None] * blocks + column[None, :]
            fits += tl.sum(tl.load(place, inside, other=0.0), 1)
            if ADVERSARIAL:
                place += tl.cast(batch, tl.int64) * blocks
                regs += tl.sum(tl.load(place, inside, other=0.0), 1)
        count = tl.cast(numel, tl.float32)
        fits = tl.div_rn(fits, tl.zeros_like(fits) + count)
        if ADVERSARIAL:
            factor = tl.load(lambda_t + row, here, other=0.0)
            regs = factor * tl.div_rn(regs, tl.zeros_like(regs) + count)
        tl.store(fit + row, fits, here)
        tl.store(reg + row, regs, here)
        sums += fits + regs
    tl.store(total, tl.sum(sums) / tl.cast(batch, tl.float32))


def equivariance_loss(
    eps_pred: torch.Tensor, eps_pred_adv: torch.Tensor | None, delta: torch.Tensor | None,
    radius: torch.Tensor, lambda_t: torch.Tensor, key: torch.Tensor, dtype: torch.dtype,
    invariance: bool, detach_clean: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`robustdm.ops.reference.equivariance_loss` in two launches: one pass, and one to finish sums.

    Args:
        eps_pred, eps_pred_adv: (B, ...) float, dense: contiguous or channels-last.
        delta: (B, ...) in the same memory format, of any float dtype.
        radius, lambda_t: (B,) float32 contiguous.
        key: (3,) int64: seed, step, first_index.
        dtype: of the batch, in which the random start is rounded.
        invariance, detach_clean: variants.

    Returns:
        total (), fit and reg (B,) float32, and two gradients in the memory format of eps_pred.
    """
    adversarial = eps_pred_adv is not None
    stored = torch.float32 if eps_pred.dtype == torch.float16 else eps_pred.dtype
    grad = torch.empty_like(eps_pred, dtype=stored)
    if adversarial:
        grad_adv = torch.empty_like(eps_pred, dtype=stored)
    else:
        grad_adv = eps_pred.new_empty(0, dtype=stored)
    batch = len(eps_pred)
    if eps_pred.numel() == 0:
        fit = radius.new_full((batch,), float("nan"))  # the mean of nothing, as in the reference
        reg = lambda_t * fit if adversarial else torch.zeros_like(fit)
        return (fit + reg).mean(), fit, reg, grad, grad_adv

    total, fit, reg = radius.new_empty(()), radius.new_empty(batch), radius.new_empty(batch)
    numel, channels = eps_pred.numel() // batch, stream_channels(eps_pred)
    grid, calls, constants = plan(grad, channels)
    if adversarial and delta is None and not invariance and stored != eps_pred.dtype:
        # A second call of the generator, and gradients wider than the predictions: half the
        # elements a thread, or it spills (on sm_100).
        constants["num_warps"] *= 2
    blocks = grid[0]
    partials = radius.new_empty((2, batch, blocks))
    columns = min(TILE, triton.next_power_of_2(blocks))
    rows = min(TILE // columns, triton.next_power_of_2(batch))
    with torch.cuda.device_of(eps_pred):
        _equivariance_loss_kernel[grid](
            eps_pred, eps_pred_adv, delta, radius, lambda_t, key, grad, grad_adv, partials, batch,
            numel, calls, numel // channels, 2 / eps_pred.numel(), CHANNELS=channels,
            DTYPE=TYPES[dtype], INVARIANCE=bool(invariance), DETACH_CLEAN=bool(detach_clean),
            **constants, enable_fp_fusion=False,
        )
        _finish_kernel[(1,)](
            partials, lambda_t, total, fit, reg, batch, blocks, numel, ADVERSARIAL=adversarial,
            ROWS=rows, COLUMNS=columns, ROW_TILES=triton.cdiv(batch, rows),
            COLUMN_TILES=triton.cdiv(blocks, columns), num_warps=8, enable_fp_fusion=False,
        )
    return total, fit, reg, grad, grad_adv
