"""The scripts of examples/, at tiny size."""

import importlib.util
import os
from itertools import islice
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from robustdm.data import batches, load_data
from robustdm.runs.config import TrainConfig
from robustdm.runs.presets import preset_values
from robustdm.training.trainer import Trainer
from tests import ranks

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_points(capsys):
    """After 60 steps it is near the plane, from a thousand without training; robust_adv nearer."""
    main = example("points").main
    robust, plain = (main(["--steps", "60", "--objective", name])
                     for name in ("robust_adv", "ddpm"))
    assert robust < 0.9 * plain < 0.3
    assert f"{robust:.3f} (training points: 0.080)" in capsys.readouterr().out


def test_a_fused_stock_network_computes_the_same(capsys):
    found = example("fuse_diffusers").main(
        ["--side", "8", "--channels", "32", "64", "--batch-size", "2", "--repeats", "2"])
    assert 0 < found["output"] < 1e-5 and 0 < found["gradient"] < 1e-5
    assert "times as fast" in capsys.readouterr().out


def test_the_diffusers_script_trains_to_our_own_loss_curve():
    """Same seed, data, network and optimizer: three changed lines are all it takes."""
    config = TrainConfig(**{
        **preset_values("digits"), "objective": "robust_adv", "seed": 0, "dropout": 0.0,
        "lr": 2e-4, "warmup_steps": 0, "weight_decay": 0.0, "clip_norm": 1.0, "batch_size": 16,
        "precision": "fp32", "compile": False, "steps": 5, "device": "cpu"})
    data = load_data(config)
    fed = [x0 if isinstance(x0, torch.Tensor) else data.batch(items)
           for x0, items in islice(batches(data, config, 0, torch.device("cpu")), config.steps)]
    ours = Trainer(config, data)
    unet = UNet2DModel.from_config(ours.model.config)
    unet.load_state_dict(ours.model.state_dict())
    curve = []
    for x0 in fed:
        ours.train_step(x0)
        window = ours.window()
        curve.append(window["fit"] + window["reg"])
    scheduler = DDPMScheduler(num_train_timesteps=1000)
    theirs = list(example("diffusers_training").train(unet, scheduler, fed, len(fed), lr=2e-4))
    assert theirs == pytest.approx(curve, rel=1e-4)
    assert len(set(curve)) == 5
    for name, value in ours.model.state_dict().items():
        assert torch.allclose(value, unet.state_dict()[name], atol=2e-5), name


def on_rank(rank, fed):
    from accelerate.state import PartialState

    os.environ |= {"ACCELERATE_USE_CPU": "true", "LOCAL_WORLD_SIZE": "2"}
    PartialState._reset_state()
    unet, scheduler = small()
    size = len(fed[0]) // 2
    own = [x0[rank * size :][:size] for x0 in fed]
    list(example("diffusers_training").train(unet, scheduler, own, len(own)))
    return torch.cat([p.detach().flatten() for p in unet.parameters()]).tolist()


def small():
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), norm_num_groups=4,
        layers_per_block=1, down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2), DDPMScheduler(num_train_timesteps=1000)


def test_the_diffusers_script_on_two_processes():
    """They draw numbers of their own: halves of a batch on two are the batch on one."""
    fed = [torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(k)) for k in range(3)]
    first, second = ranks.run(2, on_rank, fed)
    unet, scheduler = small()
    list(example("diffusers_training").train(unet, scheduler, fed, len(fed)))
    alone = torch.cat([p.detach().flatten() for p in unet.parameters()])
    # AdamW divides a gradient by its own size: where it is near zero, rounding, which differs
    # between processors, moves a weight by up to a step.
    difference = (torch.tensor(first) - alone).abs()
    assert first == second and difference.mean() < 1e-7 and difference.max() < 1e-4


def test_the_diffusers_script_on_pictures(tmp_path, capsys):
    from PIL import Image

    for k in range(4):
        Image.new("RGB", (20, 20), (60 * k, 0, 0)).save(tmp_path / f"{k}.png")
    example("diffusers_training").main([
        "--images", str(tmp_path), "--resolution", "8", "--steps", "3", "--batch-size", "2",
        "--out", str(tmp_path / "out")])
    assert "step 2: loss" in capsys.readouterr().out
    made = DDPMPipeline.from_pretrained(tmp_path / "out")
    assert made.unet.config.in_channels == 3 and not made.scheduler.config.clip_sample
