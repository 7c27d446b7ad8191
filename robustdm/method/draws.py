"""Every random number of a training step, as a pure function of (seed, step, sample index)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robustdm.method.schedule import expand
from robustdm.ops import stream
from robustdm.ops.reference import wide
from robustdm.ops.stream import Stream


@dataclass(frozen=True)
class Draw:
    """Every random number of one training step, a pure function of (seed, step, sample index).

    The noise itself is not stored: `eps` and `delta` make it when asked, as the fused ops do.

    Attributes:
        t: (B,) int64 timesteps.
        beta: (B,) float64 factor of the radius.
        signal, noise: (B,) sqrt(abar_t) and sqrt(1 - abar_t), in float32 at least.
        radius: (B,) radius of the l-inf ball, eps-units, as wide; its values are rounded to the
            batch's dtype, so that perturbations stay in the ball whatever the precision.
        lambda_t: (B,) weight of the regulariser, as wide; that of the objective that drew.
        key: (3,) int64 on the device: seed, step, first_index.
        shape, dtype: of the batch.
        regularised: whether this step has the regulariser (see ``reg_every`` of `Objective`).
        dropout_seed: seed of the generator that `torch.nn.Dropout` draws from in the first pass of
            the step; None leaves the generator alone. (The layers of `robustdm.fuse` use ``key``.)
    """

    t: Tensor
    beta: Tensor
    signal: Tensor
    noise: Tensor
    radius: Tensor
    lambda_t: Tensor
    key: Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype
    regularised: bool = True
    dropout_seed: int | None = None

    @property
    def eps(self) -> Tensor:
        """Standard normal noise, (B, ...)."""
        return stream.element_noise(self.key, self.shape, self.radius.dtype)[0].to(self.dtype)

    @property
    def delta(self) -> Tensor:
        """The random start, uniform in the l-inf ball of radius r: (B, ...), eps-units."""
        # Half precision cannot hold a 23-bit uniform: rounded once, when it is scaled.
        unit = stream.element_noise(self.key, self.shape, self.radius.dtype)[1]
        return (unit * expand(self.radius, unit)).to(self.dtype)

    def part(self, begin: int, end: int) -> Draw:
        """The draw of the samples from ``begin`` up to, not including, ``end``."""
        if (begin, end) == (0, self.shape[0]):
            return self
        vectors = (self.t, self.beta, self.signal, self.noise, self.radius, self.lambda_t)
        # Not key + tensor([0, 0, begin]): a constant made on the host would have to be copied.
        key = torch.cat([self.key[:2], self.key[2:] + begin]) if begin else self.key
        return Draw(*(v[begin:end] for v in vectors), key, (end - begin, *self.shape[1:]),
                    self.dtype, self.regularised, self.dropout_seed)


def draw_samples(
    key: Tensor, tables: Tensor, batch: int, dtype: torch.dtype, gamma: float, lam: float,
    lambda_mode: str, beta_low: float, beta_high: float, lambda_max: float | None,
    beta_per_batch: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What a training step draws per sample, and what follows from it.

    Args:
        key: (3,) int64.
        tables: (3, T) float64: sqrt(abar), s, s**(omega - 1).
        batch: number of samples B.
        dtype: of the batch.
        gamma, lam, lambda_mode, beta_low, beta_high: as in `robustdm.Perturbation`.
        lambda_max: upper bound of lambda_t, None is unbounded.
        beta_per_batch: one factor for the whole step instead of one per sample.

    Returns:
        t (B,) int64, beta (B,) float64, and signal, noise, radius, lambda_t (B,) in the wide dtype.
    """
    index = torch.arange(batch, device=key.device) + key[2]
    w0, w1, _, _ = stream.philox(key[0], key[1], index, Stream.SAMPLE)
    if beta_per_batch:
        one = torch.zeros(1, dtype=torch.int64, device=key.device)
        w1 = stream.philox(key[0], key[1], one, Stream.BATCH)[1].expand(batch)
    t = (w0 * tables.shape[1]) >> 32
    beta = beta_low + (beta_high - beta_low) * stream.uniform(w1, torch.float64)
    return t, beta, *scales_of(tables, t, beta, dtype, gamma, lam, lambda_mode, lambda_max)


def scales_of(
    tables: Tensor, t: Tensor, beta: Tensor, dtype: torch.dtype, gamma: float, lam: float,
    lambda_mode: str, lambda_max: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The per-sample numbers that (t, beta) decide: signal, noise, radius, lambda_t.

    Arguments and results as in `draw_samples`; the formulas are those of `robustdm.Perturbation`,
    in the same order, so that they agree to the last bit.
    """
    signal, noise, ray = (table[t] for table in tables)
    radius = ray + gamma * beta / noise
    if lambda_mode == "ray":
        scale = beta * ray
    elif lambda_mode == "x":
        scale = beta * noise * radius
    elif lambda_mode == "std":
        scale = radius
    else:
        scale = beta * radius
    lambda_t = lam * 3**0.5 / scale
    if lambda_max is not None:
        lambda_t = lambda_t.clamp(max=lambda_max)
    work = wide(dtype)
    return signal.to(work), noise.to(work), radius.to(dtype).to(work), lambda_t.to(work)


def dropout_seed(seed: int, step: int, first_index: int) -> int:
    """Seed of the generator that `torch.nn.Dropout` draws from in a step, see `Draw`."""
    high, low, _, _ = stream.philox_int(seed, step, first_index, Stream.DROPOUT)
    return (high >> 1) << 32 | low
