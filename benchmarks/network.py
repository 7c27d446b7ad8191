"""Cases of the ops whose sizes a network decides: GroupNorm blocks, and the optimizer's pass."""

from __future__ import annotations

from collections import Counter
from functools import cache

import torch
from case import (
    NAMES,
    OTHERS,
    OURS,
    Case,
    Provider,
    Setup,
    Verdict,
    against,
    eager_and_compiled,
    our_backends,
    relative_error,
)
from torch import Tensor, nn
from torch.nn import functional as F

from robustdm import ops
from robustdm.models import build_model
from robustdm.ops import stream
from robustdm.runs.config import TrainConfig
from robustdm.runs.presets import preset_values

RATE = 0.1  # dropout
GROUPS = 32
TINY_NORM = 1e-6  # DDPM's
BATCH = {"cifar10": 128, "lsun256": 4}
CHECKED = 2_000_000  # weights of the optimizer that are compared with the reference


def cases(device: torch.device, tiny: bool = False) -> list[Case]:
    """GroupNorm at every shape of the CIFAR and LSUN networks (on a CPU, two), and AdamW."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if tiny:
        shapes = {(2, 64, 4, 4): "tiny"}
    elif device.type == "cpu":
        shapes = {(8, 128, 32, 32): "cifar10", (8, 256, 16, 16): "cifar10"}
    else:
        shapes = {}
        for preset, batch in BATCH.items():
            for (channels, height, width), uses in norm_shapes(preset).items():
                shapes[batch, channels, height, width] = f"{uses} layers of {preset}"
    found = [_optimizer(tiny)]
    for shape, uses in shapes.items():
        # The target's own shape; then the others, largest first.
        first = shape == (128, 128, 32, 32)
        for backward in (False, True):
            found.append(_norm(shape, dtype, 0 if first else 1 if shape[-1] > 8 else 2, backward,
                               uses))
            if shape == min(shapes, key=lambda s: (s != (128, 128, 32, 32), s)):
                # The norm before conv1, and the one of networks that scale and shift (AdaGN).
                found += [_norm(shape, dtype, 0, backward, uses, rate=0.0, name="no dropout"),
                          _norm(shape, dtype, 1, backward, uses, adaptive=True, name="AdaGN")]
    return found


@cache
def network(preset: str) -> nn.Module:
    """A preset's network without memory for its weights."""
    config = TrainConfig.from_dict(preset_values(preset))
    with torch.device("meta"):
        return build_model(config, (3, config.resolution, config.resolution))


def norm_shapes(preset: str) -> dict[tuple[int, int, int], int]:
    """(C, H, W) that the image GroupNorms of a preset's network see -> how many of them do."""
    model, found = network(preset), Counter()
    side = model.config.sample_size

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if inputs[0].ndim == 4:  # the attention's has no activation behind it
            found[tuple(inputs[0].shape[1:])] += 1

    hooks = [m.register_forward_pre_hook(note) for m in model.modules()
             if isinstance(m, nn.GroupNorm)]
    model(torch.empty(1, 3, side, side, device="meta"), torch.zeros(1, device="meta"))
    for hook in hooks:
        hook.remove()
    return dict(sorted(found.items(), key=lambda item: -torch.Size(item[0]).numel()))


# group_norm_act


def _block(x, add, weight, bias, key, rate=RATE):
    v = x + add[:, :, None, None]
    return F.dropout(F.silu(F.group_norm(v, GROUPS, weight, bias, TINY_NORM)), rate)


def _adaptive_block(x, add, weight, bias, key, rate=RATE):
    """AdaGN: ``add`` holds the scale and, behind it, the shift."""
    scale, shift = add[:, :, None, None].chunk(2, dim=1)
    u = F.group_norm(x, GROUPS, weight, bias, TINY_NORM) * (1 + scale) + shift
    return F.dropout(F.silu(u), rate)


def _norm(
    shape, dtype, priority, backward: bool, uses: str, rate: float = RATE, adaptive: bool = False,
    name: str = "",
) -> Case:
    batch, channels = shape[:2]
    passes = 5 if backward else 2
    variant = "forward+backward" if backward else "forward"
    variant += f" {name}" * bool(name)

    def block(*inputs):
        return (_adaptive_block if adaptive else _block)(*inputs, rate)

    def around(function, planar: bool = False):
        def call(x, add, weight, bias, key, dy, x_planar, dy_planar):
            x, dy = (x_planar, dy_planar) if planar else (x, dy)
            if not backward:
                return (function(x, add, weight, bias, key),)
            with torch.enable_grad():
                y = function(x, add, weight, bias, key)
                return y, *torch.autograd.grad(y, (x, add, weight, bias), dy)

        return call

    def build(device: torch.device) -> Setup:
        torch.manual_seed(0)
        x, dy = (
            torch.randn(shape, device=device).to(dtype).contiguous(
                memory_format=torch.channels_last) for _ in range(2)
        )
        add = torch.randn(batch, (1 + adaptive) * channels, device=device).to(dtype)
        weight, bias = (torch.randn(channels, device=device).to(dtype) for _ in range(2))
        key = torch.tensor([1, 2, 0], device=device)
        planar = [v.contiguous() for v in (x, dy)]
        planar[0].requires_grad_(backward)
        leaves = [v.requires_grad_(backward) for v in (x, add, weight, bias)]

        def expected(mask: Tensor) -> list[Tensor]:
            """Outputs in float64 for a given dropout mask. The sum of x and add is rounded where
            all providers round it, so that nothing but the op itself is judged."""
            wide = [v.detach().double().requires_grad_(backward) for v in leaves]
            with torch.set_grad_enabled(backward):
                if adaptive:
                    u = _adaptive_block(*wide, key, rate=0.0)
                else:
                    v = wide[0] + wide[1][:, :, None, None]
                    v = v + (v.detach().to(dtype).double() - v.detach())
                    u = F.silu(F.group_norm(v, GROUPS, *wide[2:], TINY_NORM))
                y = u * mask / (1 - rate)
                grads = torch.autograd.grad(y, wide, dy.double()) if backward else ()
            return [y.detach(), *grads]

        @cache
        def expected_ours() -> list[Tensor]:
            return expected(stream.dropout_mask(key, shape, 0, rate))

        limit = OTHERS[dtype] * (1 + adaptive)  # plain torch rounds the scaled value once more

        def own_mask(inputs, got) -> Verdict:
            kept = got[0] != 0 if rate else torch.ones_like(got[0], dtype=torch.bool)
            share = kept.float().mean().item()
            if abs(share - (1 - rate)) > 0.001 + 5 * (rate / kept.numel()) ** 0.5:
                return Verdict(float("nan"), limit, f"share kept is {share:.4f}")
            return Verdict(relative_error(got, expected(kept)), limit,
                           "float64 reference with its own dropout mask")

        def call(name):
            def norm(x, add, weight, bias, key):
                scale, shift = add.chunk(2, dim=1) if adaptive else (None, None)
                return ops.group_norm_act(
                    x, GROUPS, weight, bias, add=None if adaptive else add, scale=scale,
                    shift=shift, dropout=rate, key=key, tiny=TINY_NORM,
                    backend="auto" if name == "torch" else name)

            return around(norm)

        ours, off = our_backends(
            "group_norm_act", device, call, against(expected_ours, OURS[dtype]))
        providers = [
            *eager_and_compiled(block, own_mask, around), *ours,
            Provider("eager nchw", around(block, planar=True), own_mask),
        ]
        if device.type == "cuda" and rate and not adaptive:
            made, missing = peers(around, own_mask, channels, device)
            providers += made
            off |= missing
        return Setup((*leaves, key, dy, *planar), providers, off)

    title = f"group_norm_act {variant} {'x'.join(map(str, shape))} {NAMES[dtype]}"
    formula = "read x, write y" + ("; read x and dy, write dx" if backward else "")
    return Case(
        "group_norm_act", title, passes * torch.Size(shape).numel() * dtype.itemsize,
        f"{formula}: {passes} x {dtype.itemsize} B an element", dtype, build, priority, uses,
    )


def peers(around, check, channels: int, device: torch.device):
    """Other people's GroupNorm kernels where they are installed, and why they are off."""
    found, off = [], {}
    try:
        from apex.contrib.group_norm import GroupNorm

        norm = GroupNorm(GROUPS, channels, eps=TINY_NORM, act="silu").to(device)

        def apex(x, add, weight, bias, key):
            y = torch.func.functional_call(
                norm, {"weight": weight, "bias": bias}, (x + add[:, :, None, None],))
            return F.dropout(y, RATE)

        found.append(Provider("apex", around(apex), check))
    except Exception as error:  # not installed, or built for another torch
        off["apex"] = f"{type(error).__name__}: {error}"
    try:
        from liger_kernel.ops.group_norm import LigerGroupNormFunction

        def liger(x, add, weight, bias, key):
            v = (x + add[:, :, None, None]).contiguous()
            y = LigerGroupNormFunction.apply(v, weight, bias, channels, GROUPS, TINY_NORM)
            return F.dropout(F.silu(y), RATE)

        found.append(Provider("liger", around(liger), check))
    except Exception as error:
        off["liger"] = f"{type(error).__name__}: {error}"
    return found, off


# adamw_ema


def _optimizer(tiny: bool) -> Case:
    sizes = [(64, 3), (64,)] if tiny else [tuple(p.shape) for p in network("cifar10").parameters()]
    count = sum(torch.Size(size).numel() for size in sizes)
    lr, decay, beta1, beta2 = 1e-4, 0.999, 0.9, 0.999

    def build(device: torch.device) -> Setup:
        def state(scale: float) -> list[Tensor]:
            torch.manual_seed(0)
            return [scale * torch.randn(size, device=device) for size in sizes]

        def fresh() -> tuple[list[Tensor], ...]:
            """params, grads, exp_avgs, exp_avg_sqs, averages, copies; before the first step."""
            params = state(0.1)
            zeros = ([torch.zeros_like(p) for p in params] for _ in range(2))
            return (params, state(0.01), *zeros, [p.clone() for p in params],
                    [p.bfloat16() for p in params])

        scalars = {
            name: torch.tensor(value, device=device) for name, value in
            dict(lr=lr, step=1.0, decay=decay, factor=1.0, skip=0.0).items()
        }

        def some(tensors: list[Tensor]) -> Tensor:
            """The first few weights of a list, as one vector."""
            taken, left = [], CHECKED
            for tensor in tensors:
                if tensor.numel() <= left:
                    taken.append(tensor.flatten())
                    left -= tensor.numel()
            return torch.cat(taken)

        @cache
        def expected() -> tuple[Tensor, Tensor]:
            """Weights and their average after the first step in float64."""
            p, g = (some(state(scale)).double() for scale in (0.1, 0.01))
            # The first step's bias corrections cancel the decay rates.
            new = p * (1 - lr * 0.01) - lr * g / (g.abs() + 1e-8)
            return new, p.lerp(new, 1 - decay)

        def check(inputs, got) -> Verdict:
            params, averages, copies = (some(v) for v in got)
            exact = (copies == params.bfloat16()).all().item()
            error = relative_error((params, averages), expected()) if exact else float("nan")
            return Verdict(error, OURS[torch.float32], "float64 step")

        def ours(name):
            p, g, m, v, averages, copies = fresh()

            def call():
                ops.adamw_ema(p, g, m, v, averages, copies, **scalars, beta1=beta1, beta2=beta2,
                              weight_decay=0.01, backend=name, check=False)
                return p, averages, copies

            return call

        def eager():
            p, g, _, _, averages, copies = fresh()
            for one, gradient in zip(p, g, strict=True):
                one.grad = gradient
            optimizer = torch.optim.AdamW(p, lr=lr, betas=(beta1, beta2), weight_decay=0.01,
                                          fused=True, capturable=device.type == "cuda")

            def call():
                optimizer.step()
                torch._foreach_lerp_(averages, p, 1 - decay)
                torch._foreach_copy_(copies, p)
                return p, averages, copies

            return call

        made, off = our_backends("adamw_ema", device, lambda name: Later(lambda: ours(name)), check)
        off["compile"] = "compiling an optimizer over hundreds of tensors takes minutes"
        return Setup((), [Provider("eager", Later(eager), check), *made], off)

    return Case(
        "adamw_ema", f"adamw_ema {count / 1e6:.1f}M fp32", 38 * count,
        "read g, p, m, v, average, write p, m, v, average, bf16 copy: 38 B a weight",
        torch.float32, build, 0,
    )


class Later:
    """A call whose buffers are made when it is first used: they are of no use to the others."""

    def __init__(self, make):
        self._make, self._call = make, None

    def __call__(self, *inputs):
        if self._call is None:
            self._call = self._make()
        return self._call(*inputs)
