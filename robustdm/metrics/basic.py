"""Distances of samples from a known law. None needs a network; all work in float64.

A distance to the clean set alone rewards shrinkage, so ``spread`` or ``sliced_wasserstein`` always
stands beside it.
"""

import math

import torch
from torch import Tensor

from robustdm.metrics.frechet import FeatureStatistics
from robustdm.ops.stream import Stream, element_index, normal, philox

# median(|z|) of a standard normal z.
_MEDIAN_ABS_NORMAL = 0.6744897501960817


def sliced_wasserstein(a: Tensor, b: Tensor, projections: int = 128, seed: int = 0) -> float:
    """Sliced 1-Wasserstein distance, in the units of the data.

    ``SW(a, b) = mean_k int_0^1 |F_k^-1(q) - G_k^-1(q)| dq`` over fixed random unit vectors
    ``theta_k``, where ``F_k`` and ``G_k`` are the empirical distribution functions of
    ``<a, theta_k>`` and ``<b, theta_k>``. The integral is a midpoint sum with as many nodes as the
    larger set has points; it is exact where the smaller size divides the larger.

    Args:
        a, b: (N, ...) and (M, ...) points with the same trailing shape.
        projections: number of directions; the same ones for every call with the same ``seed``.

    Raises:
        ValueError: if a set is empty or the trailing shapes differ.
    """
    a, b = a.flatten(1).double(), b.flatten(1).double()
    if not len(a) or not len(b) or a.shape[1] != b.shape[1]:
        raise ValueError(f"sets of shape {tuple(a.shape)} and {tuple(b.shape)} do not compare")
    index = element_index(0, (projections, a.shape[1]))
    # Step 1: the data sets themselves are drawn at step 0 of this stream.
    word0, word1, _, _ = philox(seed, 1, index, Stream.SYNTHETIC)
    theta = normal(word0, word1, torch.float64)
    theta = (theta / theta.norm(dim=1, keepdim=True)).to(a.device)
    nodes = max(len(a), len(b))
    quantile = (torch.arange(nodes, dtype=torch.float64, device=a.device) + 0.5) / nodes
    left, right = (
        (points @ theta.T).sort(dim=0).values[(quantile * len(points)).long()]
        for points in (a, b.to(a.device))
    )
    return (left - right).abs().mean().item()


def spread(samples: Tensor) -> float:
    """Mean over the elements of their standard deviation over the samples: ``mean_j sd_i(x_ij)``.

    Args:
        samples: (N, ...).
    """
    return samples.flatten(1).double().std(dim=0, correction=0).mean().item()


def deviation_ratios(samples: Tensor, reference: Tensor | FeatureStatistics) -> Tensor:
    """Standard deviation of samples over that of a reference, along the reference's principal axes.

    Below 1 the samples vary less than they should; noise shows in the last axes, shrinkage in the
    first.

    Args:
        samples, reference: (N, ...) and (M, ...) with the same trailing shape of D elements, or
            the reference's statistics.

    Returns:
        (K,) float64 in falling order of the reference's deviation; axes in which the reference
        does not vary (below 1e-6 of the first) are left out.

    Raises:
        ValueError: if a set has fewer than two points or the trailing shapes differ.
    """
    if not isinstance(reference, FeatureStatistics):
        reference = FeatureStatistics.of(reference)
    a = samples.flatten(1).double()
    size = reference.count, 0 if reference.mean is None else len(reference.mean)
    if min(len(a), 2 if size[0] is None else size[0]) < 2 or a.shape[1] != size[1]:
        raise ValueError(f"sets of shape {tuple(a.shape)} and {size} do not compare")
    variances, axes = (part.flip(-1).to(a.device) for part in reference.axes)
    kept = variances > variances[0] * 1e-12
    projected = (a @ axes[:, kept]).std(dim=0, correction=0)
    return projected / variances[kept].sqrt()


def subspace_error(samples: Tensor, mean: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Split samples into the part in an affine subspace and the distance from it.

    ``c = U (x - mu)`` and ``rho = ||(I - U^T U)(x - mu)||_2`` per sample.

    Args:
        samples: (N, ...) with D elements each.
        mean: (D,) mu.
        basis: (k, D) U, orthonormal rows.

    Returns:
        (N, k) coordinates c and (N,) distances rho, float64.
    """
    centred = samples.flatten(1).double() - mean.to(samples.device, torch.float64)
    basis = basis.to(samples.device, torch.float64)
    coordinates = centred @ basis.T
    return coordinates, (centred - coordinates @ basis).norm(dim=1)


def noise_level(images: Tensor) -> Tensor:
    """Robust estimate of the standard deviation of white noise in each image.

    Every 2x2 block gives one diagonal detail ``HH = (x00 - x01 - x10 + x11) / 2``, whose standard
    deviation is that of the noise where the image is smooth; ``sd = median(|HH|) / 0.6745``.
    Fine texture is counted as noise, so compare with other images of the same kind.

    Args:
        images: (N, C, H, W) with H, W >= 2.

    Returns:
        (N,) float64, in the units of the images.

    Raises:
        ValueError: if there is no 2x2 block.
    """
    height, width = images.shape[-2] // 2 * 2, images.shape[-1] // 2 * 2
    if not height or not width:
        raise ValueError(f"images of shape {tuple(images.shape)} have no 2x2 block")
    x = images[..., :height, :width].double()
    detail = x[..., ::2, ::2] - x[..., ::2, 1::2] - x[..., 1::2, ::2] + x[..., 1::2, 1::2]
    return (detail / 2).abs().flatten(1).median(dim=1).values / _MEDIAN_ABS_NORMAL


def psnr(mse: float, peak: float = 2.0) -> float:
    """Peak signal-to-noise ratio in dB, ``10 log10(peak^2 / mse)``; capped at 120 dB.

    Args:
        mse: mean squared error.
        peak: range of the data, 2 for [-1, 1].
    """
    return 10 * math.log10(peak**2 / max(mse, peak**2 * 1e-12))
