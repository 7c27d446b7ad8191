"""How much noise is removed, and how much signal kept, where the truth is known exactly.

A Gaussian of rank 5 in R^32 with standard deviations 2, 1.4, 1, .7 and .5; 90 % of the 5,000 points
carry Gaussian noise of standard deviation 0.1 in all dimensions. 3,000 steps of 128 points, a
residual MLP; 500 samples by 1000-step DDPM.
"""

from __future__ import annotations

from pathlib import Path

from robustdm.data import Corruption, SubspaceData
from robustdm.studies.runner import Arm, Claim, baseline_arms, run_arms, summarise, write_results
from robustdm.tables import text_table
from robustdm.training.config import TrainConfig, preset_values

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
COLUMNS = ["off_subspace_sd", *(f"component_ratio_{k}" for k in range(1, 6)), "sliced_wasserstein"]


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


def with_baselines(arms: list[Arm]) -> list[Arm]:
    """Arms, and behind them what the paper leaves out beside their plain DDPMs."""
    def sigma(config: TrainConfig) -> float | None:
        # Point sets have noise of their own in place of a corruption.
        return None if config.data in ("plane", "gaussians") else config.corrupt_sigma

    return arms + [other for arm in arms if arm.name == "DDPM"
                   for other in baseline_arms(arm, sigma(arm.config))]


def run(out: Path, seeds: int, steps: int | None, jobs: int) -> list[Claim]:
    """Run the study, print and write its table."""
    records = run_arms(with_baselines(arms(seeds, steps)), out, jobs)
    rows = summarise(records, COLUMNS)
    off = {name: row["off_subspace_sd"].mean for name, row in rows.items()}
    top = rows["robust_adv (ray)"]["component_ratio_1"].mean
    ratio = off["robust_adv (ray)"] / off["DDPM"]
    claims = [
        Claim("DDPM / training noise, off-subspace sd", off["DDPM"] / NOISE_SD,
              "at least 0.9", off["DDPM"] >= 0.9 * NOISE_SD),
        Claim("robust_adv (ray) / DDPM, off-subspace sd", ratio, "at most 0.35", ratio <= 0.35),
        Claim("robust_ran, off-subspace sd", off["robust_ran"], "between robust_adv and DDPM",
              off["robust_adv (ray)"] < off["robust_ran"] < off["DDPM"]),
        Claim("robust_adv (ray), strongest component's sd / truth", top, "0.8 to 1.2",
              0.8 <= top <= 1.2),
        Claim("invariance / DDPM, off-subspace sd", off["invariance"] / off["DDPM"],
              "clearly above 1", off["invariance"] > 1.2 * off["DDPM"]),
    ]
    weakest = rows["robust_adv (ray)"]["component_ratio_5"].mean
    for name in (n for n in rows if "shrunk" in n):
        claims += [
            Claim(f"robust_adv (ray) / {name}, off-subspace sd",
                  off["robust_adv (ray)"] / off[name],
                  "below 1: better than no training at all", off["robust_adv (ray)"] < off[name]),
            Claim(f"robust_adv (ray) / {name}, weakest component's sd",
                  weakest / rows[name]["component_ratio_5"].mean, "above 1",
                  weakest > rows[name]["component_ratio_5"].mean),
        ]
    table = text_table(rows, markdown=True)
    write_results(out, [f"## Subspace, {seeds} seeds", table], claims, records)
    print(table)
    return claims
