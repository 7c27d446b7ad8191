"""What training will remove and keep, predicted in closed form before any training.

For Gaussian data of variance v in a direction, the optimum of the loss is a linear network: it
denoises as if the noise had the variance s^2 (1 + c_t), with c_t = E_b[lambda_t E delta^2], so
``x0 = a v / (abar v + s^2 (1 + c)) x``. The sampler is then linear too, and the variance of what it
generates is a recursion over its steps. Corrupted training data count as Gaussian of variance
v + p sigma^2. Real networks on real data deviate; ``python -m robustdm.plan --compare`` says by how
much.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from robustdm.errors import UsageError
from robustdm.method.perturbation import Perturbation
from robustdm.method.sampling import Respaced, timesteps
from robustdm.method.schedule import NoiseSchedule

# E delta^2 / r^2 of a uniform perturbation, and after a step of r / sqrt(3) outwards and a clamp:
# E min(u + 1 / sqrt(3), 1)^2 over u in [0, 1].
_STEP = 1 / math.sqrt(3)
UNIFORM_ENERGY = 1 / 3
OUTWARD_ENERGY = (1 - _STEP**3) / 3 + _STEP
ENERGY = {
    "ddpm": 0.0, "robust_ran": UNIFORM_ENERGY, "outward_ran": OUTWARD_ENERGY,
    "robust_adv": OUTWARD_ENERGY, "invariance": OUTWARD_ENERGY,
}
_BETAS = 64  # nodes of the mean over b
CONTROLS = ("invariance",)


@dataclass(frozen=True)
class Setting:
    """What decides the optimum: the objective and its perturbation."""

    objective: str = "robust_adv"
    perturbation: Perturbation = Perturbation()
    lambda_max: float | None = None

    def __post_init__(self):
        if self.objective not in ENERGY:
            raise UsageError(
                f"objective is {self.objective!r}: choose one of {', '.join(ENERGY)}")

    def flags(self) -> str:
        """As flags of ``python -m robustdm.train``."""
        if self.objective == "ddpm":
            return "--objective ddpm"
        p = self.perturbation
        text = (f"--objective {self.objective} --lambda-mode {p.lambda_mode} --lam {p.lam:g} "
                f"--gamma {p.gamma:.4g}")
        return text + (f" --omega {p.omega:g}" if p.omega != 2 else "")


def excess(schedule: NoiseSchedule, setting: Setting, visited: Tensor) -> Tensor:
    """c_t: by how much of s^2 the regulariser makes the noise look larger.

    Args:
        visited: (S,) int64 timesteps.

    Returns:
        (S,) float64.
    """
    low, high = setting.perturbation.beta_range
    nodes = low + (high - low) * (torch.arange(_BETAS, dtype=torch.float64) + 0.5) / _BETAS
    t, beta = visited.repeat(_BETAS), nodes.repeat_interleave(len(visited))
    weight = setting.perturbation.lambda_t(schedule, t, beta)
    if setting.lambda_max is not None:
        weight = weight.clamp(max=setting.lambda_max)
    energy = weight * setting.perturbation.radius(schedule, t, beta) ** 2
    return ENERGY[setting.objective] * energy.view(_BETAS, -1).mean(0)


def _excesses(
    schedule: NoiseSchedule, settings: Sequence[Setting], visited: Tensor
) -> Tensor:
    """(S, T) float64: `excess` of each. Those that differ in lam or the objective alone, as most of
    a grid do, are multiples of each other unless lambda is clipped."""
    units: dict[Perturbation, Tensor] = {}
    found = []
    for setting in settings:
        if setting.lambda_max is not None:
            found.append(excess(schedule, setting, visited))
            continue
        shape = setting.perturbation
        unit = replace(shape, lam=1.0, beta_range=tuple(shape.beta_range))
        if unit not in units:
            units[unit] = excess(schedule, Setting("robust_ran", unit), visited) / UNIFORM_ENERGY
        found.append(ENERGY[setting.objective] * shape.lam * units[unit])
    return torch.stack(found)


def generated_deviation(
    schedule: NoiseSchedule,
    settings: Sequence[Setting],
    variances: Tensor,
    *,
    sampler: str = "ddpm",
    steps: int | None = None,
    variance: str = "fixed_large",
) -> Tensor:
    """Standard deviation of generated samples, per setting and direction of the training data.

    Args:
        schedule: the noise schedule.
        settings: S of them.
        variances: (K,) variance of the training data, corruption included, in each direction.
        sampler: "ddpm" or "ddim" (eta 0).
        steps: timesteps to visit; by default all.
        variance: ddpm's noise, "fixed_large" or "fixed_small".

    Returns:
        (S, K) float64.
    """
    chain = Respaced(schedule, timesteps(schedule, steps))
    c = _excesses(schedule, settings, chain.timesteps)
    # Invariance asks for the same output at x + delta: the noise is predicted too small.
    shrunk = torch.tensor([s.objective == "invariance" for s in settings])[:, None]
    v = variances.double()[None]
    power = torch.ones(len(settings), v.shape[1], dtype=torch.float64)
    for k in range(len(chain)):
        abar = chain.alphas_cumprod[k].item()
        noise = (1 - abar) * (1 + c[:, k, None])
        eps = math.sqrt(1 - abar) / (abar * v + noise)
        eps = torch.where(shrunk, eps, eps * (1 + c[:, k, None]))
        x0 = (1 - math.sqrt(1 - abar) * eps) / math.sqrt(abar)
        if sampler == "ddpm":
            factor = chain.mean_x0[k].item() * x0 + chain.mean_x[k].item()
            added = 0.0 if k == len(chain) - 1 else chain.std[variance][k].item()
        else:
            before = chain.alphas_cumprod_prev[k].item()
            factor = math.sqrt(before) * x0 + math.sqrt(max(0.0, 1 - before)) * eps
            added = 0.0
        power = factor**2 * power + added**2
    return power.sqrt()


@dataclass(frozen=True)
class Prediction:
    """What a setting is predicted to do.

    Attributes:
        setting: the setting.
        noise_left: standard deviation of the noise that samples carry, over the training data's.
        kept: (K,) standard deviation along each signal component, over the clean data's.
        signal_kept: the same over all components: root of generated over clean signal power.
    """

    setting: Setting
    noise_left: float
    kept: Tensor
    signal_kept: float


def predict(
    schedule: NoiseSchedule, settings: Sequence[Setting], signal: Tensor, sigma: float,
    fraction: float = 0.9, **sampling,
) -> list[Prediction]:
    """Noise left and signal kept of each setting.

    Args:
        schedule: the noise schedule.
        settings: what to compare.
        signal: (K,) variances of the clean data along its components.
        sigma: standard deviation of the corruption.
        fraction: share of the data that carries it.
        sampling: ``sampler``, ``steps`` and ``variance`` of ``generated_deviation``.

    Raises:
        UsageError: for a corruption or a signal that is not positive.
    """
    noise = fraction * sigma**2
    if not (math.isfinite(noise) and noise > 0):
        raise UsageError(f"sigma is {sigma} and fraction {fraction}: both must be positive to plan "
                         "against; on clean data plain DDPM is better")
    if not len(signal) or not bool((signal > 0).all()):
        raise UsageError("signal holds no positive variance: name data that vary")
    deviations = generated_deviation(
        schedule, settings, torch.cat([torch.tensor([noise]), signal.double() + noise]), **sampling)
    made = []
    for setting, row in zip(settings, deviations, strict=True):
        # What is left of the noise within a component is not signal.
        left = row[0].square()
        power = (row[1:].square() - left).clamp(min=0)
        kept = (power / signal).sqrt()
        made.append(Prediction(setting, (left / noise).sqrt().item(), kept,
                               (power.sum() / signal.sum()).sqrt().item()))
    return made


def candidates() -> list[Setting]:
    """The grid that ``search`` looks through: objective, reading of lambda_t, lam, gamma, omega."""
    lams = [0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0]
    return [Setting("ddpm")] + [
        Setting(objective, Perturbation(omega, gamma / 255, lam, mode))
        for objective in ("robust_adv", "robust_ran") for mode in ("ray", "x", "std", "literal")
        for omega in (1.5, 2.0, 3.0) for gamma in (0, 1, 2, 4, 8, 16) for lam in lams
    ]


def best(predictions: Sequence[Prediction], keep: float) -> Prediction:
    """The prediction with the least noise among those that keep the signal.

    Raises:
        UsageError: if none does.
    """
    good = [p for p in predictions if p.signal_kept >= keep]
    if not good:
        most = max(p.signal_kept for p in predictions)
        raise UsageError(f"keep is {keep:g}: no setting keeps more than {most:.3g} of the signal's "
                         "standard deviation; ask for less")
    return min(good, key=lambda p: p.noise_left)


def spectrum(images: Tensor) -> Tensor:
    """(D,) variances of a set (N, ...) along its principal components, in falling order.

    Raises:
        UsageError: for fewer than two items.
    """
    x = images.flatten(1).double()
    if len(x) < 2:
        raise UsageError(f"{len(x)} item has no spectrum: name two or more")
    return torch.linalg.eigvalsh(torch.cov(x.T).reshape(x.shape[1], -1)).clamp(min=0).flip(0)
