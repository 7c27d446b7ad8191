"""Files of strangers: no code of theirs runs, and a small file takes no large memory."""

import io
import os
import pickle
import struct
import sys
import tarfile
import types
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save as save_safetensors

from robustdm import evaluate
from robustdm.data import cifar
from robustdm.data.arrays import load_array
from robustdm.data.read import read_images
from robustdm.errors import UsageError
from robustdm.evaluation import features, measure
from robustdm.metrics import FeatureStatistics
from robustdm.runs import files
from robustdm.untrusted import load_pickle, load_safetensors, open_npz

WEIGHTS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(1000, 10)}


def saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


@pytest.fixture(scope="module")
def bomb(tmp_path_factory):
    """An .npz of 70 MB of zeros under every key that is read anywhere."""
    path = tmp_path_factory.mktemp("bomb") / "bomb.npz"
    zeros = np.zeros((70 * 2**14, 8, 8, 1), np.uint8)
    np.savez_compressed(path, images=zeros, mu=zeros, sigma=np.zeros(1), samples=np.zeros(1))
    return path


def test_an_npz_that_unpacks_to_absurdly_much_is_refused_by_every_reader(bomb):
    for read in (load_array, FeatureStatistics.load, lambda path: read_images(path, "samples")):
        with pytest.raises(UsageError, match="bomb.npz"):
            read(bomb)
    with pytest.raises(ValueError, match="over 200 times what it takes"):
        open_npz(bomb)
    notes = []
    assert files._read_npz(bomb, notes) == {} and "bomb.npz" in notes[0]
    assert evaluate._statistics(bomb) is None


def test_other_npz_are_read(tmp_path):
    rng = np.random.default_rng(0)
    arrays = dict(empty=np.zeros((1000, 1000)), full=rng.standard_normal(10))
    np.savez_compressed(tmp_path / "x.npz", **arrays)
    with open_npz(tmp_path / "x.npz") as archive:
        assert all(np.array_equal(archive[name], array) for name, array in arrays.items())
    np.save(tmp_path / "x.npy", arrays["full"])
    with pytest.raises(ValueError, match="no .npz"):
        open_npz(tmp_path / "x.npy")


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_of_torch_save_are_read(zipped):
    file = io.BytesIO()
    torch.save(WEIGHTS, file, _use_new_zipfile_serialization=zipped)
    found = load_pickle(file.getvalue())
    assert found.keys() == WEIGHTS.keys()
    assert all(torch.equal(found[key], value) for key, value in WEIGHTS.items())


def packed(data):
    """The same archive, compressed."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(
            file, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return file.getvalue()


class Made:
    """Pickled as a call."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


@pytest.mark.parametrize("data, match", [
    (packed(saved(WEIGHTS)), "it is compressed"),
    (saved({"x": Made(bytearray, 10**9)}), "byte arrays"),
    (saved({"x": b"bytes"}), "byte arrays"),
    (saved({"x": list(range(10**6))}), "what describes its tensors"),
    (packed(saved({"x": Made(bytearray, 10**9)})), "it is compressed"),
], ids=["compressed", "bytearray", "encode", "description", "compressed bytearray"])
def test_pickles_that_take_memory(data, match):
    with pytest.raises(ValueError, match=match):
        load_pickle(data)


def test_long_headers_of_safetensors():
    data = save_safetensors(WEIGHTS)
    assert torch.equal(load_safetensors(data)["b"], WEIGHTS["b"])
    header = b"{" + b" " * (4 * 2**20) + b"}"
    with pytest.raises(ValueError, match="its header claims 4194306 bytes"):
        load_safetensors(struct.pack("<Q", len(header)) + header)


# CIFAR's tar and pickles.


@pytest.mark.parametrize("content, match", [
    (b"\x80\x02}r\xff\xff\xff\x0f.", "take up the memory"),
    (b"\x80\x02(" + b"]" * 2**20 + b"l.", "take up the memory"),
], ids=["memo", "lists"])
def test_batches_that_take_memory(tmp_path, content, match):
    for k in range(1, 6):
        (tmp_path / f"data_batch_{k}").write_bytes(content)
    with pytest.raises(UsageError, match=match):
        cifar.load_cifar(tmp_path)


def test_bytes_that_are_repeated_in_a_batch():
    text = b"a" * 1000
    content = (b"\x80\x02](X" + struct.pack("<I", len(text)) + text + b"q\x01"
               + b"c_codecs\nencode\n(h\x01X\x06\x00\x00\x00latin1tR" * 3 + b"e.")
    with pytest.raises(pickle.UnpicklingError, match="more bytes than it has"):
        cifar._Unpickler(content).load()


def tar(path, *members):
    with tarfile.open(path, "w:gz", format=tarfile.USTAR_FORMAT) as archive:
        for name, kind, size in members:
            member = tarfile.TarInfo(name)
            member.type, member.size = kind, size
            archive.addfile(member, io.BytesIO(bytes(size)))


@pytest.mark.parametrize("limit, members, match", [
    ("_MOST_BYTES", [("a", tarfile.REGTYPE, 50_000)], "more than 20000 bytes"),
    ("_MOST_DESCRIPTION", [("a", tarfile.REGTYPE, 1), ("p", tarfile.XHDTYPE, 30_000)],
     "a description of 30000 bytes"),
    ("_MOST_MEMBERS", [("a", tarfile.DIRTYPE, 0)] * 102, "more than 100 members"),
], ids=["bytes", "description", "members"])
def test_archives_that_take_memory(tmp_path, monkeypatch, limit, members, match):
    monkeypatch.setattr(cifar, limit, 100 if limit == "_MOST_MEMBERS" else 20_000)
    tar(tmp_path / "cifar-10-python.tar.gz", *members)
    with pytest.raises(UsageError, match=match):
        cifar.load_cifar(tmp_path)


# Weights and pipelines.


def test_weights_for_torch_fidelity_run_nothing(tmp_path, monkeypatch):
    class Trusting(torch.nn.Module):
        def __init__(self, *_, feature_extractor_weights_path):
            super().__init__()
            self.load = torch.load(feature_extractor_weights_path, weights_only=False)

    module = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = Trusting
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    file = tmp_path / "weights.pth"
    file.write_bytes(saved({"a": Made(os.mkdir, str(tmp_path / "trap"))}))
    with pytest.raises(UsageError, match="weights.pth': no weights of inception"):
        features.load_extractor("inception", (3, 32, 32), file)
    assert not (tmp_path / "trap").exists()
    file.write_bytes(saved(WEIGHTS))
    network = features._inception(file).network
    assert torch.equal(network.load["a"], WEIGHTS["a"])


def test_a_pipeline_of_pickles_or_with_code_is_refused(tmp_path):
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    unet = UNet2DModel(sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8,),
                       norm_num_groups=4, layers_per_block=1, down_block_types=("DownBlock2D",),
                       up_block_types=("UpBlock2D",))
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(UsageError, match=f"^pipeline is '{tmp_path}': its weights are a pickle"):
        measure.open_pipeline(str(tmp_path), "cpu")
    config = tmp_path / "unet" / "config.json"
    config.write_text(config.read_text().replace("UNet2DModel", "own.Own"))
    (tmp_path / "unet" / "own.py").write_text(f"import os; os.mkdir('{tmp_path}/trap')")
    with pytest.raises(UsageError, match="its network is a own.Own"):
        measure.open_pipeline(str(tmp_path), "cpu")
    assert not (tmp_path / "trap").exists()
