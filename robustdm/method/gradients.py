"""One training step's loss and gradients: eager, or compiled as a single graph.

The compiled step is one trace of everything between the batch and the gradients: draw,
perturbation, clean pass, attack with its backward pass, projection, adversarial pass, loss,
backward pass. As differentiation is traced too, the compiler sees that nobody asks for weight
gradients in the attack and that both terms of the loss share one clean pass. (A network compiled by
itself computes the gradients of its weights whenever that of its input is asked for.)
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._dynamo import config as dynamo

from robustdm.errors import UsageError
from robustdm.method.objectives import Objective
from robustdm.method.predict import predict_noise
from robustdm.ops.dropout import unfused_dropout


@dataclass(frozen=True)
class Gradients:
    """What one step, or one piece of it, computed.

    Attributes:
        total: scalar loss.
        t: (B,) int64 timesteps.
        fit, reg: (B,) losses per sample, as in `robustdm.Loss`.
        weights: float32 gradient of each parameter that wants one, in the order of
            ``model.parameters()``; None where the loss does not depend on it.
    """

    total: Tensor
    t: Tensor
    fit: Tensor
    reg: Tensor
    weights: list[Tensor | None]


class GradientStep:
    """The gradients of an objective for a network.

    Args:
        model: called as in `Objective`; float32, or a `WorkingCopy` in bfloat16.
        objective: the training objective.

    Attributes:
        compiled: whether calls run the compiled graph.
    """

    def __init__(self, model: nn.Module, objective: Objective):
        self.model = model
        self.objective = objective
        self.eager()

    def eager(self) -> None:
        """Run without the compiler."""
        self.compiled, self._run = False, self._compute

    def compile(self, backend: str = "inductor") -> None:
        """Compile at the next call: one graph for each value of ``regularised``.

        Raises:
            UsageError: if this version of torch cannot trace differentiation, or if a compiled
                network would draw dropout masks that the passes of a step do not share.
        """
        if not hasattr(dynamo, "trace_autograd_ops"):
            raise UsageError(f"torch {torch.__version__} cannot trace torch.autograd.grad: use "
                             "torch 2.11 or newer")
        loose = unfused_dropout(self.model)
        if loose and self.objective.name != "ddpm" and self.objective.share_dropout:
            raise UsageError(
                f"the passes of a compiled step cannot share the dropout masks of {loose[0]} "
                f"({len(loose)} layers): use robustdm.fuse, or share_dropout=False"
            )
        # Left to itself, the compiler keeps channels-last convolutions out of training graphs in
        # which one of them has few output channels, as every UNet's last has.
        options = {"force_layout_optimization": True} if backend == "inductor" else None
        self.compiled = True
        self._run = torch.compile(
            self._compute, backend=backend, fullgraph=True, dynamic=False, options=options
        )

    def __call__(
        self, x0: Tensor, key: Tensor, regularised: bool = True,
        dropout_seed: int | None = None, scale: float = 1.0, last: bool = True,
    ) -> Gradients:
        """Gradients of ``scale`` times the loss.

        Args:
            x0: (B, ...) data.
            key: (3,) int64 on the batch's device: seed, step, global index of the first sample.
            regularised: whether this step has the regulariser, see `Objective.regularises`.
            dropout_seed: as in `robustdm.Draw`; not for a compiled step.
            scale: weight of this piece in the whole batch.
            last: whether it is the batch's last piece, which makes no difference here.
        """
        if not self.compiled:
            return Gradients(*self._run(x0, key, regularised, dropout_seed, scale))
        self.objective.prepare(x0.device)
        with dynamo.patch(trace_autograd_ops=True):
            return Gradients(*self._run(x0, key, regularised, None, scale))

    def _compute(
        self, x0: Tensor, key: Tensor, regularised: bool,
        dropout_seed: int | None, scale: float,
    ) -> tuple:
        draw = self.objective.draw_from(
            x0, key, regularised=regularised, dropout_seed=dropout_seed
        )
        loss = self.objective(self.model, x0, draw)
        weights = [p for p in self.model.parameters() if p.requires_grad]
        grads = torch.autograd.grad(loss.total * scale, weights, allow_unused=True)
        grads = [g if g is None else g.to(torch.promote_types(g.dtype, torch.float32))
                 for g in grads]
        return loss.total.detach(), draw.t, loss.fit.detach(), loss.reg.detach(), grads


class WorkingCopy(nn.Module):
    """A network in bfloat16 that passes run on, while an optimizer updates the float32 original.

    Unlike autocast, no pass converts a weight: the optimizer writes both (`ops.adamw_ema`).

    Args:
        model: the original; parameters come in its order, buffers keep their precision.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.network = copy.deepcopy(model)
        for p in self.network.parameters():
            p.data = p.data.to(torch.bfloat16)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return predict_noise(self.network, x.to(torch.bfloat16), t)
