"""Fused blocks: the same function, gradients and state dict as diffusers' own, channels-last."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import robustdm
from robustdm import NoiseSchedule, Objective, UsageError
from robustdm.models import build_model
from robustdm.ops import dropout
from robustdm.runs.config import TrainConfig
from tests.conftest import relative_error

KINDS = {
    "ddpm": dict(attention_resolutions=(4,)),
    "improved-diffusion": dict(
        scale_shift_norm=True, attention_resolutions=(4,), attention_head_dim=4),
}


def network(kind="ddpm", **fields):
    config = TrainConfig(block_channels=(8, 16), norm_groups=4, layers_per_block=1,
                         **{**KINDS[kind], **fields})
    model = build_model(config, (3, 8, 8))
    for p in model.parameters():  # norms start as the identity, which would hide mistakes
        nn.init.normal_(p, std=0.2) if p.ndim == 1 else None
    return model


def inputs(batch=2, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 3, 8, 8, generator=g, dtype=dtype)
    return x.contiguous(memory_format=torch.channels_last), torch.arange(batch) * 100


@pytest.mark.parametrize("kind", KINDS)
def test_fusing_changes_neither_function_nor_gradients(kind):
    model = network(kind).double()
    fused = robustdm.fuse(copy.deepcopy(model))
    assert sum("Fused" in type(m).__name__ for m in fused.modules()) > 8
    x, t = inputs()
    x1, x2 = (x.clone().requires_grad_() for _ in range(2))
    a, b = model(x1, t).sample, fused(x2, t).sample
    assert relative_error(b, a) < 1e-12
    cotangent = torch.randn_like(a)
    wanted = torch.autograd.grad(a, [x1, *model.parameters()], cotangent)
    got = torch.autograd.grad(b, [x2, *fused.parameters()], cotangent)
    for g, w in zip(got, wanted, strict=True):
        assert relative_error(g, w) < 1e-9 or w.norm() < 1e-9


def test_the_state_dict_is_the_same_and_unfuse_undoes_all():
    model = network()
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    names = [type(m) for m in model.modules()]
    fused = robustdm.fuse(robustdm.fuse(model))  # twice is once
    assert fused is model and list(fused.state_dict()) == list(weights)
    copied = copy.deepcopy(fused)
    copied.load_state_dict(weights)
    assert all(torch.equal(v, weights[k]) for k, v in copied.state_dict().items())
    assert [type(m) for m in robustdm.unfuse(copied).modules()] == names
    assert [type(m) for m in fused.modules()] != names


class Layouts(TorchDispatchMode):
    """Convolutions whose input or gradient is not channels-last."""

    def __init__(self):
        super().__init__()
        self.seen, self.bad = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        aten = torch.ops.aten
        if func in (aten.convolution.default, aten.convolution_backward.default):
            for value in args[:2]:
                self.seen += 1
                if value.stride(1) != 1:  # gaps are fine: halves of a concatenation have them
                    self.bad.append((str(func), tuple(value.shape)))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
def test_no_convolution_sees_another_layout(kind):
    """Not even at batches of 64, where diffusers copies, nor behind a norm, nor in the backward."""
    model = robustdm.fuse(network(kind))
    x, t = inputs(64, torch.float32)
    with Layouts() as layouts:
        model(x, t).sample.backward(x)
    assert layouts.seen > 30 and layouts.bad == []
    with Layouts() as layouts:  # the check itself sees what diffusers does
        robustdm.unfuse(model)(x, t).sample.backward(x)
    assert layouts.bad


@pytest.mark.parametrize("share", [True, False])
def test_dropout_masks_come_from_the_draw(share):
    """Shared by the passes of a step, different by layer, step and sample; repeated by a split."""
    model = robustdm.fuse(network(dropout=0.5)).double().train()
    objective = Objective("robust_ran", NoiseSchedule.linear(1000), share_dropout=share)
    x0, _ = inputs(4)
    seen = []
    original = robustdm.ops.group_norm_act

    def spy(*args, **kwargs):
        if kwargs.get("dropout"):
            seen.append((kwargs["layer"], tuple(kwargs["key"].tolist())))
        return original(*args, **kwargs)

    robustdm.ops.group_norm_act = spy
    try:
        draw = objective.draw(x0, seed=1, step=2)
        before = torch.random.get_rng_state()
        whole = objective(model, x0, draw)
    finally:
        robustdm.ops.group_norm_act = original
    assert torch.equal(before, torch.random.get_rng_state())
    layers = [layer for layer, _ in seen]
    half = len(layers) // 2
    assert half > 3 and len(set(layers[:half])) == half
    offset = 0 if share else dropout.PASS_STRIDE
    assert layers[half:] == [layer + offset for layer in layers[:half]]
    assert {key for _, key in seen} == {(1, 2, 0)}
    parts = [
        objective(model, x0[i:i + 2], objective.draw(x0[i:i + 2], seed=1, step=2, first_index=i))
        for i in (0, 2)
    ]
    assert torch.allclose(torch.cat([p.reg for p in parts]), whole.reg)
    other = objective(model, x0, objective.draw(x0, seed=1, step=3))
    assert not torch.allclose(other.fit, whole.fit)


def test_dropout_outside_of_an_objective_is_torchs():
    model = robustdm.fuse(network(dropout=0.5)).double().train()
    x, t = inputs()
    torch.manual_seed(0)
    first = model(x, t).sample
    again = model(x, t).sample
    torch.manual_seed(0)
    assert torch.equal(first, model(x, t).sample) and not torch.equal(first, again)
    assert torch.equal(model.eval()(x, t).sample, model(x, t).sample)


def test_padding_the_image_channels_changes_no_number(monkeypatch):
    """Where the first and last convolutions are padded, each has eight and computes the same."""
    from robustdm.models.fuse import PaddedConv2d

    model, (x, t) = robustdm.fuse(network()).double(), inputs()
    for conv in (model.conv_in, model.conv_out):
        assert type(conv) is PaddedConv2d
    assert model.conv_in.in_channels % 8 and model.conv_out.out_channels % 8

    def results():
        image = x.clone().requires_grad_()
        out = model(image, t).sample
        weights = list(model.parameters())
        return out, *torch.autograd.grad((out * out).sum(), [image, *weights])

    plain = results()
    seen = []
    original = PaddedConv2d._conv_forward
    monkeypatch.setattr(PaddedConv2d, "wants_eight", lambda self, x: True)
    monkeypatch.setattr(PaddedConv2d, "_conv_forward", lambda self, x, *rest: (
        seen.append((x.shape[1], len(rest[0]))), original(self, x, *rest))[1])
    for a, b in zip(results(), plain, strict=True):
        assert a.shape == b.shape and torch.allclose(a, b, rtol=1e-9, atol=1e-12)
    assert seen == [(8, 8), (8, 8)]
    monkeypatch.setattr(PaddedConv2d, "pad", False)
    for a, b in zip(results(), plain, strict=True):
        assert torch.equal(a, b)
    assert seen[2:] == [(3, 8), (8, 3)]
    robustdm.unfuse(model)
    assert type(model.conv_in) is type(model.conv_out) is nn.Conv2d


@pytest.mark.parametrize("kind", KINDS)
def test_folding_the_bias_into_the_norm_changes_no_gradient(kind, monkeypatch):
    from robustdm.models.fuse import FusedResnetBlock2D

    model, (x, t) = network(kind).double(), inputs()
    monkeypatch.setattr(FusedResnetBlock2D, "on_gpu", lambda self, x: True)
    fused, biases = robustdm.fuse(copy.deepcopy(model)), []
    original = nn.Conv2d._conv_forward
    monkeypatch.setattr(nn.Conv2d, "_conv_forward", lambda self, x, weight, bias: (
        biases.append(bias), original(self, x, weight, bias))[1])

    def results(net):
        biases.clear()
        image = x.clone().requires_grad_()
        out = net(image, t).sample
        names, weights = zip(*net.named_parameters(), strict=True)
        grads = torch.autograd.grad((out * out).sum(), [image, *weights])
        return dict(zip(("out", "image", *names), (out, *grads), strict=True))

    wanted = results(model)
    assert None not in biases
    blocks = [m for m in fused.modules() if isinstance(m, FusedResnetBlock2D)]
    for block in blocks:
        assert block.conv1.bias.abs().sum() > 0
    found = results(fused)
    assert sum(bias is None for bias in biases) == len(blocks) > 3
    for name, value in found.items():
        assert relative_error(value, wanted[name]) < 1e-9 or wanted[name].norm() < 1e-9, name
    hook = blocks[0].conv1.register_forward_hook(lambda *_: None)  # one that watches sees it all
    results(fused)
    assert sum(bias is None for bias in biases) == len(blocks) - 1
    hook.remove()
    monkeypatch.setattr(FusedResnetBlock2D, "fold_bias", False)
    results(fused)
    assert None not in biases


def test_conditional_networks():
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    model = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16),
        layers_per_block=1, norm_num_groups=4, cross_attention_dim=8, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()
    fused = robustdm.fuse(copy.deepcopy(model))
    x, t, text = torch.randn(2, 4, 8, 8), torch.tensor([1, 5]), torch.randn(2, 3, 8)
    assert relative_error(fused(x, t, text).sample, model(x, t, text).sample) < 1e-5


def test_what_cannot_be_fused_is_refused():
    with pytest.raises(UsageError, match="Linear has no residual block or group norm of diffusers"):
        robustdm.fuse(nn.Linear(2, 2))
