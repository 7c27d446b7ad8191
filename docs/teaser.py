"""The picture at the top of the README, from the arms of the digits study.

    python -m robustdm.reproduce digits --seeds 1
    python docs/teaser.py runs/reproduce/arms

Rows: clean digits, the same digits as training sees them, and the first samples of seed 0 of DDPM
and of robust_adv. Nothing is picked; the clean digits are the first of the training set.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load_file

from robustdm.cli import guard
from robustdm.data import load_data
from robustdm.errors import UsageError
from robustdm.reporting.images import grid
from robustdm.reporting.run_page import REDUCED_CONTRAST
from robustdm.runs.config import TrainConfig
from robustdm.runs.presets import preset_values

COLUMNS, SCALE, GAP, LABELS = 11, 8, 4, 156  # pictures; pixels


def samples(arms: Path, name: str) -> torch.Tensor:
    """(N, 1, 8, 8) of the newest arm of that name with seed 0.

    Raises:
        UsageError: if there is none.
    """
    found = sorted(arms.glob(f"digits-{name}-seed0-*-samples.safetensors"),
                   key=lambda path: path.stat().st_mtime)
    if not found:
        raise UsageError(f"arms is {str(arms)!r}: it holds no samples of {name}; run "
                         "python -m robustdm.reproduce digits first")
    return load_file(found[-1])["samples"]


def main(argv: list[str] | None = None) -> None:
    """Parse flags, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("arms", type=Path, help="the directory `arms` beside the study's own")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("teaser.png"))
    args = parser.parse_args(argv)
    config = TrainConfig(**preset_values("digits"))
    data, shown = load_data(config), torch.arange(COLUMNS)
    rows = {
        "clean digits": data.clean(shown, "cpu"),
        f"training data:\n{config.corrupt_fraction:.0%} noisy": data.batch(shown, "cpu"),
        "samples of\nplain DDPM": samples(args.arms, "DDPM")[:COLUMNS],
        "samples of\nrobust_adv": samples(args.arms, "robust_adv-ray")[:COLUMNS],
    }
    # At full contrast the noise of dark pixels would be clipped away.
    sheet = grid(REDUCED_CONTRAST * torch.cat(list(rows.values())), COLUMNS, SCALE, GAP)[..., 0]
    picture = Image.fromarray(np.pad(sheet, ((0, 0), (LABELS, 0)), constant_values=255))
    draw, height = ImageDraw.Draw(picture), (picture.height + GAP) // len(rows)
    for number, label in enumerate(rows):
        draw.text((4, number * height + (height - GAP) // 2), label, fill=0, anchor="lm",
                  font=ImageFont.load_default(18), spacing=6)
    picture.save(args.out, optimize=True)


if __name__ == "__main__":
    guard(main)
