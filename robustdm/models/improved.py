"""improved-diffusion's UNet as a diffusers ``UNet2DModel``, and back.

An improved-diffusion checkpoint is a plain state dict: the architecture is read from its names and
shapes, but for the number of attention heads, which leaves no trace in them.

Source: Nichol & Dhariwal 2021; layout of https://github.com/openai/improved-diffusion.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from robustdm.errors import UsageError

GROUPS = 32  # of every norm
FIRST = "input_blocks.0.0.weight"
"""A name that every state dict of this layout has."""

_PARTS = {
    "plain": {"": ""},
    "residual": {
        ".in_layers.0": ".norm1", ".in_layers.2": ".conv1", ".emb_layers.1": ".time_emb_proj",
        ".out_layers.0": ".norm2", ".out_layers.3": ".conv2", ".skip_connection": ".conv_shortcut",
    },
    "attention": {".norm": ".group_norm", ".proj_out": ".to_out.0"},
}
# What UNet2DModel must be told for its forward pass to be improved-diffusion's.
_EXACT = {
    "norm_eps": 1e-5, "norm_num_groups": GROUPS, "downsample_padding": 1, "flip_sin_to_cos": True,
    "freq_shift": 0, "time_embedding_dim": None,
    "mid_block_type": "UNetMidBlock2D", "mid_block_scale_factor": 1, "downsample_type": "conv",
    "upsample_type": "conv", "center_input_sample": False, "add_attention": True,
    "class_embed_type": None, "num_class_embeds": None,
}


def unet_arguments(
    shapes: dict[str, tuple[int, ...]], heads: int | None, side: int, table: int | None = None
) -> dict:
    """Arguments of the ``UNet2DModel`` that computes what improved-diffusion's network does.

    Args:
        shapes: name -> shape of the state dict.
        heads: number of attention heads, the same at all levels.
        side: side of the images in pixels.
        table: length T of the diffusion, if the network was told t * 1000 / T and not t: that is
            written as a table of embeddings, of which diffusers can have one in their place.

    Raises:
        UsageError: if the heads are not given or do not fit, or the network has no exact
            counterpart in diffusers.
    """
    if "label_emb.weight" in shapes:
        raise UsageError(
            "it is class-conditional (label_emb): that needs labels in the data and in the loss; "
            "only unconditional models can be treated"
        )
    pattern = re.compile(r"input_blocks\.(\d+)\.")
    numbers = sorted({int(m[1]) for name in shapes if (m := pattern.match(name))})
    if numbers != list(range(len(numbers))):
        raise UsageError("its input_blocks are not numbered from 0 on: the file is incomplete")
    levels: list[list[int]] = [[]]
    for k in numbers[1:]:
        if f"input_blocks.{k}.0.op.weight" in shapes:
            levels.append([])
        else:
            levels[-1].append(k)
    found = [{shapes.get(f"input_blocks.{k}.0.out_layers.3.weight", (0,))[0] for k in level}
             for level in levels]
    if len({len(level) for level in levels}) > 1 or any(len(w) != 1 or 0 in w for w in found):
        raise UsageError(
            "its levels are not residual blocks of one width, as many in each, between strided "
            "convolutions: networks with resblock_updown or without conv_resample "
            "(guided-diffusion) have no exact counterpart in diffusers"
        )
    widths = [w.pop() for w in found]
    if shapes[FIRST][0] != widths[0]:
        raise UsageError(
            f"its first convolution has {shapes[FIRST][0]} channels and its first level "
            f"{widths[0]}: diffusers needs a channel_mult that begins with 1"
        )
    attends = [f"input_blocks.{level[0]}.1.qkv.weight" in shapes for level in levels]
    rows = shapes.get("input_blocks.1.0.emb_layers.1.weight", (0,))[0]
    return {
        "sample_size": side,
        "in_channels": shapes[FIRST][1],
        "out_channels": shapes.get("out.2.weight", (0,))[0],
        "block_out_channels": widths,
        "layers_per_block": len(levels[0]),
        "down_block_types": ["AttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        "up_block_types": ["AttnUpBlock2D" if a else "UpBlock2D" for a in attends[::-1]],
        "attention_head_dim": head_dim(
            heads, [w for w, a in zip(widths, attends, strict=True) if a] + widths[-1:]
        ),
        "attn_norm_num_groups": GROUPS,
        "resnet_time_scale_shift": "scale_shift" if rows == 2 * widths[0] else "default",
        **_EXACT,
        "time_embedding_type": "learned" if table else "positional",
        "num_train_timesteps": table,
    }


def head_dim(heads: int | None, widths: list[int]) -> int | None:
    """Channels per head, of which diffusers has one number for all levels; None is a single head.

    Args:
        heads: number of attention heads, the same at all levels.
        widths: channels of the levels with attention, the middle included.

    Raises:
        UsageError: if the heads are not given, or there is no such number.
    """
    if heads is None:
        raise UsageError(
            "the weights do not tell the number of attention heads: give --num-heads, as it was "
            "trained with (improved-diffusion's default is 4)"
        )
    if heads == 1:
        return None
    if heads < 1 or any(width % heads for width in widths):
        raise UsageError(f"num_heads is {heads}: it must divide the channels, {widths}")
    if len(set(widths)) > 1:
        raise UsageError(
            f"it has {heads} heads at levels of {' and '.join(map(str, sorted(set(widths))))} "
            "channels: diffusers has one head width for all levels, so there is no exact "
            "counterpart; only networks with attention at one width, or with one head, can be "
            "converted"
        )
    return widths[0] // heads


def check_exact(unet: dict, weights: dict[str, Tensor]) -> int:
    """Whether improved-diffusion can compute what a ``UNet2DModel`` does.

    Args:
        unet: its arguments.
        weights: its state dict.

    Returns:
        Its number of attention heads.

    Raises:
        UsageError: naming the arguments that it cannot have.
    """
    problems = [f"{name} is {unet[name]!r}, not {value!r}"
                for name, value in _EXACT.items() if unet[name] != value]
    down = [kind.removeprefix("Attn") for kind in unet["down_block_types"]]
    mirrored = [kind.replace("Up", "Down") for kind in unet["up_block_types"]][::-1]
    if set(down) != {"DownBlock2D"} or mirrored != list(unet["down_block_types"]):
        problems.append(f"the blocks are {unet['down_block_types']} and {unet['up_block_types']}")
    if unet["act_fn"] not in ("silu", "swish"):
        problems.append(f"act_fn is {unet['act_fn']!r}")
    shift = unet["resnet_time_scale_shift"]
    groups = unet["attn_norm_num_groups"] or (unet["norm_num_groups"] if shift == "default" else 0)
    if shift not in ("default", "scale_shift") or groups != GROUPS:
        problems.append(f"resnet_time_scale_shift is {shift!r} with attn_norm_num_groups "
                        f"{unet['attn_norm_num_groups']!r}")
    kind = unet["time_embedding_type"]
    if kind == "learned":
        rows = weights["time_proj.weight"]
        if not torch.allclose(rows, _table(len(rows), rows.shape[1]), atol=1e-6):
            problems.append("its embeddings of the timesteps are learned")
    elif kind != "positional":
        problems.append(f"time_embedding_type is {kind!r}")
    heads = attention_heads(unet)
    if len(heads) > 1:
        problems.append(f"it has {sorted(heads)} attention heads, depending on the level")
    if problems:
        raise UsageError("improved-diffusion has no network like it: " + "; ".join(problems))
    return heads.pop()


def attention_heads(unet: dict) -> set[int]:
    """The numbers of attention heads that occur in a ``UNet2DModel`` with these arguments."""
    size = unet["attention_head_dim"]
    return {width // size if size else 1 for width in attention_widths(unet)}


def attention_widths(unet: dict) -> list[int]:
    """Channels of the levels of a ``UNet2DModel`` that have attention, the middle included."""
    levels = zip(unet["block_out_channels"], unet["down_block_types"], strict=True)
    return [width for width, kind in levels if "Attn" in kind] + unet["block_out_channels"][-1:]


def _layout(unet: dict) -> Iterator[tuple[str, str, str]]:
    """(improved-diffusion's prefix, diffusers' prefix, kind) of every part of the network."""
    layers, last = unet["layers_per_block"], len(unet["block_out_channels"]) - 1
    yield "time_embed.0", "time_embedding.linear_1", "plain"
    yield "time_embed.2", "time_embedding.linear_2", "plain"
    yield "input_blocks.0.0", "conv_in", "plain"
    k = 1
    for i, kind in enumerate(unet["down_block_types"]):
        for j in range(layers):
            yield f"input_blocks.{k}.0", f"down_blocks.{i}.resnets.{j}", "residual"
            if "Attn" in kind:
                yield f"input_blocks.{k}.1", f"down_blocks.{i}.attentions.{j}", "attention"
            k += 1
        if i < last:
            yield f"input_blocks.{k}.0.op", f"down_blocks.{i}.downsamplers.0.conv", "plain"
            k += 1
    yield "middle_block.0", "mid_block.resnets.0", "residual"
    yield "middle_block.1", "mid_block.attentions.0", "attention"
    yield "middle_block.2", "mid_block.resnets.1", "residual"
    k = 0
    for i, kind in enumerate(unet["up_block_types"]):
        attends = "Attn" in kind
        for j in range(layers + 1):
            yield f"output_blocks.{k}.0", f"up_blocks.{i}.resnets.{j}", "residual"
            if attends:
                yield f"output_blocks.{k}.1", f"up_blocks.{i}.attentions.{j}", "attention"
            if j == layers and i < last:
                place = f"output_blocks.{k}.{1 + attends}.conv"
                yield place, f"up_blocks.{i}.upsamplers.0.conv", "plain"
            k += 1
    yield "out.0", "conv_norm_out", "plain"
    yield "out.2", "conv_out", "plain"


def to_diffusers(weights: dict[str, Tensor], unet: dict) -> dict[str, Tensor]:
    """An improved-diffusion state dict as that of the ``UNet2DModel`` of `unet_arguments`."""
    (heads,) = attention_heads(unet)
    found = {}
    if unet["time_embedding_type"] == "learned":
        width = weights["time_embed.0.weight"].shape[1]
        found["time_proj.weight"] = _table(unet["num_train_timesteps"], width)
    for theirs, ours, kind in _layout(unet):
        for old, new in _PARTS[kind].items():
            for end in (".weight", ".bias"):
                if theirs + old + end in weights:  # not every block has a skip convolution
                    value = weights[theirs + old + end]
                    # Attention there is of 1-d convolutions of width 1, here of linear layers.
                    flat = old == ".proj_out" and end == ".weight"
                    found[ours + new + end] = value[..., 0] if flat else value
        if kind == "attention":
            for end in (".weight", ".bias"):
                # Rows lie head by head, and q, k, v within a head.
                rows = weights[f"{theirs}.qkv{end}"]
                split = rows.reshape(heads, 3, -1, rows.shape[1] if end == ".weight" else 1)
                for part, name in enumerate("qkv"):
                    value = split[:, part].reshape(-1, split.shape[-1])
                    found[f"{ours}.to_{name}{end}"] = value if end == ".weight" else value[:, 0]
    return found


def from_diffusers(weights: dict[str, Tensor], unet: dict) -> dict[str, Tensor]:
    """The inverse of `to_diffusers`; ``unet`` must have passed `check_exact`."""
    (heads,) = attention_heads(unet)
    found = {}
    for theirs, ours, kind in _layout(unet):
        for old, new in _PARTS[kind].items():
            for end in (".weight", ".bias"):
                if ours + new + end in weights:
                    value = weights[ours + new + end]
                    flat = old == ".proj_out" and end == ".weight"
                    found[theirs + old + end] = value[..., None] if flat else value
        if kind == "attention":
            for end in (".weight", ".bias"):
                parts = [weights[f"{ours}.to_{name}{end}"] for name in "qkv"]
                width = parts[0].shape[0]
                rows = torch.stack([p.reshape(heads, width // heads, -1) for p in parts], dim=1)
                rows = rows.reshape(3 * width, -1)
                found[f"{theirs}.qkv{end}"] = rows[..., None] if end == ".weight" else rows[:, 0]
    return found


def _embed(t: Tensor, width: int) -> Tensor:
    """Cosines, then sines, of timesteps (B,), which may be fractions: (B, width)."""
    half = width // 2
    angle = t[:, None] * torch.exp(-math.log(10_000) * torch.arange(half, device=t.device) / half)
    return torch.cat([angle.cos(), angle.sin()], dim=1)


def _table(steps: int, width: int) -> Tensor:
    """The embeddings of t * 1000 / T, for every t."""
    return _embed(torch.arange(steps) * (1000 / steps), width)


def forward(weights: dict[str, Tensor], heads: int, x: Tensor, t: Tensor) -> Tensor:
    """improved-diffusion's forward pass on its own state dict, in plain torch, to check against.

    Args:
        weights: the state dict.
        heads: number of attention heads.
        x: (B, C, H, W) images.
        t: (B,) timesteps as the network is told them, which may be fractions.

    Returns:
        (B, C, H, W), or (B, 2 C, H, W) of a network with learned variances.
    """

    def linear(name: str, h: Tensor) -> Tensor:
        return F.linear(h, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def conv(name: str, h: Tensor, **options) -> Tensor:
        kernel = weights[f"{name}.weight"]
        return F.conv2d(h, kernel, weights[f"{name}.bias"], padding=kernel.shape[-1] // 2,
                        **options)

    def norm(name: str, h: Tensor) -> Tensor:
        return F.group_norm(h, GROUPS, weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-5)

    def residual(name: str, x: Tensor) -> Tensor:
        h = conv(f"{name}.in_layers.2", F.silu(norm(f"{name}.in_layers.0", x)))
        shift = linear(f"{name}.emb_layers.1", F.silu(embedding))[..., None, None]
        if shift.shape[1] == 2 * h.shape[1]:
            scale, shift = shift.chunk(2, dim=1)
            h = norm(f"{name}.out_layers.0", h) * (1 + scale) + shift
        else:
            h = norm(f"{name}.out_layers.0", h + shift)
        h = conv(f"{name}.out_layers.3", F.silu(h))
        skip = f"{name}.skip_connection"
        return (conv(skip, x) if f"{skip}.weight" in weights else x) + h

    def attention(name: str, x: Tensor) -> Tensor:
        flat = norm(f"{name}.norm", x).flatten(2)
        qkv = F.conv1d(flat, weights[f"{name}.qkv.weight"], weights[f"{name}.qkv.bias"])
        q, k, v = qkv.reshape(len(x) * heads, -1, flat.shape[-1]).chunk(3, dim=1)
        share = torch.softmax(q.transpose(1, 2) @ k / math.sqrt(q.shape[1]), dim=-1)
        h = (v @ share.transpose(1, 2)).reshape(flat.shape)
        h = F.conv1d(h, weights[f"{name}.proj_out.weight"], weights[f"{name}.proj_out.bias"])
        return x + h.reshape(x.shape)

    def block(name: str, h: Tensor) -> Tensor:
        for part in (f"{name}.{j}" for j in range(3)):
            if f"{part}.in_layers.0.weight" in weights:
                h = residual(part, h)
            elif f"{part}.qkv.weight" in weights:
                h = attention(part, h)
            elif f"{part}.op.weight" in weights:
                h = conv(f"{part}.op", h, stride=2)
            elif f"{part}.conv.weight" in weights:
                h = conv(f"{part}.conv", F.interpolate(h, scale_factor=2, mode="nearest"))
            elif f"{part}.weight" in weights:
                h = conv(part, h)
        return h

    width = weights["time_embed.0.weight"].shape[1]
    embedding = linear("time_embed.0", _embed(t, width))
    embedding = linear("time_embed.2", F.silu(embedding))
    counts = {part: 1 + max(int(name.split(".")[1]) for name in weights if name.startswith(part))
              for part in ("input_blocks", "output_blocks")}
    h, kept = x, []
    for k in range(counts["input_blocks"]):
        h = block(f"input_blocks.{k}", h)
        kept.append(h)
    h = block("middle_block", h)
    for k in range(counts["output_blocks"]):
        h = block(f"output_blocks.{k}", torch.cat([h, kept.pop()], dim=1))
    return conv("out.2", F.silu(norm("out.0", h)))
