"""A plain PyTorch loop on 3-D points: a noisy plane, which DDPM learns with its noise.

    python examples/points.py                       # robust_adv
    python examples/points.py --objective ddpm

Prints how far from the plane the samples are on average; the training points are 0.08.
"""

import argparse

import torch

import robustdm
from robustdm.method.sampling import sample
from robustdm.models import PointMLP


def noisy_plane(count: int) -> torch.Tensor:
    """(count, 3): uniform in a square of the plane z = 0, with noise of sd 0.1 across it."""
    g = torch.Generator().manual_seed(0)
    points = 2 * torch.rand(count, 3, generator=g) - 1
    points[:, 2] = 0.1 * torch.randn(count, generator=g)
    return points


def main(argv: list[str] | None = None) -> float:
    """Parse flags, train, sample; returns the mean distance from the plane."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--objective", default="robust_adv")
    parser.add_argument("--steps", type=int, default=2000)
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    data = noisy_plane(10_000)
    model = PointMLP(3, width=64, depth=3)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    schedule = robustdm.NoiseSchedule.linear(1000)
    objective = robustdm.Objective(args.objective, schedule)
    for step in range(args.steps):
        x0 = data[torch.randint(len(data), (512,))]
        loss = objective(model, x0, objective.draw(x0, seed=0, step=step))
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        if step % 500 == 0:
            print(f"step {step}: fit {loss.fit.mean():.3f}, regulariser "
                  f"{loss.reg.mean():.4f}", flush=True)
    samples = sample(model.eval(), schedule, (3,), num=1000, batch_size=1000, steps=200)
    distance = samples[:, 2].abs().mean().item()
    print(f"mean distance from the plane: {distance:.3f} (training points: "
          f"{data[:, 2].abs().mean():.3f})")
    return distance


if __name__ == "__main__":
    main()
