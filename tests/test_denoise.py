"""Pictures themselves without their noise, by one call of a network that learned noisy ones."""

import json
import shutil

import numpy as np
import pytest
import torch

from robustdm import denoise as command
from robustdm.errors import UsageError
from robustdm.method.baselines import denoise
from robustdm.method.schedule import NoiseSchedule
from tests.test_noise import noisy, pictures
from tests.test_sample import make_run

SCHEDULE = NoiseSchedule.linear(1000)


@pytest.mark.parametrize("stop", [0.25, 0.5, 1.0])
def test_data_of_known_variance(stop):
    """The optimum for data of variance V with noise sigma: what is left is linear in the data."""
    sigma, variances = 0.2, torch.tensor([0.0, 0.04, 1.0])

    def network(x, t):
        a = SCHEDULE.sqrt_alphas_cumprod[t].float()[:, None]
        s = SCHEDULE.sqrt_one_minus_alphas_cumprod[t].float()[:, None]
        return s * x / (a**2 * (variances + sigma**2) + s**2)

    x = torch.ones(1, 3)
    noise = SCHEDULE.sqrt_one_minus_alphas_cumprod / SCHEDULE.sqrt_alphas_cumprod
    level = noise[(noise - stop * sigma).abs().argmin()].item()
    left = variances / (variances + sigma**2 + level**2)
    assert torch.allclose(denoise(network, SCHEDULE, x, sigma, stop)[0], left, atol=1e-5)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"), shape=(3, 16, 16), objective="ddpm",
                    data="images", data_dir=tmp_path_factory.mktemp("data"), resolution=16,
                    block_channels=(8, 8), attention_resolutions=())


@pytest.fixture(scope="module")
def half_noisy(tmp_path_factory):
    images, chosen = noisy(pictures(300), 0.2, 0.5)
    path = tmp_path_factory.mktemp("set") / "x.npy"
    np.save(path, images.numpy())
    return path, images, chosen


def call(path, run, *flags):
    command.main([str(path), "--run", str(run), "--value-range", "-1", "1", *map(str, flags)])


def test_noisy_items_are_corrected_and_clean_ones_left(run, half_noisy, tmp_path, capsys):
    path, images, chosen = half_noisy
    call(path, run, "--out", tmp_path / "out", "--batch-size", 64)
    made = torch.from_numpy(np.load(tmp_path / "out/samples.npz")["samples"])
    changed = ((made - images).abs() > 1e-5).flatten(1).any(1)
    assert (changed == chosen).double().mean() > 0.95
    record = json.loads((tmp_path / "out/denoise.json").read_text())
    assert record["sigma"] == pytest.approx(0.2, rel=0.08) and record["items"] == 300
    assert record["corrected"] == int(changed.sum())
    assert (tmp_path / "out/00299.png").is_file() and (tmp_path / "out/grid.png").is_file()
    assert f"{record['corrected']} of 300 items corrected" in capsys.readouterr().out
    with pytest.raises(UsageError, match="it holds results"):
        call(path, run, "--out", tmp_path / "out")
    call(path, run, "--out", tmp_path / "out", "--overwrite", "--all", "--sigma", 0.1)
    other = torch.from_numpy(np.load(tmp_path / "out/samples.npz")["samples"])
    assert ((other - images).abs() > 1e-5).flatten(1).any(1).all()


@pytest.mark.parametrize("flags, words", [
    (["--sigma", -1], "sigma is -1"), (["--stop", 0], "stop is 0"),
    (["--run", "nowhere"], "nowhere"), (["--sigma", "nan"], "sigma is nan"),
])
def test_wrong_flags(flags, words, run, half_noisy, tmp_path):
    with pytest.raises(UsageError, match=words):
        call(half_noisy[0], run, "--out", tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


def test_wrong_sets_and_runs(run, half_noisy, tmp_path):
    np.save(tmp_path / "clean.npy", pictures(100).numpy())
    np.save(tmp_path / "large.npy", pictures(10, 32).numpy())
    for name, words in (("clean.npy", "its items look clean, .*--sigma"),
                        ("large.npy", "float images of 32x32, .* are not brought to 16x16")):
        with pytest.raises(UsageError, match=words):
            call(tmp_path / name, run, "--out", tmp_path / "out")
    robust = shutil.copytree(run, tmp_path / "robust")
    config = (robust / "config.yaml").read_text()
    (robust / "config.yaml").write_text(config.replace("objective: ddpm", "objective: robust_ran"))
    with pytest.raises(UsageError, match="trained with robust_ran, which removes noise itself"):
        call(half_noisy[0], robust, "--out", tmp_path / "out")
