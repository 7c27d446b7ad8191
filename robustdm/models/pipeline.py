"""Export to diffusers: a directory that ``DDPMPipeline.from_pretrained`` loads."""

import contextlib
import json
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path

import torch

from robustdm.errors import UsageError, importing
from robustdm.method.schedule import NoiseSchedule

NOISE = "noise.json"
"""File beside model_index.json with {"rms": standard deviation of the training data's noise}."""
# Tables of more would only fill the memory; the largest in use have some thousands.
_MAX_TIMESTEPS = 1 << 20


def scheduler_config(schedule: NoiseSchedule) -> dict:
    """Arguments that make a diffusers scheduler have this schedule's betas.

    The known schedules go by their diffusers names, which other programs can read; any other is
    written as its list of betas.
    """
    with importing("diffusers"):
        from diffusers import DDPMScheduler

    first, last = schedule.betas[0].item(), schedule.betas[-1].item()
    for named in (
        dict(beta_schedule="linear", beta_start=first, beta_end=last),
        dict(beta_schedule="squaredcos_cap_v2"),
    ):
        betas = DDPMScheduler(len(schedule), **named).betas.double()
        # diffusers keeps betas in float32.
        if torch.allclose(betas, schedule.betas, rtol=1e-6, atol=0):
            return dict(num_train_timesteps=len(schedule), **named)
    return dict(num_train_timesteps=len(schedule), trained_betas=schedule.betas.tolist())


def write_noise(directory: Path | str, rms: float) -> None:
    """Store the noise of the training data beside a pipeline."""
    text = json.dumps({"rms": rms}) + "\n"
    (Path(directory) / NOISE).write_text(text, encoding="utf-8")


def schedule_from(config: dict) -> NoiseSchedule:
    """The schedule of a diffusers scheduler's configuration, the inverse of `scheduler_config`.

    Args:
        config: ``num_train_timesteps``, ``beta_schedule``, ``beta_start``, ``beta_end`` and
            ``trained_betas``, or some of them; diffusers' defaults for the others.

    Raises:
        UsageError: if they do not make a schedule.
    """
    with importing("diffusers"):
        from diffusers import DDPMScheduler

    try:
        if not config.get("num_train_timesteps", 0) <= _MAX_TIMESTEPS:
            raise ValueError(f"num_train_timesteps is above {_MAX_TIMESTEPS}")
        scheduler = DDPMScheduler(**config)
        if scheduler.betas.ndim != 1:
            raise ValueError("trained_betas is no list of numbers")
    except Exception as error:  # whatever a wrong value meets first
        text = (str(error).strip().splitlines() or [""])[0][:200]
        raise UsageError(
            f"its scheduler cannot be built ({type(error).__name__}: {text})"
        ) from None
    kind = scheduler.config
    name = f"{kind.beta_schedule}({len(scheduler.betas)})"
    if kind.trained_betas is not None:
        return NoiseSchedule(kind.trained_betas, f"custom({len(scheduler.betas)})")
    if kind.beta_schedule == "linear":  # diffusers' own table has the precision of float32
        return NoiseSchedule(torch.linspace(kind.beta_start, kind.beta_end, len(scheduler.betas),
                                            dtype=torch.float64), name)
    return NoiseSchedule(scheduler.betas, name)


@contextlib.contextmanager
def replacing(directory: Path) -> Iterator[Path]:
    """A directory to fill, which then takes the place of another, complete.

    If filling it fails, or is interrupted, the old one is as it was.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    staging = directory.with_name(f".tmp-{uuid.uuid4().hex}-{directory.name}")
    staging.mkdir()
    mode = stat.S_IMODE(staging.stat().st_mode)
    try:
        yield staging
        # safetensors creates for the owner alone, whatever the umask.
        for path in staging.rglob("*"):
            path.chmod(mode if path.is_dir() else mode & 0o666)
        if directory.exists():
            shutil.rmtree(directory)
        os.replace(staging, directory)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def save_pipeline(
    unet,
    schedule: NoiseSchedule,
    directory: Path | str,
    *,
    clip_sample: bool,
    variance_type: str = "fixed_large",
    timestep_spacing: str = "leading",
    data_noise: float | None = None,
) -> None:
    """Write a network as a diffusers DDPMPipeline, in safetensors and JSON, of modes by the umask.

    The pipeline is complete before it takes its place: an interrupted export leaves the old one.

    Args:
        unet: a diffusers UNet2DModel that holds the weights to publish (EMA).
        schedule: the noise schedule it was trained with.
        directory: where; an older pipeline there is replaced.
        clip_sample: whether the pipeline clips the predicted image to [-1, 1].
        variance_type: "fixed_large", "fixed_small" or, of a network that predicts its variance,
            "learned_range".
        timestep_spacing: which timesteps a pipeline of fewer steps visits. "leading" is the one
            that all diffusers schedulers made from this configuration treat correctly: DDIM with
            "linspace" steps off its own list, DDPM with "trailing" adds noise to its result.
        data_noise: standard deviation of white noise in the training data, stored beside the
            pipeline for `CleanPipeline`; None stores none.

    Raises:
        UsageError: if unet is another kind of model, or the directory holds something else.
    """
    with importing("diffusers"):
        from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    if not isinstance(unet, UNet2DModel):
        raise UsageError(
            f"unet is a {type(unet).__name__}: a diffusers pipeline needs a UNet2DModel"
        )
    directory = Path(directory)
    occupied = directory.exists() and (not directory.is_dir() or any(directory.iterdir()))
    if occupied and not (directory / "model_index.json").is_file():
        raise UsageError(
            f"directory is {str(directory)!r}: it holds something other than a pipeline; "
            "name a new or empty one"
        )
    scheduler = DDPMScheduler(
        **scheduler_config(schedule),
        variance_type=variance_type,
        clip_sample=clip_sample,
        timestep_spacing=timestep_spacing,
        prediction_type="epsilon",
    )
    with replacing(directory) as staging:
        DDPMPipeline(unet=unet, scheduler=scheduler).save_pretrained(staging)
        if data_noise is not None:
            write_noise(staging, data_noise)
