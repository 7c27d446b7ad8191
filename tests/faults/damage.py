"""F4, truncated files, and F5, flipped bits."""

from __future__ import annotations

import logging
import shutil

import safetensors.torch

from robustdm import RunError
from robustdm.runs.checkpoint import (
    list_checkpoints,
    load_checkpoint,
    load_newest,
    verify,
)

from .campaign import Found, Trial
from .runs import call, config_of, ending, reference, resumed, train

FILES = ("model.safetensors", "ema_0.9.safetensors", "optimizer.safetensors", "state.json",
         "MANIFEST.json")
_WHOLE = 10
"""Every so many trials the run is also resumed to its end."""


def truncate(trial: Trial) -> Found:
    """F4: cut the end off one file of the newest checkpoint."""
    def cut(content: bytes) -> tuple[bytes, str]:
        length = trial.random.randrange(len(content))
        return content[:length], f"{length} of {len(content)} bytes left"

    return _damaged(trial, "truncation", cut)


def flip(trial: Trial) -> Found:
    """F5: flip one bit of one file of the newest checkpoint."""
    def flipped(content: bytes) -> tuple[bytes, str]:
        bit = trial.random.randrange(8 * len(content))
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        return bytes(changed), f"bit {bit % 8} of byte {bit // 8}"

    return _damaged(trial, "flipped bit", flipped)


def _damaged(trial: Trial, fault: str, change) -> Found:
    whole = reference("points", trial.shared)
    config = config_of("points", trial.folder / "run", trial.shared)
    shutil.copytree(whole.out, config.out)
    (before, _), (newest, place) = list_checkpoints(config.out / "checkpoints")
    file = place / FILES[trial.number % len(FILES)]
    content, where = change(file.read_bytes())
    file.write_bytes(content)

    warnings = []
    handler = logging.Handler()
    handler.emit = lambda record: warnings.append(record.getMessage())
    logging.getLogger("robustdm").addHandler(handler)
    problems = verify(place)
    fallback = load_newest(config.out / "checkpoints").step
    named = any(file.name in text for text in warnings)
    try:
        load_checkpoint(place)
        refused = False
    except RunError:
        refused = True
    found = bool(problems) and refused and named and fallback == before
    seen = (f"{'found' if found else 'NOT found'}, fell back from step {newest} to {fallback}"
            f"{': ' + problems[0] if problems else ''}")
    if file.suffix == ".safetensors":
        seen += f" (safetensors alone: {_alone(content)})"
    if trial.number % _WHOLE == 0:
        (config.out / "summary.json").unlink()
        done = call(lambda: train(resumed(config)))
        same = done.code == 0 and ending(config.out) == whole.end
        found &= same
        seen += "; resumed, final bits equal" if same else f"; resumed: {done.last}"
    return Found(fault, f"{file.name}, {where}", "found, file named, one before loaded", seen,
                 found)


def _alone(content: bytes) -> str:
    """What the safetensors library says of it, which keeps no checksums."""
    try:
        safetensors.torch.load(content)
    except Exception:
        return "noticed"
    return "not noticed"
