"""Fused channels-last normalisation for networks made of diffusers' blocks.

``fuse(network)`` makes residual blocks, attention norms and the norm before the output call
`robustdm.ops.group_norm_act`: in place, with the same parameters and the same state dict, trained
or not. Only the classes of modules change, so that copies, checkpoints and hooks work as before.
"""

from __future__ import annotations

import torch
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.nn import functional as F

from robustdm import ops
from robustdm.errors import UsageError
from robustdm.ops.dropout import PASS_STRIDE, mask_source


class FusedGroupNorm(nn.GroupNorm):
    """`torch.nn.GroupNorm` that keeps channels-last tensors so."""

    silu = False

    def forward(self, x: Tensor) -> Tensor:
        return ops.group_norm_act(
            x, self.num_groups, self.weight, self.bias, silu=self.silu, tiny=self.eps
        )


class FusedGroupNormSiLU(FusedGroupNorm):
    """The same with the SiLU behind it."""

    silu = True


class FusedActivation(nn.SiLU):
    """A SiLU that the norm before it has already applied."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class FusedResnetBlock2D(ResnetBlock2D):
    """diffusers' residual block with two fused norms, and without its copies to another layout."""

    layer = 0  # number of this block in its network, for dropout masks of its own
    draws_masks = True  # see dropout.unfused_dropout
    fold_bias = True  # may the norm add the first convolution's bias, see folds_bias

    def forward(self, input_tensor: Tensor, temb: Tensor | None, *args, **kwargs) -> Tensor:
        x = input_tensor
        h = ops.group_norm_act(
            x, self.norm1.num_groups, self.norm1.weight, self.norm1.bias, tiny=self.norm1.eps
        )
        resample = self.upsample or self.downsample
        if resample is not None:
            x, h = resample(x), resample(h)
        folds = self.folds_bias(h)
        h = self.conv1._conv_forward(h, self.conv1.weight, None) if folds else self.conv1(h)
        named: dict[str, Tensor] = {}
        if self.time_emb_proj is not None:
            embedding = self.time_emb_proj(temb if self.skip_time_act else F.silu(temb))
            if self.time_embedding_norm == "scale_shift":
                named["scale"], named["shift"] = embedding.chunk(2, dim=1)
            else:
                named["add"] = embedding
        if folds:
            bias = self.conv1.bias.expand(h.shape[:2])
            named["add"] = named["add"] + bias if "add" in named else bias
        source = mask_source()
        drops = self.training and self.dropout.p > 0
        if drops and source is not None:
            named["key"] = source.key
        h = ops.group_norm_act(
            h, self.norm2.num_groups, self.norm2.weight, self.norm2.bias, **named,
            dropout=self.dropout.p if "key" in named else 0.0,
            layer=self.layer + (0 if source is None else source.number * PASS_STRIDE),
            tiny=self.norm2.eps,
        )
        if drops and source is None:
            h = self.dropout(h)
        h = self.conv2(h)
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(x)
        return (x + h) / self.output_scale_factor

    def folds_bias(self, x: Tensor) -> bool:
        """Whether the norm behind the first convolution adds its bias: on a GPU, where the addition
        and its gradient are passes over the activations of their own. Speed unmeasured."""
        conv = self.conv1
        # Another class, or a hook, wants to see the whole convolution.
        plain = type(conv) is nn.Conv2d and not (
            conv._forward_hooks or conv._forward_pre_hooks or conv._backward_hooks
            or conv._backward_pre_hooks
        )
        return self.fold_bias and plain and conv.bias is not None and self.on_gpu(x)

    def on_gpu(self, x: Tensor) -> bool:
        return x.is_cuda


class FusedUpsample2D(Upsample2D):
    """diffusers' upsampling, without its copy to another layout at batches of 64 and more."""

    def forward(self, hidden_states: Tensor, output_size: int | None = None, *args, **kw) -> Tensor:
        x = hidden_states
        if output_size is not None:
            x = F.interpolate(x, size=output_size, mode="nearest")
        elif torch.compiler.is_compiling():
            # The compiler would turn interpolation into indexing, whose gradient is scattered,
            # pixel by pixel, into an NCHW tensor.
            b, c, h, w = x.shape
            rows = x.permute(0, 2, 3, 1)[:, :, None, :, None]
            x = rows.expand(b, h, 2, w, 2, c).reshape(b, 2 * h, 2 * w, c).permute(0, 3, 1, 2)
        else:
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return self.conv(x)


class PaddedConv2d(nn.Conv2d):
    """The first and the last convolution, of three image channels: in half precision, tensor cores
    want eight, most of all for the gradient with respect to the input, which every attack needs.
    Speed unmeasured."""

    pad = True

    def forward(self, x: Tensor) -> Tensor:
        inputs, outputs = -self.in_channels % 8, -self.out_channels % 8
        if not (inputs or outputs) or not self.pad or not self.wants_eight(x):
            return super().forward(x)
        if inputs:
            x = F.pad(x, (0, 0, 0, 0, 0, inputs)).contiguous(memory_format=torch.channels_last)
        weight = F.pad(self.weight, (0, 0, 0, 0, 0, inputs, 0, outputs))
        bias = self.bias
        if outputs and bias is not None:
            bias = F.pad(bias, (0, outputs))
        y = self._conv_forward(x, weight, bias)
        if outputs:
            y = y[:, :self.out_channels].contiguous(memory_format=torch.channels_last)
        return y

    def wants_eight(self, x: Tensor) -> bool:
        return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)


_FUSED = {
    ResnetBlock2D: FusedResnetBlock2D, nn.GroupNorm: FusedGroupNorm, Upsample2D: FusedUpsample2D
}
_PLAIN = {fused: plain for plain, fused in _FUSED.items()} | {
    FusedGroupNormSiLU: nn.GroupNorm, FusedActivation: nn.SiLU, PaddedConv2d: nn.Conv2d
}


def _fusable(module: nn.Module) -> bool:
    if type(module) is ResnetBlock2D:
        return isinstance(module.nonlinearity, nn.SiLU)
    if type(module) is Upsample2D:
        return (module.use_conv and module.interpolate and module.norm is None
                and module.name == "conv" and not module.use_conv_transpose)
    return type(module) is nn.GroupNorm and module.affine


def fuse(network: nn.Module) -> nn.Module:
    """Let a network's residual blocks and group norms run fused and channels-last, in place.

    Args:
        network: a diffusers ``UNet2DModel`` or ``UNet2DConditionModel``, or any module that holds
            their residual blocks. Blocks with another activation than SiLU stay as they are.

    Returns:
        The network, its parameters now channels-last.

    Raises:
        UsageError: if there is nothing to fuse.
    """
    change_classes(network)
    return network.to(memory_format=torch.channels_last)


def change_classes(network: nn.Module) -> None:
    """What `fuse` does to the modules, without touching their parameters."""
    count = 0
    for module in network.modules():
        if _fusable(module):
            module.__class__ = _FUSED[type(module)]
            if isinstance(module, FusedResnetBlock2D):
                module.layer = count
            count += 1
        elif type(module) in _PLAIN:
            count += 1  # fused before
    if not count:
        raise UsageError(
            f"{type(network).__name__} has no residual block or group norm of diffusers: fuse a "
            "UNet2DModel or UNet2DConditionModel"
        )
    norm, activation = (getattr(network, name, None) for name in ("conv_norm_out", "conv_act"))
    if type(norm) is FusedGroupNorm and type(activation) is nn.SiLU:
        norm.__class__, activation.__class__ = FusedGroupNormSiLU, FusedActivation
    for name in ("conv_in", "conv_out"):
        conv = getattr(network, name, None)
        if type(conv) is nn.Conv2d and conv.groups == 1 and conv.padding_mode == "zeros":
            conv.__class__ = PaddedConv2d


def unfuse(network: nn.Module) -> nn.Module:
    """Undo `fuse`: every module gets its own class back; parameters stay where they are."""
    for module in network.modules():
        if type(module) in _PLAIN:
            module.__class__ = _PLAIN[type(module)]
    return network
