"""The paper's 3-D sets: an oblique plane under inlier noise, three Gaussians with outliers.

10,000 points, a residual MLP of 3 x 64, 2,500 steps of 512 points; 2,000 samples by 1000-step DDPM.

Source: Briglia et al. 2026, section 3 and Figures 2, 6 and 11.
"""

import numpy as np
import torch

from robustdm.method.sampling import sample
from robustdm.models.load_run import schedule_of
from robustdm.reporting import plots
from robustdm.studies.runner import Arm, load_model, load_samples
from robustdm.studies.scales import Scale
from robustdm.studies.study import Study

PLANE, GAUSSIANS = SETS = "plane, inlier noise", "gaussians, outliers"
FIELDS = {
    PLANE: ("plane", dict(point_noise="inlier", point_noise_level=1.0)),
    GAUSSIANS: ("gaussians", dict(point_noise="outlier", point_noise_level=0.2)),
}
MODES = ("mode0", "mode1", "mode2")
COLUMNS = {
    PLANE: ["distance", "in_plane_std", "sliced_wasserstein"],
    GAUSSIANS: ["distance", "far_share", *MODES, "sliced_wasserstein"],
}
SHOWN = ("DDPM", "robust_adv (ray)", "robust_adv (x)", "invariance")
SCORE_TIMESTEP = 30
"""Where the learned score is compared with the true one: noise scale 0.11."""


def point_arms(scale: Scale, methods: dict[str, dict], shrunk=None) -> list[Arm]:
    """Every method on both sets with every seed; see ``Scale.arms``."""
    return [arm for group, (preset, noise) in FIELDS.items()
            for arm in scale.on(preset, 2000, fields=noise).arms(group, methods, shrunk)]


class PointStudy(Study):
    """A study of both sets: a table and a figure each.

    Attributes:
        more: columns besides those of the set.
    """

    more: tuple[str, ...] = ()

    def tables(self, of):
        return {group: of.rows(group, [*columns, *self.more])
                for group, columns in COLUMNS.items()}

    def figures(self, of):
        found = {}
        for group, (preset, _) in FIELDS.items():
            shown = [arm for arm in self.arms() if (arm.group, arm.config.seed) == (group, 0)]
            found[preset] = (figure(self.scale, shown),
                             f"{group}: samples, DDIM paths, score field (seed 0)")
        return found


def plane_of_sight(data) -> np.ndarray:
    """(3, 2): the plane is seen edge on, one axis in it, one along its normal; modes span their own
    plane."""
    view = plots.point_view(data.clean(torch.arange(len(data)), "cpu").numpy())
    return view.planes[-1] if data.name == "plane" else view.planes[0]


def scores(arm: Arm, model, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The learned score and that of the clean law at SCORE_TIMESTEP, (N, 3) each."""
    schedule = schedule_of(arm.config)
    a = float(schedule.sqrt_alphas_cumprod[SCORE_TIMESTEP])
    s = float(schedule.sqrt_one_minus_alphas_cumprod[SCORE_TIMESTEP])
    t = torch.full((len(points),), SCORE_TIMESTEP)
    with torch.no_grad():
        return -model(points, t) / s, arm.make_data(arm.config).score(points / a, s / a) / a


def score_measures(arm: Arm, scale: Scale) -> dict[str, float]:
    """The learned against the true score: its relative error at 1,000 noisy clean points and at
    training points, and its mean length there over the true one's."""
    data, model, schedule = arm.make_data(arm.config), load_model(arm, scale.out), schedule_of(
        arm.config)
    items = torch.arange(1000)
    noise = torch.randn(1000, *data.shape, generator=torch.Generator().manual_seed(0))
    a = float(schedule.sqrt_alphas_cumprod[SCORE_TIMESTEP])
    s = float(schedule.sqrt_one_minus_alphas_cumprod[SCORE_TIMESTEP])
    clean = scores(arm, model, a * data.clean(items) + s * noise)
    train = learned, true = scores(arm, model, a * data.batch(items))
    error, error_train = (float((x - y).norm() / y.norm()) for x, y in (clean, train))
    return {"score_error": error, "score_error_train": error_train,
            "score_magnitude": float(learned.norm(dim=1).mean() / true.norm(dim=1).mean())}


def figure(scale: Scale, shown: list[Arm]):
    """Samples, sampling paths and score field of every shown arm, one column each."""
    shown = [arm for arm in shown if arm.name in SHOWN]
    data = shown[0].make_data(shown[0].config)
    schedule, plane = schedule_of(shown[0].config), plane_of_sight(data)
    some = torch.arange(min(2000, len(data)))
    made, axes = plots.figure(3, 1 + len(shown), size=(2.8, 2.5))
    _scatter(axes[0, 0], data.batch(some, "cpu").numpy() @ plane, "training data")
    limits = axes[0, 0].get_xlim(), axes[0, 0].get_ylim()
    _scatter(axes[1, 0], data.clean(some, "cpu").numpy() @ plane, "clean data", limits)

    ticks = (np.linspace(0.95 * low, 0.95 * high, 15) for low, high in limits)
    flat = np.stack(np.meshgrid(*ticks), -1).reshape(-1, 2)
    points = torch.from_numpy(flat @ plane.T).float()
    for column, arm in enumerate(shown, 1):
        model = load_model(arm, scale.out)
        _scatter(axes[0, column], load_samples(arm, scale.out).numpy() @ plane, arm.name, limits)
        frames: list[np.ndarray] = []

        def keep(timestep, numbers, x, frames=frames):
            frames.append(x.numpy().copy())

        # DDIM's paths are smooth: what bends them is the field, not fresh noise.
        sample(model, schedule, data.shape, num=80, sampler="ddim", steps=100, seed=1,
               batch_size=80, trajectory=keep)
        plots.trajectories(axes[1, column], np.clip(np.stack(frames), -4, 4), plane)
        axes[1, column].set(xlim=(-2.2, 2.2), ylim=(-2.2, 2.2), title="DDIM paths")
        score, true = scores(arm, model, points)
        error = float((score - true).norm() / true.norm())
        _field(axes[2, column], flat, score.numpy() @ plane, f"score, rel. error {error:.2f}")
    s = float(schedule.sqrt_one_minus_alphas_cumprod[SCORE_TIMESTEP])
    _field(axes[2, 0], flat, true.numpy() @ plane, f"true score, s = {s:.2f}")
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
