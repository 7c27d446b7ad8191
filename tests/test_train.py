"""The training loop end to end, on tiny networks: what it writes, resumes, skips and refuses."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from robustdm import RunError, UsageError
from robustdm.cli import guard, parse_train
from robustdm.data import load_data
from robustdm.data.base import to_float
from robustdm.method.gradients import GradientStep
from robustdm.models.load_run import load_run
from robustdm.models.mlp import PointMLP
from robustdm.runs.checkpoint import list_checkpoints, load_newest, save_checkpoint, verify
from robustdm.runs.config import TrainConfig
from robustdm.runs.presets import PRESETS, preset_values
from robustdm.train import main
from robustdm.training import loop, outputs
from robustdm.training.loop import train
from robustdm.training.memory import (
    available_bytes,
    check_fits,
    estimate_bytes,
    finer_pieces,
)
from robustdm.training.trainer import Trainer

TINY = dict(block_channels=(8, 8), norm_groups=4, batch_size=8, steps=6, log_every=2,
            sample_every=4, checkpoint_every=2, num_samples=4, preview_steps=3, final_steps=3,
            dropout=0.1)


def tiny(tmp_path, **fields):
    return TrainConfig(**{**TINY, "out": tmp_path / "run", **fields})


def points(tmp_path, **fields):
    values = preset_values("plane") | TINY | dict(num_points=200, out=tmp_path / "run")
    return TrainConfig(**{**values, **fields})


def quiet(config):
    return train(config, progress_mode="off")


def tensors(directory):
    return load_newest(directory / "checkpoints").tensors


def assert_same_bits(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].keys() == b[name].keys()
        for key in a[name]:
            assert torch.equal(a[name][key], b[name][key]), f"{name}/{key}"


def test_a_run_writes_everything(tmp_path):
    config = tiny(tmp_path, ema_rates=(0.9, 0.5))
    result = quiet(config)
    out = config.out
    assert (result.step, result.stopped, result.exit_code) == (6, None, 0)
    assert yaml.safe_load((out / "config.yaml").read_text())["block_channels"] == [8, 8]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6]
    for line in lines:
        assert line["loss"] == pytest.approx(line["fit"] + line["reg"])
        assert line["reg"] > 0 and line["grad_norm"] > 0 and line["skipped"] == 0
        assert any(f"fit_band{k}" in line for k in range(4))
    assert set(lines[1]["samples"]) >= {"noise_rms", "noise_level"} and "heldout_loss" in lines[1]
    assert lines[-1]["lr"] == pytest.approx(1e-3 * 6 / 100)
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == [
        "step-00000004", "step-00000006"]
    newest = out / "checkpoints" / "step-00000006"
    assert verify(newest) == []
    assert {p.name for p in newest.iterdir()} == {
        "model.safetensors", "ema_0.9.safetensors", "ema_0.5.safetensors",
        "optimizer.safetensors", "state.json", "MANIFEST.json"}
    for name in ("step-00000004", "final"):
        assert np.load(out / "samples" / f"{name}.npz")["samples"].shape == (4, 1, 8, 8)
        assert (out / "samples" / f"{name}.png").exists()
    reference = np.load(out / "samples" / "reference.npz")
    assert not np.array_equal(reference["train"], reference["clean"])
    summary = json.loads((out / "summary.json").read_text())
    assert set(summary["measures"]) == {"samples", "training data", "clean data"}
    assert "robust_adv" in (out / "report.html").read_text()
    provenance = json.loads((out / "run.json").read_text())
    assert provenance["parameters"] == result.summary["parameters"]


def test_the_pipeline_loads_in_diffusers_with_the_averaged_weights(tmp_path):
    from diffusers import DDPMPipeline

    config = tiny(tmp_path)
    quiet(config)
    pipeline = DDPMPipeline.from_pretrained(config.out / "pipeline")
    ours = load_run(config.out)
    theirs = pipeline.unet.state_dict()
    assert theirs.keys() == ours.model.state_dict().keys()
    assert all(torch.equal(theirs[name], v) for name, v in ours.model.state_dict().items())
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 900])
    assert torch.allclose(pipeline.unet(x, t).sample, ours.model(x, t).sample, atol=1e-5)
    assert ours.step == 6 and not any(p.requires_grad for p in ours.model.parameters())
    assert load_run(config.out, checkpoint=4).step == 4
    with pytest.raises(UsageError, match="ema is 0.5"):
        load_run(config.out, ema=0.5)


@pytest.mark.parametrize("make", [tiny, points])
def test_resume_is_bit_exact(tmp_path, make):
    whole = make(tmp_path, out=tmp_path / "whole", accumulate=2)
    quiet(whole)
    part = replace(whole, out=tmp_path / "part", stop_after=3)
    assert quiet(part).stopped == "--stop-after 3"
    assert quiet(replace(part, resume=True, stop_after=None)).step == 6
    assert_same_bits(tensors(whole.out), tensors(part.out))
    a, b = ((c.out / "metrics.jsonl").read_text().splitlines() for c in (whole, part))
    final = [json.loads(lines[-1]) for lines in (a, b)]
    assert final[0]["heldout_loss"] == final[1]["heldout_loss"]
    assert np.array_equal(*(np.load(c.out / "samples" / "final.npz")["samples"]
                            for c in (whole, part)))


def test_a_resumed_run_does_not_keep_its_checkpoint_in_memory(tmp_path, monkeypatch):
    config = points(tmp_path)
    quiet(replace(config, stop_after=2))
    original, kept = loop.load_newest, []

    def watched(root, **options):
        assert torch.device(options.get("device", "cpu")).type == "cpu"
        checkpoint = original(root, **options)
        kept.extend(weakref.ref(v) for v in checkpoint.tensors["model"].values())
        return checkpoint

    def batches(*arguments):
        assert kept and not any(tensor() is not None for tensor in kept)
        return original_batches(*arguments)

    original_batches = loop.batches
    monkeypatch.setattr(loop, "load_newest", watched)
    monkeypatch.setattr(loop, "batches", batches)
    assert quiet(replace(config, resume=True)).step == 6


def test_a_finished_run_can_be_extended(tmp_path):
    whole = points(tmp_path, out=tmp_path / "whole")
    quiet(whole)
    short = replace(whole, out=tmp_path / "short", steps=4)
    quiet(short)
    with pytest.raises(UsageError, match="raise --steps"):
        quiet(replace(short, resume=True))
    quiet(replace(short, resume=True, steps=6))
    assert_same_bits(tensors(whole.out), tensors(short.out))


def test_the_heldout_loss_weighs_all_timesteps_alike(tmp_path):
    trainer = Trainer(tiny(tmp_path, holdout=0.005))
    length, seen = len(trainer.schedule), []

    def model(x, t):
        seen.extend(t.tolist())
        return torch.zeros_like(x)

    trainer._predictor = lambda: model
    loss = trainer.heldout_loss()
    assert loss == pytest.approx(1, abs=0.05)  # the mean of eps^2
    assert len(trainer.data.heldout) == 9 and len(seen) == 256
    assert np.mean(np.float64(seen)) == pytest.approx((length - 1) / 2, rel=2e-3)
    assert np.histogram(seen, bins=8, range=(0, length))[0].tolist() == [32] * 8


def test_a_run_killed_after_its_last_step_is_finished_by_resume(tmp_path, monkeypatch):
    config = tiny(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(loop._Session, "_finish", lambda self, **_: {})
        quiet(config)
    assert not (config.out / "summary.json").exists()
    before = tensors(config.out)
    result = quiet(replace(config, resume=True))
    assert result.summary["step"] == result.step == 6
    for name in ("pipeline/model_index.json", "report.html", "samples/final.npz"):
        assert (config.out / name).exists()
    assert_same_bits(before, tensors(config.out))
    with pytest.raises(UsageError, match="raise --steps"):
        quiet(replace(config, resume=True))


@pytest.mark.parametrize("pieces", [2, 4])
def test_accumulation_changes_nothing_but_rounding(tmp_path, pieces):
    one, many = (Trainer(tiny(tmp_path, dropout=0.0, accumulate=k)) for k in (1, pieces))
    x0 = one.data.batch(torch.arange(8))
    for trainer in (one, many):
        trainer.train_step(x0)
    a, b = one.window(), many.window()
    assert a["fit"] == pytest.approx(b["fit"], rel=1e-5)
    assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("objective", ["ddpm", "robust_ran", "invariance", "outward_ran"])
def test_every_objective_trains(tmp_path, objective):
    result = quiet(points(tmp_path, objective=objective, steps=2, lambda_max=5.0))
    line = json.loads((result.directory / "metrics.jsonl").read_text().splitlines()[-1])
    assert (line["reg"] > 0) == (objective != "ddpm")


def test_training_learns(tmp_path):
    """The loss of a short run on points falls well below that of predicting nothing (1.0)."""
    config = points(tmp_path, objective="ddpm", steps=200, batch_size=256, log_every=100,
                    point_noise="clean", sample_every=0, warmup_steps=10, num_points=2000)
    quiet(config)
    lines = [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["fit"] < 0.75 * lines[0]["fit"] < 0.75


def test_bf16_follows_fp32(tmp_path):
    fits = []
    for precision in ("fp32", "bf16"):
        trainer = Trainer(tiny(tmp_path, precision=precision, dropout=0.0))
        x0 = trainer.data.batch(torch.arange(8))
        for _ in range(3):
            trainer.train_step(x0)
        fits.append(trainer.window()["fit"])
        assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
    assert fits[0] != fits[1] and fits[0] == pytest.approx(fits[1], rel=0.02)


def poison(monkeypatch, bad_steps):
    """Put a NaN into the batches of some steps."""
    original = loop.batches

    def batches(data, config, start, *where):
        for step, (x, indices) in enumerate(original(data, config, start, *where), start):
            yield (x * float("nan") if step in bad_steps else x), indices

    monkeypatch.setattr(loop, "batches", batches)


def test_a_nan_batch_is_skipped_and_counted(tmp_path, monkeypatch):
    poison(monkeypatch, {1, 3})
    config = points(tmp_path)
    result = quiet(config)
    assert result.summary["skipped"] == 2
    for group in tensors(config.out).values():
        assert all(torch.isfinite(value).all() for value in group.values())
    lines = [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in lines] == [1, 2, 2]
    assert all(np.isfinite(line["loss"]) for line in lines)


def test_a_skipped_step_touches_nothing(tmp_path):
    trainer = Trainer(points(tmp_path))
    x0 = trainer.data.batch(torch.arange(8))
    trainer.train_step(x0)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    moments = [v.clone() for s in trainer.optimizer.state.values() for v in s.values()]
    trainer.train_step(x0 * float("inf"))
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
    after = [v for s in trainer.optimizer.state.values() for v in s.values()]
    assert all(torch.equal(a, b) for a, b in zip(moments, after, strict=True))
    trainer.train_step(x0)
    assert not any(torch.equal(a, b)
                   for a, b in zip(before, trainer.model.parameters(), strict=True))


def test_endless_nans_stop_the_run_and_name_the_items(tmp_path, monkeypatch):
    """However rarely a line is written."""
    poison(monkeypatch, set(range(3, 7)))  # the last step before a line is good
    config = points(tmp_path, steps=50, max_skipped=4, log_every=25)
    with pytest.raises(RunError, match=r"4 steps in a row .* with the items \d+, "):
        quiet(config)
    checkpoint = load_newest(config.out / "checkpoints")
    assert all(torch.isfinite(v).all() for v in checkpoint.tensors["model"].values())


@pytest.mark.parametrize("resident", [True, False])
def test_a_skipped_step_names_the_picture_it_was(tmp_path, monkeypatch, capsys, resident):
    (tmp_path / "pictures").mkdir()
    for k in range(30):
        pixels = np.random.default_rng(k).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{k:03d}.png")
    config = tiny(tmp_path, data="images", data_dir=tmp_path / "pictures", holdout=0.2, workers=0,
                  corrupt_fraction=0.0, steps=12, resident_gib=8.0 if resident else 0.0)
    real = loop.batches

    def batches(data, config, *rest):
        for x, indices in real(data, config, *rest):
            bad = data.members[indices] == item
            if not isinstance(x, torch.Tensor):
                x = to_float(x.data[x.items])
            yield torch.where(bad.view(-1, 1, 1, 1), torch.nan, x), indices

    item = int(load_data(config).members[3])
    monkeypatch.setattr(loop, "batches", batches)
    result = quiet(config)
    said = re.findall(r"step \d+ skipped: .* items (.*)", capsys.readouterr().out)
    assert said and said == [f"{item:03d}.png"] * result.summary["skipped"]


def spoil(config, file):
    """Write the newest checkpoint anew, sound but for a NaN."""
    found = load_newest(config.out / "checkpoints")
    name = next(iter(found.tensors[file]))
    found.tensors[file][name].view(-1)[0] = torch.nan
    save_checkpoint(found.path.parent, found.step, found.tensors, found.state)
    return f"{found.path} is of no use, {name} in {file} is not finite"


@pytest.mark.parametrize("change", [
    {"elapsed": 10**400}, {"elapsed": "x"}, {"elapsed": float("nan")}, {"skipped": 10**400},
    {"skipped": 1e300}, {"skipped": "1"}, {"skipped": [1]}, {"lr": 1e300}, {"betas": [0.9]},
    {"betas": ["a", "b"]}, {"eps": "x"}, {"eps": -1.0}, {"weight_decay": None}, {"amsgrad": True},
    {"lr": 10**400}, {"momentum": 0.9}], ids=lambda change: str(change)[:20])
def test_numbers_that_a_checkpoint_cannot_have(tmp_path, change):
    """Its manifest fits, for somebody wrote both."""
    config = points(tmp_path, steps=2)
    quiet(config)
    found = load_newest(config.out / "checkpoints")
    place = found.state if change.keys() <= found.state.keys() else (
        found.state["optimizer"]["param_groups"][0])
    place.update(change)
    save_checkpoint(found.path.parent, found.step, found.tensors, found.state)
    with pytest.raises(RunError, match="is not a checkpoint of a run of this version.*wrote it$"):
        quiet(replace(config, steps=4, resume=True))


@pytest.mark.parametrize("name, instead, what", [
    ("exp_avg", None, "exp_avg of parameter 0 missing"),
    ("exp_avg_sq", "exp_avh", "'exp_avh' of parameter 0 is no moment of AdamW")])
def test_moments_that_a_checkpoint_lacks(tmp_path, name, instead, what):
    config = points(tmp_path, steps=2)
    quiet(config)
    found = load_newest(config.out / "checkpoints")
    moments = found.tensors["optimizer"]
    value = moments.pop(f"0.{name}")
    if instead:
        moments[f"0.{instead}"] = value
    save_checkpoint(found.path.parent, found.step, found.tensors, found.state)
    with pytest.raises(RunError, match=re.escape(what)):
        quiet(replace(config, steps=4, resume=True))


@pytest.mark.parametrize("file", ["model", "ema_0.995", "optimizer"])
def test_weights_of_another_network_are_named(tmp_path, file):
    config = points(tmp_path, steps=2, ema_rates=(0.995,))
    quiet(config)
    found = load_newest(config.out / "checkpoints")
    name, value = next(iter(found.tensors[file].items()))
    del found.tensors[file][name]
    found.tensors[file]["9999.other"] = value
    save_checkpoint(found.path.parent, found.step, found.tensors, found.state)
    with pytest.raises(UsageError, match="another architecture: .*9999.other"):
        quiet(replace(config, steps=4, resume=True))


def test_a_nan_is_neither_loaded(tmp_path):
    quiet(points(tmp_path))
    for file in ("model", f"ema_{points(tmp_path).ema_rates[0]}", "optimizer"):
        config = points(tmp_path, out=tmp_path / file)
        shutil.copytree(tmp_path / "run", config.out)
        said = spoil(config, file)
        with pytest.raises(RunError, match=re.escape(said)):
            quiet(replace(config, resume=True, steps=8))
        if file.startswith("ema"):
            for use in (load_run, lambda out: quiet(points(tmp_path / "new", init_from=str(out)))):
                with pytest.raises(RunError, match=re.escape(said)):
                    use(config.out)


def test_nor_saved(tmp_path, monkeypatch):
    real = Trainer.train_step

    def train_step(self, *arguments):
        real(self, *arguments)
        if self.step == 3:
            self.emas[0].model.outlet.bias.data[0] = torch.inf

    monkeypatch.setattr(Trainer, "train_step", train_step)
    config = points(tmp_path)
    with pytest.raises(RunError, match=r"after step 4 outlet.bias in ema_\S+ is not finite"):
        quiet(config)
    assert [step for step, _ in list_checkpoints(config.out / "checkpoints")] == [2]


def test_a_deleted_directory_is_made_anew(tmp_path, monkeypatch, capsys):
    whole, config = points(tmp_path, out=tmp_path / "whole"), points(tmp_path)
    quiet(whole)
    real = Trainer.train_step

    def train_step(self, *arguments):
        if self.step == 3:
            shutil.rmtree(config.out)
        real(self, *arguments)

    monkeypatch.setattr(Trainer, "train_step", train_step)
    quiet(config)
    assert f"warning: {config.out} was deleted or moved away" in capsys.readouterr().out
    assert_same_bits(tensors(whole.out), tensors(config.out))
    found = {str(path.relative_to(config.out)) for path in config.out.rglob("*")}
    lost = {str(path.relative_to(whole.out)) for path in whole.out.rglob("*")} - found
    assert all("step-0000000" in name for name in lost), "what it wrote before"


def test_a_full_disk_does_not_stop_training(tmp_path, monkeypatch, capsys):
    from robustdm.runs.checkpoint import CheckpointError

    original, calls = loop.save_checkpoint, []

    def failing(root, step, *rest):
        calls.append(step)
        if step == 4:
            raise CheckpointError("no space left; the checkpoints before are untouched")
        return original(root, step, *rest)

    monkeypatch.setattr(loop, "save_checkpoint", failing)
    result = quiet(points(tmp_path))
    assert calls == [2, 4, 6] and result.step == 6
    assert any("no space left" in warning for warning in result.summary["warnings"])


def no_compiler(step):
    def fail(*_):
        raise RuntimeError("no C++ compiler was found")

    step._run, step.compiled = fail, True


def test_compile_falls_back_to_eager(tmp_path, monkeypatch):
    def broken(self, **_):
        self._compiled_call_impl = lambda *a, **k: (_ for _ in ()).throw(
            RuntimeError("no C++ compiler was found"))

    monkeypatch.setattr(torch.nn.Module, "compile", broken)
    monkeypatch.setattr(GradientStep, "compile", no_compiler)
    config = points(tmp_path, compile=True)
    result = quiet(config)
    assert result.step == 6 and result.summary["compile_s"] is None
    assert sum("no C++ compiler" in warning for warning in result.summary["warnings"]) == 2
    plain = replace(config, compile=False, out=tmp_path / "plain")
    quiet(plain)
    assert_same_bits(tensors(config.out), tensors(plain.out))


def test_where_the_step_cannot_be_traced_the_network_is_compiled(tmp_path, monkeypatch):
    """The warning names the line of the graph break."""
    compiled = []

    class Breaking(PointMLP):
        def forward(self, x, t):
            if torch.compiler.is_compiling() and not compiled:
                torch._dynamo.graph_break()
            return super().forward(x, t)

    def compile_network(model, probe):
        compiled.append(model)
        return probe()

    monkeypatch.setattr("robustdm.models.build.PointMLP", Breaking)
    monkeypatch.setattr(loop, "compile_network", compile_network)
    result = quiet(points(tmp_path, steps=2, compile=True, sample_every=0))
    assert len(compiled) == 1 and type(compiled[0]) is Breaking
    (warning,) = result.summary["warnings"]
    assert "cannot be compiled as a whole" in warning and "graph_break" in warning
    assert re.search(r"test_train\.py:\d+", warning), warning


def test_compiling_the_network_alone(tmp_path, monkeypatch):
    """No weight gradients in the attack's compiled graph, where only the network is compiled."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    config = points(tmp_path, steps=3, mlp_width=16, mlp_depth=1, sample_every=0)
    original = torch.nn.Module.compile
    graphs = []

    def compile_with_aot(self, **options):
        from torch._dynamo.backends.common import aot_autograd

        def backward(graph, _):
            graphs.append([n.target for n in graph.graph.nodes if n.op == "call_function"])
            return graph

        backend = aot_autograd(fw_compiler=lambda graph, _: graph, bw_compiler=backward)
        return original(self, backend=backend, **options)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_with_aot)
    monkeypatch.setattr(GradientStep, "compile", no_compiler)
    result = quiet(replace(config, compile=True))
    assert len(result.summary["warnings"]) == 1, result.summary["warnings"]
    products = sorted(sum("mm" in str(t) for t in targets) for targets in graphs)
    # Inlet, layer and outlet lie on the way back to the input: three products for the attack. The
    # training pass has those of outlet and layer, and one for each of the four weights.
    assert products == [3, 6]


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiling_a_run(tmp_path, monkeypatch, precision, whole):
    """Same steps to rounding, same names: of the whole step, and of the network alone."""
    config = points(tmp_path, steps=4, mlp_width=16, mlp_depth=1, sample_every=0, reg_every=2,
                    precision=precision, accumulate=2)
    step_compile, network_compile = GradientStep.compile, torch.nn.Module.compile
    monkeypatch.setattr(GradientStep, "compile",
                        (lambda self: step_compile(self, "aot_eager")) if whole else no_compiler)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: network_compile(
        self, backend="aot_eager", **options))
    result = quiet(replace(config, compile=True))
    assert len(result.summary["warnings"]) == (0 if whole else 1), result.summary["warnings"]
    assert result.summary["compile_s"] > 0
    eager = replace(config, out=tmp_path / "eager")
    quiet(eager)
    for name, value in tensors(eager.out)["model"].items():
        assert torch.allclose(value, tensors(config.out)["model"][name], atol=1e-6), name


def test_memory_estimate_counts_what_autograd_keeps(tmp_path):
    config = tiny(tmp_path, objective="ddpm", dropout=0.0)
    estimate = estimate_bytes(config, (1, 8, 8))
    trainer = Trainer(config)
    assert estimate["weights"] == trainer.parameters * 4 * 5
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda v: kept.setdefault(v.untyped_storage().data_ptr(), v), lambda v: v
    ):
        out = trainer.model(torch.randn(8, 1, 8, 8), torch.zeros(8, dtype=torch.int64))
    own = {p.untyped_storage().data_ptr() for p in trainer.model.parameters()}
    measured = sum(v.untyped_storage().nbytes() for k, v in kept.items() if k not in own)
    del out
    # Attention and channels-last copies differ a little from one device to the next.
    drawing = 64 * 8 * 64
    assert estimate["activations"] - drawing == pytest.approx(measured, rel=0.2)
    robust = estimate_bytes(replace(config, objective="robust_adv"), (1, 8, 8))
    assert robust["activations"] - drawing == 2 * (estimate["activations"] - drawing)


def test_a_run_that_cannot_fit_is_refused_with_the_remedy():
    config = TrainConfig(batch_size=64)
    estimate = {"weights": 10, "activations": 900, "total": 910}
    assert check_fits(config, estimate, 1000) is check_fits(config, estimate, None) is None
    assert "--accumulate 2 gives" in check_fits(config, estimate, 800)
    with pytest.raises(UsageError, match="batch_size is 64: a step needs .* --accumulate 16 gives "
                       "the same result in less; the largest batch that fits in one piece is abou"):
        check_fits(config, estimate, 100)
    with pytest.raises(UsageError, match="a smaller network"):
        check_fits(config, estimate, 12)
    assert available_bytes(torch.device("cpu")) is None or available_bytes(
        torch.device("cpu")) > 2**20


def test_finer_pieces_divide_the_batch():
    assert finer_pieces(TrainConfig(batch_size=12, accumulate=2)) == [3, 4, 6, 12]
    assert finer_pieces(TrainConfig(batch_size=36)) == [2, 3, 4, 6, 9, 12, 18, 36]
    assert finer_pieces(TrainConfig(batch_size=7, accumulate=7)) == []


def test_a_monstrous_batch_is_refused_before_it_is_tried(tmp_path, capsys):
    flags = ["--batch-size", "300000000", "--dry-run", "--out", str(tmp_path / "run")]
    assert "--accumulate" in fails(flags, capsys)


def test_the_dry_run_looks_at_the_directory(tmp_path, capsys):
    quiet(points(tmp_path))
    flags = ["--preset", "plane", "--dry-run", "--out", str(tmp_path / "run")]
    assert "it holds a run" in fails(flags, capsys)


def test_old_checkpoints_are_renewed_by_the_clock(tmp_path):
    config = points(tmp_path, checkpoint_every=0, checkpoint_minutes=1e-9, keep_last=10)
    quiet(config)
    assert len(list((config.out / "checkpoints").iterdir())) == 6


def test_a_signal_ends_the_final_sampling_and_resume_finishes(tmp_path, monkeypatch):
    config = points(tmp_path, final_steps=50)
    original = Trainer.generate

    def generate(self, sampler, steps, progress):
        if sampler == "ddpm":
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, sampler, steps, progress)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "generate", generate)
        result = quiet(config)
    assert (result.step, result.stopped, result.exit_code) == (6, "SIGTERM", 143)
    assert not result.summary and not (config.out / "summary.json").exists()
    again = quiet(replace(config, resume=True))
    assert again.summary and again.stopped is None and again.exit_code == 0


def test_dry_run_writes_nothing(tmp_path, capsys):
    assert main(["--dry-run", "--out", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert "0.43 M parameters" in out and "memory" in out and not (tmp_path / "run").exists()


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_save_and_exit_with_their_code(tmp_path, monkeypatch, number, code):
    original = loop.batches

    def batches(*arguments):
        for step, item in enumerate(original(*arguments)):
            if step == 2:
                os.kill(os.getpid(), number)
            yield item

    config = points(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "batches", batches)
        result = quiet(config)
    assert result.exit_code == code and result.step == 3
    assert load_newest(config.out / "checkpoints").step == 3
    quiet(replace(config, resume=True))
    whole = replace(config, out=tmp_path / "whole")
    quiet(whole)
    assert_same_bits(tensors(whole.out), tensors(config.out))


def test_killed_and_resumed_from_the_command_line(tmp_path):
    """kill -9 in the middle, --resume, and the same final bits as a run that was left alone."""
    flags = ["--preset", "plane", "--steps", "40", "--batch-size", "8", "--num-points", "200",
             "--checkpoint-every", "5", "--sample-every", "0", "--num-samples", "4",
             "--preview-steps", "2", "--final-steps", "2", "--log-every", "5", "--device", "cpu"]
    command = [sys.executable, "-m", "robustdm.train", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    first = subprocess.Popen([*command, "--out", "killed"], cwd=tmp_path, env=environment,
                             stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    root = tmp_path / "killed" / "checkpoints"
    deadline = time.monotonic() + 120
    while not list(root.glob("step-*")) and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    first.kill()
    first.wait()
    before = load_newest(root).step
    resumed = subprocess.run(
        [sys.executable, "-m", "robustdm.train", "--resume", "--out", "killed"],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )
    if before < 40:  # else the machine was faster than the kill
        assert resumed.returncode == 0, resumed.stderr
        assert f"continuing killed after step {before}" in resumed.stdout
    assert main([*flags, "--out", str(tmp_path / "whole")]) == 0
    assert_same_bits(tensors(tmp_path / "whole"), tensors(tmp_path / "killed"))


# What a user types wrong: one line, exit code 2, nothing written.


def fails(argv, capsys, code=2):
    with pytest.raises(SystemExit) as stop:
        guard(lambda: main(argv))
    error = capsys.readouterr().err
    assert stop.value.code == code and "Traceback" not in error, error
    return error


@pytest.mark.parametrize("argv, expected", [
    (["--preset", "cifar"], "preset is 'cifar': choose one of digits"),
    (["--lambda-moed", "x"], "--lambda-mode"),
    (["--steps", "0"], "steps is 0"),
    (["--steps", "many"], "many"),
    (["--batch-size", "10", "--accumulate", "3"], "it must divide the batch size, 10"),
    (["--device", "tpu"], "device is 'tpu': use auto, cpu, cuda or cuda:N"),
    (["--block-channels", "12", "20"], "multiple of norm_groups"),
    (["--resolution", "7"], "resolution is 7"),
    (["--preset", "folder", "--data-dir", "nowhere"], "nowhere"),
    (["--preset", "celeba64"], "data_dir"),
    (["--network", "mlp"], "use --network unet"),
    (["--preset", "plane", "--network", "unet"], "use --network mlp"),
    (["--config", "missing.yaml"], "missing.yaml"),
    (["--resume", "--out", "nowhere"], "nowhere is not a run"),
    (["--resume", "--config", "c.yaml"], "leave --config out"),
    (["--attention-head-dim", "5"], "attention_head_dim is 5"),
])
def test_usage_errors(argv, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    error = fails(argv, capsys)
    assert expected in " ".join(error.replace("│", " ").split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text, expected", [
    ("lamda_mode: x", "unknown field 'lamda_mode'; did you mean 'lambda_mode'?"),
    ("steps: many", "steps is 'many', but must be int"),
    ("steps: 1.5", "steps is 1.5, but must be int"),
    ("compile: 3", "compile is 3, but must be bool"),
    ("beta_range: [1, 2, 3]", "beta_range is [1, 2, 3]"),
    ("lambda_mode: rays", "lambda_mode is 'rays'"),
    ("- a\n- b", "one 'field: value' per line"),
    ("a: [", "not valid YAML"),
    ("a: !!python/object/apply:os.system ['touch owned']", "not valid YAML"),
    ("preset: nope", "preset is 'nope'"),
])
def test_config_file_errors(text, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(text)
    assert expected in fails(["--config", "c.yaml"], capsys)
    assert [p.name for p in tmp_path.iterdir()] == ["c.yaml"]


def test_flags_override_the_file_which_overrides_the_preset(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("preset: subspace\nsteps: 11\nlr: 2e-4\nema_rates: [0.5, 0.9]\n")
    config = parse_train(["--config", str(path), "--steps", "12"])
    assert (config.preset, config.data) == ("subspace", "subspace")
    assert (config.steps, config.lr) == (12, 2e-4)
    assert config.ema_rates == (0.5, 0.9) and config.batch_size == PRESETS["subspace"]["batch_size"]


def test_every_preset_is_a_valid_configuration():
    for name in PRESETS:
        config = TrainConfig(**preset_values(name))
        assert TrainConfig.from_dict(config.to_dict()) == config


def test_out_that_holds_another_run(tmp_path, capsys):
    quiet(points(tmp_path))
    flags = ["--preset", "plane", "--out", str(tmp_path / "run")]
    assert "add --resume to continue that one" in fails(flags, capsys)
    error = fails(["--resume", "--out", str(tmp_path / "run"), "--preset", "digits"], capsys)
    assert "the run was started with 'plane'" in error
    error = fails(["--resume", "--out", str(tmp_path / "run"), "--lam", "0.9"], capsys)
    assert "lam is 0.3 there, 0.9 was asked for" in error
    assert load_newest(tmp_path / "run" / "checkpoints").step == 6


def test_clean_images_are_warned_of(tmp_path):
    smooth = np.linspace(0, 255, 16)[None, :] + np.zeros((16, 1))
    pictures = np.repeat(smooth[None, :, :, None].astype(np.uint8), 30, 0)
    np.save(tmp_path / "clean.npy", pictures)
    config = tiny(tmp_path, data="images", data_dir=tmp_path / "clean.npy", resolution=16,
                  corrupt_fraction=0.0, steps=1)
    assert any("look clean" in warning for warning in quiet(config).summary["warnings"])
    noisy = replace(config, corrupt_fraction=0.9, out=tmp_path / "noisy")
    assert not any("look clean" in warning for warning in quiet(noisy).summary["warnings"])


# What is not the training itself may fail.


def test_a_full_disk_costs_previews_and_the_report_not_the_run(tmp_path, monkeypatch):
    config = points(tmp_path, steps=6, sample_every=2)
    written = outputs.write_bytes

    def full(path, content):
        if path.suffix == ".npz":
            raise RunError(f"{path} was not written: No space left on device")
        written(path, content)

    monkeypatch.setattr(outputs, "write_bytes", full)
    with pytest.raises(RunError, match="step 6 is saved, but final.npz could not be written"):
        quiet(config)
    assert load_newest(config.out / "checkpoints").step == 6
    monkeypatch.undo()
    assert quiet(replace(config, resume=True)).summary["step"] == 6
    assert (config.out / "samples" / "final.npz").is_file()


def test_a_signal_ends_a_compilation(tmp_path, monkeypatch):
    def compile_step(step, probe):
        os.kill(os.getpid(), signal.SIGUSR1)
        raise AssertionError("the signal did not end it")

    monkeypatch.setattr(loop, "compile_step", compile_step)
    result = quiet(points(tmp_path, steps=3, compile=True))
    assert (result.step, result.stopped, result.exit_code) == (0, "SIGUSR1", 138)


@pytest.mark.parametrize("name, value", [
    ("lr", float("nan")), ("lam", float("inf")), ("batch_size", 1 << 70), ("batch_size", True),
    ("channels", True), ("data_dir", "a\0b"), ("mlp_depth", 10**6), ("timesteps", 1 << 30),
    ("block_channels", [8] * 40), ("attention_head_dim", 0), ("pretrained", {"unet": {}}),
])
def test_values_that_only_a_fuzzer_gives(name, value):
    """Each led to another error, or took memory without end."""
    with pytest.raises(UsageError, match=f"{name} is "):
        TrainConfig.from_dict({name: value})


@pytest.mark.parametrize("name, value, wanted", [
    ("batch_size", "many", "int"), ("lr", None, "float"), ("objective", "adv", "'robust_adv'"),
    ("freeze", "conv_in", "tuple"), ("flip", 1, "bool"), ("out", 3, "Path"),
])
def test_types_are_checked_where_no_parser_does_it(name, value, wanted):
    with pytest.raises(UsageError, match=f"^{name} is {value!r}, but must be .*{wanted}"):
        TrainConfig(**{name: value})
    config = TrainConfig(lr=1, block_channels=[8], out="x", init_from=Path("model"))
    assert (config.lr, config.block_channels, config.out, config.init_from) == (
        1.0, (8,), Path("x"), "model")
    assert type(config.lr) is float and type(config.init_from) is str
