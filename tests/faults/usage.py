"""F8: wrong fields, fields that contradict each other, wrong flags, wrong tensors."""

from __future__ import annotations

import dataclasses
import math
import os
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml
from torch import nn

from robustdm import (
    NoiseSchedule,
    Objective,
    Perturbation,
    attack,
    convert,
    evaluate,
    fast_network,
    fuse,
    load_run,
    memorise,
    ops,
    plan,
    report,
    reproduce,
    sample,
    steps,
    train,
)
from robustdm.data import __main__ as data
from robustdm.method import sampling
from robustdm.method.baselines import Baseline
from robustdm.method.trajectory_attack import TrajectoryAttack, attacked_steps
from robustdm.reporting import images
from robustdm.runs.config import TrainConfig
from robustdm.runs.presets import preset_values

from .campaign import Found, Trial
from .runs import call, reference

CPU_SECONDS = 2.0


@dataclass
class Wrong:
    """A wrong call.

    Attributes:
        what: it is, for the record.
        call: makes it.
        named: what the message must hold: the field or argument, and what is expected of it.
    """

    what: str
    call: Callable[[], object]
    named: tuple[str, ...]


def misuse(trial: Trial) -> Found:
    """F8: make one wrong call."""
    kind = next(kind for end, kind in _KINDS if trial.number < end)
    wrong = kind(trial)
    before = sorted(os.listdir())
    done = call(wrong.call)
    # The box that tyro draws around its messages, and the ends of its lines, are no part of them;
    # what a command has printed before its error is not either.
    last = (done.output.strip().splitlines() or [""])[-1]
    ours = last.startswith("error: ") and done.output.count("error: ") == 1
    said = last if ours else " ".join(re.sub(r"[│╭╮╰╯─]", " ", done.output).split())
    missing = [word for word in wrong.named if word.lower() not in said.lower()]
    passed = (done.code == 2 and done.clean and not missing and done.cpu_s < CPU_SECONDS
              and (ours or "─ " in done.output) and sorted(os.listdir()) == before)
    seen = f"exit code {done.code}, {done.cpu_s:.1f} s: {said[-200:]}" + (
        f" (without {missing[0]!r})" if missing else "")
    return Found(kind.__name__[1:], wrong.what,
                 f"exit code 2, one message with {', '.join(map(repr, wrong.named))}, "
                 f"{CPU_SECONDS:.0f} s", seen, passed)


def _pick(trial: Trial, table):
    """An entry of a table: all of them in turn, in an order that the seed decides."""
    entries = list(table)
    random.Random(f"{trial.seed} {len(entries)}").shuffle(entries)
    return entries[trial.number % len(entries)]


# One wrong field of the configuration, in a file or as a flag.


@dataclass(frozen=True)
class Number:
    """What a field may be.

    Attributes:
        least, most: bounds.
        said: how the message puts them.
        whole: whether it is an integer.
        above, below: whether the bounds themselves are excluded.
    """

    least: float
    said: str
    most: float = math.inf
    whole: bool = False
    above: bool = False
    below: bool = False

    def wrong(self, rng: random.Random) -> tuple[object, str]:
        """A value, and what must be said of it."""
        ways = ["type", "low"]
        ways += ["high"] if self.most < math.inf else []
        ways += ["nan"] if not self.whole else []
        way = rng.choice(ways)
        if way == "type":
            values = ["many", [1], {"a": 1}, True, None] + ([2.5, "3"] if self.whole else [])
            return rng.choice(values), "int" if self.whole else "float"
        if way == "nan":
            return rng.choice((math.nan, -math.inf)), "finite number"
        step = rng.choice((1, 7, 10**6)) if self.whole else rng.choice((1e-3, 1.0, 1e6))
        if way == "low":
            return self.least - (0 if self.above and rng.random() < 0.5 else step), self.said
        return self.most + (0 if self.below and rng.random() < 0.5 else step), self.said


def _count(most: float = math.inf, said: str = "at least 1") -> Number:
    return Number(1, said, most, whole=True)


_NOT_NEGATIVE = Number(0, "must not be negative")
_WHOLE = dataclasses.replace(_NOT_NEGATIVE, whole=True)
_SHARE = Number(0, "share, from 0 to 1", 1)
_PART = Number(0, "share, above 0 and up to 1", 1, above=True)
_POSITIVE = Number(0, "must be positive", above=True)

FIELDS = {
    **dict.fromkeys((
        "batch_size", "accumulate", "steps", "timesteps", "resolution", "num_points",
        "layers_per_block", "norm_groups", "mlp_width", "mlp_depth", "log_every", "keep_last",
        "num_samples", "preview_steps", "final_steps", "max_skipped", "subspace_rank",
        "reg_every", "shuffle_buffer", "num_heads", "attention_head_dim", "stop_after"), _count()),
    **dict.fromkeys((
        "warmup_steps", "sample_every", "checkpoint_every", "keep_every", "workers",
        "subspace_noise_dims", "crop", "lora", "seed"), _WHOLE),
    **dict.fromkeys((
        "weight_decay", "clip_norm", "lam", "gamma", "corrupt_sigma", "resident_gib",
        "point_noise_level", "checkpoint_minutes"), _NOT_NEGATIVE),
    **dict.fromkeys(("corrupt_fraction", "corrupt_pixels", "max_bad"), _SHARE),
    **dict.fromkeys(("reg_fraction", "attack_fraction", "at_last"), _PART),
    **dict.fromkeys(("lr", "rank_timeout", "max_time"), _POSITIVE),
    "holdout": Number(0, "from 0 to below 1", 1, below=True),
    "dropout": Number(0, "from 0 to below 1", 1, below=True),
    "corrupt_quality": Number(1, "from 1 to 95", 95, whole=True),
    "lambda_max": Number(0, "0 or more"),
    "omega": Number(-math.inf, "finite number"),
    "objective": ("ddpm", "robust_adv", "robust_ran", "invariance", "outward_ran"),
    "lambda_mode": ("ray", "x", "std", "literal"),
    "data": ("digits", "plane", "gaussians", "subspace", "cifar10", "cifar100", "images"),
    "corrupt_kind": ("gaussian", "salt_pepper", "missing", "jpeg", "outliers"),
    "schedule": ("linear", "cosine"),
    "precision": ("fp32", "bf16"),
    "backend": ("auto", "torch", "cpp", "triton"),
    "attention": ("auto", "sdpa", "plain", "xformers"),
    "final_sampler": ("ddpm", "ddim"),
    "network": ("unet", "mlp"),
    **dict.fromkeys(("compile", "flip", "stream", "resume", "tensorboard", "clip_samples",
                     "share_dropout", "detach_clean"), bool),
    **dict.fromkeys(("block_channels", "ema_rates", "beta_range", "freeze"), tuple),
}
_NULLABLE = ("num_heads", "attention_head_dim", "stop_after", "max_time", "lambda_max")


def _field(trial: Trial) -> Wrong:
    """A field of the wrong type, out of its range, or misspelt."""
    rng = trial.random
    name = _pick(trial, FIELDS)
    if trial.number % 6 == 5:
        return _misspelt(name, rng)
    value, said = _wrong_value(name, rng)
    as_flag = rng.random() < 0.5 and isinstance(value, (int, float, str)) and not (
        isinstance(value, bool) or FIELDS[name] in (bool, tuple) or value == "3")
    if not as_flag:
        Path("wrong.yaml").write_text(yaml.safe_dump({name: value}))
        return Wrong(f"{name}: {value!r} in a file", _trains("--config", "wrong.yaml"),
                     (name, said))
    typed = value if isinstance(value, str) else repr(value)
    # What the parser of the flags finds itself names them in its own way.
    parsed = isinstance(FIELDS[name], Number) and not isinstance(value, str) and not (
        FIELDS[name].whole and isinstance(value, float))
    flag = f"--{name.replace('_', '-')}"
    return Wrong(f"{flag} {typed}", _trains(f"{flag}={typed}"),
                 (name if parsed else flag, said))


def _wrong_value(name: str, rng: random.Random) -> tuple[object, str]:
    allowed = FIELDS[name]
    if allowed is bool:
        return rng.choice(("perhaps", 2, [True], 0.5)), "bool"
    if allowed is tuple:
        return {
            "block_channels": rng.choice((([8, "x"], "int"), ([], "from 1 to 16"),
                                          ([12], "multiple of norm_groups"), (8, "tuple"))),
            "ema_rates": rng.choice((([1.0], "from 0 to below 1"), ([], "decay rates"),
                                     ([0.9, 0.9], "differ"), (0.9, "tuple"))),
            "beta_range": rng.choice((([2.0, 0.5], "lower one first"), ([1.0], "tuple"),
                                      ([0.0, 1.0], "positive"), ("x", "tuple"))),
            "freeze": rng.choice((([1], "str"), ("conv*", "tuple"),
                                  (["nothing.*"], "no parameter"))),
        }[name]
    if isinstance(allowed, tuple):
        return rng.choice(("no_such", 3, True, [allowed[0]], allowed[0].upper() + "s")), allowed[-1]
    while True:
        value, said = allowed.wrong(rng)
        if value is not None or name not in _NULLABLE:
            return value, said


def _misspelt(name: str, rng: random.Random) -> Wrong:
    place = rng.randrange(1, len(name))
    typo = rng.choice((name[:place] + name[place - 1] + name[place:], name.replace("_", "-") + "s",
                       name.capitalize()))
    Path("wrong.yaml").write_text(yaml.safe_dump({typo: 1}))
    return Wrong(f"{typo}: 1 in a file", _trains("--config", "wrong.yaml"),
                 (f"unknown field {typo!r}", f"did you mean {name!r}"))


def _trains(*flags) -> Callable[[], object]:
    argv = ["--steps", "1", "--device", "cpu", "--out", "out", *map(str, flags)]
    if "--resume" in flags:
        argv = argv[2:]
    return lambda: train.main(argv)


# Fields that are right alone and wrong together.

CONTRADICTIONS = (
    ("--seed 4294967296", "seed", "below 2**32"),
    ("--steps 4294967296", "steps", "below 2**32"),
    ("--batch-size 10 --accumulate 3", "accumulate", "divide the batch size, 10"),
    ("--corrupt-kind outliers", "corrupt_with", "name the images"),
    ("--corrupt-with .", "corrupt_with", "--corrupt-kind outliers does"),
    ("--lora 4", "lora", "--init-from"),
    ("--lora 4 --network mlp", "lora", "networks for images"),
    ("--lora 4 --freeze conv_in.*", "freeze", "leave it out"),
    ("--lora-alpha 2", "lora_alpha", "--lora RANK"),
    ("--lora-targets conv1", "lora_targets", "--lora RANK"),
    ("--norm-groups 32", "block_channels", "multiple of norm_groups, 32"),
    ("--block-channels 8 8 8 8 8", "resolution", "multiple of 16"),
    ("--preset finetune", "finetune", "--init-from"),
    ("--network mlp", "network", "--network unet"),
    ("--preset plane --network unet", "network", "--network mlp"),
    ("--preset plane --flip", "flip", "no images to flip"),
    ("--data images", "data_dir", "name the folder"),
    ("--preset folder --data-dir nowhere", "data_dir", "does not exist"),
    ("--preset folder --data-dir .", "data_dir", "no images there"),
    ("--stream", "stream", "hf:"),
    ("--preset folder --data-dir . --stream", "stream", "hf:"),
    ("--attention xformers", "attention", "--attention sdpa"),
    ("--attention-head-dim 7", "attention_head_dim", "divide"),
    ("--freeze *", "freeze", "nothing is left to train"),
    ("--freeze no_such.weight", "freeze", "no parameter"),
    ("--device cuda:99", "device", "cpu"),
    ("--device toaster", "device", "cpu"),
    ("--backend triton", "backend", "use backend='auto'"),
    ("--resume --config wrong.yaml", "config", "leave --config out"),
    ("--resume --out nowhere", "nowhere", "not a run"),
    ("--preset nowhere", "preset", "digits, plane"),
    ("--config nowhere.yaml", "nowhere.yaml", "cannot be read"),
    ("--init-from nowhere", "init_from", "diffusers directory"),
    ("--preset subspace --subspace-rank 99", "subspace_rank", "span 61 dimensions"),
    ("--preset subspace --subspace-space ambient --network unet --block-channels 8 "
     "--resolution 16", "resolution", "set it to 8"),
    ("--preset cifar10 --data-dir wrong.yaml", "data_dir", "name a folder"),
    ("--out wrong.yaml", "out", "name a directory"),
    ("--out .", "out", "new or empty directory"),
)


def _contradiction(trial: Trial) -> Wrong:
    """Fields that do not go together."""
    flags, *named = _pick(trial, CONTRADICTIONS)
    Path("wrong.yaml").write_text("lr: 0.1\n")
    return Wrong(flags, _trains(*flags.split()), tuple(named))


# Wrong flags of the other commands. RUN is a run of digits, WORK the place of good files.

COMMANDS = (
    (sample, "--run nowhere", "nowhere", "no such directory"),
    (sample, "--run RUN --steps 0", "steps", "from 1 to the schedule's length, 1000"),
    (sample, "--run RUN --steps 1001", "steps", "from 1 to the schedule's length, 1000"),
    (sample, "--run RUN --eta 0.5", "eta", "use sampler ddim"),
    (sample, "--run RUN --sampler ddim --eta 1.5", "eta", "from 0 to 1"),
    (sample, "--run RUN --num 0", "num", "at least 1"),
    (sample, "--run RUN --batch-size -1", "batch_size", "at least 1"),
    (sample, "--run RUN --ema 0.5", "ema", "0.9"),
    (sample, "--run RUN --checkpoint 777", "step-00000777", "name a directory"),
    (sample, "--run RUN --baseline-strength 2", "baseline_strength", "name one"),
    (sample, "--run RUN --baseline blur --baseline-strength -1", "baseline_strength", "positive"),
    (sample, "--run RUN --out images.npz", "out", "name a folder"),
    (sample, "--run RUN --out .", "out", "another folder"),
    (sample, "--run RUN --seed -1", "seed", "from 0 to 4294967295"),
    (sample, "--run RUN --device toaster", "device", "cpu"),
    (sample, "--run RUN --spacing even", "--spacing", "linspace"),
    (sample, "--num 3", "--run", "required"),
    (evaluate, "", "--run", "--samples"),
    (evaluate, "--run RUN --samples images.npz", "--run", "--pipeline"),
    (evaluate, "--samples images.npz", "reference", "name a folder"),
    (evaluate, "--samples nowhere --reference images.npz", "samples", "name a folder"),
    (evaluate, "--samples images.npz --reference images.npz --num 1", "num", "at least 2"),
    (evaluate, "--samples images.npz --reference small.npz", "reference", "resolution"),
    (evaluate, "--samples images.npz --reference images.npz --metrics fid", "metrics", "frechet"),
    (evaluate, "--samples images.npz --reference images.npz --features resnet20", "weights",
     "resnet20"),
    (evaluate, "--samples images.npz --reference images.npz --features resnet20 --weights no",
     "weights", "no such file"),
    (evaluate, "--pipeline nowhere --reference images.npz", "pipeline", "no such file"),
    (evaluate, "--samples images.npz --reference images.npz --out images.npz", "out",
     "name a folder"),
    (evaluate, "--samples images.npz --reference images.npz --features pixels "
     "--save-reference no/x.npz",
     "save_reference", "cannot be written"),
    (data, "nowhere", "data_dir", "does not exist"),
    (data, "images.npz --resolution 0", "resolution", "at least 1"),
    (data, "images.npz --crop 99", "crop", "leave it out"),
    (data, "images.npz --channels 2", "--channels", "expected one of"),
    (data, "images.npz --corrupt-fraction 1.5", "corrupt_fraction", "share, from 0 to 1"),
    (data, "images.npz --speed --seconds 0", "seconds", "positive"),
    (data, "images.npz --speed --device toaster", "device", "use cpu"),
    (data, "images.npz --preview images.npz/x.png", "preview", "cannot be written"),
    (data, "images.npz --preview grid.xyz", "preview", "cannot be written"),
    (data, "floats.npz", "floats.npz", "uint8"),
    (data, "wrong.npz", "wrong.npz", "(N, H, W, C)"),
    (data, "images.npz --stream", "stream", "hf:"),
    (attack, "RUN --out images.npz", "out", "name a folder"),
    (steps, "RUN --out images.npz", "out", "name a folder"),
    (memorise, "--samples images.npz --train images.npz --out images.npz", "out", "name a folder"),
    (attack, "RUN --steps-attacked 250", "steps_attacked", "from 0 to 1"),
    (attack, "RUN --phi 0", "phi", "above 0"),
    (attack, "RUN --size nan", "size", "finite number"),
    (attack, "RUN --iterations 0", "iterations", "at least 1"),
    (attack, "RUN --methods cw", "--methods", "fgsm"),
    (attack, "", "runs", "run directories"),
    (attack, "nowhere", "nowhere", "no such directory"),
    (steps, "", "runs", "run directories"),
    (steps, "RUN --steps 5 2000", "steps", "from 1 to"),
    (convert, "RUN images.npz", "out", "new directory"),
    (convert, "RUN new.onnx", "out", ".pt (improved-diffusion)"),
    (convert, "nowhere new", "source", "diffusers directory"),
    (convert, "RUN new --schedule linear", "source", "leave --schedule out"),
    (convert, "RUN new --resolution 9", "source", "leave --resolution out"),
    (convert, "RUN new --ema 0.2", "ema", "0.9"),
    (memorise, "", "--run", "--samples"),
    (memorise, "--samples images.npz", "train", "name the images"),
    (memorise, "--run RUN --blur 0", "blur", "positive"),
    (memorise, "--samples images.npz --train small.npz", "samples", "one size"),
    (plan, "--keep 2", "keep", "between 0 and 1"),
    (plan, "--fraction 0", "fraction", "above 0"),
    (plan, "--sigma -1", "sigma", "positive"),
    (plan, "--signal-sd -1 --sigma 0.1", "signal_sd", "positive"),
    (plan, "--steps 5000 --sigma 0.1", "steps", "from 1 to"),
    (plan, "--data nowhere", "data", "does not exist"),
    (report, "nowhere", "nowhere", "name the directory"),
    (report, ".", "config.yaml", "given to training as --out"),
    (reproduce, "fig99", "fig2", "table1"),
    (reproduce, "fig2 --seeds 0", "seeds", "at least 1"),
    (reproduce, "", "name", "--list"),
)


def _command(trial: Trial) -> Wrong:
    """A wrong flag of another command than training."""
    module, flags, *named = _pick(trial, COMMANDS)
    run = reference("digits", trial.shared).out
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (70, 8, 8, 1), np.uint8)
    np.savez("images.npz", images=pixels)
    np.savez("small.npz", images=pixels[:, :6, :6])
    np.savez("floats.npz", images=rng.random((9, 8, 8, 1)) * 7)
    np.savez("wrong.npz", images=rng.integers(0, 256, (9, 8, 8, 5, 2), np.uint8))
    os.environ["ROBUSTDM_CACHE"] = str(trial.shared / "cache")
    argv = [str(run) if word == "RUN" else word for word in flags.split()]
    return Wrong(f"{module.__name__} {flags}", lambda: module.main(argv), tuple(named))


# Wrong tensors for the ops: every argument of each, of the wrong shape, type, or device.


def _batch(*more: int) -> torch.Tensor:
    return torch.randn(4, 8, 5, 5) if not more else torch.randn(*more)


def _key() -> torch.Tensor:
    return torch.tensor([0, 1, 2])


def _vectors(*names: str) -> dict[str, torch.Tensor]:
    return {name: torch.rand(4) + 0.1 for name in names}


OPS = {
    "noise_perturb": lambda: dict(
        x0=_batch(), **_vectors("signal", "noise", "radius"), key=_key()),
    "fgsm_project": lambda: dict(
        xt=_batch(), gradient=_batch(), **_vectors("noise", "radius"), key=_key()),
    "equivariance_loss": lambda: dict(
        eps_pred=_batch(), eps_pred_adv=_batch(), delta=_batch(),
        **_vectors("radius", "lambda_t"), key=_key()),
    "group_norm_act": lambda: dict(
        x=_batch(), groups=4, weight=torch.rand(8), bias=torch.rand(8), scale=torch.rand(4, 8),
        shift=torch.rand(4, 8), add=torch.rand(4, 8), key=_key()),
    "adamw_ema": lambda: dict(
        params=[_batch()], grads=[_batch()], exp_avgs=[_batch()], exp_avg_sqs=[_batch()],
        averages=[_batch()], copies=[_batch().bfloat16()],
        **{name: torch.ones(()) for name in ("lr", "step", "decay", "factor", "skip")}),
}


def _tensor(trial: Trial) -> Wrong:
    """One wrong tensor among the arguments of an op."""
    rng, (op, make) = trial.random, _pick(trial, OPS.items())
    good = make()
    name = rng.choice([name for name, value in good.items()
                       if isinstance(value, torch.Tensor) or isinstance(value, list)])
    value = good[name][0] if isinstance(good[name], list) else good[name]
    way = rng.choice(("shape", "dtype", "device", "dimensions"))
    if (op, name, way) == ("noise_perturb", "x0", "dimensions"):
        way = "dtype"  # nothing is wrong with more dimensions
    if way == "shape":
        changed = torch.cat([value.reshape(1, -1).squeeze(0), value.reshape(1, -1).squeeze(0)])
        changed = changed.reshape(2 * value.shape[0], *value.shape[1:]) if value.ndim else changed
    elif way == "dtype":
        changed = value.to(torch.int32 if value.dtype != torch.int32 else torch.float32)
    elif way == "device":
        changed = value.to("meta")
    else:
        changed = value.unsqueeze(-1).expand(*value.shape, 2)
    arguments = good | {name: [changed] if isinstance(good[name], list) else changed}
    return Wrong(f"{op}: {name} of another {way}", lambda: getattr(ops, op)(**arguments),
                 (f"{op}: ", name))


# Wrong values for the public classes and functions.


class _Model(nn.Module):
    def __init__(self, answer: Callable):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.answer = answer

    def forward(self, x, t):
        return self.answer(x + self.weight)


_GOOD = _Model(lambda x: x)


def _schedule() -> NoiseSchedule:
    return NoiseSchedule.linear(50)


def _loss(answer=lambda x: x, x0=None, drawn=None):
    x0 = torch.randn(4, 3, 8, 8) if x0 is None else x0
    objective = Objective("robust_adv", _schedule())
    draw = objective.draw(x0 if drawn is None else drawn, seed=0, step=0)
    return objective(_Model(answer), x0, draw)


def _draw(x0=None, **options):
    x0 = torch.randn(4, 3, 8, 8) if x0 is None else x0
    return Objective("ddpm", _schedule()).draw(x0, **{"seed": 0, "step": 0, **options})


def _sample(model=_GOOD, **options):
    return sampling.sample(model, _schedule(), (3, 8, 8), **{"num": 2, **options})


def _objective(**options):
    return Objective("robust_adv", _schedule(), **options)


class _Velocity:
    betas = torch.linspace(1e-4, 0.02, 50)

    class config:
        prediction_type = "v_prediction"


API = (
    ("Objective('adv')", lambda: Objective("adv", _schedule()), "objective", "robust_adv"),
    ("backend='cuda'", lambda: _objective(backend="cuda"), "backend", "triton"),
    ("beta_per='step'", lambda: _objective(beta_per="step"), "beta_per", "sample, batch"),
    ("attack='pgd'", lambda: _objective(attack="pgd"), "attack", "equivariance"),
    ("lambda_max=-1", lambda: _objective(lambda_max=-1), "lambda_max", "0 or more"),
    ("lambda_max=nan", lambda: _objective(lambda_max=math.nan), "lambda_max", "0 or more"),
    ("reg_fraction=0", lambda: _objective(reg_fraction=0), "reg_fraction", "above 0 and up to 1"),
    ("reg_fraction=nan", lambda: _objective(reg_fraction=math.nan), "reg_fraction", "up to 1"),
    ("attack_fraction=2", lambda: _objective(attack_fraction=2), "attack_fraction", "up to 1"),
    ("reg_every=0", lambda: _objective(reg_every=0), "reg_every", "at least 1"),
    ("reg_from=-1", lambda: _objective(reg_from=-1), "reg_from", "0 or more"),
    ("draw of integers", lambda: _draw(torch.zeros(4, 3, dtype=torch.int64)), "x0", "floating"),
    ("draw of a number", lambda: _draw(torch.tensor(1.0)), "x0", "(B, ...)"),
    ("seed=-1", lambda: _draw(seed=-1), "seed", "from 0 to 4294967295"),
    ("step=2**32", lambda: _draw(step=2**32), "step", "from 0 to 4294967295"),
    ("t of floats", lambda: _draw(t=torch.rand(4)), "t is", "int64 from 0 to 49"),
    ("t of another length", lambda: _draw(t=torch.arange(3)), "t is", "per sample"),
    ("t too late", lambda: _draw(t=torch.full((4,), 50)), "t is", "from 0 to 49"),
    ("another batch than drawn", lambda: _loss(drawn=torch.randn(5, 3, 8, 8)), "draw", "from x0"),
    ("another dtype than drawn", lambda: _loss(drawn=torch.randn(4, 3, 8, 8).double()), "draw",
     "from x0"),
    ("a model of fewer channels", lambda: _loss(lambda x: x[:, :1]), "model",
     "shaped like its input"),
    ("a model of larger pictures", lambda: _loss(lambda x: x.repeat(1, 1, 2, 2)), "model",
     "shaped like its input"),
    ("a model of integers", lambda: _loss(lambda x: x.long()), "model", "floating-point"),
    ("a model of tuples", lambda: _loss(lambda x: (x, x)), "model", ".sample"),
    ("a model of None", lambda: _loss(lambda x: None), "model", ".sample"),
    ("betas of 0", lambda: NoiseSchedule(torch.zeros(5)), "betas", "between 0 and 1"),
    ("betas of 1", lambda: NoiseSchedule(torch.ones(5)), "betas", "between 0 and 1"),
    ("betas of NaN", lambda: NoiseSchedule(torch.full((5,), math.nan)), "betas", "between 0 and 1"),
    ("a table of betas", lambda: NoiseSchedule(torch.rand(5, 5)), "betas", "vector"),
    ("no betas", lambda: NoiseSchedule(torch.zeros(0)), "betas", "non-empty"),
    ("betas='linear'", lambda: NoiseSchedule("linear"), "betas", "between 0 and 1"),
    ("linear(0)", lambda: NoiseSchedule.linear(0), "steps", "at least one"),
    ("cosine(-3)", lambda: NoiseSchedule.cosine(-3), "steps", "at least one"),
    ("a scheduler of velocities", lambda: NoiseSchedule.from_diffusers(_Velocity()),
     "prediction_type", "epsilon"),
    ("no scheduler", lambda: NoiseSchedule.from_diffusers(nn.Linear(1, 1)), "betas",
     "DDPMScheduler"),
    ("lam=-1", lambda: Perturbation(lam=-1), "lam", "0 or more"),
    ("lam='strong'", lambda: Perturbation(lam="strong"), "lam", "0 or more"),
    ("gamma=inf", lambda: Perturbation(gamma=math.inf), "gamma", "finite"),
    ("omega=nan", lambda: Perturbation(omega=math.nan), "omega", "finite"),
    ("beta_range=(2, 1)", lambda: Perturbation(beta_range=(2, 1)), "beta_range", "lower one first"),
    ("beta_range=(0, 1)", lambda: Perturbation(beta_range=(0, 1)), "beta_range", "positive"),
    ("beta_range=(1,)", lambda: Perturbation(beta_range=(1,)), "beta_range", "two"),
    ("beta_range=1", lambda: Perturbation(beta_range=1), "beta_range", "two"),
    ("lambda_mode='abs'", lambda: Perturbation(lambda_mode="abs"), "lambda_mode", "ray, x"),
    ("num=0", lambda: _sample(num=0), "num", "at least 1"),
    ("batch_size=0", lambda: _sample(batch_size=0), "batch_size", "at least 1"),
    ("sampler='edm'", lambda: _sample(sampler="edm"), "sampler", "ddpm, ddim"),
    ("steps=51", lambda: _sample(steps=51), "steps", "from 1 to the schedule's length, 50"),
    ("spacing='karras'", lambda: _sample(spacing="karras"), "spacing", "trailing"),
    ("variance='learned'", lambda: _sample(variance="learned"), "variance", "fixed_small"),
    ("eta=nan", lambda: _sample(sampler="ddim", eta=math.nan), "eta", "from 0 to 1"),
    ("eta=0.5", lambda: _sample(eta=0.5), "eta", "use sampler ddim"),
    ("first_index=-1", lambda: _sample(first_index=-1), "first_index", "negative"),
    ("stop=1e9", lambda: _sample(stop=1e9), "stop", "from 0 to"),
    ("stop=-1", lambda: _sample(stop=-1), "stop", "from 0 to"),
    ("seed=2**40", lambda: _sample(seed=2**40), "seed", "from 0 to 4294967295"),
    ("samples of another shape", lambda: _sample(_Model(lambda x: x[:, :, :4])), "model",
     "shaped like its input"),
    ("timesteps that rise", lambda: sampling.Respaced(_schedule(), torch.tensor([3, 7])),
     "timesteps", "decreases strictly within 0 to 49"),
    ("timesteps that are not there", lambda: sampling.Respaced(_schedule(), torch.tensor([50])),
     "timesteps", "within 0 to 49"),
    ("method='cw'", lambda: TrajectoryAttack("cw"), "method", "fgsm, pgd"),
    ("size=-1", lambda: TrajectoryAttack("pgd", size=-1), "size", "0 or more"),
    ("phi=0", lambda: TrajectoryAttack("pgd", phi=0), "phi", "above 0"),
    ("draws=0", lambda: TrajectoryAttack("eot", draws=0), "draws", "at least 1"),
    ("share=2", lambda: attacked_steps(50, 2), "steps_attacked", "from 0 to 1"),
    ("where='middle'", lambda: attacked_steps(50, 0.5, "middle"), "where", "stride, random"),
    ("fuse(Linear)", lambda: fuse(nn.Linear(2, 2)), "Linear", "UNet2DModel"),
    ("fast_network(function)", lambda: fast_network(lambda x, t: x), "model", "torch.nn.Module"),
    ("precision='fp16'", lambda: fast_network(_GOOD, precision="fp16"), "precision", "fp32, bf16"),
    ("cuda_graph=True on a CPU", lambda: fast_network(_GOOD, cuda_graph=True, device="cpu"),
     "cuda_graph", "CUDA device"),
    ("load_run('nowhere')", lambda: load_run("nowhere"), "nowhere", "no such directory"),
    ("Baseline('smooth')", lambda: Baseline("smooth"), "baseline", "known"),
    ("Baseline strength of nan", lambda: Baseline("blur", math.nan), "baseline_strength",
     "positive number"),
    ("a grid of five channels", lambda: images.grid(torch.zeros(2, 5, 8, 8)), "samples",
     "1, 3 or 4 channels"),
    ("a grid of nothing", lambda: images.grid(torch.zeros(0, 3, 8, 8)), "samples", "at least one"),
    ("columns=0", lambda: images.grid(torch.zeros(2, 3, 8, 8), columns=0), "columns",
     "at least 1"),
    ("preset_values('mnist')", lambda: preset_values("mnist"), "preset", "digits, plane"),
    ("from_dict of an unknown field", lambda: TrainConfig.from_dict({"learning_rate": 1}),
     "learning_rate", "unknown field"),
    ("TrainConfig(batch_size='many')", lambda: TrainConfig(batch_size="many"), "batch_size",
     "int"),
    ("TrainConfig(lr=None)", lambda: TrainConfig(lr=None), "lr", "float"),
    ("TrainConfig(objective='adv')", lambda: TrainConfig(objective="adv"), "objective",
     "robust_adv"),
)


def _public(trial: Trial) -> Wrong:
    """A wrong argument of a public class or function."""
    what, wrong, *named = _pick(trial, API)
    return Wrong(what, wrong, tuple(named))


_KINDS = ((30, _field), (45, _contradiction), (65, _command), (80, _tensor), (100, _public))
"""Up to which number trials are of a kind."""
