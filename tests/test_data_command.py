"""`python -m robustdm.data`, and every command of docs/data.md."""

import json
import re
import shlex
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from robustdm import train
from robustdm.data.__main__ import DataConfig, look, main
from robustdm.data.corruption import SaltAndPepper
from robustdm.errors import UsageError
from robustdm.ops.stream import shuffled
from robustdm.reporting.images import VISIBLE_PIXELS
from robustdm.runs.config import TrainConfig

DOCUMENT = Path(__file__).parent.parent / "docs" / "data.md"
SIDE = 16
IMAGES = np.random.default_rng(0).integers(0, 256, (40, SIDE, SIDE, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name, images in (("my_pictures", IMAGES), ("other_pictures", 255 - IMAGES[:3])):
        (tmp_path / name).mkdir()
        for k, image in enumerate(images):
            Image.fromarray(image).save(tmp_path / name / f"{k:02d}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "my_pictures"


def test_what_it_prints_is_what_there_is(folder, capsys):
    Image.new("RGB", (20, 30)).save(folder / "zz.png")
    (folder / "broken.jpg").write_bytes(b"no picture")
    found = look(DataConfig(folder))
    pixels = np.concatenate([IMAGES, np.zeros((1, SIDE, SIDE, 3))]) / 127.5 - 1
    np.testing.assert_allclose(found["mean"], pixels.mean((0, 1, 2)), atol=1e-4)
    np.testing.assert_allclose(found["std"], pixels.std((0, 1, 2)), atol=1e-4)
    assert found["stored sizes"] == "16x16: 40, 20x30: 1"
    assert found["channels"] == 3 and found["broken"] == 1
    text = capsys.readouterr().out
    assert "41 items, 3x16x16" in text and "broken.jpg: not a readable image" in text
    assert look(DataConfig(folder, channels=1, resolution=8))["data"].count("1x8x8") == 1


def test_the_preview_shows_each_image_beside_what_training_sees(folder):
    look(DataConfig(folder, corrupt_kind="salt_pepper", corrupt_fraction=0.5, seed=4,
                    preview=folder.parent / "new" / "grid.png"))
    sheet = np.asarray(Image.open(folder.parent / "new" / "grid.png"))
    scale = max(1, round(VISIBLE_PIXELS / SIDE))
    items = shuffled(4, 0, 40)[:32]
    spoilt = SaltAndPepper(0.5, 0.1, 4)(torch.from_numpy(IMAGES).permute(0, 3, 1, 2),
                                       torch.arange(40)).permute(0, 2, 3, 1).numpy()
    assert not np.array_equal(spoilt, IMAGES)
    for k, item in enumerate(items.tolist()):
        for column, truth in ((2 * k % 8, IMAGES[item]), (2 * k % 8 + 1, spoilt[item])):
            top, left = (2 * k // 8) * (SIDE * scale + 2), column * (SIDE * scale + 2)
            shown = sheet[top : top + SIDE * scale : scale, left : left + SIDE * scale : scale]
            assert np.array_equal(shown, truth)


@pytest.mark.parametrize("flags", [[], ["--resident-gib", "0", "--workers", "1"]])
def test_speed_is_that_of_the_training_stream(folder, capsys, flags):
    main([str(folder), "--speed", "--seconds", "0.2", "--batch-size", "8", *flags])
    line = capsys.readouterr().out.splitlines()[-1]
    assert float(re.match(r"loader +([\d,]+) img/s", line)[1].replace(",", "")) > 0
    assert ("decoded by 1 workers" if flags else "held in memory") in line


@pytest.mark.parametrize("argv, message", [
    (["none"], "data_dir is 'none', which does not exist"),
    (["my_pictures", "--seconds", "0"], "seconds is 0"),
    (["my_pictures", "--resolution", "0"], "resolution is 0: it must be at least 1"),
    (["my_pictures", "--stream"], "stream is True, but data_dir is 'my_pictures'"),
    (["my_pictures", "--speed", "--device", "cuda:99"], "device is 'cuda:99', which is not here"),
    (["my_pictures", "--preview", "x.nothing"], "preview is 'x.nothing'"),
    (["my_pictures", "--corrupt-kind", "outliers"], "corrupt_with is None"),
])
def test_wrong_flags(folder, argv, message):
    with pytest.raises(UsageError, match=message) as error:
        main(argv)
    assert "\n" not in str(error.value)


def test_training_writes_how_long_it_waited_for_data(folder):
    argv = ["--preset", "folder", "--data-dir", "my_pictures", "--steps", "4", "--log-every", "2",
            "--resolution", "16", "--block-channels", "32", "--layers-per-block", "1",
            "--attention-resolutions", "16", "--batch-size", "4", "--workers", "0", "--out", "run",
            "--resident-gib", "0", "--num-samples", "2", "--final-steps", "2", "--corrupt-kind",
            "jpeg", "--corrupt-fraction", "0.9"]
    assert train.main(argv) == 0
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and all(0 < line["data_wait"] < 1 for line in lines)
    assert "90% corrupted (jpeg)" in Path("run/report.html").read_text()
    with np.load("run/samples/reference.npz") as reference:
        levels = (reference["clean"] + 1) * 127.5
        assert len(levels) == 38 and np.abs(levels - levels.round()).max() < 1e-3


COMMANDS = re.findall(r"^python -m (robustdm\.\w+) (.+)$", DOCUMENT.read_text(), re.M)


@pytest.mark.parametrize("module, rest", COMMANDS, ids=[" ".join(c)[:60] for c in COMMANDS])
def test_every_command_of_the_document_runs(folder, module, rest):
    argv = shlex.split(rest)
    if "scans.npy" in argv:
        np.save("scans.npy", np.arange(20 * 32 * 32, dtype=np.uint16).reshape(20, 32, 32))
    if module == "robustdm.data":
        main([*argv, *(["--seconds", "0.2", "--workers", "1"] if "--speed" in argv else [])])
        assert "--preview" not in argv or Path("preview.png").is_file()
        return
    if "--stream" in argv:
        pytest.importorskip("datasets")
        import pyarrow.parquet

        rows = [{"bytes": p.read_bytes(), "path": p.name} for p in sorted(folder.iterdir())]
        Path("my_parquet").mkdir()
        pyarrow.parquet.write_table(pyarrow.table({"image": rows}), "my_parquet/train.parquet")
        argv += ["--block-channels", "32", "32", "--attention-head-dim", "32"]
    assert train.main([*argv, "--dry-run", "--batch-size", "2"]) == 0


def test_flags_that_training_has_too_have_its_defaults():
    """They are written twice; what is shown must be what training sees."""
    of_training = {f.name: f.default for f in fields(TrainConfig)}
    shared = {f.name: f.default for f in fields(DataConfig) if f.name in of_training}
    assert len(shared) > 12
    differ = {name for name, default in shared.items() if default != of_training[name]}
    assert differ == {"data", "resolution"}, "found out from the path"
