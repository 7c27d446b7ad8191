"""Flags: those that several commands share, and how a dataclass of flags is read."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import sys
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import tyro

Config = TypeVar("Config")


@dataclass(frozen=True, kw_only=True)
class ChainFlags:
    """The timesteps that sampling visits."""

    steps: int | None = None
    """Timesteps to visit; all if not given."""
    spacing: Literal["linspace", "leading", "trailing", "truncate"] = "linspace"
    """Which timesteps, as named in diffusers; truncate visits the cleanest only, and so starts from
    pure noise in the middle of the chain."""
    variance: Literal["fixed_large", "fixed_small"] = "fixed_large"
    """ddpm: noise of a step, beta or the posterior variance."""


@dataclass(frozen=True, kw_only=True)
class SamplingFlags(ChainFlags):
    """How samples are drawn."""

    sampler: Literal["ddpm", "ddim"] = "ddpm"
    """ddpm is ancestral sampling."""
    eta: float = 0.0
    """ddim: noise of a step, 0 (none) to 1."""
    baseline: Literal["none", "known", "shrink", "blur"] = "none"
    """For a plain DDPM trained on noisy data. known: end the chain at the noise of the data, and
    predict clean data there; shrink: denoise as if there were more noise; blur: blur the samples.
    Costs no training."""
    baseline_strength: float | None = None
    """known: standard deviation of the noise, root mean square over all training items (measured);
    shrink: the lam of robust training to imitate (0.3); blur: standard deviation in pixels
    (0.5)."""
    baseline_shape: tuple[float, float] | None = None
    """shrink: omega and gamma of robust training to imitate (2 and 8/255)."""
    baseline_stop: float | None = None
    """known: where the chain ends, in units of the strength (1); less keeps more detail."""
    baseline_safety: float | None = None
    """known: share of the strength to correct for (0.9)."""


@dataclass(frozen=True, kw_only=True)
class DrawFlags:
    """What the samples are computed with."""

    ema: float | None = None
    """Decay rate of the averaged weights to use; the first of the run's if not given."""
    batch_size: int | None = None
    """Samples computed at once: speed and memory, not the samples. If not given: 128 images of
    3x32x32, and of others as many as hold as many numbers, from 16 to 2048."""
    seed: int = 0
    """Sample k of a seed is the same whatever --num and --batch-size."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""


@dataclass(frozen=True, kw_only=True)
class ComputeFlags(DrawFlags):
    """What the samples are computed with."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 rounds weights and activations: faster, and samples change a little."""
    compile: bool = False
    """Compile the network with torch.compile; falls back to eager where that cannot work."""


@dataclass(frozen=True, kw_only=True)
class ExtractorFlags:
    """The feature space in which images are compared."""

    features: Literal["auto", "pixels", "digits", "resnet20", "resnet56", "inception",
                      "dinov2"] = "auto"
    """Feature space: auto is the digits' classifier for 8x8 grey images, else pixels."""
    weights: Path | None = None
    """Weights of the feature extractor (resnet20, resnet56, inception)."""


@dataclass(frozen=True, kw_only=True)
class FeatureFlags(ExtractorFlags):
    """The feature space in which images are compared."""

    quantise: bool | None = None
    """Round samples to 8 bits before the features; by default all but pixels and digits do."""


def parse_flags(config: type[Config], argv: Sequence[str] | None, *, prog: str, description: str,
                default: Config | None = None) -> Config:
    """Read flags into a dataclass; ``--help`` has a section for each of its base classes.

    Args:
        config: the dataclass; every field has a docstring.
        argv: the flags; those of the process if None.
        default: where a flag is not given; the defaults of the class if None.

    Raises:
        SystemExit: for a wrong flag, with code 2.
    """
    hints = typing.get_type_hints(config, include_extras=True)
    left = {field.name: field for field in dataclasses.fields(config)}

    def take(names) -> list[tuple]:
        flags = []
        for field in [left.pop(name) for name in names if name in left]:
            value = dataclasses.field(default=field.default) if default is None else (
                dataclasses.field(default_factory=functools.partial(getattr, default, field.name)))
            told = Annotated[hints[field.name], tyro.conf.arg(help=_help(config, field.name))]
            flags.append((field.name, told, value))
        return flags

    flags = take(config.__dict__.get("__annotations__", ()))
    sections = {}
    for base in filter(dataclasses.is_dataclass, reversed(config.__bases__)):
        title = base.__name__.removesuffix("Flags").removesuffix("Fields").lower()
        sections[title] = dataclasses.make_dataclass(title, take(base.__dataclass_fields__))
        # With the text given here tyro does not search source files for it, which takes long.
        flags.append((title, Annotated[sections[title], tyro.conf.OmitArgPrefixes,
                                       tyro.conf.arg(help=base.__doc__)]))
    parsed = vars(tyro.cli(dataclasses.make_dataclass("Flags", flags, kw_only=True), args=argv,
                           prog=prog, description=description))
    for title in sections:
        parsed |= vars(parsed.pop(title))
    return config(**parsed)


def _help(config: type, name: str) -> str:
    owner = next(c for c in config.__mro__ if name in c.__dict__.get("__annotations__", ()))
    return _docstrings(owner.__module__)[owner.__name__, name]


@functools.cache
def _docstrings(module: str) -> dict[tuple[str, str], str]:
    """The docstring of every field of every class: tyro would parse the file for each class."""
    return {
        (node.name, field.target.id): " ".join(text.value.value.split())
        for node in ast.parse(inspect.getsource(sys.modules[module])).body
        if isinstance(node, ast.ClassDef)
        for field, text in pairwise(node.body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    }
