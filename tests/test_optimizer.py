"""Moving averages and the optimizer against their formulas."""

import pytest
import torch
from torch import nn

from robustdm import ops
from robustdm.models.weights import load_optimizer, optimizer_tensors
from robustdm.training.optimizer import EMA, SkippingAdamW

CPP = ops.why_off("cpp", "adamw_ema", torch.device("cpu"))
BACKEND = pytest.mark.parametrize("backend", [
    "torch", pytest.param("cpp", marks=pytest.mark.skipif(CPP is not None, reason=str(CPP)))
])


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.SiLU(), nn.Conv2d(4, 2, 3))


def perturb(model, scale=0.1):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(scale * torch.randn_like(p))


@pytest.mark.parametrize("rate", [0.0, 0.5, 0.9])
def test_the_average_is_its_recursion(rate):
    model = network().to(memory_format=torch.channels_last)
    ema = EMA(model, rate)
    wanted = [p.detach().double().clone() for p in model.parameters()]
    for n in range(30):
        perturb(model)
        ema.prepare(n)
        ema.update()
        decay = min(rate, (1 + n) / (10 + n))
        wanted = [decay * w + (1 - decay) * p.detach().double()
                  for w, p in zip(wanted, model.parameters(), strict=True)]
    for average, w, p in zip(ema.model.parameters(), wanted, model.parameters(), strict=True):
        assert torch.allclose(average.double(), w, atol=1e-6)
        assert average.stride() == p.stride() and not average.requires_grad
    assert not ema.model.training and model.training


def losses(model, steps=4, scale=1.0):
    x = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        yield scale * (model(x) - 1).square().mean()


@BACKEND
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("clip", [0.0, 1e-2, 1e6])
def test_it_is_adamw_on_clipped_gradients(clip, channels_last, backend):
    """Against plain AdamW, with the learning rate that each call names, and a moving average."""
    ours, theirs = network(), network()
    if channels_last:
        ours.to(memory_format=torch.channels_last)
    emas = [EMA(ours, rate) for rate in (0.3, 0.7)]
    plain = [EMA(theirs, rate) for rate in (0.3, 0.7)]
    optimizer = SkippingAdamW(ours, 9.0, weight_decay=0.1, emas=emas, backend=backend)
    reference = torch.optim.AdamW(theirs.parameters(), lr=1e-3, weight_decay=0.1, foreach=False)
    pairs = zip(losses(ours), losses(theirs), strict=True)
    for step, (a, b) in enumerate(pairs, 1):
        lr = 1e-3 * step
        a.backward()
        optimizer.prepare(lr, step - 1)
        norm, skipped = optimizer.clip_and_step(clip, a.detach())
        b.backward()
        total = torch.stack([p.grad.norm() for p in theirs.parameters()]).norm()
        for p in theirs.parameters():
            p.grad *= min(1.0, clip / total.item()) if clip else 1.0
        reference.param_groups[0]["lr"] = lr
        reference.step()
        reference.zero_grad()
        for ema in plain:
            ema.prepare(step - 1)
            ema.update()
        assert norm.item() == pytest.approx(total.item(), rel=1e-5) and skipped.item() == 0
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-5, atol=1e-6) and p.grad is None
    for ema, reference in zip(emas, plain, strict=True):
        averages = zip(ema.model.parameters(), reference.model.parameters(), strict=True)
        assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in averages)


@BACKEND
@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nothing_moves_where_loss_or_gradient_is_not_finite(value, where, clip, backend):
    model = network()
    optimizer = SkippingAdamW(model, lr=1e-2, weight_decay=0.1, backend=backend)
    skips = []
    for step, loss in enumerate(losses(model, 3)):
        before = [p.detach().clone() for p in model.parameters()]
        loss.backward()
        loss = loss.detach()
        if step == 1 and where == "loss":
            loss = loss * value
        elif step == 1:
            next(model.parameters()).grad[0, 0, 0, 0] = value
        optimizer.prepare(1e-2, step)
        skips.append(optimizer.clip_and_step(clip, loss)[1].item())
        same = all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        assert same == (step == 1)
    assert skips == [0, 1, 0]
    # The skipped step is none: the bias corrections count two.
    assert all(state["step"].item() == 2 for state in optimizer.state.values())


@pytest.mark.parametrize("first, second", [("torch", "cpp"), ("cpp", "torch"), ("cpp", "cpp")])
def test_the_state_moves_between_backends(first, second):
    """A checkpoint written where csrc was built continues where it was not, and the reverse."""
    if CPP is not None:
        pytest.skip(CPP)

    def run(backends):
        model = network().to(memory_format=torch.channels_last)
        optimizer = None
        for step, backend in enumerate(backends):
            if optimizer is None or optimizer.backend != backend or step == 3:
                fresh = SkippingAdamW(model, lr=1e-2, weight_decay=0.1, backend=backend)
                if optimizer is not None:
                    load_optimizer(fresh, *optimizer_tensors(optimizer))
                optimizer = fresh
            loss = next(losses(model, 1))
            loss.backward()
            optimizer.prepare(1e-2, step)
            optimizer.clip_and_step(1.0, loss.detach())
        return model, optimizer

    model, optimizer = run([first] * 3 + [second] * 3)
    plain, _ = run(["torch"] * 6)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-5, atol=1e-6)
    assert {state["step"].item() for state in optimizer.state.values()} == {6}
    tensors, _ = optimizer_tensors(optimizer)
    assert len({t.data_ptr() for t in tensors.values()}) == len(tensors)
