"""AdamW that skips non-finite updates on the device, and moving averages of the weights."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from robustdm import ops


class EMA:
    """Exponential moving average of a network's weights, kept as a network of its own.

    It shares those that are not trained with the network.

    The decay rises as min(rate, (1 + n) / (10 + n)) over the updates n, so that a short run does
    not average in its random start.

    Args:
        model: the network to follow.
        rate: decay per step, from 0 to below 1.

    Source: Ho et al. 2020, appendix B (rate 0.9999); warm-up as in TensorFlow's moving averages.
    """

    def __init__(self, model: nn.Module, rate: float):
        self.rate = rate
        shared = {id(p): p for p in model.parameters() if not p.requires_grad}
        self.model = copy.deepcopy(model, shared).eval()
        self._source = [p for p in model.parameters() if p.requires_grad]
        self._average = [p for p in self.model.parameters() if p.requires_grad]
        self.model.requires_grad_(False)
        self._pull = torch.zeros((), device=self._source[0].device)

    def follow(self, weights: list[nn.Parameter], averages: list[nn.Parameter]) -> None:
        """From now on average this rank's parts of the weights into its parts of the averages."""
        pairs = [(w, a) for w, a in zip(weights, averages, strict=True) if w.requires_grad]
        self._source, self._average = map(list, zip(*pairs, strict=True))
        self._pull = torch.zeros((), device=self._source[0].device)

    def decay(self, step: int) -> float:
        """The decay after optimizer step ``step`` (from 0)."""
        return min(self.rate, (1 + step) / (10 + step))

    def averages(self) -> dict[nn.Parameter, Tensor]:
        """The average of every weight that is trained."""
        return dict(zip(self._source, self._average, strict=True))

    def prepare(self, step: int) -> None:
        """Set the decay of the update after optimizer step ``step`` (from 0)."""
        self._pull.fill_(1 - self.decay(step))

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the weights, on the device alone."""
        torch._foreach_lerp_(self._average, self._source, [self._pull] * len(self._source))


class SkippingAdamW(torch.optim.AdamW):
    """AdamW that leaves weights and moments untouched when told that a gradient is not finite.

    The decision is a device tensor, so a bad step costs no wait for the device. Where csrc is
    built, one pass over memory clips, steps and moves a moving average (`ops.adamw_ema`);
    elsewhere torch's fused AdamW steps, and passes of their own clip and average.

    Args:
        model: the network, in float32.
        lr: learning rate until `prepare` names another.
        weight_decay: decoupled weight decay.
        emas: moving averages to update with every step.
        copies: bfloat16 copies of the weights to write with every step, in their order.
        backend: as in `ops.adamw_ema`.
    """

    def __init__(
        self, model: nn.Module, lr: float, weight_decay: float, emas: Sequence[EMA] = (),
        copies: Sequence[Tensor] = (), backend: str = "auto",
    ):
        super().__init__(model.parameters(), lr=lr, weight_decay=weight_decay, fused=True)
        weights = list(model.parameters())
        # The Triton kernels have no optimizer: who asks for them gets what is fastest here.
        backend = "auto" if backend == "triton" else backend
        self.backend = ops.resolve("adamw_ema", backend, weights[0].device, weights[0].dtype)
        self._emas = list(emas)
        self._averages = emas[0].averages() if emas else {}
        self._copies = dict(zip(weights, copies, strict=True)) if copies else {}
        # What changes from step to step lies in tensors, which a CUDA graph reads anew.
        self._lr, self._decay = (torch.zeros((), device=weights[0].device) for _ in range(2))
        self._checked = False

    def prepare(self, lr: float, step: int) -> None:
        """Set what the coming step needs from the host.

        Args:
            lr: its learning rate.
            step: its number, from 0, which decides the decay of the moving average.
        """
        for group in self.param_groups:
            group["lr"] = lr
        self._lr.fill_(lr)
        for ema in self._emas:
            ema.prepare(step)
        self._decay.fill_(self._emas[0].decay(step) if self._emas else 0.0)

    @torch.no_grad()
    def clip_and_step(
        self, clip_norm: float, loss: Tensor, norm: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Clip the gradients by their total norm and step, unless loss or norm is not finite.

        Args:
            clip_norm: largest norm; 0 does not clip.
            loss: scalar loss of the step.
            norm: of the gradients, where these are parts of a network's.

        Returns:
            The norm before clipping, and 1.0 where the step was skipped, else 0.0 (both scalars).
        """
        parameters = [p for g in self.param_groups for p in g["params"] if p.grad is not None]
        for p in parameters:  # fused updates walk through memory, and do not look at strides
            if p.grad.stride() != p.stride():  # autograd almost never does that
                p.grad = torch.empty_like(p).copy_(p.grad)
        if norm is None:
            norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        skipped = (~(torch.isfinite(loss) & torch.isfinite(norm))).float()
        averages = iter(self._emas)
        if self.backend == "cpp":
            self._fused_pass(parameters, norm, clip_norm, skipped)
            next(averages, None)  # moved in the same pass
        else:
            if clip_norm:  # not in place: two parameters may share one gradient
                factor = _clip_factor(norm, clip_norm)
                clipped = torch._foreach_mul([p.grad for p in parameters], factor)
                for p, g in zip(parameters, clipped, strict=True):
                    p.grad = g
            # What gradient scalers use: a fused step does nothing where found_inf is one.
            self.found_inf, self.grad_scale = skipped, None
            self.step()
            self.write_copies()
        for ema in averages:
            ema.update()
        self.zero_grad(set_to_none=True)
        return norm, skipped

    @torch.no_grad()
    def write_copies(self) -> None:
        """Write the bfloat16 copies anew, as after weights were loaded."""
        if self._copies:
            torch._foreach_copy_(list(self._copies.values()), list(self._copies))

    def _fused_pass(
        self, parameters: list[Tensor], norm: Tensor, clip_norm: float, skipped: Tensor
    ) -> None:
        group = self.param_groups[0]
        count = self._count(parameters)
        count += 1 - skipped  # a skipped step is none: the bias corrections do not count it
        factor = _clip_factor(norm, clip_norm) if clip_norm else torch.ones_like(norm)
        ops.adamw_ema(
            parameters,
            [p.grad for p in parameters],
            [self.state[p]["exp_avg"] for p in parameters],
            [self.state[p]["exp_avg_sq"] for p in parameters],
            [self._averages[p] for p in parameters] if self._averages else [],
            [self._copies[p] for p in parameters] if self._copies else [],
            lr=self._lr,
            step=count,
            decay=self._decay,
            factor=factor,
            skip=skipped,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            tiny=group["eps"],
            weight_decay=group["weight_decay"],
            backend=self.backend,
            check=not self._checked,
        )
        self._checked = True

    def _count(self, parameters: list[Tensor]) -> Tensor:
        """The number of steps done, one tensor that all parameters' states share."""
        if parameters[0] not in self.state:
            zero = torch.zeros((), device=parameters[0].device)
            for p in parameters:
                self.state[p] = {
                    "step": zero, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)
                }
        return self.state[parameters[0]]["step"]

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        self._checked = False
        if self.backend == "cpp" and self.state:
            one = next(iter(self.state.values()))["step"]
            for state in self.state.values():
                state["step"] = one


def _clip_factor(norm: Tensor, clip_norm: float) -> Tensor:
    return (clip_norm / (norm + 1e-6)).clamp(max=1)
