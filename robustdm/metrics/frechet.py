"""The Frechet distance between two sets of features, from statistics that can be streamed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from robustdm.errors import UsageError
from robustdm.untrusted import open_npz


class FeatureStatistics:
    """Count, mean and covariance of a stream of features; memory does not grow with the stream.

    Attributes:
        count: features so far; None for statistics that came from a file which does not say.
        mean: (D,) float64.

    Source of the update: Chan, Golub & LeVeque 1979.
    """

    def __init__(self, count: int | None = 0, mean: Tensor | None = None,
                 scatter: Tensor | None = None):
        self.count, self.mean, self._scatter = count, mean, scatter
        self._axes: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, features: Tensor, block: int = 8192) -> FeatureStatistics:
        """Statistics of features (N, ...), flattened to (N, D)."""
        made = cls()
        for part in features.split(block):
            made.update(part)
        return made

    def update(self, features: Tensor) -> None:
        """Take in features (N, ...)."""
        x = features.flatten(1).double()
        if not len(x):
            return
        self._axes = None
        mean = x.mean(0)
        centred = x - mean
        scatter = centred.T @ centred
        if not self.count:
            self.count, self.mean, self._scatter = len(x), mean, scatter
            return
        total = self.count + len(x)
        step = mean - self.mean
        self._scatter += scatter + torch.outer(step, step) * (self.count * len(x) / total)
        self.mean = self.mean + step * (len(x) / total)
        self.count = total

    @property
    def covariance(self) -> Tensor:
        """(D, D) float64, divisor N - 1.

        Raises:
            ValueError: for fewer than two features.
        """
        if self.count is None:
            return self._scatter
        if self.count < 2:
            raise ValueError(f"{self.count} features have no covariance: it takes two")
        return self._scatter / (self.count - 1)

    @property
    def axes(self) -> tuple[Tensor, Tensor]:
        """The principal axes: variances (D,) in rising order, and (D, D) with a column for each.

        Raises:
            ValueError: for fewer than two features.
        """
        if self._axes is None:
            self._axes = tuple(torch.linalg.eigh(self.covariance))
        return self._axes

    def save(self, path: Path) -> None:
        """Write an .npz with the keys ``mu`` and ``sigma``, which EDM's fid.py reads, and
        ``count``."""
        np.savez(path, mu=self.mean.cpu().numpy(), sigma=self.covariance.cpu().numpy(),
                 count=np.int64(-1 if self.count is None else self.count))

    @classmethod
    def load(cls, path: Path) -> FeatureStatistics:
        """Read what ``save`` or EDM's fid.py wrote.

        Raises:
            UsageError: if the file cannot be read, or does not hold such statistics.
        """
        try:
            with open_npz(path) as file:
                arrays = {key: file[key] for key in ("mu", "sigma", "count") if key in file}
                if any(array.dtype.kind not in "fiu" for array in arrays.values()):
                    raise ValueError("no numbers")
                count = int(arrays.get("count", -1))
        except Exception as error:  # numpy, zipfile and zlib raise a dozen kinds
            raise UsageError(f"{path}: cannot be read as .npz ({type(error).__name__})") from None
        mean, covariance = arrays.get("mu"), arrays.get("sigma")
        if mean is None or covariance is None or mean.ndim != 1 or (
            covariance.shape != 2 * mean.shape
        ):
            raise UsageError(f"{path}: holds no Frechet statistics: expected mu (D,) and sigma "
                             "(D, D)")
        if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
            raise UsageError(f"{path}: the statistics hold NaN or infinity: compute them again")
        mean, covariance = (torch.from_numpy(v.astype(np.float64)) for v in (mean, covariance))
        if count < 2:
            return cls(None, mean, covariance)
        return cls(count, mean, covariance * (count - 1))


def frechet_distance(a: Tensor | FeatureStatistics, b: Tensor | FeatureStatistics) -> float:
    """Squared Frechet distance of the Gaussians with the means and covariances of two sets.

    ``|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a^1/2 S_b S_a^1/2)^1/2)``, in float64. Called FID only
    where the features are Inception's. It falls with the number of samples: compare equal numbers.

    Args:
        a, b: (N, ...) and (M, ...) features with the same trailing shape, at least two each, or
            their statistics.

    Raises:
        ValueError: if a set is too small or the trailing shapes differ.

    Source: Dowson & Landau 1982; Heusel et al. 2017.
    """
    a, b = (x if isinstance(x, FeatureStatistics) else FeatureStatistics.of(x) for x in (a, b))
    if any(s.count is not None and s.count < 2 for s in (a, b)) or len(a.mean) != len(b.mean):
        sizes = [(s.count, 0 if s.mean is None else len(s.mean)) for s in (a, b)]
        raise ValueError(f"sets of shape {sizes[0]} and {sizes[1]} do not compare")
    first, second = a.covariance, b.covariance.to(a.mean.device)
    # The root of the second: it is often the reference of several.
    values, vectors = (part.to(a.mean.device) for part in b.axes)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    product = root @ first @ root
    overlap = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    distance = (a.mean - b.mean.to(a.mean.device)).square().sum() + first.trace() + second.trace()
    return (distance - 2 * overlap).clamp(min=0).item()
