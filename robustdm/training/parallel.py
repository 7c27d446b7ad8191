"""How ranks hold a network while it trains: each the whole of it, or each a part of it.

`Replicated` and `Sharded` have the same methods; everything else in training asks them, and does
not know which of the two it has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain

import torch
from torch import Tensor, nn

from robustdm.distributed import Ranks, bits, whole
from robustdm.method.gradients import GradientStep, WorkingCopy
from robustdm.method.objectives import Objective
from robustdm.models import build_model, sharded
from robustdm.models.inference import fast_network
from robustdm.runs.checkpoint import accompany
from robustdm.runs.config import TrainConfig
from robustdm.training.optimizer import EMA


class Replicated:
    """Every rank holds the whole network; one flat all-reduce a step sums the gradients.

    Args:
        config: of the run.
        model: the network, which `place` has seen, with the weights that training starts from.
        emas: its moving averages.
        objective: the training objective.
        ranks: the processes that share each batch.
        device: where passes run.

    Attributes:
        network: runs the passes: ``model``, or its copy in bfloat16.
        weights: float32 tensors that the optimizer updates, in the order of the parameters.
        copies: bfloat16 tensors to write with every update, in that order, or none.
        gradient_step: gradients of this rank's pieces of a batch.
        note: for the plan of a run.
    """

    note = ""

    @staticmethod
    def place(model: nn.Module, device: torch.device) -> None:
        """Move a new network to where it is prepared for training."""
        model.to(device)

    def __init__(
        self, config: TrainConfig, model: nn.Module, emas: list[EMA], objective: Objective,
        ranks: Ranks, device: torch.device,
    ):
        self._config, self._ranks = config, ranks
        self._networks = [model, *(ema.model for ema in emas)]
        copied = config.precision == "bf16"
        self.network = WorkingCopy(model) if copied else model
        self.weights = list(model.parameters())
        self.copies = list(self.network.parameters()) if copied else []
        self.gradient_step = GradientStep(self.network, objective)

    def reduce(
        self, grads: list[Tensor], loss: Tensor, wishes: Tensor
    ) -> tuple[list[Tensor], Tensor, Tensor, Tensor | None]:
        """Sum over the ranks, in one all-reduce, so that all of them skip a step or none.

        Args:
            grads: of this rank's part of the batch.
            loss: scalar mean over this rank's samples.
            wishes: (W,) what this rank wants.

        Returns:
            The gradients, the mean loss and the sum of the wishes, of all ranks; and the norm of
            the gradient where this rank has only a part of it.
        """
        if self._ranks.size > 1:
            dtype = grads[0].dtype
            loss = loss / self._ranks.size
            *grads, loss, wishes = self._ranks.all_sum([*grads, loss.to(dtype), wishes.to(dtype)])
        return grads, loss, wishes, None

    def whole(self, network: nn.Module, shape: tuple[int, ...]) -> nn.Module | None:
        """The network as one that this process can use alone; None where it has none."""
        return network

    def predictor(self, network: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
        """Noise prediction ``(x, t) -> eps`` of one of the networks; all ranks call it."""
        return fast_network(network, precision=self._config.precision, cuda_graph=False)

    def fingerprint(self) -> int:
        """A number that is the same on all ranks while they are sound."""
        return bits(_parameters(self._networks))

    def agree(self, value) -> list:
        """What the ranks must decide alike while samples are drawn: here, each for itself."""
        return [value]

    def moments(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The optimizer's tensors as a checkpoint holds them."""
        return tensors

    def own_moments(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """What of a checkpoint's optimizer this rank needs."""
        return tensors

    def load(self, network: nn.Module, tensors: dict[str, Tensor]) -> None:
        """Give one of the networks the weights of a checkpoint."""
        network.load_state_dict(tensors)

    def accompany(self, tensors: Callable[[], dict[str, dict[str, Tensor]]]) -> None:
        """Take part in a checkpoint that rank 0 writes of the ranks' ``tensors()``."""


class Sharded:
    """Each rank holds a part of every weight, see `robustdm.models.sharded`; as `Replicated`."""

    note = ", each with a part of the network"
    copies: list[Tensor] = []

    @staticmethod
    def place(model: nn.Module, device: torch.device) -> None:
        """Leave it in host memory: it moves block by block, and is never whole on the device."""

    def __init__(
        self, config: TrainConfig, model: nn.Module, emas: list[EMA], objective: Objective,
        ranks: Ranks, device: torch.device,
    ):
        self._config, self._ranks, self._device = config, ranks, device
        self.network = model
        # Parts differ; what they were cut from must have been the same.
        self._began = bits(_parameters([model, *(ema.model for ema in emas)]))
        self.weights = sharded.shard(model, device, config.precision)
        for ema in emas:
            ema.follow(self.weights, sharded.shard(ema.model, device, config.precision))
        self.gradient_step = sharded.ShardedStep(model, objective, ranks.size)

    def reduce(
        self, grads: list[Tensor], loss: Tensor, wishes: Tensor
    ) -> tuple[list[Tensor], Tensor, Tensor, Tensor | None]:
        # The backward pass has summed the gradients, and left each rank its part.
        square = torch.nn.utils.get_total_norm(grads) ** 2
        dtype = square.dtype
        loss = loss / self._ranks.size
        square, loss, wishes = self._ranks.all_sum([square, loss.to(dtype), wishes.to(dtype)])
        return grads, loss, wishes, square.sqrt()

    def whole(self, network: nn.Module, shape: tuple[int, ...]) -> nn.Module | None:
        weights = {}
        for name, value in network.state_dict().items():
            value = whole(value)
            if self._ranks.main:
                weights[name] = value.cpu()
        if not self._ranks.main:
            return None
        network = build_model(self._config, shape).eval()
        network.load_state_dict(weights, assign=True)
        return network

    def predictor(self, network: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
        return sharded.predictor(network, self._device)

    def fingerprint(self) -> int:
        return self._began

    def agree(self, value) -> list:
        return self._ranks.exchange(value)  # they call the network together, or not at all

    def moments(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return sharded.joined(tensors, list(self.network.parameters()))

    def own_moments(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return sharded.parted(tensors, list(self.network.parameters()))

    def load(self, network: nn.Module, tensors: dict[str, Tensor]) -> None:
        sharded.load(network, tensors)

    def accompany(self, tensors: Callable[[], dict[str, dict[str, Tensor]]]) -> None:
        accompany(tensors())


def parallel_of(config: TrainConfig, ranks: Ranks) -> type[Replicated] | type[Sharded]:
    """How the ranks of a run hold its network."""
    return Sharded if config.parallel == "fsdp" and ranks.size > 1 else Replicated


def _parameters(networks: list[nn.Module]) -> Iterable[Tensor]:
    return chain.from_iterable(network.parameters() for network in networks)
