"""Measures: known distances, known noise, known subspaces."""

import math

import pytest
import torch

from robustdm.metrics import (
    frechet_distance,
    noise_level,
    psnr,
    sliced_wasserstein,
    spread,
    subspace_error,
)


def _normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_sliced_wasserstein_of_a_shift_is_the_mean_projection_of_the_shift():
    a = _normal(200, 3)
    shift = torch.tensor([2.0, 0.0, 0.0])
    # E|theta_1| of a random direction in R^3 is 1/2.
    assert sliced_wasserstein(a, a + shift, projections=4000) == pytest.approx(1.0, rel=0.03)
    assert sliced_wasserstein(a, a) == 0


def test_sliced_wasserstein_takes_sets_of_different_size():
    a = _normal(100, 2)
    assert sliced_wasserstein(a, a.repeat(3, 1)) == pytest.approx(0, abs=1e-12)
    # F^-1 is 1 from q = 1/2 on, G^-1 from q = 3/4 on.
    two, four = torch.tensor([[0.0], [1]]), torch.tensor([[0.0], [0], [0], [1]])
    assert sliced_wasserstein(two, four) == sliced_wasserstein(four, two) == 0.25


def test_sliced_wasserstein_is_the_same_in_every_call_and_refuses_empty_sets():
    a, b = _normal(50, 4), _normal(60, 4, seed=1)
    assert sliced_wasserstein(a, b) == sliced_wasserstein(a, b)
    assert sliced_wasserstein(a, b) != sliced_wasserstein(a, b, seed=1)
    with pytest.raises(ValueError):
        sliced_wasserstein(a, b[:0])


def test_directions_are_independent_of_the_data_of_the_same_seed():
    # Both come from the Philox stream: equal counters would project the data onto itself.
    from robustdm.data import SubspaceData

    point = SubspaceData.from_sds([1.0] * 8, 0, count=20).all_clean()[:1]
    projection = sliced_wasserstein(point, torch.zeros(1, 8), projections=1)
    assert projection < 0.9 * point.norm().item()


def test_spread_is_the_mean_standard_deviation():
    x = torch.tensor([[0.0, 10.0], [2.0, 16.0]])
    assert spread(x) == pytest.approx((1 + 3) / 2)


def test_subspace_error_splits_a_point():
    basis = torch.tensor([[0.6, 0.8, 0.0]])
    mean = torch.tensor([1.0, 1.0, 1.0])
    x = mean + 5 * basis + torch.tensor([[0.0, 0.0, 2.0]])
    coordinates, distance = subspace_error(x, mean, basis)
    assert coordinates.item() == pytest.approx(5)
    assert distance.item() == pytest.approx(2)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 9, 7)])
def test_noise_level_finds_the_noise_on_a_smooth_image(shape):
    ramp = torch.linspace(-1, 1, shape[2]).expand(64, *shape)
    estimate = noise_level(ramp + 0.1 * _normal(64, *shape))
    assert estimate.shape == (64,)
    assert estimate.mean().item() == pytest.approx(0.1, rel=0.1)
    assert noise_level(ramp).max() < 1e-6


def test_noise_level_needs_a_block():
    with pytest.raises(ValueError):
        noise_level(torch.zeros(2, 1, 1, 8))


def test_psnr():
    assert psnr(0.01) == pytest.approx(10 * math.log10(400))
    assert psnr(0.0) == pytest.approx(120)


def test_the_frechet_distance_of_gaussians():
    """Against the formula with a matrix square root, and where it is known without one."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(400, 3, generator=generator, dtype=torch.float64)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, a + 2.0) == pytest.approx(3 * 4.0)
    # Commuting covariances: the sum of the squared differences of the standard deviations.
    scale = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    values, vectors = torch.linalg.eigh(torch.cov(a.T))
    white = (a - a.mean(0)) @ vectors / values.sqrt()
    assert frechet_distance(white, white * scale) == pytest.approx(0 + 1 + 4)
    b = torch.randn(300, 3, generator=generator, dtype=torch.float64) @ torch.randn(
        3, 3, generator=generator, dtype=torch.float64)
    first, second = torch.cov(a.T), torch.cov(b.T)
    root = torch.linalg.eigvals(first @ second).sqrt().sum().real
    wanted = (a.mean(0) - b.mean(0)).square().sum() + first.trace() + second.trace() - 2 * root
    assert frechet_distance(a, b) == pytest.approx(wanted.item(), rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(wanted.item(), rel=1e-9)
    assert frechet_distance(a.view(400, 1, 3), b.view(300, 3, 1)) == pytest.approx(wanted.item())
    for wrong in (a[:1], a[:, :2]):
        with pytest.raises(ValueError, match="do not compare"):
            frechet_distance(wrong, b)
