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
DIFFERS = (
    "The paper gives neither the number of points, the network, nor the noise's strength: here "
    "10,000 points, a residual MLP of 3 x 64, 2,500 steps of 512; inlier noise of standard "
    "deviation 1 along the plane's normal, or 20 % of the points replaced by a uniform grid.",
    "The paper shows pictures only; every number here is ours.",
)
SHOWN = ("DDPM", "robust_adv (ray)", "robust_adv (x)", "invariance")
SCORE_TIMESTEP = 30
"""Where the learned score is compared with the true one: noise scale 0.11."""
BINS, REACH, DRAWN = 80, 3.0, 500
"""Cells to a side of the grid on which paths are counted, half its width; paths."""


def point_arms(scale: Scale, methods: dict[str, dict], shrunk=None) -> list[Arm]:
    """Every method on both sets with every seed; see ``Scale.arms``."""
    return [arm for group, (preset, noise) in FIELDS.items()
            for arm in scale.on(preset, 2000, fields=noise).arms(group, methods, shrunk)]


class PointStudy(Study):
    """A study of both sets: a table and a figure each.

    Attributes:
        methods, shrunk: see ``Scale.arms``.
        columns: of both tables; by default those of the set, and ``more``.
    """

    methods: dict[str, dict]
    shrunk: tuple[float, ...] | None = None
    more: tuple[str, ...] = ()

    def arms(self):
        return point_arms(self.scale, self.methods, self.shrunk)

    def tables(self, of):
        own = type(self).columns
        return {group: of.rows(group, own or [*columns, *self.more])
                for group, columns in COLUMNS.items()}

    def figures(self, of):
        return {preset: (figure(self.scale, [
            arm for arm in self.arms() if (arm.group, arm.config.seed) == (group, 0)]),
            f"{group}: samples, DDIM paths, score field (seed 0)")
            for group, (preset, _) in FIELDS.items()}


def plane_of_sight(data) -> np.ndarray:
    """(3, 2): the plane is seen edge on, one axis in it, one along its normal; modes span their own
    plane."""
    view = plots.point_view(data.clean(torch.arange(len(data)), "cpu").numpy())
    return view.planes[-1] if data.name == "plane" else view.planes[0]


def scale_of(arm: Arm) -> tuple[float, float]:
    """Of data and noise at SCORE_TIMESTEP."""
    schedule = schedule_of(arm.config)
    return (float(schedule.sqrt_alphas_cumprod[SCORE_TIMESTEP]),
            float(schedule.sqrt_one_minus_alphas_cumprod[SCORE_TIMESTEP]))


def scores(arm: Arm, model, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The learned score and that of the clean law at SCORE_TIMESTEP, (N, 3) each; their relative
    difference."""
    a, s = scale_of(arm)
    with torch.no_grad():
        learned = -model(points, torch.full((len(points),), SCORE_TIMESTEP)) / s
    true = arm.make_data(arm.config).score(points / a, s / a) / a
    return learned, true, float((learned - true).norm() / true.norm())


def score_measures(arm: Arm, scale: Scale) -> dict[str, float]:
    """Error of the learned score at 1,000 noisy clean points and at training points, and its mean
    length there over the true one's."""
    data, model, items = arm.make_data(arm.config), load_model(arm, scale.out), torch.arange(1000)
    noise = torch.randn(1000, *data.shape, generator=torch.Generator().manual_seed(0))
    a, s = scale_of(arm)
    *_, error = scores(arm, model, a * data.clean(items) + s * noise)
    learned, true, error_train = scores(arm, model, a * data.batch(items))
    return {"score_error": error, "score_error_train": error_train,
            "score_magnitude": float(learned.norm(dim=1).mean() / true.norm(dim=1).mean())}


def paths(arm: Arm, scale: Scale, **settings) -> torch.Tensor:
    """(steps, num, 3) states of ``sample``."""
    frames = []
    sample(load_model(arm, scale.out), schedule_of(arm.config), (3,),
           trajectory=lambda timestep, numbers, x: frames.append(x.clone()), **settings)
    return torch.stack(frames)


def visits(arm: Arm, scale: Scale) -> np.ndarray:
    """(BINS, BINS) points of DDPM's paths in the plane of sight."""
    flat = paths(arm, scale, num=DRAWN, batch_size=DRAWN, seed=arm.config.seed, steps=200).numpy()
    flat = (flat @ plane_of_sight(arm.make_data(arm.config))).reshape(-1, 2)
    return np.histogram2d(*flat.T, bins=BINS, range=[(-REACH, REACH)] * 2)[0]


def path_measures(arm: Arm, scale: Scale) -> dict[str, float]:
    """How many cells DDPM's paths fill (exp of the entropy), and how straight DDIM's are."""
    share = visits(arm, scale)
    share = share[share > 0] / share.sum()
    path = paths(arm, scale, num=DRAWN, batch_size=DRAWN, seed=arm.config.seed, sampler="ddim",
                 steps=100)
    straight = (path[-1] - path[0]).norm(dim=1) / path.diff(dim=0).norm(dim=2).sum(0)
    return {"cells": float(np.exp(-(share * np.log(share)).sum())),
            "straightness": float(straight.mean())}


def figure(scale: Scale, shown: list[Arm]):
    """Samples, sampling paths and score field of every shown arm, one column each."""
    shown = [arm for arm in shown if arm.name in SHOWN]
    data = shown[0].make_data(shown[0].config)
    plane, some = plane_of_sight(data), torch.arange(2000)
    made, axes = plots.figure(3, 1 + len(shown), size=(2.8, 2.5))
    _scatter(axes[0, 0], data.batch(some, "cpu").numpy() @ plane, "training data")
    limits = axes[0, 0].get_xlim(), axes[0, 0].get_ylim()
    _scatter(axes[1, 0], data.clean(some, "cpu").numpy() @ plane, "clean data", limits)

    ticks = (np.linspace(0.95 * low, 0.95 * high, 15) for low, high in limits)
    flat = np.stack(np.meshgrid(*ticks), -1).reshape(-1, 2)
    points = torch.from_numpy(flat @ plane.T).float()
    for column, arm in enumerate(shown, 1):
        _scatter(axes[0, column], load_samples(arm, scale.out).numpy() @ plane, arm.name, limits)
        # DDIM's paths are smooth: what bends them is the field, not fresh noise.
        path = paths(arm, scale, num=80, batch_size=80, seed=1, sampler="ddim", steps=100)
        plots.trajectories(axes[1, column], path.clip(-4, 4).numpy(), plane)
        axes[1, column].set(xlim=(-2.2, 2.2), ylim=(-2.2, 2.2), title="DDIM paths")
        score, true, error = scores(arm, load_model(arm, scale.out), points)
        _field(axes[2, column], flat, score.numpy() @ plane, f"score, rel. error {error:.2f}")
    _field(axes[2, 0], flat, true.numpy() @ plane, f"true score, s = {scale_of(shown[0])[1]:.2f}")
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
