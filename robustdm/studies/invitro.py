"""The paper's 3-D sets: an oblique plane under inlier noise, three Gaussians with outliers.

10,000 points, a residual MLP of 3 x 64, 2,500 steps of 512 points; 2,000 samples by 1000-step DDPM.
Distances reward shrinkage, so spread and the sliced Wasserstein distance stand beside them.

Source: Briglia et al. 2026, section 3 and Figures 2, 6 and 11.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from robustdm.data import load_data
from robustdm.method.sampling import sample
from robustdm.models.load_run import schedule_of
from robustdm.reporting import plots
from robustdm.reporting.tables import text_table
from robustdm.runs.config import TrainConfig
from robustdm.runs.presets import preset_values
from robustdm.studies import subspace
from robustdm.studies.claims import Claim, by_seed, ratio_claim
from robustdm.studies.runner import (
    SHRUNK_SWEEP,
    Arm,
    load_model,
    load_samples,
    run_arms,
    summarise,
    write_results,
)
from robustdm.studies.subspace import OBJECTIVES

SETS = {
    "plane, inlier noise": ("plane", dict(point_noise="inlier", point_noise_level=1.0)),
    "gaussians, outliers": ("gaussians", dict(point_noise="outlier", point_noise_level=0.2)),
}
COLUMNS = {
    "plane": ["distance", "in_plane_std", "sliced_wasserstein"],
    "gaussians": ["distance", "far_share", "mode0", "mode1", "mode2", "sliced_wasserstein"],
}
SHOWN = ("DDPM", "robust_adv (ray)", "robust_adv (x)", "invariance")
SCORE_TIMESTEP = 30
"""Where the learned score is compared with the true one: noise scale 0.11."""


def arms(seeds: int, steps: int | None, objectives: dict[str, dict] = OBJECTIVES) -> list[Arm]:
    """Every objective on both sets with every seed."""
    made = []
    for group, (preset, noise) in SETS.items():
        base = preset_values(preset) | noise | ({"steps": steps} if steps else {})
        made += [
            Arm(group, name, TrainConfig(**{**base, **fields, "seed": seed}), 2000)
            for seed in range(seeds) for name, fields in objectives.items()
        ]
    return made


def run(out: Path, seeds: int, steps: int | None, jobs: int) -> list[Claim]:
    """Run the study; print and write its tables and figures."""
    todo = subspace.with_baselines(arms(seeds, steps), SHRUNK_SWEEP)
    records = run_arms(todo, out, jobs)
    sections = []
    for group, (preset, _) in SETS.items():
        rows = summarise([r for r in records if r["group"] == group], COLUMNS[preset])
        table = text_table(rows, markdown=True)
        sections += [f"## {group}, {seeds} seeds", table]
        print(f"{group}\n{table}\n")
        shown = [arm for arm in todo if arm.group == group and arm.config.seed == 0]
        plots.save(figure(out, shown), out / f"{preset}.png")
    plane, gaussians = SETS

    def ratio(group: str, name: str, measure: str, words: str, **limit) -> Claim:
        return ratio_claim(f"{group}: {words}, {name} / DDPM", by_seed(
            records, group, name, measure), by_seed(records, group, "DDPM", measure), **limit)

    claims = []
    for name in ("robust_adv (ray)", "robust_adv (x)"):
        claims += [ratio(plane, name, "distance", "distance", at_most=1 / 3),
                   ratio(gaussians, name, "far_share", "far share")]
    claims += [ratio(group, "invariance", "distance", "distance", at_least=1.5) for group in SETS]
    write_results(out, sections, claims, records)
    return claims


def figure(out: Path, shown: list[Arm]):
    """Samples, sampling paths and score field of every shown arm, one column each."""
    shown = [arm for arm in shown if arm.name in SHOWN]
    data = load_data(shown[0].config)
    everything = torch.arange(len(data))
    schedule = schedule_of(shown[0].config)
    # The plane is seen edge on: one axis in it, one along its normal. Modes span their own plane.
    view = plots.point_view(data.clean(everything, "cpu").numpy())
    plane = view.planes[-1] if data.name == "plane" else view.planes[0]

    made, axes = plots.figure(3, 1 + len(shown), size=(2.8, 2.5))
    train = data.batch(everything[:2000], "cpu").numpy() @ plane
    _scatter(axes[0, 0], train, "training data")
    limits = axes[0, 0].get_xlim(), axes[0, 0].get_ylim()
    _scatter(axes[1, 0], data.clean(everything[:2000], "cpu").numpy() @ plane, "clean data", limits)

    ticks = (np.linspace(0.95 * low, 0.95 * high, 15) for low, high in limits)
    flat = np.stack(np.meshgrid(*ticks), -1).reshape(-1, 2)
    points = torch.from_numpy(flat @ plane.T).float()
    a = float(schedule.sqrt_alphas_cumprod[SCORE_TIMESTEP])
    s = float(schedule.sqrt_one_minus_alphas_cumprod[SCORE_TIMESTEP])
    true = data.score(points / a, s / a) / a
    _field(axes[2, 0], flat, true.numpy() @ plane, f"true score, s = {s:.2f}")
    t = torch.full((len(points),), SCORE_TIMESTEP)
    for column, arm in enumerate(shown, 1):
        model = load_model(arm, out)
        _scatter(axes[0, column], load_samples(arm, out).numpy() @ plane, arm.name, limits)
        frames: list[np.ndarray] = []

        def keep(timestep, numbers, x, frames=frames):
            frames.append(x.numpy().copy())

        # DDIM's paths are smooth: what bends them is the field, not fresh noise.
        sample(model, schedule, data.shape, num=80, sampler="ddim", steps=100, seed=1,
               batch_size=80, trajectory=keep)
        plots.trajectories(axes[1, column], np.clip(np.stack(frames), -4, 4), plane)
        axes[1, column].set(xlim=(-2.2, 2.2), ylim=(-2.2, 2.2), title="DDIM paths")
        with torch.no_grad():
            score = -model(points, t) / s
        error = float((score - true).norm() / true.norm())
        _field(axes[2, column], flat, score.numpy() @ plane, f"score, rel. error {error:.2f}")
    return made


def _scatter(ax, points: np.ndarray, title: str, limits=None) -> None:
    ax.scatter(*points.T, s=1.5, alpha=0.5, linewidths=0)
    ax.set_title(title)
    if limits is not None:
        ax.set(xlim=limits[0], ylim=limits[1])


def _field(ax, flat: np.ndarray, vectors: np.ndarray, title: str) -> None:
    plots.score_field(ax, flat, vectors, colorbar=False)
    ax.set_aspect("auto")
    ax.set_title(title)
