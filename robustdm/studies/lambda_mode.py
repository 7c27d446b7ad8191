"""Which reading of lambda_t should be the default: noise removed against signal kept.

All four readings with robust_adv, beside DDPM, on the subspace of rank 5 in R^32, the three
Gaussians with outliers, the digits, and (where an .npz is given) the leading 25 principal
coordinates of 64x64 butterflies with 40 dimensions of noise alone, scaled so that the largest
standard deviation is 2 as in the first set. (Unscaled it is 29, which the small network does not
learn in minutes: even plain DDPM's first component came out several times too wide.)
"""

from __future__ import annotations

from pathlib import Path

from robustdm.data import Corruption, SubspaceData, load_data
from robustdm.reporting.tables import text_table
from robustdm.runs.config import TrainConfig
from robustdm.runs.presets import preset_values
from robustdm.studies import digits, invitro, subspace
from robustdm.studies.claims import Claim, Spread
from robustdm.studies.runner import Arm, run_arms, summarise, write_results

MODES = ("ray", "x", "std", "literal")
OBJECTIVES = {"DDPM": subspace.OBJECTIVES["DDPM"]} | {
    f"robust_adv ({mode})": dict(objective="robust_adv", lambda_mode=mode) for mode in MODES
}
SIGNAL, NOISE = 25, 40
COLUMNS = {
    "subspace": ["off_subspace_sd", "component_ratio_1", "component_ratio_5",
                 "sliced_wasserstein"],
    "gaussians, outliers": ["distance", "far_share", "sliced_wasserstein"],
    "digits": ["noise_rms", "residual", "pixel_std", "sliced_wasserstein"],
    "butterflies": ["off_subspace_sd", "component_ratio_1", f"component_ratio_{SIGNAL}",
                    "sliced_wasserstein"],
}


def butterfly_data(config: TrainConfig) -> SubspaceData:
    """The leading principal coordinates of the images, scaled to a largest deviation of 2."""
    sds = load_data(config).sds
    corruption = Corruption(config.corrupt_fraction, config.corrupt_sigma, config.seed)
    return SubspaceData.from_sds(
        sds * (2 / sds[0]), NOISE, config.num_points, corruption, config.holdout, config.seed
    )


def arms(seeds: int, steps: int | None, butterflies: Path | None) -> list[Arm]:
    """Every reading on every set with every seed; shares its arms with the other studies."""
    made = subspace.arms(seeds, steps, OBJECTIVES)
    made += [arm for arm in invitro.arms(seeds, steps, OBJECTIVES) if arm.group in COLUMNS]
    if butterflies is not None:
        base = preset_values("subspace") | dict(
            data_dir=butterflies, resolution=64,
            subspace_rank=SIGNAL, subspace_noise_dims=NOISE,
        ) | ({"steps": steps} if steps else {})
        made += [
            Arm("butterflies", name, TrainConfig(**{**base, **fields, "seed": seed}), 500,
                make_data=butterfly_data)
            for seed in range(seeds) for name, fields in OBJECTIVES.items()
        ]
    return made + digits.arms(seeds, steps, OBJECTIVES)


def run(
    out: Path, seeds: int, steps: int | None, jobs: int, butterflies: Path | None
) -> list[Claim]:
    """Run the study; print and write one table per set and the score of every reading."""
    records = run_arms(arms(seeds, steps, butterflies), out, jobs)
    sections = []
    scores: dict[str, dict[str, Spread | float]] = {f"robust_adv ({m})": {} for m in MODES}
    for group, columns in COLUMNS.items():
        mine = [record for record in records if record["group"] == group]
        if not mine:
            continue
        rows = summarise(mine, columns)
        table = text_table(rows, markdown=True)
        sections += [f"## {group}, {seeds} seeds", table]
        print(f"{group}\n{table}\n")
        noise = columns[0]
        for name, row in scores.items():
            spread = rows[name][noise]
            base = rows["DDPM"][noise].mean
            row[f"{group}: noise / DDPM"] = Spread(spread.mean / base, spread.sd / base)
    summary = text_table(scores, markdown=True)
    print(f"noise left, as a share of DDPM's\n{summary}\n")
    write_results(out, [*sections, "## Noise left, as a share of DDPM's", summary], [], records)
    return []
