"""Starting from models that exist: what is read is what diffusers reads; the rest is refused."""

import json
import os
import pickle
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors.torch import load_file, save_file

from robustdm import sample
from robustdm.cli import guard, parse_train
from robustdm.convert import ConvertConfig, convert
from robustdm.errors import RunError, UsageError
from robustdm.models import pretrained
from robustdm.models.fuse import fuse
from robustdm.models.load_run import load_run
from robustdm.models.pipeline import save_pipeline, schedule_from
from robustdm.models.pretrained import network_of, open_source, settle
from robustdm.runs.config import TrainConfig
from robustdm.train import main
from robustdm.training.loop import train
from robustdm.training.trainer import Trainer
from tests.improved_unet import make

# google/ddpm-cifar10-32 in small: asymmetric padding, TF-style embedding, one head.
UNET = dict(
    sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 16), layers_per_block=1,
    down_block_types=("AttnDownBlock2D", "DownBlock2D"), norm_num_groups=4, norm_eps=1e-6,
    up_block_types=("UpBlock2D", "AttnUpBlock2D"), attention_head_dim=None, downsample_padding=0,
    flip_sin_to_cos=False, freq_shift=1,
)
WEIGHTS = "diffusion_pytorch_model"
X, T = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([3, 900])
TINY = dict(batch_size=8, steps=4, log_every=2, sample_every=0, checkpoint_every=2, num_samples=2,
            preview_steps=2, final_steps=2, lr=1e-4, warmup_steps=0)


def make_unet(spread=0.1, **changes):
    torch.manual_seed(0)
    unet = UNet2DModel(**{**UNET, **changes}).eval()
    with torch.no_grad():
        for p in unet.parameters():
            p.add_(spread * torch.randn_like(p))
    return unet


def predict(model, x=X, t=T):
    with torch.no_grad():
        out = model(x, t)
    return getattr(out, "sample", out)


def same(a, b):
    """To rounding, which may depend on where in memory the tensors lie."""
    return (a - b).abs().max() < 1e-5


def save(folder, unet=None, **scheduler):
    """A DDPMPipeline in ``folder``; returns (folder, its network)."""
    unet = unet or make_unet()
    scheduler = {"variance_type": "fixed_large", "num_train_timesteps": 100} | scheduler
    DDPMPipeline(unet=unet, scheduler=DDPMScheduler(**scheduler)).save_pretrained(folder)
    return folder, unet


def edit(file, change):
    """Change a JSON file in place."""
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


def flatten(folder):
    """The layout of old repositories: all files side by side."""
    for file in [*folder.glob("unet/*"), *folder.glob("scheduler/*")]:
        file.rename(folder / file.name)
    return folder


def tiny(tmp_path, source, **fields):
    return TrainConfig(**{**TINY, "out": tmp_path / "run", "init_from": str(source), **fields})


def images(tmp_path, side):
    values = np.random.default_rng(0).integers(0, 255, (24, side, side, 3), dtype=np.uint8)
    np.save(tmp_path / "images.npy", values)
    return tmp_path / "images.npy"


def quiet(config):
    return train(config, progress_mode="off")


# Reading.


def test_a_nested_pipeline(tmp_path):
    folder, unet = save(tmp_path / "pipe", beta_schedule="scaled_linear", beta_start=1e-3)
    source = open_source(str(folder))
    assert same(predict(network_of(source)), predict(unet))
    assert same(predict(source.reference()), predict(unet))
    assert torch.equal(schedule_from(source.scheduler).betas.float(),
                       DDPMScheduler(100, 1e-3, beta_schedule="scaled_linear").betas)
    assert source.fields["timesteps"] == 100 and source.fields["resolution"] == 8
    assert source.fields["attention_resolutions"] == (8,)
    assert source.variance_type == "fixed_large"


def test_an_old_flat_pipeline_with_old_names_and_without_a_head_dim(tmp_path):
    """As google/ddpm-cifar10-32 was written: diffusers' default of 8 channels a head fits every
    tensor of it and computes something else."""
    folder, unet = save(tmp_path / "pipe")
    flatten(folder)
    old = {"to_q": "query", "to_k": "key", "to_v": "value"}
    weights = {}
    for name, value in load_file(folder / f"{WEIGHTS}.safetensors").items():
        for new, before in old.items():
            name = name.replace(f".{new}.", f".{before}.")
        weights[name.replace(".to_out.0.", ".proj_attn.")] = value
    save_file(weights, folder / f"{WEIGHTS}.safetensors")
    assert sum("query" in name for name in weights) == 8  # four blocks, weight and bias

    def age(values):
        del values["attention_head_dim"]
        values["_diffusers_version"] = "0.0.4"

    edit(folder / "config.json", age)
    source = open_source(str(folder))
    assert source.unet["attention_head_dim"] is None
    assert same(predict(network_of(source)), predict(unet))
    assert same(predict(source.reference()), predict(unet))
    by_default = UNet2DModel.from_pretrained(folder).eval()
    assert (predict(by_default) - predict(unet)).abs().max() > 0.01
    assert "1 attention head," in pretrained.describe(source, None)[1]

    edit(folder / "config.json", lambda values: values.update(_diffusers_version="0.9.0"))
    with pytest.raises(UsageError, match="give --num-heads"):
        open_source(str(folder))
    again = open_source(str(folder), num_heads=1)
    assert same(predict(network_of(again)), predict(unet))


def test_a_probe_notices_another_number_of_heads(tmp_path):
    folder, _ = save(tmp_path / "pipe")
    source = open_source(str(folder))
    other = make_unet(attention_head_dim=8)
    with pytest.raises(RunError, match="the network was not understood"):
        pretrained.probe(source, other, (1, 8, 8), 100)
    assert "largest difference" in pretrained.probe(source, network_of(source), (1, 8, 8), 100)


@pytest.mark.parametrize("changes", [
    {}, dict(resnet_time_scale_shift="scale_shift", attn_norm_num_groups=4, attention_head_dim=4),
    dict(downsample_type="resnet", upsample_type="resnet", downsample_padding=1),
    dict(mid_block_scale_factor=1.4, center_input_sample=True)])
def test_what_was_read_can_be_fused(tmp_path, changes):
    folder, unet = save(tmp_path / "pipe", make_unet(**changes))
    model = fuse(network_of(open_source(str(folder))))
    assert (predict(model) - predict(unet)).abs().max() < 1e-5


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.",
                                    "_orig_mod.module."])
def test_prefixes_of_wrappers_are_taken_off(tmp_path, prefix):
    folder, unet = save(tmp_path / "pipe")
    file = folder / "unet" / f"{WEIGHTS}.safetensors"
    save_file({prefix + name: value for name, value in load_file(file).items()}, file)
    assert same(predict(network_of(open_source(str(folder)))), predict(unet))


def test_a_bare_unet_of_diffusers_ema(tmp_path):
    """What its training script keeps in checkpoints: no scheduler, and the average's settings."""
    unet = make_unet()
    unet.save_pretrained(tmp_path / "unet_ema")
    edit(tmp_path / "unet_ema" / "config.json",
         lambda values: values.update(decay=0.99, inv_gamma=1.0, optimization_step=7))
    source = open_source(str(tmp_path / "unet_ema"))
    assert same(predict(network_of(source)), predict(unet))
    assert source.scheduler is None and "timesteps" not in source.fields
    config = settle(tiny(tmp_path, tmp_path / "unet_ema", schedule="cosine", timesteps=50))
    assert Trainer(config).schedule.name == "cosine(50)"


def sharded(tmp_path, safe=True):
    """A pipeline whose weights are in several files; returns (folder, index, network)."""
    folder, unet = save(tmp_path / "pipe")
    shutil.rmtree(folder / "unet")
    unet.save_pretrained(folder / "unet", max_shard_size="50KB", safe_serialization=safe)
    return folder, *(folder / "unet").glob("*.index.json"), unet


@pytest.mark.parametrize("safe", [True, False])
def test_weights_in_several_files(tmp_path, safe):
    folder, index, unet = sharded(tmp_path, safe)
    names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    assert len(names) > 2
    if not safe:
        with pytest.raises(UsageError, match="its weights are a pickle"):
            open_source(str(folder))
    source = open_source(str(folder), allow_pickle=not safe)
    assert same(predict(network_of(source)), predict(unet))
    assert same(predict(source.reference()), predict(unet))
    trainer = Trainer(tiny(tmp_path, folder, allow_pickle=not safe))
    assert source.sha256 in trainer.origin and "probe: largest" in trainer.origin
    if safe:  # a change in any of them is noticed
        weights = load_file(folder / "unet" / names[-1])
        weights[next(iter(weights))].add_(1)
        save_file(weights, folder / "unet" / names[-1])
        assert open_source(str(folder)).sha256 != source.sha256


def rename_first(index, name):
    edit(index, lambda v: v["weight_map"].update({next(iter(v["weight_map"])): name}))


@pytest.mark.parametrize("change, match", [
    (lambda d, _, first: first.unlink(), "00001-of-.* cannot be read: No such file"),
    (lambda d, index, first: shutil.copy(first, d / "unet" / "again.safetensors") and rename_first(
        index, "again.safetensors"), "two of its files hold "),
    (lambda d, index, _: rename_first(index, "../x.safetensors"), r"names '\.\./x.*', which is"),
    (lambda d, index, _: rename_first(index, "/x.safetensors"), "names '/x.*, which is no"),
    (lambda d, index, _: rename_first(index, "x.bin"), "names 'x.bin', which is no .safetens"),
    (lambda d, index, _: rename_first(index, 5), "names '5', which is no"),
    (lambda d, index, _: edit(index, lambda v: v.update(weight_map={})), "has no weight_map"),
    (lambda d, index, _: edit(index, lambda v: v.update(weight_map=["a"])), "has no weight_map"),
    (lambda d, index, _: index.write_text("{"), "index.json is no JSON object"),
    (lambda d, index, first: edit(index, lambda v: v.update(weight_map={
        k: f for k, f in v["weight_map"].items() if f != first.name})), "is missing, the network"),
])
def test_refusals_of_weights_in_several_files(tmp_path, change, match):
    folder, index, _ = sharded(tmp_path)
    change(folder, index, min((folder / "unet").glob("*.safetensors")))
    with pytest.raises(UsageError, match="^init_from is '.*pipe': .*" + match) as error:
        open_source(str(folder))
    assert "\n" not in str(error.value)


def test_half_precision_becomes_single(tmp_path):
    folder, unet = save(tmp_path / "pipe", make_unet().half())
    source = open_source(str(folder))
    assert {value.dtype for value in source.weights.values()} == {torch.float32}
    assert same(predict(network_of(source)), predict(unet.float()))


# Pickles.


class Evil:
    """Unpickled, it would leave a file behind."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def make_pickle(folder):
    file = folder / "unet" / f"{WEIGHTS}.safetensors"
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    return file.with_suffix(".bin")


@pytest.mark.parametrize("weights, match", [
    (lambda w: {k: torch.zeros(1).expand(1 << 34) for k in w}, "its tensors are larger than"),
    (lambda w: w | {next(iter(w)): torch.zeros(3, 3).to_sparse()}, "else than finite numbers"),
    (lambda w: w | {next(iter(w)): torch.full((2,), float("nan"))}, "else than finite numbers"),
])
def test_pickles_that_take_memory_or_hold_no_numbers(tmp_path, weights, match):
    folder, unet = save(tmp_path / "pipe")
    make_pickle(folder)
    torch.save(weights(unet.state_dict()), next((folder / "unet").glob("*.bin")))
    with pytest.raises(UsageError, match=match):
        open_source(str(folder), allow_pickle=True)


def test_a_pickle_is_read_only_when_allowed(tmp_path):
    folder, unet = save(tmp_path / "pipe")
    make_pickle(folder)
    with pytest.raises(UsageError, match="a pickle, .*bin: add --allow-pickle"):
        open_source(str(folder))
    source = open_source(str(folder), allow_pickle=True)
    assert same(predict(network_of(source)), predict(unet))


@pytest.mark.parametrize("write", [
    lambda value, path: path.write_bytes(pickle.dumps(value)),
    lambda value, path: torch.save(value, path)])
def test_a_hostile_pickle_runs_nothing(tmp_path, write):
    folder, _ = save(tmp_path / "pipe")
    file, trap = make_pickle(folder), tmp_path / "trap"
    write({"conv_in.weight": Evil(trap)}, file)
    for path in (folder, shutil.copy(file, tmp_path / "model.pt")):
        for allowed in (False, True):
            with pytest.raises(UsageError, match="nothing of it was run" if allowed else "pickle"):
                open_source(str(path), allow_pickle=allowed)
    assert not trap.exists()


def test_a_pickle_of_a_whole_program_is_refused(tmp_path):
    (tmp_path / "edm.pkl").write_bytes(pickle.dumps({"ema": Evil(tmp_path / "trap")}))
    with pytest.raises(UsageError, match="program code"):
        open_source(str(tmp_path / "edm.pkl"), allow_pickle=True)
    torch.save({"model": {"a": torch.zeros(1)}, "step": 3}, tmp_path / "all.pt")
    with pytest.raises(UsageError, match=r"holds \['model', 'step'\]: give a state dict alone"):
        open_source(str(tmp_path / "all.pt"), allow_pickle=True)
    assert not (tmp_path / "trap").exists()


# Refusals.


def change_weights(folder, change):
    file = folder / "unet" / f"{WEIGHTS}.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file)


def config_of(folder):
    return folder / "unet" / "config.json"


REFUSED = {
    "unknown key": (lambda d: edit(config_of(d), lambda v: v.update(norm_epps=1.0)),
                    "unknown key 'norm_epps': did you mean 'norm_eps'"),
    "text": (lambda d: edit(d / "model_index.json", lambda v: v.update(
        _class_name="StableDiffusionPipeline", text_encoder=["transformers", "CLIPTextModel"])),
        "StableDiffusionPipeline is a text-to-image model: its loss needs captions"),
    "latents": (lambda d: edit(d / "model_index.json", lambda v: v.update(
        _class_name="LDMPipeline", vqvae=["diffusers", "VQModel"])),
        "LDMPipeline is a model of latents"),
    "conditional": (lambda d: edit(config_of(d), lambda v: v.update(
        _class_name="UNet2DConditionModel")), "is a UNet2DConditionModel"),
    "classes": (lambda d: edit(config_of(d), lambda v: v.update(num_class_embeds=10)),
                "class-conditional: that needs labels"),
    "fourier": (lambda d: edit(config_of(d), lambda v: v.update(time_embedding_type="fourier")),
                "noise scales"),
    "nonsense": (lambda d: edit(config_of(d), lambda v: v.update(down_block_types=["No", "Yes"])),
                 "no network can be built"),
    "v": (lambda d: edit(d / "scheduler" / "scheduler_config.json", lambda v: v.update(
        prediction_type="v_prediction")), "predicts 'v_prediction'"),
    "old name of x0": (lambda d: edit(d / "scheduler" / "scheduler_config.json", lambda v: v.update(
        predict_epsilon=False) or v.pop("prediction_type")), "predicts 'sample'"),
    "zero snr": (lambda d: edit(d / "scheduler" / "scheduler_config.json", lambda v: v.update(
        rescale_betas_zero_snr=True)), "rescale_betas_zero_snr"),
    "flow": (lambda d: edit(d / "scheduler" / "scheduler_config.json", lambda v: v.update(
        _class_name="FlowMatchEulerDiscreteScheduler")), "FlowMatchEulerDiscreteScheduler: only"),
    "betas": (lambda d: edit(d / "scheduler" / "scheduler_config.json", lambda v: v.update(
        beta_schedule="moon")), "its scheduler cannot be built"),
    "one beta": (lambda d: edit(d / "scheduler" / "scheduler_config.json", lambda v: v.update(
        trained_betas=0.01)), "trained_betas is no list of numbers"),
    "variance": (lambda d: edit(d / "scheduler" / "scheduler_config.json", lambda v: v.update(
        variance_type="learned_range")), "only 1 output channels: 2 would be needed"),
    "missing": (lambda d: change_weights(d, lambda w: w.pop("conv_in.bias")),
                r"parameter conv_in.bias is missing, the network needs \(8,\)"),
    "extra": (lambda d: change_weights(d, lambda w: w.update(more=torch.zeros(2, 3))),
              r"parameter more of shape \(2, 3\) is unknown"),
    "shape": (lambda d: change_weights(d, lambda w: w.update(
        {"conv_in.bias": torch.zeros(9)})),
        r"parameter conv_in.bias has shape \(9,\), the network needs \(8,\)"),
    "nan": (lambda d: change_weights(d, lambda w: w["conv_in.bias"].fill_(torch.inf)),
            "conv_in.bias holds something else than finite numbers"),
    "no weights": (lambda d: (d / "unet" / f"{WEIGHTS}.safetensors").unlink(), "has no weights"),
    "torn": (lambda d: os.truncate(d / "unet" / f"{WEIGHTS}.safetensors", 1000),
             "holds no plain tensors"),
    "not json": (lambda d: config_of(d).write_text("{"), "config.json is no JSON object"),
    "wrong type": (lambda d: edit(config_of(d), lambda v: v.update(block_out_channels=5) or v.pop(
        "attention_head_dim")), "no network can be built"),
    "variance unknown": (lambda d: edit(d / "scheduler" / "scheduler_config.json", lambda v: (
        v.update(variance_type="huge"))), "variance_type 'huge'"),
    "empty": (lambda d: shutil.rmtree(d / "unet"), "it holds no model: neither config.yaml"),
}


@pytest.mark.parametrize("change,match", REFUSED.values(), ids=REFUSED)
def test_refusals(tmp_path, change, match):
    folder, _ = save(tmp_path / "pipe")
    change(folder)
    with pytest.raises(UsageError, match="^init_from is '.*pipe': .*" + match):
        open_source(str(folder))


def test_a_name_without_a_network(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match="had from the Hub .*`hf download no-such/model "
                                         "--local-dir DIR`"):
        open_source("no-such/model")
    (tmp_path / "runs").mkdir()
    for name in ("runs/slip", "/no/such", "no such/model"):
        with pytest.raises(UsageError, match="there is no such file or directory"):
            open_source(name)
    with pytest.raises(UsageError, match="cannot be read .File name too long"):
        open_source("x" * 5000)


def test_a_name_on_the_hub(monkeypatch, tmp_path):
    """JSON first, so that a model that cannot be treated is not downloaded."""
    folder, unet = save(tmp_path / "pipe")
    asked = []

    def snapshot(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    source = open_source("google/ddpm-cifar10-32")
    assert same(predict(network_of(source)), predict(unet))
    assert asked == [("google/ddpm-cifar10-32", ["*.json"]),
                     ("google/ddpm-cifar10-32", [f"unet/{WEIGHTS}.safetensors"])]
    edit(folder / "model_index.json", lambda v: v.update(_class_name="KarrasVePipeline"))
    with pytest.raises(UsageError, match="KarrasVePipeline"):
        open_source("google/ddpm-cifar10-32")
    assert len(asked) == 3


def test_a_name_on_the_hub_with_weights_in_several_files(monkeypatch, tmp_path):
    folder, index, unet = sharded(tmp_path)
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download",
                        lambda name, allow_patterns: asked.append(allow_patterns) or str(folder))
    assert same(predict(network_of(open_source("somebody/something"))), predict(unet))
    assert asked[1] == [f"unet/{path.name}" for path in sorted(
        (folder / "unet").glob("*.safetensors"))]


# Training.


def test_a_run_from_a_pipeline_is_a_run_like_any_other(tmp_path, capsys):
    folder, unet = save(tmp_path / "pipe", beta_end=0.03, clip_sample=False)
    config = tiny(tmp_path, folder, ema_rates=(0.5,))
    quiet(config)
    whole = load_run(config.out)
    moved = predict(whole.model) - predict(unet)
    assert 1e-6 < moved.abs().max() < 0.5  # trained, and not from somewhere else
    saved = yaml.safe_load((config.out / "config.yaml").read_text())
    assert saved["block_channels"] == [8, 16] and saved["timesteps"] == 100
    digest = pretrained._sha256((folder / "unet" / f"{WEIGHTS}.safetensors").read_bytes())
    assert saved["pretrained"]["sha256"] == digest
    assert whole.schedule.betas[-1] == 0.03
    assert (config.out / "report.html").exists()
    pipeline = DDPMPipeline.from_pretrained(config.out / "pipeline", use_safetensors=True)
    assert (predict(pipeline.unet) - predict(whole.model)).abs().max() < 1e-5
    assert pipeline.unet.config.downsample_padding == 0
    assert pipeline.scheduler.config.beta_end == 0.03

    # Stopped, and continued where the source is gone.
    part = tiny(tmp_path, folder, out=tmp_path / "part", ema_rates=(0.5,))
    quiet(TrainConfig(**{**part.to_dict(), "stop_after": 2}))
    shutil.rmtree(folder)
    assert main(["--resume", "--out", str(part.out)]) == 0
    ours, theirs = load_run(part.out), whole
    for name, value in ours.model.state_dict().items():
        assert torch.equal(value, theirs.model.state_dict()[name]), name
    again = Trainer(TrainConfig(**{**part.to_dict(), "resume": True}))
    assert again.origin == "" and again.model.config.downsample_padding == 0

    # A run is something to start from too, in its own schedule.
    source = open_source(str(part.out))
    assert same(predict(network_of(source)), predict(whole.model))
    assert source.scheduler["beta_end"] == 0.03 and source.fields["timesteps"] == 100

    sample.main(["--run", str(part.out), "--num", "2", "--steps", "2"])
    assert (part.out / "generated" / "grid.png").exists()


def test_the_plan_says_what_it_starts_from(tmp_path, capsys):
    folder, _ = save(tmp_path / "pipe")
    assert main(["--init-from", str(folder), "--out", str(tmp_path / "run"), "--dry-run"]) == 0
    out = capsys.readouterr().out
    digest = pretrained._sha256((folder / "unet" / f"{WEIGHTS}.safetensors").read_bytes())
    for text in (f"init from  {folder} (diffusers), sha256 {digest}", "1 attention head, 1 channel",
                 "noise schedule linear(100), predicts epsilon, variance fixed_large",
                 "probe: largest difference from the network of diffusers"):
        assert text in out
    assert not (tmp_path / "run").exists()


def test_a_learned_variance_is_kept_and_not_trained(tmp_path):
    folder, unet = save(tmp_path / "pipe", make_unet(out_channels=2),
                        variance_type="learned_range")
    config = tiny(tmp_path, folder)
    quiet(config)
    run = load_run(config.out)
    now, before = run.model.state_dict(), unet.state_dict()
    assert not torch.equal(now["conv_out.weight"][:1], before["conv_out.weight"][:1])
    assert torch.equal(now["conv_out.weight"][1:], before["conv_out.weight"][1:])
    pipeline = DDPMPipeline.from_pretrained(config.out / "pipeline", use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.scheduler.config.variance_type == "learned_range"
    assert predict(pipeline.unet).shape == (2, 2, 8, 8)
    assert len(pipeline(batch_size=1, num_inference_steps=2).images) == 1


def test_from_a_run_on_points(tmp_path):
    from robustdm.runs.presets import preset_values

    first = TrainConfig(**(preset_values("plane") | TINY | dict(
        num_points=200, steps=1, mlp_width=24, timesteps=60, out=tmp_path / "first")))
    quiet(first)
    second = Trainer(TrainConfig(**(preset_values("plane") | TINY | dict(
        num_points=200, init_from=str(first.out), out=tmp_path / "second"))))
    assert second.config.mlp_width == 24 and len(second.schedule) == 60
    weights = load_run(first.out).model.state_dict()
    assert all(torch.equal(value, weights[name])
               for name, value in second.model.state_dict().items())
    with pytest.raises(UsageError, match="ema is 0.5: it has averages of"):
        open_source(str(first.out), ema=0.5)
    with pytest.raises(UsageError, match="a network for points has no counterpart"):
        convert(ConvertConfig(str(first.out), tmp_path / "pipe"))


def test_from_improved_diffusion(tmp_path, capsys):
    model = make("learned sigma")
    torch.save(model.state_dict(), tmp_path / "ema_0.9999_000100.pt")
    out = tmp_path / "run"
    argv = ["--init-from", str(tmp_path / "ema_0.9999_000100.pt"), "--data", "images",
            "--data-dir", str(images(tmp_path, 16)), "--resolution", "16",
            "--schedule", "cosine", "--timesteps", "50", "--out", str(out),
            "--steps", "1", "--batch-size", "4", "--num-samples", "1",
            "--final-steps", "2", "--lr", "1e-9", "--objective", "ddpm",
            "--precision", "bf16", "--checkpoint-every", "1"]
    with pytest.raises(UsageError, match="add --allow-pickle"):
        main(argv)
    with pytest.raises(UsageError, match="give --num-heads"):
        main([*argv, "--allow-pickle"])
    assert main([*argv, "--allow-pickle", "--num-heads", "2"]) == 0
    run = load_run(out)
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([0, 49])
    assert (predict(run.model, x, t) - model(x, t * 20)).abs().max() < 1e-5
    assert "told the timestep as t * 1000 / T" in capsys.readouterr().out
    assert run.schedule.name == "cosine(50)" and run.config.pretrained["unet"]["sample_size"] == 16
    assert DDPMScheduler.from_pretrained(out / "pipeline" / "scheduler").config.variance_type == (
        "learned_range")
    table = run.model.state_dict()["time_proj.weight"]
    assert main(["--resume", "--out", str(out), "--steps", "3", "--lr", "0.01"]) == 0
    after = load_run(out).model.state_dict()
    assert torch.equal(after["time_proj.weight"], table)  # no weight of that network
    assert not torch.equal(after["conv_in.weight"], run.model.state_dict()["conv_in.weight"])


def test_another_network_or_schedule_cannot_be_asked_for(tmp_path, capsys):
    folder, _ = save(tmp_path / "pipe")
    for flags, match in [(["--layers-per-block", "3"], "layers_per_block is 3, but 1 in the model"),
                         (["--schedule", "cosine"], "schedule is 'cosine', but 'linear'"),
                         (["--num-heads", "2"], "num_heads is 2, but its config.json has")]:
        with pytest.raises(UsageError, match=match):
            parse_train(["--init-from", str(folder), *flags])
    file = tmp_path / "config.yaml"
    file.write_text(f"init_from: {folder}\nresolution: 16\nlayers_per_block: 2\n")
    with pytest.raises(UsageError, match="layers_per_block is 2"):
        parse_train(["--config", str(file)])
    # What is no part of the network stays the user's.
    config = parse_train(["--init-from", str(folder), "--resolution", "16", "--dropout", "0.2"])
    assert (config.resolution, config.dropout, config.timesteps) == (16, 0.2, 100)
    assert parse_train(["--init-from", str(folder)]).resolution == 8
    with pytest.raises(SystemExit) as stop:
        guard(lambda: main(["--init-from", str(tmp_path / "nothing")]))
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: init_from is ")


def test_what_a_model_does_not_tell_is_asked_for(tmp_path):
    """No preset's size or schedule in its place, but where that was named for it."""
    torch.save(make("learned sigma").state_dict(), tmp_path / "model.pt")
    argv = ["--init-from", str(tmp_path / "model.pt"), "--allow-pickle", "--num-heads", "2",
            "--data", "images", "--data-dir", str(tmp_path)]
    with pytest.raises(UsageError, match="resolution is not given: init_from is .*model.pt"):
        parse_train(argv)
    with pytest.raises(UsageError, match="schedule is not given: .* its noise schedule; give"):
        parse_train([*argv, "--resolution", "16"])
    config = parse_train([*argv, "--resolution=16", "--schedule", "linear"])
    assert (config.resolution, config.schedule) == (16, "linear")
    file = tmp_path / "config.yaml"
    file.write_text("resolution: 16\nschedule: cosine\n")
    assert parse_train([*argv, "--config", str(file)]).schedule == "cosine"
    config = parse_train([*argv, "--preset", "folder", "--schedule", "cosine"])
    assert config.resolution == 32, "the preset's own"
    with pytest.raises(UsageError, match="ema is 0.5, but only a run"):
        open_source(str(tmp_path / "model.pt"), ema=0.5)


@pytest.mark.parametrize("side,told", [
    (None, None), ([8, 8], 8), ("abc", "'abc'"), (16.5, "16.5"), ([16, 8], "[16, 8]"), (9, "9"),
    (-8, "-8"), (True, "True")])
def test_sizes_of_images(tmp_path, side, told):
    folder, _ = save(tmp_path / "pipe")
    file = folder / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"sample_size": side}))
    argv = ["--init-from", str(folder), "--data", "images", "--data-dir", str(tmp_path)]
    if side is None:
        with pytest.raises(UsageError, match="resolution is not given"):
            parse_train(argv)
        assert parse_train([*argv, "--resolution", "16"]).resolution == 16
    elif isinstance(told, int):
        assert parse_train(argv).resolution == told
    else:
        with pytest.raises(UsageError, match=f"sample_size is {re.escape(told)}: it must be"):
            parse_train(argv)


def test_grey_data_for_a_colour_model_and_the_reverse(tmp_path):
    colour, _ = save(tmp_path / "colour", make_unet(in_channels=3, out_channels=3))
    grey, _ = save(tmp_path / "grey")
    rng = np.random.default_rng(0)
    np.save(tmp_path / "grey.npy", rng.integers(0, 255, (24, 8, 8), dtype=np.uint8))
    pairs = (colour, tmp_path / "grey.npy", 3, "1 channel "), (grey, images(tmp_path, 8), 1, "3 c")
    for model, data, channels, held in pairs:
        config = tiny(tmp_path, model, data="images", data_dir=data)
        match = (f"init_from is '{model}': its network takes {channels} channel.*the data, {data}, "
                 rf"have {held}.*; --channels {channels} converts them, or choose another model")
        with pytest.raises(UsageError, match=match):
            Trainer(config)
        trainer = Trainer(replace(config, channels=channels))  # as it was told
        assert trainer.data.shape == (channels, 8, 8)
    with pytest.raises(UsageError, match="3 channels .*digits, have 1 .*--data images --data-dir"):
        Trainer(tiny(tmp_path, colour))
    six, _ = save(tmp_path / "six", make_unet(in_channels=6, out_channels=6))
    with pytest.raises(UsageError, match="6 channels, .*; no images have so many"):
        Trainer(tiny(tmp_path, six, data="images", data_dir=tmp_path / "grey.npy"))


def test_weights_that_are_given_win_over_the_configuration_s(tmp_path):
    folder, unet = save(tmp_path / "pipe")
    other = make_unet(0.3)
    data = Trainer(tiny(tmp_path, folder)).data
    trainer = Trainer(tiny(tmp_path, folder), data, other.state_dict())
    assert same(predict(trainer.model), predict(other))
    assert not same(predict(trainer.model), predict(unet))
    assert same(predict(trainer.emas[0].model), predict(other)) and trainer.origin == ""


def test_a_source_that_changed_is_noticed(tmp_path):
    folder, _ = save(tmp_path / "pipe")
    config = settle(tiny(tmp_path, folder))
    change_weights(folder, lambda w: w["conv_in.bias"].add_(1))
    with pytest.raises(UsageError, match="its sha256 is .*, but the run was set up with"):
        Trainer(config)


def test_a_network_of_cifar10_s_size_to_1e_5(tmp_path):
    """35,746,307 parameters: read, trained for one step, saved, and read again by diffusers.

    The images are of 8 pixels, to be fast: they do not change the network."""
    levels = ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D")
    unet = make_unet(
        spread=0.02, in_channels=3, out_channels=3, block_out_channels=(128, 256, 256, 256),
        layers_per_block=2, norm_num_groups=32, down_block_types=levels,
        up_block_types=tuple(kind.replace("Down", "Up") for kind in levels[::-1]))
    assert sum(p.numel() for p in unet.parameters()) == 35_746_307
    folder, _ = save(tmp_path / "pipe", unet)
    config = tiny(tmp_path, folder, data="images", data_dir=images(tmp_path, 8), batch_size=2,
                  objective="ddpm", ema_rates=(0.0,))
    trainer = Trainer(config)
    trainer.train_step(trainer.data.batch(torch.arange(2)))
    ours = trainer.emas[0].model.eval()
    save_pipeline(ours, trainer.schedule, tmp_path / "again", clip_sample=True)
    theirs = DDPMPipeline.from_pretrained(tmp_path / "again", use_safetensors=True).unet
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 90])
    assert (predict(theirs, x, t) - predict(ours, x, t)).abs().max() < 1e-5
    assert (predict(ours, x, t) - predict(unet, x, t)).abs().max() > 1e-4
