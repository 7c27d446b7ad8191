"""The compiled step: what its one graph holds, and that it computes what the eager step does."""

import pytest
import torch
from torch import nn
from torch._dynamo import config as dynamo
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

from robustdm import NoiseSchedule, Objective, UsageError, fuse
from robustdm.method.gradients import GradientStep, WorkingCopy
from robustdm.models import build_model
from robustdm.runs.config import TrainConfig

SHAPE = (2, 8, 8)
CONV = torch.ops.aten.convolution.default
CONV_BACKWARD = torch.ops.aten.convolution_backward.default
INPUT, WEIGHT = [True, False, False], [False, True, True]


def network(channels=(8, 16), dropout=0.1, fused=True):
    config = TrainConfig(block_channels=channels, norm_groups=4, dropout=dropout)
    model = build_model(config, SHAPE).train()
    with torch.no_grad():
        for p in model.parameters():  # diffusers starts some layers at zero
            p.add_(0.02 * torch.randn_like(p))
    return fuse(model) if fused else model


def objective(name="robust_adv", **options):
    return Objective(name, NoiseSchedule.linear(1000), **options)


def key(step, first=0):
    return torch.tensor([1, step, first])


def images(batch=4):
    x = torch.randn(batch, *SHAPE, generator=torch.Generator().manual_seed(0))
    return x.contiguous(memory_format=torch.channels_last)


def recorded(step):
    """Compile a step so that it runs eagerly, node by node; returns the list of its graphs."""
    graphs = []

    def compiler(graph, _):
        graphs.append(graph)
        return graph

    step.compile(aot_autograd(fw_compiler=compiler, bw_compiler=compiler))
    return graphs


def assert_same(a, b, rtol=1e-5):
    assert torch.equal(a.t, b.t)
    for name in ("total", "fit", "reg"):
        assert torch.allclose(getattr(a, name), getattr(b, name), rtol=rtol), name
    assert all(g.dtype == torch.float32 for g in a.weights)
    assert error(a.weights, b.weights) < rtol


def error(found, exact):
    """Of whole gradients, for some of their parts are nought but for rounding."""
    wrong = sum((g - h).square().sum() for g, h in zip(found, exact, strict=True))
    return (wrong / sum(h.square().sum() for h in exact)).sqrt().item()


def nodes(graph, target):
    return [n for n in graph.graph.nodes if n.target == target]


def test_one_graph_holds_an_exact_step():
    """Eight units, in one graph: three passes, the way back to the input for the attack and to
    input and weights for both terms, and not one NCHW convolution."""
    model = network()
    step, eager = GradientStep(model, objective()), GradientStep(model, objective())
    graphs = recorded(step)
    x0 = images()
    for number in range(4):
        with dynamo.patch(error_on_recompile=number > 0):
            result = step(x0, key(number))
        assert_same(result, eager(x0, key(number)))
    (graph,) = graphs  # every step in the same
    convolutions = sum(isinstance(m, nn.Conv2d) for m in model.modules())
    forward, backward = nodes(graph, CONV), nodes(graph, CONV_BACKWARD)
    masks = [n.args[-1] for n in backward]
    assert len(forward) == 3 * convolutions
    assert masks.count(INPUT) == convolutions
    assert masks.count(WEIGHT) == 2  # the first convolution, whose input wants nothing
    assert masks.count([True] * 3) == 2 * (convolutions - 1) and len(masks) == 3 * convolutions
    work = len(forward) + sum(mask[0] + mask[1] for mask in masks)
    assert work + 2 == objective().units(0) * convolutions
    for node in forward + backward:
        tensors = node.args[:2] if node in forward else node.args[:3]
        for arg in tensors:
            value = arg.meta["val"]
            assert value.stride(1) == 1, (node, arg, value.shape, value.stride())


def test_a_step_without_regulariser_is_plain_ddpm():
    model = network((8,))
    step = GradientStep(model, objective(reg_every=2))
    graphs = recorded(step)
    x0 = images()
    plain = GradientStep(model, objective("ddpm"))
    assert_same(step(x0, key(1), regularised=False), plain(x0, key(1)))
    step(x0, key(2), regularised=True)
    with dynamo.patch(error_on_recompile=True):
        assert_same(step(x0, key(3), regularised=False), plain(x0, key(3)))
    convolutions = sum(isinstance(m, nn.Conv2d) for m in model.modules())
    assert [len(nodes(g, CONV)) for g in graphs] == [convolutions, 3 * convolutions]


@pytest.mark.parametrize("name, options", [
    ("robust_ran", dict(reg_fraction=0.5, detach_clean=True)),
    ("outward_ran", {}),
    ("invariance", dict(share_dropout=False)),
    ("robust_adv", dict(attack="equivariance", attack_fraction=0.5, beta_per="batch")),
])
def test_every_objective_compiles(name, options):
    model = network((8,))
    step, eager = (GradientStep(model, objective(name, **options)) for _ in range(2))
    (graphs, x0) = recorded(step), images()
    for number in range(2):
        assert_same(step(x0, key(number, 3), scale=0.5), eager(x0, key(number, 3), scale=0.5))
    assert len(graphs) == 1


def test_loose_dropout_is_refused_where_masks_are_shared():
    model = network((8,), fused=False)
    with pytest.raises(UsageError, match=r"cannot share the dropout masks of .*robustdm\.fuse"):
        GradientStep(model, objective()).compile()
    GradientStep(model, objective(share_dropout=False)).compile()
    GradientStep(model, objective("ddpm")).compile()
    GradientStep(network((8,), dropout=0.0, fused=False), objective()).compile()


def test_a_torch_that_cannot_trace_differentiation(monkeypatch):
    monkeypatch.setattr("robustdm.method.gradients.dynamo", object())
    with pytest.raises(UsageError, match="cannot trace torch.autograd.grad: use torch 2.11"):
        GradientStep(network((8,)), objective()).compile()


class Casts(TorchDispatchMode):
    """Counts conversions of tensors that are given."""

    def __init__(self, tensors):
        super().__init__()
        self.watched, self.count = {t.data_ptr() for t in tensors}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "_to_copy" in str(func) and args[0].data_ptr() in self.watched:
            self.count += 1
        return func(*args, **(kwargs or {}))


def test_a_working_copy_computes_in_bf16_without_converting_weights():
    model = network(dropout=0.0)
    copy = WorkingCopy(model)
    pairs = list(zip(model.parameters(), copy.parameters(), strict=True))
    for p, q in pairs:
        assert q.dtype == torch.bfloat16 and torch.equal(q, p.to(torch.bfloat16))
        assert q.stride() == p.stride() and p.dtype == torch.float32
    assert all(b.dtype == torch.float32 for b in copy.buffers())
    step, wide = GradientStep(copy, objective()), GradientStep(model, objective())
    with Casts([q for _, q in pairs if q.ndim > 1]) as casts:
        result = step(images(), key(0))
    assert casts.count == 0
    exact = wide(images(), key(0))
    # bf16 has 8 bits: not exact, and not far away.
    assert 1e-4 < error(result.weights, exact.weights) < 0.05
    assert result.total.dtype == result.fit.dtype == torch.float32


def test_a_compiled_working_copy():
    copy = WorkingCopy(network((8,)))
    step, eager = GradientStep(copy, objective()), GradientStep(copy, objective())
    graphs = recorded(step)
    x0 = images()
    assert_same(step(x0, key(0)), eager(x0, key(0)))
    for node in nodes(graphs[0], CONV):
        assert node.meta["val"].dtype == torch.bfloat16
