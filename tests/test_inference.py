"""fast_network: the same predictions from a copy, at any batch size, whatever cannot be had."""

import contextlib
import copy
import shutil

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import robustdm
from robustdm import NoiseSchedule, UsageError
from robustdm.method.sampling import sample
from robustdm.models import PointMLP, build_model, inference
from robustdm.models.inference import fast_network
from robustdm.ops import native
from robustdm.runs.config import TrainConfig
from tests.conftest import relative_error

HAS_CPP = native.status()["cpu"][0]

SCHEDULE = NoiseSchedule.linear(1000)
SHAPE = (3, 8, 8)
TOLERANCE = {"fp32": 1e-5, "bf16": 3e-2}


def unet():
    config = TrainConfig(block_channels=(8, 16), norm_groups=4, attention_resolutions=(4,),
                         dropout=0.5)
    model = build_model(config, SHAPE)
    for p in model.parameters():  # norms start as the identity, which would hide mistakes
        nn.init.normal_(p, std=0.2) if p.ndim == 1 else None
    return model


def inputs(batch=4, shape=SHAPE):
    g = torch.Generator().manual_seed(batch)
    return torch.randn(batch, *shape, generator=g), torch.arange(batch) * 200 + 1


def expected(model, x, t):
    with torch.no_grad():
        out = copy.deepcopy(model).eval()(x, t)
    return out if isinstance(out, torch.Tensor) else out.sample


@pytest.fixture
def fake_compiler(monkeypatch):
    """Compiles by doing nothing; records the shapes that it was run with."""
    shapes = []

    def compile_network(model, probe):
        shapes.append(tuple(probe().shape))

    monkeypatch.setattr(inference, "compile_network", compile_network)
    return shapes


class Recorder(TorchDispatchMode):
    def __init__(self, calls):
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out


class FakeGraph:
    """A CUDA graph on the CPU: a replay runs the recorded operations on the recorded tensors."""

    made: list = []

    def __init__(self):
        self.calls, self.replays = [], 0
        FakeGraph.made.append(self)

    def replay(self):
        self.replays += 1
        for func, args, kwargs, out in self.calls:
            if func.is_view:
                continue
            again = tree_leaves(func(*args, **kwargs))
            for place, value in zip(tree_leaves(out), again, strict=True):
                if isinstance(place, torch.Tensor):
                    place.copy_(value)


@pytest.fixture
def fake_cuda(monkeypatch):
    """What capturing calls of torch.cuda, for a CPU; yields the events in their order."""
    events = []

    class Stream:
        def __init__(self, name="side"):
            self.name = name

        def wait_stream(self, other):
            events.append(f"{self.name} waits for {other.name}")

    @contextlib.contextmanager
    def stream(side):
        events.append("on " + side.name)
        yield
        events.append("off " + side.name)

    @contextlib.contextmanager
    def graph(made):
        events.append("capture")
        with Recorder(made.calls):
            yield

    main = Stream("main")
    for name, value in (("Stream", Stream), ("stream", stream), ("graph", graph),
                        ("current_stream", lambda: main), ("CUDAGraph", FakeGraph),
                        ("device", lambda device: contextlib.nullcontext())):
        monkeypatch.setattr(torch.cuda, name, value)
    FakeGraph.made = []
    return events


def graphed(model, **options):
    """fast_network with a graph on the CPU, where the public way refuses it."""
    network = fast_network(model, **options)
    network._graph = True
    return network


# The same function.


@pytest.mark.parametrize("precision", TOLERANCE)
def test_predictions_are_the_model_s(precision):
    model, (x, t) = unet(), inputs()
    network = robustdm.fast_network(model, precision=precision)
    out = network(x, t)
    assert out.dtype == torch.float32 and not out.requires_grad
    assert relative_error(out, expected(model, x, t)) < TOLERANCE[precision]
    assert torch.equal(network(x.double(), t), out)
    assert list(network.off) == ([] if precision == "fp32" or HAS_CPP else ["fused"])
    assert network.device == torch.device("cpu")


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("cpp", [False, True])
def test_how_the_copy_runs(fake_compiler, precision, compile, cpp, monkeypatch):
    known = native.status()["cuda"]
    monkeypatch.setattr(native, "status", lambda: {"cpu": (cpp, ""), "cuda": known})
    network = fast_network(unet(), precision=precision, compile=compile)
    # Eager bf16 on a CPU without our C++ norms is faster as it is.
    fast = cpp or compile or precision == "fp32"
    assert any("Fused" in type(m).__name__ for m in network.modules()) == fast
    assert all((p.stride(1) == 1) == fast for p in network.parameters()
               if p.ndim == 4 and p.shape[-1] > 1)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    assert {p.dtype for p in network.parameters()} == {dtype}
    assert not any(m.training for m in network.modules())
    seen = set()
    network.network.conv_out.register_forward_pre_hook(
        lambda m, args: seen.add((args[0].dtype, args[0].stride(1) == 1)))
    network(*inputs())
    assert seen == {(dtype, fast)}


def test_the_model_is_never_changed():
    model = unet()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    kinds = [type(m) for m in model.modules()]
    strides = [p.stride() for p in model.parameters()]
    network = fast_network(model, precision="bf16")
    network(*inputs())
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert [type(m) for m in model.modules()] == kinds
    assert [p.stride() for p in model.parameters()] == strides
    for k, v in model.state_dict().items():
        assert v.dtype == torch.float32 and torch.equal(v, before[k])
    with torch.no_grad():  # and the other way round
        model.conv_out.weight.zero_()
    assert network.network.conv_out.weight.abs().max() > 0


def test_networks_without_norms_and_their_tables():
    """In bf16 the frequencies of the timesteps must stay exact: angles go up to 1000."""
    torch.manual_seed(0)
    model, (x, t) = PointMLP(3), inputs(5, (3,))
    assert fast_network(model).off == {"fused": "the network has no group norm"}
    network = fast_network(model, precision="bf16")
    assert network.network.frequencies.dtype == torch.float32
    assert relative_error(network(x, t), expected(model, x, t)) < TOLERANCE["bf16"]


def test_norms_that_cannot_be_fused():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.GroupNorm(1, 3, affine=False)

        def forward(self, x, t):
            return self.norm(x)

    x, t = inputs()
    network = fast_network(Net())
    assert "no residual block" in network.off["fused"]
    assert relative_error(network(x, t), expected(Net(), x, t)) < 1e-5


@pytest.mark.parametrize("settings", [dict(sampler="ddim"), dict()])
def test_samples_are_the_same_function_of_seed_and_number(settings):
    settings = dict(settings, num=5, steps=4, seed=3, clip=True)
    model = unet()
    plain = sample(model, SCHEDULE, SHAPE, **settings)
    fused = sample(fast_network(model), SCHEDULE, SHAPE, **settings, batch_size=2)
    torch.testing.assert_close(fused, plain, rtol=0, atol=1e-5)


def test_bf16_samples_are_close():
    model, settings = unet(), dict(num=64, steps=10, sampler="ddim", clip=True)
    plain = sample(model, SCHEDULE, SHAPE, **settings)
    rounded = sample(fast_network(model, precision="bf16"), SCHEDULE, SHAPE, **settings)
    assert not torch.equal(rounded, plain)
    assert relative_error(rounded, plain) < 0.1
    assert abs(rounded.std() / plain.std() - 1) < 0.01


# Fixed sizes.


def test_smaller_batches_run_at_the_full_size(fake_compiler):
    model = unet()
    network = fast_network(model, compile=True)
    sizes = []
    network.network.register_forward_pre_hook(lambda m, args: sizes.append(len(args[0])))
    for batch in (3, 1, 2, 3):
        x, t = inputs(batch)
        out = network(x, t)
        assert out.shape == x.shape and relative_error(out, expected(model, x, t)) < 1e-5
    assert set(sizes) == {3} and fake_compiler == [(3, *SHAPE)]
    x, t = inputs(4)  # a larger one is prepared for
    assert relative_error(network(x, t), expected(model, x, t)) < 1e-5
    assert sizes[-1] == 4 and fake_compiler == [(3, *SHAPE), (4, *SHAPE)]
    network(*inputs(2))
    assert sizes[-1] == 4 and len(fake_compiler) == 2


def test_eager_batches_are_not_padded():
    network = fast_network(unet())
    network.prepare(4, SHAPE)
    sizes = []
    network.network.register_forward_pre_hook(lambda m, args: sizes.append(len(args[0])))
    network(*inputs(4)), network(*inputs(1))
    assert sizes == [4, 1]


def test_shapes_have_sizes_of_their_own(fake_compiler):
    model = unet()
    network = fast_network(model, compile=True)
    for shape in (SHAPE, (3, 4, 4), SHAPE):
        x, t = inputs(2, shape)
        assert relative_error(network(x, t), expected(model, x, t)) < 1e-5
    assert fake_compiler == [(2, *SHAPE), (2, 3, 4, 4)]


# torch.compile.


def test_where_compiling_fails_the_network_runs_eagerly(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no compiler\nfound")

    options = []
    monkeypatch.setattr(torch, "compile", lambda f, **given: options.append(given) or broken)
    model, (x, t) = unet(), inputs(5)
    network = fast_network(model, compile=True)
    network.prepare(4, SHAPE)
    assert options == [{"dynamic": False}]
    assert network.off == {"compile": "RuntimeError: no compiler"}
    for batch in (4, 1, 5):
        assert relative_error(network(x[:batch], t[:batch]), expected(model, x, t)[:batch]) < 1e-5
    assert len(options) == 1  # nor is it tried again


def test_dynamo_s_limit_is_no_silent_way_back(monkeypatch):
    """Past its limit of recompilations dynamo would run eagerly and be called compiled."""
    from torch._dynamo import config as dynamo

    failing = []
    monkeypatch.setattr(inference, "compile_network", lambda model, probe: failing.append(
        dynamo.fail_on_recompile_limit_hit))
    fast_network(unet(), compile=True).prepare(2, SHAPE)
    assert failing == [True] and not dynamo.fail_on_recompile_limit_hit


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
def test_compiled_predictions_are_the_model_s():
    torch._dynamo.reset()
    model = unet()
    network = fast_network(model, compile=True)
    for batch in (4, 3):
        x, t = inputs(batch)
        assert relative_error(network(x, t), expected(model, x, t)) < 1e-5
    assert network.off == {} and network.network._compiled_call_impl is not None


# CUDA graphs.


def test_a_graph_is_warmed_up_captured_and_replayed(fake_cuda):
    model = unet()
    network = graphed(model)
    calls = []
    network.network.register_forward_pre_hook(lambda m, args: calls.append(fake_cuda[-1]))
    kept = []
    for batch in (3, 1, 3, 2):
        x, t = inputs(batch)
        kept.append((network(x, t), expected(model, x, t)))
    for out, wanted in kept:  # only now: a later replay must not change what was returned
        assert relative_error(out, wanted) < 1e-5
    (graph,) = FakeGraph.made
    assert graph.replays == 4 and network.off == {}
    assert fake_cuda == ["side waits for main", "on side", "off side", "main waits for side",
                         "capture"]
    assert calls == ["on side"] * 3 + ["capture"]  # Python ran the network no more often


def test_a_graph_of_a_larger_batch_replaces_the_smaller_one(fake_cuda):
    model = unet()
    network = graphed(model, precision="bf16")
    for batch in (1, 3, 2):
        x, t = inputs(batch)
        assert relative_error(network(x, t), expected(model, x, t)) < TOLERANCE["bf16"]
    assert [graph.replays for graph in FakeGraph.made] == [1, 2]


def test_sampling_through_a_graph(fake_cuda):
    model, settings = unet(), dict(num=5, steps=4, seed=3, clip=True)
    plain = sample(model, SCHEDULE, SHAPE, **settings)
    out = sample(graphed(model), SCHEDULE, SHAPE, **settings, batch_size=3)
    torch.testing.assert_close(out, plain, rtol=0, atol=1e-5)
    assert [graph.replays for graph in FakeGraph.made] == [8]


def test_what_cannot_be_captured_runs_without_a_graph(fake_cuda, monkeypatch):
    @contextlib.contextmanager
    def graph(made):
        yield
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(torch.cuda, "graph", graph)
    model = unet()
    network = graphed(model)
    for batch in (3, 2):
        x, t = inputs(batch)
        assert relative_error(network(x, t), expected(model, x, t)) < 1e-5
    assert network.off == {
        "cuda_graph": "RuntimeError: operation not permitted when stream is capturing"}


@pytest.mark.gpu
@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("compile", [False, True])
def test_on_a_gpu(precision, compile):
    model = unet().cuda()
    network = fast_network(model, precision=precision, compile=compile)
    for batch in (4, 3, 4):
        x, t = (v.cuda() for v in inputs(batch))
        assert relative_error(network(x, t), expected(model, x, t)) < 2 * TOLERANCE[precision]
    assert network.off == {}


# Errors.


@pytest.mark.parametrize("options,words", [
    (dict(precision="fp8"), ("precision", "fp8", "bf16")),
    (dict(cuda_graph=True), ("cuda_graph", "cpu")),
])
def test_bad_options_name_field_and_value(options, words):
    with pytest.raises(UsageError) as caught:
        fast_network(unet(), **options)
    assert all(word in str(caught.value) for word in words)


def test_a_function_is_no_network():
    with pytest.raises(UsageError, match=r"model is a function.*Module"):
        fast_network(lambda x, t: x)


@pytest.mark.parametrize("compile", [False, True])
def test_a_network_of_another_shape_is_reported(compile):
    model = nn.Linear(3, 2)
    model.forward = lambda x, t: x[:, :2]
    with pytest.raises(UsageError, match=r"\(4, 2\)"):
        fast_network(model, compile=compile)(*inputs(4, (3,)))
