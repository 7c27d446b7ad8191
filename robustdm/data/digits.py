"""scikit-learn's handwritten digits: 1797 real images of 8x8 pixels that need no download."""

from __future__ import annotations

import torch
from torch import Tensor

from robustdm.data.base import TensorData
from robustdm.data.corruption import Corruption
from robustdm.data.subspace import principal_components
from robustdm.metrics import sliced_wasserstein, spread, subspace_error

# Pixels of the clean set below this standard deviation show nothing but noise.
CONSTANT_SD = 0.04
_PCA_RANK = 20


def load_digits() -> Tensor:
    """(1797, 1, 8, 8) float32 in [-1, 1]; the grey levels 0..16 are exact."""
    from sklearn import datasets

    return torch.from_numpy(datasets.load_digits().images).float().div_(8).sub_(1).unsqueeze(1)


class DigitsData(TensorData):
    """The digits. Samples are never clipped: it would hide noise at the range's edge."""

    is_image = True

    def __init__(self, corruption: Corruption | None, holdout: float, seed: int):
        super().__init__("digits", load_digits(), corruption, holdout, seed)

    def _measure(self, samples: Tensor) -> dict[str, float]:
        """Noise and spread of samples (N, 1, 8, 8).

        ``noise_rms``: rms deviation from the clean mean on the pixels of sd < .04 in the clean
        set. ``residual``: rms per element outside the clean set's mean-centred 20-component PCA.
        ``pixel_std``: mean over pixels of the std over samples. ``sliced_wasserstein``: distance
        to the clean set.
        """
        clean = self.all_clean()
        flat, truth = samples.flatten(1).double(), clean.flatten(1).double()
        mean, _, basis = principal_components(truth, _PCA_RANK)
        constant = truth.std(dim=0) < CONSTANT_SD
        _, distance = subspace_error(samples, mean, basis)
        return {
            "noise_rms": (flat - mean)[:, constant].square().mean().sqrt().item(),
            "residual": (distance.square().mean() / flat.shape[1]).sqrt().item(),
            "pixel_std": spread(samples),
            "sliced_wasserstein": sliced_wasserstein(samples, clean),
        }
