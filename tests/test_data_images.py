"""Image files as people have them, whole and broken, held in memory or streamed."""

import io
import itertools
import json
import multiprocessing
import os
import resource
import struct
import time
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from robustdm.data import batches, files, load_data
from robustdm.data import decode as decode_module
from robustdm.data.arrays import load_array
from robustdm.data.base import ImageTensor
from robustdm.data.decode import BadImage, Header, decode, quiet, read_header
from robustdm.data.images import ImageFiles
from robustdm.data.read import read_images
from robustdm.data.workers import Collate
from robustdm.errors import RunError, UsageError
from robustdm.metrics import FeatureStatistics
from robustdm.runs.config import TrainConfig
from robustdm.runs.presets import preset_values

SIDE = 8


def config(path, **values):
    values = {"resolution": SIDE, "corrupt_fraction": 0.0, "holdout": 0.0, "workers": 0,
              "batch_size": 4} | values
    return TrainConfig(**preset_values("folder") | {"data_dir": path} | values)


def pictures(count, channels=3, side=SIDE, seed=0):
    shape = (count, side, side) if channels == 1 else (count, side, side, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save_folder(path, count=6, channels=3, side=SIDE):
    path.mkdir(exist_ok=True)
    images = pictures(count, channels, side)
    for k, image in enumerate(images):
        Image.fromarray(image).save(path / f"{k:03d}.png")
    return images


def everything(data, which="clean"):
    return getattr(data, which)(torch.arange(len(data)))


def levels(data):
    """The set as uint8, (N, H, W, C)."""
    x = (everything(data) + 1) * 127.5
    return x.round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def as_file(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    file.seek(0)
    return file


# Folders.


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_folder_is_read_as_it_is(tmp_path, channels):
    images = save_folder(tmp_path, channels=channels)
    data = load_data(config(tmp_path))
    assert isinstance(data, ImageTensor) and data.is_image
    assert data.shape == (channels, SIDE, SIDE) and data.quarantine == []
    assert np.array_equal(levels(data), images.reshape(6, SIDE, SIDE, channels))
    x = everything(data)
    assert x.min() >= -1 and x.max() <= 1 and x.min() < -0.95 and x.max() > 0.95


def test_folder_is_read_below_and_through_links_in_the_order_of_names(tmp_path):
    images = save_folder(tmp_path / "elsewhere", 3)
    root = tmp_path / "root"
    (root / "b").mkdir(parents=True)
    os.symlink(tmp_path / "elsewhere", root / "a")
    os.symlink(root, root / "b" / "loop")
    Image.fromarray(255 - images[0]).save(root / "b" / "last.BMP")
    Image.fromarray(images[0]).save(root / ".hidden.png")
    (root / "notes.txt").write_text("no image")
    (root / "folder.png").mkdir()
    os.mkfifo(root / "pipe.png")
    data = load_data(config(root))
    assert np.array_equal(levels(data), [*images, 255 - images[0]])


def test_mixed_folder_is_rgb_and_says_what_was_done(tmp_path):
    save_folder(tmp_path, 4)
    Image.new("L", (SIDE, SIDE), 100).save(tmp_path / "grey.png")
    Image.new("RGBA", (SIDE, SIDE), (0, 0, 0, 0)).save(tmp_path / "veil.png")
    data = load_data(config(tmp_path))
    assert data.shape[0] == 3
    assert "1 with transparency laid on white" in data.describe()
    assert "1 grey ones made RGB" in data.describe()
    assert (levels(data)[4] == 100).all() and (levels(data)[5] == 255).all()


def test_broken_files_are_listed_and_left_out(tmp_path):
    images = save_folder(tmp_path, 6)
    (tmp_path / "empty.png").write_bytes(b"")
    whole = (tmp_path / "000.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.jpg").write_text("<html>not found</html>")
    data = load_data(config(tmp_path, max_bad=0.4))
    assert np.array_equal(levels(data), images)
    assert sorted(name for name, _ in data.quarantine) == ["cut.png", "empty.png", "text.jpg"]
    assert all(reason and "\n" not in reason for _, reason in data.quarantine)
    assert "3 broken files left out" in data.describe()
    with pytest.raises(RunError, match="^2 of 9 .*--max-bad 0.2.*empty.png"):
        load_data(config(tmp_path, max_bad=0.2))


def test_too_many_truncated_files_are_found_while_decoding(tmp_path):
    save_folder(tmp_path, 4, side=32)
    for name in ("000.png", "002.png"):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RunError, match="^2 of 4 .*000.png.*002.png"):
        load_data(config(tmp_path))


def test_a_folder_of_nothing_but_broken_files_is_a_wrong_path(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    for share in (0.01, 1.0):
        with pytest.raises(UsageError, match="none of its images can be read .a.png: not a"):
            load_data(config(tmp_path, max_bad=share))


def test_a_file_with_the_wrong_suffix_is_read_by_its_content(tmp_path):
    image = Image.new("RGB", (SIDE, SIDE), (10, 200, 30))
    image.save(tmp_path / "really_a_png.jpg", "PNG")
    assert (levels(load_data(config(tmp_path)))[0] == (10, 200, 30)).all()


def test_names_that_are_not_utf8(tmp_path):
    save_folder(tmp_path, 2)
    name = os.fsdecode(b"\xff\xfe.png")
    (tmp_path / name).write_bytes(b"broken")
    data = load_data(config(tmp_path, max_bad=0.5))
    assert data.quarantine[0][0] == r"\xff\xfe.png"
    data.quarantine[0][0].encode()


@pytest.mark.parametrize("make, message", [
    (lambda p: None, "data_dir is not set: name the folder"),
    (lambda p: p / "none", "does not exist"),
    (lambda p: p, "no images there"),
    (lambda p: (p / "x.txt", (p / "x.txt").write_text("x"))[0], "name a folder, a .zip"),
    (lambda p: (p / "x.zip", (p / "x.zip").write_text("x"))[0], "not a readable zip"),
])
def test_wrong_paths(tmp_path, make, message):
    with pytest.raises(UsageError, match=message) as error:
        load_data(config(make(tmp_path)))
    assert "\n" not in str(error.value)


# One picture.


def test_portrait_and_landscape_are_scaled_and_cropped_about_the_centre():
    for size in ((64, 32), (32, 64)):
        image = Image.new("L", size, 0)
        box = tuple((s - 16) // 2 for s in size)
        image.paste(200, (*box, box[0] + 16, box[1] + 16))
        out = decode(as_file(image), 1, 8)[0]
        assert (out[2:6, 2:6] == 200).all()
        assert out[:2].max() == out[6:].max() == out[:, :2].max() == out[:, 6:].max() == 0


def test_shrinking_averages_areas():
    checkers = np.indices((32, 32)).sum(axis=0) % 2 * 254
    out = decode(as_file(Image.fromarray(checkers.astype(np.uint8))), 1, 8)
    assert (out == 127).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (13, 5), (9, 8)])
def test_odd_sizes(size):
    out = decode(as_file(Image.new("RGB", size, (1, 2, 3))), 3, 8)
    assert out.shape == (3, 8, 8) and (out[2] == 3).all()


def test_exif_orientation_is_undone():
    image = Image.fromarray(pictures(1, 1)[0])
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated clockwise by 90 degrees
    out = decode(as_file(image, exif=exif), 1, SIDE)[0]
    assert np.array_equal(out, np.rot90(np.asarray(image), -1))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_greys_keep_their_brightness(kind, monkeypatch):
    monkeypatch.setattr(decode_module, "_STRIP", 24)
    values = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    file = as_file(Image.fromarray(values), kind)
    assert read_header(file) == Header(grey=True, alpha=False, size=(8, 8))
    file.seek(0)
    assert np.abs(decode(file, 1, 8)[0] - values / 257.0).max() <= 0.5


def test_float_pictures_run_from_0_to_1():
    values = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    assert np.abs(decode(as_file(Image.fromarray(values), "TIFF"), 1, 8)[0]
                  - values * 255).max() <= 0.5
    for bad, message in ((np.nan, "NaN"), (7.0, "values from .* to 7, where 0 to 1"),
                         (np.inf, "infinity")):
        values[0, 0] = bad
        with pytest.raises(BadImage, match=message):
            decode(as_file(Image.fromarray(values), "TIFF"), 1, 8)


def test_palettes_cmyk_and_transparency():
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    assert (decode(as_file(red.convert("P")), 3, 8) == [[[255]], [[0]], [[0]]]).all()
    cmyk = decode(as_file(red.convert("CMYK"), "TIFF"), 3, 8)
    assert cmyk[0].min() > 250 and cmyk[1:].max() < 5
    clear = Image.new("P", (8, 8), 0)
    clear.putpalette([255, 0, 0])
    file = as_file(clear, transparency=0)
    assert read_header(file).alpha
    assert (decode(file, 3, 8) == 255).all()
    half = Image.new("LA", (8, 8), (0, 0))
    assert read_header(as_file(half)) == Header(grey=True, alpha=True, size=(8, 8))
    assert (decode(as_file(half), 1, 8) == 255).all()
    assert (decode(as_file(half), 4, 8)[3] == 0).all()
    assert read_header(as_file(red.convert("1"))).grey


def test_of_an_animation_the_first_frame():
    frames = [Image.new("RGB", (8, 8), c) for c in ((0, 0, 255), (255, 0, 0))]
    out = decode(as_file(frames[0], "GIF", save_all=True, append_images=frames[1:]), 3, 8)
    assert out[2].min() > 250 and out[0].max() < 5


def test_decompression_bomb_is_refused_before_its_pixels_are_read():
    def chunk(kind, content):
        return (struct.pack(">I", len(content)) + kind + content
                + struct.pack(">I", zlib.crc32(kind + content)))

    header = struct.pack(">IIBBBBB", 30_000, 4_000, 8, 0, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    with pytest.warns(Image.DecompressionBombWarning), pytest.raises(BadImage, match="30000x4000"):
        read_header(io.BytesIO(bomb))


@pytest.mark.parametrize("mode", ["RGBA", "RGB", "LA", "I;16", "F"])
def test_a_picture_takes_at_most_12_bytes_a_pixel(mode):
    if mode in ("I;16", "F"):
        image = Image.fromarray(np.zeros((4000, 4000), np.uint16 if mode == "I;16" else np.float32))
    else:
        image = Image.new(mode, (4000, 4000))
    file = as_file(image, "TIFF")
    child = os.fork()  # its largest size is its own
    if not child:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        decode(file, 3, 8)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        os._exit(1024 * grown > 13 * 4000**2 + (24 << 20))  # besides code and strips
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_the_largest_pictures_are_decoded_one_at_a_time(monkeypatch):
    real, inside, most = decode_module.convert, [], []

    def convert(image, channels):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.02)
        inside.pop()
        return real(image, channels)

    monkeypatch.setattr(decode_module, "convert", convert)
    content = as_file(Image.new("RGB", (8, 8))).getvalue()

    def largest(limit):
        monkeypatch.setattr(decode_module, "_LARGE", limit)
        most.clear()
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda _: decode(io.BytesIO(content), 3, 8), range(8)))
        return max(most)

    assert largest(63) == 1 and largest(64) > 1


def test_a_text_bomb_is_one_bad_file():
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "a" * 3_000_000, zip=True)
    file = as_file(Image.new("L", (8, 8)), pnginfo=text)
    with pytest.raises(BadImage, match="ValueError: Decompressed data too large"):
        decode(file, 1, 8)


def test_formats_that_start_programs_are_not_tried():
    with pytest.raises(BadImage, match="not a readable image"):
        read_header(io.BytesIO(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n"))


def test_garbage_never_raises_anything_but_bad_image():
    rng = np.random.default_rng(0)
    good = [as_file(Image.fromarray(pictures(1)[0]), kind).getvalue()
            for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")]
    for content in good * 20:
        content = bytearray(content)
        for place in rng.integers(0, len(content), 5):
            content[place] = rng.integers(0, 256)
        try:
            with quiet():
                assert decode(io.BytesIO(bytes(content)), 3, 8).shape == (3, 8, 8)
        except BadImage as error:
            assert "\n" not in str(error)


# Zips.


def save_zip(path, images, labels=True, compression=zipfile.ZIP_STORED):
    names = [f"{k:05d}/img{k:08d}.png" for k in range(len(images))]
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, image in zip(names, images, strict=True):
            archive.writestr(name, as_file(Image.fromarray(image)).getvalue())
        if labels:
            archive.writestr("dataset.json", json.dumps({"labels": [[n, 1] for n in names]}))
        archive.writestr("__MACOSX/00000/img00000000.png", b"resource fork")
    return path


@pytest.mark.parametrize("labels", [True, False])
def test_zip_equals_the_folder(tmp_path, labels):
    images = pictures(5)
    data = load_data(config(save_zip(tmp_path / "edm.zip", images, labels)))
    assert np.array_equal(levels(data), images)
    packed = save_zip(tmp_path / "p.zip", images, compression=zipfile.ZIP_DEFLATED)
    assert np.array_equal(levels(load_data(config(packed))), images)


def test_hostile_zip_members_touch_nothing_outside(tmp_path):
    path = tmp_path / "in" / "x.zip"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("../evil.png", as_file(Image.new("RGB", (8, 8))).getvalue())
        archive.writestr(".cache/hidden.png", b"x")
        archive.writestr("bomb.png", bytes(100 * 2**20))
        archive.writestr("inner.zip", b"PK")
    data = load_data(config(path, max_bad=0.5))
    assert len(data) == 1 and [name for name, _ in data.quarantine] == ["bomb.png"]
    assert "larger than" in data.quarantine[0][1]
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["in", "x.zip"]


def test_names_in_a_zip_cannot_write_to_the_terminal(tmp_path):
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a\n\x1b[2Jb.png", b"no picture")
    with pytest.raises(UsageError) as error:
        load_data(config(path))
    assert "a\\n\\x1b[2Jb.png" in str(error.value) and "\n" not in str(error.value)


def test_a_flipped_bit_in_a_zip_is_found_by_its_checksum(tmp_path):
    path = save_zip(tmp_path / "x.zip", pictures(3))
    content = bytearray(path.read_bytes())
    content[content.index(b"IDAT") + 10] ^= 1
    path.write_bytes(content)
    with pytest.raises(RunError, match="00000/img00000000.png .BadZipFile: Bad CRC"):
        load_data(config(path))


# Arrays.


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("suffix", ["npy", "npz", "NPZ"])
def test_arrays_of_uint8(tmp_path, channels, first, suffix):
    images = pictures(5, channels).reshape(5, SIDE, SIDE, channels)
    stored = images.transpose(0, 3, 1, 2) if first else images
    path = tmp_path / f"x.{suffix}"
    with open(path, "wb") as file:
        if suffix == "npy":
            np.save(file, stored)
        else:
            np.savez(file, images=stored, labels=np.zeros(5))
    assert np.array_equal(levels(load_data(config(path))), images)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_float_arrays_in_both_ranges(tmp_path, dtype):
    unit = np.linspace(0, 1, 5 * SIDE * SIDE).reshape(5, SIDE, SIDE)
    np.save(tmp_path / "a.npy", unit.astype(dtype))
    np.save(tmp_path / "b.npy", (unit * 2 - 1).astype(dtype))
    for name in "ab":
        x = everything(load_data(config(tmp_path / f"{name}.npy")))
        truth = torch.from_numpy(unit * 2 - 1).float().unsqueeze(1)
        torch.testing.assert_close(x, truth, atol=2e-3 if dtype == np.float16 else 1e-6, rtol=0)


@pytest.mark.parametrize("black, white, dtype", [
    (-1.0, 1.0, np.float32), (0.0, 1.0, np.float64), (0, 65535, np.uint16), (-500, 1500, np.int16),
    (0, 255, np.uint8),
])
def test_a_value_range_says_what_is_black_and_white_and_clips_nothing(tmp_path, black, white,
                                                                     dtype):
    truth = 0.5 * torch.randn(40, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0)).numpy()
    if dtype in (np.uint8, np.uint16):  # which hold nothing beyond
        truth = truth.clip(-1, 1)
    stored = (truth + 1) / 2 * (white - black) + black
    step = 0 if np.issubdtype(dtype, np.floating) else 2 / (white - black)
    stored = (stored.round() if step else stored).astype(dtype)
    np.save(tmp_path / "x.npy", stored[:, 0])
    np.savez(tmp_path / "x.npz", images=stored)
    for name in ("x.npy", "x.npz"):
        made = config(tmp_path / name, value_range=(float(black), float(white)))
        x = everything(load_data(made))
        assert np.abs(x.numpy() - truth).max() <= step + 1e-5
        assert torch.equal(read_images(tmp_path / name, "samples", made.value_range), x)
    assert (np.abs(x.numpy()).max() > 1.2) == (np.abs(truth).max() > 1)
    first = load_data(made).identity()
    other = load_data(config(tmp_path / name, value_range=(float(black), white * 1.01))).identity()
    assert first["sha256"] != other["sha256"], "a resumed run must read the same numbers"


@pytest.mark.parametrize("values, message", [
    ((1.0, 1.0), r"value_range is \(1.0, 1.0\): give the smaller number first"),
    ((1.0, -1.0), "value_range is .*smaller number first"),
    ((0.0, float("nan")), "value_range is .*nan"),
    ((0.0, 1e-3), "value_range is 0 0.001: .*x.npy holds -1.5 to 1.5, more than 100 times as"),
])
def test_wrong_value_ranges(tmp_path, values, message):
    np.save(tmp_path / "x.npy", np.linspace(-1.5, 1.5, 5 * SIDE * SIDE).reshape(5, SIDE, SIDE))
    with pytest.raises(UsageError, match=message):
        load_data(config(tmp_path / "x.npy", value_range=values))
    with pytest.raises(UsageError, match="-1.5 to 1.5 are neither .* --value-range LOW HIGH"):
        load_data(config(tmp_path / "x.npy"))
    save_folder(tmp_path / "files", 3)
    with pytest.raises(UsageError, match="value_range is 0 1: .* is no .npy or .npz"):
        load_data(config(tmp_path / "files", value_range=(0.0, 1.0)))


def test_arrays_are_resized_like_pictures(tmp_path):
    images = pictures(3, side=2 * SIDE)
    np.save(tmp_path / "x.npy", images)
    save_folder(tmp_path / "files", 3, side=2 * SIDE)
    assert np.array_equal(
        levels(load_data(config(tmp_path / "x.npy"))), levels(load_data(config(tmp_path / "files")))
    )


GREY = np.zeros((4, SIDE, SIDE))


@pytest.mark.parametrize("array, message", [
    (np.where(np.arange(SIDE) == 2, np.nan, GREY), "holds NaN or infinity"),
    (GREY + np.inf, "holds NaN or infinity"),
    (GREY + np.linspace(0, 255, SIDE), "from 0 to 255 are neither"),
    (GREY + np.linspace(-0.1, 1, SIDE), "from -0.1 to 1 are neither"),
    (GREY + np.linspace(-1, 1.2, SIDE), "from -1 to 1.2 are neither"),
    (GREY + np.linspace(0, 0.3, SIDE), "from 0 to 0.3 are neither"),
    (GREY.astype(np.int64), "dtype is int64"),
    (GREY.astype(bool), "dtype is bool"),
    (GREY.astype(complex), "dtype is complex128"),
    (GREY.astype("U1"), "dtype is <U1"),
    (GREY[:0], r"shape is \(0, 8, 8\)"),
    (GREY[0], r"shape is \(8, 8\)"),
    (np.zeros((4, 8, 8, 2), np.uint8), "no axis of 1, 3 or 4"),
    (np.zeros((4, 3, 8, 3), np.uint8), "cannot be told"),
    (np.array([np.zeros((8, 8)), np.zeros((4, 4))], dtype=object), "mixed shapes"),
    (GREY.astype(np.float32)[:, :4, :4] + np.linspace(0, 1, 4, dtype=np.float32),
     "float images of 4x4, channels 1, are not brought to 8x8"),
])
def test_doubtful_arrays_are_refused(tmp_path, array, message):
    for name, save in (("x.npy", np.save), ("x.npz", lambda p, a: np.savez(p, images=a))):
        save(tmp_path / name, array)
        with pytest.raises(UsageError, match=message) as error:
            load_data(config(tmp_path / name))
        assert "\n" not in str(error.value) and name in str(error.value)


def test_damaged_array_files(tmp_path):
    np.save(tmp_path / "cut.npy", pictures(4))
    content = (tmp_path / "cut.npy").read_bytes()
    (tmp_path / "cut.npy").write_bytes(content[:-100])
    (tmp_path / "no.npz").write_bytes(b"no zip")
    np.savez(tmp_path / "none.npz")
    np.savez(tmp_path / "two.npz", a=pictures(2), b=pictures(2))
    huge = content.replace(b"(4, 8, 8, 3)", b"(4000000000000, 8, 8, 3)")
    (tmp_path / "huge.npy").write_bytes(huge)
    for name, message in (("cut.npy", "cannot be read"), ("no.npz", "neither an .npy nor an .npz"),
                          ("none.npz", "empty"), ("two.npz", "name the one to use 'images'"),
                          ("huge.npy", "cannot be read")):
        with pytest.raises(UsageError, match=message):
            load_data(config(tmp_path / name))


@pytest.mark.parametrize("read", [
    load_array, lambda path: read_images(path, "samples"), FeatureStatistics.load,
])
def test_an_array_that_unpacks_to_far_more_is_refused(tmp_path, read):
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        for name in ("samples.npy", "mu.npy", "sigma.npy"):
            archive.writestr(name, b"")
            archive.getinfo(name).file_size = 1 << 30  # as the directory at the end has it
    with pytest.raises(UsageError, match="it would unpack to|ValueError"):
        read(tmp_path / "x.npz")


def test_hostile_array_runs_nothing(tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    np.save(tmp_path / "x.npy", np.array([Hostile()], dtype=object), allow_pickle=True)
    with pytest.raises(UsageError):
        load_data(config(tmp_path / "x.npy"))
    assert not (tmp_path / "ran").exists()


# Streaming.


def _stream(path, steps, start=0, **values):
    cfg = config(path, resident_gib=0.0, **values)
    data = load_data(cfg)
    assert isinstance(data, ImageFiles)
    return data, list(itertools.islice(batches(data, cfg, start, "cpu"), steps))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("packed", [False, True])
def test_streaming_gives_what_the_resident_set_gives(tmp_path, workers, packed):
    images = save_folder(tmp_path / "x", 25)
    path = save_zip(tmp_path / "x.zip", images) if packed else tmp_path / "x"
    values = dict(corrupt_fraction=0.9, corrupt_sigma=0.2, holdout=0.1, flip=True)
    cfg = config(path, **values)
    data = load_data(cfg)
    streamed, pairs = _stream(path, 8, start=3, workers=workers, **values)
    state = torch.get_rng_state()
    expected = itertools.islice(batches(data, cfg, 3, "cpu"), 8)
    for (x, i), (y, j) in zip(pairs, expected, strict=True):
        assert torch.equal(i, j) and torch.equal(x, y)
    assert torch.equal(torch.get_rng_state(), state)
    for part, other in ((streamed, data), (streamed.heldout, data.heldout)):
        assert torch.equal(everything(part), everything(other))
        assert torch.equal(everything(part, "batch"), everything(other, "batch"))
    assert streamed.identity()["count"] == data.identity()["count"]


def test_streaming_leaves_the_global_random_numbers_alone(tmp_path):
    save_folder(tmp_path, 6)
    state = torch.get_rng_state()
    _stream(tmp_path, 2)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_picture_that_breaks_is_replaced_by_the_next_one(tmp_path, workers):
    images = save_folder(tmp_path, 10)
    whole = (tmp_path / "004.png").read_bytes()
    (tmp_path / "004.png").write_bytes(whole[: len(whole) // 2])  # its header is sound
    data, pairs = _stream(tmp_path, 5, workers=workers, max_bad=0.1)
    for x, i in pairs:
        assert 4 not in i
        truth = torch.from_numpy(images[i]).permute(0, 3, 1, 2) / 127.5 - 1
        torch.testing.assert_close(x, truth, atol=1e-6, rtol=0)
    assert sum((i == 5).sum().item() for _, i in pairs) == 4  # 20 items: its own two, and 4's
    assert [name for name, _ in data.quarantine] == ["004.png"]


def test_pictures_that_vanish_end_the_run_with_their_names(tmp_path):
    save_folder(tmp_path, 10)
    cfg = config(tmp_path, resident_gib=0.0)
    data = load_data(cfg)
    for k in range(5):
        (tmp_path / f"{k:03d}.png").unlink()
    with pytest.raises(RunError, match=r"of 10 images cannot be read.*00\d.png .No such file"):
        list(itertools.islice(batches(data, cfg, 0, "cpu"), 5))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_nobody_thought_of_names_its_file(tmp_path, workers, monkeypatch):
    save_folder(tmp_path, 6)
    real = files.decode_tensor

    def slip(file, *arguments):
        if file.name.endswith("003.png"):
            raise ZeroDivisionError("a slip")
        return real(file, *arguments)

    monkeypatch.setattr(files, "decode_tensor", slip)
    with pytest.raises(RunError, match=r"003.png \(ZeroDivisionError: a slip\)"):
        _stream(tmp_path, 3, workers=workers)


def test_what_a_worker_raises_is_one_line_and_batches_need_no_shared_memory(tmp_path, monkeypatch):
    from torch.multiprocessing import reductions

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(reductions, "reduce_storage", refuse)  # of workers, which inherit it
    save_folder(tmp_path, 6)
    _, pairs = _stream(tmp_path, 2, workers=1)
    assert len(pairs) == 2

    def slip(*_):
        raise KeyError("a slip")

    monkeypatch.setattr(Collate, "__call__", slip)
    for workers in (0, 1):
        with pytest.raises(RunError, match=r"failed: (KeyError: )?'a slip'; go on with --resume"):
            _stream(tmp_path, 1, workers=workers)
    monkeypatch.setattr(multiprocessing, "Lock", refuse)
    with pytest.raises(RunError, match="No space left on device; go on with --resume, --workers 0"):
        _stream(tmp_path, 1, workers=1)


def test_streamed_identity_follows_names_and_sizes(tmp_path):
    save_folder(tmp_path, 3)
    cfg = config(tmp_path, resident_gib=0.0)
    before = load_data(cfg).identity()
    assert load_data(cfg).identity() == before
    Image.new("RGB", (40, 40)).save(tmp_path / "001.png")
    assert load_data(cfg).identity() != before


def test_arrays_beyond_the_limit_stay_in_host_memory(tmp_path):
    np.save(tmp_path / "x.npy", pictures(9))
    large, small = (load_data(config(tmp_path / "x.npy", resident_gib=g)) for g in (0.0, 1.0))
    assert not large.resident and small.resident
    assert torch.equal(everything(large, "batch"), everything(small, "batch"))


def test_measures_of_images_see_noise(tmp_path):
    # At 8x8 the estimate of 50 images is off by a tenth for most seeds.
    np.save(tmp_path / "x.npy", np.tile(np.linspace(40, 90, 16).astype(np.uint8), (50, 16, 1)))
    noise = dict(corrupt_fraction=1.0, corrupt_sigma=0.2)
    data = load_data(config(tmp_path / "x.npy", resolution=16, **noise))
    clean, noisy = (data.measure(everything(data, w)) for w in ("clean", "batch"))
    assert noisy["noise_level"] == pytest.approx(0.2, rel=0.1) and clean["noise_level"] < 0.02
    assert noisy["pixel_std"] == pytest.approx(0.2, rel=0.1)


def test_subspace_of_a_folder_and_of_an_array(tmp_path):
    save_folder(tmp_path / "x", 30)
    (tmp_path / "x" / "bad.png").write_bytes(b"")
    np.save(tmp_path / "x.npy", pictures(30))
    sets = [load_data(config(path, data="subspace", subspace_rank=3, num_points=50, max_bad=0.1))
            for path in (tmp_path / "x", tmp_path / "x.npy")]
    assert torch.equal(everything(sets[0]), everything(sets[1]))
    assert len(sets[0].quarantine) == 1 and sets[0].shape == (30,)
    assert sets[0].identity() == sets[1].identity()
