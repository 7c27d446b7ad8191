"""Fine-tuning: the preset, and parameters that are left out of training."""

import json

import pytest
import torch
import yaml
from torch import nn
from torch._dynamo.backends.common import aot_autograd

from robustdm import ops
from robustdm.cli import guard, parse_train
from robustdm.errors import UsageError
from robustdm.models.build import freeze
from robustdm.models.fuse import FusedResnetBlock2D
from robustdm.models.load_run import load_run
from robustdm.models.mlp import PointMLP
from robustdm.runs.checkpoint import load_newest
from robustdm.runs.config import TrainConfig
from robustdm.runs.presets import preset_values
from robustdm.train import main
from robustdm.training.memory import estimate_bytes
from robustdm.training.optimizer import EMA
from robustdm.training.trainer import Trainer
from tests.conftest import gradients_of, relative_error
from tests.test_pretrained import TINY, predict, quiet, save, tiny

CPP = ops.why_off("cpp", "adamw_ema", torch.device("cpu"))
FROZEN = ("down_blocks.*", "time_embedding.*", "conv_in.*")


def is_frozen(name):
    return name.startswith(("down_blocks.", "time_embedding.", "conv_in."))


def fails(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        guard(lambda: main(argv))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1, error
    return error


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


# The preset.


def test_the_preset_as_a_user_types_it(tmp_path, capsys):
    folder, _ = save(tmp_path / "pipe")
    argv = ["--preset", "finetune", "--init-from", str(folder), "--data", "digits"]
    config = parse_train([*argv, "--steps", "40"])
    assert (config.objective, config.precision, config.data) == ("robust_adv", "fp32", "digits")
    assert (config.block_channels, config.timesteps, config.resolution) == ((8, 16), 100, 8)
    assert config.steps == 40 and config.lr == preset_values("finetune")["lr"]
    assert config.corrupt_fraction == 0.0  # the pictures are noisy already
    assert parse_train([*argv, "--lr", "1e-4"]).lr == 1e-4
    assert main([*argv, "--out", str(tmp_path / "run"), "--dry-run"]) == 0
    assert "of them trained" not in capsys.readouterr().out


def test_the_preset_needs_a_model_and_data(tmp_path, capsys):
    assert "name the model to start from with --init-from" in fails(
        ["--preset", "finetune", "--data-dir", str(tmp_path)], capsys)
    folder, _ = save(tmp_path / "pipe")
    assert "data_dir" in fails(["--preset", "finetune", "--init-from", str(folder)], capsys)


def test_a_short_run_does_not_return_the_old_weights():
    """The average starts at the old weights: what is left of them after so many steps."""
    (rate,) = preset_values("finetune")["ema_rates"]
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    ema, left = EMA(model, rate), {}
    nn.init.zeros_(model.weight)
    for step in range(20):
        ema.prepare(step)
        ema.update()
        left[step + 1] = ema.model.weight.item()
    assert left[1] == pytest.approx(0.1) and left[10] < 2e-5 and left[20] < 1e-6
    # Over its whole length the run averages about a tenth of it, however often it is extended.
    steps = preset_values("finetune")["steps"]
    assert 1 / (1 - ema.decay(steps)) == pytest.approx(steps / 10, rel=0.2)
    assert 1 / (1 - ema.decay(100 * steps)) == pytest.approx(1000)


# Frozen parameters.


@pytest.mark.parametrize("backend", [
    "torch", pytest.param("auto", marks=pytest.mark.skipif(CPP is not None, reason=str(CPP)))])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_frozen_parameters_get_no_gradient_state_or_update(tmp_path, precision, backend):
    folder, unet = save(tmp_path / "pipe")
    trainer = Trainer(tiny(tmp_path, folder, freeze=FROZEN, precision=precision, backend=backend,
                           weight_decay=0.1, ema_rates=(0.5, 0.9)))
    x0 = trainer.data.batch(torch.arange(8))
    gradients_of(trainer, x0, trainer._key(0))
    for name, p in trainer.model.named_parameters():
        assert (p.grad is None) == is_frozen(name), name
    for _ in range(2):
        trainer.train_step(x0)
    tensors, _ = trainer.state()
    before = {name: value.to(tensors["model"][name].dtype)
              for name, value in unet.state_dict().items()}
    for name in ("model", "ema_0.5", "ema_0.9"):
        for key, value in tensors[name].items():
            assert torch.equal(value, before[key]) == is_frozen(key), (name, key)
    numbers = {int(name.partition(".")[0]) for name in tensors["optimizer"]}
    trained = {i for i, (name, _) in enumerate(trainer.model.named_parameters())
               if not is_frozen(name)}
    assert numbers == trained
    if precision == "bf16":
        for copy, p in zip(trainer.network.parameters(), trainer.model.parameters(), strict=True):
            assert torch.equal(copy, p.bfloat16()) and copy.requires_grad == p.requires_grad
    assert trainer.trained == sum(v.numel() for k, v in unet.named_parameters()
                                  if not is_frozen(k))


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_the_other_gradients_are_the_same(tmp_path, backend):
    """Behind frozen layers, too, where torch's own group norm would crash."""
    folder, _ = save(tmp_path / "pipe")
    whole, part = (Trainer(tiny(tmp_path, folder, freeze=names, backend=backend))
                   for names in ((), FROZEN))
    x0 = whole.data.batch(torch.arange(8))
    for trainer in (whole, part):
        gradients_of(trainer, x0, trainer._key(0))
    for (name, p), q in zip(whole.model.named_parameters(), part.model.parameters(), strict=True):
        if not is_frozen(name):
            assert torch.allclose(p.grad, q.grad, rtol=1e-4, atol=1e-7), name


@pytest.mark.parametrize("fields", [
    {}, dict(freeze=(*FROZEN, "mid_block.*.conv1.bias")), dict(freeze=("*.conv1.weight",)),
    dict(lora=2, lora_targets=("to_q", "conv2", "mid_block.resnets.0.conv1"))])
def test_a_bias_that_the_norm_adds_is_trained_averaged_and_kept_as_before(
    tmp_path, monkeypatch, fields
):
    """As on a GPU: that of a first convolution, where no adapter wants to see the whole of it."""
    if fields.get("lora"):
        pytest.importorskip("peft")
    folder, _ = save(tmp_path / "pipe")
    monkeypatch.setattr(FusedResnetBlock2D, "on_gpu", lambda self, x: True)
    folded, original = [], FusedResnetBlock2D.folds_bias
    monkeypatch.setattr(FusedResnetBlock2D, "folds_bias", lambda self, x: (
        folded.append(original(self, x)) or folded[-1]))
    found = []
    for folds in (False, True):
        monkeypatch.setattr(FusedResnetBlock2D, "fold_bias", folds)
        trainer = Trainer(tiny(tmp_path, folder, ema_rates=(0.5, 0.9), lr=1e-3, **fields))
        start = {key: value.clone() for key, value in trainer.state()[0]["model"].items()}
        for _ in range(3):
            trainer.train_step(trainer.data.batch(torch.arange(8)))
        folded.clear()
        out = predict(trainer.emas[0].model)
        assert len(folded) == 8 and sum(folded) == (8 - bool(fields.get("lora")) if folds else 0)
        tensors, _ = trainer.state()
        names = list(trainer.model.state_dict()), list(tensors["optimizer"])
        found.append((names, out, {
            f"{name}, {key}": value - start[key] for name in ("model", "ema_0.5", "ema_0.9")
            for key, value in tensors[name].items()}))
    (names, out, moved), (same_names, same_out, same_moved) = found
    assert same_names == names and moved.keys() == same_moved.keys()
    assert relative_error(same_out, out) < 1e-5
    for key, value in moved.items():
        # A key's bias changes no attention: AdamW makes steps of the rounding of its gradient.
        if not key.endswith("to_k.bias"):
            assert relative_error(same_moved[key], value) < 1e-2, key


def test_a_compiled_step_leaves_them_out(tmp_path):
    config = TrainConfig(**(preset_values("plane") | TINY | dict(
        num_points=200, precision="bf16", freeze=("inlet.*", "layers.0.*"), out=tmp_path / "run")))
    eager, traced = Trainer(config), Trainer(config)
    start = {name: p.clone() for name, p in eager.model.named_parameters()}
    traced.gradient_step.compile(aot_autograd(fw_compiler=lambda g, _: g))
    for trainer in (eager, traced):
        trainer.train_step(trainer.data.batch(torch.arange(8)))
    assert traced.gradient_step.compiled
    for (name, p), q in zip(eager.model.named_parameters(), traced.model.parameters(),
                            strict=True):
        assert torch.allclose(p, q, atol=1e-6), name
        assert torch.equal(q, start[name]) == name.startswith(("inlet.", "layers.0.")), name


def test_stopped_and_continued(tmp_path, capsys):
    folder, unet = save(tmp_path / "pipe")
    whole, part = (tiny(tmp_path, folder, out=tmp_path / name, freeze=FROZEN)
                   for name in ("whole", "part"))
    quiet(whole)
    quiet(TrainConfig(**{**part.to_dict(), "stop_after": 2}))
    assert yaml.safe_load((part.out / "config.yaml").read_text())["freeze"] == list(FROZEN)
    error = fails(["--resume", "--out", str(part.out), "--freeze", "up_blocks.*"], capsys)
    assert "freeze is ['down_blocks.*'" in error and "['up_blocks.*'] was asked for" in error
    assert main(["--resume", "--out", str(part.out)]) == 0
    ends = [load_newest(out / "checkpoints").tensors for out in (whole.out, part.out)]
    assert [end["model"].keys() for end in ends][0] == unet.state_dict().keys()
    for name in ends[0]:
        assert_equal(ends[0][name], ends[1][name])
    assert json.loads((part.out / "run.json").read_text())["trained"] < sum(
        p.numel() for p in unet.parameters())
    moved = predict(load_run(part.out).model) - predict(unet)
    assert moved.abs().max() > 1e-6


def test_the_plan_says_how_much_is_trained(tmp_path, capsys):
    folder, unet = save(tmp_path / "pipe")
    count = sum(p.numel() for name, p in unet.named_parameters() if not is_frozen(name))
    argv = ["--init-from", str(folder), "--out", str(tmp_path / "run"), "--dry-run"]
    assert main([*argv, "--freeze", *FROZEN]) == 0
    assert f"M parameters, {count:,} of them trained" in capsys.readouterr().out
    assert "freeze has 'conv_im.*'" in fails([*argv, "--freeze", "mid_block.*", "conv_im.*"],
                                             capsys)


@pytest.mark.parametrize("patterns, expected", [
    (("layers.0.*", "layer.*"), "freeze has 'layer.*': no parameter of the network has such a "
                                "name; they begin with inlet, layers, shifts, outlet"),
    (("layers",), "freeze has 'layers'"),  # a module is no parameter
    (("*",), "freeze is '\\*': nothing is left to train"),
    (("inlet.*", "layers.*", "shifts.*", "outlet.*"), "nothing is left to train"),
])
def test_patterns_that_do_not_fit(patterns, expected):
    with pytest.raises(UsageError, match=expected):
        freeze(PointMLP(3), patterns)


def test_patterns_are_of_whole_names():
    model = PointMLP(3)
    freeze(model, ("layers.?.weight", "*let.bias"))
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == {
        "layers.0.weight", "layers.1.weight", "layers.2.weight", "inlet.bias", "outlet.bias"}


def test_the_memory_of_frozen_parameters(tmp_path):
    values = preset_values("plane") | TINY | dict(mlp_width=512, ema_rates=(0.9, 0.99))
    sizes = {name: 4 * p.numel() for name, p in PointMLP(3, 512).named_parameters()}
    kept = sum(size for name, size in sizes.items() if name.startswith("layers."))
    for precision, copies in (("fp32", 0), ("bf16", 0.5)):
        part, whole = (
            estimate_bytes(TrainConfig(**values, precision=precision, freeze=names), (3,))
            for names in (("layers.*",), ()))
        part, whole = part["weights"], whole["weights"]
        # Gradients, moments and two averages, and the gradients in bfloat16.
        assert whole - part == pytest.approx((5 + copies) * kept, abs=2)
        assert whole == pytest.approx((6 + 2 * copies) * sum(sizes.values()), abs=2)
