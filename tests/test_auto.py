"""What training measures of the noise in its data, and --objective auto, which follows it."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from robustdm.errors import UsageError
from robustdm.method.baselines import Baseline
from robustdm.training.auto import choose_objective
from robustdm.training.loop import train
from tests.test_noise import noisy, normal, pictures
from tests.test_train import tiny


def config_of(tmp_path, images, **fields):
    np.save(tmp_path / "x.npy", images.numpy())
    values = dict(data="images", data_dir=tmp_path / "x.npy", resolution=16, corrupt_fraction=0.0,
                  value_range=(-1.0, 1.0), objective="auto", holdout=0.0)
    return tiny(tmp_path, **values | fields)


@pytest.mark.parametrize("make, kind, objective, corrected", [
    (lambda x: noisy(x, 0.2)[0], "gaussian", "ddpm", True),
    (lambda x: x, "clean", "ddpm", False),
    (lambda x: x + 0.2 * normal(len(x), 1, 16, 16), "coloured", "ddpm", False),
])
def test_the_noise_decides(make, kind, objective, corrected, tmp_path, capsys):
    config = choose_objective(config_of(tmp_path, make(pictures(300))))
    assert (config.objective, config.correct_samples) == (objective, corrected)
    assert f"--objective {objective}" in capsys.readouterr().out
    assert choose_objective(replace(config, objective="robust_ran")).objective == "robust_ran"


def test_data_that_hold_nothing(tmp_path):
    with pytest.raises(UsageError, match="objective is 'auto': .* do not vary"):
        choose_objective(config_of(tmp_path, torch.full((30, 1, 16, 16), 0.3)))


def test_one_command_from_noisy_pictures_to_corrected_samples(tmp_path):
    """The samples of the report are those of --baseline known; the run can be continued."""
    config = config_of(tmp_path, noisy(pictures(200), 0.2)[0], steps=4, num_samples=40,
                       final_steps=20)
    summary = train(config, "off").summary
    saved = (config.out / "config.yaml").read_text()
    assert "objective: ddpm" in saved and "correct_samples: true" in saved
    recorded = json.loads((config.out / "noise.json").read_text())
    assert recorded["kind"] == "gaussian" and recorded["rms"] == pytest.approx(0.2, rel=0.05)
    assert summary["noise"]["training data"] == recorded
    beside = json.loads((config.out / "pipeline/noise.json").read_text())
    assert beside["rms"] == recorded["rms"]
    corrected = np.load(config.out / "samples/final.npz")["samples"]

    def plain(**settings):
        from robustdm.method.sampling import sample
        from robustdm.models.load_run import load_run

        run = load_run(config.out)
        return sample(run.model, run.schedule, run.shape, num=40, steps=20, seed=config.seed,
                      **settings).numpy()

    wanted = plain(**Baseline("known", recorded["rms"]).settings)
    assert np.abs(corrected - plain()).max() > 10 * np.abs(corrected - wanted).max()
    longer = train(replace(config, resume=True, steps=6), "off")
    assert longer.step == 6


def test_a_robust_run_stores_no_noise_to_correct(tmp_path):
    config = config_of(tmp_path, noisy(pictures(200), 0.2)[0], steps=2, objective="robust_ran",
                       correct_samples=True)
    summary = train(config, "off").summary
    assert summary["noise"]["training data"]["kind"] == "gaussian"
    assert not (config.out / "pipeline/noise.json").exists()
