"""Gaussian data in a linear subspace of real images: a law in high dimension known exactly.

``x = mu + sum_i sd_i alpha_i U_i`` with ``alpha ~ N(0, I)``, where mu, U and sd are the mean, the
principal components and the per-component standard deviations of a set of images in [-1, 1].
Source: Briglia et al. 2026, section 3; their lambda_i is read as a standard deviation, since raw
singular values would grow with the number of images.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from robustdm.data.base import TensorData
from robustdm.data.corruption import Corruption
from robustdm.errors import UsageError
from robustdm.metrics import psnr, sliced_wasserstein, subspace_error
from robustdm.ops.stream import Stream, element_index, normal, philox


def principal_components(points: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Principal component analysis in float64.

    Args:
        points: (N, ...) with D elements each.
        rank: number of components, at most min(N - 1, D).

    Returns:
        mean (D,), standard deviations (rank,) in falling order (divisor N - 1), and orthonormal
        components (rank, D), the largest entry of each positive.

    Raises:
        UsageError: if the points do not span that many dimensions.
    """
    x = points.flatten(1).double()
    mean = x.mean(dim=0)
    x = x - mean
    small = len(x) < x.shape[1]
    # The Gram matrix on the shorter side: N x N for a few large images.
    values, vectors = torch.linalg.eigh(x @ x.T if small else x.T @ x)
    spanned = int((values > values[-1] * 1e-10).sum())
    if rank > spanned:
        raise UsageError(f"subspace_rank is {rank}: the images span {spanned} dimensions only")
    vectors = vectors[:, -rank:].flip(1)
    basis = (x.T @ vectors if small else vectors).T
    basis = basis / basis.norm(dim=1, keepdim=True)
    largest = basis.gather(1, basis.abs().argmax(dim=1, keepdim=True))
    sds = (values[-rank:].flip(0) / (len(x) - 1)).sqrt()
    return mean, sds, basis * largest.sign()


class SubspaceData(TensorData):
    """Points of a Gaussian in a k-dimensional subspace of R^D, with noise in all D dimensions.

    Args:
        sds: (k,) standard deviations in the subspace.
        mean: (D,) mu.
        basis: (k, D) U, orthonormal rows.
        shape: shape of an item: (D,), or (C, H, W) to train on whole images.
        count: number of points, drawn once; the first n do not depend on it.
        source: what the subspace was made from, part of the identity.
    """

    def __init__(
        self, sds: Tensor, mean: Tensor, basis: Tensor, shape: tuple[int, ...], count: int,
        corruption: Corruption | None, holdout: float, seed: int, source: str,
        name: str = "subspace",
    ):
        self.sds, self.mean, self.basis = sds.double(), mean.double(), basis.double()
        self.is_image = len(shape) == 3
        index = element_index(0, (count, len(sds)))
        word0, word1, _, _ = philox(seed, 0, index, Stream.SYNTHETIC)
        points = self.mean + (normal(word0, word1, torch.float64) * self.sds) @ self.basis
        law = f"{source} {tuple(shape)} {len(sds)} {count} {seed}"
        super().__init__(
            name, points.float().view(count, *shape), corruption, holdout, seed,
            fingerprint=hashlib.sha256(law.encode()).hexdigest(),
        )

    @classmethod
    def from_sds(
        cls, sds: list[float], noise_dims: int, count: int = 5000,
        corruption: Corruption | None = None, holdout: float = 0.0, seed: int = 0,
        source: str | None = None,
    ) -> SubspaceData:
        """In principal coordinates: the signal's dimensions first, then ``noise_dims`` empty ones.

        ``from_sds([2, 1.4, 1, .7, .5], 27, corruption=Corruption(.9, .1, seed))`` is a rank-5
        Gaussian in R^32 of which 90 % of the points carry noise of sd .1 in all dimensions.
        """
        rank = len(sds)
        dims = rank + noise_dims
        return cls(
            torch.as_tensor(sds), torch.zeros(dims), torch.eye(rank, dims), (dims,), count,
            corruption, holdout, seed, source or f"sds {[float(sd) for sd in sds]}",
        )

    def _measure(self, samples: Tensor) -> dict[str, float]:
        """``off_subspace_sd``: rms per dimension outside the subspace. ``component_ratio_1..k``:
        sd along each component over the truth. ``rho``: mean over samples of
        ||(I - P)(x - mu)||. ``sliced_wasserstein``: to the clean points, along the components.
        For images also ``rho_paper``, the paper's mean of ||x - P x||, which leaves out the mean
        and is not zero for perfect samples, and ``psnr`` = 10 log10(4 / mse(x, mu + P(x - mu))).
        """
        coordinates, rho = subspace_error(samples, self.mean, self.basis)
        truth, _ = subspace_error(self.all_clean(), self.mean, self.basis)
        dims, rank = self.basis.shape[1], len(self.sds)
        ratios = coordinates.std(dim=0, correction=0) / self.sds
        result = {
            "off_subspace_sd": (rho.square().mean() / max(dims - rank, 1)).sqrt().item(),
            **{f"component_ratio_{k + 1}": ratio.item() for k, ratio in enumerate(ratios)},
            "rho": rho.mean().item(),
            "sliced_wasserstein": sliced_wasserstein(coordinates, truth),
        }
        if self.is_image:
            _, literal = subspace_error(samples, torch.zeros_like(self.mean), self.basis)
            result["rho_paper"] = literal.mean().item()
            result["psnr"] = psnr(rho.square().mean().item() / dims)
        return result

    def score(self, x: Tensor, sigma: float) -> Tensor:
        basis, variance = self.basis.to(x), self.sds.square().to(x)
        centred = x.flatten(1) - self.mean.to(x)
        coordinates = centred @ basis.T
        inside = coordinates * (1 / (variance + sigma**2) - 1 / sigma**2)
        return -(centred / sigma**2 + inside @ basis).view_as(x)
