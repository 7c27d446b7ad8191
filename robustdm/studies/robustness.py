"""What the regulariser is for, measured on a trained network with fresh perturbations.

- ``agreement``: share of the elements in which the perturbation that a method trains with has the
  sign of the exact attack's;
- ``J_ratio``: how far that perturbation moves the output, as a share of the exact attack's;
- ``residual_fgsm`` and ``residual_pgd10``: mean square of the equivariance residual over that of
  the radius, under the attack that is trained with and under ten smaller steps. If training had
  only learnt to survive the single step (catastrophic overfitting), the second would be far above
  the first.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robustdm.method.objectives import Draw, Objective
from robustdm.method.predict import predict_noise
from robustdm.method.schedule import expand
from robustdm.models.load_run import objective_of, schedule_of
from robustdm.runs.config import TrainConfig

PROBED = ["agreement", "J_ratio", "residual_fgsm", "residual_pgd10"]
PGD_STEPS = 10


def units(config: TrainConfig) -> float:
    """Mean work of a step, in forward passes of a batch."""
    objective = objective_of(config)
    return sum(objective.units(step) for step in range(config.steps)) / config.steps


def robustness(model: nn.Module, config: TrainConfig, x0: Tensor, seed: int) -> dict[str, float]:
    """The measures above that a method has (plain DDPM perturbs nothing).

    Args:
        model: trained network, without gradients of its weights.
        config: what it was trained with.
        x0: (B, ...) data.
        seed: of the timesteps and perturbations.
    """
    own = objective_of(config)
    exact = Objective("robust_adv", schedule_of(config), own.perturbation)
    draw = exact.draw(x0, seed=seed, step=2**32 - 1)
    loss = exact(model, x0, draw)
    attacked = loss.delta
    clean = predict_noise(model, loss.xt, draw.t).detach()

    def moved(delta: Tensor) -> Tensor:
        x = loss.xt[: len(delta)] + expand(draw.noise, loss.xt)[: len(delta)] * delta
        return predict_noise(model, x, draw.t[: len(delta)]) - clean[: len(delta)]

    def residual(delta: Tensor) -> float:
        squared = (moved(delta) - delta).square().flatten(1).mean(1)
        return float(squared.mean() / draw.radius.double().square().mean())

    measures = {
        "residual_fgsm": residual(attacked),
        "residual_pgd10": residual(projected_gradient(moved, draw)),
    }
    if config.objective != "ddpm":
        delta = own(model, x0, draw).delta
        same = attacked[: len(delta)]
        measures["agreement"] = (delta.sign() == same.sign()).double().mean().item()
        measures["J_ratio"] = float(moved(delta).square().sum() / moved(same).square().sum())
    return measures


def projected_gradient(moved, draw: Draw, steps: int = PGD_STEPS) -> Tensor:
    """Perturbation (B, ...) in the ball that moves the output far: ``steps`` sign-gradient steps of
    a quarter of the radius from the random start.

    Source: Madry et al. 2018.
    """
    delta = draw.delta
    radius = expand(draw.radius, delta)
    for _ in range(steps):
        delta = delta.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(moved(delta).square().sum(), delta)
        delta = torch.clamp(delta + 0.25 * radius * gradient.sign(), -radius, radius)
    return delta.detach()
