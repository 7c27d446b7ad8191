"""What can be said of the noise in a set, from the noisy data alone."""

import json
import math

import pytest
import torch

from robustdm.data.base import to_float
from robustdm.data.digits import load_digits
from robustdm.metrics.noise import (
    TooFewItems,
    blocking,
    channel_correlation,
    correlation,
    diagnose,
    excess_kurtosis,
    flat_residuals,
    impulses,
    isolated,
    mixture,
    otsu,
    smallest_variance,
)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pictures(count=400, side=16, seed=1):
    """Smooth colour pictures with an edge each, in [-1, 1]."""
    waves = normal(count, 3, 5, 5, seed=seed)
    x = torch.nn.functional.interpolate(waves, size=side, mode="bicubic").tanh() * 0.6
    edge = torch.arange(side) >= torch.randint(2, side, (count, 1, 1, 1),
                                               generator=torch.Generator().manual_seed(seed))
    return (x + 0.3 * edge).clamp(-1, 1)


def noisy(clean, sigma, share=1.0, seed=2):
    chosen = torch.rand(len(clean), generator=torch.Generator().manual_seed(seed)) < share
    by_item = chosen.view(-1, *[1] * (clean.ndim - 1))
    return clean + by_item * sigma * normal(*clean.shape, seed=seed + 1), chosen


@pytest.mark.parametrize("sigma", [0.1, 0.2])
@pytest.mark.parametrize("share", [1.0, 0.9, 0.5])
def test_white_noise_is_measured_without_clean_data(sigma, share):
    for clean, tolerance in ((pictures(), 0.03), (to_float(load_digits()), 0.08)):
        data, chosen = noisy(clean, sigma, share)
        rms = chosen.double().mean() ** 0.5 * sigma
        assert smallest_variance(data) ** 0.5 == pytest.approx(rms.item(), rel=tolerance)


def test_clean_data_read_as_clean():
    for clean in (pictures(), to_float(load_digits())):
        assert smallest_variance(clean) ** 0.5 < 0.02
        assert mixture(clean).share == 0 and not mixture(clean).noisy.any()
    assert smallest_variance(torch.zeros(10, 3, 16, 16)) == 0


def test_chance_does_not_make_the_noise_small():
    """Of few items the smallest eigenvalue alone is far too low."""
    data = normal(120, 12)
    alone = torch.linalg.eigvalsh(torch.cov(data.T))[0]
    assert alone < 0.6 and smallest_variance(data) == pytest.approx(1, abs=0.25)


def test_points():
    """The plane's normal has the noise alone; a subspace turned at random, too."""
    basis = torch.linalg.qr(normal(10, 10))[0][:3]
    data = normal(2000, 3) @ basis + 0.1 * normal(2000, 10, seed=5)
    assert smallest_variance(data) ** 0.5 == pytest.approx(0.1, rel=0.05)
    assert smallest_variance(data * 7 + 100) ** 0.5 == pytest.approx(0.7, rel=0.05)


@pytest.mark.parametrize("shape, words", [
    ((30, 12), "30 items of 12 dimensions are too few to measure their noise: it takes 48"),
    ((1, 3, 16, 16), "1 items of 768 dimensions .* it takes 2"),
    ((10, 1, 3, 3), "10 items of 9 dimensions .* it takes 36"),
])
def test_too_few(shape, words):
    with pytest.raises(TooFewItems, match=words):
        smallest_variance(normal(*shape))


@pytest.mark.parametrize("sigma", [0.1, 0.2])
@pytest.mark.parametrize("share", [0.9, 0.5])
def test_a_mixture_is_told_from_noise_on_all(sigma, share):
    data, chosen = noisy(pictures(800), sigma, share)
    found = mixture(data)
    assert found.share == pytest.approx(share, abs=0.05)
    assert found.sigma == pytest.approx(sigma, rel=0.05)
    right = ((found.noisy & chosen).sum() / chosen.sum(),
             (~found.noisy & ~chosen).sum() / (~chosen).sum())
    assert sum(right) / 2 > 0.95 and right[0] > 0.995
    assert found.levels[chosen].mean() == pytest.approx(sigma, rel=0.05)
    everywhere = mixture(noisy(pictures(800), sigma)[0])
    assert everywhere.share == 1 and everywhere.noisy.all()


def test_otsu():
    values = torch.cat([normal(300) * 0.1, 5 + normal(100)])
    assert 0.4 < otsu(values) < 3
    assert otsu(torch.tensor([0.0, 1.0])) == 0.5


def test_residuals_tell_white_noise_from_other():
    clean = pictures(800, 32)
    white, _ = noisy(clean, 0.2)
    soft = clean + 0.2 * 3 * torch.nn.functional.avg_pool2d(normal(800, 3, 34, 34), 3, 1)
    grey = clean + 0.2 * normal(800, 1, 32, 32)
    rare = clean + 0.4 * normal(800, 3, 32, 32) * (normal(800, 3, 32, 32, seed=9) > 1)
    found = {name: flat_residuals(x) for name, x in
             dict(white=white, soft=soft, grey=grey, rare=rare).items()}
    assert found["white"].shape == (200, 3, 5, 5)
    assert abs(correlation(found["white"])) < 0.06 and correlation(found["soft"]) > 0.3
    assert abs(channel_correlation(found["white"])) < 0.1
    assert channel_correlation(found["grey"]) > 0.7
    assert abs(excess_kurtosis(found["white"])) < 0.2 and excess_kurtosis(found["rare"]) > 0.5
    assert channel_correlation(found["white"][:, :1]) == 0
    assert correlation(torch.zeros(3, 1, 5, 5)) == 0


def test_impulses_and_blocks():
    clean = pictures(100, 32) * 0.9
    hit = torch.rand(100, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    spoilt = torch.where(hit < 0.01, -1.0, torch.where(hit > 0.99, 1.0, clean))
    assert impulses(spoilt) == pytest.approx(0.017, rel=0.2)  # less those beside others or black
    assert impulses(clean) < 1e-3 and impulses(noisy(clean, 0.2)[0].clamp(-1, 1)) < 2e-3
    assert impulses(to_float(load_digits())) < 0.02, "strokes touch"
    blocks = torch.nn.functional.interpolate(normal(100, 1, 4, 4), scale_factor=8)
    assert blocking(clean[:, :1] + 0.05 * blocks) > 1.3
    assert blocking(clean) == pytest.approx(1, abs=0.1)
    assert blocking(clean[..., :8, :8]) == 1


def test_isolated_items():
    cloud = normal(1000, 3) * 0.1
    far = torch.rand(50, 3, generator=torch.Generator().manual_seed(3)) * 20 - 10
    found = isolated(torch.cat([cloud, far]))
    assert found[1000:].sum() >= 45 and found[:1000].sum() <= 5
    assert not isolated(cloud).any() and not isolated(cloud[:10]).any()
    assert math.isfinite(float(isolated(torch.zeros(100, 3)).sum()))


@pytest.mark.parametrize("share, sigma", [(0.9, 0.1), (0.5, 0.2), (0.5, 0.1)])
def test_items_of_small_sets_are_told_apart_where_clean_ones_do_not_vary(share, sigma):
    """On the digits' border, and off a subspace."""
    basis = torch.linalg.qr(normal(12, 12))[0][:3]
    for clean in (to_float(load_digits()), normal(2000, 3) @ basis):
        data, chosen = noisy(clean, sigma, share)
        found = mixture(data)
        assert found.share == pytest.approx(share, abs=0.05)
        assert ((found.noisy == chosen).double().mean()) > 0.94
        assert mixture(noisy(clean, sigma)[0]).share == 1


@pytest.mark.parametrize("kind, make", [
    ("clean", lambda x: x),
    ("gaussian", lambda x: noisy(x, 0.1)[0]),
    ("gaussian", lambda x: noisy(x - 0.5, 0.2)[0].clamp(-1, 1)),  # as files of 8 bits clip it
    ("mixture", lambda x: noisy(x, 0.2, 0.9)[0]),
    ("mixture", lambda x: noisy(x, 0.1, 0.5)[0]),
    ("coloured", lambda x: x + 0.6 * torch.nn.functional.avg_pool2d(normal(1000, 3, 34, 34), 3, 1)),
    ("coloured", lambda x: x + 0.1 * normal(1000, 1, 32, 32)),
    ("other", lambda x: x + 0.2 * 12**0.5 * (torch.rand(
        x.shape, generator=torch.Generator().manual_seed(0)) - 0.5)),
    ("salt_pepper", lambda x: torch.where(normal(1000, 1, 32, 32) > 1.6, 1.0, x * 0.9)),
    ("constant", lambda x: torch.full_like(x, 0.3)),
])
def test_kinds(kind, make):
    found = diagnose(make(pictures(1000, 32)))
    assert found.kind == kind and found.items == 1000
    json.dumps(found.record())


@pytest.mark.parametrize("kind, data", [
    ("gaussian", normal(500, 2) @ normal(2, 6) + 0.1 * normal(500, 6, seed=2)),
    ("clean", normal(500, 2) @ normal(2, 6)),
    ("unknown", normal(500, 3)),
    ("outliers", torch.cat([0.1 * normal(500, 3), 10 * normal(30, 3)])),
    ("constant", torch.ones(100, 3)),
])
def test_kinds_of_points(kind, data):
    assert diagnose(data[torch.randperm(len(data))]).kind == kind
