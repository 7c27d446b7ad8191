"""A residual MLP that predicts the noise of points: the network of the 3-D and subspace studies."""

import math

import torch
from torch import Tensor, nn


class PointMLP(nn.Module):
    """Residual SiLU layers, each shifted by an embedding of the timestep.

    Args:
        dim: number of coordinates of a point.
        width: width of the layers.
        depth: number of residual layers.
        embedding: number of sinusoidal features of the timestep, even.
    """

    def __init__(self, dim: int, width: int = 64, depth: int = 3, embedding: int = 128):
        super().__init__()
        frequencies = torch.exp(
            -math.log(10_000) * torch.arange(embedding // 2) / (embedding // 2)
        )
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.inlet = nn.Linear(dim, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.shifts = nn.ModuleList(nn.Linear(embedding, width) for _ in range(depth))
        self.outlet = nn.Linear(width, dim)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Predict the noise of ``x`` (B, dim) at timesteps ``t`` (B,); returns (B, dim)."""
        # In float32 at least: bfloat16 would round the timesteps above 256 to one another.
        wide = torch.promote_types(self.frequencies.dtype, torch.float32)
        angle = t.to(wide)[:, None] * self.frequencies.to(wide)
        time = torch.cat([angle.sin(), angle.cos()], dim=1).to(x.dtype)
        h = self.inlet(x)
        for layer, shift in zip(self.layers, self.shifts, strict=True):
            h = h + nn.functional.silu(layer(h) + shift(time))
        return self.outlet(h)
