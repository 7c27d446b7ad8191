"""CIFAR-10 from every form of local copy; fake copies of a few images."""

import codecs
import gzip
import io
import os
import pickle
import struct
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from robustdm.data import load_data
from robustdm.errors import UsageError
from robustdm.runs.config import TrainConfig
from robustdm.runs.presets import preset_values

PER_BATCH = 4
IMAGES = np.random.default_rng(0).integers(0, 256, (5 * PER_BATCH, 3, 32, 32), dtype=np.uint8)
BATCHES = IMAGES.reshape(5, PER_BATCH, -1)


def load(path):
    data = load_data(TrainConfig(**preset_values("cifar10") | {
        "data_dir": path, "corrupt_fraction": 0.0, "holdout": 0.0}))
    x = (data.clean(torch.arange(len(data))) + 1) * 127.5
    return x.round().to(torch.uint8).numpy()


def python_files(protocol=2):
    return {f"data_batch_{k + 1}": pickle.dumps({b"data": batch, b"labels": [0] * PER_BATCH},
                                               protocol=protocol)
            for k, batch in enumerate(BATCHES)} | {"batches.meta": b"x"}


def python2_batch(array, fortran=False):
    """The pickle that Python 2 wrote, opcode by opcode: byte strings throughout."""
    size = [struct.pack("<i", n) for n in array.shape]
    content = array.tobytes(order="F" if fortran else "C")
    return b"".join([
        b"\x80\x02}(U\x0bbatch_labelU\x01xU\x06labels]U\x04data",
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR",
        b"(K\x01J", size[0], b"J", size[1], b"\x86",
        b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R",
        b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb",
        b"\x88" if fortran else b"\x89",
        b"T", struct.pack("<i", len(content)), content, b"tbu.",
    ])


def python2_files(fortran):
    return {f"data_batch_{k + 1}": python2_batch(batch, fortran)
            for k, batch in enumerate(BATCHES)}


def binary_files():
    return {f"data_batch_{k + 1}.bin": b"".join(b"\7" + row.tobytes() for row in batch)
            for k, batch in enumerate(BATCHES)}


def pack(path, files, folder="cifar-10-batches-py/"):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(folder + name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def unpack(folder, files):
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("files, folder, name", [
    (python_files(), "cifar-10-batches-py", "cifar-10-python.tar.gz"),
    (python2_files(False), "cifar-10-batches-py", "cifar-10-python.tar.gz"),
    (python2_files(True), "cifar-10-batches-py", "cifar-10-python.tar.gz"),
    (python_files(4), "cifar-10-batches-py", "cifar-10-python.tar.gz"),
    (binary_files(), "cifar-10-batches-bin", "cifar-10-binary.tar.gz"),
])
def test_official_archive_packed_or_extracted(tmp_path, files, folder, name):
    archive = pack(tmp_path / name, files)
    assert np.array_equal(load(archive), IMAGES)
    assert np.array_equal(load(tmp_path), IMAGES)
    place = unpack(tmp_path / "here" / folder, files)
    assert np.array_equal(load(place), IMAGES)
    assert np.array_equal(load(place.parent), IMAGES)


def test_the_default_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"download https://.*tar.gz into data/cifar10/"):
        load(None)
    (tmp_path / "data" / "cifar10").mkdir(parents=True)
    pack(tmp_path / "data" / "cifar10" / "cifar-10-python.tar.gz", python_files())
    assert np.array_equal(load(None), IMAGES)


def test_sprites(tmp_path):
    # Two sprites of 5 rows by 2 columns, lossless, and test images that must not be used.
    for k in range(2):
        part = IMAGES[k * 10 : k * 10 + 10].reshape(5, 2, 3, 32, 32)
        sprite = part.transpose(0, 3, 1, 4, 2).reshape(160, 64, 3)
        Image.fromarray(sprite).save(tmp_path / f"train_{k}.webp", lossless=True)
    Image.new("RGB", (64, 160)).save(tmp_path / "test_0.webp")
    assert np.array_equal(load(tmp_path), IMAGES)
    Image.new("RGB", (65, 160)).save(tmp_path / "train_1.webp")
    with pytest.raises(UsageError, match="65x160 pixels are no sprite"):
        load(tmp_path)


def test_folder_of_images_and_npz(tmp_path):
    for part in ("train", "test"):
        (tmp_path / part / "cat").mkdir(parents=True)
    for k, image in enumerate(IMAGES):
        Image.fromarray(image.transpose(1, 2, 0)).save(tmp_path / "train" / "cat" / f"{k:02d}.png")
    Image.new("RGB", (32, 32)).save(tmp_path / "test" / "cat" / "0.png")
    assert np.array_equal(load(tmp_path), IMAGES)
    np.savez(tmp_path / "x.npz", images=IMAGES.transpose(0, 2, 3, 1))
    assert np.array_equal(load(tmp_path / "x.npz"), IMAGES)


def _fails(path, message):
    with pytest.raises(UsageError, match=message) as error:
        load(path)
    assert "\n" not in str(error.value) and "again" in str(error.value)


def test_damaged_copies(tmp_path):
    files = python_files()
    part = {name: content for name, content in files.items() if name != "data_batch_4"}
    _fails(unpack(tmp_path / "a", part), "data_batch_4 is missing")
    _fails(unpack(tmp_path / "b", files | {"data_batch_2": b"\x80"}), "data_batch_2 is not a batch")
    wrong = pickle.dumps({b"data": np.zeros((2, 5), np.uint8)}, protocol=2)
    _fails(unpack(tmp_path / "c", files | {"data_batch_2": wrong}), r"shape \(2, 5\)")
    floats = pickle.dumps({b"data": np.zeros((2, 3072))}, protocol=2)
    _fails(unpack(tmp_path / "d", files | {"data_batch_2": floats}), "instead of u1")
    short = binary_files() | {"data_batch_3.bin": b"\0" * 3072}
    _fails(unpack(tmp_path / "e", short), "3072 bytes, no multiple of 3073")
    archive = pack(tmp_path / "cut.tar.gz", files)
    archive.write_bytes(archive.read_bytes()[:-2000])
    _fails(archive, "the copy is damaged")
    archive.write_bytes(b"no archive")
    _fails(archive, "the copy is damaged")


class Hostile:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("function, argument", [
    (os.mkdir, "ran"), (os.system, "mkdir ran"), (eval, "__import__('os').mkdir('ran')"),
    (np.load, "ran"), (np.memmap, "ran"), (exec, "import os; os.mkdir('ran')"),
])
def test_hostile_pickle_runs_nothing(tmp_path, monkeypatch, function, argument):
    monkeypatch.chdir(tmp_path)
    evil = pickle.dumps({b"data": Hostile(function, argument)}, protocol=2)
    _fails(unpack(tmp_path / "x", python_files() | {"data_batch_1": evil}), "is refused")
    assert not (tmp_path / "ran").exists()


def test_a_pickle_that_stands_for_far_more_is_refused(tmp_path):
    """One text, encoded again and again."""
    text = "a" * 10_000
    bomb = pickle.dumps([Hostile(codecs.encode, text, "latin1") for _ in range(10)], protocol=2)
    assert len(bomb) < 2 * len(text)
    _fails(unpack(tmp_path / "x", python_files() | {"data_batch_1": bomb}),
           "it stands for more bytes than it has")


def test_a_pickle_of_millions_of_objects_is_refused(tmp_path):
    bomb = b"\x80\x02" + b"]" * (1 << 22) + b"."
    _fails(unpack(tmp_path / "x", python_files() | {"data_batch_1": bomb}),
           "would take up the memory")


def test_a_header_in_the_archive_is_no_reason_to_read_gigabytes(tmp_path):
    name = tarfile.TarInfo("long")
    name.type, name.size = tarfile.GNUTYPE_LONGNAME, 1 << 28
    path = tmp_path / "cifar-10-python.tar.gz"
    path.write_bytes(gzip.compress(name.tobuf() + bytes(1 << 22), 1))
    _fails(path, "a description of 268435456 bytes")


def test_links_in_the_archive_are_passed_over(tmp_path):
    path = tmp_path / "x.tar.gz"
    secret = tmp_path / "secret"
    secret.write_bytes(python_files()["data_batch_1"])
    with tarfile.open(path, "w:gz") as archive:
        for k in range(1, 6):
            member = tarfile.TarInfo(f"data_batch_{k}")
            member.type, member.linkname = tarfile.SYMTYPE, str(secret)
            archive.addfile(member)
    _fails(path, "data_batch_1 is missing")
