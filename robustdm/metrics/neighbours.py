"""Measures that count neighbours in feature space, block by block so that no N x N matrix is held.

Distances are Euclidean, from float32 products. A set too small has no neighbours to count.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

THRESHOLDS = (0.9, 0.95)
"""Cosine similarities above which images count as near (Briglia et al. 2026, section 3.2)."""


class Manifold(NamedTuple):
    """How two sets of features overlap; see ``manifold``."""

    precision: float
    recall: float
    density: float
    coverage: float


def manifold(samples: Tensor, reference: Tensor, neighbours: int = 3,
             density_neighbours: int = 5, block: int = 4096,
             radii: Tensor | None = None) -> Manifold:
    """Fidelity and diversity of samples, by balls that reach to a point's k-th nearest neighbour.

    ``precision``: share of samples inside a ball of the reference. ``recall``: share of the
    reference inside a ball of the samples. ``density``: mean number of reference balls around a
    sample, over k; about 1 for the same law. ``coverage``: share of reference balls that hold a
    sample.

    Args:
        samples, reference: (N, ...) and (M, ...) features with the same trailing shape.
        neighbours: k of precision and recall.
        density_neighbours: k of density and coverage.
        block: features per block.
        radii: `neighbour_radii` of the reference, where several sets are compared with it.

    Raises:
        ValueError: if a set has no more features than neighbours, or the trailing shapes differ.

    Source: Kynkaanniemi et al. 2019; Naeem et al. 2020.
    """
    a, b = samples.flatten(1).float(), reference.flatten(1).float()
    most = max(neighbours, density_neighbours)
    if min(len(a), len(b)) <= most or a.shape[1] != b.shape[1]:
        raise ValueError(f"sets of shape {tuple(a.shape)} and {tuple(b.shape)} do not compare with "
                         f"{most} neighbours")
    b = b.to(a.device)
    radii = (neighbour_radii(b, most, block) if radii is None else radii).to(a.device)
    # About the common mean, where rounding of the products is smallest.
    centre = b.mean(0)
    a, b = a - centre, b - centre
    radii_a = _neighbour_distances(a, neighbours, block)[:, neighbours - 1]
    near, wide = radii[:, neighbours - 1], radii[:, density_neighbours - 1]
    inside = inside_count = 0
    recalled = torch.zeros(len(b), dtype=torch.bool, device=a.device)
    covered = torch.zeros_like(recalled)
    for start in range(0, len(a), block):
        rows = a[start:start + block]
        distance = _squared(rows, b)
        inside += (distance <= near).any(1).sum().item()
        within = distance <= wide
        inside_count += within.sum().item()
        covered |= within.any(0)
        recalled |= (distance <= radii_a[start:start + block, None]).any(0)
    return Manifold(
        inside / len(a), recalled.double().mean().item(),
        inside_count / (density_neighbours * len(a)), covered.double().mean().item(),
    )


def nearest(queries: Tensor, targets: Tensor, block: int = 4096,
            exclude_self: bool = False) -> tuple[Tensor, Tensor]:
    """Most similar target of each query, by cosine similarity.

    Args:
        queries, targets: (N, ...) and (M, ...) features with the same trailing shape.
        block: features per block: memory is block^2, whatever N and M.
        exclude_self: query i is target i, which is not its own neighbour.

    Returns:
        (N,) cosine similarities and (N,) int64 indices of the targets.

    Raises:
        ValueError: if there is nothing to compare, or the trailing shapes differ.
    """
    a, b = queries.flatten(1).float(), targets.flatten(1).float()
    if not len(b) or (exclude_self and len(b) < 2) or a.shape[1] != b.shape[1]:
        raise ValueError(f"sets of shape {tuple(a.shape)} and {tuple(b.shape)} do not compare")
    a, b = torch.nn.functional.normalize(a), torch.nn.functional.normalize(b.to(a.device))
    best = a.new_full((len(a),), -2.0)
    index = torch.zeros(len(a), dtype=torch.int64, device=a.device)
    for top in range(0, len(a), block):
        for left in range(0, len(b), block):
            similarity = a[top:top + block] @ b[left:left + block].T
            if exclude_self and top < left + block and left < top + block:
                own = torch.arange(top, min(top + block, len(a)), device=a.device)
                hit = (own >= left) & (own < left + similarity.shape[1])
                similarity[own[hit] - top, own[hit] - left] = -2
            value, where = similarity.max(1)
            better = value > best[top:top + block]
            best[top:top + block] = torch.where(better, value, best[top:top + block])
            index[top:top + block] = torch.where(better, where + left, index[top:top + block])
    return best, index


def neighbour_radii(reference: Tensor, count: int = 5, block: int = 4096) -> Tensor:
    """Squared distances of features to their nearest others: (M, ...) -> (M, count), rising.

    Raises:
        ValueError: if there are not so many others.
    """
    x = reference.flatten(1).float()
    if len(x) <= count:
        raise ValueError(f"{len(x)} features do not have {count} neighbours each")
    return _neighbour_distances(x - x.mean(0), count, block)


def _neighbour_distances(x: Tensor, count: int, block: int) -> Tensor:
    """(N, count) squared distances to the nearest other points, in rising order."""
    found = []
    for start in range(0, len(x), block):
        distance = _squared(x[start:start + block], x)
        own = torch.arange(start, start + len(distance), device=x.device)
        # By index, not by value: a twin at distance 0 is a neighbour.
        distance[own - start, own] = torch.inf
        found.append(distance.topk(count, dim=1, largest=False).values.sort(1).values)
    return torch.cat(found)


def _squared(a: Tensor, b: Tensor) -> Tensor:
    # The norms first: so the distance of two points is the same number both ways, ties included.
    norms = a.square().sum(1, keepdim=True) + b.square().sum(1)
    return norms.addmm_(a, b.T, alpha=-2).clamp_(min=0)


def nearness(similarity: Tensor) -> dict[str, float]:
    """How near samples are to single training images: mean, deviation, shares, percentiles.

    Args:
        similarity: (N,) cosine similarity of each to its nearest training image.
    """
    return {
        "mean": similarity.mean().item(),
        "sd": similarity.std(correction=0).item(),
        **{f"share >= {t:g}": (similarity >= t).double().mean().item() for t in THRESHOLDS},
        "1st percentile": similarity.quantile(0.01).item(),
        "99th percentile": similarity.quantile(0.99).item(),
    }
