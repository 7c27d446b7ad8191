"""robustdm's fused layers in a stock diffusers UNet: the same numbers, in less time.

    python examples/fuse_diffusers.py
    python examples/fuse_diffusers.py --model google/ddpm-cifar10-32 --batch-size 64

Prints how far output and gradients of the fused network are from those of the stock one, and the
median time of a forward and backward pass of each.
"""

import argparse
import copy
import statistics
import time

import torch
from diffusers import UNet2DModel

import robustdm
from robustdm.models.pretrained import network_of, open_source


def step(unet: UNet2DModel, x: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and gradient of the first convolution's weights, of a mean square loss."""
    unet.zero_grad(set_to_none=True)
    out = unet(x, t).sample
    out.square().mean().backward()
    return out.detach(), unet.conv_in.weight.grad


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Parse flags, compare, print; returns what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="diffusers UNet2DModel: a folder or a name on the Hub")
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--channels", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.model:
        # Not from_pretrained: of a config.json as old as ddpm-cifar10-32's it makes other heads.
        unet = network_of(open_source(args.model, field="--model")).train().requires_grad_(True)
    else:
        levels = len(args.channels)
        unet = UNet2DModel(
            sample_size=args.side, block_out_channels=args.channels, layers_per_block=2,
            down_block_types=["DownBlock2D"] * levels, up_block_types=["UpBlock2D"] * levels)
    stock = unet.to(device, memory_format=torch.channels_last)
    fused = robustdm.fuse(copy.deepcopy(stock))

    side, channels = stock.config.sample_size or args.side, stock.config.in_channels
    x = torch.randn(args.batch_size, channels, side, side, device=device)
    x = x.contiguous(memory_format=torch.channels_last)
    t = torch.randint(1000, (args.batch_size,), device=device)
    found = {}
    both = zip(step(stock, x, t), step(fused, x, t), strict=True)
    for name, (a, b) in zip(("output", "gradient"), both, strict=True):
        found[name] = ((a - b).norm() / a.norm()).item()
        print(f"{name}: relative difference {found[name]:.1e}")

    times: dict[str, list[float]] = {"stock": [], "fused": []}
    for _ in range(args.repeats):
        for name, network in (("stock", stock), ("fused", fused)):
            begin = time.perf_counter()
            step(network, x, t)
            if device == "cuda":
                torch.cuda.synchronize()
            times[name].append(1e3 * (time.perf_counter() - begin))
    for name, measured in times.items():
        found[name] = statistics.median(measured)
        print(f"{name}: {found[name]:.1f} ms")
    print(f"fused is {found['stock'] / found['fused']:.2f} times as fast on this {device}")
    return found


if __name__ == "__main__":
    main()
