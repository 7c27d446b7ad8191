"""Metrics of features: against definitions written out, known answers, and torch-fidelity."""

import sys
import types

import numpy as np
import pytest
import torch

from robustdm import UsageError
from robustdm.metrics import (
    FeatureStatistics,
    deviation_ratios,
    frechet_distance,
    inception_score,
    kernel_distance,
    kernel_sums,
    manifold,
    nearest,
    neighbour_radii,
)


def features(count, dims=6, seed=0, shift=0.0, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    return scale * torch.randn(count, dims, generator=g) + shift


def test_streamed_statistics_are_those_of_the_whole():
    x = features(1000, shift=50.0)
    made = FeatureStatistics()
    for part in (x[:1], x[1:1], x[1:300], x[300:]):
        made.update(part)
        assert made.count < 2 or len(made.axes) == 2  # of what came so far
    assert made.count == 1000
    assert torch.allclose(made.mean, x.double().mean(0), rtol=1e-12)
    assert torch.allclose(made.covariance, torch.cov(x.double().T), rtol=1e-9, atol=1e-12)
    other = features(700, seed=1)
    wanted = frechet_distance(x, other)
    assert frechet_distance(made, other) == pytest.approx(wanted, rel=1e-10)
    assert frechet_distance(other, made) == pytest.approx(wanted, rel=1e-10)


def test_statistics_travel_as_an_npz(tmp_path):
    x, y = features(200), features(300, seed=1, shift=0.3)
    made = FeatureStatistics.of(x)
    made.save(tmp_path / "ours.npz")
    back = FeatureStatistics.load(tmp_path / "ours.npz")
    assert back.count == 200 and torch.allclose(back.covariance, made.covariance)
    # EDM's files hold mu and sigma alone.
    np.savez(tmp_path / "edm.npz", mu=made.mean.numpy(), sigma=made.covariance.numpy())
    edm = FeatureStatistics.load(tmp_path / "edm.npz")
    assert edm.count is None
    assert frechet_distance(edm, y) == pytest.approx(frechet_distance(x, y), rel=1e-10)
    assert torch.allclose(deviation_ratios(y, edm), deviation_ratios(y, x), rtol=1e-10)
    np.savez(tmp_path / "other.npz", images=np.zeros(3))
    np.savez(tmp_path / "nan.npz", mu=np.full(2, np.nan), sigma=np.eye(2))
    np.savez(tmp_path / "text.npz", mu=np.array(["a"]), sigma=np.array([["a"]]))
    np.savez(tmp_path / "flat.npz", mu=np.zeros(()), sigma=np.zeros(()))
    (tmp_path / "broken.npz").write_bytes(b"PK nothing")
    for name, words in (("text", "cannot be read"), ("flat", "no Frechet"),
                        ("other", "no Frechet"), ("nan", "NaN"), ("broken", "cannot be read"),
                        ("missing", "cannot be read")):
        with pytest.raises(UsageError, match=words):
            FeatureStatistics.load(tmp_path / f"{name}.npz")


def mmd(a, b):
    """The unbiased estimator with its sums written out."""
    a, b = a.double(), b.double()

    def k(x, y):
        return (x @ y.T / x.shape[1] + 1) ** 3

    aa, bb = k(a, a), k(b, b)
    n, m = len(a), len(b)
    return ((aa.sum() - aa.trace()) / (n * (n - 1)) + (bb.sum() - bb.trace()) / (m * (m - 1))
            - 2 * k(a, b).mean()).item()


@pytest.mark.parametrize("block", [7, 4096])
def test_kernel_distance_and_its_jackknife(block):
    a, b = features(30), features(23, seed=1, shift=0.4)
    made = kernel_distance(a, b, block=block)
    assert made.value == pytest.approx(mmd(a, b), rel=1e-10)
    total = 0.0
    for x, left in ((a, lambda i: mmd(torch.cat([a[:i], a[i + 1:]]), b)),
                    (b, lambda i: mmd(a, torch.cat([b[:i], b[i + 1:]])))):
        values = np.array([left(i) for i in range(len(x))])
        total += (len(x) - 1) / len(x) * ((values - values.mean()) ** 2).sum()
    assert made.error == pytest.approx(total**0.5, rel=1e-8)
    assert kernel_distance(a, b, block=block, sums=kernel_sums(b, block)) == made


def test_kernel_distance_is_unbiased_and_its_error_is_right():
    for shift, low, high in ((0.0, 1.0, 1.6), (0.8, 0.85, 1.15)):  # too large for the same law
        draws = [kernel_distance(features(60, seed=s), features(60, seed=1000 + s, shift=shift))
                 for s in range(200)]
        values = np.array([d.value for d in draws])
        if not shift:
            assert abs(values.mean()) < 4 * values.std() / 200**0.5
        assert low < np.mean([d.error for d in draws]) / values.std() < high


def test_inception_score_of_known_predictions():
    sure = 100 * torch.eye(4).repeat(25, 1)
    assert inception_score(sure, 1).value == pytest.approx(4)
    assert inception_score(torch.zeros(100, 4), 5) == pytest.approx((1, 0))
    with pytest.raises(ValueError, match="splits is 101"):
        inception_score(sure, 101)


def naive_manifold(a, b, k, wide):
    a, b = a.double(), b.double()

    def radius(x, k):
        return torch.cdist(x, x).sort(1).values[:, k]

    d = torch.cdist(a, b)
    return (
        (d <= radius(b, k)).any(1).double().mean().item(),
        (d <= radius(a, k)[:, None]).any(0).double().mean().item(),
        (d <= radius(b, wide)).double().sum().item() / (wide * len(a)),
        (d <= radius(b, wide)).any(0).double().mean().item(),
    )


@pytest.mark.parametrize("block", [17, 4096])
def test_manifold_against_its_definition(block):
    a, b = features(80, shift=0.5), features(90, seed=1, scale=1.3)
    made = manifold(a, b, block=block)
    assert made == pytest.approx(naive_manifold(a, b, 3, 5))
    assert manifold(a, b, block=block, radii=neighbour_radii(b, block=block)) == made
    # Every measure tells: samples that shrink are precise and recall nothing.
    shrunk = manifold(0.1 * features(80), features(90, seed=1))
    assert shrunk.precision == 1 and shrunk.recall < 0.1
    far = manifold(features(80, shift=100.0), features(90, seed=1))
    assert far == (0, 0, 0, 0)
    with pytest.raises(ValueError, match="5 neighbours"):
        manifold(features(5), b)
    with pytest.raises(ValueError, match="5 features do not have 5 neighbours"):
        neighbour_radii(b[:5])


def test_ties_are_ties_both_ways():
    """Of a set with itself: every point lies in five balls and in its own."""
    x = features(1500, 64)
    assert manifold(x, x) == (1, 1, pytest.approx(1.2, abs=1e-12), 1)


def test_twins_are_neighbours():
    b = torch.cat([features(20), features(20)])
    # Three copies of everything: the third neighbour is at distance 0.
    b = torch.cat([b, features(20), features(20)])
    assert manifold(features(20) + 1e-3, b).precision == 0


@pytest.mark.parametrize("block", [7, 4096])
def test_nearest_against_all_pairs(block):
    a, b = features(40), features(33, seed=1)
    value, index = nearest(a, b, block=block)
    full = torch.nn.functional.cosine_similarity(a[:, None], b[None], dim=2)
    assert torch.allclose(value, full.max(1).values, atol=1e-6)
    assert torch.equal(index, full.argmax(1))
    value, index = nearest(b[:20], b, block=block, exclude_self=True)
    own = torch.nn.functional.cosine_similarity(b[:20, None], b[None], dim=2)
    own[torch.arange(20), torch.arange(20)] = -2
    assert torch.equal(index, own.argmax(1)) and torch.allclose(value, own.max(1).values, atol=1e-6)


def test_deviation_ratios_show_shrinkage_and_noise():
    scale = torch.tensor([3.0, 1, 0.1, 0])
    b = features(4000, 4) * scale
    a = 0.5 * features(4000, 4, seed=1) * scale
    assert deviation_ratios(a, b) == pytest.approx([0.5] * 3, rel=0.05)
    noisy = a + 0.1 * features(4000, 4, seed=2)
    assert deviation_ratios(noisy, b)[2] == pytest.approx(1.25**0.5, rel=0.05)
    for few in (b[:1], FeatureStatistics(), features(30, 3)):
        with pytest.raises(ValueError, match="do not compare"):
            deviation_ratios(a, few)


@pytest.fixture
def fidelity(monkeypatch):
    """torch-fidelity, with a stand-in for the torchvision that it asks for on import."""
    if "torchvision" not in sys.modules:
        class Anything(types.ModuleType):
            def __getattr__(self, name):
                if name.startswith("__"):
                    raise AttributeError(name)
                return type(name, (), {})

        made = {}
        for name in ("torchvision", "torchvision.datasets", "torchvision.transforms",
                     "torchvision.transforms.functional", "torchvision.models"):
            made[name] = Anything(name)
            made[name].__path__ = []
            parent, _, child = name.rpartition(".")
            if parent:
                setattr(made[parent], child, made[name])
            monkeypatch.setitem(sys.modules, name, made[name])
    module = pytest.importorskip(
        "torch_fidelity", reason="pip install --no-deps torch-fidelity", exc_type=Exception)
    yield module
    for name in [n for n in sys.modules if n.startswith("torch_fidelity")]:
        monkeypatch.delitem(sys.modules, name)


def test_parity_with_torch_fidelity(fidelity):
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    a, b = features(500, 20), features(500, 20, seed=1, shift=0.2, scale=1.2)
    wide = (a.double(), b.double())
    theirs = fid_statistics_to_metric(*(fid_features_to_statistics(x) for x in wide), False)
    assert frechet_distance(a, b) == pytest.approx(
        theirs["frechet_inception_distance"], rel=1e-6)
    theirs = kid_features_to_metric(*wide, kid_subsets=1, kid_subset_size=500, verbose=False)
    assert kernel_distance(a, b).value == pytest.approx(
        theirs["kernel_inception_distance_mean"], rel=1e-6)
    theirs = prc_features_to_metric(*wide, verbose=False)
    ours = manifold(a, b)
    assert (ours.precision, ours.recall) == pytest.approx(
        (theirs["precision"], theirs["recall"]), rel=1e-6)
    theirs = isc_features_to_metric(a.double(), shuffle=False)
    assert inception_score(a) == pytest.approx(
        (theirs["inception_score_mean"], theirs["inception_score_std"]), rel=1e-6)
