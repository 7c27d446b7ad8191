"""The training step: what it asks of a device, and the numbers that are kept of it."""

import contextlib
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers.models import attention_processor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from robustdm import UsageError
from robustdm.data import base, batches
from robustdm.models.build import set_attention
from robustdm.models.compilation import compile_network, compile_step
from robustdm.runs.checkpoint import Checkpoint
from robustdm.runs.config import TrainConfig
from robustdm.runs.presets import preset_values
from robustdm.training import trainer as module
from robustdm.training.cuda_graph import StepGraph
from robustdm.training.trainer import Trainer
from tests.conftest import relative_error

SMALL = dict(block_channels=(8, 8), norm_groups=4, batch_size=8, num_points=200)


class Crossings(TorchDispatchMode):
    """Every operation on tensors of two devices (numbers aside), but for copies that do not wait.

    Reading a value back needs no watch: a meta tensor has none, so that it raises.
    """

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        tensors = [v for v in tree_leaves((args, kwargs, out)) if isinstance(v, torch.Tensor)]
        if len({v.device for v in tensors if v.ndim}) > 1 and not kwargs.get("non_blocking"):
            self.found.append(str(func))
        return out


@pytest.mark.parametrize("fields", [
    dict(dropout=0.1, accumulate=2, flip=True, holdout=0.1),
    dict(objective="ddpm"),
    dict(objective="outward_ran", beta_per="batch"),
    dict(data="plane", network="mlp", objective="invariance", ema_rates=(0.9, 0.99)),
])
@pytest.mark.parametrize("resident, precompute", [(True, True), (True, False), (False, False)])
def test_a_step_neither_mixes_devices_nor_waits_for_its_own(
    fields, resident, precompute, monkeypatch
):
    """On the meta device, the one accelerator that is everywhere: a step that runs on it creates
    every tensor where it is needed, and never needs a value on the host."""
    if not precompute:
        monkeypatch.setattr(base, "_PRECOMPUTE_ELEMENTS", 0)
    meta = torch.device("meta")
    monkeypatch.setattr(module, "resolve_device", lambda name: meta)
    config = TrainConfig(**{**preset_values(fields.get("data", "digits")), **SMALL, **fields})
    if not precompute:  # this changes the batch alone
        config = replace(config, block_channels=(8,))
    trainer = Trainer(config)
    trainer.data.resident = resident
    trainer.optimizer.step = lambda: None  # torch's fused update refuses the meta device
    stream = batches(trainer.data, config, 0, trainer.device)
    trainer.train_step(next(stream)[0])  # the first copies the tables and the data
    with Crossings() as crossings:
        x0, indices = next(stream)
        trainer.train_step(x0)
    assert crossings.found == []
    assert x0.device == meta and indices.device.type == "cpu" and trainer.step == 2
    with pytest.raises(RuntimeError, match="meta"):
        trainer.window()  # the statistics do wait: once a line, not once a step


def test_the_window_holds_means_over_its_steps_and_bands():
    config = TrainConfig(**{**preset_values("plane"), **SMALL, "clip_norm": 1e-3,
                            "batch_size": 64})
    trainer = Trainer(config)
    fits, regs, times, norms = [], [], [], []
    step, add = trainer.optimizer.clip_and_step, trainer.metrics.add

    def clip_and_step(*given):
        norms.append(torch.stack([p.grad.norm() for p in trainer.model.parameters()]).norm())
        return step(*given)

    def record(t, fit, reg, *rest):
        times.append(t), fits.append(fit), regs.append(reg)
        add(t, fit, reg, *rest)

    trainer.optimizer.clip_and_step, trainer.metrics.add = clip_and_step, record
    x0 = trainer.data.batch(torch.arange(64))
    for factor in (1.0, float("nan"), 1.0, 1.0):
        trainer.train_step(x0 * factor)
    kept = [0, 2, 3]
    record = trainer.window()
    fit, reg = (torch.cat([values[k] for k in kept]) for values in (fits, regs))
    assert record["step"] == 4 and record["skipped"] == 1
    assert record["fit"] == pytest.approx(fit.mean().item(), rel=1e-5)
    assert record["reg"] == pytest.approx(reg.mean().item(), rel=1e-5)
    assert record["loss"] == pytest.approx((fit + reg).mean().item(), rel=1e-5)
    # The norm is that before clipping.
    assert record["grad_norm"] == pytest.approx(
        torch.stack([norms[k] for k in kept]).mean().item(), rel=1e-5)
    t = torch.cat([times[k] for k in kept])
    for band in range(4):
        inside = (t >= 250 * band) & (t < 250 * (band + 1))
        assert record[f"fit_band{band}"] == pytest.approx(fit[inside].mean().item(), rel=1e-5)
    assert not any("band" in key or key == "loss" for key in trainer.window())


def test_skips_in_a_row_are_counted_anew_after_a_good_step():
    trainer = Trainer(TrainConfig(**{**preset_values("plane"), **SMALL}))
    x0 = trainer.data.batch(torch.arange(8))
    seen = []
    for factor in (1.0, float("nan"), float("inf"), 1.0, float("nan")):
        trainer.train_step(x0 * factor)
        seen.append((int(trainer.metrics.skipped), int(trainer.metrics.skipped_in_a_row)))
    assert seen == [(0, 0), (1, 1), (2, 2), (2, 0), (3, 1)]


# What a step is made of: weights in two precisions, pieces, a graph.


def images(**fields):
    return TrainConfig(**{**SMALL, "warmup_steps": 0, "device": "cpu", **fields})


def train(trainer, steps=3):
    stream = batches(trainer.data, trainer.config, trainer.step, trainer.device)
    for _ in range(steps):
        trainer.train_step(next(stream)[0])


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_bf16_weights_follow_their_float32_masters(backend):
    trainer = Trainer(images(precision="bf16", backend=backend))
    before = [p.clone() for p in trainer.model.parameters()]
    train(trainer)
    pairs = list(zip(trainer.model.parameters(), trainer.network.parameters(), strict=True))
    assert trainer.network is not trainer.model
    for p, q in pairs:
        assert p.dtype == torch.float32 and q.dtype == torch.bfloat16
        assert torch.equal(q, p.to(torch.bfloat16))
    assert any(not torch.equal(a, p) for a, (p, _) in zip(before, pairs, strict=True))
    # Steps too small for bfloat16 add up in the masters.
    assert any(not torch.equal(p, q.float()) for p, q in pairs)
    assert {p.dtype for e in trainer.emas for p in e.model.parameters()} == {torch.float32}
    # A checkpoint holds the masters, and the copies come from what is loaded.
    fresh = Trainer(images(precision="bf16", backend=backend))
    tensors, state = trainer.state()
    assert {v.dtype for v in tensors["model"].values()} == {torch.float32}
    fresh.restore(Checkpoint(3, Path("x"), tensors, state))
    for q, r in zip(trainer.network.parameters(), fresh.network.parameters(), strict=True):
        assert torch.equal(q, r)


def test_a_step_in_bf16_is_near_that_in_float32():
    one, two = (Trainer(images(precision=p)) for p in ("fp32", "bf16"))
    train(one, 5), train(two, 5)
    a, b = one.window(), two.window()
    assert a["fit"] == pytest.approx(b["fit"], rel=0.02) and a["fit"] != b["fit"]


@pytest.mark.parametrize("fields", [dict(), dict(dropout=0.3), dict(precision="bf16")])
def test_pieces_do_not_change_the_step(fields):
    """Nor the dropout masks, which fused blocks draw by a sample's place in the batch."""
    one, two = (Trainer(images(accumulate=n, **fields)) for n in (1, 4))
    train(one, 2), train(two, 2)
    a, b = one.window(), two.window()
    rel = 1e-4 if not fields.get("precision") else 2e-2
    for key in ("fit", "reg", "grad_norm"):
        assert a[key] == pytest.approx(b[key], rel=rel), key


def test_a_run_without_our_kernels_and_one_with():
    one, two = (Trainer(images(backend=b)) for b in ("torch", "auto"))
    assert not any(type(m).__name__.startswith("Fused") for m in one.model.modules())
    assert any(type(m).__name__.startswith("Fused") for m in two.model.modules())
    assert one.model.state_dict().keys() == two.model.state_dict().keys()
    train(one, 3), train(two, 3)
    a, b = one.window(), two.window()
    assert a["fit"] == pytest.approx(b["fit"], rel=1e-3)


def test_the_options_reach_the_objective():
    trainer = Trainer(images(reg_fraction=0.5, reg_every=2, attack_fraction=0.25, at_last=0.25,
                             steps=40))
    objective = trainer.objective
    assert (objective.reg_fraction, objective.reg_every, objective.attack_fraction) == (
        0.5, 2, 0.25)
    assert objective.reg_from == 30
    x0 = trainer.data.batch(torch.arange(8))
    regularised = []
    for step in (0, 29, 30, 31, 32):
        trainer.step = step
        trainer.train_step(x0)
        regularised.append("reg" in (w := trainer.window()) and w["reg"] > 0)
    assert regularised == [False, False, True, False, True]


class FakeGraph:
    """Instead of CUDA's: what is captured is run by ``replay``, not before."""

    made = []

    def __init__(self):
        self.work = None
        FakeGraph.made.append(self)

    def replay(self):
        self.work()


@pytest.fixture
def fake_cuda(monkeypatch):
    FakeGraph.made = []

    class Stream:
        def wait_stream(self, other):
            pass

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: ("pool",))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)

    @contextlib.contextmanager
    def capturing(graph, pool):
        assert pool == ("pool",)
        graph.work = lambda: graph.run()
        yield

    monkeypatch.setattr(torch.cuda, "graph", capturing)


def test_warm_ups_share_one_side_stream(fake_cuda, monkeypatch):
    """The allocator keeps freed blocks for each stream apart."""
    used = []
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: (
        used.append(stream), contextlib.nullcontext())[1])
    step = StepGraph(lambda *_: None, warn=pytest.fail)
    for size in (2, 2, 3, 3):
        step(torch.zeros(size), torch.zeros(3), True)
    assert len(used) == 4 and len(set(map(id, used))) == 1


def test_a_step_graph_warms_up_captures_and_replays(fake_cuda):
    """One graph for each shape and kind; every call is a step, on the values of that call."""
    seen = []

    def run(x0, key, regularised):
        if FakeGraph.made and FakeGraph.made[-1].work and not hasattr(FakeGraph.made[-1], "run"):
            # Captured: remembers where its inputs lie.
            FakeGraph.made[-1].run = lambda: seen.append(
                ("replay", x0.sum().item(), key[1].item(), regularised))
            return
        seen.append(("plain", x0.sum().item(), key[1].item(), regularised))

    step = StepGraph(run, warn=pytest.fail)
    for number in range(6):
        step(torch.full((2,), float(number)), torch.tensor([0, number, 0]), number % 2 == 0)
    for number in range(6, 10):
        step(torch.full((2,), float(number)), torch.tensor([0, number, 0]), True)
    step(torch.full((3,), 10.0), torch.tensor([0, 10, 0]), True)
    kinds = [kind for kind, *_ in seen]
    assert [(v, k) for _, v, k, _ in seen] == [(2.0 * n, n) for n in range(10)] + [(30.0, 10)]
    # Two plain steps of each kind, then replays; a new shape starts anew.
    assert kinds == ["plain"] * 4 + ["replay"] * 6 + ["plain"] and len(FakeGraph.made) == 2


def test_what_cannot_be_captured_runs_as_it_is(fake_cuda, monkeypatch):
    @contextlib.contextmanager
    def refused(graph, pool):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")
        yield

    monkeypatch.setattr(torch.cuda, "graph", refused)
    steps, warnings = [], []
    step = StepGraph(lambda x0, key, regularised: steps.append(int(key[1])), warnings.append)
    for number in range(5):
        step(torch.zeros(2), torch.tensor([0, number, 0]), True)
    assert steps == [0, 1, 2, 3, 4]
    assert len(warnings) == 1 and "not permitted" in warnings[0] and "\n" not in warnings[0]


def test_why_there_is_no_cuda_graph():
    for fields, reason in ((dict(), "the device is cpu"),):
        said = []
        Trainer(images(**fields)).use_cuda_graph(said.append)
        assert said == [f"no CUDA graph: {reason}"]
    for fields, reason in ((dict(backend="torch", dropout=0.1), "the masks of"),
                           (dict(backend="torch"), "it needs the fused optimizer")):
        trainer, said = Trainer(images(**fields)), []
        trainer.device = torch.device("cuda")
        trainer.use_cuda_graph(said.append)
        assert len(said) == 1 and reason in said[0] and trainer._graph is None


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("fields", [
    dict(), dict(accumulate=2, reg_every=2, dropout=0.1), dict(precision="bf16"),
])
def test_replayed_steps_are_the_steps(compiled, fields):
    plain, graphed = (Trainer(images(**{**fields, "device": "cuda"})) for _ in range(2))
    graphed.use_cuda_graph(pytest.fail)
    if compiled:
        for trainer in (plain, graphed):
            trainer.gradient_step.compile()
    train(plain, 9), train(graphed, 9)
    assert len(graphed._graph._kinds) == (2 if "reg_every" in fields else 1)
    assert all(kind.graph is not None for kind in graphed._graph._kinds.values())
    for p, q in zip(plain.model.parameters(), graphed.model.parameters(), strict=True):
        assert torch.equal(p, q)
    assert plain.window() == graphed.window() | {"time": plain.elapsed}


def test_attention_by_plain_products_in_bf16_on_a_cpu():
    """Where the fused kernel's backward pass is slow; the numbers are the same."""
    from diffusers.models.attention_processor import Attention, AttnProcessor

    def plain(trainer):
        found = [m.processor for m in trainer.network.modules() if isinstance(m, Attention)]
        assert found
        return all(type(p) is AttnProcessor for p in found)

    assert not plain(Trainer(images())) and plain(Trainer(images(precision="bf16")))
    assert not plain(Trainer(images(precision="bf16", attention="sdpa")))
    one, two = Trainer(images()), Trainer(images(attention="plain"))
    assert plain(two)
    train(one, 2), train(two, 2)
    a, b = one.window(), two.window()
    assert a["fit"] == pytest.approx(b["fit"], rel=1e-4)
    assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


def test_a_backend_that_is_off_is_refused_before_the_data_are_read(monkeypatch):
    def off(op, backend, *_):
        raise UsageError(f"backend is {backend!r}, which is off")

    monkeypatch.setattr("robustdm.training.trainer.load_data", None)
    monkeypatch.setattr("robustdm.ops.resolve", off)
    with pytest.raises(UsageError, match="backend is 'triton', which is off"):
        Trainer(images(backend="triton"))


def test_xformers_needs_a_gpu():
    with pytest.raises(UsageError, match="attention is 'xformers', but the device is cpu: use"):
        Trainer(images(attention="xformers"))


@pytest.fixture
def xformers(monkeypatch):
    """On CPUs, where the package does not compute: its function as diffusers calls it, in torch."""
    calls = []

    def attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None):
        assert query.ndim == 3 and attn_bias is None and p == 0  # (B * H, M, K)
        calls.append(tuple(query.shape))
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        return (query @ key.mT * scale).softmax(-1) @ value

    randn = torch.randn

    def allowed(network, config, device):
        with monkeypatch.context() as patch:  # diffusers asks for a GPU, and tries the call there
            patch.setattr(torch.cuda, "is_available", lambda: True)
            patch.setattr(torch, "randn", lambda size, device, dtype: randn(size, dtype=dtype))
            set_attention(network, config, torch.device("cuda"))
        assert config.attention == "sdpa" or calls.pop() == (1, 2, 40)
        calls.clear()

    package = SimpleNamespace(ops=SimpleNamespace(memory_efficient_attention=attention))
    monkeypatch.setattr(attention_processor, "xformers", package)
    monkeypatch.setattr(attention_processor, "is_xformers_available", lambda: True)
    monkeypatch.setattr(module, "set_attention", allowed)
    return calls


def assert_xformers_is_sdpa(device, limit, compiled=False):
    """The output, and the gradient of an adversarial step; returns the networks."""
    trainers = [Trainer(images(attention=kind, device=device, attention_head_dim=4))
                for kind in ("sdpa", "xformers")]
    x0 = trainers[0].data.batch(torch.arange(8), device)
    key = torch.tensor([1, 2, 0], device=device)
    found = []
    for trainer in trainers:
        probe = partial(trainer.probe, x0, [True])
        if compiled and compile_step(trainer.gradient_step, probe) is not None:
            assert compile_network(trainer.network, probe) is None  # as --compile does
        with torch.no_grad():
            out = trainer.network(x0, torch.arange(8, device=device) * 100).sample
        weights = trainer.gradient_step(trainer._laid_out(x0), key).weights
        found.append((out, torch.cat([g.flatten() for g in weights])))
    for wanted, got in zip(*found, strict=True):
        assert wanted.norm() > 0 and relative_error(got, wanted) < limit
    return [t.network for t in trainers]


def test_xformers_as_diffusers_calls_it_is_sdpa(xformers):
    """Sums in another order are all that may differ."""
    _, network = assert_xformers_is_sdpa("cpu", 3e-6)
    layers = sum(isinstance(m, attention_processor.Attention) for m in network.modules())
    # A pass for the output, and three of the step; two heads for each of eight images.
    assert layers and len(xformers) == 4 * layers and xformers[0][::2] == (16, 4)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled, limit", [(False, 1e-4), (True, 1e-3)])
def test_xformers_is_sdpa(compiled, limit):
    pytest.importorskip("xformers.ops", reason="xformers is not installed", exc_type=ImportError)
    _, network = assert_xformers_is_sdpa("cuda", limit, compiled)
    for found in network.modules():
        if isinstance(found, attention_processor.Attention):
            assert isinstance(found.processor, attention_processor.XFormersAttnProcessor)


def test_a_closed_window_is_that_of_its_steps_whenever_it_is_read():
    one, two = (Trainer(images()) for _ in range(2))
    train(one, 2), train(two, 2)
    wanted, read = one.window(), two.close_window()
    train(two, 3)
    assert read() == wanted and wanted["step"] == 2
    assert two.window()["step"] == 5


@pytest.mark.parametrize("wanted", [True, False])
def test_cudnn_times_its_algorithms_during_a_step_and_the_callers_setting_stays(wanted):
    trainer, seen = Trainer(images(cudnn_benchmark=wanted)), []
    trainer._update = lambda *_: seen.append(torch.backends.cudnn.benchmark)
    x0 = torch.zeros(2, *trainer.data.shape)
    before = torch.backends.cudnn.benchmark
    try:
        for device, setting in (("cpu", not wanted), ("cuda", not wanted)):
            torch.backends.cudnn.benchmark = setting
            trainer._laid_out, trainer._key = (lambda x: x), (lambda step: None)
            trainer.optimizer.prepare = lambda *_: None
            trainer.device = torch.device(device)
            trainer.train_step(x0)
            assert torch.backends.cudnn.benchmark is setting
    finally:
        torch.backends.cudnn.benchmark = before
    assert seen == [not wanted, wanted]
