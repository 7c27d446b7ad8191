"""Adapters: what is trained, kept and published; and that only training them needs peft."""

import shutil
from dataclasses import replace

import pytest
import torch
import yaml
from diffusers import DDPMPipeline
from safetensors.torch import load_file
from torch._dynamo.backends.common import aot_autograd

from robustdm import sample
from robustdm.convert import ConvertConfig, convert
from robustdm.errors import RunError, UsageError
from robustdm.models import lora
from robustdm.models.load_run import load_run
from robustdm.models.pretrained import open_source, settle
from robustdm.runs.checkpoint import load_newest, save_checkpoint, save_origin
from robustdm.runs.config import TrainConfig
from robustdm.runs.rundir import write_text
from robustdm.train import main
from robustdm.training.loop import describe
from robustdm.training.memory import estimate_bytes
from robustdm.training.trainer import Trainer
from tests.test_finetune import CPP, assert_equal, fails
from tests.test_pretrained import make_unet, predict, quiet, same, save, tiny

LAYERS = {"mid_block.attentions.0.to_q": (16, 16), "down_blocks.1.resnets.0.conv1": (16, 8, 3, 3)}


@pytest.fixture
def peft():
    return pytest.importorskip("peft")


@pytest.fixture
def folder(tmp_path):
    return save(tmp_path / "pipe")[0]


def factors(seed=0, rank=2):
    """Adapters of `LAYERS`, in the shapes that the paper and peft give them."""
    generator, found = torch.Generator().manual_seed(seed), {}
    for name, (out, *rest) in LAYERS.items():
        ones = [1] * (len(rest) - 1)
        found[f"{name}.lora_A.weight"] = torch.randn(rank, *rest, generator=generator)
        found[f"{name}.lora_B.weight"] = torch.randn(out, rank, *ones, generator=generator)
    return found


def kept_run(tmp_path, folder, alpha=1.0):
    """A run directory with adapters, made without peft; returns (it, its adapters)."""
    config = settle(tiny(tmp_path, folder, lora=2, lora_alpha=alpha))
    out, adapters = config.out, factors()
    out.mkdir()
    write_text(out / "config.yaml", yaml.safe_dump(config.to_dict()))
    entry = save_origin(out / "checkpoints", make_unet().state_dict())
    state = {"shape": [1, 8, 8], "is_image": True, "origin": entry}
    save_checkpoint(out / "checkpoints", 4, {"ema_0.995": adapters}, state)
    return out, adapters


# Without peft.


def test_merged_is_what_adapters_compute():
    unet, adapters = make_unet(), factors()

    def beside(name):
        a, b = (adapters[f"{name}.lora_{k}.weight"] for k in "AB")
        if a.ndim == 2:
            return lambda module, args, out: out + 0.5 * args[0] @ a.T @ b.T
        conv = torch.nn.functional.conv2d
        return lambda module, args, out: out + 0.5 * conv(conv(args[0], a, padding=1), b)

    own = unet.state_dict()
    before = {name: value.clone() for name, value in own.items()}
    weights = lora.merged(own, adapters, 0.5)
    assert_equal(own, before)
    changed = {name for name, value in weights.items() if not torch.equal(value, before[name])}
    assert changed == {f"{name}.weight" for name in LAYERS}
    other = make_unet()
    other.load_state_dict(weights)
    hooks = [unet.get_submodule(name).register_forward_hook(beside(name)) for name in LAYERS]
    assert len(hooks) == 2 and same(predict(other), predict(unet))
    assert not same(predict(other), predict(make_unet()))


def test_a_run_is_used_without_peft(tmp_path, folder, monkeypatch):
    out, adapters = kept_run(tmp_path, folder)
    shutil.rmtree(folder)  # the model that it started from
    monkeypatch.delattr(lora, "add")
    wanted = make_unet()
    wanted.load_state_dict(lora.merged(wanted.state_dict(), adapters, 0.5))
    assert same(predict(load_run(out).model), predict(wanted))
    assert sample.main(["--run", str(out), "--num", "2", "--steps", "2"]) in (0, None)
    assert convert(ConvertConfig(str(out), tmp_path / "converted", verify=True)) < 1e-5
    pipeline = DDPMPipeline.from_pretrained(tmp_path / "converted")
    assert same(predict(pipeline.unet), predict(wanted))


def test_the_hash_of_a_run_is_of_both_files(tmp_path, folder):
    out, _ = kept_run(tmp_path, folder)
    before = open_source(str(out)).sha256
    checkpoint = load_newest(out / "checkpoints")
    entry = save_origin(out / "checkpoints", make_unet(0.2).state_dict())
    save_checkpoint(out / "checkpoints", 4, checkpoint.tensors,
                    {**checkpoint.state, "origin": entry})
    assert open_source(str(out)).sha256 != before


@pytest.mark.parametrize("damage, match", [
    (lambda file: file.unlink(), "origin.safetensors: missing"),
    (lambda file: file.write_bytes(file.read_bytes()[:-1] + b"x"), "its sha256 is not"),
])
def test_a_missing_or_damaged_origin(tmp_path, folder, damage, match):
    out, _ = kept_run(tmp_path, folder)
    damage(out / "checkpoints" / "origin.safetensors")
    with pytest.raises(RunError, match=f"{match}.*put back a copy"):
        load_run(out)


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))
    with pytest.raises(RunError, match="origin.safetensors was not written: .*make room"):
        save_origin(tmp_path / "checkpoints", make_unet().state_dict())
    assert list((tmp_path / "checkpoints").iterdir()) == []


@pytest.mark.parametrize("fields, match", [
    (dict(lora=-1), "lora is -1: it must not be negative"),
    (dict(lora=2, freeze=("conv_in.*",)), "freeze is .*with --lora all of the network's own"),
    (dict(lora=2, lora_alpha=0.0), "lora_alpha is 0.0: it must be positive"),
    (dict(lora=2, lora_targets=()), "lora_targets is .*name at least one layer"),
    (dict(lora_alpha=4.0), "lora_alpha is 4.0: it does nothing without --lora RANK"),
    (dict(lora_targets=("conv1",)), "lora_targets is .*nothing without --lora RANK"),
    (dict(lora=2, network="mlp"), "lora is 2: only networks for images"),
])
def test_settings_that_do_not_fit(fields, match):
    with pytest.raises(UsageError, match=match):
        TrainConfig(**fields)


def test_adapters_need_a_model_and_peft(tmp_path, folder, monkeypatch, capsys):
    out = ["--out", str(tmp_path / "run")]
    assert "lora is 4: adapters are added to a model that exists, name it with --init-from" in (
        fails(["--lora", "4", *out], capsys))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    argv = ["--init-from", str(folder), "--lora", "4", *out]
    assert 'pip install "robustdm[lora]"' in fails(argv, capsys)


def test_which_layers_get_adapters():
    unet = make_unet()

    def found(*patterns):
        return list(lora.targets(unet, patterns))

    attention, resnet = "mid_block.attentions.0", "down_blocks.0.resnets.0"
    default = found(*TrainConfig.lora_targets)
    assert {f"{attention}.to_q", f"{attention}.to_out.0", f"{resnet}.conv1"} <= set(default)
    assert f"{resnet}.conv_shortcut" not in default and "conv_in" not in default
    assert found("conv_in") == ["conv_in"]
    assert found("mid_block.*.to_?") == [f"{attention}.to_{k}" for k in "qkv"]
    assert len(found("*")) == sum(isinstance(m, torch.nn.Linear | torch.nn.Conv2d)
                                  for m in unet.modules())
    # Names of whole parts: neither half a part nor a parameter is one.
    for pattern in ("o_q", "to_q.weight", "norm1"):
        with pytest.raises(UsageError, match=f"lora_targets has '{pattern}': no linear .*"
                                             "with conv_in, .*to_q, to_k, to_v, to_out.0, "):
            found("to_q", pattern)


# Training.


@pytest.mark.parametrize("backend", [
    "torch", pytest.param("auto", marks=pytest.mark.skipif(CPP is not None, reason=str(CPP)))])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_only_adapters_are_trained(peft, tmp_path, folder, precision, backend):
    config = tiny(tmp_path, folder, lora=2, lora_alpha=6.0, precision=precision, backend=backend,
                  weight_decay=0.1, ema_rates=(0.0, 0.9), lr=1e-2)
    trainer, before = Trainer(config), make_unet().state_dict()
    assert same(predict(trainer.model), predict(make_unet()))  # they change nothing yet
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    assert trained == trainer.trained == lora.count(make_unet(), config)
    x0 = trainer.data.batch(torch.arange(8))
    for _ in range(3):
        trainer.train_step(x0)
    tensors, _ = trainer.state()
    assert len(tensors["optimizer"]) == 3 * len(tensors["model"])
    for name in ("model", "ema_0.0", "ema_0.9"):
        assert all(".lora_" in key and value.any() for key, value in tensors[name].items())
    assert sum(value.numel() for value in tensors["model"].values()) == trained
    for network in (trainer.model, *(ema.model for ema in trainer.emas)):
        assert_equal({k: v.contiguous() for k, v in lora.split(network)[0].items()}, before)
    assert not torch.equal(*(next(iter(tensors[f"ema_{r}"].values())) for r in (0.0, 0.9)))
    # Averages share what is not trained.
    first, second = (ema.model.conv_in.weight.data_ptr() for ema in trainer.emas)
    assert first == second == trainer.model.conv_in.weight.data_ptr()
    averaged = trainer.averaged()
    assert same(predict(averaged), predict(trainer.emas[0].model))
    assert not same(predict(averaged), predict(make_unet()))
    assert averaged.state_dict().keys() == before.keys()


@pytest.mark.slow
def test_a_compiled_step(peft, tmp_path):
    small = make_unet(block_out_channels=(8,), down_block_types=("DownBlock2D",),
                      up_block_types=("UpBlock2D",))
    folder, _ = save(tmp_path / "small", small)
    config = tiny(tmp_path, folder, lora=2, precision="bf16", lora_targets=("to_q", "conv1"))
    eager, traced = Trainer(config), Trainer(config)
    traced.gradient_step.compile(aot_autograd(fw_compiler=lambda g, _: g))
    for trainer in (eager, traced):
        trainer.train_step(trainer.data.batch(torch.arange(8)))
    assert traced.gradient_step.compiled
    moved = 0
    for (name, p), q in zip(eager.model.named_parameters(), traced.model.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-5), name
        moved += "lora_B" in name and bool(p.any())
    assert moved == sum(name.endswith(("to_q", "conv1")) for name, _ in small.named_modules())


def test_stopped_and_continued_without_the_model(peft, tmp_path, folder, capsys):
    whole, part = (tiny(tmp_path, folder, out=tmp_path / name, lora=2, ema_rates=(0.5, 0.9))
                   for name in ("whole", "part"))
    quiet(whole)
    quiet(replace(part, stop_after=2))
    error = fails(["--resume", "--out", str(part.out), "--lora", "3"], capsys)
    assert "lora is 2 there, 3 was asked for" in error
    origin = part.out / "checkpoints" / "origin.safetensors"
    written = origin.stat().st_mtime_ns
    shutil.rmtree(folder)
    assert main(["--resume", "--out", str(part.out)]) == 0
    assert origin.stat().st_mtime_ns == written
    ends = [load_newest(config.out / "checkpoints") for config in (whole, part)]
    for name in ("model", "ema_0.5", "ema_0.9", "optimizer"):
        assert_equal(*(end.tensors[name] for end in ends))
    assert ends[0].state["origin"] == ends[1].state["origin"]
    assert_equal(load_file(origin), make_unet().state_dict())
    # What is published: the pipeline, the loader, and the adapters as peft reads them.
    published = DDPMPipeline.from_pretrained(part.out / "pipeline").unet
    assert same(predict(load_run(part.out).model), predict(published))
    assert not same(predict(published), predict(make_unet()))
    adapted = peft.PeftModel.from_pretrained(make_unet(), part.out / "adapter").eval()
    assert same(predict(adapted), predict(published))
    assert (part.out / "adapter/adapter_model.safetensors").stat().st_mode & 0o777 == 0o644
    # And the start of another run.
    again = Trainer(tiny(tmp_path, part.out, out=tmp_path / "again", lora=1))
    assert same(predict(again.model), predict(published))


def test_the_seed_decides_how_adapters_begin(peft, tmp_path, folder):
    def begin(seed, rng):
        unet = make_unet()
        torch.manual_seed(rng)
        state = torch.get_rng_state()
        lora.add(unet, tiny(tmp_path, folder, lora=2, seed=seed))
        assert torch.equal(torch.get_rng_state(), state)
        return lora.split(unet)[1]["mid_block.attentions.0.to_q.lora_A.weight"]

    assert torch.equal(begin(1, 5), begin(1, 6)) and not torch.equal(begin(1, 5), begin(2, 5))


def test_the_plan_tells_what_is_trained_and_kept(peft, tmp_path, folder):
    config = tiny(tmp_path, folder, lora=2, ema_rates=(0.5, 0.9))
    trainer = Trainer(config)
    estimate = estimate_bytes(trainer.config, (1, 8, 8))
    added, own = 4 * trainer.trained, sum(4 * p.numel() for p in make_unet().parameters())
    assert estimate["weights"] == own + 6 * added  # gradients, moments and two averages
    plan = describe(trainer, estimate)
    assert f"{trainer.trained:,} of them trained (adapters of rank 2; " in plan
    trainer.train_step(trainer.data.batch(torch.arange(8)))
    checkpoint = save_checkpoint(tmp_path / "checkpoints", 1, *trainer.state())
    kept = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors")) / 2**20
    stated = float(plan.partition("rank 2; ")[2].partition(" MiB")[0])
    assert stated == pytest.approx(kept, abs=0.03)  # names are not counted
