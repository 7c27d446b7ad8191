"""A diffusers and accelerate training script, made robust by three lines (marked "robustdm").

    python examples/diffusers_training.py --steps 500
    accelerate launch examples/diffusers_training.py --images my_pictures --steps 20000

Without --images it trains on scikit-learn's digits, to which it adds noise. Needs accelerate
(pip install accelerate).
"""

import argparse
from collections.abc import Iterable, Iterator
from itertools import chain, repeat
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.optimization import get_constant_schedule_with_warmup
from PIL import Image
from torch.utils.data import DataLoader, Dataset

import robustdm  # robustdm, line 1


def train(
    unet: UNet2DModel, scheduler: DDPMScheduler, batches: Iterable[torch.Tensor], steps: int,
    lr: float = 2e-4, warmup: int = 0,
) -> Iterator[float]:
    """Train on batches (B, C, H, W) in [-1, 1], again and again; yields the loss of every step."""
    accelerator = Accelerator()
    optimizer = torch.optim.AdamW(unet.parameters(), lr, weight_decay=0.0)
    rate = get_constant_schedule_with_warmup(optimizer, warmup)
    unet, optimizer, rate, batches = accelerator.prepare(unet, optimizer, rate, batches)
    schedule = robustdm.NoiseSchedule.from_diffusers(scheduler)
    objective = robustdm.Objective("robust_adv", schedule)  # robustdm, line 2
    unet.train()
    for step, x0 in zip(range(steps), chain.from_iterable(repeat(batches)), strict=False):
        x0 = x0.to(accelerator.device)
        # What stood here:
        #   noise = torch.randn_like(x0)
        #   t = torch.randint(len(schedule), (len(x0),), device=x0.device)
        #   loss = F.mse_loss(unet(scheduler.add_noise(x0, noise, t), t).sample, noise)
        first = accelerator.process_index * len(x0)  # each process draws numbers of its own
        draw = objective.draw(x0, seed=0, step=step, first_index=first)
        loss = objective(unet, x0, draw).total  # robustdm, line 3
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        yield loss.item()


class Pictures(Dataset):
    """A folder of pictures as (3, side, side) float tensors in [-1, 1]."""

    def __init__(self, folder: Path, side: int):
        self.files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".png", ".jpg"))
        self.side = side

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> torch.Tensor:
        picture = Image.open(self.files[index]).convert("RGB").resize((self.side, self.side))
        return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1) / 127.5 - 1


def noisy_digits() -> torch.Tensor:
    """(1797, 1, 8, 8): handwritten digits with noise of standard deviation 0.2."""
    from sklearn.datasets import load_digits

    clean = torch.from_numpy(load_digits().images).float()[:, None] / 8 - 1
    return clean + 0.2 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))


def main(argv: list[str] | None = None) -> None:
    """Parse flags, train, save a pipeline."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, help="folder of pictures; the digits if not given")
    parser.add_argument("--resolution", type=int, default=32)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("runs/diffusers_training"))
    args = parser.parse_args(argv)
    data = Pictures(args.images, args.resolution) if args.images else noisy_digits()
    channels, side = data[0].shape[0], data[0].shape[-1]
    unet = UNet2DModel(
        sample_size=side, in_channels=channels, out_channels=channels, layers_per_block=1,
        block_out_channels=(32, 48), norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"))
    scheduler = DDPMScheduler(num_train_timesteps=1000, clip_sample=False)
    if len(data) < args.batch_size:
        parser.error(f"--batch-size is {args.batch_size}, but there are {len(data)} images")
    loader = DataLoader(data, args.batch_size, shuffle=True, drop_last=True)
    losses = train(unet, scheduler, loader, args.steps, warmup=args.steps // 10)
    main_process = Accelerator().is_main_process
    for step, loss in enumerate(losses):
        if main_process and (step % 50 == 0 or step == args.steps - 1):
            print(f"step {step}: loss {loss:.4f}", flush=True)
    if main_process:
        DDPMPipeline(unet, scheduler).save_pretrained(args.out)
        print(f"pipeline: {args.out}")


if __name__ == "__main__":
    main()
