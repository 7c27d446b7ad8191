"""Entry point: `python -m robustdm.attack RUN [RUN ...]` attacks the sampling trajectories of runs.

Each attack beside two controls: the same sampler without attack, and random perturbations of the
same size. What an attack does is its distance above the random control, not above zero.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import tyro

from robustdm.cli import guard
from robustdm.errors import UsageError

PLAIN = "none"
SHOWN = 16
_CHECKED_STEPS = 8


@dataclass(frozen=True)
class AttackConfig:
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
    num: int = 256
    """Samples per run and attack."""
    steps: int | None = None
    """Timesteps of the sampler; all if not given."""
    spacing: Literal["linspace", "leading", "trailing", "truncate"] = "linspace"
    """Which ones."""
    variance: Literal["fixed_large", "fixed_small"] = "fixed_large"
    """Noise of a step, and the size of the attack."""
    features: Literal["auto", "pixels", "digits", "resnet20", "resnet56", "inception",
                      "dinov2"] = "auto"
    """Feature space of the metrics: auto is the digits' classifier for 8x8 grey images, else
    pixels."""
    weights: Path | None = None
    """Weights of the feature extractor."""
    quantise: bool | None = None
    """Round samples to 8 bits before the features; by default all but pixels and digits do."""
    ema: float | None = None
    """Decay rate of the averaged weights to use."""
    batch_size: int = 256
    """Samples computed at once."""
    seed: int = 0
    """Of the samples and the attacks: every attack starts from the same noise."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the network."""
    compile: bool = False
    """Compile the network, its gradient included."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    out: Path = Path("runs/attack")
    """Folder for attack.json, attack.html and attack.png."""


def main(argv: Sequence[str] | None = None) -> None:
    """Parse flags, attack, write.

    Raises:
        UsageError: for a wrong flag or run.
        RunError: if sampling fails.
    """
    attack(tyro.cli(
        AttackConfig, args=argv, prog="python -m robustdm.attack",
        description="Attack the sampling trajectories of trained runs.",
    ))


def attack(config: AttackConfig) -> dict:
    """Attack every run with every method and share; print a table, write a record and a page.

    Returns:
        What attack.json holds.

    Raises:
        UsageError: for a wrong run or setting.
        RunError: if sampling fails.
    """
    import torch

    from robustdm import evaluation
    from robustdm.attacks import TrajectoryAttack, attacked_steps
    from robustdm.features import cache_directory, load_extractor
    from robustdm.tables import text_table
    from robustdm.training.progress import sampling_progress
    from robustdm.training.rundir import provenance
    from robustdm.training.trainer import resolve_device

    if not config.runs:
        raise UsageError("runs is empty: name one or more run directories")
    if not config.steps_attacked:
        raise UsageError("steps_attacked is empty: give shares from 0 to 1")
    device = resolve_device(config.device)
    attacks = {(PLAIN, 0.0): None}
    for method in dict.fromkeys(config.methods):
        for share in config.steps_attacked:
            attacks[method, share] = TrajectoryAttack(
                method, share, config.where, config.seed, config.variance, config.size, config.phi,
                config.objective, config.iterations)
    names = _names(config.runs)
    generators = {
        name: evaluation.open_run(run, device, config.ema)
        for name, run in zip(names, config.runs, strict=True)
    }
    steps = config.steps or 1000
    settings = dict(sampler="ddpm", steps=config.steps, spacing=config.spacing,
                    variance=config.variance)
    rows, pictures, checks, entries = {}, {}, {}, []
    done, jobs = 0, len(generators) * len(attacks)
    for name, generator in generators.items():
        extractor = load_extractor(config.features, generator.shape, config.weights, device,
                                   config.quantise)
        clean = generator.data.clean(torch.arange(len(generator.data)))
        reference = evaluation.features_of(extractor, clean, cache_directory()).features
        steps = config.steps or len(generator.schedule)
        for (method, share), made in attacks.items():
            done += 1
            what = f"[{done}/{jobs}] {name}, {method} {share:.0%}"
            with sampling_progress(config.num, what) as progress:
                features, samples = evaluation.extract(extractor, evaluation.generate(
                    generator, config.num, batch_size=config.batch_size, seed=config.seed,
                    precision=config.precision, compile=config.compile, attack=made,
                    progress=progress, device=device, **settings))
            results = evaluation.measure(
                features, reference, ("frechet", "manifold", "deviation"), splits=4)
            hit = sum(attacked_steps(steps, share, config.where)) if made else 0
            row = {"steps attacked": hit, **{
                evaluation.label(k, extractor): float(results[k]["value"])
                for k in ("frechet", "precision", "recall", "deviation")}}
            measured = generator.data.measure(samples)
            rows[f"{name}, {method} {share:.0%}" if made else f"{name}, no attack"] = row | measured
            entries.append({"run": name, "method": method, "share": share, "steps_attacked": hit,
                            "results": results, "measures": measured})
            pictures[name, method, share] = samples[:SHOWN]
            print(f"{what}: {evaluation.label('frechet', extractor)} {row[_first(row)]:.4g}",
                  flush=True)
        checks[name] = _raised(generator, config, device)
    record = {
        "config": {k: _plain(v) for k, v in asdict(config).items()}, "runs": names,
        "features": extractor.identity, "entries": entries, "objective_raised": checks,
        "provenance": provenance(),
    }
    print(text_table(rows))
    for name, check in checks.items():
        print(f"{name}: the objective above the random control's in "
              + ", ".join(f"{m} {r['raised']} of {r['checked']} steps" for m, r in check.items()))
    _write(config.out, record, rows, pictures, evaluation.label("frechet", extractor))
    print(f"page: {config.out / 'attack.html'}")
    return record


def _first(row: dict) -> str:
    return next(key for key in row if key != "steps attacked")


def _names(runs: Sequence[Path]) -> list[str]:
    """The last parts of the paths, or the whole paths where those are the same."""
    short = [Path(run).name for run in runs]
    return short if len(set(short)) == len(short) else [str(run) for run in runs]


def _plain(value):
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def _raised(generator, config: AttackConfig, device) -> dict[str, dict[str, int]]:
    """At how many steps of an unattacked chain each attack moves a batch farther than random signs.

    The last step is left out: there x0 is x, and every pattern of signs moves it alike.
    """
    import torch

    from robustdm.attacks import TrajectoryAttack
    from robustdm.network import predict_noise
    from robustdm.sampling import Respaced, stream_noise, timesteps

    methods = [m for m in dict.fromkeys(config.methods) if m != "random"]
    chain = Respaced(generator.schedule, timesteps(generator.schedule, config.steps,
                                                   config.spacing))
    noise = stream_noise(config.seed, generator.shape, device)
    numbers = range(min(64, config.num))
    stride = max(1, (len(chain) - 1) // _CHECKED_STEPS)
    counts = {m: {"raised": 0, "checked": 0} for m in methods}
    x = noise(None, numbers)
    for k in range(len(chain) - 1):
        z = noise(chain.timesteps[k].item(), numbers)
        if k % stride == 0 and methods:
            moved = {}
            for method in ("random", *methods):
                made = TrajectoryAttack(method, seed=config.seed, variance=config.variance,
                                        phi=config.phi, objective=config.objective,
                                        iterations=config.iterations)
                delta = made.perturbation(generator.model, chain, k, numbers, x, z)
                moved[method] = made.measure(generator.model, chain, k, x, delta).sum().item()
            for method in methods:
                counts[method]["checked"] += 1
                counts[method]["raised"] += moved[method] > moved["random"]
        with torch.no_grad():
            t = torch.full((len(x),), chain.timesteps[k].item(), device=x.device)
            x = chain.ddpm_step(k, x, predict_noise(generator.model, x, t), z, config.variance,
                                generator.clip)
    return counts


def _write(out: Path, record: dict, rows: dict, pictures: dict, title: str) -> None:
    from robustdm import plots, webpage
    from robustdm.images import grid, to_pil
    from robustdm.training.rundir import write_text

    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"out is {str(out)!r}: it cannot be made ({error.strerror})") from None
    made, axes = plots.figure(1, 2, size=(4.6, 3.4))
    for ax, metric in zip(axes[0], ("frechet", "recall"), strict=True):
        for colour, run in zip(plots.COLOURS, record["runs"], strict=False):
            for style, method in zip(("-", "--", ":", "-."), dict.fromkeys(
                    e["method"] for e in record["entries"] if e["method"] != PLAIN), strict=False):
                points = [(e["share"], e["results"][metric]["value"]) for e in record["entries"]
                          if e["run"] == run and e["method"] in (method, PLAIN)]
                ax.plot(*zip(*sorted(points), strict=True), style, marker="o", markersize=3,
                        color=colour, label=f"{run}, {method}")
        ax.set(xlabel="share of steps attacked", title=title if metric == "frechet" else metric)
    axes[0, 0].legend(fontsize=6)
    plots.save(made, out / "attack.png")
    columns = list(dict.fromkeys(key for row in rows.values() for key in row))
    body = [
        "<header><h1>Attacks on the sampling trajectory</h1></header>",
        webpage.section("Table", webpage.soft(
            "The controls are no attack, and random signs of the same size: an attack is as strong "
            "as its distance from those. Distances reward shrinkage, so recall and "
            "deviation (1 is the clean spread) stand beside them."), webpage.table(
            [[name, *(f"{row[c]:.4g}" if c in row else "-" for c in columns)]
             for name, row in rows.items()], ["", *columns], numbers=True)),
        webpage.section("Against the share of attacked steps",
                        webpage.picture(plots.png_bytes(made))),
    ]
    cards = ""
    for (run, method, share), samples in pictures.items():
        if samples.ndim == 4:
            buffer = io.BytesIO()
            to_pil(grid(samples)).save(buffer, format="png")
            cards += webpage.picture(buffer.getvalue(), f"{run}, {method} {share:.0%}")
    if cards:
        body.append(webpage.section("Samples, from the same noise",
                                    f'<div class="cards small">{cards}</div>'))
    made_by = json.dumps({k: record[k] for k in ("config", "provenance")}, indent=1)
    body.append(webpage.section("How it was made", f"<pre>{webpage.escape(made_by)}</pre>"))
    write_text(out / "attack.html", webpage.document("Attacks", body))
    write_text(out / "attack.json", json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    guard(main)
