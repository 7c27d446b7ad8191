"""From a configuration, or a finished run's directory, to the objects it stands for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from robustdm.errors import RunError, UsageError
from robustdm.method.objectives import Objective
from robustdm.method.perturbation import Perturbation
from robustdm.method.schedule import NoiseSchedule
from robustdm.models import build_model
from robustdm.models.pipeline import schedule_from
from robustdm.models.weights import averaged_weights, check_model_shapes, sample_kind
from robustdm.runs.checkpoint import load_checkpoint, load_newest
from robustdm.runs.config import TrainConfig
from robustdm.runs.rundir import read_config


def schedule_of(config: TrainConfig) -> NoiseSchedule:
    """The noise schedule of a configuration; of one that starts from a model, that model's."""
    if config.pretrained and config.pretrained["scheduler"]:
        return schedule_from(config.pretrained["scheduler"])
    make = NoiseSchedule.linear if config.schedule == "linear" else NoiseSchedule.cosine
    return make(config.timesteps)


def perturbation_of(config: TrainConfig) -> Perturbation:
    """The perturbation of a configuration."""
    return Perturbation(
        config.omega, config.gamma, config.lam, config.lambda_mode, config.beta_range
    )


def objective_of(config: TrainConfig) -> Objective:
    """The training objective of a configuration."""
    return Objective(
        config.objective,
        schedule_of(config),
        perturbation_of(config),
        backend=config.backend,
        beta_per=config.beta_per,
        detach_clean=config.detach_clean,
        share_dropout=config.share_dropout,
        lambda_max=config.lambda_max,
        attack=config.attack,
        reg_fraction=config.reg_fraction,
        reg_every=config.reg_every,
        reg_from=config.steps - round(config.at_last * config.steps),
        attack_fraction=config.attack_fraction,
    )


@dataclass(frozen=True)
class LoadedRun:
    """A trained network and what is needed to use it.

    Attributes:
        config: the run's configuration.
        model: the network with averaged weights, in eval mode.
        schedule: the noise schedule it was trained with.
        shape: shape of one sample.
        is_image: whether samples are images in [-1, 1].
        step: optimizer steps behind the weights.
    """

    config: TrainConfig
    model: nn.Module
    schedule: NoiseSchedule
    shape: tuple[int, ...]
    is_image: bool
    step: int


def load_run(
    directory: Path | str,
    ema: float | None = None,
    device: str | torch.device = "cpu",
    checkpoint: int | None = None,
) -> LoadedRun:
    """Load the averaged weights of a run.

    Args:
        directory: run directory of `robustdm.train`.
        ema: decay rate of the average to load; the first of the run's if None.
        device: where to put the network.
        checkpoint: step of the checkpoint to load; the newest sound one if None.

    Raises:
        UsageError: if the directory is no run, or has no such average or checkpoint.
        RunError: if it has no sound checkpoint.
    """
    directory = Path(directory)
    config = TrainConfig.from_dict(read_config(directory), str(directory / "config.yaml"))
    rate = config.ema_rates[0] if ema is None else ema
    if rate not in config.ema_rates:
        raise UsageError(f"ema is {rate}: {directory} has averages of {config.ema_rates}")
    name = f"ema_{rate}"
    root = directory / "checkpoints"
    if checkpoint is None:
        found = load_newest(root, names=[name], device=device)
    else:
        found = load_checkpoint(root / f"step-{checkpoint:08d}", names=[name], device=device)
    if found is None:
        raise RunError(f"{directory} has no checkpoint yet: train for at least one interval")
    shape, is_image = sample_kind(found)
    weights = averaged_weights(found, name, config, device)
    with torch.device("meta"):  # compared before it takes memory
        check_model_shapes(build_model(config, shape), weights)
    model = build_model(config, shape).to(device)
    model.load_state_dict(weights)
    model.eval().requires_grad_(False)
    return LoadedRun(config, model, schedule_of(config), shape, is_image, found.step)
