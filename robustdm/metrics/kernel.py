"""The kernel distance between two sets of features (KID, where the features are Inception's)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Estimate(NamedTuple):
    """A number and its standard error."""

    value: float
    error: float


def kernel_distance(
    a: Tensor, b: Tensor, block: int = 4096, sums: Tensor | None = None
) -> Estimate:
    """Unbiased squared maximum mean discrepancy under the kernel (<x, y> / D + 1)^3.

    Over all pairs, in float64, block by block; memory does not grow with the sets. The usual mean
    over random subsets of 1,000 estimates the same number with more noise. Being unbiased it can be
    negative, and sets of different size compare.

    Args:
        a, b: (N, ...) and (M, ...) features with the same trailing shape, at least three each.
        block: features per block.
        sums: `kernel_sums` of b, where several sets are compared with it.

    Returns:
        The distance and its standard error over both sets (jackknife; up to half too
        large for sets of the same law).

    Raises:
        ValueError: if a set is too small or the trailing shapes differ.

    Source: Binkowski et al. 2018; Gretton et al. 2012, Eq. 3.
    """
    a, b = a.flatten(1), b.flatten(1)
    n, m = len(a), len(b)
    if min(n, m) < 3 or a.shape[1] != b.shape[1]:
        raise ValueError(f"sets of shape {tuple(a.shape)} and {tuple(b.shape)} do not compare")
    within_a = kernel_sums(a, block)
    within_b = (kernel_sums(b, block) if sums is None else sums).to(a.device)
    across_a, across_b = (torch.zeros(k, dtype=torch.float64, device=a.device) for k in (n, m))
    for i in range(0, n, block):
        for j in range(0, m, block):
            values = _kernel(a[i:i + block], b[j:j + block])
            across_a[i:i + block] += values.sum(1)
            across_b[j:j + block] += values.sum(0)
    sum_a, sum_b, sum_ab = within_a.sum(), within_b.sum(), across_a.sum()
    mean_a, mean_b = sum_a / (n * (n - 1)), sum_b / (m * (m - 1))
    value = mean_a + mean_b - 2 * sum_ab / (n * m)
    # The distance without each feature of one set in turn.
    left_a = ((sum_a - 2 * within_a) / ((n - 1) * (n - 2)) + mean_b
              - 2 * (sum_ab - across_a) / ((n - 1) * m))
    left_b = ((sum_b - 2 * within_b) / ((m - 1) * (m - 2)) + mean_a
              - 2 * (sum_ab - across_b) / (n * (m - 1)))
    variance = sum((k - 1) / k * (left - left.mean()).square().sum()
                   for k, left in ((n, left_a), (m, left_b)))
    return Estimate(value.item(), variance.sqrt().item())


def kernel_sums(x: Tensor, block: int = 4096) -> Tensor:
    """The kernel of each feature with all others of its set, summed: (N, ...) -> (N,) float64."""
    x = x.flatten(1)
    sums = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    for i in range(0, len(x), block):
        rows = x[i:i + block]
        for j in range(i, len(x), block):
            values = _kernel(rows, x[j:j + block])
            if i == j:
                values.fill_diagonal_(0)
            else:
                sums[j:j + block] += values.sum(0)
            sums[i:i + block] += values.sum(1)
    return sums


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    products = a.double() @ b.to(a.device).double().T
    return products.div_(a.shape[1]).add_(1).pow_(3)
