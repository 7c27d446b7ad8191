"""Training as the paper's codebase does it: the baseline of the step suite.

Written from the paper and from improved-diffusion's habits, independently of the package: a plain
UNet in float32, NCHW, noise from `torch.randn`, one optimizer call and a Python loop over the
tensors for the moving average, and the log values of every step read back at once.

Source: Briglia et al. 2026, Algorithm 1; Nichol & Dhariwal 2021, train_util.py, for what is logged.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

OMEGA, GAMMA, LAMBDA = 2.0, 8 / 255, 0.3
BETAS = (0.5, 2.0)
METHODS = ("ddpm", "robust_ran", "robust_adv")


@dataclass
class Numbers:
    """The random numbers of a step: t (B,), eps like x0, beta (B,), unit like x0 in (-1, 1)."""

    t: Tensor
    eps: Tensor
    beta: Tensor
    unit: Tensor


class PaperLoop:
    """A network with its optimizer and average.

    Args:
        model: diffusers UNet2DModel; its weights are trained in place.
        method: one of `METHODS`.
        lr: learning rate.
        ema_rate: decay of the moving average.
    """

    def __init__(self, model: nn.Module, method: str, lr: float = 1e-4, ema_rate: float = 0.9999):
        self.model, self.method, self.ema_rate = model.train(), method, ema_rate
        self.average = copy.deepcopy(model)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
        betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
        self.abar = torch.cumprod(1 - betas, 0)
        self.logged: dict[str, float] = {}

    def numbers(self, x0: Tensor) -> Numbers:
        """Fresh random numbers for a batch."""
        size, device = len(x0), x0.device
        return Numbers(
            torch.randint(0, len(self.abar), (size,), device=device), torch.randn_like(x0),
            torch.empty(size, device=device).uniform_(*BETAS), torch.rand_like(x0) * 2 - 1,
        )

    def loss(self, x0: Tensor, n: Numbers) -> tuple[Tensor, Tensor]:
        """The loss of every sample, and its squared error alone; (B,) both."""
        def spread(values: Tensor) -> Tensor:
            return values.to(x0).view(-1, 1, 1, 1)

        abar = self.abar.to(x0.device)[n.t]
        s = (1 - abar).sqrt()
        x = spread(abar.sqrt()) * x0 + spread(s) * n.eps
        clean = self.model(x, n.t).sample
        fit = (clean - n.eps).square().flatten(1).mean(1)
        if self.method == "ddpm":
            return fit, fit
        r = spread(s ** (OMEGA - 1) + GAMMA * n.beta / s)
        delta = r * n.unit
        if self.method == "robust_adv":
            start = delta.clone().requires_grad_()
            moved = self.model(x + spread(s) * start, n.t).sample
            distance = (moved - clean.detach()).square().sum()
            (gradient,) = torch.autograd.grad(distance, start)
            delta = (delta + r / math.sqrt(3) * gradient.sign()).maximum(-r).minimum(r)
        adversarial = self.model(x + spread(s) * delta, n.t).sample
        residual = (adversarial - clean - delta).square().flatten(1).mean(1)
        weight = LAMBDA * math.sqrt(3) / (n.beta * s ** (OMEGA - 1))
        return fit + weight.to(fit) * residual, fit

    def step(self, x0: Tensor) -> float:
        """One optimizer step; returns the loss."""
        numbers = self.numbers(x0)
        self.optimizer.zero_grad()
        losses, fit = self.loss(x0, numbers)
        losses.mean().backward()
        # What goes into the log: quartiles of t, and the norm of the gradient.
        for name, values in (("loss", losses), ("mse", fit)):
            self.logged[name] = values.mean().item()
            for t, value in zip(numbers.t.cpu().tolist(), values.detach().cpu().tolist(),
                                strict=True):
                self.logged[f"{name}_q{4 * t // len(self.abar)}"] = value
        squared = 0.0
        for p in self.model.parameters():
            squared += (p.grad**2).sum().item()
        self.logged["grad_norm"] = math.sqrt(squared)
        self.optimizer.step()
        with torch.no_grad():
            for a, p in zip(self.average.parameters(), self.model.parameters(), strict=True):
                a.mul_(self.ema_rate).add_(p, alpha=1 - self.ema_rate)
        return self.logged["loss"]
