"""AdamW that skips non-finite updates on the device, and moving averages of the weights."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class EMA:
    """Exponential moving average of a network's weights, kept as a network of its own.

    The decay rises as min(rate, (1 + n) / (10 + n)) over the updates n, so that a short run does
    not average in its random start.

    Args:
        model: the network to follow.
        rate: decay per step, from 0 to below 1.

    Source: Ho et al. 2020, appendix B (rate 0.9999); warm-up as in TensorFlow's moving averages.
    """

    def __init__(self, model: nn.Module, rate: float):
        self.rate = rate
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self._source = list(model.parameters())
        self._average = list(self.model.parameters())

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average towards the weights after optimizer step ``step`` (from 0)."""
        decay = min(self.rate, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._average, self._source, 1 - decay)


class SkippingAdamW(torch.optim.AdamW):
    """AdamW that leaves weights and moments untouched when told that a gradient is not finite.

    The decision is a device tensor, so a bad step costs no wait for the device.
    """

    def __init__(self, model: nn.Module, lr: float, weight_decay: float):
        super().__init__(model.parameters(), lr=lr, weight_decay=weight_decay, fused=True)

    @torch.no_grad()
    def clip_and_step(self, lr: float, clip_norm: float, loss: Tensor) -> tuple[Tensor, Tensor]:
        """Clip the gradients by their total norm and step, unless loss or norm is not finite.

        Args:
            lr: learning rate of this step.
            clip_norm: largest norm; 0 does not clip.
            loss: scalar loss of the step.

        Returns:
            The norm before clipping, and 1.0 where the step was skipped, else 0.0 (both scalars).
        """
        parameters = [p for group in self.param_groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, clip_norm or float("inf"))
        for group in self.param_groups:
            group["lr"] = lr
        skipped = (~(torch.isfinite(loss) & torch.isfinite(norm))).float()
        # The hook that gradient scalers use: a fused step does nothing where found_inf is one.
        self.found_inf, self.grad_scale = skipped, None
        self.step()
        self.zero_grad(set_to_none=True)
        return norm, skipped
