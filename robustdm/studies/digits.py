"""Real images: handwritten digits of which 90 % carry Gaussian noise of standard deviation 0.2.

1,200 steps of 64 images with the network of the `digits` preset; 128 unclipped samples by 1000-step
DDPM. Noise is what samples carry on the pixels that are constant in clean digits; the spread of the
samples stands beside it, since a model that shrinks everything also removes noise.
"""

from __future__ import annotations

from pathlib import Path

import torch

from robustdm.data import load_data
from robustdm.reporting import images, plots
from robustdm.reporting.tables import text_table
from robustdm.runs.config import TrainConfig
from robustdm.runs.presets import preset_values
from robustdm.studies import subspace, tradeoff
from robustdm.studies.claims import EFFECT, Claim, by_seed, ratio_claim
from robustdm.studies.runner import (
    SHRUNK_SWEEP,
    Arm,
    load_samples,
    run_arms,
    summarise,
    write_results,
)

STEPS = 1200
SAMPLES = 128
OBJECTIVES = {
    name: fields for name, fields in subspace.OBJECTIVES.items() if name != "invariance"
} | {
    # Which knob trades smoothing for noise?
    "robust_adv (ray), lam 0.1": subspace.OBJECTIVES["robust_adv (ray)"] | dict(lam=0.1),
    "robust_adv (ray), gamma 4/255": subspace.OBJECTIVES["robust_adv (ray)"] | dict(gamma=4 / 255),
}
NOISE, SIGNAL = "noise_rms", "pixel_std"
CLEAN = "clean data, held out"
COLUMNS = [NOISE, "residual", SIGNAL, "sliced_wasserstein", "train_cpu_s"]


def arms(seeds: int, steps: int | None, objectives: dict[str, dict] = OBJECTIVES) -> list[Arm]:
    """Every objective with every seed."""
    base = preset_values("digits") | {"steps": steps or STEPS}
    return [
        Arm("digits", name, TrainConfig(**{**base, **fields, "seed": seed}), SAMPLES)
        for seed in range(seeds) for name, fields in objectives.items()
    ]


def references(arms: list[Arm]) -> list[dict]:
    """Records of as many training images as there are samples, and of clean ones held out, per
    seed."""
    made = []
    for arm in {a.config.seed: a for a in arms}.values():
        data = load_data(arm.config)
        held = data.heldout
        for name, points in (("training data", data.batch(torch.arange(SAMPLES))),
                             (CLEAN, held.clean(torch.arange(len(held))))):
            made.append({"group": "digits", "name": name, "seed": arm.config.seed,
                         "samples": len(points), "measures": data.measure(points)})
    return made


def run(out: Path, seeds: int, steps: int | None, jobs: int) -> list[Claim]:
    """Run the study; print and write its table, a figure and a sheet of samples."""
    todo = subspace.with_baselines(arms(seeds, steps), SHRUNK_SWEEP)
    records = run_arms(todo, out, jobs)
    records += references(todo)
    rows = summarise(records, COLUMNS)
    table = text_table(rows, markdown=True)

    def values(name: str, measure: str = NOISE) -> list[float]:
        return by_seed(records, "digits", name, measure)

    claims = [
        ratio_claim(f"{name} / DDPM, noise on constant pixels", values(name), values("DDPM"),
                    at_most=0.6) for name in OBJECTIVES if "robust" in name and "," not in name
    ] + [
        ratio_claim(f"robust_adv (ray) / {name}, {words}", values("robust_adv (ray)", measure),
                    values(name, measure), **limit)
        for name in rows if name.startswith("DDPM, ") and "shrunk" not in name
        for words, measure, limit in (("noise on constant pixels", NOISE, {}),
                                      ("spread", SIGNAL, dict(at_least=1 + EFFECT)))
    ] + [
        tradeoff.equal_signal_claim(records, "digits", name, NOISE, SIGNAL)
        for name in OBJECTIVES if name != "DDPM"
    ]
    shown = {name: row for name, row in rows.items() if "data" not in name}
    plots.save(tradeoff.figure(shown, NOISE, SIGNAL, rows[CLEAN][SIGNAL].mean),
               out / "tradeoff.png")
    sheet = torch.cat([load_samples(arm, out)[:16] for arm in todo if arm.config.seed == 0])
    # Half the contrast: at full contrast the noise of dark pixels would be clipped away.
    images.save_grid(out / "samples.png", sheet / 2, columns=16)
    names = "; ".join(arm.name for arm in todo if arm.config.seed == 0)
    caption = f"samples.png: rows are {names} (seed 0, half contrast)"
    write_results(out, [f"## Digits, {seeds} seeds", table, caption], claims, records)
    print(table)
    return claims
