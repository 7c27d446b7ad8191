"""What adversarial training for less than its price removes, and what it costs in robustness.

The exact method takes 8 units of work a step where plain DDPM takes 3. Every option that saves some
of them is trained with the exact method's number of steps, and again with its amount of work, on
the subspace of rank 5 in R^32 (all options) and on the digits (the most promising ones). Beside
noise and signal stands what the regulariser is for, measured on the trained network with fresh
perturbations:

- ``agreement``: share of the elements in which the perturbation that the option trains with has the
  sign of the exact attack's;
- ``J_ratio``: how far that perturbation moves the output, as a share of the exact attack's;
- ``residual_fgsm`` and ``residual_pgd10``: mean square of the equivariance residual over that of
  the radius, under the attack that is trained with and under ten smaller steps. If training had
  only learnt to survive the single step (catastrophic overfitting), the second would be far above
  the first.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from robustdm.method.objectives import Draw, Objective
from robustdm.method.predict import predict_noise
from robustdm.method.schedule import expand
from robustdm.metrics import frechet_distance
from robustdm.models.load_run import objective_of, schedule_of
from robustdm.reporting import plots
from robustdm.reporting.tables import text_table
from robustdm.runs.config import TrainConfig
from robustdm.runs.presets import preset_values
from robustdm.studies import subspace
from robustdm.studies.claims import Claim, by_seed, ratio_claim
from robustdm.studies.runner import (
    Arm,
    load_model,
    load_samples,
    run_arms,
    summarise,
    write_results,
)

EXACT = "exact (robust_adv)"
_ADV = dict(objective="robust_adv", lambda_mode="ray")
METHODS = {
    EXACT: _ADV,
    "DDPM": dict(objective="ddpm", lambda_mode="ray"),
    "robust_ran": dict(objective="robust_ran", lambda_mode="ray"),
    "outward_ran": dict(objective="outward_ran", lambda_mode="ray"),
    "reg_fraction 0.5": _ADV | dict(reg_fraction=0.5),
    "reg_fraction 0.25": _ADV | dict(reg_fraction=0.25),
    "reg_every 4": _ADV | dict(reg_every=4),
    "attack_fraction 0.5": _ADV | dict(attack_fraction=0.5),
    "at_last 0.5": _ADV | dict(at_last=0.5),
    "at_last 0.25": _ADV | dict(at_last=0.25),
}
ON_DIGITS = (EXACT, "DDPM", "robust_ran", "outward_ran", "reg_fraction 0.25", "reg_every 4",
             "attack_fraction 0.5", "at_last 0.25")
EQUAL_WORK = " (equal work)"
NOISE = {"subspace": "off_subspace_sd", "digits": "noise_rms"}
SIGNAL = {"subspace": ["component_ratio_1", "component_ratio_5"], "digits": ["pixel_std"]}
PROBED = ["agreement", "J_ratio", "residual_fgsm", "residual_pgd10"]
PGD_STEPS = 10


def units(config: TrainConfig) -> float:
    """Mean work of a step, in forward passes of a batch."""
    objective = objective_of(config)
    return sum(objective.units(step) for step in range(config.steps)) / config.steps


def arms(seeds: int, steps: int | None) -> list[Arm]:
    """Every option with every seed, at the exact method's steps and at its work."""
    made = []
    for group, names, samples in (("subspace", METHODS, 500), ("digits", ON_DIGITS, 128)):
        base = preset_values(group) | ({"steps": steps} if steps else {})
        extra = {"make_data": subspace.make_data} if group == "subspace" else {}
        exact = units(TrainConfig(**{**base, **METHODS[EXACT]}))
        for seed in range(seeds):
            for name in names:
                config = TrainConfig(**{**base, **METHODS[name], "seed": seed})
                made.append(Arm(group, name, config, samples, **extra))
                if name != EXACT:
                    longer = round(config.steps * exact / units(config))
                    config = TrainConfig(**{**config.to_dict(), "steps": longer})
                    made.append(Arm(group, name + EQUAL_WORK, config, samples, **extra))
    return made


def robustness(model: nn.Module, config: TrainConfig, x0: Tensor, seed: int) -> dict[str, float]:
    """The measures of `PROBED` that a method has (plain DDPM perturbs nothing).

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


def run(out: Path, seeds: int, steps: int | None, jobs: int) -> list[Claim]:
    """Run the study; print and write its tables and a figure."""
    todo = arms(seeds, steps)
    records = run_arms(todo, out, jobs)
    for arm, record in zip(todo, records, strict=True):
        data = arm.make_data(arm.config)
        everything = torch.arange(len(data))
        record["measures"] |= robustness(
            load_model(arm, out), arm.config, data.batch(everything[:256]), arm.config.seed
        ) | {
            "frechet": frechet_distance(load_samples(arm, out), data.clean(everything)),
            "units": units(arm.config),
            "steps": arm.config.steps,
        }
    sections, claims = [], []
    for group, noise in NOISE.items():
        columns = ["steps", "units", noise, *SIGNAL[group], "sliced_wasserstein", "frechet",
                   "train_cpu_s", *PROBED]
        rows = summarise([r for r in records if r["group"] == group], columns)
        for title, wanted in (("equal steps", False), ("equal work", True)):
            chosen = {name.removesuffix(EQUAL_WORK): row for name, row in rows.items()
                      if name.endswith(EQUAL_WORK) == wanted or name == EXACT}
            table = text_table(chosen, markdown=True)
            sections += [f"## {group}, {title}, {seeds} seeds", table]
            print(f"{group}, {title}\n{table}\n")
        _figure(out / f"{group}.png", rows, noise)

        def values(name: str, measure: str, group=group) -> list[float]:
            return by_seed(records, group, name, measure)

        options = [n for n in rows if n not in (EXACT, "DDPM", "DDPM" + EQUAL_WORK)]
        claims += [ratio_claim(f"{group}, {name}: noise / exact's", values(name, noise),
                               values(EXACT, noise), at_most=1.25) for name in options]
        # The controls never saw the attack: nothing in them can have overfitted to it.
        claims += [ratio_claim(
            f"{group}, {name}: residual_pgd10 / residual_fgsm (no catastrophic overfitting)",
            values(name, "residual_pgd10"), values(name, "residual_fgsm"), at_most=3)
            for name in (EXACT, *options) if "_ran" not in name]
    write_results(out, sections, claims, records)
    return claims


def _figure(path: Path, rows: dict, noise: str) -> None:
    """Noise left against the total work, with lines from equal steps to equal work."""
    made, axes = plots.figure(1, 1, size=(6.0, 4.2))
    ax = axes[0, 0]
    for name in (n for n in rows if not n.endswith(EQUAL_WORK)):
        both = [rows[n] for n in (name, name + EQUAL_WORK) if n in rows]
        work = [row["units"].mean * row["steps"].mean / 1000 for row in both]
        ax.errorbar(work, [row[noise].mean for row in both], [row[noise].sd for row in both],
                    marker="o", markersize=4, linewidth=1, label=name)
    ax.set(xlabel="work of the run (thousand forward passes of a batch)", ylabel=noise,
           yscale="log")
    ax.legend(fontsize=7)
    plots.save(made, path)
