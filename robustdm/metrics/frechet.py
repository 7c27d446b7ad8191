"""The Frechet distance between two sets of features."""

import torch
from torch import Tensor


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Squared Frechet distance of the Gaussians with the means and covariances of two sets.

    ``|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a^1/2 S_b S_a^1/2)^1/2)``, in float64. Called FID only
    where the features are Inception's. It falls with the number of samples: compare equal numbers.

    Args:
        a, b: (N, ...) and (M, ...) features with the same trailing shape, at least two each.

    Raises:
        ValueError: if a set is too small or the trailing shapes differ.

    Source: Dowson & Landau 1982; Heusel et al. 2017.
    """
    a, b = a.flatten(1).double(), b.flatten(1).double()
    if min(len(a), len(b)) < 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"sets of shape {tuple(a.shape)} and {tuple(b.shape)} do not compare")
    first, second = torch.cov(a.T).reshape(a.shape[1], -1), torch.cov(b.T).reshape(a.shape[1], -1)
    values, vectors = torch.linalg.eigh(first)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    product = root @ second @ root
    overlap = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + first.trace() + second.trace()
    return (distance - 2 * overlap).clamp(min=0).item()
