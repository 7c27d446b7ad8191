"""What a training step draws for each sample, and what follows from it.

    t = floor(T word0 / 2^32)        b = beta_low + (beta_high - beta_low) uniform(word1)
    r_b = s^(omega - 1) + gamma b / s        lambda_t = min(lam sqrt3 / scale, lambda_max)

(Briglia et al. 2026, Section 4.) The words are those of the stream of `philox.py`; ``scale`` is
one of four readings of the paper. float64, in the order of operations of
`robustdm.ops.reference.draw_samples`, and equal to it bit for bit.

Bytes per sample: read 24 (gathered from three tables), write 32.
"""

import torch
import triton
import triton.language as tl

from robustdm.kernels.philox import BATCH, SAMPLE, indexed_words, read_key, words

# A sample is a thread's work; a batch is seldom more than one program's.
BLOCK = 128
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _float64(value: tl.constexpr):
    # A plain float would pass through float32.
    return tl.full((), value, tl.float64)


@triton.jit
def _round(x, DTYPE: tl.constexpr):
    """x as float32 that holds a DTYPE: float64 -> float32 -> DTYPE, as torch rounds."""
    x = x.to(tl.float32)
    if DTYPE == tl.bfloat16:
        # To nearest even in integers, since the interpreter's own conversion truncates.
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return bits.to(tl.float32, bitcast=True)
    return x.to(DTYPE).to(tl.float32)


@triton.jit
def _draw_samples_kernel(
    key,  # (3,) int64
    tables,  # (3, steps) float64
    t,  # (B,) int64
    beta,  # (B,) float64
    signal, noise, radius, lambda_t,  # (B,) float32
    batch, steps,
    # Constants of a run: as arguments they would be rounded to float32.
    GAMMA: tl.constexpr, LAMBDA_ROOT3: tl.constexpr, MODE: tl.constexpr, BETA_LOW: tl.constexpr,
    BETA_SPAN: tl.constexpr, LAMBDA_MAX: tl.constexpr, PER_BATCH: tl.constexpr,
    DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    offset = tl.arange(0, BLOCK)
    sample = first + offset
    inside = sample < batch
    seed, step, first_index = read_key(key)
    w0, w1, _, _ = indexed_words(seed, step, first_index + first, offset, SAMPLE)
    if PER_BATCH:
        zero = tl.zeros((BLOCK,), tl.uint32)
        _, w1, _, _ = words(seed, step, zero, zero, BATCH)

    drawn = (w0.to(tl.int64) * steps) >> 32
    s_signal = tl.load(tables + drawn, inside, other=1.0)
    s_noise = tl.load(tables + steps + drawn, inside, other=1.0)
    ray = tl.load(tables + 2 * steps + drawn, inside, other=1.0)
    b = _float64(BETA_LOW) + _float64(BETA_SPAN) * ((w1 >> 8).to(tl.float64) * _float64(2.0**-24))
    r = ray + _float64(GAMMA) * b / s_noise
    if MODE == "ray":
        scale = b * ray
    elif MODE == "x":
        scale = b * s_noise * r
    elif MODE == "std":
        scale = r
    else:
        scale = b * r
    weight = _float64(LAMBDA_ROOT3) / scale
    if LAMBDA_MAX is not None:
        bound = _float64(LAMBDA_MAX)
        weight = tl.where(weight > bound, bound, weight)  # unlike a minimum, keeps NaN

    tl.store(t + sample, drawn, inside)
    tl.store(beta + sample, b, inside)
    tl.store(signal + sample, s_signal.to(tl.float32), inside)
    tl.store(noise + sample, s_noise.to(tl.float32), inside)
    tl.store(radius + sample, _round(r, DTYPE), inside)
    tl.store(lambda_t + sample, weight.to(tl.float32), inside)


def draw_samples(
    key: torch.Tensor, tables: torch.Tensor, batch: int, dtype: torch.dtype, gamma: float,
    lam: float, lambda_mode: str, beta_low: float, beta_high: float, lambda_max: float | None,
    beta_per_batch: bool,
) -> tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor
]:
    """As `robustdm.ops.reference.draw_samples`, in one launch.

    Args:
        key: (3,) int64: seed, step, first_index.
        tables: (3, T) float64 contiguous: sqrt(abar), s, s**(omega - 1).
        batch: number of samples B.
        dtype: of the batch.
        gamma, lam, lambda_mode, beta_low, beta_high: as in `robustdm.Perturbation`.
        lambda_max: upper bound of lambda_t, None is unbounded.
        beta_per_batch: one factor for the whole step instead of one per sample.

    Returns:
        t (B,) int64, beta (B,) float64, and signal, noise, radius, lambda_t (B,) float32.
    """
    t, beta = key.new_empty(batch), tables.new_empty(batch)
    signal, noise, radius, lambda_t = (
        tables.new_empty(batch, dtype=torch.float32) for _ in range(4)
    )
    if batch:
        with torch.cuda.device_of(tables):
            _draw_samples_kernel[(triton.cdiv(batch, BLOCK),)](
                key, tables, t, beta, signal, noise, radius, lambda_t, batch, tables.shape[1],
                GAMMA=float(gamma), LAMBDA_ROOT3=lam * 3**0.5, MODE=lambda_mode,
                BETA_LOW=float(beta_low), BETA_SPAN=float(beta_high - beta_low),
                LAMBDA_MAX=None if lambda_max is None else float(lambda_max),
                PER_BATCH=bool(beta_per_batch), DTYPE=TYPES[dtype], BLOCK=BLOCK, num_warps=4,
                enable_fp_fusion=False,
            )
    return t, beta, signal, noise, radius, lambda_t
