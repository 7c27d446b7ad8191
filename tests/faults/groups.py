"""The groups of the campaign, and what is imported before the first trial."""

from __future__ import annotations

import torch

from . import (
    damage,
    determinism,
    disks,
    environment,
    hostile,
    interruptions,
    numbers,
    pictures,
    ranks,
    usage,
    workers,
)
from .campaign import Group

GROUPS = {group.name: group for group in (
    Group("F1", "kill -9", 100, interruptions.kill),
    Group("F2", "signals", 40, interruptions.signalled),
    Group("F3", "full disks", 30, disks.fill),
    Group("F4", "truncated files", 200, damage.truncate),
    Group("F5", "flipped bits", 200, damage.flip),
    Group("F6", "hostile files", 24, hostile.attack),
    Group("F7", "odd pictures", 40, pictures.look),
    Group("F8", "wrong usage", 100, usage.misuse),
    Group("F9", "NaN and infinity", 30, numbers.poison),
    Group("F10", "lost ranks", 38, ranks.fail),
    Group("F11", "data workers", 18, workers.fail),
    Group("F12", "environment", 12, environment.spoil),
    Group("F13", "determinism", 50, determinism.repeat),
)}


def warm_up() -> None:
    """Import what runs import, so that the trials' processes start in milliseconds."""
    import diffusers  # noqa: F401
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel  # noqa: F401

    import robustdm.data.images  # noqa: F401
    import robustdm.evaluation.measure  # noqa: F401
    import robustdm.models.fuse  # noqa: F401
    from robustdm.data.digits import load_digits

    torch.set_num_threads(1)
    load_digits()
