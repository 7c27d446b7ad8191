"""LoRA: low-rank adapters beside the layers of a network, trained in place of its own weights.

peft puts the adapters in. Everything else, merging them into the weights above all, needs tensors
alone, so that a run can be used where peft is not installed. Adapters are named as in peft's files:
``mid_block.attentions.0.to_q.lora_A.weight``.

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models".
"""

from __future__ import annotations

import copy
import importlib.util
import re
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from robustdm.errors import UsageError
from robustdm.runs.config import TrainConfig

_A, _B = ".lora_A.weight", ".lora_B.weight"


def check(config: TrainConfig, weights: bool) -> None:
    """Raise a UsageError where a configuration asks for adapters that cannot be had here.

    Args:
        config: of a run.
        weights: whether weights to start from were given beside it.
    """
    if config.lora and config.init_from is None and not weights:
        raise UsageError(f"lora is {config.lora}: adapters are added to a model that exists, name "
                         "it with --init-from")
    if config.lora and importlib.util.find_spec("peft") is None:
        raise UsageError(f"lora is {config.lora}: training adapters needs a package that is not "
                         'here: pip install "robustdm[lora]"')


def scale(config: TrainConfig) -> float:
    """What the product of two factors is multiplied by: alpha over rank."""
    return (config.lora if config.lora_alpha is None else config.lora_alpha) / config.lora


def targets(network: nn.Module, patterns: tuple[str, ...]) -> dict[str, nn.Module]:
    """The linear layers and convolutions that get adapters, by name.

    Args:
        network: without adapters.
        patterns: of the last parts of the layers' names; * stands for any characters, dots too.

    Raises:
        UsageError: for a pattern that matches none.
    """
    layers = {name: module for name, module in network.named_modules()
              if isinstance(module, (nn.Linear, nn.Conv2d))}
    found = set()
    for pattern in patterns:
        matching = {name for name in layers if fnmatchcase(f".{name}", f"*.{pattern}")}
        if not matching:
            ends = ", ".join(dict.fromkeys(
                re.search(r"[^.]+(\.\d+)?$", name)[0] for name in layers))
            raise UsageError(f"lora_targets has {pattern!r}: no linear layer or convolution of the "
                             f"network has a name with that end; they end with {ends}")
        found |= matching
    return {name: layer for name, layer in layers.items() if name in found}


def count(network: nn.Module, config: TrainConfig) -> int:
    """How many numbers the adapters of a configuration add to a network without them."""
    return sum(config.lora * (layer.weight[0].numel() + len(layer.weight))
               for layer in targets(network, config.lora_targets).values())


def add(network: nn.Module, config: TrainConfig) -> None:
    """Add the adapters of a configuration to a network, in place; nothing else of it is trained.

    They change no output yet: one factor of each begins at zero, the other is decided by
    ``config.seed``.

    Raises:
        UsageError: as `targets`.
    """
    from peft import LoraConfig, inject_adapter_in_model

    settings = LoraConfig(
        r=config.lora, lora_alpha=scale(config) * config.lora,
        target_modules=list(targets(network, config.lora_targets)),
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        inject_adapter_in_model(settings, network)


def split(network: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The state of a network with adapters: its own weights, by the names they had, and theirs."""
    own, adapters = {}, {}
    for name, value in network.state_dict().items():
        if ".lora_" in name:
            adapters[name.replace(".default.", ".")] = value
        else:
            own[name.replace(".base_layer.", ".")] = value
    return own, adapters


def joined(own: dict[str, Tensor], adapters: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `split`: the state dict of a network with adapters."""
    layers = {name.partition(".lora_")[0] for name in adapters}
    state = {name.replace(".weight", ".default.weight"): value for name, value in adapters.items()}
    for name, value in own.items():
        layer, _, kind = name.rpartition(".")
        state[f"{layer}.base_layer.{kind}" if layer in layers else name] = value
    return state


def merged(
    own: dict[str, Tensor], adapters: dict[str, Tensor], scale: float
) -> dict[str, Tensor]:
    """A network's weights with the adapters added to them.

    Args:
        own: its weights without them; they stay as they are.
        adapters: factors A (rank, in, ...) and B (out, rank, ...) of layers of it.
        scale: as `scale` says.
    """
    weights = dict(own)
    for name, a in adapters.items():
        if name.endswith(_A):
            layer = name.removesuffix(_A)
            product = adapters[layer + _B].flatten(1) @ a.flatten(1)
            weight = own[f"{layer}.weight"]
            weights[f"{layer}.weight"] = weight + scale * product.view(weight.shape)
    return weights


def without(network: nn.Module, scale: float) -> nn.Module:
    """A copy of a network with adapters, in which they are merged into its own layers."""
    network = copy.deepcopy(network)
    weights = merged(*split(network), scale)
    for name, module in list(network.named_modules()):
        if hasattr(module, "base_layer"):
            network.set_submodule(name, module.base_layer)
    del network.peft_config
    network.load_state_dict(weights)
    return network


def export(network: nn.Module, folder: Path) -> None:
    """Write the adapters of a network as ``peft.PeftModel.from_pretrained`` reads them.

    Args:
        network: with adapters.
        folder: existing.
    """
    network.peft_config["default"].save_pretrained(folder)
    tensors = {f"base_model.model.{name}": value.contiguous()
               for name, value in split(network)[1].items()}
    save_file(tensors, folder / "adapter_model.safetensors")
