"""Every kind of corruption against a plain statement of what it does, and its one realisation."""

import io
import itertools
import json

import numpy as np
import pytest
import torch
from PIL import Image

from robustdm.data import Corruption, batches, load_data
from robustdm.data.base import ImageTensor, to_float
from robustdm.data.corruption import Jpeg, MissingPixels, Outliers, SaltAndPepper
from robustdm.data.images import ImageFiles
from robustdm.errors import UsageError
from robustdm.ops.stream import LAYOUT_VERSION, Stream, philox_int
from robustdm.runs.config import TrainConfig
from robustdm.runs.presets import preset_values

SIDE = 16
IMAGES = np.random.default_rng(0).integers(0, 256, (24, SIDE, SIDE, 3), dtype=np.uint8)
OTHERS = np.random.default_rng(1).integers(0, 256, (5, SIDE, SIDE, 3), dtype=np.uint8)
SEED = 3
FIELDS = {
    "salt_pepper": dict(corrupt_pixels=0.3),
    "missing": dict(corrupt_pixels=0.3),
    "jpeg": dict(corrupt_quality=7),
    "outliers": {},
}


def words(index, stream):
    return philox_int(SEED, 0, index, stream, LAYOUT_VERSION)


def plain(kind, image, item, fraction):
    """What happens to an image (H, W, C) uint8: NumPy, Pillow and the random stream alone."""
    choice = words(item, Stream.CORRUPT_CHOICE)
    if (choice[0] >> 8) * 2.0**-24 >= fraction:
        return image
    if kind == "jpeg":
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=7, subsampling=2)
        return np.asarray(Image.open(file))
    if kind == "outliers":
        return OTHERS[choice[1] * len(OTHERS) >> 32]
    result = image.copy()
    for row in range(SIDE):
        for column in range(SIDE):
            pixel = (item * SIDE + row) * SIDE + column
            hit, colour, _, _ = words(pixel, Stream.CORRUPT_PIXEL)
            if (hit >> 8) * 2.0**-24 < 0.3:
                white = kind == "salt_pepper" and colour >= 2**31
                result[row, column] = 255 if white else 0
    return result


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "set").mkdir()
    for k, image in enumerate(IMAGES):
        Image.fromarray(image).save(tmp_path / "set" / f"{k:02d}.png")
    np.save(tmp_path / "others.npy", OTHERS)
    return tmp_path


def config(folder, kind, **values):
    values = {"resolution": SIDE, "corrupt_fraction": 0.6, "holdout": 0.1, "workers": 0, "seed": 3,
              "batch_size": 5, "corrupt_kind": kind, **FIELDS[kind], **values}
    if kind == "outliers":
        values["corrupt_with"] = folder / "others.npy"
    return TrainConfig(**preset_values("folder") | {"data_dir": folder / "set"} | values)


def levels(x):
    """(B, C, H, W) in [-1, 1] to (B, H, W, C) uint8, which they are exactly."""
    values = (x.double() + 1) * 127.5
    assert (values - values.round()).abs().max() < 1e-4
    return values.round().byte().permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("kind", FIELDS)
@pytest.mark.parametrize("streamed", [False, True])
def test_every_image_is_spoilt_as_stated_and_the_clean_one_is_kept(folder, kind, streamed):
    cfg = config(folder, kind, resident_gib=0.0 if streamed else 1.0)
    data = load_data(cfg)
    assert isinstance(data, ImageFiles if streamed else ImageTensor)
    for part in (data, data.heldout):
        items = part.members.tolist()
        truth = np.stack([plain(kind, IMAGES[k], k, 0.6) for k in items])
        everything = torch.arange(len(part))
        assert np.array_equal(levels(part.batch(everything)), truth)
        assert np.array_equal(levels(part.clean(everything)), IMAGES[items])
    changed = (data.batch(everything := torch.arange(len(data))) != data.clean(everything))
    assert 0.3 < changed.flatten(1).any(1).double().mean() < 0.9


@pytest.mark.parametrize("kind", FIELDS)
def test_training_goes_on_with_the_same_images_from_any_step(folder, kind):
    """From memory, from disk and by workers; begun at step 4, and run there from step 0."""
    streams = []
    for values, start in ((dict(), 0), (dict(), 4), (dict(resident_gib=0.0), 0),
                          (dict(resident_gib=0.0, workers=2), 4)):
        cfg = config(folder, kind, flip=True, **values)
        steps = itertools.islice(batches(load_data(cfg), cfg, start, "cpu"), 4 - start, 8 - start)
        streams.append(list(steps))
    for other in streams[1:]:
        for (x, i), (y, j) in zip(streams[0], other, strict=True):
            assert torch.equal(i, j) and torch.equal(x, y)


@pytest.mark.parametrize("kind", FIELDS)
def test_images_on_the_device_stay_8_bits(folder, kind):
    data = load_data(config(folder, kind))
    assert data.observed.dtype == torch.uint8
    assert torch.equal(data.batch(torch.arange(3)), to_float(data.observed[data.members[:3]]))


@pytest.mark.parametrize("kind", FIELDS)
def test_identity_tells_corruptions_apart(folder, kind):
    identity = load_data(config(folder, kind)).identity()
    assert json.loads(json.dumps(identity)) == identity
    assert identity["corruption"]["kind"] == kind
    name, value = {"jpeg": ("corrupt_quality", 8), "outliers": ("seed", 4)}.get(
        kind, ("corrupt_pixels", 0.31))
    assert load_data(config(folder, kind, **{name: value})).identity() != identity
    if kind == "outliers":
        np.save(folder / "others.npy", OTHERS[:4])
        assert load_data(config(folder, kind)).identity() != identity


def test_a_gaussian_identity_is_what_older_runs_have():
    assert Corruption(0.9, 0.2, 7).identity() == {"fraction": 0.9, "sigma": 0.2, "seed": 7}


@pytest.mark.parametrize("corruption", [
    SaltAndPepper(0.9, 0.2, 0), MissingPixels(0.9, 0.2, 0), Jpeg(0.9, 10, 0),
    Outliers(0.9, torch.from_numpy(OTHERS[..., 0]).unsqueeze(1), 0, "x", ""),
])
def test_floats_and_bytes_are_spoilt_alike_in_grey(corruption):
    pixels = torch.from_numpy(IMAGES[..., 0]).unsqueeze(1)
    items = torch.arange(len(pixels)) + 2**33  # beyond 32 bits
    spoilt = corruption(pixels, items)
    floats = corruption(pixels.float().div(127.5).sub(1), items)
    assert torch.equal(spoilt.float().div(127.5).sub(1), floats)
    assert spoilt.dtype == torch.uint8 and not torch.equal(spoilt, pixels)
    assert torch.equal(corruption(pixels[3:5], items[3:5]), spoilt[3:5])


def test_jpeg_leaves_transparency_alone():
    pixels = torch.randint(0, 256, (2, 4, SIDE, SIDE), dtype=torch.uint8)
    spoilt = Jpeg(1.0, 5, 0)(pixels, torch.arange(2))
    assert torch.equal(spoilt[:, 3], pixels[:, 3]) and not torch.equal(spoilt[:, 0], pixels[:, 0])


def test_digits_can_be_spoilt_in_every_way(tmp_path):
    np.save(tmp_path / "others.npy", np.zeros((2, 12, 12, 3), np.uint8))
    for kind, fields in FIELDS.items():
        extra = {"corrupt_with": tmp_path / "others.npy"} if kind == "outliers" else {}
        data = load_data(TrainConfig(corrupt_kind=kind, **fields, **extra))
        x, clean = (f(torch.arange(64)) for f in (data.batch, data.clean))
        assert x.shape == clean.shape and not torch.equal(x, clean)
        assert x.min() >= -1 and x.max() <= 1


@pytest.mark.parametrize("values, message", [
    (dict(corrupt_kind="outliers"), "corrupt_with is None: name the images"),
    (dict(corrupt_with="x.npy"), "corrupt_with is .*outliers does"),
    (dict(corrupt_quality=0), "corrupt_quality is 0"),
    (dict(corrupt_pixels=1.5), "corrupt_pixels is 1.5"),
    (dict(corrupt_kind="outliers", corrupt_with="none.npy"), "corrupt_with is 'none.npy', which"),
    (dict(preset="plane", data="plane", corrupt_kind="jpeg"), "corrupt_kind is 'jpeg': plane"),
])
def test_what_cannot_be_is_said_in_one_line(values, message):
    with pytest.raises(UsageError, match=message) as error:
        load_data(TrainConfig(**values))
    assert "\n" not in str(error.value)
