"""Conversion between formats: exact against an independent network, and refused where it is not."""

import subprocess
import sys

import pytest
import torch
from diffusers import DDPMPipeline, UNet2DModel

from robustdm.convert import main
from robustdm.errors import RunError, UsageError
from robustdm.method.schedule import NoiseSchedule
from robustdm.models import improved
from robustdm.models.pipeline import save_pipeline
from tests.improved_unet import ARCHITECTURES, make

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
T = torch.tensor([7, 390])


def convert(*arguments):
    return main([str(a) for a in arguments])


@pytest.fixture(params=sorted(ARCHITECTURES))
def saved(request, tmp_path):
    """(name of the architecture, network, its .pt)"""
    model = make(request.param)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    return request.param, model, tmp_path / "model.pt"


def flags(name):
    return ("--allow-pickle", "--num-heads", ARCHITECTURES[name]["heads"], "--resolution", 16,
            "--schedule", "cosine", "--timesteps", 400, "--verify")


def test_improved_diffusion_to_diffusers_and_back(saved, tmp_path, capsys):
    name, model, path = saved
    convert(path, tmp_path / "pipe", *flags(name))
    assert "verified: largest difference" in capsys.readouterr().out
    pipeline = DDPMPipeline.from_pretrained(tmp_path / "pipe", use_safetensors=True)
    wanted = model(X, T * 1000 / 400)  # what it tells its network by default
    with torch.no_grad():
        assert (pipeline.unet(X, T).sample - wanted).abs().max() < 1e-5
    learned = ARCHITECTURES[name].get("learn_sigma", False)
    assert wanted.shape[1] == (6 if learned else 3)
    kind = pipeline.scheduler.config
    assert kind.variance_type == ("learned_range" if learned else "fixed_large")
    assert kind.beta_schedule == "squaredcos_cap_v2" and kind.num_train_timesteps == 400
    assert pipeline.unet.config.sample_size == 16

    convert(tmp_path / "pipe", tmp_path / "back.pt", "--verify")
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    own = model.state_dict()
    assert back.keys() == own.keys()
    assert all(torch.equal(back[key], own[key]) for key in own)


def test_without_rescaled_timesteps(tmp_path):
    model = make("scale-shift")
    torch.save(model.state_dict(), tmp_path / "model.pt")
    convert(tmp_path / "model.pt", tmp_path / "pipe", *flags("scale-shift"),
            "--no-rescale-timesteps")
    unet = UNet2DModel.from_pretrained(tmp_path / "pipe" / "unet")
    assert unet.config.time_embedding_type == "positional"
    with torch.no_grad():
        assert (unet(X, T).sample - model(X, T)).abs().max() < 1e-5


def test_a_table_of_timesteps_that_was_trained_does_not_go_back(tmp_path):
    convert(improved_file(tmp_path), tmp_path / "pipe", *flags("scale-shift"))
    pipeline = DDPMPipeline.from_pretrained(tmp_path / "pipe")
    with torch.no_grad():
        pipeline.unet.time_proj.weight[3, 1] += 0.01
    pipeline.save_pretrained(tmp_path / "other")
    with pytest.raises(UsageError, match="its embeddings of the timesteps are learned"):
        convert(tmp_path / "other", tmp_path / "back.pt")


def test_our_plain_forward_pass_is_improved_diffusion_s(saved):
    name, model, _ = saved
    found = improved.forward(model.state_dict(), ARCHITECTURES[name]["heads"], X, T)
    assert (found - model(X, T)).abs().max() < 1e-5


def test_verify_notices_a_wrong_conversion(tmp_path, monkeypatch):
    model = make("multi-head")
    torch.save(model.state_dict(), tmp_path / "model.pt")
    right = improved.to_diffusers

    def wrong(weights, unet):
        found = right(weights, unet)
        key = "mid_block.attentions.0.to_q.weight"
        return found | {key: found[key].flip(0)}

    monkeypatch.setattr(improved, "to_diffusers", wrong)
    with pytest.raises(RunError, match="does not compute what .* does: largest difference"):
        convert(tmp_path / "model.pt", tmp_path / "pipe", *flags("multi-head"))
    assert not (tmp_path / "pipe").exists()


def test_our_own_presets_go_to_improved_diffusion(tmp_path):
    """The network of scale_shift_norm, whose head width is one number."""
    from robustdm.models import unet_config
    from robustdm.runs.config import TrainConfig

    config = TrainConfig(block_channels=(32, 64), norm_groups=32, scale_shift_norm=True,
                         attention_resolutions=(4,), attention_head_dim=16, resolution=8)
    unet = UNet2DModel(**unet_config(config, 3)).eval()
    save_pipeline(unet, NoiseSchedule.linear(10), tmp_path / "pipe", clip_sample=True)
    convert(tmp_path / "pipe", tmp_path / "model.pt", "--verify")
    found = improved.forward(
        torch.load(tmp_path / "model.pt", weights_only=True), 4, X, T)
    with torch.no_grad():
        assert (found - unet(X, T).sample).abs().max() < 1e-5


def improved_file(tmp_path, change=lambda weights: None, **architecture):
    from tests.improved_unet import ImprovedUNet

    weights = ImprovedUNet(**architecture).state_dict()
    change(weights)
    torch.save(weights, tmp_path / "model.pt")
    return tmp_path / "model.pt"


@pytest.mark.parametrize("missing,match", [
    ("--num-heads", "do not tell the number of attention heads: give --num-heads"),
    ("--resolution", "size of its images; give --resolution"),
    ("--schedule", "give --schedule linear or cosine"),
    ("--allow-pickle", "add --allow-pickle"),
])
def test_what_the_weights_do_not_tell_is_asked_for(tmp_path, missing, match):
    given = list(flags("scale-shift"))
    at = given.index(missing)
    del given[at : at + (1 if missing == "--allow-pickle" else 2)]
    with pytest.raises(UsageError, match=match):
        convert(improved_file(tmp_path), tmp_path / "pipe", *given)
    assert not (tmp_path / "pipe").exists()


@pytest.mark.parametrize("architecture,change,heads,match", [
    (dict(mult=(1, 2), attends=(1, 2)), None, 2, "2 heads at levels of 32 and 64 channels"),
    (dict(), None, 5, r"num_heads is 5: it must divide"),
    (dict(mult=(2, 2)), None, 1, "channel_mult that begins with 1"),
    (dict(), lambda w: w.update({"label_emb.weight": torch.zeros(10, 128)}), 1,
     "class-conditional"),
    (dict(), lambda w: w.pop("input_blocks.2.0.op.weight"), 1, "resblock_updown"),
    (dict(), lambda w: w.pop("out.0.bias"), 1,
     r"parameter out.0.bias is missing, the network needs \(32,\)"),
    (dict(), lambda w: w.update(extra=torch.zeros(2, 3)), 1,
     r"parameter extra of shape \(2, 3\) is unknown"),
    (dict(), lambda w: w.update({"out.2.bias": torch.zeros(4)}), 1,
     r"out.2.bias has shape \(4,\), the network needs \(3,\)"),
    (dict(), lambda w: w.update({"out.2.bias": torch.full((3,), torch.nan)}), 1,
     "something else than finite numbers"),
])
def test_improved_diffusion_refusals(tmp_path, architecture, change, heads, match):
    path = improved_file(tmp_path, change or (lambda w: None), **architecture)
    with pytest.raises(UsageError, match=match):
        convert(path, tmp_path / "pipe", "--allow-pickle", "--num-heads", heads, "--resolution", 16,
                "--schedule", "linear")
    assert not (tmp_path / "pipe").exists()


def test_other_networks_have_no_counterpart_there(tmp_path):
    unet = UNet2DModel(sample_size=8, block_out_channels=(32, 64), down_block_types=2 * (
        "DownBlock2D",), up_block_types=2 * ("UpBlock2D",), downsample_padding=0)
    save_pipeline(unet, NoiseSchedule.linear(10), tmp_path / "pipe", clip_sample=True)
    with pytest.raises(UsageError, match="downsample_padding is 0, not 1"):
        convert(tmp_path / "pipe", tmp_path / "model.pt")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pipe"]


@pytest.mark.parametrize("flag,value,match", [
    ("--num-heads", 0, "num_heads is 0: it must divide"),
    ("--resolution", 0, "resolution is 0: it must be the side"),
    ("--resolution", -16, "resolution is -16"),
    ("--resolution", 17, "resolution is 17: .* a multiple of 2"),
    ("--timesteps", 0, "timesteps is 0: it must be from 1"),
    ("--timesteps", 10**9, "timesteps is 1000000000"),
    ("--ema", 0.9, "ema is 0.9, but only a run has averages"),
])
def test_flags_that_cannot_be(tmp_path, flag, value, match):
    given = [*flags("scale-shift"), flag, value]
    with pytest.raises(UsageError, match=match):
        convert(improved_file(tmp_path), tmp_path / "pipe", *given)
    assert not (tmp_path / "pipe").exists()


@pytest.mark.parametrize("out", ["pipe", "model.pt"])
def test_a_full_disk(tmp_path, out):
    """No half of it is left, and no traceback."""
    unet = UNet2DModel(sample_size=8, block_out_channels=(32, 64), down_block_types=2 * (
        "DownBlock2D",), up_block_types=2 * ("UpBlock2D",))
    save_pipeline(unet, NoiseSchedule.linear(10), tmp_path / "in", clip_sample=True)
    code = ("import resource, signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
            "from robustdm.cli import guard\nfrom robustdm.convert import main\nguard(main)\n")
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "in", tmp_path / out],
                          capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: out is ") and "it was not written" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "mine.pt").write_text("years of work")
    with pytest.raises(UsageError, match="it exists"):
        convert(tmp_path / "in.pt", tmp_path / "mine.pt")
    with pytest.raises(UsageError, match="name a directory .* or a file ending in .pt"):
        convert(tmp_path / "in.pt", tmp_path / "out.onnx")
    assert (tmp_path / "mine.pt").read_text() == "years of work"
