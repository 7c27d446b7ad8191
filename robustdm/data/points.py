"""The paper's 3-D sets, an oblique plane and three Gaussians, clean or spoilt.

Source: Briglia et al. 2026, section 3 ("In vitro" analysis). The paper gives the plane's equation
and the mixture; the law in the plane, the noise levels and the normalisation are this project's.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from robustdm.data.base import TensorData
from robustdm.errors import UsageError
from robustdm.metrics import sliced_wasserstein
from robustdm.ops.stream import Stream, element_index, normal, philox, uniform

# Step of the grid that outliers are drawn from, original units.
GRID_STEP = 2.0
# Counter positions reserved for each point: three coordinates, one choice, three grid positions.
_SLOTS = 8


class PointData(TensorData):
    """A clean law in 3-D, its noisy training points, and the map between units.

    The points are mapped by ``(x - offset) / scale``, one offset vector and one scale for all
    axes, such that the observed set has mean zero and largest |coordinate| one.

    Args:
        kind: "clean"; "inlier": Gaussian noise of standard deviation ``level`` (original units);
            "outlier": a share ``level`` of the points is replaced by points of a regular grid of
            step 2 over the set's bounding cube.
        count: number of points; the first n points do not depend on it.
    """

    # Lower and upper end of the cube that holds practically all clean points.
    cube: tuple[float, float]
    # What is scaled to 1; the largest coordinate drawn if None.
    reach: float | None = None

    def __init__(self, name: str, kind: str, level: float, count: int, holdout: float, seed: int):
        if kind == "outlier" and level >= 1:
            raise UsageError(
                f"point_noise_level is {level:g}: for outliers it is the share of grid points, "
                "so it must be below 1 (0.2 is a good start)"
            )
        words = philox(seed, 0, element_index(0, (count, _SLOTS)), Stream.SYNTHETIC)
        z = normal(words[0], words[1], torch.float64)[:, :3]
        noise = normal(words[2], words[3], torch.float64)[:, :3]
        choice, chance = uniform(words[0][:, 3]), uniform(words[1][:, 3])
        clean = self._draw(z, choice)
        observed = clean
        if kind == "inlier":
            observed = clean + level * self._spoil(noise)
        elif kind == "outlier":
            low, high = self.cube
            nodes = round((high - low) / GRID_STEP) + 1
            grid = low + GRID_STEP * (uniform(words[0][:, 4:7]) * nodes).floor().double()
            observed = torch.where((chance < level)[:, None], grid, clean)
        self.kind, self.level = kind, level
        self.offset = observed.mean(dim=0)
        self.scale = self.reach or (observed - self.offset).abs().max().item()
        law = f"{name} {kind} {level!r} {count} {seed}{f' {self.reach}' if self.reach else ''}"
        super().__init__(
            name, self._normalise(clean), None, holdout, seed,
            observed=self._normalise(observed),
            fingerprint=hashlib.sha256(law.encode()).hexdigest(),
        )

    def _draw(self, z: Tensor, choice: Tensor) -> Tensor:
        """Clean points (N, 3), original units, from normals (N, 3) and uniforms (N,)."""
        raise NotImplementedError

    def _spoil(self, noise: Tensor) -> Tensor:
        """Direction of the inlier noise, from normals (N, 3)."""
        return noise

    def _normalise(self, points: Tensor) -> Tensor:
        return ((points - self.offset) / self.scale).float()

    def to_original(self, samples: Tensor) -> Tensor:
        return samples * self.scale + self.offset.to(samples)

    def identity(self) -> dict:
        return super().identity() | {"point_noise": self.kind, "point_noise_level": self.level}

    def _noise_text(self) -> str:
        return {
            "clean": "clean",
            "inlier": f"inlier noise of sd {self.level:g}",
            "outlier": f"{self.level:.0%} outliers on a grid",
        }[self.kind]


class PlaneData(PointData):
    """The plane x + y + z = 30: isotropic Gaussian in it, centre (10, 10, 10), std 3 per axis.

    Inlier noise is normal to the plane, so that the law in the plane stays the clean one.
    """

    cube = (0.0, 20.0)
    # Not the largest coordinate drawn: of a Gaussian it differs by a fifth between draws, and with
    # it the noise that a network sees.
    reach = 11.0
    centre, std = 10.0, 3.0
    # Orthonormal rows: two in the plane, then its normal.
    axes = torch.tensor([[1, -1, 0], [1, 1, -2], [1, 1, 1]], dtype=torch.float64) / torch.tensor(
        [2.0, 6.0, 3.0], dtype=torch.float64
    ).sqrt().unsqueeze(1)

    def _draw(self, z: Tensor, choice: Tensor) -> Tensor:
        return self.centre + self.std * z[:, :2] @ self.axes[:2]

    def _spoil(self, noise: Tensor) -> Tensor:
        return noise[:, :1] * self.axes[2]

    def _measure(self, samples: Tensor) -> dict[str, float]:
        """``distance``: mean |x + y + z - 30| / sqrt(3), original units. ``in_plane_std``: rms of
        the standard deviations along the two axes of the plane, over the truth.
        ``sliced_wasserstein``: to the clean points, original units.
        """
        points = self.to_original(samples.double())
        inside = points @ self.axes[:2].T
        return {
            "distance": (points.sum(dim=1) - 30).abs().mean().item() / math.sqrt(3),
            "in_plane_std": inside.var(dim=0, correction=0).mean().sqrt().item() / self.std,
            "sliced_wasserstein": sliced_wasserstein(points, self.to_original(self.all_clean())),
        }

    def score(self, x: Tensor, sigma: float) -> Tensor:
        axes = self.axes.to(x)
        centred = (x - ((self.centre - self.offset) / self.scale).to(x)) @ axes.T
        variance = x.new_tensor([(self.std / self.scale) ** 2] * 2 + [0.0]) + sigma**2
        return -(centred / variance) @ axes


class GaussiansData(PointData):
    """One third each of N((10, 10, 10), .25^2), N((20, 20, 20), .25^2), N((10, 30, 30), .25^2)."""

    cube = (8.0, 32.0)
    std = 0.25
    modes = torch.tensor(
        [[10.0, 10, 10], [20, 20, 20], [10, 30, 30]], dtype=torch.float64
    )
    # Samples farther than this many standard deviations from every mode are counted as far:
    # 0.11 % of the truth.
    far = 4.0

    def _draw(self, z: Tensor, choice: Tensor) -> Tensor:
        return self.modes[(choice * len(self.modes)).long()] + self.std * z

    def _measure(self, samples: Tensor) -> dict[str, float]:
        """``distance``: mean distance to the nearest mode in units of .25 (truth 1.596).
        ``far_share``: share of samples farther than 4 such units (truth 0.0011).
        ``mode0..2``: share of samples by nearest mode. ``sliced_wasserstein``: to the clean
        points, original units.
        """
        points = self.to_original(samples.double())
        distance, nearest = torch.cdist(points, self.modes).min(dim=1)
        shares = torch.bincount(nearest, minlength=len(self.modes)) / len(points)
        return {
            "distance": distance.mean().item() / self.std,
            "far_share": (distance > self.far * self.std).double().mean().item(),
            **{f"mode{k}": share.item() for k, share in enumerate(shares)},
            "sliced_wasserstein": sliced_wasserstein(points, self.to_original(self.all_clean())),
        }

    def score(self, x: Tensor, sigma: float) -> Tensor:
        modes = ((self.modes - self.offset) / self.scale).to(x)
        variance = (self.std / self.scale) ** 2 + sigma**2
        towards = modes - x.unsqueeze(1)
        weight = (-towards.square().sum(dim=2) / (2 * variance)).softmax(dim=1)
        return (weight.unsqueeze(2) * towards).sum(dim=1) / variance
