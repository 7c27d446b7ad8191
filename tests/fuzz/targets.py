"""The readers, and tiny valid files for each. All of them are made here: there is no corpus."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from unittest.mock import Mock, patch

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors.torch import save as to_safetensors

from robustdm import cli
from robustdm.data import arrays, cifar, decode, files
from robustdm.errors import RunError, UsageError
from robustdm.models import build_model, pretrained
from robustdm.models.load_run import load_run
from robustdm.reporting import run_page
from robustdm.runs import checkpoint, rundir
from robustdm.runs.config import TrainConfig
from robustdm.runs.files import column, read_run
from robustdm.runs.presets import preset_values
from robustdm.training.trainer import Trainer


class Target:
    """A reader, the files that it needs, and which of them are changed.

    Attributes:
        name: on the command line.
        modules: files of robustdm whose lines count as reached.
        slots: names of the files that are changed, one in an input.
    """

    name = ""
    modules: tuple[str, ...] = ()
    slots: tuple[str, ...] = ()

    @cached_property
    def files(self) -> dict[str, bytes]:
        """Valid files by name, those of the slots among them."""
        raise NotImplementedError

    def read(self, folder: Path, slot: str) -> None:
        """What is tried: nothing but our errors may come out."""
        raise NotImplementedError

    def write(self, folder: Path, slot: str, content: bytes) -> None:
        """Put the content of an input in its place."""
        (folder / slot).write_bytes(content)

    def more(self) -> list[tuple[str, bytes]]:
        """(slot, content) of further seeds."""
        return []

    def seeds(self) -> list[bytes]:
        """Inputs to begin with."""
        pairs = [(slot, self.files[slot]) for slot in self.slots] + self.more()
        return [bytes([self.slots.index(slot)]) + content for slot, content in pairs]

    def prepare(self, folder: Path) -> None:
        """Write the valid files."""
        for name, content in self.files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

    def run(self, data: bytes, folder: Path) -> None:
        """One input; the files are valid again afterwards."""
        slot = self.slots[data[0] % len(self.slots)]
        self.write(folder, slot, data[1:])
        try:
            self.read(folder, slot)
        finally:
            self.prepare(folder)

    def covers(self, file: str) -> bool:
        """Whether the lines of a Python file count."""
        return file.endswith(self.modules)


def _saved(save: Callable, *arguments, **options) -> bytes:
    file = io.BytesIO()
    save(file, *arguments, **options)
    return file.getvalue()


def _picture(kind: str, mode: str = "RGB", side: int = 6, **options) -> bytes:
    size = side * side * {"RGB": 3, "RGBA": 4, "L": 1, "P": 1, "1": 1, "I;16": 2, "CMYK": 4}[mode]
    image = Image.frombytes(mode, (side, side), bytes(k * 37 % 256 for k in range(size)))
    return _saved(image.save, kind, **options)


class Images(Target):
    """One picture file of any format."""

    name = "images"
    modules = ("robustdm/data/decode.py",)
    slots = ("picture",)

    @cached_property
    def files(self):
        return {"picture": _picture("PNG")}

    def more(self):
        exif = Image.Exif()
        exif[0x112] = 6
        made = [_picture("PNG", mode) for mode in ("RGBA", "L", "P", "1", "I;16")]
        made += [_picture(kind) for kind in ("JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")]
        made += [_picture("JPEG", exif=exif), _picture("JPEG", "CMYK"), _picture("JPEG", "L"),
                 _picture("TIFF", "I;16"), _picture("TIFF", compression="tiff_lzw"),
                 _picture("TIFF", compression="tiff_deflate"), _picture("PNG", "P", transparency=3),
                 _picture("WEBP", lossless=True), _picture("GIF", "P"), b"P2 2 2 9 1 2 3 4",
                 b"Pf\n2 2\n-1.0\n" + np.float32([0, 0.5, 1, 0.25]).tobytes()]
        return [("picture", content) for content in made]

    def read(self, folder, slot):
        content = (folder / slot).read_bytes()
        for channels in (1, 3, 4):
            try:
                with decode.quiet():
                    header = decode.read_header(io.BytesIO(content), crop=2)
                    pixels = decode.decode(io.BytesIO(content), channels, 4, crop=channels % 2 * 2)
            except decode.BadImage as error:
                assert "\n" not in str(error)
                return
            assert pixels.shape == (channels, 4, 4) and pixels.dtype == np.uint8
            assert min(header.size) >= 2


class Zip(Target):
    """A zip of pictures in EDM's form."""

    name = "zip"
    modules = ("robustdm/data/files.py", "robustdm/data/decode.py", "zipfile.py")
    slots = ("set.zip",)

    @staticmethod
    def _pack(compression: int, names=("00000/img00000000.png", "00000/img00000001.png")) -> bytes:
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", compression) as archive:
            for name in names:
                archive.writestr(name, _picture("PNG", "L"))
            labels = {"labels": [[name, 0] for name in names]}
            archive.writestr("dataset.json", json.dumps(labels))
        return file.getvalue()

    @cached_property
    def files(self):
        return {"set.zip": self._pack(zipfile.ZIP_STORED)}

    def more(self):
        kinds = (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
        packed = [self._pack(kind) for kind in kinds]
        names = ("../up.png", "/root.png", "a\\b.png", "é.png")
        packed.append(self._pack(zipfile.ZIP_STORED, names))
        return [("set.zip", content) for content in packed]

    def read(self, folder, slot):
        source = files.open_pictures(folder / slot)
        pictures = files.scan(source, max_bad=0.9)
        pictures.fingerprint()
        files.decode_all(pictures, 4, max_bad=0.9)


class Arrays(Target):
    """.npy and .npz of images."""

    name = "arrays"
    modules = ("robustdm/data/arrays.py", "robustdm/data/decode.py")
    slots = ("x.npy", "x.npz")
    _images = (np.arange(2 * 4 * 4 * 3) % 256).astype(np.uint8).reshape(2, 4, 4, 3)

    @cached_property
    def files(self):
        return {"x.npy": _saved(np.save, self._images),
                "x.npz": _saved(np.savez_compressed, images=self._images)}

    def more(self):
        floats = (self._images / 255).astype(np.float32)
        first = np.asfortranarray(self._images.transpose(0, 3, 1, 2))
        old = io.BytesIO()
        np.lib.format.write_array(old, self._images, version=(2, 0))
        return [("x.npy", _saved(np.save, floats)), ("x.npy", _saved(np.save, first)),
                ("x.npy", _saved(np.save, self._images[..., 0])), ("x.npy", old.getvalue()),
                ("x.npz", _saved(np.savez, a=floats, b=self._images))]

    def read(self, folder, slot):
        images = arrays.load_array(folder / slot)
        assert images.ndim == 4 and images.dtype in (torch.uint8, torch.float32)
        arrays.fit_array(images, 4, folder / slot, 3)


class Cifar(Target):
    """CIFAR's pickle, its binary form, and the archive that holds them."""

    name = "cifar"
    modules = ("robustdm/data/cifar.py",)
    slots = ("py/train", "bin/train.bin", "cifar-100-python.tar.gz", "plain.tar")

    @cached_property
    def files(self):
        rows = (np.arange(2 * 3072) % 7).astype(np.uint8).reshape(2, 3072)
        batch = pickle.dumps({b"data": rows, b"fine_labels": [1, 2]}, protocol=2)
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as archive:
            entry = tarfile.TarInfo("cifar-100-python/train")
            entry.size = len(batch)
            archive.addfile(entry, io.BytesIO(batch))
        binary = b"".join(b"\0\1" + row.tobytes() for row in rows)
        return {"py/train": batch, "bin/train.bin": binary, "plain.tar": packed.getvalue(),
                "cifar-100-python.tar.gz": gzip.compress(packed.getvalue(), mtime=0)}

    def read(self, folder, slot):
        path = folder / slot
        cifar.load_cifar(path.parent if "/" in slot else path)


def _signed(folder: Path, name: str, content: bytes) -> None:
    """Replace a file of a checkpoint and let its manifest say so, as only an attacker would."""
    (folder / name).write_bytes(content)
    manifest = json.loads((folder / checkpoint.MANIFEST).read_text())
    entry = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest["files"][name] = entry
    text = checkpoint._manifest_bytes(manifest["step"], manifest["files"])
    (folder / checkpoint.MANIFEST).write_bytes(text)


def _checkpoint_files(step: int, tensors: dict, state: dict) -> dict[str, bytes]:
    """The files of a checkpoint by their path below ``checkpoints``."""
    found = {f"{name}.safetensors": b"".join(bytes(part) for part in checkpoint._chunks(
        group, checkpoint._gathered({name: group}))) for name, group in tensors.items()}
    found[checkpoint.STATE] = json.dumps({**state, "step": step}).encode()
    entries = {name: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
               for name, content in found.items()}
    found[checkpoint.MANIFEST] = checkpoint._manifest_bytes(step, entries)
    return {f"checkpoints/step-{step:08d}/{name}": content for name, content in found.items()}


class Checkpoint(Target):
    """A checkpoint directory: as it lies there, and with a manifest that was made to fit."""

    name = "checkpoint"
    modules = ("robustdm/runs/checkpoint.py",)
    slots = ("checkpoints/step-00000005/MANIFEST.json", "checkpoints/step-00000005/a.safetensors",
             "checkpoints/step-00000005/state.json", "manifest", "a.safetensors", "state.json")
    _group = {"w": torch.arange(6.0).view(2, 3), "n": torch.tensor(3)}

    @cached_property
    def files(self):
        made = {}
        for step in (4, 5):
            made |= _checkpoint_files(step, {"a": self._group}, {"shape": [3], "at": step})
        newest = "checkpoints/step-00000005/"
        made["manifest"] = made[newest + "MANIFEST.json"]
        made["a.safetensors"] = made[newest + "a.safetensors"]
        made["state.json"] = made[newest + "state.json"]
        return made

    def write(self, folder, slot, content):
        newest = folder / "checkpoints/step-00000005"
        if slot in ("a.safetensors", "state.json"):
            _signed(newest, slot, content)
        elif slot == "manifest":
            try:
                values = json.loads(content)
                content = checkpoint._manifest_bytes(
                    values["step"], values["files"], values["format"])
            except (ValueError, TypeError, KeyError, RecursionError):
                pass
            (newest / checkpoint.MANIFEST).write_bytes(content)
        else:
            super().write(folder, slot, content)

    def read(self, folder, slot):
        root = folder / "checkpoints"
        problems = checkpoint.verify(root / "step-00000005")
        loaded = checkpoint.load_newest(root)
        if slot not in self.files or "/" in slot:  # nobody has changed the manifest to fit
            assert loaded.state["at"] == loaded.step and (loaded.step == 4) == bool(problems)
            assert all(torch.equal(value, self._group[name])
                       for name, value in loaded.tensors["a"].items())
        checkpoint.prune(root, keep_last=1)
        assert checkpoint.list_checkpoints(root)


_POINTS = dict(mlp_width=8, mlp_depth=1, timesteps=10, steps=4)
_UNET = dict(block_channels=(4,), norm_groups=2, timesteps=10, steps=4)


def _config_text(preset: str, flow: bool = True, brief: bool = False, **fields) -> bytes:
    plain = TrainConfig(**{**preset_values(preset), **fields}).to_dict()
    if brief:  # YAML takes its time
        default = TrainConfig().to_dict()
        plain = {name: value for name, value in plain.items() if value != default[name]}
    # JSON is YAML, and can be changed as a tree.
    return (json.dumps(plain) if flow else yaml.safe_dump(plain, sort_keys=False)).encode()


class Run(Target):
    """The directory of a run, read to sample from it and to start from it."""

    name = "run"
    modules = ("robustdm/models/load_run.py", "robustdm/runs/fields.py",
               "robustdm/runs/groups.py", "robustdm/models/pretrained.py",
               "robustdm/runs/rundir.py", "robustdm/models/build.py")
    slots = ("config.yaml", "state.json", "ema_0.995.safetensors")

    @cached_property
    def files(self):
        config = TrainConfig(**{**preset_values("plane"), **_POINTS})
        tensors = {"ema_0.995": build_model(config, (3,)).state_dict()}
        state = {"shape": [3], "is_image": False}
        made = {"config.yaml": _config_text("plane", brief=True, **_POINTS),
                **_checkpoint_files(4, tensors, state)}
        for name in self.slots[1:]:
            made[name] = made[f"checkpoints/step-00000004/{name}"]
        return made

    def more(self):
        return [("config.yaml", _config_text("plane", flow=False, **_POINTS)),
                ("config.yaml", _config_text("digits", brief=True, **_UNET))]

    def write(self, folder, slot, content):
        if slot == "config.yaml":
            super().write(folder, slot, content)
        else:
            _signed(folder / "checkpoints/step-00000004", slot, content)

    def read(self, folder, slot):
        errors = []
        for read in (load_run, lambda folder: pretrained.open_source(str(folder))):
            try:
                read(folder)
            except (UsageError, RunError) as error:
                errors.append(error)
        if errors:
            raise errors[0]


class Resume(Target):
    """The checkpoint that a run is continued from: it is refused, or the next step can be taken."""

    name = "resume"
    modules = ("robustdm/models/weights.py", "robustdm/training/trainer.py")
    slots = ("state.json", "optimizer.safetensors", "model.safetensors", "ema_0.995.safetensors")
    _fields = dict(_POINTS, num_points=64, batch_size=8, ema_rates=(0.995,), device="cpu")

    @cached_property
    def _trainer(self) -> Trainer:
        return Trainer(TrainConfig(**{**preset_values("plane"), **self._fields}))

    @cached_property
    def files(self):
        trainer = self._trainer
        trainer.train_step(torch.ones(8, 3))
        made = _checkpoint_files(trainer.step, *trainer.state())
        for name in self.slots:
            made[name] = made[f"checkpoints/step-00000001/{name}"]
        return made

    def write(self, folder, slot, content):
        _signed(folder / "checkpoints/step-00000001", slot, content)

    def read(self, folder, slot):
        loaded = checkpoint.load_newest(folder / "checkpoints")
        trainer = Trainer(self._trainer.config, self._trainer.data)
        trainer.restore(loaded)
        trainer.train_step(torch.ones(8, 3))
        assert trainer.step == loaded.step + 1
        json.dumps(trainer.state()[1], allow_nan=False)


class Config(Target):
    """A YAML file of a configuration."""

    name = "config"
    modules = ("robustdm/runs/fields.py", "robustdm/runs/groups.py", "robustdm/cli.py")
    slots = ("config.yaml",)

    @cached_property
    def files(self):
        return {"config.yaml": _config_text("digits")}

    def more(self):
        texts = [_config_text(preset, flow) for preset in ("finetune", "cifar10")
                 for flow in (True, False)]
        texts += [b"lr: 1e-4\nsteps: 10\nema_rates: [0.9, 0.99]\n", b"a: &a [1, 2]\nb: *a\n",
                  b"lam: !!float 1\nx: {<<: {lr: 1}}\ny: 2001-01-01 00:00:00\n"]
        return [("config.yaml", text) for text in texts]

    def read(self, folder, slot):
        config = TrainConfig.from_dict(cli.read_yaml(folder / slot), "x")
        again = yaml.safe_load(yaml.safe_dump(config.to_dict()))
        assert TrainConfig.from_dict(again).to_dict() == config.to_dict()


class Report(Target):
    """What a report is made of, but for its figures."""

    name = "report"
    modules = ("robustdm/runs/files.py", "robustdm/reporting/run_page.py",
               "robustdm/runs/rundir.py")
    slots = ("metrics.jsonl", "summary.json", "run.json", "config.yaml", "samples/final.npz",
             "samples/step-00000002.npz", "samples/reference.npz")

    @cached_property
    def files(self):
        rows = [{"step": k, "loss": 1 / k, "fit": 0.5, "lr": 1e-3, "time": k, "img_per_s": 9.0,
                 "skipped": 0} for k in (1, 2, 3)]
        measures = {where: {"noise_rms": 0.5, "mode_0": 0.1}
                    for where in ("samples", "training data", "clean data")}
        samples = np.zeros((2, 1, 8, 8), np.float32)
        sheet = _saved(np.savez, samples=samples)
        return {
            "config.yaml": _config_text("digits", brief=True, **_UNET),
            "metrics.jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode(),
            "summary.json": json.dumps({"step": 3, "measures": measures, "warnings": ["w"],
                                        "time_s": 3.0, "parameters": 9, "device": "cpu"}).encode(),
            "run.json": json.dumps({"data": {"name": "digits", "sha256": "0"}, "network": "unet",
                                    "parameters": 9, "sessions": [{
                                        "command": "x", "git": "0", "versions": {"torch": "2"},
                                        "started": "2001", "gpu": None}]}).encode(),
            "samples/final.npz": sheet, "samples/step-00000002.npz": sheet,
            "samples/reference.npz": _saved(np.savez, train=samples, clean=samples),
        }

    def read(self, folder, slot):
        run = read_run(folder)
        run.last("loss"), column(run.rows, "loss")
        with patch.multiple(run_page, _curves=lambda run: [], _schedule=lambda run: []):
            run_page.page(run)
        lines = rundir.RunDir(folder, -1)
        lines.truncate_metrics(2)
        # What it writes does not depend on what it reads; it asks git, and YAML takes its time.
        quick = Mock(**{"safe_dump.return_value": ""})
        with patch.multiple(rundir, provenance=dict, yaml=quick):
            lines.record(TrainConfig(), data={})


class Diffusers(Target):
    """A diffusers directory."""

    name = "diffusers"
    modules = ("robustdm/models/pretrained.py", "robustdm/models/pipeline.py",
               "robustdm/method/schedule.py", "robustdm/models/improved.py")
    slots = ("unet/config.json", "scheduler/scheduler_config.json", "model_index.json",
             "unet/diffusion_pytorch_model.safetensors")

    @cached_property
    def files(self):
        from diffusers import UNet2DModel

        unet = dict(
            _class_name="UNet2DModel", _diffusers_version="0.30.0", sample_size=4, in_channels=1,
            out_channels=1, block_out_channels=[2], layers_per_block=1, norm_num_groups=1,
            down_block_types=["DownBlock2D"], up_block_types=["UpBlock2D"], attention_head_dim=None,
            add_attention=False, downsample_padding=0, flip_sin_to_cos=False, freq_shift=1)
        torch.manual_seed(0)
        weights = UNet2DModel(**{k: v for k, v in unet.items() if k[0] != "_"}).state_dict()
        scheduler = dict(_class_name="DDPMScheduler", num_train_timesteps=10, beta_start=1e-4,
                         beta_end=0.02, beta_schedule="linear", trained_betas=None,
                         variance_type="fixed_small", clip_sample=True, prediction_type="epsilon")
        index = dict(_class_name="DDPMPipeline", unet=["diffusers", "UNet2DModel"],
                     scheduler=["diffusers", "DDPMScheduler"])
        return {name: content if isinstance(content, bytes) else json.dumps(content).encode()
                for name, content in zip(self.slots, (unet, scheduler, index,
                                                      to_safetensors(weights)), strict=True)}

    def read(self, folder, slot):
        source = pretrained.open_source(str(folder))
        schedule = pretrained.schedule_from(source.scheduler) if source.scheduler else None
        pretrained.describe(source, schedule)
        config = TrainConfig(out=folder / "run", init_from=str(folder))
        config = TrainConfig.from_dict(
            {**config.to_dict(), **source.fields, "pretrained": source.record()})


class Improved(Target):
    """An improved-diffusion state dict: its names and shapes, and the two forms of its file."""

    name = "improved"
    modules = ("robustdm/models/improved.py", "robustdm/models/pretrained.py")
    slots = ("shapes.json", "model.pt", "model.safetensors")

    @cached_property
    def files(self):
        from robustdm.models import improved, unet_config

        config = TrainConfig(block_channels=(32, 64), norm_groups=32, scale_shift_norm=True,
                             attention_resolutions=(4,), attention_head_dim=16, resolution=8)
        unet = pretrained._arguments(unet_config(config, 3))
        names = improved.from_diffusers(pretrained._skeleton(unet), unet)
        shapes = {name: list(value.shape) for name, value in names.items()}
        few = {"input_blocks.0.0.weight": torch.ones(2, 1), "out.2.bias": torch.zeros(2)}
        return {"shapes.json": json.dumps(shapes).encode(), "model.pt": _saved(
            lambda file: torch.save(few, file)), "model.safetensors": to_safetensors(few)}

    def more(self):
        few = {"x": torch.ones(1), "input_blocks.0.0.weight": torch.ones(2)}
        old = _saved(lambda file: torch.save(few, file, _use_new_zipfile_serialization=False))
        return [("model.pt", old), ("model.pt", _saved(lambda file: torch.save({"x": few}, file)))]

    def read(self, folder, slot):
        weights = None
        if slot == "shapes.json":
            try:
                shapes = json.loads((folder / slot).read_text())
                weights = {str(name): torch.ones(()).expand(shape)
                           for name, shape in shapes.items()}
            except Exception:
                return  # not what is tried here: such tensors cannot be
            slot = "model.safetensors"
        read = pretrained._read_weights if weights is None else lambda *_: (weights, "0")
        with patch.object(pretrained, "_read_weights", read):
            source = pretrained.open_source(
                str(folder / slot), allow_pickle=True, num_heads=4, resolution=8, timesteps=10)
        pretrained.describe(source, None)


TARGETS = {target.name: target for target in (
    Arrays, Checkpoint, Cifar, Config, Diffusers, Images, Improved, Report, Resume, Run, Zip)}
