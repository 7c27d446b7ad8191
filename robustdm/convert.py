"""Entry point: `python -m robustdm.convert IN OUT` writes a model in another format."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from robustdm.cli import guard
from robustdm.errors import RunError, UsageError
from robustdm.runs.groups import MOST_TIMESTEPS

TOLERANCE = 1e-4
"""Largest relative difference between the outputs of two formats that rounding explains."""


@dataclass(frozen=True)
class ConvertConfig:
    """What to convert, and what its weights do not tell."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="IN")]
    """A run directory, a diffusers directory or its name on the Hub, or an improved-diffusion
    .pt."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """A new directory for a diffusers pipeline, or a new .pt file for improved-diffusion."""
    verify: bool = False
    """Read OUT again and compare its outputs with IN's, each computed as its own library does."""
    ema: float | None = None
    """run: decay rate of the average to convert; the first of the run's if not given."""
    num_heads: int | None = None
    """Attention heads, where IN does not tell (improved-diffusion)."""
    resolution: int | None = None
    """Side of the images in pixels, where IN does not tell (improved-diffusion)."""
    schedule: Literal["linear", "cosine"] | None = None
    """Noise schedule, where IN does not tell (improved-diffusion)."""
    timesteps: int | None = None
    """Its length, 1000 if not given."""
    rescale_timesteps: bool = True
    """improved-diffusion with other than 1000 timesteps: its network was told t * 1000 / timesteps,
    as is the default there, and not t."""
    allow_pickle: bool = False
    """Read pickle files (.pt, .bin) too; tensors only, no code is run."""


def main(argv: Sequence[str] | None = None) -> None:
    """Parse flags, convert, compare.

    Raises:
        UsageError: for a wrong flag, model or place.
        RunError: if the outputs differ.
    """
    convert(tyro.cli(
        ConvertConfig, args=argv, prog="python -m robustdm.convert",
        description="Convert a model between robustdm, diffusers and improved-diffusion.",
    ))


def convert(config: ConvertConfig) -> float | None:
    """Write a model in another format.

    Returns:
        With ``verify`` the largest difference between the outputs of IN and OUT, else None.

    Raises:
        UsageError: if IN is no model that can be read, OUT exists, or its format has no exact
            counterpart of the network.
        RunError: if OUT cannot be written, or its outputs differ from IN's.
    """
    if config.out.exists():
        raise UsageError(f"out is {str(config.out)!r}: it exists; name a new directory or file")
    if config.out.suffix not in ("", ".pt"):
        raise UsageError(f"out is {str(config.out)!r}: name a directory (a diffusers pipeline) or "
                         "a file ending in .pt (improved-diffusion)")

    if config.timesteps is not None and not 1 <= config.timesteps <= MOST_TIMESTEPS:
        raise UsageError(f"timesteps is {config.timesteps}: it must be from 1 to "
                         f"{MOST_TIMESTEPS}")

    from safetensors import SafetensorError

    from robustdm.models.pipeline import save_pipeline
    from robustdm.models.pretrained import describe, network_of, open_source

    source = open_source(
        config.source, allow_pickle=config.allow_pickle, num_heads=config.num_heads,
        resolution=32 if config.resolution is None else config.resolution,
        timesteps=1000 if config.timesteps is None else config.timesteps,
        rescale_timesteps=config.rescale_timesteps, ema=config.ema, field="source",
    )
    to_file = config.out.suffix == ".pt"
    _check(source, config, to_file)
    schedule = _schedule(source, config)
    heads = None
    try:
        if to_file:
            heads = _write_improved(source, config.out)
        else:
            save_pipeline(
                network_of(source), schedule, config.out, variance_type=source.variance_type,
                clip_sample=source.fields.get("clip_samples", True),
            )
    except (OSError, SafetensorError, RuntimeError) as error:  # the latter two of a full disk, too
        why = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise RunError(f"out is {str(config.out)!r}: it was not written ({why})") from error
    print("\n".join(describe(source, schedule)))
    print(f"written to {config.out}")
    if not config.verify:
        return None
    try:
        return _verify(source, schedule, heads, config)
    except BaseException:
        if to_file:
            config.out.unlink()
        else:
            shutil.rmtree(config.out)
        raise


def _verify(source, schedule, heads: int | None, config: ConvertConfig) -> float:
    """The largest difference between the outputs of IN and OUT."""
    from robustdm.models.pretrained import difference, network_of, open_source

    table = source.unet["num_train_timesteps"]
    written = open_source(
        str(config.out), allow_pickle=True, num_heads=heads, timesteps=table or 1000, field="out"
    )
    side = source.unet["sample_size"] or 32
    shape = (source.unet["in_channels"], *(side if isinstance(side, list) else (side, side)))
    reference = source.reference() if source.reference else network_of(source)
    found, largest = difference(reference, written.reference(), shape,
                                len(schedule or ()) or 1000)
    text = f"largest difference {found:.2g}, of outputs up to {largest:.2g}"
    if not found <= TOLERANCE * max(1.0, largest):
        raise RunError(f"{config.out} does not compute what {config.source} does: {text}; it "
                       "was removed")
    print(f"verified: {text}")
    return found


def _check(source, config: ConvertConfig, to_file: bool) -> None:
    def refuse(why: str) -> None:
        raise UsageError(f"source is {config.source!r}: {why}")

    if source.unet is None:
        refuse("a network for points has no counterpart in diffusers or improved-diffusion")
    told = source.scheduler is not None or "schedule" in source.fields
    sized = source.format != "improved-diffusion"
    if told and config.schedule is not None:
        refuse("it tells its noise schedule itself; leave --schedule out")
    if told and config.timesteps is not None:
        refuse("it tells the length of its noise schedule itself; leave --timesteps out")
    if sized and config.resolution is not None:
        refuse("it tells the size of its images itself; leave --resolution out")
    if to_file and not sized:
        refuse("it is in that format already; name a directory for a diffusers pipeline")
    if not to_file and not sized and config.resolution is None:
        refuse("it does not tell the size of its images; give --resolution, as it was trained with")
    if not to_file and not told and config.schedule is None:
        refuse("it does not tell its noise schedule; give --schedule linear or cosine, and "
               "--timesteps, as it was trained with")


def _schedule(source, config: ConvertConfig):
    """The noise schedule, None where nobody tells it."""
    from robustdm.method.schedule import NoiseSchedule
    from robustdm.models.pipeline import schedule_from

    if source.scheduler:
        return schedule_from(source.scheduler)
    kind = source.fields.get("schedule", config.schedule)
    if kind is None:
        return None
    make = NoiseSchedule.cosine if kind == "cosine" else NoiseSchedule.linear
    return make(source.fields.get("timesteps", config.timesteps or 1000))


def _write_improved(source, out: Path) -> int:
    """Write the state dict; returns the number of attention heads, which it does not tell."""
    import torch

    from robustdm.models.improved import check_exact, from_diffusers

    try:
        heads = check_exact(source.unet, source.weights)
    except UsageError as error:
        raise UsageError(f"source is {source.name!r}: {error}") from None
    weights = from_diffusers(source.weights, source.unet)
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = out.with_name(f".tmp-{uuid.uuid4().hex}-{out.name}")
    try:
        torch.save({name: value.contiguous() for name, value in weights.items()}, staging)
        os.replace(staging, out)
    finally:
        staging.unlink(missing_ok=True)
    return heads


if __name__ == "__main__":
    guard(main)
