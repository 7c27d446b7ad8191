"""The noise in a set of data, measured on the noisy data alone.

Real data leave some direction almost without variance: what varies there is the noise. Everything
here is in the units of the data, images in [-1, 1].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from robustdm.method.baselines import CLEAN
from robustdm.metrics.basic import noise_level

PATCH = 4
"""Side of the patches whose covariance is looked at: larger ones separate texture from noise
better, and take more pictures."""
ITEMS = 10_000
"""Items that a set's noise is measured on: more of them change no digit."""
_BATCH = 256  # images whose patches are held at once
_PER_DIMENSION = 4  # items for each dimension of a covariance, at least
_FOLDS = 8
_DIRECTIONS = 5  # without variance, from which the noise of one item is read, at least
_CLEANER = 0.75  # noise of the lower of two groups over that of the upper, if they differ
_TEXTURED = 16  # side of the pictures that have smooth parts, at least


class TooFewItems(ValueError):
    """A set is too small for its spectrum."""


def smallest_variance(data: Tensor) -> float:
    """Variance of a set along the direction in which it varies least.

    No less than the variance of white noise in the data, and equal to it where the clean data do
    not vary. Each eighth of the set is measured along the direction that the others choose, so that
    chance does not make it small. For images the directions are those of patches, which every
    position of every image provides, and of whole images too where there are enough of them.

    Args:
        data: (N, C, H, W) images or (N, D) points, in random order.

    Raises:
        TooFewItems: for fewer than 4 points for each dimension, or than 2 images.

    Source: Pyatykh et al. 2013, "Image Noise Level Estimation by Principal Component Analysis",
        here over a set and held out.
    """
    size = math.prod(data.shape[1:])
    whole = len(data) >= max(2, _PER_DIMENSION * size)
    patches = data.ndim == 4 and min(data.shape[2:]) >= PATCH
    if not (whole or patches and len(data) > 1):
        raise TooFewItems(f"{len(data)} items of {size} dimensions are too few to measure their "
                          f"noise: it takes {2 if patches else max(2, _PER_DIMENSION * size)}")
    found = []
    if patches:
        found.append(_held_out(data, _patches))
    if whole:
        found.append(_held_out(data, lambda x: x.flatten(1).float()))
    return min(found)


def _patches(images: Tensor) -> Tensor:
    """All patches of images (N, C, H, W), (M, D)."""
    # About the image's mean: products of float32 lose what is small beside it.
    x = images.float() - images.float().mean((1, 2, 3), keepdim=True)
    return F.unfold(x, PATCH).transpose(1, 2).flatten(0, 1)


def _held_out(data: Tensor, vectors: Callable[[Tensor], Tensor]) -> float:
    folds = []
    centre = vectors(data[:_BATCH]).mean(0)  # any will do: it keeps products small
    for fold in data.tensor_split(min(_FOLDS, len(data))):
        count, total, square = 0, 0, 0
        for batch in fold.split(_BATCH):
            x = vectors(batch) - centre
            count += len(x)
            total = total + x.sum(0, dtype=torch.float64)
            square = square + (x.T @ x).double()
        folds.append((count, total, square))

    def covariance(count: int, total: Tensor, square: Tensor) -> Tensor:
        mean = total / count
        return square / count - mean.outer(mean)

    every = [sum(parts) for parts in zip(*folds, strict=True)]
    middle = every[1] / every[0]
    values = []
    for count, total, square in folds:
        others = (whole - part for whole, part in zip(every, (count, total, square), strict=True))
        direction = torch.linalg.eigh(covariance(*others)).eigenvectors[:, 0]
        # About the mean of all: that of a few would be nearer to them.
        spread = square - total.outer(middle) - middle.outer(total) + count * middle.outer(middle)
        values.append((direction @ spread @ direction).item())
    return max(0.0, sum(values) / every[0])


def otsu(values: Tensor) -> float:
    """The threshold that splits values (N,) into two groups of the least variance within.

    Source: Otsu 1979, over the sorted values instead of a histogram.
    """
    x = values.double().sort().values
    below = torch.arange(1, len(x), dtype=torch.float64)
    total = x.cumsum(0)
    low, high = total[:-1] / below, (total[-1] - total[:-1]) / (len(x) - below)
    between = below * (len(x) - below) * (high - low) ** 2
    cut = int(between.argmax())
    return ((x[cut] + x[cut + 1]) / 2).item()


@dataclass(frozen=True)
class Mixture:
    """How a set's noise is spread over its items.

    Attributes:
        rms: standard deviation of the noise, root mean square over all items.
        sigma: standard deviation on the items that carry noise.
        share: of the items that carry noise, 0 to 1.
        levels: (N,) noise of each item, calibrated to ``sigma``; of single pictures it is rough.
        noisy: (N,) bool, items that are taken to carry noise.
    """

    rms: float
    sigma: float
    share: float
    levels: Tensor
    noisy: Tensor


def mixture(data: Tensor, rms: float | None = None) -> Mixture:
    """Which items carry noise, how much, and how many they are.

    Every item's level is rough. A threshold splits the levels in two groups. If the lower one has
    next to no noise, the set is a mixture of clean and noisy items; else all items are noisy.

    Args:
        data: (N, C, H, W) images or (N, D) points, in random order.
        rms: root of their `smallest_variance`, if it is known.

    Raises:
        TooFewItems: where the set is too small to tell.
    """
    rms = smallest_variance(data) ** 0.5 if rms is None else rms
    none = torch.zeros(len(data), dtype=torch.bool)
    images = data.ndim == 4 and min(data.shape[2:]) >= _TEXTURED
    null = None if images else _null_levels(data)
    if null is not None:
        raw = null
    elif images:
        raw = noise_level(data)
    else:  # nothing tells items apart
        raw = torch.full((len(data),), rms, dtype=torch.float64)
    if data.ndim == 4 and rms < CLEAN:
        return Mixture(rms, rms, 0.0, raw, none)
    sigma, share, noisy = rms, 1.0, ~none
    upper = raw > otsu(raw)
    if null is not None:
        high, low = (raw[group].square().mean().sqrt().item() for group in (upper, ~upper))
        if low < high / 2:
            share, noisy = upper.double().mean().item(), upper
            sigma = rms / share**0.5
    elif images and upper.any():
        # The upper group's upper half is noisy beyond doubt; its lower end may be texture.
        sure = raw >= raw[upper].median()
        if min(int((~upper).sum()), int(sure.sum())) >= 2:
            high, low = (smallest_variance(data[group]) ** 0.5 for group in (sure, ~upper))
            if low < _CLEANER * high:
                sigma, noisy = max(high, rms), upper
                share = (rms / sigma) ** 2
    texture = raw[noisy].square().mean() - sigma**2
    return Mixture(rms, sigma, share, (raw.square() - texture).clamp(min=0).sqrt(), noisy)


def _null_levels(data: Tensor) -> Tensor | None:
    """(N,) deviation of each item in the directions where clean data do not vary: those whose
    variance is within half of the smallest. None where the items or the directions are too few."""
    x = data.flatten(1).double()
    if len(x) < max(2, _PER_DIMENSION * x.shape[1]):
        return None
    x = x - x.mean(0)
    values, axes = torch.linalg.eigh(x.T @ x / len(x))
    count = int((values <= 1.5 * values[0].clamp(min=1e-12)).sum())
    if count < _DIRECTIONS:
        return None
    return (x @ axes[:, :count]).square().mean(1).sqrt()


def flat_residuals(images: Tensor) -> Tensor:
    """The flattest 5x5 squares of a set, a plane taken off each: what varies there is noise.

    Args:
        images: (N, C, H, W), H and W 5 or more.

    Returns:
        (N // 4, C, 5, 5): one square of an image, of the quarter of the images with the flattest.
    """
    x, side = images.float(), 5
    mean = F.avg_pool2d(x, side, 1)
    spread = (F.avg_pool2d(x.square(), side, 1) - mean.square()).mean(1)
    # Files of 8 bits clip the noise of black and white: such squares say nothing of it.
    edge = F.max_pool2d((x.abs() > 1 - 1e-3).float().amax(1, keepdim=True), side, 1)[:, 0]
    least, best = (spread + 1e3 * edge).flatten(1).min(1)
    kept = least.argsort()[: max(1, len(x) // 4)]
    rows, columns = best[kept] // spread.shape[2], best[kept] % spread.shape[2]
    steps = torch.arange(side, device=x.device)
    picked = x[kept[:, None, None], :, (rows[:, None] + steps)[:, :, None],
               (columns[:, None] + steps)[:, None, :]].permute(0, 3, 1, 2)
    return (picked.flatten(2) @ _off_plane()).view_as(picked)


def _off_plane() -> Tensor:
    """(25, 25) projection that takes the plane off a square, which lowers white noise too."""
    steps = torch.arange(25)
    plane = torch.stack([torch.ones(25), steps // 5 - 2.0, steps % 5 - 2.0])
    plane = plane / plane.norm(dim=1, keepdim=True)
    return torch.eye(25) - plane.T @ plane


def correlation(residuals: Tensor) -> float:
    """Correlation of neighbouring pixels of ``flat_residuals``, about 0 for white noise."""
    def neighbours(r: Tensor) -> Tensor:
        pairs = (r[..., 1:] * r[..., :-1]).mean(), (r[..., 1:, :] * r[..., :-1, :]).mean()
        return sum(pairs) / 2

    r = residuals.double()
    power = r.square().mean()
    if not power:
        return 0.0
    # Of white noise: columns of the projection are what it makes of single pixels.
    white = _off_plane().double().view(25, 5, 5)
    return (neighbours(r) / power - neighbours(white) / white.square().mean()).item()


def channel_correlation(residuals: Tensor) -> float:
    """Mean correlation of ``flat_residuals`` between channels: 1 for grey noise on colour images,
    0 for noise drawn for each channel; 0 for one channel."""
    r = residuals.double().transpose(0, 1).flatten(1)
    if len(r) < 2:
        return 0.0
    matrix = torch.corrcoef(r).nan_to_num()
    return ((matrix.sum() - matrix.trace()) / (len(r) * (len(r) - 1))).item()


def excess_kurtosis(residuals: Tensor) -> float:
    """Fourth standardised moment of ``flat_residuals`` less 3, each square scaled to variance 1:
    about 0 for Gaussian noise, -1.2 for uniform, above 1 for rare large errors."""
    r = residuals.double().flatten(1)
    r = r / r.square().mean(1, keepdim=True).sqrt().clamp(min=1e-12)
    return (r.pow(4).mean() - 3 + 6 / r.shape[1]).item()


def impulses(images: Tensor) -> float:
    """Share of pixels that are black or white in all channels and unlike all eight around them:
    salt and pepper, less those that touch others of their kind."""
    x = images.float()
    padded = F.pad(x.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    around = F.unfold(padded, 3).view(len(x), 9, -1)
    centre = around[:, 4:5]
    differ = (torch.cat([around[:, :4], around[:, 5:]], 1) - centre).abs().amin(1) > 0.5
    extreme = ((x.flatten(2).abs() - 1).abs() < 1e-3).all(1)
    return (extreme & differ).double().mean().item()


def blocking(images: Tensor) -> float:
    """Steps across the borders of 8x8 blocks over steps elsewhere, 1 without JPEG blocks."""
    ratios = []
    for dim in (2, 3):
        if images.shape[dim] < 16:
            continue
        steps = images.double().diff(dim=dim).abs()
        steps = steps.mean([d for d in range(4) if d != dim])
        border = torch.arange(len(steps)) % 8 == 7
        ratios.append(steps[border].mean() / steps[~border].mean().clamp(min=1e-12))
    return (sum(ratios) / len(ratios)).item() if ratios else 1.0


def isolated(data: Tensor, neighbours: int = 20) -> Tensor:
    """(N,) bool: items that stand far from all others.

    The distance to the k-th neighbour, among 64 principal components, is split by `otsu` on a
    logarithmic scale; the far group counts if it is small and three times as far.

    Args:
        data: (N, ...) items; compared each with all.
    """
    x = data.flatten(1).float()
    none = torch.zeros(len(x), dtype=torch.bool)
    if len(x) <= 2 * neighbours:
        return none
    x = x - x.mean(0)
    if x.shape[1] > 64:
        with torch.random.fork_rng(devices=[]):  # training's own numbers are left alone
            torch.default_generator.manual_seed(0)
            x = x @ torch.pca_lowrank(x, min(64, *x.shape), center=False)[2]
    far = torch.cat([torch.cdist(part, x).topk(neighbours + 1, largest=False).values[:, -1]
                     for part in x.split(1024)])
    # Copies of one item are no nearer than rounding can tell.
    far = far.clamp(min=1e-3 * x.norm(dim=1).median().clamp(min=1e-9).item()).log()
    apart = far > otsu(far)
    gap = far[apart].median() - far[~apart].median()
    return apart if gap > math.log(3) and apart.double().mean() < 0.4 else none


Kind = Literal["clean", "gaussian", "mixture", "coloured", "other", "salt_pepper", "jpeg",
               "outliers", "constant", "unknown"]


@dataclass(frozen=True)
class Diagnosis:
    """What noise is in a set.

    Attributes:
        kind: "clean"; white Gaussian noise on all items ("gaussian") or on some ("mixture");
            "coloured" noise, correlated between pixels; "other" white noise that is not Gaussian;
            "salt_pepper"; "jpeg" blocks; "outliers", items that stand far from the others;
            "constant", items that do not vary; "unknown", points that vary in all directions.
        sigma: standard deviation of the noise on the items that carry it.
        share: of the items that carry it.
        rms: root mean square over all items, sqrt(share) sigma: no direction of the data has less.
        items: that were looked at.
        correlation, channel_correlation, kurtosis: of the residuals of flat squares.
        impulses, blocking: see the functions of these names.
        isolated: share of the items that stand far from the others.
        levels: (N,) noise of each item; empty for points.
        flagged: (N,) bool, items that carry noise, or stand apart.
    """

    kind: Kind
    sigma: float
    share: float
    rms: float
    items: int
    correlation: float = 0.0
    channel_correlation: float = 0.0
    kurtosis: float = 0.0
    impulses: float = 0.0
    blocking: float = 1.0
    isolated: float = 0.0
    levels: Tensor = field(default_factory=lambda: torch.empty(0))
    flagged: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.bool))

    def record(self) -> dict:
        """What it says of the whole set, JSON-able."""
        numbers = {f.name: getattr(self, f.name) for f in fields(self)
                   if f.name not in ("levels", "flagged")}
        numbers = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in numbers.items()}
        return numbers | {"flagged": int(self.flagged.sum())}


# Beyond these a set is not taken for white Gaussian noise; docs/evaluation.md has what they read.
_CORRELATED, _GREY, _TAILS, _IMPULSES, _BLOCKS = 0.25, 0.6, 0.3, 0.003, 1.15
_NEIGHBOURS = 5000  # items that are compared with each other


def diagnose(data: Tensor) -> Diagnosis:
    """Say what noise is in a set (N, C, H, W) of images in [-1, 1], or (N, D) of points, in random
    order.

    Raises:
        TooFewItems: where the set is too small to tell.
    """
    found = _diagnose_images(data) if data.ndim == 4 else _diagnose_points(data)
    return replace(found, items=len(data))


def _diagnose_points(x: Tensor) -> Diagnosis:
    mean = x.double().var(0).mean().item() if len(x) > 1 else 0.0
    if not mean:
        return Diagnosis("constant", 0.0, 0.0, 0.0, 0)
    apart = isolated(x[:_NEIGHBOURS])
    share = apart.double().mean().item()
    variance = smallest_variance(x)
    rms = variance**0.5
    common = dict(sigma=rms, share=1.0, rms=rms, items=0, isolated=share)
    if share:
        return Diagnosis("outliers", **common | dict(share=share, flagged=apart))
    if variance > 0.1 * mean:
        return Diagnosis("unknown", **common)
    if variance < 1e-3 * mean:
        return Diagnosis("clean", **common | dict(share=0.0))
    return Diagnosis("gaussian", **common)


def _diagnose_images(x: Tensor) -> Diagnosis:
    if len(x) < 2:
        raise TooFewItems(f"{len(x)} image is too few to measure noise: it takes 2")
    if x.amax() == x.amin():
        return Diagnosis("constant", 0.0, 0.0, 0.0, 0)
    some = x[:ITEMS]
    spread = mixture(x, smallest_variance(some) ** 0.5)
    # Noisy without doubt: among the others may be clean ones.
    sure = torch.ones(len(x), dtype=torch.bool)
    if 0 < spread.share < 1:
        sure = spread.noisy & (spread.levels >= spread.levels[spread.noisy].median())
    if min(x.shape[2:]) < _TEXTURED:  # nothing is flat in so small pictures
        return Diagnosis("clean" if not spread.share else "mixture" if spread.share < 1 else
                         "gaussian", spread.sigma, spread.share, spread.rms, 0,
                         levels=spread.levels, flagged=spread.noisy)
    residuals = flat_residuals(x[sure][:ITEMS])
    # The flattest of many squares have about .8 of the noise; what clean data read there is less.
    floor = residuals.double().square().mean((1, 2, 3)).quantile(0.4).sqrt().item()
    apart = isolated(x[:_NEIGHBOURS])
    read = dict(rms=spread.rms, items=0, correlation=correlation(residuals),
                channel_correlation=channel_correlation(residuals),
                kurtosis=excess_kurtosis(residuals), impulses=impulses(some),
                blocking=blocking(some), isolated=apart.double().mean().item(),
                levels=spread.levels, flagged=spread.noisy)
    white = dict(sigma=spread.sigma, share=spread.share)
    if read["impulses"] > _IMPULSES:
        return Diagnosis("salt_pepper", **white, **read)
    if read["blocking"] > _BLOCKS:
        return Diagnosis("jpeg", **white, **read)
    grey = read["channel_correlation"] > _GREY
    if floor > CLEAN and (grey or read["correlation"] > _CORRELATED):
        return Diagnosis("coloured", sigma=max(floor / 0.8, spread.sigma), share=1.0, **read)
    if spread.rms < CLEAN:
        if apart.any():
            return Diagnosis("outliers", sigma=0.0, share=read["isolated"],
                             **read | dict(flagged=apart))
        return Diagnosis("clean", **white, **read)
    if abs(read["kurtosis"]) > _TAILS:
        return Diagnosis("other", **white, **read)
    return Diagnosis("gaussian" if spread.share == 1 else "mixture", **white, **read)
