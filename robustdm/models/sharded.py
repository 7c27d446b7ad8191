"""A network that lies in parts on the ranks: weights, gradients, moments and averages (FSDP2).

torch's `fully_shard` gathers the weights of a block when a pass reaches it, and lets them go behind
it. Optimizer and averages work on the parts alone, as on any other tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from robustdm.method.gradients import Gradients
from robustdm.method.objectives import Objective
from robustdm.method.predict import predict_noise


def shard(network: nn.Module, device: torch.device, precision: str) -> list[nn.Parameter]:
    """Leave each rank a part of every weight, in place; passes run on ``device``.

    Args:
        network: equal on all ranks; it may lie in host memory, whence one block at a time moves.
        device: "cpu" or a GPU.
        precision: "bf16" computes on weights rounded as they are gathered; the parts, and the sums
            of gradients, are float32 either way.

    Returns:
        This rank's part of each parameter, in their order, in the same memory.
    """
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    options: dict = {
        "mesh": DeviceMesh.from_group(dist.group.WORLD, device.type),
        # The top too: weights that stayed after a preview would be those of the averages before.
        "reshard_after_forward": True,
    }
    if precision == "bf16":
        options["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    network.to(memory_format=torch.contiguous_format)  # nothing else can be sharded
    for block in blocks(network):
        fully_shard(block, **options)
    fully_shard(network, **options)
    return [nn.Parameter(local(p), p.requires_grad) for p in network.parameters()]


def blocks(network: nn.Module) -> Iterator[nn.Module]:
    """What is gathered at a time: the outermost modules below the top that have layers with
    weights. (The weights that lie at the top itself are one more group.)"""
    for child in network.children():
        if isinstance(child, nn.ModuleList):
            for item in child:
                yield from _blocks(item)
        elif not _has_weights(child):
            yield from _blocks(child)


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    layers = [] if isinstance(module, nn.ModuleList) else [module, *module.children()]
    if any(map(_has_weights, layers)):
        yield module
    else:
        for child in module.children():
            yield from _blocks(child)


def _has_weights(module: nn.Module) -> bool:
    return any(True for _ in module.parameters(recurse=False))


# A tensor in parts is a DTensor, cut along its first dimension as `torch.chunk` cuts.


@torch.no_grad()
def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, in the same memory; one that is not in parts is its own."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def part(whole: Tensor, like: Tensor) -> Tensor:
    """What of a whole tensor belongs to this rank, where it is to be in parts as ``like`` is."""
    if not hasattr(like, "to_local"):
        return whole
    mesh = like.device_mesh
    pieces = whole.chunk(mesh.size())
    rank = mesh.get_local_rank()
    return pieces[rank] if rank < len(pieces) else whole[:0]


def joined(tensors: dict[str, Tensor], parameters: list[nn.Parameter]) -> dict[str, Tensor]:
    """An optimizer's state of parts, as `optimizer_tensors` names it, as a state of the whole
    ``parameters``; nothing is moved."""
    from torch.distributed.tensor import DTensor

    found = {}
    for name, tensor in tensors.items():
        number, _, key = name.partition(".")
        if key != "step":
            p = parameters[int(number)]
            tensor = DTensor.from_local(tensor, p.device_mesh, p.placements, run_check=False,
                                        shape=p.shape, stride=p.stride())
        found[name] = tensor
    return found


def parted(tensors: dict[str, Tensor], parameters: list[nn.Parameter]) -> dict[str, Tensor]:
    """This rank's part of an optimizer's whole state: `joined` undone."""
    known = {str(number): p for number, p in enumerate(parameters)}
    return {name: part(tensor, known[number])
            if (number := name.partition(".")[0]) in known and tensor.ndim else tensor
            for name, tensor in tensors.items()}


@torch.no_grad()
def load(network: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Give a sharded network the weights of a whole one."""
    for name, own in network.state_dict().items():
        local(own).copy_(part(tensors[name], own))


class ShardedStep:
    """As `GradientStep`, for a network that `shard` has treated: of a batch's gradients each rank
    gets the sum over all ranks, of its part of the weights.

    FSDP sums gradients once for each pass that a backward pass goes through. Here every pass that
    the loss comes from has a backward pass of its own, and only in the last one of a batch are they
    summed; until then a rank holds whole gradients. An attack asks for no gradients of weights:
    nothing is sent for it but the weights that it gathers.

    Args:
        model: the network.
        objective: the training objective.
        ranks: how many there are.
    """

    compiled = False

    def __init__(self, model: nn.Module, objective: Objective, ranks: int):
        self.model, self.objective = model, objective
        self._ranks = ranks
        self._weights = [p for p in model.parameters() if p.requires_grad]
        self._passes: list[tuple[Tensor, Tensor]] = []

    def __call__(
        self, x0: Tensor, key: Tensor, regularised: bool, dropout_seed: int | None,
        scale: float, last: bool,
    ) -> Gradients:
        """Gradients of a piece of a batch; those of all its pieces come with the last.

        Args:
            last: whether it is; without it, the gradients' list is empty.
            others: as those of `GradientStep`.
        """
        draw = self.objective.draw_from(
            x0, key, regularised=regularised, dropout_seed=dropout_seed
        )
        self._sum_gradients(False)
        loss = self.objective(self._predict, x0, draw)
        passes, self._passes = self._passes, []
        # FSDP divides by the number of ranks.
        given = torch.autograd.grad(loss.total * (scale * self._ranks), [cut for _, cut in passes])
        for number in reversed(range(len(passes))):
            self._sum_gradients(last and number == 0)
            passes.pop()[0].backward(given[number])
        weights = []
        if last:
            for p in self._weights:
                weights.append(None if p.grad is None else local(p.grad))
                p.grad = None
        return Gradients(loss.total.detach(), draw.t, loss.fit.detach(), loss.reg.detach(), weights)

    def _sum_gradients(self, on: bool) -> None:
        self.model.set_requires_gradient_sync(on)
        self.model.set_is_last_backward(on)

    def _predict(self, x: Tensor, t: Tensor) -> Tensor:
        """A pass, cut off from what is computed with it, unless it is an attack's."""
        out = predict_noise(self.model, x, t)
        if x.requires_grad or not out.requires_grad:
            return out
        cut = out.detach().requires_grad_()
        self._passes.append((out, cut))
        return cut


def predictor(network: nn.Module, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """As `fast_network`, for a sharded network: every rank has to call it when the others do."""

    @torch.no_grad()
    def predict(x: Tensor, t: Tensor) -> Tensor:
        x = x.to(device)
        if x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        return predict_noise(network, x, t).float()

    return predict
