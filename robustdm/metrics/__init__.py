"""Measures of samples against the clean law."""

from robustdm.metrics.basic import noise_level, psnr, sliced_wasserstein, spread, subspace_error

__all__ = ["noise_level", "psnr", "sliced_wasserstein", "spread", "subspace_error"]
