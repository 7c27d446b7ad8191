"""How much noise is removed, and how much signal kept, where the truth is known exactly.

A Gaussian of rank 5 in R^32 with standard deviations 2, 1.4, 1, .7 and .5; 90 % of the 5,000 points
carry Gaussian noise of standard deviation 0.1 in all dimensions. 3,000 steps of 128 points, a
residual MLP; 500 samples by 1000-step DDPM.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from robustdm.data import Corruption, SubspaceData
from robustdm.reporting import plots
from robustdm.reporting.tables import text_table
from robustdm.runs.config import TrainConfig
from robustdm.runs.presets import preset_values
from robustdm.studies import tradeoff
from robustdm.studies.claims import Claim, by_seed, judge, ratio_claim
from robustdm.studies.runner import (
    SHRUNK_LAM,
    SHRUNK_SWEEP,
    Arm,
    baseline_arms,
    run_arms,
    summarise,
    write_results,
)

SDS = [2.0, 1.4, 1.0, 0.7, 0.5]
NOISE_DIMS = 27
NOISE_SD = 0.1 * 0.9**0.5
"""rms over all points of the training data's noise, per dimension."""

# The mode is named throughout, so that a change of the default leaves the study as it is.
OBJECTIVES = {
    "DDPM": dict(objective="ddpm", lambda_mode="ray"),
    "robust_ran": dict(objective="robust_ran", lambda_mode="ray"),
    "outward_ran": dict(objective="outward_ran", lambda_mode="ray"),
    "robust_adv (ray)": dict(objective="robust_adv", lambda_mode="ray"),
    "robust_adv (x)": dict(objective="robust_adv", lambda_mode="x"),
    "invariance": dict(objective="invariance", lambda_mode="ray"),
}
NOISE = "off_subspace_sd"
COLUMNS = [NOISE, "signal", *(f"component_ratio_{k}" for k in range(1, 6)), "sliced_wasserstein"]


def make_data(config: TrainConfig) -> SubspaceData:
    """The training points: fixed for a seed, corrupted once."""
    corruption = Corruption(config.corrupt_fraction, config.corrupt_sigma, config.seed)
    return SubspaceData.from_sds(
        SDS, NOISE_DIMS, config.num_points, corruption, config.holdout, config.seed
    )


def arms(seeds: int, steps: int | None, objectives: dict[str, dict] = OBJECTIVES) -> list[Arm]:
    """Every objective with every seed."""
    base = preset_values("subspace") | ({"steps": steps} if steps else {})
    return [
        Arm("subspace", name, TrainConfig(**{**base, **fields, "seed": seed}), 500,
            make_data=make_data)
        for seed in range(seeds) for name, fields in objectives.items()
    ]


def with_baselines(arms: list[Arm], shrunk: Sequence[float] = SHRUNK_LAM) -> list[Arm]:
    """Arms, and behind them what the paper leaves out beside their plain DDPMs."""
    def sigma(config: TrainConfig) -> float | None:
        # Point sets have noise of their own in place of a corruption.
        return None if config.data in ("plane", "gaussians") else config.corrupt_sigma

    return arms + [other for arm in arms if arm.name == "DDPM"
                   for other in baseline_arms(arm, sigma(arm.config), shrunk)]


def run(out: Path, seeds: int, steps: int | None, jobs: int) -> list[Claim]:
    """Run the study; print and write its table and a figure."""
    records = run_arms(with_baselines(arms(seeds, steps), SHRUNK_SWEEP), out, jobs)
    for record in records:
        record["measures"]["signal"] = statistics.fmean(
            record["measures"][f"component_ratio_{k}"] for k in range(1, 6))
    rows = summarise(records, COLUMNS)

    def values(name: str, measure: str = NOISE) -> list[float]:
        return by_seed(records, "subspace", name, measure)

    adv = "robust_adv (ray)"
    claims = [
        judge("DDPM / training noise, off-subspace sd", [v / NOISE_SD for v in values("DDPM")],
              at_least=0.9),
        ratio_claim(f"{adv} / DDPM, off-subspace sd", values(adv), values("DDPM"), at_most=0.35),
        ratio_claim("robust_ran / DDPM, off-subspace sd", values("robust_ran"), values("DDPM")),
        ratio_claim(f"{adv} / robust_ran, off-subspace sd", values(adv), values("robust_ran")),
        judge(f"{adv}, strongest component's sd / truth", values(adv, "component_ratio_1"),
              at_least=0.8, at_most=1.2),
        ratio_claim("invariance / DDPM, off-subspace sd", values("invariance"), values("DDPM"),
                    at_least=1.25),
        *(tradeoff.equal_signal_claim(records, "subspace", name, NOISE, "signal")
          for name in ("robust_ran", "outward_ran", adv, "robust_adv (x)")),
    ]
    table = text_table(rows, markdown=True)
    shown = {name: row for name, row in rows.items() if name != "invariance"}
    plots.save(tradeoff.figure(shown, NOISE, "signal"), out / "tradeoff.png")
    write_results(out, [f"## Subspace, {seeds} seeds", table], claims, records)
    print(table)
    return claims
