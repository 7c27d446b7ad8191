"""Measures of samples against the clean law."""

from robustdm.metrics.basic import noise_level, psnr, sliced_wasserstein, spread, subspace_error
from robustdm.metrics.frechet import frechet_distance

__all__ = [
    "frechet_distance", "noise_level", "psnr", "sliced_wasserstein", "spread", "subspace_error",
]
