"""Gaussian data and a linear network: the optimum of the objective is known in closed form.

For data of variance v in a direction, the best linear prediction w x_t under the equivariance loss
is w = s (1 + c) / (abar v + s^2 (1 + c)) with c = E_b[lambda_t E delta^2]; under the invariance
loss w = s / (abar v + s^2 (1 + c)).
"""

import pytest
import torch

from robustdm import NoiseSchedule, Objective, Perturbation

SCHEDULE = NoiseSchedule.linear(1000)
VARIANCE = 0.25


def optimum(objective, t, energy):
    """w of a network w x, by the formula; energy = E delta^2 / r^2."""
    b = torch.linspace(0.5, 2, 20_001, dtype=torch.float64)
    at = torch.full((len(b),), t)
    pert = objective.perturbation
    c = energy * float((pert.lambda_t(SCHEDULE, at, b) * pert.radius(SCHEDULE, at, b) ** 2).mean())
    abar = float(SCHEDULE.alphas_cumprod[t])
    s2 = 1 - abar
    gain = 1 if objective.name == "invariance" else 1 + c
    return s2**0.5 * gain / (abar * VARIANCE + s2 * (1 + c))


def solved(objective, t, batch=300_000):
    """w that minimises the objective's own loss at one timestep: a parabola in w, by its gradient.

    A network w x shifts its output by w s delta; the attack's sign is that of delta, so for
    robust_adv the perturbation is the outward one.
    """
    g = torch.Generator().manual_seed(0)
    x0 = VARIANCE**0.5 * torch.randn(batch, 1, generator=g, dtype=torch.float64)
    draw = objective.draw(x0, seed=0, step=0, t=torch.full((batch,), t))
    points = {}
    for w in (0.0, 1.0):
        weight = torch.tensor(w, dtype=torch.float64, requires_grad=True)
        out = objective(lambda x, _, weight=weight: weight * x, x0, draw)
        points[w] = torch.autograd.grad(out.total, weight)[0].item()
    if objective.name == "robust_adv":
        # At w = 0 the attack has no gradient; take the parabola from two points where it has.
        weight = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
        out = objective(lambda x, _: weight * x, x0, draw)
        middle = torch.autograd.grad(out.total, weight)[0].item()
        points[0.0] = 2 * middle - points[1.0]
    return points[0.0] / (points[0.0] - points[1.0])


@pytest.mark.parametrize("t", [10, 100, 500])
@pytest.mark.parametrize("mode", ["ray", "x", "std", "literal"])
@pytest.mark.parametrize("name, energy", [
    ("robust_ran", 1 / 3), ("robust_adv", 0.8465), ("outward_ran", 0.8465), ("invariance", 0.8465)
])
def test_optimum_of_a_linear_network(name, energy, mode, t):
    objective = Objective(name, SCHEDULE, Perturbation(lambda_mode=mode))
    wanted = optimum(objective, t, energy)
    # At low noise the sample covariance of x0 and eps, about 1 / sqrt(batch), is what counts.
    assert solved(objective, t) == pytest.approx(wanted, rel=0.01, abs=0.012 if t == 10 else 0)


def test_limits_of_the_optimum():
    """No regulariser gives the Wiener filter; a strong one predicts x_t / s, that is x0 = 0."""
    for t in (100, 500):
        abar = float(SCHEDULE.alphas_cumprod[t])
        s = (1 - abar) ** 0.5
        none = Objective("robust_adv", SCHEDULE, Perturbation(lam=0.0))
        strong = Objective("robust_adv", SCHEDULE, Perturbation(lam=1e9))
        assert optimum(none, t, 0.8465) == pytest.approx(s / (abar * VARIANCE + s**2))
        assert optimum(strong, t, 0.8465) == pytest.approx(1 / s, rel=1e-6)
