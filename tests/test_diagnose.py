"""The command that says what noise is in a data set."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from robustdm import diagnose
from robustdm.cli import parse_train
from robustdm.data import noise
from robustdm.errors import UsageError
from robustdm.metrics.noise import Kind
from robustdm.reporting.images import to_uint8
from tests.test_noise import noisy, normal, pictures


def call(capsys, *flags):
    diagnose.main([*map(str, flags)])
    return capsys.readouterr().out


def saved(path, images):
    np.save(path, to_uint8(images))
    return path


@pytest.fixture(scope="module")
def noisy_npy(tmp_path_factory):
    images, chosen = noisy(pictures(600, 32) * 0.8, 0.2, 0.9)
    return saved(tmp_path_factory.mktemp("data") / "noisy.npy", images), chosen


def test_one_json_object_alone(noisy_npy, capsys):
    found = json.loads(call(capsys, noisy_npy[0], "--json"))
    assert found["kind"] == "mixture" and found["items"] == found["of"] == 600
    assert found["sigma"] == pytest.approx(0.2, rel=0.05)
    assert found["share"] == pytest.approx(0.9, abs=0.05)
    assert found["rms"] == pytest.approx(0.19, rel=0.05)
    first, second = found["recommended"].split(" && ")
    parse_train(first.split()[3:])  # the flags are those of training
    assert "--resolution 32 --objective ddpm" in first and "--baseline known" in second


def test_the_screen_and_the_page(noisy_npy, capsys, tmp_path):
    path, chosen = noisy_npy
    said = call(capsys, path, "--out", tmp_path / "<b>")
    assert "white Gaussian noise on some of the items" in said and "--baseline known" in said
    record = json.loads((tmp_path / "<b>/diagnosis.json").read_text())
    html = (tmp_path / "<b>/diagnosis.html").read_text()
    assert html.count("data:image/png") == 3 and "noisiest items" in html and "<b>" not in html
    flagged = (tmp_path / "<b>/flagged.txt").read_text().splitlines()
    assert len(flagged) == record["flagged"] == pytest.approx(int(chosen.sum()), abs=12)


def test_a_folder_of_pictures_names_those_that_carry_noise(capsys, tmp_path):
    images, chosen = noisy(pictures(120, 32) * 0.8, 0.2, 0.5)
    (tmp_path / "pictures").mkdir()
    for k, pixels in enumerate(to_uint8(images)):
        Image.fromarray(pixels).save(tmp_path / f"pictures/{k:03d}.png")
    call(capsys, tmp_path / "pictures", "--out", tmp_path / "out")
    wrong = {f"{k:03d}.png" for k in chosen.nonzero().flatten().tolist()} ^ set(
        (tmp_path / "out/flagged.txt").read_text().splitlines())
    assert len(wrong) <= 4


def test_the_items_looked_at_are_random(monkeypatch, noisy_npy, capsys):
    """Of a set in order, the first items would say nothing of the rest."""
    monkeypatch.setattr(diagnose, "_NUMBERS", 300 * 3 * 32 * 32)
    found = json.loads(call(capsys, noisy_npy[0], "--json"))
    assert (found["items"], found["of"]) == (300, 600) and found["kind"] == "mixture"
    assert "300 items of 600, drawn at random" in call(capsys, noisy_npy[0], "--seed", 1)


def test_points_and_samples_of_a_run(capsys, tmp_path):
    points = normal(500, 2) @ normal(2, 6) + 0.1 * normal(500, 6, seed=2)
    np.savez(tmp_path / "samples.npz", samples=points.numpy())
    found = json.loads(call(capsys, tmp_path, "--json"))
    assert found["kind"] == "gaussian" and found["rms"] == pytest.approx(0.1, rel=0.1)
    assert found["recommended"] == "python -m robustdm.sample --run RUN --baseline known"
    np.savez(tmp_path / "samples.npz", samples=(pictures(200, 32) * 1.1).numpy())
    assert json.loads(call(capsys, tmp_path, "--json"))["kind"] == "clean", "unclipped samples"


@pytest.mark.parametrize("content, words", [
    (torch.zeros(1, 3, 32, 32), "1 image is too few"),
    (None, "does not exist"),
])
def test_what_cannot_be_diagnosed(content, words, tmp_path, capsys):
    path = tmp_path / "x.npy"
    if content is not None:
        saved(path, content)
    with pytest.raises(UsageError, match=words):
        diagnose.main([str(path)])


def test_samples_of_a_run_that_has_diverged(tmp_path):
    samples = normal(40, 3, 16, 16)
    samples[7, 0, 3, 3] = float("nan")
    np.savez(tmp_path / "samples.npz", samples=samples.numpy())
    with pytest.raises(UsageError, match="item 7 holds NaN or infinity"):
        diagnose.main([str(tmp_path)])


def test_copies_of_one_image(tmp_path, capsys):
    """No item's noise is above another's."""
    path = saved(tmp_path / "x.npy", noisy(pictures(1, 32), 0.2)[0].expand(50, 3, 32, 32))
    assert json.loads(call(capsys, path, "--json"))["share"] == 1


def test_constant_images(tmp_path, capsys):
    path = saved(tmp_path / "x.npy", torch.full((20, 3, 16, 16), 0.5))
    found = json.loads(call(capsys, path, "--json"))
    assert found["kind"] == "constant" and found["recommended"] == "" and found["rms"] == 0
    assert "nothing to learn" in call(capsys, path)


def test_every_kind_has_advice():
    assert set(noise.ADVICE) == set(noise.MEANING) == set(Kind.__args__)


def test_floats_beyond_black_and_white_are_read_as_they_are(capsys, tmp_path):
    images, _ = noisy(pictures(300, 32), 0.4)
    np.save(tmp_path / "x.npy", 1000 * images.numpy())
    found = json.loads(call(capsys, tmp_path / "x.npy", "--json", "--value-range", -1000, 1000))
    assert found["kind"] == "gaussian" and found["sigma"] == pytest.approx(0.4, rel=0.03)
    assert "--value-range -1000 1000" in found["recommended"]
