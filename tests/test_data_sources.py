"""Databases, streams, crops and channels: data sets in the forms that people have them in."""

import io
import itertools
import os
import pickle
import struct
import subprocess
import sys
import threading
import types
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from robustdm.data import batches, databases, load_data, streamed
from robustdm.data.base import ImageTensor
from robustdm.data.decode import BadImage, decode, read_header
from robustdm.data.images import ImageFiles
from robustdm.data.read import read_images
from robustdm.errors import RunError, UsageError
from robustdm.ops.stream import shuffled
from robustdm.runs.config import TrainConfig
from robustdm.runs.presets import PRESETS, preset_values

SIDE = 8
IMAGES = np.random.default_rng(0).integers(0, 256, (40, SIDE, SIDE, 3), dtype=np.uint8)


def config(path, **values):
    values = {"resolution": SIDE, "corrupt_fraction": 0.0, "holdout": 0.0, "workers": 0,
              "batch_size": 4} | values
    return TrainConfig(**preset_values("folder") | {"data_dir": path} | values)


def everything(data, which="clean"):
    return getattr(data, which)(torch.arange(len(data)))


def levels(x):
    return ((x + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def png(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def bomb(width, height):
    """A PNG of a few bytes that says it is as large as that."""
    def chunk(kind, content):
        return (struct.pack(">I", len(content)) + kind + content
                + struct.pack(">I", zlib.crc32(kind + content)))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0"))
            + chunk(b"IEND", b""))


# Crops and channels.


def test_aligned_celeba_is_cropped_about_the_centre_and_averaged():
    image = np.random.default_rng(1).integers(0, 256, (218, 178, 3), dtype=np.uint8)
    out = decode(io.BytesIO(png(image)), 3, 70, crop=140)
    square = image[39:179, 19:159].astype(float)
    truth = square.reshape(70, 2, 70, 2, 3).mean(axis=(1, 3)).transpose(2, 0, 1)
    assert np.abs(out - truth).max() <= 1
    assert PRESETS["celeba64"]["crop"] == 140 and PRESETS["celeba64"]["resolution"] == 64


def test_pictures_smaller_than_the_crop_are_bad_and_say_why(tmp_path):
    for k in range(3):
        Image.fromarray(IMAGES[k]).save(tmp_path / f"{k}.png")
    with pytest.raises(UsageError, match="0.png: 8x8 is smaller than --crop 9"):
        load_data(config(tmp_path, crop=9))
    assert len(load_data(config(tmp_path, crop=8))) == 3
    with pytest.raises(BadImage, match="--crop 9"):
        read_header(io.BytesIO(png(IMAGES[0])), crop=9)


def test_arrays_are_cropped_like_pictures(tmp_path):
    images = np.random.default_rng(2).integers(0, 256, (5, 20, 24, 3), dtype=np.uint8)
    np.save(tmp_path / "x.npy", images)
    (tmp_path / "x").mkdir()
    for k, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "x" / f"{k}.png")
    a, b = (everything(load_data(config(tmp_path / n, crop=16))) for n in ("x.npy", "x"))
    assert torch.equal(a, b)
    truth = images[:, 2:18, 4:20].reshape(5, 8, 2, 8, 2, 3).astype(float).mean(axis=(2, 4))
    assert np.abs(levels(a) - truth).max() <= 1
    with pytest.raises(UsageError, match="crop is 21: .* 20x24"):
        load_data(config(tmp_path / "x.npy", crop=21))


@pytest.mark.parametrize("have", [1, 3, 4])
@pytest.mark.parametrize("want", [1, 3, 4])
def test_channels_are_made_what_is_asked_for(tmp_path, have, want):
    shape = (6, SIDE, SIDE) if have == 1 else (6, SIDE, SIDE, have)
    images = np.random.default_rng(3).integers(0, 256, shape, dtype=np.uint8)
    (tmp_path / "x").mkdir()
    for k, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "x" / f"{k}.png")
    np.save(tmp_path / "x.npy", images)
    a, b = (load_data(config(tmp_path / n, channels=want)) for n in ("x", "x.npy"))
    assert a.shape == b.shape == (want, SIDE, SIDE)
    assert torch.equal(everything(a), everything(b))
    if have == 1:
        truth = np.repeat(images[..., None], want, axis=3)
        truth[..., 3:] = 255
        assert np.array_equal(levels(everything(a)), truth)


def test_imagenet_like_folders_down_to_64(tmp_path):
    rng = np.random.default_rng(4)
    sizes = [(500, 375), (333, 500), (64, 64), (900, 64)]
    for k, (width, height) in enumerate(sizes):
        (tmp_path / f"n{k % 2}").mkdir(exist_ok=True)
        image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(image).save(tmp_path / f"n{k % 2}" / f"{k}.JPEG", "JPEG")
    data = load_data(config(tmp_path, resolution=64))
    assert data.shape == (3, 64, 64) and len(data) == 4


def test_a_size_that_the_network_cannot_halve_is_refused():
    fields = preset_values("folder") | {"data_dir": "x"}
    for resolution in (28, 36, 100):
        assert TrainConfig(**fields | {"resolution": resolution}).resolution == resolution
    with pytest.raises(UsageError, match="resolution is 30: it must be a multiple of 4, .* 2 t"):
        TrainConfig(**fields | {"resolution": 30})


# CIFAR-100.


def cifar100(path, form):
    data = IMAGES[:, :1, :1].repeat(32, 1).repeat(32, 2).transpose(0, 3, 1, 2).reshape(40, -1)
    path.mkdir(parents=True)
    if form == "python":
        content = pickle.dumps({b"data": data, b"fine_labels": [0] * 40}, protocol=2)
        (path / "train").write_bytes(content)
    else:
        (path / "train.bin").write_bytes(b"".join(b"\1\2" + row.tobytes() for row in data))
    return data.reshape(40, 3, 32, 32).transpose(0, 2, 3, 1)


@pytest.mark.parametrize("form", ["python", "binary"])
def test_cifar_100_packed_or_extracted(tmp_path, form):
    import tarfile

    images = cifar100(tmp_path / f"cifar-100-{form}", form)
    packed = tmp_path / "packed" / f"cifar-100-{form}.tar.gz"
    packed.parent.mkdir()
    with tarfile.open(packed, "w:gz") as archive:
        archive.add(tmp_path / f"cifar-100-{form}", f"cifar-100-{form}")
    for path in (tmp_path, tmp_path / f"cifar-100-{form}", packed, packed.parent):
        data = load_data(config(path, data="cifar100", resolution=32))
        assert np.array_equal(levels(everything(data)), images)
    assert len(load_data(config(packed, resolution=32))) == 40  # --data images: it says what it is
    assert len(read_images(packed, "reference")) == 40
    with pytest.raises(UsageError, match="holds CIFAR-100: use --data cifar100"):
        load_data(config(packed, data="cifar10", resolution=32))
    with pytest.raises(UsageError, match="cifar-100-python.tar.gz into data/cifar100/"):
        load_data(config(None, data="cifar100", resolution=32))


# lmdb.


def save_lmdb(path, contents):
    lmdb = pytest.importorskip("lmdb")
    with lmdb.open(str(path), map_size=2**26) as environment, environment.begin(write=True) as t:
        for key, content in contents.items():
            t.put(key, content)


@pytest.mark.parametrize("workers", [0, 2])
def test_lsun_lmdb_in_memory_and_streamed(tmp_path, workers):
    path = tmp_path / "bedroom_train_lmdb"
    save_lmdb(path, {f"{k:040x}".encode(): png(image) for k, image in enumerate(IMAGES)})
    for place in (path, path / "data.mdb"):
        data = load_data(config(place))
        assert isinstance(data, ImageTensor)
        assert np.array_equal(levels(everything(data)), IMAGES)
    cfg = config(path, resident_gib=0.0, workers=workers)
    files = load_data(cfg)
    assert isinstance(files, ImageFiles) and files.identity() == load_data(cfg).identity()
    for x, i in itertools.islice(batches(files, cfg, 3, "cpu"), 12):
        assert np.array_equal(levels(x), IMAGES[i])
    assert len(read_images(path, "reference")) == 40


def test_bad_values_of_an_lmdb(tmp_path, monkeypatch):
    monkeypatch.setattr(databases, "MAX_PACKED", 1000)
    good = {b"%d" % k: png(IMAGES[k]) for k in range(4)}
    bad = {b"\xff\n": b"", b"bomb": bomb(40_000, 36_000), b"length": b"3",
           b"long": png(IMAGES[0]) + bytes(1000)}
    save_lmdb(tmp_path / "x", good | bad)
    data = load_data(config(tmp_path / "x", max_bad=0.5))
    assert len(data) == 4 and len(data.quarantine) == 4
    assert dict(data.quarantine)["long"] == "larger than 1000 bytes"
    (tmp_path / "data.mdb").write_bytes(b"no database" * 1000)
    with pytest.raises(UsageError, match="not a readable lmdb"):
        load_data(config(tmp_path))


@pytest.mark.parametrize("package, path, extra", [
    ("lmdb", "x", "lmdb"), ("datasets", None, "data")])
def test_a_missing_package_is_named(tmp_path, monkeypatch, package, path, extra):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "data.mdb").write_bytes(b"")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UsageError, match=rf'pip install "robustdm\[{extra}\]"'):
        load_data(config(tmp_path / path if path else "hf:somebody/something"))


def test_a_version_that_runs_code_of_a_data_set_is_refused(monkeypatch):
    old = types.SimpleNamespace(__version__="3.6.0", load_dataset=None)
    monkeypatch.setitem(sys.modules, "datasets", old)
    with pytest.raises(UsageError, match="datasets 3.6.0 may run code"):
        load_data(config("hf:somebody/something"))


# Streams: any source that gives picture files in order.


class Rows:
    """Stands for a Hugging Face stream: picture files in memory."""

    def __init__(self, contents, size=None, fails_at=None):
        self.path = databases.Path("hf:x")
        self.contents, self.size, self.fails_at = contents, size, fails_at

    def read(self, start):
        for row in range(start, len(self.contents)):
            if row == self.fails_at:
                raise OSError("connection lost")
            yield self.contents[row]


CONTENTS = [png(image) for image in IMAGES]


@pytest.fixture
def stream(monkeypatch):
    def make(start=0, steps=12, rows=None, **values):
        rows = rows or Rows(CONTENTS)
        monkeypatch.setattr(streamed, "HubStream", lambda path: rows)
        monkeypatch.setattr(streamed, "HEAD", 12)
        cfg = config("hf:x", **{"stream": True, "shuffle_buffer": 6, "holdout": 0.25} | values)
        data = load_data(cfg)
        return data, list(itertools.islice(batches(data, cfg, start, "cpu"), steps))

    yield make
    for thread in threading.enumerate():  # a stopped reader ends
        if thread is not threading.main_thread() and "_read" in thread.name:
            thread.join(5)
            assert not thread.is_alive()


def row_order(rows, held, buffer, count, seed=0):
    """The rows of a run: all but the first ``held``, over and over, shuffled in blocks."""
    endless = itertools.cycle(range(held, rows))
    order = []
    for block in itertools.count():
        if len(order) >= count:
            return order[:count]
        taken = list(itertools.islice(endless, buffer))
        order += [taken[k] for k in shuffled(seed, block, buffer)]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("buffer", [1, 6, 7, 100])
def test_a_stream_is_gone_through_in_shuffled_blocks(stream, workers, buffer):
    data, steps = stream(workers=workers, shuffle_buffer=buffer, steps=25)
    order = torch.cat([i for _, i in steps]).tolist()
    assert data.heldout is None and len(data) == 12  # at the beginning: too few to hold any out
    assert order == row_order(40, 0, buffer, 100)
    for x, i in steps:
        assert np.array_equal(levels(x), IMAGES[i])


@pytest.mark.parametrize("size", [None, 40])
@pytest.mark.parametrize("start", [3, 10, 11, 57])
def test_a_stream_goes_on_where_it_was(stream, start, size):
    values = dict(rows=Rows(CONTENTS, size), flip=True, corrupt_fraction=0.9, corrupt_sigma=0.2)
    _, whole = stream(steps=start + 5, **values)
    for workers in (0, 2):
        data, later = stream(start=start, steps=5, workers=workers, **values)
        for (x, i), (y, j) in zip(whole[start:], later, strict=True):
            assert torch.equal(i, j) and torch.equal(x, y)
    assert data.identity()["count"] == size


def test_rows_held_out_are_never_trained_on(stream, monkeypatch):
    monkeypatch.setattr("robustdm.data.base._SMALLEST_SPLIT", 10)
    data, steps = stream(steps=30)
    held = data.heldout
    assert len(held) == 3 and len(data) == 9
    assert torch.cat([i for _, i in steps]).tolist() == row_order(40, 3, 6, 120)
    assert np.array_equal(levels(everything(held)), IMAGES[:3])
    assert np.array_equal(levels(everything(data)), IMAGES[3:12])


@pytest.mark.parametrize("kind", ["gaussian", "salt_pepper", "jpeg"])
def test_a_row_is_spoilt_alike_wherever_it_is_seen(stream, kind):
    values = dict(corrupt_kind=kind, corrupt_fraction=0.8, steps=24)
    data, steps = stream(workers=2, **values)
    head = everything(data, "batch")
    seen = {}
    for x, i in steps:
        for image, item in zip(x, i.tolist(), strict=True):
            assert item not in seen or torch.equal(seen[item], image)
            seen[item] = image
            assert item >= 12 or torch.equal(image, head[item])
    assert not torch.equal(head, everything(data, "clean"))


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_rows_of_a_stream_are_replaced_and_listed(stream, workers):
    contents = list(CONTENTS)
    for row in (2, 20):
        contents[row] = b"broken"
    data, steps = stream(rows=Rows(contents), workers=workers, max_bad=0.1, steps=20)
    for x, i in steps:
        assert not {2, 20} & set(i.tolist())
        assert np.array_equal(levels(x), IMAGES[i])
    assert sorted(name for name, _ in data.quarantine) == ["row 2", "row 20"]
    with pytest.raises(RunError, match="of 12 images cannot be read"):
        stream(rows=Rows([b""] * 3 + CONTENTS))
    with pytest.raises(UsageError, match="none of its images can be read"):
        stream(rows=Rows([b"x"] * 20))
    with pytest.raises(UsageError, match="the stream is empty"):
        stream(rows=Rows([]))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_lost_connection_ends_the_run_in_one_line(stream, workers):
    rows = Rows(CONTENTS, fails_at=30)
    with pytest.raises(RunError, match="hf:x failed: connection lost; go on with --r") as error:
        stream(rows=rows, workers=workers)
    assert "\n" not in str(error.value)


def test_only_hugging_face_sets_are_streams(tmp_path):
    with pytest.raises(UsageError, match="stream is True: only .* hf:NAME"):
        load_data(config(tmp_path, stream=True))


# Hugging Face data sets, from local files.


@pytest.fixture
def parquet(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.parquet

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"bytes": content, "path": None} for content in CONTENTS]
    for first in range(0, 40, 20):
        table = pyarrow.table({"img": rows[first : first + 20], "label": list(range(20))})
        name = f"train-{first // 20:05d}-of-00002.parquet"
        (tmp_path / "set").mkdir(exist_ok=True)
        pyarrow.parquet.write_table(table, tmp_path / "set" / name, row_group_size=7)
    return f"hf:{tmp_path / 'set'}"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_local_parquet_set_in_memory_from_disk_and_as_a_stream(parquet, workers):
    assert np.array_equal(levels(everything(load_data(config(parquet)))), IMAGES)
    assert len(read_images(parquet, "reference")) == 40
    cfg = config(parquet + ":train", resident_gib=0.0, workers=workers)
    files = load_data(cfg)
    assert isinstance(files, ImageFiles) and files.identity() == load_data(cfg).identity()
    cfg2 = config(parquet, stream=True, shuffle_buffer=9, workers=workers)
    data = load_data(cfg2)
    for some, start in (((files, cfg), 9), ((data, cfg2), 0), ((data, cfg2), 9)):
        for x, i in itertools.islice(batches(*some, start, "cpu"), 6):
            assert np.array_equal(levels(x), IMAGES[i])
    whole = [i for _, i in itertools.islice(batches(data, cfg2, 0, "cpu"), 15)]
    later = [i for _, i in itertools.islice(batches(data, cfg2, 11, "cpu"), 4)]
    assert all(torch.equal(i, j) for i, j in zip(whole[11:], later, strict=True))
    assert torch.cat(whole).tolist() == row_order(40, 0, 9, 60)


def test_a_stream_that_declares_no_columns(tmp_path, monkeypatch):
    """As those of CSV files, and of JSON lines in earlier versions of the library."""
    datasets = pytest.importorskip("datasets")
    rows = [{"label": k, "img": {"bytes": content, "path": None}} for k, content in
            enumerate(CONTENTS)]
    rows[20]["img"] = {"bytes": "text", "path": None}
    rows[21]["img"] = None

    def load(found):
        data = datasets.IterableDataset.from_generator(lambda: iter(found))
        assert data.features is None
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: data)
        cfg = config("hf:x", stream=True, shuffle_buffer=1, max_bad=0.1)
        return load_data(cfg), cfg

    data, cfg = load(rows)
    steps = list(itertools.islice(batches(data, cfg, 0, "cpu"), 9))
    for x, i in steps:
        assert np.array_equal(levels(x), IMAGES[i])
    seen = torch.cat([i for _, i in steps]).tolist()
    assert seen[:20] == list(range(20)) and not {20, 21} & set(seen)
    for found, columns in (([{"file": "a.png", "label": 3}], "file, label"), ([], "none")):
        with pytest.raises(UsageError, match=rf"its columns \({columns}\) holds the images cannot"):
            load(found)


@pytest.mark.parametrize("suffix, message", [
    (":test", "data_dir is .*:test': .*"),
    ("nowhere", "data_dir is .*setnowhere.*Without a network, name a local folder"),
    (":a:b:c", "write hf:NAME, hf:NAME:SPLIT or"),
])
def test_wrong_names_of_hugging_face_sets(parquet, suffix, message):
    with pytest.raises(UsageError, match=message) as error:
        load_data(config(parquet + suffix))
    assert "\n" not in str(error.value)


# Hostile files, at the command line.


def test_a_bomb_and_a_zip_that_climbs_cost_nothing_and_leave_nothing(tmp_path):
    import zipfile

    (tmp_path / "in").mkdir()
    with zipfile.ZipFile(tmp_path / "in" / "x.zip", "w") as archive:
        archive.writestr("../../evil.png", CONTENTS[0])
        archive.writestr("/evil2.png", CONTENTS[1])
        archive.writestr("bomb.png", bomb(40_000, 36_000))  # 4.3 GB
    code = ("import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (3 * 2**30,) * 2)\n"
            "from robustdm.cli import guard; from robustdm.data.__main__ import main\n"
            "guard(main)")
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "in" / "x.zip")], capture_output=True,
        text=True, cwd=tmp_path / "in", env=os.environ | {"PYTHONPATH": os.path.abspath(".")},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "bomb.png" in done.stdout and "1440000000 pixels" in done.stdout
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["in", "x.zip"]
