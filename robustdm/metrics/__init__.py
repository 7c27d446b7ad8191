"""Measures of samples against the clean law: features or points in, numbers out."""

from robustdm.metrics.basic import (
    deviation_ratios,
    noise_level,
    psnr,
    sliced_wasserstein,
    spread,
    subspace_error,
)
from robustdm.metrics.frechet import FeatureStatistics, frechet_distance
from robustdm.metrics.inception import inception_score
from robustdm.metrics.kernel import Estimate, kernel_distance, kernel_sums
from robustdm.metrics.neighbours import Manifold, manifold, nearest, nearness, neighbour_radii

__all__ = [
    "Estimate", "FeatureStatistics", "Manifold", "deviation_ratios", "frechet_distance",
    "inception_score", "kernel_distance", "kernel_sums", "manifold", "nearest", "nearness",
    "neighbour_radii", "noise_level", "psnr", "sliced_wasserstein", "spread", "subspace_error",
]
