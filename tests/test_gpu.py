"""Every op and variant on a GPU against the float64 reference on the CPU, in both memory formats.

The smallest of these cases run on the CPU as well (interpreter, C++), so that they cannot rot.
"""

import sys
from pathlib import Path

import pytest
import torch

from robustdm import ops
from robustdm.data.base import ImageTensor
from robustdm.runs.config import TrainConfig
from robustdm.training.trainer import Trainer
from tests.conftest import HAS_GPU, TOLERANCE, relative_error
from tests.test_ops import draw, noisy

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import graph_smoke  # noqa: E402

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def inputs(shape, dtype, work, layout, device, count):
    """The same numbers whatever the device: rounded to ``dtype``, then held in ``work``."""
    key, signal, noise, radius, lambda_t = draw(shape, dtype)
    images = [noisy(shape, dtype, n, sliced=False).contiguous(memory_format=layout).to(work)
              for n in range(count)]
    wide = torch.promote_types(work, torch.float32)
    scales = [v.to(wide) for v in (signal, noise, radius, lambda_t)]
    moved = [v.to(device) for v in (key, *scales, *images)]
    assert all(v.is_contiguous(memory_format=layout) for v in moved[5:])
    return moved


def perturb(*, shape, dtype, work, layout, device, backend):
    key, signal, noise, radius, _, x0 = inputs(shape, dtype, work, layout, device, 1)
    return ops.noise_perturb(x0, signal, noise, radius, key, backend=backend)


def project(outward=False):
    def run(*, shape, dtype, work, layout, device, backend):
        key, _, noise, radius, _, xt, g = inputs(shape, dtype, work, layout, device, 2)
        g[:1] = 0
        return ops.fgsm_project(xt, None if outward else g, noise, radius, key, backend=backend)
    return run


def loss(adversarial=True, stored=True, **options):
    def run(*, shape, dtype, work, layout, device, backend):
        key, _, _, radius, lambda_t, o, o2, delta = inputs(
            shape, dtype, work, layout, device, 3)
        o, o2 = o.requires_grad_(), o2.requires_grad_()
        total, fit, reg = ops.equivariance_loss(
            o, o2 if adversarial else None, delta if stored else None, radius, lambda_t, key,
            dtype=dtype if work != torch.float64 else torch.float64, backend=backend, **options)
        # Scaled up, for float16 holds no such small gradients.
        scaled = total * o.numel()
        return total, fit, reg, *torch.autograd.grad(scaled, [o, o2] if adversarial else [o])
    return run


def group_norm(full, dropout=0.0):
    def run(*, shape, dtype, work, layout, device, backend):
        batch, channels = shape[:2]
        x, cotangent = (noisy(shape, dtype, n, sliced=False).to(work).to(device)
                        for n in (0, 2))
        vectors = {name: noisy((batch, channels), dtype, n).to(work).to(device)
                   for n, name in enumerate(("scale", "shift", "add"), 3)}
        weight, bias = (noisy((channels,), dtype, n).to(work).to(device) for n in (6, 7))
        named = dict(weight=weight, bias=bias)
        if full:
            named |= vectors
        leaves = [v.requires_grad_() for v in (x, *named.values())]
        y = ops.group_norm_act(x, 32 if channels % 32 == 0 else 4, **named, dropout=dropout,
                               key=torch.tensor([1, 2, 3], device=device), backend=backend)
        return y, *torch.autograd.grad(y, leaves, cotangent)
    return run


ELEMENTWISE = {
    "noise_perturb": perturb, "fgsm_project": project(), "fgsm_project outward": project(True),
    "loss": loss(), "loss ddpm": loss(adversarial=False),
    "loss random": loss(stored=False),
    "loss invariance": loss(invariance=True), "loss detached": loss(detach_clean=True),
}
SMALL = [pytest.param("cpu", (2, 3, 6, 5)),
         pytest.param("cuda", (2, 3, 6, 5), marks=pytest.mark.gpu)]
LARGE = [pytest.param("cuda", s, marks=pytest.mark.gpu) for s in
         [(128, 3, 32, 32), (5, 3, 77, 31), (4, 1, 256, 256)]]
# Nearly every combination is a Triton variant of its own, which takes longer to compile than to
# run. What an option computes per element is tried at the small shape, in all types; how elements
# are found, at every shape, with one option. float16 differs from bfloat16 in conversions alone.
INDEXED = ["noise_perturb", "fgsm_project", "loss", "loss random"]


def agree(case, shape, dtype, layout, device, bound, exact_on="cpu"):
    out = case(shape=shape, dtype=dtype, work=dtype, layout=layout, device=device, backend="auto")
    exact = case(shape=shape, dtype=dtype, work=torch.float64, layout=layout, device=exact_on,
                 backend="torch")
    for number, (a, b) in enumerate(zip(out, exact, strict=True)):
        assert a.device.type == device
        assert relative_error(a, b) < bound or not b.any() and not a.any(), number
    if device == "cuda":
        again = case(shape=shape, dtype=dtype, work=dtype, layout=layout, device=device,
                     backend="auto")
        assert all(torch.equal(a, b) for a, b in zip(out, again, strict=True))


@pytest.mark.parametrize("device, shape", SMALL)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise(name, dtype, layout, device, shape):
    agree(ELEMENTWISE[name], shape, dtype, layout, device, 4 * TOLERANCE[dtype])


@pytest.mark.parametrize("device, shape", LARGE)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", INDEXED)
def test_elementwise_of_many_programs(name, dtype, layout, device, shape):
    agree(ELEMENTWISE[name], shape, dtype, layout, device, 4 * TOLERANCE[dtype])


# One shape of each path through the kernels, resident, loop and split, in every type and form.
PATHS = [(2, 12, 3, 5), (8, 384, 32, 32), (2, 128, 256, 256)]


@pytest.mark.parametrize("device, shape", [
    pytest.param("cpu", PATHS[0]),
    *(pytest.param("cuda", s, marks=pytest.mark.gpu) for s in PATHS)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("full, dropout", [(False, 0.0), (True, 0.3), (True, 0.0)])
def test_group_norm_act(full, dropout, dtype, device, shape):
    bound = 1e-5 if dtype == torch.float32 else 8 * TOLERANCE[dtype]
    # In float64, with the one thread of a test, the largest would take a CPU longer than all else.
    agree(group_norm(full, dropout), shape, dtype, torch.channels_last, device, bound, device)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [
    (16, 128, 32, 32), (16, 512, 8, 8), (16, 256, 4, 4), (2, 1024, 16, 16), (2, 768, 32, 32),
    (1, 96, 128, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("full, dropout", [(False, 0.0), (True, 0.3)])
def test_group_norm_act_of_shapes_in_networks(full, dropout, dtype, shape):
    test_group_norm_act(full, dropout, dtype, "cuda", shape)


def optimizer_step(device, steps, call):
    g = torch.Generator().manual_seed(0)
    shapes = [(64, 32, 3, 3), (77,), (1,), (33, 17)] * 20
    params = [torch.randn(s, generator=g).to(device) for s in shapes]
    grads, moments, squares = (
        [torch.rand(s, generator=g).sub(0.5 if k == 0 else 0).to(device) for s in shapes]
        for k in range(3))
    averages, copies = [p.clone() for p in params], [p.bfloat16() for p in params]
    scalars = {k: torch.tensor(v, device=device) for k, v in
               dict(lr=1e-2, step=1.0, decay=0.7, factor=0.5, skip=0.0).items()}

    def run():
        ops.adamw_ema(params, grads, moments, squares, averages, copies, weight_decay=0.1,
                      **scalars)
        scalars["step"].add_(1)

    call(run, steps)
    return [*params, *moments, *squares, *averages, *copies]


def plainly(run, steps):
    for _ in range(steps):
        run()


def on_a_stream(run, steps):
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        plainly(run, steps)
    torch.cuda.current_stream().wait_stream(stream)


def in_a_graph(run, steps):
    """One step eagerly, which builds and loads all; the others are replays of a captured one."""
    on_a_stream(run, 1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for _ in range(steps - 1):
        graph.replay()


@pytest.mark.parametrize("device, call", [
    pytest.param("cpu", plainly), *(pytest.param("cuda", c, marks=pytest.mark.gpu) for c in
                                    (plainly, on_a_stream, in_a_graph))])
def test_adamw_ema(device, call):
    if device == "cuda":
        reason = ops.why_off("cpp", "adamw_ema", torch.device("cuda"))
        assert reason is None, reason
    out = optimizer_step(device, 3, call)
    params = optimizer_step("cpu", 3, plainly)
    for a, b in zip(out, params, strict=True):
        assert relative_error(a, b) < (2**-8 if b.dtype == torch.bfloat16 else 1e-6)


@pytest.mark.gpu
def test_the_kernels_under_test_are_compiled_ones():
    from triton.runtime.jit import JITFunction

    from robustdm.kernels import fgsm_project, group_norm_act

    assert isinstance(fgsm_project._fgsm_project_kernel, JITFunction)
    assert isinstance(group_norm_act._resident_forward_kernel, JITFunction)
    for op in ops.OPS:
        wanted = "cpp" if op == "adamw_ema" else "triton"
        assert ops.resolve(op, "auto", torch.device("cuda"), torch.float32) == wanted
    assert HAS_GPU


ON_BOTH = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("device", ON_BOTH)
def test_smoke_a_replayed_training_step_trains_as_an_eager_one(device, precision):
    """Eight adversarial steps with dropout, the fused optimizer included."""
    found = graph_smoke.compare(device, precision, tiny=device == "cpu")
    eager, graph = found["eager"], found["graph"]
    assert not eager["skipped"] and not graph["skipped"] and len(set(eager["losses"])) == 8
    # Sums over threads that come in any order are all that may differ.
    assert found["difference"] <= (1e-4 if precision == "fp32" else 2e-2)
    if device == "cuda":
        assert graph["replayed"] and not graph["warned"] and not eager["replayed"]


# On a CPU Inductor takes minutes for a whole step: there the step is traced, and its nodes run.
@pytest.mark.parametrize("device, precision, backend", [
    ("cpu", "fp32", "aot_eager"),
    *(pytest.param("cuda", p, "inductor", marks=pytest.mark.gpu) for p in ("fp32", "bf16"))])
def test_a_compiled_step_has_the_eager_gradient(device, precision, backend):
    fields = graph_smoke.SMALLEST if device == "cpu" else graph_smoke.SMALL
    batch, side = fields["batch_size"], fields["resolution"]
    config = TrainConfig.from_dict(fields | dict(
        data="images", layers_per_block=1, dropout=0.1, precision=precision, device=device,
        objective="robust_adv", warmup_steps=0))
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (64, 3, side, side), dtype=torch.uint8, generator=g)
    trainer = Trainer(config, ImageTensor("random", images, None, 0.0, 0))
    x0 = torch.randn(batch, 3, side, side, generator=g).to(
        device, memory_format=torch.channels_last)
    key = torch.zeros(3, dtype=torch.int64, device=device)
    eager = [g.clone() for g in trainer.gradient_step(x0, key).weights]
    trainer.gradient_step.compile(backend)
    assert trainer.gradient_step.compiled
    compiled = trainer.gradient_step(x0, key).weights
    limit = 1e-3 if precision == "fp32" else 0.1
    squared = sum((a - b).double().square().sum() for a, b in zip(compiled, eager, strict=True))
    assert squared.sqrt() < limit * sum(b.double().square().sum() for b in eager).sqrt()
