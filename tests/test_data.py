"""Data sets whose clean law is known, their corruption, and the order of training."""

import itertools
import json
import math

import pytest
import torch

from robustdm.data import Corruption, SubspaceData, TensorData, batches, load_data
from robustdm.data.base import ImageTensor, split
from robustdm.data.subspace import principal_components
from robustdm.errors import UsageError
from robustdm.ops import stream
from robustdm.ops.stream import shuffled
from robustdm.runs.config import TrainConfig
from robustdm.runs.presets import preset_values


def config(preset="digits", **values):
    return TrainConfig(**preset_values(preset) | {"num_points": 2000} | values)


def everything(data, which="batch"):
    return getattr(data, which)(torch.arange(len(data)))


KINDS = [
    config(),
    config("plane"),
    config("plane", point_noise="outlier", point_noise_level=0.2),
    config("gaussians"),
    config("gaussians", point_noise="inlier", point_noise_level=1.0),
    config("subspace"),
    config("subspace", subspace_space="ambient", resolution=8),
]
IDS = [f"{c.data}-{c.point_noise}-{c.subspace_space}" for c in KINDS]


@pytest.mark.parametrize("cfg", KINDS, ids=IDS)
class TestEverySet:
    def test_items_have_the_promised_form(self, cfg):
        data = load_data(cfg)
        x = data.batch(torch.tensor([3, 0, 3]))
        assert x.shape == (3, *data.shape) and x.dtype == torch.float32
        assert torch.equal(x[0], x[2])
        assert data.is_image == (len(data.shape) == 3)
        assert data.describe().count("\n") == 0 and data.name in data.describe()

    def test_the_same_configuration_gives_the_same_data(self, cfg):
        a, b = load_data(cfg), load_data(cfg)
        assert torch.equal(everything(a), everything(b))
        assert a.identity() == b.identity() == json.loads(json.dumps(a.identity()))

    def test_noisy_data_measure_clearly_worse_than_clean(self, cfg):
        data = load_data(cfg)
        clean = data.measure(everything(data, "clean"))
        noisy = data.measure(everything(data))
        assert all(math.isfinite(value) for value in (*clean.values(), *noisy.values()))
        assert noisy["sliced_wasserstein"] > 1.5 * clean["sliced_wasserstein"]
        key = {"digits": "noise_rms", "subspace": "off_subspace_sd"}.get(cfg.data, "distance")
        assert noisy[key] > 3 * clean[key]

    def test_heldout_split_changes_no_item(self, cfg):
        data, whole = load_data(cfg), load_data(TrainConfig(**vars(cfg) | {"holdout": 0.0}))
        assert whole.heldout is None and len(whole) == len(data) + len(data.heldout)
        assert len(data.heldout) == round(0.05 * len(whole))
        assert data.heldout.heldout is None
        assert not set(data.members.tolist()) & set(data.heldout.members.tolist())
        for part in (data, data.heldout):
            torch.testing.assert_close(everything(part), whole.batch(part.members), atol=0, rtol=0)

    def test_samples_that_are_not_finite_are_counted_not_measured(self, cfg):
        data = load_data(cfg)
        x = everything(data, "clean")[:100]
        broken = x.clone()
        broken[:25].view(25, -1)[:, 0] = float("nan")
        result = data.measure(broken)
        assert result.pop("finite_share") == 0.75
        assert result == data.measure(x[25:])
        assert data.measure(torch.full_like(x, float("inf"))) == {"finite_share": 0.0}


def test_identity_tells_data_apart():
    sets = [*KINDS, config(seed=1), config(corrupt_sigma=0.3), config(holdout=0.1),
            config("subspace", subspace_rank=4), config("plane", num_points=1999)]
    identities = [json.dumps(load_data(cfg).identity()) for cfg in sets]
    assert len(set(identities)) == len(identities)


# Known laws.


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    data = load_data(config(holdout=0.0))
    images = torch.from_numpy(load_digits().images).float()
    assert torch.equal((everything(data, "clean") + 1) * 8, images.unsqueeze(1))


def test_digits_measures_see_the_noise():
    data = load_data(config(corrupt_fraction=1.0, corrupt_sigma=0.2))
    noisy, clean = data.measure(everything(data)), data.measure(everything(data, "clean"))
    assert noisy["noise_rms"] == pytest.approx(0.2, rel=0.05)
    # 44 of 64 dimensions are outside the 20 components.
    added = noisy["residual"] ** 2 - clean["residual"] ** 2
    assert added == pytest.approx(0.2**2 * 44 / 64, rel=0.05)
    assert clean["pixel_std"] == pytest.approx(0.46, abs=0.01)


def test_plane_is_the_papers():
    data = load_data(config("plane", point_noise="clean", num_points=20_000, holdout=0.0))
    points = data.to_original(everything(data).double())
    assert (points.sum(dim=1) - 30).abs().max() < 1e-4
    assert torch.allclose(points.mean(dim=0), torch.tensor(10.0).double(), atol=0.1)
    # Isotropic in the plane: covariance 9 (I - n n^T).
    truth = 9 * (torch.eye(3) - 1 / 3).double()
    assert torch.allclose(points.T.cov(), truth, atol=0.2)
    assert torch.equal(everything(data), everything(data, "clean"))


@pytest.mark.parametrize("name", ["plane", "gaussians"])
@pytest.mark.parametrize("kind", ["clean", "inlier", "outlier"])
def test_points_are_normalised_by_what_is_observed(name, kind):
    data = load_data(config(name, point_noise=kind, point_noise_level=0.5, holdout=0.0))
    x = everything(data)
    assert x.mean(dim=0).abs().max() < 1e-6
    # The plane is scaled by a constant: a Gaussian's largest coordinate is another in every draw.
    assert x.abs().max().item() == pytest.approx(1, abs=0.2 if name == "plane" else 1e-6)


@pytest.mark.parametrize("level", [0.5, 2.0])
def test_inlier_noise_has_its_standard_deviation_in_original_units(level):
    plane = load_data(config("plane", point_noise="inlier", point_noise_level=level))
    shift = plane.to_original(everything(plane)) - plane.to_original(everything(plane, "clean"))
    along = shift.sum(dim=1) / math.sqrt(3)
    assert along.std().item() == pytest.approx(level, rel=0.06)
    assert (shift - along.unsqueeze(1) / math.sqrt(3)).abs().max() < 1e-4
    ball = load_data(config("gaussians", point_noise="inlier", point_noise_level=level))
    shift = ball.to_original(everything(ball)) - ball.to_original(everything(ball, "clean"))
    assert torch.allclose(shift.T.cov(), level**2 * torch.eye(3), atol=0.1 * level**2)


@pytest.mark.parametrize("name, low, high", [("plane", 0, 20), ("gaussians", 8, 32)])
def test_outliers_are_the_given_share_and_lie_on_the_whole_grid(name, low, high):
    data = load_data(config(name, point_noise="outlier", point_noise_level=0.2,
                            num_points=10_000, holdout=0.0))
    points, clean = (data.to_original(everything(data, w)) for w in ("batch", "clean"))
    moved = ((points - clean).abs() > 1e-4).any(dim=1)
    assert moved.double().mean().item() == pytest.approx(0.2, abs=0.015)
    grid = (points[moved] - low) / 2
    assert (grid - grid.round()).abs().max() < 1e-4
    counts = torch.stack([grid[:, k].round().long().bincount() for k in range(3)])
    nodes = (high - low) // 2 + 1
    assert counts.shape == (3, nodes)
    assert (counts / moved.sum() - 1 / nodes).abs().max() < 0.03


def test_gaussians_measure_the_truth():
    data = load_data(config("gaussians", point_noise="clean", num_points=20_000))
    result = data.measure(everything(data))
    assert result["distance"] == pytest.approx(2 * math.sqrt(2 / math.pi), rel=0.02)  # chi, k = 3
    assert result["far_share"] < 0.003
    assert all(result[f"mode{k}"] == pytest.approx(1 / 3, abs=0.02) for k in range(3))


def test_gaussians_measure_counts_lost_modes_and_strays():
    data = load_data(config("gaussians"))
    points = torch.tensor([[10.0, 10, 10], [20, 20, 21.1], [20, 20, 20], [20, 20, 20.5]])
    result = data.measure((points - data.offset) / data.scale)
    assert result["far_share"] == 0.25
    assert (result["mode0"], result["mode1"], result["mode2"]) == (0.25, 0.75, 0)
    assert result["distance"] == pytest.approx((1.1 + 0.5) / 0.25 / 4, rel=1e-4)


def test_plane_measure_tells_shrinkage_from_noise():
    data = load_data(config("plane"))
    clean = everything(data, "clean")
    shrunk = clean.mean(dim=0) + 0.5 * (clean - clean.mean(dim=0))
    result = data.measure(shrunk)
    assert result["distance"] < 1e-3
    assert result["in_plane_std"] == pytest.approx(0.5, abs=0.02)
    assert result["sliced_wasserstein"] > 5 * data.measure(clean)["sliced_wasserstein"]


def test_a_longer_set_begins_with_the_shorter_one():
    for name in ("plane", "gaussians"):
        short, long = (load_data(config(name, num_points=n, holdout=0.0)) for n in (50, 80))
        a, b = (d.to_original(everything(d).double())[:50] for d in (short, long))
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


def test_all_outliers_is_refused():
    with pytest.raises(UsageError, match="point_noise_level is 1: .* below 1"):
        load_data(config("plane", point_noise="outlier", point_noise_level=1.0))


@pytest.mark.parametrize("cfg", KINDS[1:], ids=IDS[1:])
def test_score_is_the_gradient_of_the_smoothed_density(cfg):
    data = load_data(TrainConfig(**vars(cfg) | {"num_points": 400}))
    sigma = 0.4
    clean = everything(data, "clean").double()
    x = (clean[:3] + 0.1).requires_grad_()
    # Log-density by its definition, from the law in the units of training.
    flat = x.flatten(1)
    if cfg.data == "subspace":
        covariance = data.basis.T @ data.sds.diag().square() @ data.basis
        parts = [(data.mean, covariance)]
    elif cfg.data == "plane":
        covariance = (torch.eye(3) - 1 / 3).double() * (3 / data.scale) ** 2
        parts = [((10 - data.offset) / data.scale, covariance)]
    else:
        spread = torch.eye(3).double() * (0.25 / data.scale) ** 2
        parts = [((mode - data.offset) / data.scale, spread) for mode in data.modes]
    noise = sigma**2 * torch.eye(flat.shape[1]).double()
    density = torch.stack([
        torch.distributions.MultivariateNormal(mean, cov + noise).log_prob(flat)
        for mean, cov in parts
    ]).logsumexp(dim=0)
    (truth,) = torch.autograd.grad(density.sum(), x)
    torch.testing.assert_close(data.score(x.detach(), sigma), truth, rtol=1e-6, atol=1e-6)


# Subspaces.


def test_principal_components_agree_with_the_svd_on_both_sides():
    torch.manual_seed(0)
    for shape in ((40, 12), (12, 40)):
        x = torch.randn(*shape, dtype=torch.float64)
        mean, sds, basis = principal_components(x, 4)
        centred = x - x.mean(dim=0)
        _, values, rows = torch.linalg.svd(centred, full_matrices=False)
        torch.testing.assert_close(sds, values[:4] / math.sqrt(shape[0] - 1))
        torch.testing.assert_close((basis * rows[:4]).sum(dim=1).abs(), torch.ones(4).double())
        torch.testing.assert_close(basis @ basis.T, torch.eye(4).double())
        assert torch.equal(mean, x.mean(dim=0))


def test_a_rank_beyond_the_images_is_refused():
    with pytest.raises(UsageError, match="subspace_rank is 70: the images span 61 dimensions"):
        load_data(config("subspace", subspace_rank=70))


def test_subspace_from_given_deviations():
    sds = [2, 1.4, 1, 0.7, 0.5]
    data = SubspaceData.from_sds(sds, 27, corruption=Corruption(0.9, 0.1, 3), seed=3)
    assert data.shape == (32,) and len(data) == 5000
    clean, noisy = everything(data, "clean"), everything(data)
    assert clean[:, 5:].abs().max() == 0
    torch.testing.assert_close(clean[:, :5].std(dim=0), torch.tensor(sds), rtol=0.05, atol=0)
    result = data.measure(noisy)
    # The numbers of the specification: rms .1 sqrt(.9) off the subspace, mean norm .465.
    assert result["off_subspace_sd"] == pytest.approx(0.0949, rel=0.02)
    assert result["rho"] == pytest.approx(0.465, rel=0.02)
    assert [result[f"component_ratio_{k}"] for k in range(1, 6)] == pytest.approx([1] * 5, abs=0.06)


def test_ambient_subspace_measures_are_those_of_the_coordinates():
    pca = load_data(config("subspace", subspace_noise_dims=59, corrupt_fraction=0.0))
    ambient = load_data(config("subspace", subspace_space="ambient", corrupt_fraction=0.0))
    a, b = (d.measure(everything(d)) for d in (pca, ambient))
    assert "psnr" not in a and b["psnr"] > 100
    assert a["component_ratio_2"] == pytest.approx(b["component_ratio_2"], rel=1e-4)
    # The literal rho leaves the mean in: perfect samples have ||(I - P) mu||.
    mean, basis = ambient.mean, ambient.basis
    offset = (mean - basis.T @ (basis @ mean)).norm().item()
    assert b["rho_paper"] == pytest.approx(offset, rel=1e-4)


def test_psnr_is_the_papers_function_of_rho():
    data = load_data(config("subspace", subspace_space="ambient", corrupt_fraction=1.0))
    result = data.measure(everything(data))
    rho = result["off_subspace_sd"] * math.sqrt(59)  # rms instead of mean
    assert result["psnr"] == pytest.approx(20 * math.log10(2 * 8 / rho), abs=1e-6)


def test_ambient_resolution_must_be_that_of_the_images():
    with pytest.raises(UsageError, match="resolution is 16: .* 8x8, set it to 8"):
        load_data(config("subspace", subspace_space="ambient", resolution=16))


# Corruption.


def test_corruption_has_the_right_share_and_deviation():
    corruption = Corruption(0.7, 0.3, seed=5)
    clean = torch.zeros(4000, 2, 3, 3)
    items = torch.arange(4000)
    noisy = corruption(clean, items)
    hit = noisy.flatten(1).abs().sum(dim=1) > 0
    assert torch.equal(hit, corruption.chosen(items))
    assert hit.double().mean().item() == pytest.approx(0.7, abs=0.03)
    assert noisy[hit].std().item() == pytest.approx(0.3, rel=0.02)
    assert abs(noisy[hit].mean().item()) < 0.01
    assert noisy.abs().max() > 1  # never clipped
    rows = noisy[hit].flatten(1)
    assert (rows.T.corrcoef() - torch.eye(18)).abs().max() < 0.1


def test_corruption_of_an_item_does_not_depend_on_the_batch():
    corruption = Corruption(0.9, 0.2, seed=0)
    clean = torch.rand(64, 3, 4, 4)
    whole = corruption(clean, torch.arange(64))
    picked = torch.tensor([63, 5, 5, 0, 17])
    assert torch.equal(corruption(clean[picked], picked), whole[picked])
    assert not torch.equal(Corruption(0.9, 0.2, seed=1)(clean, torch.arange(64)), whole)


def test_no_corruption_leaves_the_data_alone():
    clean = torch.rand(8, 2)
    for corruption in (Corruption(0.0, 0.2, 0), Corruption(0.9, 0.0, 0)):
        assert corruption(clean, torch.arange(8)) is clean
    data = load_data(config(corrupt_fraction=0.0))
    assert torch.equal(everything(data), everything(data, "clean"))
    assert data.identity()["corruption"] is None


def test_corruption_on_the_fly_equals_the_precomputed_one(monkeypatch):
    values = torch.randint(0, 256, (60, 3, 5, 5), dtype=torch.uint8)
    settings = ("x", values, Corruption(0.9, 0.2, 4), 0.1, 4)
    small = TensorData(*settings)
    monkeypatch.setattr("robustdm.data.base._PRECOMPUTE_ELEMENTS", 0)
    large = TensorData(*settings)
    assert small.observed is not None and large.observed is None
    for a, b in ((small, large), (small.heldout, large.heldout)):
        assert torch.equal(everything(a), everything(b))
    host = TensorData(*settings, resident=False)
    assert torch.equal(everything(host), everything(small)) and not host._copies


# Order.


def test_split_sizes():
    assert [len(split(n, 0.05, 0)[1]) for n in (19, 20, 100, 1000)] == [0, 1, 5, 50]
    assert len(split(1000, 0.0, 0)[1]) == 0
    assert len(split(20, 0.01, 0)[1]) == 1
    assert len(split(20, 0.99, 0)[0]) == 1
    train, held = split(100, 0.3, 0)
    assert sorted([*train.tolist(), *held.tolist()]) == list(range(100))
    assert not torch.equal(split(100, 0.3, 1)[1], held)


def _take(data, cfg, start, count):
    return list(itertools.islice(batches(data, cfg, start, "cpu"), count))


@pytest.mark.parametrize("batch_size", [7, 64, 50])
def test_order_is_a_permutation_per_epoch_whatever_the_batch(batch_size):
    # 20 items: batches straddle epochs, and 64 is more than three of them.
    data = SubspaceData.from_sds([1.0, 0.5], 1, count=20)
    cfg = config("subspace", batch_size=batch_size, seed=2)
    stream = torch.cat([i for _, i in _take(data, cfg, 0, math.ceil(100 / batch_size))])
    expected = torch.cat([shuffled(2, epoch, 20) for epoch in range(6)])
    assert torch.equal(stream[:100], expected[:100])


@pytest.mark.parametrize("flip", [False, True])
def test_starting_at_a_step_equals_skipping_to_it(flip):
    cfg = config(batch_size=400, flip=flip)
    data = load_data(cfg)
    stream, later = _take(data, cfg, 0, 9), _take(data, cfg, 5, 4)
    for (x, i), (y, j) in zip(stream[5:], later, strict=True):
        assert torch.equal(x, y) and torch.equal(i, j)
        assert x.shape == (400, 1, 8, 8) and i.dtype == torch.int64


def test_flip_turns_about_half_the_images_over():
    cfg = config(batch_size=500, flip=True)
    data = load_data(cfg)
    patterns = []
    for x, i in _take(data, cfg, 0, 2):
        plain = data.batch(i)
        flipped = (x != plain).flatten(1).any(dim=1)
        assert torch.equal(x[flipped], plain[flipped].flip(-1))
        assert 200 < flipped.sum() < 300
        patterns.append(flipped)
    assert not torch.equal(*patterns)


def test_flip_needs_images():
    with pytest.raises(UsageError, match="flip is True"):
        load_data(config("plane", flip=True))


def test_sets_that_need_no_files_say_so(tmp_path):
    with pytest.raises(UsageError, match="data_dir is .*digits needs none; use --data images"):
        load_data(config(data_dir=tmp_path))
    with pytest.raises(UsageError, match="resolution is 16: the digits are 8x8"):
        load_data(config(resolution=16))


@pytest.mark.parametrize("flip, fraction", [(False, 0.0), (True, 0.0), (True, 0.8)])
def test_half_of_a_batch_is_flipped_as_the_step_draws(flip, fraction):
    """uint8 images too many to corrupt beforehand are corrupted batch by batch."""
    images = torch.randint(0, 256, (6000, 3, 16, 16), dtype=torch.uint8)
    data = ImageTensor("x", images, Corruption(fraction, 0.3, 5), holdout=0.1, seed=0)
    assert data.observed is None
    cfg = config(batch_size=64, flip=flip, seed=9)
    x, indices = next(batches(data, cfg, 3, "cpu"))
    plain = data.batch(indices)
    turned = (x != plain).flatten(1).any(dim=1)
    assert torch.equal(x[turned], plain[turned].flip(-1))
    word = stream.philox(9, 3, torch.arange(64), stream.Stream.FLIP)[0]
    assert torch.equal(turned, (stream.uniform(word) < 0.5) & flip)
