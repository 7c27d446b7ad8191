"""F6: files that want to run code, to use up the memory, or to be written elsewhere."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import random
import struct
import sys
import tarfile
import types
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from robustdm import convert, evaluate, sample, train
from robustdm.data import __main__ as data

from .campaign import Found, Trial
from .runs import call

CPU_SECONDS = 5.0
MEMORY = 2**30
_GIANT = 3 * 10**9
"""Bytes that bombs unpack to: more than may be used, and less than zips need an extension for."""


class Evil:
    """Unpickled, it would leave a directory behind."""

    def __init__(self, canary: Path, way: int):
        self.canary, self.way = str(canary), way

    def __reduce__(self):
        return (
            (os.mkdir, (self.canary,)),
            (os.system, (f"mkdir '{self.canary}'",)),
            (exec, (f"import os; os.mkdir({self.canary!r})",)),
        )[self.way]


# Commands. Each gives an entry point and its arguments.


def _train(*flags) -> tuple:
    return train.main, ["--steps", "1", "--device", "cpu", "--out", "out", *flags]


def _from(path: Path, *flags) -> tuple:
    return _train("--init-from", path, *flags)


def _allowed(path: Path) -> tuple:
    return _from(path, "--allow-pickle", "--num-heads", "1")


def _config(path: Path) -> tuple:
    return _train("--config", path)


def _pictures(path: Path) -> tuple:
    return _train("--preset", "folder", "--data-dir", path)


def _cifar(path: Path) -> tuple:
    return _train("--preset", "cifar10", "--data-dir", path)


def _look(path: Path) -> tuple:
    return data.main, [path, "--preview", "out/preview.png"]


def _convert(path: Path) -> tuple:
    return convert.main, [path, "out", "--allow-pickle", "--num-heads", "1"]


def _samples(path: Path) -> tuple:
    return evaluate.main, ["--samples", path, "--reference", _clean(path), "--out", "out"]


def _pipeline(path: Path) -> tuple:
    return evaluate.main, ["--pipeline", path, "--reference", _clean(path), "--out", "out",
                           "--num", "2", "--steps", "1"]


def _weights(features: str) -> Callable[[Path], tuple]:
    def command(path: Path) -> tuple:
        _trusting_fidelity()
        return evaluate.main, ["--samples", _clean(path), "--reference", _clean(path), "--out",
                               "out", "--features", features, "--weights", path]

    return command


def _run(path: Path) -> tuple:
    return sample.main, ["--run", path.parent, "--out", "out"]


def _clean(path: Path) -> Path:
    """Samples that are what they should be."""
    return path.parent / "clean.npz"


def _trusting_fidelity() -> None:
    """A stand-in for torch-fidelity, which unpickles whatever it is given."""
    class FeatureExtractorInceptionV3(torch.nn.Module):
        def __init__(self, name, features, feature_extractor_weights_path=None):
            super().__init__()
            torch.load(feature_extractor_weights_path, weights_only=False)

    module = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = FeatureExtractorInceptionV3
    sys.modules["torch_fidelity"] = types.ModuleType("torch_fidelity")
    sys.modules[module.__name__] = module


# Files. Each is written into a folder and returned.


def _pickled(name: str) -> Callable[[Path, Evil], Path]:
    def make(folder: Path, evil: Evil) -> Path:
        return _write(folder / name, pickle.dumps({"conv_in.weight": evil}, protocol=2))

    return make


def _saved(folder: Path, evil: Evil) -> Path:
    torch.save({"input_blocks.0.0.weight": torch.zeros(1), "x": evil}, folder / "saved.pt")
    return folder / "saved.pt"


def _zip_in_pt(folder: Path, evil: Evil) -> Path:
    """An archive as torch writes it, which holds another one; both with a hostile pickle."""
    inner = _zipped({"archive/data.pkl": pickle.dumps(evil, protocol=2), "archive/version": b"3"})
    return _write(folder / "nested.pt", _zipped({
        "archive/data.pkl": pickle.dumps({"x": evil}, protocol=2), "archive/version": b"3\n",
        "archive/data/0": inner, "archive/inner.zip": inner}))


def _zip_in_zip(folder: Path, evil: Evil) -> Path:
    """No picture in it is one: an archive by that name, an archive, and a bomb."""
    inner = _zipped({"a.png": _png()})
    return _write_zip(folder / "nested.zip", [
        _stored("a.png", inner), _stored("inner.zip", inner),
        ("bomb.png", _Zeros(_GIANT), _GIANT)])


def _tar_of_torch(folder: Path, evil: Evil) -> Path:
    """The form of torch before 0.2: a tar of pickles."""
    with tarfile.open(folder / "legacy.pt", "w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            _add(archive, name, pickle.dumps(evil, protocol=2))
    return folder / "legacy.pt"


def _objects_npy(folder: Path, evil: Evil) -> Path:
    np.save(folder / "objects.npy", np.array([evil, evil], dtype=object), allow_pickle=True)
    return folder / "objects.npy"


def _objects_npz(folder: Path, evil: Evil) -> Path:
    np.savez(folder / "objects.npz", images=np.array([evil], dtype=object))
    return folder / "objects.npz"


def _yaml_python(folder: Path, evil: Evil) -> Path:
    tag = random.Random(evil.way).choice(("object/apply:os.mkdir", "object/new:os.mkdir"))
    return _write(folder / "config.yaml", f"lr: !!python/{tag} [{evil.canary}]\n".encode())


def _yaml_aliases(folder: Path, evil: Evil) -> Path:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]" for k in range(1, 12)]
    return _write(folder / "aliases.yaml", "\n".join(lines).encode())


def _long_header(folder: Path, evil: Evil) -> Path:
    return _safetensors(folder, struct.pack("<Q", 1 << 62) + b"{}")


def _rich_header(folder: Path, evil: Evil) -> Path:
    """A valid header of 600,000 empty tensors."""
    entries = (f'"{k}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for k in range(600_000))
    header = f"{{{','.join(entries)}}}".encode()
    return _safetensors(folder, struct.pack("<Q", len(header)) + header)


def _safetensors(folder: Path, content: bytes) -> Path:
    _diffusers(folder / "model")
    _write(folder / "model/unet/diffusion_pytorch_model.safetensors", content)
    return folder / "model"


def _npz_bomb(folder: Path, evil: Evil) -> Path:
    header = io.BytesIO()
    count = _GIANT // (8 * 8)
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": (count, 8, 8, 1)})
    size = len(header.getvalue()) + count * 64
    return _write_zip(folder / "bomb.npz", [
        ("images.npy", _Zeros(size - len(header.getvalue()), header.getvalue()), size)])


def _pt_bomb(folder: Path, evil: Evil) -> Path:
    """A state dict of one tensor of 3 GB, which are zeros and compressed."""
    file = io.BytesIO()
    torch.save({"input_blocks.0.0.weight": torch.zeros(4)}, file)
    count = _GIANT // 4
    with zipfile.ZipFile(file) as archive:
        members = [_stored(info.filename, archive.read(info)) for info in archive.infolist()
                   if not info.filename.endswith(("data.pkl", "data/0"))]
        described = archive.read("archive/data.pkl")
    described = described.replace(b"K\x04", b"J" + struct.pack("<i", count))
    return _write_zip(folder / "bomb.pt", [
        _stored("archive/data.pkl", described), ("archive/data/0", _Zeros(4 * count), 4 * count),
        *members])


def _climbing_zip(folder: Path, evil: Evil) -> Path:
    """Members that would lie outside, or that are links; all but the link are good pictures."""
    with zipfile.ZipFile(folder / "climbing.zip", "w") as archive:
        for name in ("../up.png", "../../../up.png", f"{evil.canary}.png", "..\\up.png", "ok.png"):
            archive.writestr(name, _png())
        link = zipfile.ZipInfo("link.png")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, str(_clean(folder / "x")))
    return folder / "climbing.zip"


def _linked_tar(folder: Path, evil: Evil) -> Path:
    """A copy of CIFAR whose batches are links to a file outside, and one hostile batch."""
    path = folder / "cifar-10-python.tar.gz"
    _write(folder / "secret", bytes(10 * 3073))
    with tarfile.open(path, "w:gz") as archive:
        for k, kind in ((1, tarfile.SYMTYPE), (2, tarfile.LNKTYPE), (3, tarfile.SYMTYPE)):
            member = tarfile.TarInfo(f"../../cifar-10-batches-py/data_batch_{k}")
            member.type, member.linkname = kind, str(folder / "secret")
            archive.addfile(member)
        _add(archive, "/data_batch_4", pickle.dumps(evil, protocol=2))
    return path


def _hostile_batch(folder: Path, evil: Evil) -> Path:
    """CIFAR's batches: code, a memo of 2^28 places, repeated bytes, and a compressed pax header."""
    place = folder / "cifar-10-batches-py"
    place.mkdir()
    text = b"X" + struct.pack("<I", 10**7) + b"a" * 10**7 + b"q\x01"
    again = b"c_codecs\nencode\n(h\x01X\x06\x00\x00\x00latin1tR"
    content = (
        pickle.dumps({b"data": evil}, protocol=2),
        b"\x80\x02}r\xff\xff\xff\x0f.",
        b"\x80\x02](" + text + again * 200 + b"e.",
    )[evil.way]
    for k in range(1, 6):
        _write(place / f"data_batch_{k}", content)
    return place


def _tar_bomb(folder: Path, evil: Evil) -> Path:
    """A copy of CIFAR that begins with a description, in a pax header, of 3 GB."""
    member = tarfile.TarInfo("././@PaxHeader")
    member.type, member.size = tarfile.XHDTYPE, _GIANT // 512 * 512
    path = folder / "cifar-10-python.tar.gz"
    start = gzip.compress(member.tobuf(tarfile.USTAR_FORMAT))
    return _write(path, start + _GIANT // 10**7 * gzip.compress(bytes(10**7)))


def _picture_bomb(folder: Path, evil: Evil) -> Path:
    """Pictures of a few hundred bytes and 1.4 gigapixels, and one with a text of 3 GB."""
    (folder / "pictures").mkdir()
    header = struct.pack(">IIBBBBB", 40_000, 36_000, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n"
    _write(folder / "pictures/wide.png", start + _chunk(b"IHDR", header)
           + _chunk(b"IDAT", zlib.compress(bytes(10**6))) + _chunk(b"IEND", b""))
    header = struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0)
    text = b"comment\0\0" + _zlib_zeros(_GIANT)
    _write(folder / "pictures/text.png", start + _chunk(b"IHDR", header)
           + _chunk(b"zTXt", text) + _chunk(b"IDAT", zlib.compress(bytes(8 * 25)))
           + _chunk(b"IEND", b""))
    return folder / "pictures"


def _many_labels(folder: Path, evil: Evil) -> Path:
    """EDM's form, whose list of labels has 10^9 entries."""
    begin, end = b'{"labels": [', b"[]]}"
    size = len(begin) + 3 * 10**9 + len(end)
    return _write_zip(folder / "labels.zip", [
        *(_stored(f"00000/img{k:08d}.png", _png()) for k in range(4)),
        ("dataset.json", _Repeated(b"[]," * 10**5, 10**4, begin, end), size)])


def _custom_code(folder: Path, evil: Evil) -> Path:
    """A pipeline that names modules of its own, which lie beside it."""
    place = _diffusers(folder / "model")
    code = f"import os\nos.mkdir({evil.canary!r})\nfrom diffusers import UNet2DModel as Own\n"
    for name in ("own.py", "unet/own.py", "pipeline.py", "__init__.py"):
        _write(place / name, code.encode())
    index = json.loads((place / "model_index.json").read_text())
    index |= ({"unet": ["own", "Own"]}, {"_class_name": ["pipeline", "Own"]},
              {"unet": ["own", "Own"], "_class_name": "Own"})[evil.way]
    _write(place / "model_index.json", json.dumps(index).encode())
    config = json.loads((place / "unet/config.json").read_text())
    config |= {"_class_name": "Own", "auto_map": {"AutoModel": "own.Own"}}
    _write(place / "unet/config.json", json.dumps(config).encode())
    return place


# What they are made of.


def _write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def _png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 30, 10)).save(file, "PNG")
    return file.getvalue()


def _chunk(kind: bytes, content: bytes) -> bytes:
    check = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + check


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def _zipped(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


class _Repeated:
    """A deflate stream of ``begin``, so many times ``part``, and ``end``, in no time."""

    def __init__(self, part: bytes, count: int, begin: bytes = b"", end: bytes = b""):
        def piece(content: bytes) -> bytes:
            packer = zlib.compressobj(9, zlib.DEFLATED, -15)
            return packer.compress(content) + packer.flush(zlib.Z_FULL_FLUSH)

        last = zlib.compressobj(9, zlib.DEFLATED, -15)
        self.packed = piece(begin) + piece(part) * count + last.compress(end) + last.flush()


class _Zeros(_Repeated):
    def __init__(self, size: int, begin: bytes = b""):
        super().__init__(bytes(10**6), size // 10**6, begin, bytes(size % 10**6))


def _zlib_zeros(size: int) -> bytes:
    return b"\x78\x9c" + _Zeros(size).packed + bytes(4)


def _stored(name: str, content: bytes) -> tuple:
    return name, content, len(content)


def _write_zip(path: Path, members: list[tuple]) -> Path:
    """A zip of (name, content, size); zipfile would have to pack the giant ones.

    Their checksums are wrong, which shows only once they are unpacked.
    """
    with open(path, "wb") as file:
        directory = b""
        for name, content, size in members:
            packed, method = (content, 0) if isinstance(content, bytes) else (content.packed, 8)
            check = zlib.crc32(content) if isinstance(content, bytes) else 0
            facts = struct.pack("<HHHHHIIIHH", 20, 0, method, 0, 33, check, len(packed), size,
                                len(name), 0)
            directory += b"PK\x01\x02" + struct.pack("<H", 20) + facts + struct.pack(
                "<HHHII", 0, 0, 0, 0, file.tell()) + name.encode()
            file.write(b"PK\x03\x04" + facts + name.encode() + packed)
        file.write(directory + b"PK\x05\x06" + struct.pack(
            "<HHHHIIH", 0, 0, len(members), len(members), len(directory), file.tell(), 0))
    return path


def _diffusers(place: Path) -> Path:
    """A tiny pipeline as diffusers writes it."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8,), norm_num_groups=4,
        layers_per_block=1, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(place)
    return place


@dataclass(frozen=True)
class Case:
    """A file, the command that meets it, and how that must end.

    Attributes:
        fault: what it is.
        make: writes it and returns the path that the command is given.
        command: entry point and arguments for that path.
        named: what the message must name.
        code: exit code; with 0, ``named`` must be in the output.
    """

    fault: str
    make: Callable[[Path, Evil], Path]
    command: Callable[[Path], tuple]
    named: str
    code: int = 2


CASES = (
    Case("a pickle, not allowed", _pickled("model.pt"), _from, "model.pt"),
    Case("a pickle, allowed", _pickled("model.pt"), _allowed, "model.pt"),
    Case("CIFAR's pickles", _hostile_batch, _cifar, "cifar-10-batches-py"),
    Case("a tar.gz of CIFAR with a description of 3 GB", _tar_bomb, _cifar,
         "cifar-10-python.tar.gz"),
    Case("a zip in a .pt", _zip_in_pt, _allowed, "nested.pt"),
    Case("a zip in a zip, and a bomb", _zip_in_zip, _pictures, "nested.zip"),
    Case("a tar of torch before 0.2", _tar_of_torch, _allowed, "legacy.pt"),
    Case("an .npy of objects", _objects_npy, _look, "objects.npy"),
    Case("an .npz of objects", _objects_npz, _samples, "objects.npz"),
    Case("EDM's .pkl", _pickled("edm.pkl"), _convert, "edm.pkl"),
    Case("weights for torch-fidelity", _pickled("inception.pth"), _weights("inception"),
         "inception.pth"),
    Case("weights of a CIFAR ResNet", _saved, _weights("resnet20"), "saved.pt"),
    Case("YAML with !!python", _yaml_python, _config, "config.yaml"),
    Case("a run whose config.yaml has !!python", _yaml_python, _run, "config.yaml"),
    Case("YAML aliases that stand for 9^12 words", _yaml_aliases, _config, "aliases.yaml"),
    Case("a safetensors header of 2^62 bytes", _long_header, _from,
         "diffusion_pytorch_model.safetensors"),
    Case("a safetensors header of 600,000 tensors", _rich_header, _from,
         "diffusion_pytorch_model.safetensors"),
    Case("an .npz that unpacks to 3 GB", _npz_bomb, _samples, "bomb.npz"),
    Case("a .pt that unpacks to 3 GB", _pt_bomb, _allowed, "bomb.pt"),
    Case("zip members with ../, absolute, and links", _climbing_zip, _look, "4 items", 0),
    Case("CIFAR whose members are links", _linked_tar, _cifar, "cifar-10-python.tar.gz"),
    Case("pictures that unpack to gigabytes", _picture_bomb, _look, "pictures"),
    Case("a dataset.json of 10^9 entries", _many_labels, _look, "4 items", 0),
    Case("a diffusers directory with code of its own", _custom_code, _pipeline, "model"),
)


def attack(trial: Trial) -> Found:
    """F6: give one of them to a command."""
    case = CASES[trial.number]
    work = trial.folder / "a" / "b" / "here"
    work.mkdir(parents=True)
    os.chdir(work)
    os.environ["ROBUSTDM_CACHE"] = str(trial.folder / "cache")
    evil = Evil(trial.folder / "canary", trial.random.randrange(3))
    np.savez(_clean(work / "x"), images=np.zeros((4, 8, 8, 1), np.uint8))
    main, argv = case.command(case.make(work, evil))
    out = () if case.code else ("out",)
    before = _files(trial.folder, out)
    floor = call(lambda: 0).rss
    done = call(lambda: main([str(word) for word in argv]))
    written = sorted(_files(trial.folder, out) - before)
    ran = os.path.exists(evil.canary)
    grown = done.rss - floor
    lines = done.output.strip().splitlines()
    said = case.named in done.output if case.code == 0 else (
        len(lines) == 1 and lines[0].startswith("error: ") and case.named in lines[0])
    passed = (done.code == case.code and said and done.clean and not ran and not written
              and grown < MEMORY and done.cpu_s < CPU_SECONDS)
    seen = (f"exit code {done.code}{', CODE RAN' if ran else ''}"
            f"{f', wrote {written[0]}' if written else ''}, {grown / 2**20:.0f} MiB, "
            f"{done.cpu_s:.1f} s of CPU: {done.last}")
    return Found(case.fault, f"{main.__module__} {' '.join(map(str, argv))}",
                 f"exit code {case.code}, one line that names {case.named}, no code run, nothing "
                 f"written, under 1 GiB and {CPU_SECONDS:.0f} s", seen, passed)


def _files(folder: Path, but: tuple[str, ...]) -> set[tuple]:
    """Everything in a folder but what the command may write to, with size and time."""
    found = set()
    for path in folder.rglob("*"):
        if not {*but, "output.txt"} & {*path.relative_to(folder).parts}:
            status = path.lstat()
            found.add((str(path), status.st_size, status.st_mtime_ns if path.is_file() else 0))
    return found
