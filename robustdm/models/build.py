"""From a configuration to a network."""

from __future__ import annotations

from fnmatch import fnmatchcase

import torch
from torch import nn

from robustdm.errors import UsageError, importing
from robustdm.models.mlp import PointMLP
from robustdm.ops.reference import normalisable
from robustdm.runs.config import TrainConfig


def unet_config(config: TrainConfig, channels: int) -> dict:
    """Arguments of diffusers' ``UNet2DModel`` for a configuration.

    With ``scale_shift_norm`` the conventions are those of improved-diffusion (Nichol & Dhariwal
    2021), without it those of DDPM as published in google/ddpm-cifar10-32 (Ho et al. 2020).
    """
    levels = len(config.block_channels)
    attends = [config.resolution // 2**i in config.attention_resolutions for i in range(levels)]
    improved = config.scale_shift_norm
    return {
        "sample_size": config.resolution,
        "in_channels": channels,
        "out_channels": channels,
        "block_out_channels": config.block_channels,
        "layers_per_block": config.layers_per_block,
        "down_block_types": tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        "up_block_types": tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in attends[::-1]),
        "attention_head_dim": config.attention_head_dim,
        "norm_num_groups": config.norm_groups,
        "norm_eps": 1e-5 if improved else 1e-6,
        "attn_norm_num_groups": config.norm_groups if improved else None,
        "resnet_time_scale_shift": "scale_shift" if improved else "default",
        "downsample_padding": 1 if improved else 0,
        "flip_sin_to_cos": improved,
        "freq_shift": 0 if improved else 1,
        "dropout": config.dropout,
    }


def build_model(config: TrainConfig, shape: tuple[int, ...]) -> nn.Module:
    """The network of a configuration, its initial weights decided by ``config.seed``.

    Args:
        config: the run's configuration.
        shape: shape of one sample, (C, H, W) or (D,).

    A configuration that starts from a model has that model's network, with initial weights too.

    Returns:
        A diffusers ``UNet2DModel`` (its output's ``.sample`` is the prediction) or a `PointMLP`.
        Parameters that are not to be trained do not require gradients.

    Raises:
        UsageError: if the network does not fit the data's shape, or ``freeze`` not the network.
    """
    model = _build(config, shape)
    freeze(model, config.freeze)
    return model


def freeze(model: nn.Module, patterns: tuple[str, ...]) -> None:
    """Leave parameters out of training, in place.

    Args:
        model: the network.
        patterns: of names as in ``named_parameters``; * stands for any characters, dots too.

    Raises:
        UsageError: for a pattern that matches nothing, or if nothing is left to train.
    """
    parameters = dict(model.named_parameters())
    for pattern in patterns:
        found = [p for name, p in parameters.items() if fnmatchcase(name, pattern)]
        if not found:
            starts = ", ".join(dict.fromkeys(name.partition(".")[0] for name in parameters))
            raise UsageError(
                f"freeze has {pattern!r}: no parameter of the network has such a name; they begin "
                f"with {starts}, and * stands for the rest"
            )
        for p in found:
            p.requires_grad_(False)
    for norm in (m for m in model.modules() if patterns and isinstance(m, nn.GroupNorm)):
        norm.register_forward_pre_hook(lambda norm, args: (normalisable(args[0], norm.weight),))
    if patterns and not any(p.requires_grad for p in parameters.values()):
        raise UsageError(f"freeze is {' '.join(patterns)!r}: nothing is left to train, leave a "
                         "pattern out")


def _build(config: TrainConfig, shape: tuple[int, ...]) -> nn.Module:
    wanted = 3 if config.network == "unet" else 1
    if len(shape) != wanted:
        other = "mlp" if config.network == "unet" else "unet"
        raise UsageError(
            f"network is {config.network!r} but a sample of the data has shape {tuple(shape)}: "
            f"use --network {other}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        if config.network == "mlp":
            return PointMLP(shape[0], config.mlp_width, config.mlp_depth)
        if config.pretrained:
            return _build_like(config, shape[0])
        head = config.attention_head_dim
        if head and any(c % head for c in config.block_channels):
            raise UsageError(
                f"attention_head_dim is {head}: it must divide every one of block_channels, "
                f"{config.block_channels}"
            )
        return make_unet(unet_config(config, shape[0]))


# Layers in the blocks of a network: published ones have up to 30.
_MAX_LAYERS = 1024


def make_unet(arguments: dict) -> nn.Module:
    """A diffusers ``UNet2DModel``.

    Raises:
        UsageError: if there is none with these arguments.
    """
    with importing("diffusers"):
        from diffusers import UNet2DModel

    try:
        layers = arguments["layers_per_block"] * len(arguments["down_block_types"])
        if not layers <= _MAX_LAYERS:
            raise ValueError(f"{layers} layers are too many")
        return UNet2DModel(**arguments)
    except Exception as error:  # whatever a wrong value meets first
        text = (str(error).strip().splitlines() or [""])[0][:200]
        raise UsageError(f"no network can be built with its arguments ({type(error).__name__}: "
                         f"{text})") from None


def _counted(channels: int) -> str:
    kind = {1: " (grey)", 3: " (colour)", 4: " (colour and transparency)"}.get(channels, "")
    return f"{channels} channel{'' if channels == 1 else 's'}{kind}"


def _build_like(config: TrainConfig, channels: int) -> nn.Module:
    unet = config.pretrained["unet"] or {}
    wanted = unet.get("in_channels")
    if wanted != channels:
        if config.data in ("digits", "subspace"):
            remedy = "name images of your own with --data images --data-dir"
        elif wanted in (1, 3, 4):
            remedy = f"--channels {wanted} converts them"
        else:
            remedy = "no images have so many"
        raise UsageError(
            f"init_from is {config.init_from!r}: its network takes {_counted(wanted)}, the data, "
            f"{config.data_dir or config.data}, have {_counted(channels)}; {remedy}, or choose "
            "another model"
        )
    model = make_unet({**unet, "sample_size": config.resolution, "dropout": config.dropout})
    if unet.get("time_embedding_type") == "learned":
        # A table of what improved-diffusion computes: no weight of that network.
        model.time_proj.requires_grad_(False)
    return model


def set_attention(network: nn.Module, config: TrainConfig, device: torch.device) -> None:
    """Let a diffusers network compute attention in the way of a configuration, in place.

    Raises:
        UsageError: if xformers is not to be had.
    """
    kind = config.attention
    if kind == "auto":
        # Measured: of torch's fused kernel in bfloat16 it is the backward pass that is slow there.
        kind = "plain" if device.type == "cpu" and config.precision == "bf16" else "sdpa"
    if kind == "sdpa":
        return
    if kind == "plain":
        from diffusers.models.attention_processor import Attention, AttnProcessor

        for module in network.modules():
            if isinstance(module, Attention):
                module.set_processor(AttnProcessor())
        return
    remedy = 'use --attention sdpa, or a GPU and pip install "robustdm[xformers]"'
    if device.type != "cuda":
        raise UsageError(f"attention is {kind!r}, but the device is {device}: {remedy}")
    try:
        network.enable_xformers_memory_efficient_attention()
    except Exception as error:  # diffusers tries it out, and raises whatever that raises
        text = str(error).strip().splitlines() or [type(error).__name__]
        raise UsageError(f"attention is {kind!r}: {text[0]}; {remedy}") from None
