"""Entry point: `python -m robustdm.plan` predicts, before training, what a setting will do."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from robustdm.cli import guard
from robustdm.errors import UsageError

SHOWN_COMPONENTS = 5
SHRUNK = "plain DDPM, shrunk"


@dataclass(frozen=True)
class PlanConfig:
    """The corruption to remove, the signal to keep, and the data."""

    sigma: float | None = None
    """Standard deviation of the corruption, data range [-1, 1]; estimated from the data if not
    given."""
    fraction: float = 0.9
    """Share of the data that is corrupted."""
    keep: float = 0.9
    """Share of the signal's standard deviation to keep."""
    data: Path | None = None
    """Images whose spectrum decides: a folder, zip, .npy or .npz, corrupted or not; scikit-learn's
    digits if neither this nor --signal-sd is given."""
    resolution: int = 32
    """Side to which the images of --data are brought."""
    value_range: tuple[float, float] | None = None
    """--data as .npy, .npz: the two values that become -1 and 1; what lies beyond them is kept."""
    signal_sd: tuple[float, ...] = ()
    """Instead of data: standard deviations of the signal's components."""
    clean: bool = False
    """The data are clean: nothing is taken off their spectrum."""
    schedule: Literal["linear", "cosine"] = "linear"
    """Noise schedule."""
    sampler: Literal["ddpm", "ddim"] = "ddpm"
    """Sampler that the prediction is for."""
    steps: int | None = None
    """Its timesteps; all if not given."""
    variance: Literal["fixed_large", "fixed_small"] = "fixed_large"
    """ddpm: noise of a step."""
    out: Path = Path("runs/plan")
    """Folder for plan.json and plan.png."""
    compare: Path | None = None
    """Instead of planning: results.json of a study (subspace, digits, lambda-mode, approximations);
    prints prediction beside measurement for each of its settings."""


def main(argv: Sequence[str] | None = None) -> None:
    """Parse flags, predict, print.

    Raises:
        UsageError: for a wrong flag, file or data, or if nothing keeps enough signal.
    """
    import tyro

    config = tyro.cli(
        PlanConfig, args=argv, prog="python -m robustdm.plan",
        description="Predict what training will remove and keep, and choose its settings.",
    )
    if config.compare is not None:
        print(compare(config.compare))
    else:
        plan(config)


def plan(config: PlanConfig) -> dict:
    """Choose a setting; print the table and write plan.json and plan.png.

    Returns:
        What plan.json holds.

    Raises:
        UsageError: for a wrong setting or data, or if nothing keeps enough signal.
    """
    from robustdm.method.closed_form import Setting, best, candidates, predict
    from robustdm.method.schedule import NoiseSchedule
    from robustdm.reporting.tables import text_table

    if not 0 < config.keep < 1:
        raise UsageError(f"keep is {config.keep}: it must be between 0 and 1")
    if not 0 < config.fraction <= 1:
        raise UsageError(f"fraction is {config.fraction}: it must be above 0 and at most 1")
    signal, sigma, source = _signal(config)
    schedule = (NoiseSchedule.linear if config.schedule == "linear" else NoiseSchedule.cosine)(1000)
    sampling = dict(sampler=config.sampler, steps=config.steps, variance=config.variance)
    print(f"{source}: {len(signal)} components with signal; corruption of sd {sigma:.3g} on "
          f"{config.fraction:.0%}", flush=True)
    # The weakest components do not change the totals, and a thousand would cost minutes.
    few = signal[:64]
    made = predict(schedule, candidates(), few, sigma, config.fraction, **sampling)
    chosen = best(made, config.keep)
    rows = {"recommended": chosen}
    for objective in ("robust_adv", "robust_ran"):
        for mode in ("ray", "x", "std", "literal"):
            mine = [p for p in made if p.setting.objective == objective
                    and p.setting.perturbation.lambda_mode == mode and p.signal_kept >= config.keep]
            if mine:
                rows[f"best {objective}, {mode}"] = best(mine, config.keep)
    # The same optimum without robust training: a plain DDPM that is queried as if it had it.
    if "best robust_adv, ray" in rows:
        rows[SHRUNK] = rows["best robust_adv, ray"]
    rows |= dict(zip(("default", "plain DDPM"), predict(
        schedule, [Setting(), Setting("ddpm")], few, sigma, config.fraction, **sampling),
        strict=True))
    print(text_table({
        name: {"noise left": p.noise_left, "signal kept": p.signal_kept,
               **{f"sd {v:.2g}": float(k) for v, k in zip(
                   few.sqrt().tolist()[:SHOWN_COMPONENTS], p.kept, strict=False)},
               "flags": _shrunk_flags(p) if name == SHRUNK else p.setting.flags()}
        for name, p in rows.items()
    }))
    command = f"python -m robustdm.train {chosen.setting.flags()}"
    if config.data is not None:
        command += (f" --preset folder --data-dir {config.data} --resolution {config.resolution}")
    print(f"\ntrain with: {command}")
    if SHRUNK in rows:
        print("or, at no extra cost: train with --objective ddpm, then python -m robustdm.sample "
              f"{_shrunk_flags(rows[SHRUNK])}")
    print("Predicted for Gaussian data and a network at its optimum; networks on real data deviate "
          "(docs/evaluation.md says by how much).")
    result = {
        "config": {k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items()},
        "sigma": sigma,
        "signal_sd": few.sqrt().tolist(),
        "predictions": {name: {
            "flags": _shrunk_flags(p) if name == SHRUNK else p.setting.flags(),
            "noise_left": p.noise_left, "signal_kept": p.signal_kept,
            "kept": p.kept.tolist()} for name, p in rows.items()},
        "command": command,
    }
    try:
        config.out.mkdir(parents=True, exist_ok=True)
        (config.out / "plan.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        _figure(config, schedule, rows, signal, sigma, sampling)
    except OSError as error:
        raise UsageError(f"out is {str(config.out)!r}: cannot be written ({error.strerror})") from (
            error)
    print(f"curves: {config.out / 'plan.png'}")
    return result


def _shrunk_flags(prediction) -> str:
    p = prediction.setting.perturbation
    return (f"--baseline shrink --baseline-strength {p.lam:g} --baseline-shape {p.omega:g} "
            f"{p.gamma:.4g}")


def _signal(config: PlanConfig):
    """Variances of the clean signal's components, the corruption's sd, and where from."""
    import torch

    from robustdm.method.closed_form import spectrum

    if config.signal_sd:
        if config.data is not None:
            raise UsageError(f"signal_sd is {config.signal_sd} and data {str(config.data)!r}: "
                             "give one of them")
        if config.sigma is None:
            raise UsageError("sigma is not given: without data it cannot be estimated")
        if not all(0 < sd < float("inf") for sd in config.signal_sd):
            raise UsageError(f"signal_sd is {config.signal_sd}: give positive numbers")
        variances = torch.tensor(sorted(config.signal_sd, reverse=True)).double().square()
        return variances, config.sigma, "given components"
    if config.data is None:
        from robustdm.data.digits import load_digits

        images, source, clean = load_digits(), "digits", True
        if config.sigma is None:
            raise UsageError("sigma is not given: the digits are clean, so there is none to "
                             "estimate; give --sigma, or data of your own as --data")
    else:
        from robustdm.data import load_data
        from robustdm.data.noise import noise_of
        from robustdm.runs.config import TrainConfig
        from robustdm.runs.presets import preset_values

        fields = preset_values("folder") | dict(
            data_dir=config.data, resolution=config.resolution, value_range=config.value_range,
            corrupt_fraction=0.0, holdout=0.0)
        data = load_data(TrainConfig(**fields))
        images = data.clean(torch.arange(min(len(data), 20_000)))
        source, clean = str(config.data), config.clean
    variances = spectrum(images)
    if config.sigma is not None:
        sigma = config.sigma
        if not 0 < sigma < float("inf"):
            raise UsageError(f"sigma is {sigma}: it must be positive")
    else:
        sigma = noise_of(data).rms / config.fraction**0.5
        if not sigma:
            raise UsageError(f"sigma is not given, and {source} has no noise to measure")
    noise = 0.0 if clean else config.fraction * sigma**2
    # A tenth of the noise's variance is within the error of the spectrum.
    signal = (variances - noise)[variances - noise > max(noise / 10, 1e-8)]
    if not len(signal):
        raise UsageError(f"sigma is {sigma:.3g}: {source} has no variance above that noise")
    return signal, sigma, source


def _figure(config, schedule, rows, signal, sigma, sampling) -> None:
    """What is kept over the component's own deviation, and the data's spectrum below it."""
    import torch

    from robustdm.method.closed_form import predict
    from robustdm.reporting import plots

    sds = torch.logspace(-2.5, 0.7, 60, dtype=torch.float64)
    made, axes = plots.figure(1, 1, size=(6.0, 4.0))
    ax = axes[0, 0]
    wanted = ("recommended", "default", "plain DDPM")
    curves = predict(schedule, [rows[n].setting for n in wanted], sds.square(), sigma,
                     config.fraction, **sampling)
    for colour, name, curve in zip(plots.COLOURS, wanted, curves, strict=False):
        ax.plot(sds, curve.kept, color=colour, label=f"{name}: noise left {curve.noise_left:.2g}")
    ax.plot(signal.sqrt(), [-0.03] * len(signal), "|", color=plots.INK, markersize=9,
            label="components of the data")
    ax.axvline(sigma * config.fraction**0.5, color=plots.INK, linestyle=":", linewidth=1,
               label="corruption")
    ax.set(xscale="log", xlabel="standard deviation of the clean component",
           ylabel="generated / clean", title="predicted signal kept")
    ax.legend(fontsize=7)
    plots.save(made, config.out / "plan.png")


def compare(path: Path) -> str:
    """Prediction beside measurement for each setting of a study, as a table.

    Args:
        path: results.json of a study.

    Raises:
        UsageError: if the file is none, or holds neither subspace nor digits arms.
    """
    from robustdm.method.closed_form import Setting
    from robustdm.method.perturbation import Perturbation
    from robustdm.models.load_run import perturbation_of
    from robustdm.reporting.tables import text_table
    from robustdm.runs.config import TrainConfig
    from robustdm.studies.runner import read_arms

    arms = read_arms(path, "compare")
    tables = []
    for group, predict_measures in (("subspace", _subspace_measures), ("digits", _digits_measures)):
        # What has no configuration is the data themselves.
        mine = [arm for arm in arms if arm["group"] == group and "config" in arm]
        # An option that saves work has the exact method's optimum; it is not reached the same way.
        names = dict.fromkeys(arm["name"] for arm in mine if "equal work" not in arm["name"])
        rows, errors = {}, {}
        for name in names:
            found = [arm for arm in mine if arm["name"] == name]
            config = TrainConfig.from_dict(found[0]["config"], str(path))
            setting = Setting(config.objective, perturbation_of(config), config.lambda_max)
            baseline = found[0].get("sampling", {}).get("baseline")
            if baseline and baseline["method"] != "shrink":
                continue  # no setting of a regulariser
            if baseline:
                omega, gamma = baseline["shape"]
                setting = Setting(
                    "robust_adv", Perturbation(omega, gamma, baseline["strength"], "ray"))
            predicted = predict_measures(config, setting)
            rows[name] = {}
            for measure, value in predicted.items():
                measured = sum(arm["measures"][measure] for arm in found) / len(found)
                rows[name][measure] = f"{value:.3g} / {measured:.3g}"
                errors.setdefault(measure, {})[name] = abs(value - measured)
        if rows:
            tables.append(f"{group}, predicted / measured\n\n{text_table(rows, markdown=True)}")
            used = [name for name in rows if "invariance" not in name]
            tables.append("Mean absolute error without invariance: " + ", ".join(
                f"{m} {sum(e[n] for n in used) / len(used):.2g}" for m, e in errors.items()))
    if not tables:
        raise UsageError(f"compare is {str(path)!r}: it holds neither subspace nor digits arms")
    return "\n\n".join(tables)


def _subspace_measures(config, setting) -> dict[str, float]:
    import torch

    from robustdm.method.closed_form import generated_deviation
    from robustdm.models.load_run import schedule_of
    from robustdm.studies.scales import SDS

    noise = config.corrupt_fraction * config.corrupt_sigma**2
    truth = torch.tensor(SDS, dtype=torch.float64)
    law = torch.cat([torch.tensor([noise], dtype=torch.float64), truth.square() + noise])
    sds = generated_deviation(schedule_of(config), [setting], law)[0]
    return {"off_subspace_sd": sds[0].item(),
            "component_ratio_1": (sds[1] / truth[0]).item(),
            "component_ratio_5": (sds[5] / truth[4]).item()}


def _digits_measures(config, setting) -> dict[str, float]:
    import torch

    from robustdm.data.digits import CONSTANT_SD, load_digits
    from robustdm.method.closed_form import generated_deviation
    from robustdm.models.load_run import schedule_of

    x = load_digits().flatten(1).double()
    variances, axes = torch.linalg.eigh(torch.cov(x.T))
    noise = config.corrupt_fraction * config.corrupt_sigma**2
    sds = generated_deviation(schedule_of(config), [setting], variances.clamp(min=0) + noise)[0]
    pixels = (axes.square() @ sds.square()).sqrt()
    constant = x.std(dim=0) < CONSTANT_SD
    return {"noise_rms": pixels[constant].square().mean().sqrt().item(),
            "pixel_std": pixels.mean().item()}


if __name__ == "__main__":
    guard(main)
