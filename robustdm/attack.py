"""Entry point: `python -m robustdm.attack RUN [RUN ...]` attacks the sampling trajectories of runs.

Each attack beside two controls: the same sampler without attack, and random perturbations of the
same size. What an attack does is its distance above the random control, not above zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from robustdm.cli import guard
from robustdm.errors import UsageError
from robustdm.flags import ChainFlags, ComputeFlags, FeatureFlags, parse_flags

_CHECKED_STEPS = 8


@dataclass(frozen=True, kw_only=True)
class AttackConfig(ComputeFlags, FeatureFlags, ChainFlags):
    """Which runs to attack, how, and what to measure."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run directories of `python -m robustdm.train`, side by side."""
    methods: tuple[Literal["fgsm", "pgd", "eot", "random"], ...] = ("random", "fgsm")
    """Attacks: one step, 20 steps, 20 steps on the mean over five noises, and the control."""
    steps_attacked: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    """Shares of the sampler's steps that are attacked."""
    where: Literal["stride", "random", "first", "last"] = "stride"
    """Which steps: evenly spread, drawn, the noisiest, the cleanest."""
    size: float = 1.0
    """Radius of the attack over the sampler's own noise."""
    phi: float = 1.0
    """Deviation of the random start over the sampler's own noise."""
    objective: Literal["mu", "eps"] = "mu"
    """What the attack moves: the posterior mean of the step, or the predicted noise."""
    iterations: int = 20
    """Steps of pgd and eot."""
    eot_loss: Literal["corrected", "printed"] = "corrected"
    """What eot moves the sampler's step away from: where it would have gone, or, as the paper
    prints it, where it is."""
    shrink: float | None = None
    """Attack every run a second time, its network shrunk by this lam (sample's --baseline shrink):
    what resists only because it shrinks, a plain DDPM can have without training."""
    num: int = 256
    """Samples per run and attack."""
    variance: Literal["fixed_large", "fixed_small"] = "fixed_large"
    """Noise of a step, and the size of the attack."""
    seed: int = 0
    """Of the samples and the attacks: every attack starts from the same noise."""
    out: Path = Path("runs/attack")
    """Folder for attack.json, attack.html and attack.png."""


def main(argv: Sequence[str] | None = None) -> None:
    """Parse flags, attack, write.

    Raises:
        UsageError: for a wrong flag or run.
        RunError: if sampling fails.
    """
    attack(parse_flags(
        AttackConfig, argv, prog="python -m robustdm.attack",
        description="Attack the sampling trajectories of trained runs.",
    ))


def attack(config: AttackConfig) -> dict:
    """Attack every run with every method and share; print a table, write a record and a page.

    Started by torchrun, each process attacks its part of the samples, and rank 0 writes.

    Returns:
        What attack.json holds; empty on other ranks than 0.

    Raises:
        UsageError: for a wrong run or setting.
        RunError: if sampling fails.
    """
    from robustdm.distributed import join

    with join(config.device) as ranks:
        return _attack(config, ranks)


def _attack(config: AttackConfig, ranks) -> dict:
    from robustdm.device import resolve_device
    from robustdm.evaluation.compare import Comparison, open_runs
    from robustdm.evaluation.measure import check_out
    from robustdm.method.baselines import Baseline
    from robustdm.method.trajectory_attack import TrajectoryAttack, attacked_steps

    if not config.steps_attacked:
        raise UsageError("steps_attacked is empty: give shares from 0 to 1")
    device = resolve_device(config.device)
    attacks = [None, *(
        TrajectoryAttack(method, share, config.where, config.seed, config.variance, config.size,
                         config.phi, config.objective, config.iterations,
                         eot_loss=config.eot_loss)
        for method in dict.fromkeys(config.methods) for share in config.steps_attacked)]
    with ranks.together():
        if ranks.main:
            check_out(config.out)
    generators = open_runs(config.runs, device, config.ema, ranks)
    shrunk = None if config.shrink is None else Baseline("shrink", config.shrink)
    rows = [(name if baseline is None else f"{name}, shrunk {config.shrink:g}", generator, baseline)
            for name, generator in generators.items()
            for baseline in (None, *([shrunk] if shrunk else []))]
    compared, checks = Comparison(config, device, ranks), {}
    for number, (name, generator, baseline) in enumerate(rows):
        steps = config.steps or len(generator.schedule)
        for made in attacks:
            what = "no attack" if made is None else f"{made.method} {made.share:.0%}"
            hit = sum(attacked_steps(steps, made.share, config.where)) if made else 0
            facts = {"method": made and made.method, "share": made.share if made else 0.0,
                     "steps attacked": hit}
            compared.add(name, generator, what, facts,
                         f"[{len(compared.rows) + 1}/{len(rows) * len(attacks)}] {name}, "
                         f"{what}", attack=made, steps=config.steps, spacing=config.spacing,
                         variance=config.variance, baseline=baseline)
        # One batch a row: each is for one rank, and last for rank 0, which has measured meanwhile.
        if ranks.rank == (ranks.size - 1 - number) % ranks.size:
            checks[name] = _raised(generator, baseline, config, device)
    found = {name: check for part in ranks.exchange(checks) for name, check in part.items()}
    if not ranks.main:
        return {}
    checks = {name: found[name] for name, _, _ in rows}
    record = compared.record(objective_raised=checks)
    print(compared.table())
    for name, check in checks.items():
        print(f"{name}: the objective above the random control's in "
              + ", ".join(f"{m} {r['raised']} of {r['checked']} steps" for m, r in check.items()))
    compared.write(
        "attack", "Attacks on the sampling trajectory",
        "The controls are no attack, and random signs of the same size: an attack is as strong as "
        "its distance from those. Distances reward shrinkage, so recall and deviation (1 is the "
        "clean spread) stand beside them.",
        compared.lines("method", "share", "share of steps attacked"), record)
    return record


def _raised(generator, baseline, config: AttackConfig, device) -> dict[str, dict[str, int]]:
    """At how many steps of an unattacked chain each attack moves a batch farther than random signs.

    The last step is left out: there x0 is x, and every pattern of signs moves it alike.
    """
    import torch

    from robustdm.method.predict import predict_noise
    from robustdm.method.sampling import Respaced, batch_or_default, stream_noise, timesteps
    from robustdm.method.trajectory_attack import TrajectoryAttack

    methods = [m for m in dict.fromkeys(config.methods) if m != "random"]
    model = generator.model
    if baseline is not None:
        model = baseline.network(model, generator.schedule).to(device)
    chain = Respaced(generator.schedule, timesteps(generator.schedule, config.steps,
                                                   config.spacing))
    noise = stream_noise(config.seed, generator.shape, device)
    numbers = range(min(64, config.num, batch_or_default(config.batch_size, generator.shape)))
    stride = max(1, (len(chain) - 1) // _CHECKED_STEPS)
    counts = {m: {"raised": 0, "checked": 0} for m in methods}
    x = noise(None, numbers)
    for k in range(len(chain) - 1):
        z = noise(chain.timesteps[k].item(), numbers)
        if k % stride == 0 and methods:
            moved = {}
            for method in ("random", *methods):
                made = TrajectoryAttack(
                    method, seed=config.seed, variance=config.variance, size=config.size,
                    phi=config.phi, objective=config.objective, iterations=config.iterations,
                    eot_loss=config.eot_loss)
                delta = made.perturbation(model, chain, k, numbers, x, z)
                moved[method] = made.measure(model, chain, k, x, delta).sum().item()
            for method in methods:
                counts[method]["checked"] += 1
                counts[method]["raised"] += moved[method] > moved["random"]
        with torch.no_grad():
            t = torch.full((len(x),), chain.timesteps[k].item(), device=x.device)
            x = chain.ddpm_step(k, x, predict_noise(model, x, t), z, config.variance,
                                generator.clip)
    return counts


if __name__ == "__main__":
    guard(main)
