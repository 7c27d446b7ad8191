"""The configuration of a training run: one dataclass, its presets, and its YAML form.

Imports neither torch nor diffusers, so that ``--help`` and every usage error answer at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import os
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from robustdm.errors import UsageError

LambdaMode = Literal["ray", "x", "std", "literal"]
ObjectiveName = Literal["ddpm", "robust_adv", "robust_ran", "invariance", "outward_ran"]

_YAML_LIMIT = 1 << 18  # bytes; a configuration with a table of 4000 betas has 2^17
# Fields of which infinity makes sense: "as much as there is".
_MAY_BE_INFINITE = ("resident_gib", "checkpoint_minutes", "max_time", "lambda_max", "clip_norm",
                    "rank_timeout")
# Far above all that trains; more would only use up memory and time before anything is compared.
LARGEST = dict(timesteps=1 << 20, layers_per_block=64, mlp_depth=1024, threads=1024)
_MOST_LEVELS = 16


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a training run. The defaults are the README's recipe (digits)."""

    preset: str = "digits"
    """Named set of defaults, which any flag overrides: digits, plane, gaussians, subspace, cifar10,
    cifar10-iddpm, celeba64, imagenet64, lsun256, folder; finetune, with --init-from."""
    config: Path | None = None
    """YAML file of fields; it overrides the preset, and flags override it."""

    # Data.
    data: Literal["digits", "plane", "gaussians", "subspace", "cifar10", "cifar100",
                  "images"] = "digits"
    """What to train on; `images` is whatever --data-dir names."""
    data_dir: Path | None = None
    """Local copy of the data: a folder, zip, lmdb, .npy or .npz; or hf:NAME[:SPLIT], a Hugging Face
    data set or a folder of parquet files (extra `data`)."""
    resolution: int = 8
    """Side of the images in pixels; larger files are resized and centre-cropped."""
    crop: int = 0
    """Side of the square cut out of the middle of every picture before it is resized; 140 for
    aligned CelebA. 0: the largest there is."""
    channels: Literal[1, 3, 4] | None = None
    """Channels of the images; by default what the files have."""
    stream: bool = False
    """hf: read the data set as a stream instead of downloading it first."""
    shuffle_buffer: int = 4096
    """--stream: so many images are held, as files, and shuffled at a time."""
    corrupt_kind: Literal["gaussian", "salt_pepper", "missing", "jpeg", "outliers"] = "gaussian"
    """How images are corrupted."""
    corrupt_fraction: float = 0.9
    """Share of the training images that are corrupted, once and for all."""
    corrupt_sigma: float = 0.2
    """gaussian: standard deviation of the noise; data range is [-1, 1]."""
    corrupt_pixels: float = 0.1
    """salt_pepper, missing: share of the pixels that are hit."""
    corrupt_quality: int = 10
    """jpeg: quality, 1 to 95."""
    corrupt_with: Path | None = None
    """outliers: images, of any form that --data-dir may have, that replace those of the set."""
    point_noise: Literal["clean", "inlier", "outlier"] = "inlier"
    """How the 3-D sets are spoilt: wider sampling, or points of a uniform grid."""
    point_noise_level: float = 1.0
    """inlier: standard deviation (data units) of the noise; outlier: share of grid points."""
    num_points: int = 10_000
    """Size of the generated sets (plane, gaussians, subspace)."""
    subspace_rank: int = 5
    """subspace: number of principal components that carry the signal."""
    subspace_noise_dims: int = 27
    """subspace in PCA coordinates: dimensions that carry noise alone."""
    subspace_space: Literal["pca", "ambient"] = "pca"
    """subspace: train in PCA coordinates (small network) or on whole images."""
    holdout: float = 0.05
    """Share of the data kept out of training, for the held-out loss."""
    flip: bool = False
    """Flip images left to right at random."""
    max_bad: float = 0.01
    """Share of unreadable files that is tolerated; they are listed in quarantine.txt."""
    resident_gib: float = 8.0
    """Image sets up to this size (as uint8) are held on the device; larger ones stream."""
    workers: int = 4
    """Processes that decode streamed images."""

    # Objective.
    objective: ObjectiveName = "robust_adv"
    """Loss: plain DDPM, or DDPM with the equivariance (or a control's) regulariser."""
    lambda_mode: LambdaMode = "ray"
    """Reading of the paper's lambda_t; see Perturbation."""
    lam: float = 0.3
    """Strength of the regulariser."""
    omega: float = 2.0
    """Exponent of the perturbation radius."""
    gamma: float = 8 / 255
    """Floor of the perturbation radius, in units of x."""
    beta_range: tuple[float, float] = (0.5, 2.0)
    """Range of the random factor of the radius."""
    beta_per: Literal["sample", "batch"] = "sample"
    """Draw that factor once per sample or once per batch."""
    detach_clean: bool = False
    """Stop the regulariser's gradient through the clean prediction."""
    share_dropout: bool = True
    """Use one dropout mask for all forward passes of a step."""
    lambda_max: float | None = None
    """Upper bound of lambda_t."""
    attack: Literal["output", "equivariance"] = "output"
    """What the attack maximises: the change of the output (paper) or the residual itself."""
    reg_fraction: float = 1.0
    """Share of each batch that gets the regulariser, weighted so that the gradient is unbiased."""
    reg_every: int = 1
    """Steps from one with the regulariser, weighted by their number, to the next."""
    attack_fraction: float = 1.0
    """Share of the perturbed images that are attacked; the others keep their random start."""
    at_last: float = 1.0
    """Share of the steps, the last ones, that have the regulariser: adversarial fine-tuning."""
    schedule: Literal["linear", "cosine"] = "linear"
    """Noise schedule."""
    timesteps: int = 1000
    """Length of the diffusion."""

    # A model to start from.
    init_from: str | None = None
    """A model to start from: a diffusers directory or its name on the Hub, a run directory, or an
    improved-diffusion .pt. Network, schedule, resolution and clipping are that model's."""
    num_heads: int | None = None
    """init_from: attention heads, where the model does not tell (improved-diffusion)."""
    rescale_timesteps: bool = True
    """init_from, an improved-diffusion .pt whose timesteps are not 1000: its network was told
    t * 1000 / timesteps, as is the default there, and not t."""
    allow_pickle: bool = False
    """init_from: read pickle files (.pt, .bin) too; tensors only, no code is run."""
    freeze: tuple[str, ...] = ()
    """Names of parameters that stay as they are, with * and ?: down_blocks.* time_embedding.*"""
    lora: int = 0
    """init_from: train low-rank adapters of this rank instead of the network's own weights (extra
    `lora`); 0: off."""
    lora_alpha: float | None = None
    """lora: the adapters' product is multiplied by this over the rank; by default the rank."""
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2")
    """lora: layers that get adapters, by the last parts of their names, with * and ?."""
    pretrained: Annotated[dict | None, tyro.conf.Suppress] = None
    """What init_from led to: source, sha256, arguments of the UNet, schedule. Not set by hand."""

    # Network.
    network: Literal["unet", "mlp"] = "unet"
    """diffusers UNet2DModel for images, residual MLP for points."""
    block_channels: tuple[int, ...] = (32, 48)
    """unet: channels per resolution level."""
    layers_per_block: int = 1
    """unet: residual blocks per level."""
    attention_resolutions: tuple[int, ...] = ()
    """unet: image sides at which the levels have self-attention (the middle always has)."""
    attention_head_dim: int | None = None
    """unet: channels per attention head; None is a single head."""
    norm_groups: int = 8
    """unet: groups of the GroupNorms."""
    scale_shift_norm: bool = False
    """unet: time embedding as scale and shift of the norms (improved-diffusion)."""
    dropout: float = 0.0
    """unet: dropout rate."""
    attention: Literal["auto", "sdpa", "plain", "xformers"] = "auto"
    """unet: what computes attention: torch's fused kernel, plain products, or xformers (extra
    `xformers`, on a GPU). auto is sdpa, but plain on a CPU in bf16, where it is faster."""
    mlp_width: int = 64
    """mlp: width of the layers."""
    mlp_depth: int = 3
    """mlp: number of residual layers."""

    # Optimisation.
    batch_size: int = 64
    """Images per optimizer step, of all ranks together."""
    accumulate: int = 1
    """Pieces a batch is computed in, one after the other, to save memory; same result."""
    steps: int = 700
    """Optimizer steps in all; a finished run can be extended."""
    lr: float = 1e-3
    """Learning rate of AdamW, constant after the warm-up."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises linearly."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    clip_norm: float = 1.0
    """Largest gradient norm; 0 switches clipping off."""
    ema_rates: tuple[float, ...] = (0.995,)
    """Decay of each exponential moving average of the weights; samples use the first."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 runs the network on bfloat16 copies of the float32 weights that the optimizer keeps."""
    backend: Literal["auto", "torch", "cpp", "triton"] = "auto"
    """What runs the fused ops; `python -m robustdm.doctor` shows what auto comes to."""
    compile: bool = False
    """Compile the whole step with torch.compile, or the network alone where only that works; falls
    back to eager."""
    cuda_graph: bool = True
    """With --compile on a GPU: replay the step, optimizer included, as one CUDA graph."""
    cudnn_benchmark: bool = True
    """On a GPU: let cuDNN time its algorithms for each convolution and keep the fastest."""
    seed: int = 0
    """Decides weights, data order, noise and dropout."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    threads: int = 0
    """cpu: threads that compute; 0 takes what OMP_NUM_THREADS says, else the number that a few
    steps find fastest. A resumed run uses its own number again, to train to the same bits."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Under torchrun: what each rank holds, the whole network (ddp), or a part of its weights,
    gradients, moments and averages (fsdp)."""
    rank_timeout: float = 10.0
    """Under torchrun: minutes after which a rank that does not answer is lost. More than what a
    checkpoint takes, and than the fastest is ahead of the slowest in reading data and compiling."""

    # The run.
    out: Path = Path("runs/digits")
    """Run directory."""
    resume: bool = False
    """Continue the run in --out from its newest sound checkpoint."""
    stop_after: int | None = None
    """Save and stop cleanly after this many optimizer steps of this process."""
    max_time: float | None = None
    """Save and stop cleanly after this many minutes."""
    log_every: int = 20
    """Steps between lines of metrics.jsonl."""
    sample_every: int = 200
    """Steps between sample grids (0: only at the end)."""
    checkpoint_every: int = 200
    """Steps between checkpoints (0: only at the end)."""
    checkpoint_minutes: float = 10.0
    """Also save when the last checkpoint is this old (0: never)."""
    keep_last: int = 2
    """Newest checkpoints to keep."""
    keep_every: int = 0
    """Also keep every checkpoint whose step is a multiple of this (0: none)."""
    num_samples: int = 64
    """Samples in each preview grid and in the report."""
    preview_steps: int = 50
    """DDIM steps of the previews."""
    final_sampler: Literal["ddpm", "ddim"] = "ddpm"
    """Sampler of the report's samples, once the run is complete."""
    final_steps: int = 1000
    """Sampling steps of the report's samples, at most `timesteps`."""
    clip_samples: bool = False
    """Clip the predicted image to [-1, 1] while sampling."""
    max_skipped: int = 10
    """Consecutive steps with a non-finite loss or gradient after which the run stops."""
    tensorboard: bool = False
    """Also log to TensorBoard (extra `log`)."""
    wandb: bool = False
    """Also log to Weights & Biases (extra `log`)."""
    dry_run: bool = False
    """Check everything, print the plan and the memory estimate, and stop."""

    def __post_init__(self):
        for name, value in check_fields(vars(self), "").items():
            object.__setattr__(self, name, value)
        self._check()

    def _check(self) -> None:
        def need(ok: bool, name: str, remedy: str) -> None:
            if not ok:
                raise UsageError(f"{name} is {getattr(self, name)!r}: {remedy}")

        for name, value in vars(self).items():
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, float):
                    need(math.isfinite(number) or number > 0 and name in _MAY_BE_INFINITE, name,
                         "it must be a finite number")
        for name in ("batch_size", "accumulate", "steps", "timesteps", "resolution", "num_points",
                     "layers_per_block", "norm_groups", "mlp_width", "mlp_depth", "log_every",
                     "keep_last", "num_samples", "preview_steps", "final_steps", "max_skipped",
                     "subspace_rank", "reg_every", "shuffle_buffer"):
            need(getattr(self, name) >= 1, name, "it must be at least 1")
        for name in ("warmup_steps", "sample_every", "checkpoint_every", "keep_every", "workers",
                     "weight_decay", "clip_norm", "lam", "corrupt_sigma", "resident_gib",
                     "point_noise_level", "subspace_noise_dims", "seed", "checkpoint_minutes",
                     "crop", "lora", "threads"):
            need(getattr(self, name) >= 0, name, "it must not be negative")
        for name in ("corrupt_fraction", "corrupt_pixels", "max_bad"):
            need(0 <= getattr(self, name) <= 1, name, "it is a share, from 0 to 1")
        for name in ("reg_fraction", "attack_fraction", "at_last"):
            need(0 < getattr(self, name) <= 1, name, "it is a share, above 0 and up to 1")
        need(0 <= self.holdout < 1, "holdout", "it is a share, from 0 to below 1")
        need(1 <= self.corrupt_quality <= 95, "corrupt_quality", "it must be from 1 to 95")
        if self.corrupt_kind == "outliers":
            need(self.corrupt_with is not None, "corrupt_with",
                 "name the images that outliers are taken from")
        else:
            need(self.corrupt_with is None, "corrupt_with",
                 f"corrupt_kind {self.corrupt_kind!r} uses none; --corrupt-kind outliers does")
        need(0 <= self.dropout < 1, "dropout", "it is a probability, from 0 to below 1")
        need(self.lr > 0, "lr", "it must be positive")
        need(self.seed < 2**32, "seed", "it must be below 2**32")
        need(self.steps < 2**32, "steps", "it must be below 2**32")
        need(self.batch_size % self.accumulate == 0, "accumulate",
             f"it must divide the batch size, {self.batch_size}")
        need(len(self.ema_rates) > 0 and all(0 <= r < 1 for r in self.ema_rates), "ema_rates",
             "give one or several decay rates, from 0 to below 1")
        need(len(set(self.ema_rates)) == len(self.ema_rates), "ema_rates",
             "the rates must differ from each other")
        if self.lora:
            need(self.network == "unet", "lora", "only networks for images can have adapters")
            need(not self.freeze, "freeze", "with --lora all of the network's own parameters stay "
                 "as they are: leave it out, and choose layers with --lora-targets")
            need(self.lora_alpha is None or self.lora_alpha > 0, "lora_alpha",
                 "it must be positive")
            need(len(self.lora_targets) > 0, "lora_targets", "name at least one layer")
        else:
            for name in ("lora_alpha", "lora_targets"):
                need(getattr(self, name) == getattr(type(self), name), name,
                     "it does nothing without --lora RANK")
        need(self.num_heads is None or self.num_heads >= 1, "num_heads", "at least 1")
        need(self.attention_head_dim is None or self.attention_head_dim >= 1,
             "attention_head_dim", "at least 1")
        for name, largest in LARGEST.items():
            need(getattr(self, name) <= largest, name, f"it must be at most {largest}")
        need(0 < len(self.block_channels) <= _MOST_LEVELS, "block_channels",
             f"give from 1 to {_MOST_LEVELS} of them")
        need(all(c >= 1 and c % self.norm_groups == 0 for c in self.block_channels),
             "block_channels", f"each must be a multiple of norm_groups, {self.norm_groups}")
        need(self.resolution % 2 ** (len(self.block_channels) - 1) == 0 or self.network == "mlp",
             "resolution", f"it must be a multiple of {2 ** (len(self.block_channels) - 1)}, for "
             f"the network halves it {len(self.block_channels) - 1} times")
        need(self.stop_after is None or self.stop_after >= 1, "stop_after", "at least 1")
        need(self.rank_timeout > 0, "rank_timeout", "it must be positive")
        if self.parallel == "fsdp":
            need(not self.compile, "compile", "a network in parts runs eagerly, use --parallel ddp "
                 "or --no-compile")
            need(not self.lora, "lora", "what adapters add is small and not put in parts, use "
                 "--parallel ddp")
        need(self.max_time is None or self.max_time > 0, "max_time", "it must be positive")
        need(self.pretrained is None or _is_record(self.pretrained), "pretrained",
             "no record of a model; it is not set by hand")

    def to_dict(self) -> dict:
        """Plain types only, as written to config.yaml: paths as strings, tuples as lists."""
        plain = dataclasses.asdict(self)
        return {
            key: str(value) if isinstance(value, Path)
            else list(value) if isinstance(value, tuple) else value
            for key, value in plain.items()
        }

    @classmethod
    def from_dict(cls, values: dict, source: str = "configuration") -> TrainConfig:
        """Build from plain types.

        Raises:
            UsageError: for an unknown field (naming the closest known one) or a wrong type.
        """
        return cls(**check_fields(values, f"{source}: "))


# Every preset gives only what differs from the defaults above.
_POINTS = dict(network="mlp", batch_size=512, steps=2500, lr=1e-3, warmup_steps=50,
               ema_rates=(0.995,), log_every=50, sample_every=500, checkpoint_every=500,
               num_samples=2000, preview_steps=100)
_CIFAR = dict(data="cifar10", resolution=32, batch_size=128, steps=200_000, lr=1e-4,
              warmup_steps=5000, ema_rates=(0.9999,), norm_groups=32, log_every=100,
              sample_every=5000, checkpoint_every=5000, clip_samples=True, precision="bf16")
PRESETS: dict[str, dict] = {
    "digits": {},
    "plane": dict(_POINTS, data="plane"),
    "gaussians": dict(_POINTS, data="gaussians", point_noise="outlier", point_noise_level=0.2),
    "subspace": dict(_POINTS, data="subspace", mlp_width=256, mlp_depth=4, batch_size=128,
                     steps=3000, num_points=5000, corrupt_sigma=0.1, num_samples=500),
    # The network of google/ddpm-cifar10-32: 35.7 M parameters, one attention head.
    "cifar10": dict(_CIFAR, block_channels=(128, 256, 256, 256), layers_per_block=2,
                    attention_resolutions=(16,), dropout=0.1),
    # improved-diffusion's CIFAR-10 network: 52.5 M parameters, four heads of 64 channels.
    "cifar10-iddpm": dict(_CIFAR, block_channels=(128, 256, 256, 256), layers_per_block=3,
                          attention_resolutions=(16, 8), attention_head_dim=64, dropout=0.3,
                          scale_shift_norm=True),
    "celeba64": dict(_CIFAR, data="images", resolution=64, crop=140,
                     block_channels=(128, 256, 384, 512), layers_per_block=3,
                     attention_resolutions=(16, 8), attention_head_dim=64,
                     scale_shift_norm=True, dropout=0.1),
    "imagenet64": dict(_CIFAR, data="images", resolution=64, steps=500_000,
                       block_channels=(128, 256, 384, 512), layers_per_block=3,
                       attention_resolutions=(16, 8), attention_head_dim=64,
                       scale_shift_norm=True),
    "lsun256": dict(_CIFAR, data="images", resolution=256,
                    block_channels=(128, 128, 256, 256, 512, 512), layers_per_block=2,
                    attention_resolutions=(16,), resident_gib=0.0, accumulate=8),
    # A small network for a folder of one's own pictures.
    "folder": dict(data="images", corrupt_fraction=0.0, resolution=32,
                   block_channels=(64, 128, 128), layers_per_block=2,
                   attention_resolutions=(8,), norm_groups=32, lr=2e-4, batch_size=64,
                   steps=20_000, warmup_steps=500, ema_rates=(0.999,),
                   sample_every=1000, checkpoint_every=1000, log_every=50, clip_samples=True,
                   final_steps=100),
    # Robust fine-tuning of a model named by --init-from, on noisy pictures. docs/pretrained.md says
    # why these values.
    "finetune": dict(data="images", corrupt_fraction=0.0, lr=2e-5, warmup_steps=500,
                     batch_size=128, steps=10_000, ema_rates=(0.999,), sample_every=1000,
                     checkpoint_every=1000, log_every=50, final_steps=100),
}


def preset_values(name: str) -> dict:
    """The fields a preset sets, with its run directory.

    Raises:
        UsageError: for an unknown preset.
    """
    if name not in PRESETS:
        raise UsageError(f"preset is {name!r}: choose one of {', '.join(PRESETS)}")
    return {"preset": name, "out": Path("runs") / name, **PRESETS[name]}


def load_yaml(path: Path) -> object:
    """The plain value of a YAML file.

    Aliases (``*name``) are refused: nested, a few lines of them stand for more than fits in memory.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is not YAML, or too long; the message is one line.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent, index):
            if self.check_event(yaml.AliasEvent):
                raise ValueError(f"it has an alias, *{self.peek_event().anchor}: write it out")
            return super().compose_node(parent, index)

    with open(path, "rb") as file:
        text = file.read(_YAML_LIMIT + 1)
    if len(text) > _YAML_LIMIT:
        raise ValueError(f"it is longer than {_YAML_LIMIT} bytes")
    try:
        return yaml.load(text, Loader)
    except Exception as error:  # besides YAMLError: of dates, recursion, bytes that are no text
        raise ValueError(" ".join(str(error).split())[:300]) from None


@functools.cache
def _hints() -> dict:
    return typing.get_type_hints(TrainConfig)


def check_fields(values: dict, source: str) -> dict:
    """Convert plain values (of a YAML file, say) to the types of the fields.

    Args:
        source: what errors begin with.

    Raises:
        UsageError: for an unknown field, naming the closest one, or a value of the wrong type.
    """
    hints = _hints()
    checked = {}
    for key, value in values.items():
        if key not in hints:
            close = difflib.get_close_matches(str(key), hints, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "see --help for the fields"
            raise UsageError(f"{source}unknown field {_short(key)}; {hint}")
        try:
            checked[key] = _convert(value, hints[key])
        except (TypeError, ValueError, OverflowError):
            wanted = str(hints[key]).removeprefix("typing.").removeprefix("<class '").rstrip("'>")
            raise UsageError(f"{source}{key} is {_short(value)}, but must be {wanted}") from None
    return checked


def _short(value) -> str:
    """A value for an error message; Python refuses to write out integers of thousands of digits."""
    try:
        text = repr(value)
    except ValueError:
        text = f"a huge {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:200]}..."


def _convert(value, wanted):
    origin, args = typing.get_origin(wanted), typing.get_args(wanted)
    if origin is Literal:
        if any(value == one and type(value) is type(one) for one in args):
            return value
    elif origin in (types.UnionType, typing.Union):
        return None if value is None else _convert(value, args[0])
    elif origin is tuple:
        if isinstance(value, (list, tuple)) and (args[-1] is ... or len(value) == len(args)):
            return tuple(_convert(item, args[0]) for item in value)
    elif wanted is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        return float(value)  # YAML 1.1 reads 1e-4 as a string
    elif wanted is dict and isinstance(value, dict):
        return value
    elif wanted is str and isinstance(value, Path):
        return str(value)
    elif wanted is Path and isinstance(value, (str, Path)) and b"\0" not in os.fsencode(value):
        return Path(value)
    elif type(value) is wanted and not (wanted is int and abs(value) >= 1 << 63):
        return value
    raise TypeError


def _is_record(value: dict) -> bool:
    """Whether it is of the form of `robustdm.models.pretrained.Source.record`."""
    texts, mappings = ("source", "format", "sha256", "variance_type"), ("unet", "scheduler")
    return value.keys() >= {*texts, *mappings} and all(
        isinstance(value[name], str) for name in texts
    ) and all(value[name] is None or isinstance(value[name], dict) for name in mappings)
