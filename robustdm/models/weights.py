"""Networks and optimizers to tensors and back, with a clear error where they do not fit."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from robustdm.errors import RunError, UsageError
from robustdm.models import lora
from robustdm.models.sharded import local
from robustdm.runs.checkpoint import STATE, Checkpoint, load_origin
from robustdm.runs.config import TrainConfig


def averaged_weights(
    checkpoint: Checkpoint, name: str, config: TrainConfig, device: str | torch.device = "cpu"
) -> dict[str, Tensor]:
    """The weights of a moving average in a run's checkpoint; adapters are merged into the model.

    Raises:
        RunError: adapters whose model is missing or damaged; weights that are no numbers.
    """
    check_finite(checkpoint)
    found = checkpoint.tensors[name]
    if not config.lora:
        return found
    try:
        return lora.merged(load_origin(checkpoint, device), found, lora.scale(config))
    except (KeyError, IndexError, RuntimeError) as error:
        if isinstance(error, RunError):
            raise
        raise RunError(f"the adapters of {checkpoint.path} are not those of its model: use "
                       "another checkpoint") from error


def not_finite(tensors: dict[str, dict[str, Tensor]]) -> str | None:
    """The first tensor, by file, that holds a NaN or an infinity; None if there is none. Of those
    that lie in parts on the ranks, this rank's part is looked at."""
    for file, group in tensors.items():
        own = {name: local(value) for name, value in group.items() if value.is_floating_point()}
        own = {name: value for name, value in own.items() if value.numel()}
        # One wait for the device for a whole file; the largest number overflows nothing.
        if not bool(torch.nn.utils.get_total_norm(list(own.values()), math.inf).isfinite()):
            return f"{next(n for n, v in own.items() if not v.isfinite().all())} in {file}"
    return None


def check_finite(checkpoint: Checkpoint) -> None:
    """Raise a RunError if what was loaded of a checkpoint holds a NaN or an infinity."""
    if found := not_finite(checkpoint.tensors):
        raise RunError(f"{checkpoint.path} is of no use, {found} is not finite: move it away, and "
                       "the checkpoint before it is used")


def sample_kind(checkpoint: Checkpoint) -> tuple[tuple[int, ...], bool]:
    """The shape of one sample, and whether it is an image, as a run's checkpoint has them.

    Raises:
        RunError: if it has something else in their place.
    """
    shape, is_image = checkpoint.state.get("shape"), checkpoint.state.get("is_image")
    sizes = isinstance(shape, list) and 1 <= len(shape) <= 3 and all(
        type(size) is int and 1 <= size < 1 << 32 for size in shape)
    if not sizes or not isinstance(is_image, bool):
        raise RunError(f"{checkpoint.path / STATE} does not tell the shape of the samples: it is "
                       "of another program, use another checkpoint")
    return tuple(shape), is_image


def check_model_shapes(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Raise a UsageError, with at most three names, unless ``tensors`` fit the network."""
    needed = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    _refuse(shape_problems(needed, {name: tuple(v.shape) for name, v in tensors.items()}))


def shape_problems(
    needed: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]
) -> list[str]:
    """What keeps weights of the shapes ``found`` from fitting a network that needs others."""
    problems = [
        f"parameter {name} has shape {found[name]}, the network needs {shape}"
        for name, shape in needed.items() if name in found and found[name] != shape
    ]
    problems += [f"parameter {name} is missing, the network needs {shape}"
                 for name, shape in needed.items() if name not in found]
    problems += [f"parameter {name} of shape {shape} is unknown to the network"
                 for name, shape in found.items() if name not in needed]
    return problems


def some_of(problems: list[str]) -> str:
    """The first three of them, and how many there are beyond."""
    more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
    return "; ".join(problems[:3]) + more


def _refuse(problems: list[str]) -> None:
    if problems:
        raise UsageError(
            f"checkpoint of another architecture: {some_of(problems)}; use the configuration that "
            "it was trained with"
        )


_MOMENTS = {"step", "exp_avg", "exp_avg_sq"}  # of every parameter that AdamW has updated
# How the update is computed on this machine, not what it computes: never taken from a checkpoint.
_LOCAL_OPTIONS = ("foreach", "fused", "capturable", "differentiable")


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict]:
    """An optimizer's state as named tensors and a JSON-able rest.

    Returns:
        ``{"<parameter number>.<key>": tensor}`` (AdamW: exp_avg, exp_avg_sq, step) and
        ``{"param_groups": [...]}`` with the hyper-parameters.
    """
    saved = optimizer.state_dict()
    tensors = {
        # Copied, for all parameters may share one step.
        f"{number}.{key}": torch.as_tensor(value).clone() if key == "step" else value
        for number, entry in saved["state"].items() for key, value in entry.items()
    }
    groups = [
        {
            key: value.item() if isinstance(value, Tensor)
            else list(value) if isinstance(value, tuple) else value
            for key, value in group.items() if key not in _LOCAL_OPTIONS
        }
        for group in saved["param_groups"]
    ]
    return tensors, {"param_groups": groups}


def _fits(found, own) -> bool:
    """Whether a hyper-parameter is of the kind of the optimizer's own; switches have to agree."""
    if isinstance(own, (list, tuple)):
        return isinstance(found, (list, tuple)) and len(found) == len(own) and all(
            map(_fits, found, own))
    if own is None or isinstance(own, (bool, str)):
        return found is own or type(found) is type(own) and found == own
    return is_amount(found)


def is_amount(value) -> bool:
    """Whether it is a number that float32 holds, and not negative."""
    return type(value) in (int, float) and 0 <= value <= torch.finfo(torch.float32).max


def load_optimizer(
    optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], rest: dict
) -> None:
    """Restore what :func:`optimizer_tensors` gave of AdamW (without amsgrad), hyper-parameters
    (with the lr) included.

    Raises:
        UsageError: the state is that of another architecture.
        ValueError: a hyper-parameter or a moment is nothing that this optimizer has, or is missing.
    """
    current = optimizer.state_dict()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    names = [
        name for group in current["param_groups"]
        for name in group.get("param_names", map(str, group["params"]))
    ]
    saved_groups = rest["param_groups"]
    if [g["params"] for g in saved_groups] != [g["params"] for g in current["param_groups"]]:
        count = sum(len(group["params"]) for group in saved_groups)
        _refuse([f"it has {count} parameters in {len(saved_groups)} groups, the network needs "
                 f"{len(parameters)} in {len(current['param_groups'])}"])
    state: dict[int, dict[str, Tensor]] = {}
    problems = []
    for name, tensor in tensors.items():
        number, _, key = name.partition(".")
        if not number.isdigit() or int(number) >= len(parameters):
            problems.append(f"parameter {name} is unknown to the network")
            continue
        if key not in _MOMENTS:
            raise ValueError(f"{key!r} of parameter {names[int(number)]} is no moment of AdamW")
        parameter = parameters[int(number)]
        needed = () if key == "step" else tuple(parameter.shape)
        if tuple(tensor.shape) != needed:
            problems.append(f"parameter {names[int(number)]} has shape {tuple(tensor.shape)}, "
                            f"the network needs {needed}")
            continue
        # Fused updates walk through parameter and moments in the order of memory, unchecked: the
        # moments must have the parameter's strides (channels-last). The step torch itself moves to
        # the device, where the update wants it there.
        value = tensor.cpu() if key == "step" else (
            torch.empty_like(parameter, dtype=tensor.dtype, requires_grad=False).copy_(tensor)
        )
        state.setdefault(int(number), {})[key] = value
    _refuse(problems)
    for number, moments in state.items():  # a parameter that never had a gradient has none
        if missing := _MOMENTS - moments.keys():
            raise ValueError(f"{', '.join(sorted(missing))} of parameter {names[number]} missing")
    groups = []
    for saved, own, live in zip(
        saved_groups, current["param_groups"], optimizer.param_groups, strict=True
    ):
        for key, value in saved.items():
            known = key in own and (key in ("params", "param_names") or _fits(value, own[key]))
            if not known:
                raise ValueError(f"{key} of the optimizer is {value!r}")
        group = {**own, **saved}
        for key, value in live.items():
            if isinstance(value, Tensor):
                group[key] = torch.full_like(value, saved[key])
            elif isinstance(value, tuple):
                group[key] = tuple(group[key])
        groups.append(group)
    optimizer.load_state_dict({"state": state, "param_groups": groups})
