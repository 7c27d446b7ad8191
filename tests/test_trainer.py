"""The training step: what it asks of a device, and the numbers that are kept of it."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from robustdm.data import base, batches
from robustdm.training import trainer as module
from robustdm.training.config import TrainConfig, preset_values
from robustdm.training.trainer import Trainer

SMALL = dict(block_channels=(8, 8), norm_groups=4, batch_size=8, num_points=200)


class Crossings(TorchDispatchMode):
    """Every operation on tensors of two devices (numbers aside), but for copies that do not wait.

    Reading a value back needs no watch: a meta tensor has none, so that it raises.
    """

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        tensors = [v for v in tree_leaves((args, kwargs, out)) if isinstance(v, torch.Tensor)]
        if len({v.device for v in tensors if v.ndim}) > 1 and not kwargs.get("non_blocking"):
            self.found.append(str(func))
        return out


@pytest.mark.parametrize("fields", [
    dict(dropout=0.1, accumulate=2, flip=True, holdout=0.1),
    dict(objective="ddpm"),
    dict(objective="outward_ran", beta_per="batch"),
    dict(data="plane", network="mlp", objective="invariance", ema_rates=(0.9, 0.99)),
])
@pytest.mark.parametrize("resident, precompute", [(True, True), (True, False), (False, False)])
def test_a_step_neither_mixes_devices_nor_waits_for_its_own(
    fields, resident, precompute, monkeypatch
):
    """On the meta device, the one accelerator that is everywhere: a step that runs on it creates
    every tensor where it is needed, and never needs a value on the host."""
    if not precompute:
        monkeypatch.setattr(base, "_PRECOMPUTE_ELEMENTS", 0)
    meta = torch.device("meta")
    monkeypatch.setattr(module, "resolve_device", lambda name: meta)
    config = TrainConfig(**{**preset_values(fields.get("data", "digits")), **SMALL, **fields})
    trainer = Trainer(config)
    trainer.data.resident = resident
    trainer.optimizer.step = lambda: None  # torch's fused update refuses the meta device
    stream = batches(trainer.data, config, 0, trainer.device)
    trainer.train_step(next(stream)[0])  # the first copies the tables and the data
    with Crossings() as crossings:
        for _ in range(2):
            x0, indices = next(stream)
            trainer.train_step(x0)
    assert crossings.found == []
    assert x0.device == meta and indices.device.type == "cpu" and trainer.step == 3
    with pytest.raises(RuntimeError, match="meta"):
        trainer.window()  # the statistics do wait: once a line, not once a step


def test_the_window_holds_means_over_its_steps_and_bands():
    config = TrainConfig(**{**preset_values("plane"), **SMALL, "clip_norm": 1e-3})
    trainer = Trainer(config)
    fits, regs, times, norms = [], [], [], []
    original = Trainer.gradients

    def spy(self, *args):
        total, t, fit, reg = original(self, *args)
        norms.append(torch.stack([p.grad.norm() for p in self.model.parameters()]).norm())
        times.append(t), fits.append(fit), regs.append(reg)
        return total, t, fit, reg

    trainer.gradients = spy.__get__(trainer)
    x0 = trainer.data.batch(torch.arange(64))
    for factor in (1.0, float("nan"), 1.0, 1.0):
        trainer.train_step(x0 * factor)
    kept = [0, 2, 3]
    record = trainer.window()
    fit, reg = (torch.cat([values[k] for k in kept]) for values in (fits, regs))
    assert record["step"] == 4 and record["skipped"] == 1
    assert record["fit"] == pytest.approx(fit.mean().item(), rel=1e-5)
    assert record["reg"] == pytest.approx(reg.mean().item(), rel=1e-5)
    assert record["loss"] == pytest.approx((fit + reg).mean().item(), rel=1e-5)
    # The norm is that before clipping.
    assert record["grad_norm"] == pytest.approx(
        torch.stack([norms[k] for k in kept]).mean().item(), rel=1e-5)
    t = torch.cat([times[k] for k in kept])
    for band in range(4):
        inside = (t >= 250 * band) & (t < 250 * (band + 1))
        assert record[f"fit_band{band}"] == pytest.approx(fit[inside].mean().item(), rel=1e-5)
    assert not any("band" in key or key == "loss" for key in trainer.window())


def test_skips_in_a_row_are_counted_anew_after_a_good_step():
    trainer = Trainer(TrainConfig(**{**preset_values("plane"), **SMALL}))
    x0 = trainer.data.batch(torch.arange(8))
    seen = []
    for factor in (1.0, float("nan"), float("inf"), 1.0, float("nan")):
        trainer.train_step(x0 * factor)
        seen.append((int(trainer.skipped), int(trainer.skipped_in_a_row)))
    assert seen == [(0, 0), (1, 1), (2, 2), (2, 0), (3, 1)]
