"""What the documents say works: every command goes through the parser it is meant for, those of the
walk run at tiny size, and so does every block of Python."""

import argparse
import importlib
import importlib.util
import re
import shlex
import shutil
import sys
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import tyro
from diffusers import UNet2DModel
from PIL import Image
from safetensors.torch import save_file

from robustdm import NoiseSchedule, reproduce, train
from robustdm.errors import RobustDMError
from robustdm.method import closed_form
from robustdm.models import PointMLP, pretrained
from robustdm.models.pipeline import save_pipeline, write_noise
from tests.improved_unet import make
from tests.test_data_cifar import pack, python_files

ROOT = Path(__file__).parent.parent
DOCUMENTS = ["README.md", "benchmarks/README.md", *sorted(
    str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


def blocks(name, language=""):
    return [text for kind, text in FENCE.findall((ROOT / name).read_text()) if kind == language]


def commands(name):
    """The words of every command that starts with "python", fenced or in a sentence; of torchrun's,
    what each of its processes does."""
    lines = [line for block in blocks(name) for line in block.replace("\\\n", " ").splitlines()]
    inline = re.findall(r"`(python [^`]+)`", FENCE.sub("", (ROOT / name).read_text()))
    for line in lines + [text for text in inline if len(text.split()) > 3 or ".py" in text]:
        for part in line.split("&&"):
            part = re.sub(r"^torchrun .* -m (-- )?", "python -m ", part.strip())
            if part.split()[:1] == ["python"]:
                yield shlex.split(part.replace(" NAME", " fig2"), comments=True)


def main_of(words, monkeypatch):
    """The function that a command calls, with its arguments in sys.argv."""
    if words[1] == "-m":
        monkeypatch.syspath_prepend(ROOT)
        found, argv = importlib.import_module(words[2]), words[3:]
        if hasattr(found, "__path__"):
            found = importlib.import_module(f"{words[2]}.__main__")
    else:
        script, argv = ROOT / words[1], words[2:]
        monkeypatch.syspath_prepend(script.parent)
        found = importlib.import_module(script.stem)
    monkeypatch.setattr(sys, "argv", [words[1], *argv])
    return found.main


class Parsed(Exception):
    """A command line was accepted; nothing of it has run."""


@pytest.fixture
def only_parse(place, monkeypatch):
    """Let every entry point end where its flags have become a configuration."""
    def after(parse):
        def stop(*arguments, **options):
            parse(*arguments, **options)
            raise Parsed

        return stop

    for where, name in ((argparse.ArgumentParser, "parse_args"), (tyro, "cli")):
        monkeypatch.setattr(where, name, after(getattr(where, name)))


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_command_is_accepted_by_its_parser(name, only_parse, monkeypatch):
    found = [words for words in commands(name) if "--help" not in words]
    for words in found:
        try:
            with pytest.raises(Parsed):
                main_of(words, monkeypatch)()
        except SystemExit as stop:
            pytest.fail(f"{name}: {shlex.join(words)} is refused (exit code {stop.code})")
    assert found or name == "docs/studies.md"


def test_the_readme_stays_short():
    assert len((ROOT / "README.md").read_text().splitlines()) < 200


def test_the_teaser_is_drawn_from_the_arms_of_the_study(tmp_path, monkeypatch):
    for name in ("DDPM", "robust_adv-ray"):
        save_file({"samples": torch.zeros(16, 1, 8, 8)},
                  tmp_path / f"digits-{name}-seed0-0123abcd-samples.safetensors")
    out = tmp_path / "teaser.png"
    main_of(["python", "docs/teaser.py", str(tmp_path), "--out", str(out)], monkeypatch)()
    drawn, kept = (np.asarray(Image.open(path)) for path in (out, ROOT / "docs/teaser.png"))
    assert drawn.shape == kept.shape and 850 < drawn.shape[1] < 950
    half = len(drawn) // 2  # the rows of data are the same, those of samples are not
    pictures = slice(156, None)
    assert np.array_equal(drawn[:half, pictures], kept[:half, pictures])
    assert not np.array_equal(drawn[half:, pictures], kept[half:, pictures])


# The walk: its commands find pictures, and a run under every name that the documents use. What is
# added to a command makes it tiny.
WALKED = ["README.md", *(f"docs/{name}.md" for name in (
    "training", "method", "checkpoints", "faq", "kernels", "benchmarks", "pretrained"))]
SMALL = shlex.split(
    "--resolution 8 --block-channels 8 8 --norm-groups 4 --layers-per-block 1 --batch-size 4 "
    "--attention-resolutions 4 --num-samples 4 --preview-steps 2 --final-steps 2 --workers 0 "
    "--ema-rates 0.999 0.9999 --device cpu --precision fp32")
STARTED = shlex.split(  # from a model, whose the network is
    "--batch-size 4 --num-samples 2 --preview-steps 2 --final-steps 2 --workers 0 --device cpu "
    "--precision fp32 --warmup-steps 1")
TINY = {
    "robustdm.sample": ["--num", "2", "--steps", "2", "--overwrite"],
    "robustdm.evaluate": ["--num", "8", "--steps", "2", "--metrics", "kernel", "--features",
                          "pixels"],
    "robustdm.plan": ["--resolution", "4"],
}
RUNS = ("mine", "digits", "finetuned")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A directory with all that the commands find where the documents say."""
    where = tmp_path_factory.mktemp("docs")
    (where / "my_pictures").mkdir()
    noise = np.random.default_rng(0)
    for k in range(100):
        pixels = noise.integers(0, 256, (12, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(where / "my_pictures" / f"{k}.png")
    assert train.main([
        "--preset", "folder", "--data-dir", str(where / "my_pictures"), "--steps", "9",
        "--stop-after", "1", "--out", str(where / "runs/mine"), *SMALL]) == 0
    write_noise(where / "runs/mine/pipeline", 0.2)  # as a plain DDPM on noisy data has it
    for name in RUNS[1:]:
        shutil.copytree(where / "runs/mine", where / "runs" / name)
    pack(where / "cifar-10-python.tar.gz", python_files())
    torch.save(make("multi-head").state_dict(), where / "ema_0.9999_500000.pt")
    unet = UNet2DModel(  # of google/ddpm-cifar10-32 what decides how it is read
        sample_size=32, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), attention_head_dim=8,
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), downsample_padding=0)
    save_pipeline(unet, NoiseSchedule.linear(1000), where / "hub", clip_sample=True)
    return where


@pytest.fixture
def place(prepared, tmp_path, monkeypatch):
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretrained, "_download", lambda name, patterns: tmp_path / "hub")
    return tmp_path


def tiny(words):
    """A command made tiny; None for those that tests of their own run: programs of examples/ and
    benchmarks/, the doctor, attacks, adapters without peft and other devices."""
    module, flags = words[2], words[3:]
    elsewhere = module in ("robustdm.doctor", "robustdm.attack") or (
        "--lora" in flags and importlib.util.find_spec("peft") is None)
    if words[1] != "-m" or elsewhere or "cuda:1" in flags:
        return None
    if module == "robustdm.convert":
        shutil.rmtree(flags[1], ignore_errors=True)
    if module != "robustdm.train":
        return [*words, *TINY.get(module, [])]
    if not {"--resume", "--dry-run"} & set(flags):
        out = flags[flags.index("--out") + 1] if "--out" in flags else "runs/digits"
        shutil.rmtree(out, ignore_errors=True)
    small = STARTED if "--init-from" in flags else SMALL
    return [*words, *small, "--steps", "9", "--stop-after", "1"]


def test_a_walk_through_the_documents(place, monkeypatch, capsys):
    """As a reader would: one command after the other, and what they print stays unread."""
    few = closed_form.candidates()[::60]
    monkeypatch.setattr(closed_form, "candidates", lambda: few)
    monkeypatch.setattr(reproduce, "import_module", lambda name: MagicMock())  # no study runs
    done = []
    for name in WALKED:
        for words in commands(name):
            if words in done or "--help" in words or len(words) < 3:
                continue
            done.append(words)
            try:
                if (command := tiny(words)) is not None:
                    assert not main_of(command, monkeypatch)()
            except (RobustDMError, SystemExit) as error:
                pytest.fail(f"{name}: {shlex.join(words)}: {error}")
    assert len(done) > 20


@pytest.mark.parametrize("name", WALKED)
def test_every_block_of_python_runs(name, place):
    model = PointMLP(3, width=8, depth=1)
    for block in blocks(name, "python"):
        exec(block.replace("batch_size=16", "batch_size=2, num_inference_steps=2"), {
            "model": model, "optimizer": torch.optim.Adam(model.parameters()),
            "batches": [torch.rand(4, 3)] * 2,
        })
