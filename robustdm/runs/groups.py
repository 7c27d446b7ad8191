"""The groups of fields that make up the configuration of a training run, with their checks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from robustdm.runs.fields import (
    BELOW_2_32,
    MAY_BE_INFINITE,
    POSITIVE,
    Amount,
    Count,
    CountOrZero,
    Fields,
    OptionalCount,
    Part,
    Share,
    at_most,
)

LambdaMode = Literal["ray", "x", "std", "literal"]
ObjectiveName = Literal["ddpm", "robust_adv", "robust_ran", "invariance", "outward_ran"]

# Far above all that trains; more would only use up memory and time before anything is compared.
MOST_TIMESTEPS = 1 << 20
_MOST_BLOCKS = 64
_MOST_DEPTH = 1024
_MOST_THREADS = 1024
_MOST_LEVELS = 16


@dataclass(frozen=True)
class BaseFields(Fields):
    """The values that everything else overrides."""

    preset: str = "digits"
    """Named set of defaults, which any flag overrides: digits, plane, gaussians, subspace, cifar10,
    cifar10-iddpm, celeba64, imagenet64, lsun256, folder; finetune, with --init-from."""
    config: Path | None = None
    """YAML file of fields; it overrides the preset, and flags override it."""


@dataclass(frozen=True)
class DataFields(Fields):
    """The training data."""

    data: Literal["digits", "plane", "gaussians", "subspace", "cifar10", "cifar100",
                  "images"] = "digits"
    """What to train on; `images` is whatever --data-dir names."""
    data_dir: Path | None = None
    """Local copy of the data: a folder, zip, lmdb, .npy or .npz; or hf:NAME[:SPLIT], a Hugging Face
    data set or a folder of parquet files (extra `data`)."""
    resolution: Count = 8
    """Side of the images in pixels; larger files are resized and centre-cropped."""
    crop: CountOrZero = 0
    """Side of the square cut out of the middle of every picture before it is resized; 140 for
    aligned CelebA. 0: the largest there is."""
    channels: Literal[1, 3, 4] | None = None
    """Channels of the images; by default what the files have."""
    value_range: tuple[float, float] | None = None
    """.npy, .npz: the two values that become -1 and 1; what lies beyond them is kept. By default 0
    and 255 of uint8, 0 and 1 or -1 and 1 of floats where the values leave no doubt."""
    stream: bool = False
    """hf: read the data set as a stream instead of downloading it first."""
    shuffle_buffer: Count = 4096
    """--stream: so many images are held, as files, and shuffled at a time."""

    def check(self) -> None:
        super().check()
        low, high = self.value_range or (0, 1)
        self.need(low < high, "value_range", "give the smaller number first")


@dataclass(frozen=True)
class CorruptionFields(Fields):
    """The noise that is added to the training data."""

    corrupt_kind: Literal["gaussian", "salt_pepper", "missing", "jpeg", "outliers"] = "gaussian"
    """How images are corrupted."""
    corrupt_fraction: Share = 0.9
    """Share of the training images that are corrupted, once and for all."""
    corrupt_sigma: Amount = 0.2
    """gaussian: standard deviation of the noise; data range is [-1, 1]."""
    corrupt_pixels: Share = 0.1
    """salt_pepper, missing: share of the pixels that are hit."""
    corrupt_quality: int = 10
    """jpeg: quality, 1 to 95."""
    corrupt_with: Path | None = None
    """outliers: images, of any form that --data-dir may have, that replace those of the set."""
    point_noise: Literal["clean", "inlier", "outlier"] = "inlier"
    """How the 3-D sets are spoilt: wider sampling, or points of a uniform grid."""
    point_noise_level: Amount = 1.0
    """inlier: standard deviation (data units) of the noise; outlier: share of grid points."""

    def check(self) -> None:
        super().check()
        self.need(1 <= self.corrupt_quality <= 95, "corrupt_quality", "it must be from 1 to 95")
        if self.corrupt_kind == "outliers":
            self.need(self.corrupt_with is not None, "corrupt_with",
                      "name the images that outliers are taken from")
        else:
            self.need(self.corrupt_with is None, "corrupt_with",
                      f"corrupt_kind {self.corrupt_kind!r} uses none; --corrupt-kind outliers does")


@dataclass(frozen=True)
class SyntheticFields(Fields):
    """The generated sets: plane, gaussians, subspace."""

    num_points: Count = 10_000
    """Size of the generated sets (plane, gaussians, subspace)."""
    subspace_rank: Count = 5
    """subspace: number of principal components that carry the signal."""
    subspace_noise_dims: CountOrZero = 27
    """subspace in PCA coordinates: dimensions that carry noise alone."""
    subspace_space: Literal["pca", "ambient"] = "pca"
    """subspace: train in PCA coordinates (small network) or on whole images."""


@dataclass(frozen=True)
class LoadingFields(Fields):
    """How the data are read and split."""

    holdout: float = 0.05
    """Share of the data kept out of training, for the held-out loss."""
    flip: bool = False
    """Flip images left to right at random."""
    max_bad: Share = 0.01
    """Share of unreadable files that is tolerated; they are listed in quarantine.txt."""
    resident_gib: Annotated[Amount, MAY_BE_INFINITE] = 8.0
    """Image sets up to this size (as uint8) are held on the device; larger ones stream."""
    workers: CountOrZero = 4
    """Processes that decode streamed images."""

    def check(self) -> None:
        super().check()
        self.need(0 <= self.holdout < 1, "holdout", "it is a share, from 0 to below 1")


@dataclass(frozen=True)
class ObjectiveFields(Fields):
    """The loss and the noise schedule."""

    objective: Literal[ObjectiveName, "auto"] = "robust_adv"
    """Loss: plain DDPM, or DDPM with the equivariance (or a control's) regulariser. auto measures
    the noise of the data and takes the cheapest that removes it, with samples to match."""
    lambda_mode: LambdaMode = "ray"
    """Reading of the paper's lambda_t; see Perturbation."""
    lam: Amount = 0.3
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
    lambda_max: Annotated[float | None, MAY_BE_INFINITE] = None
    """Upper bound of lambda_t."""
    attack: Literal["output", "equivariance"] = "output"
    """What the attack maximises: the change of the output (paper) or the residual itself."""
    reg_fraction: Part = 1.0
    """Share of each batch that gets the regulariser, weighted so that the gradient is unbiased."""
    reg_every: Count = 1
    """Steps from one with the regulariser, weighted by their number, to the next."""
    attack_fraction: Part = 1.0
    """Share of the perturbed images that are attacked; the others keep their random start."""
    at_last: Part = 1.0
    """Share of the steps, the last ones, that have the regulariser: adversarial fine-tuning."""
    schedule: Literal["linear", "cosine"] = "linear"
    """Noise schedule."""
    timesteps: Annotated[Count, at_most(MOST_TIMESTEPS)] = 1000
    """Length of the diffusion."""


@dataclass(frozen=True)
class StartFields(Fields):
    """A model to start from, and the part of it that is trained."""

    init_from: str | None = None
    """A model to start from: a diffusers directory or its name on the Hub, a run directory, or an
    improved-diffusion .pt. Network, schedule, resolution and clipping are that model's."""
    num_heads: OptionalCount = None
    """init_from: attention heads, where the model does not tell (improved-diffusion)."""
    rescale_timesteps: bool = True
    """init_from, an improved-diffusion .pt whose timesteps are not 1000: its network was told
    t * 1000 / timesteps, as is the default there, and not t."""
    allow_pickle: bool = False
    """init_from: read pickle files (.pt, .bin) too; tensors only, no code is run."""
    freeze: tuple[str, ...] = ()
    """Names of parameters that stay as they are, with * and ?: down_blocks.* time_embedding.*"""
    lora: CountOrZero = 0
    """init_from: train low-rank adapters of this rank instead of the network's own weights (extra
    `lora`); 0: off."""
    lora_alpha: float | None = None
    """lora: the adapters' product is multiplied by this over the rank; by default the rank."""
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2")
    """lora: layers that get adapters, by the last parts of their names, with * and ?."""
    pretrained: Annotated[dict | None, tyro.conf.Suppress] = None
    """What init_from led to: source, sha256, arguments of the UNet, schedule. Not set by hand."""

    def check(self) -> None:
        super().check()
        if self.lora:
            self.need(not self.freeze, "freeze", "with --lora all of the network's own parameters "
                      "stay as they are: leave it out, and choose layers with --lora-targets")
            self.need(self.lora_alpha is None or self.lora_alpha > 0, "lora_alpha",
                      "it must be positive")
            self.need(len(self.lora_targets) > 0, "lora_targets", "name at least one layer")
        else:
            for name in ("lora_alpha", "lora_targets"):
                self.need(getattr(self, name) == getattr(type(self), name), name,
                          "it does nothing without --lora RANK")
        self.need(self.pretrained is None or _is_record(self.pretrained), "pretrained",
                  "no record of a model; it is not set by hand")


@dataclass(frozen=True)
class NetworkFields(Fields):
    """The network, if it does not come from a model to start from."""

    network: Literal["unet", "mlp"] = "unet"
    """diffusers UNet2DModel for images, residual MLP for points."""
    block_channels: tuple[int, ...] = (32, 48)
    """unet: channels per resolution level."""
    layers_per_block: Annotated[Count, at_most(_MOST_BLOCKS)] = 1
    """unet: residual blocks per level."""
    attention_resolutions: tuple[int, ...] = ()
    """unet: image sides at which the levels have self-attention (the middle always has)."""
    attention_head_dim: OptionalCount = None
    """unet: channels per attention head; None is a single head."""
    norm_groups: Count = 8
    """unet: groups of the GroupNorms."""
    scale_shift_norm: bool = False
    """unet: time embedding as scale and shift of the norms (improved-diffusion)."""
    dropout: float = 0.0
    """unet: dropout rate."""
    attention: Literal["auto", "sdpa", "plain", "xformers"] = "auto"
    """unet: what computes attention: torch's fused kernel, plain products, or xformers (extra
    `xformers`, on a GPU). auto is sdpa, but plain on a CPU in bf16, where it is faster."""
    mlp_width: Count = 64
    """mlp: width of the layers."""
    mlp_depth: Annotated[Count, at_most(_MOST_DEPTH)] = 3
    """mlp: number of residual layers."""

    def check(self) -> None:
        super().check()
        self.need(0 <= self.dropout < 1, "dropout", "it is a probability, from 0 to below 1")
        self.need(0 < len(self.block_channels) <= _MOST_LEVELS, "block_channels",
                  f"give from 1 to {_MOST_LEVELS} of them")
        self.need(all(c >= 1 and c % self.norm_groups == 0 for c in self.block_channels),
                  "block_channels", f"each must be a multiple of norm_groups, {self.norm_groups}")


@dataclass(frozen=True)
class OptimisationFields(Fields):
    """The optimizer and the averages of the weights."""

    batch_size: Count = 64
    """Images per optimizer step, of all ranks together."""
    accumulate: Count = 1
    """Pieces a batch is computed in, one after the other, to save memory; same result."""
    steps: Annotated[Count, BELOW_2_32] = 700
    """Optimizer steps in all; a finished run can be extended."""
    lr: Annotated[float, POSITIVE] = 1e-3
    """Learning rate of AdamW, constant after the warm-up."""
    warmup_steps: CountOrZero = 100
    """Steps over which the learning rate rises linearly."""
    weight_decay: Amount = 0.0
    """Decoupled weight decay."""
    clip_norm: Annotated[Amount, MAY_BE_INFINITE] = 1.0
    """Largest gradient norm; 0 switches clipping off."""
    ema_rates: tuple[float, ...] = (0.995,)
    """Decay of each exponential moving average of the weights; samples use the first."""

    def check(self) -> None:
        super().check()
        self.need(self.batch_size % self.accumulate == 0, "accumulate",
                  f"it must divide the batch size, {self.batch_size}")
        self.need(len(self.ema_rates) > 0 and all(0 <= r < 1 for r in self.ema_rates), "ema_rates",
                  "give one or several decay rates, from 0 to below 1")
        self.need(len(set(self.ema_rates)) == len(self.ema_rates), "ema_rates",
                  "the rates must differ from each other")


@dataclass(frozen=True)
class ComputationFields(Fields):
    """How, and on what device, a step is computed."""

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
    seed: Annotated[CountOrZero, BELOW_2_32] = 0
    """Decides weights, data order, noise and dropout."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    threads: Annotated[CountOrZero, at_most(_MOST_THREADS)] = 0
    """cpu: threads that compute; 0 takes what OMP_NUM_THREADS says, else the number that a few
    steps find fastest. A resumed run uses its own number again, to train to the same bits."""


@dataclass(frozen=True)
class ProcessesFields(Fields):
    """Training with several processes, started by torchrun."""

    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Under torchrun: what each rank holds, the whole network (ddp), or a part of its weights,
    gradients, moments and averages (fsdp)."""
    rank_timeout: Annotated[float, POSITIVE, MAY_BE_INFINITE] = 10.0
    """Under torchrun: minutes after which a rank that does not answer is lost. More than what a
    checkpoint takes, and than the fastest is ahead of the slowest in reading data and compiling."""


@dataclass(frozen=True)
class RunFields(Fields):
    """The run directory: what is written to it, and when."""

    out: Path = Path("runs/digits")
    """Run directory."""
    resume: bool = False
    """Continue the run in --out from its newest sound checkpoint."""
    stop_after: OptionalCount = None
    """Save and stop cleanly after this many optimizer steps of this process."""
    max_time: Annotated[float | None, POSITIVE, MAY_BE_INFINITE] = None
    """Save and stop cleanly after this many minutes."""
    log_every: Count = 20
    """Steps between lines of metrics.jsonl."""
    sample_every: CountOrZero = 200
    """Steps between sample grids (0: only at the end)."""
    checkpoint_every: CountOrZero = 200
    """Steps between checkpoints (0: only at the end)."""
    checkpoint_minutes: Annotated[Amount, MAY_BE_INFINITE] = 10.0
    """Also save when the last checkpoint is this old (0: never)."""
    keep_last: Count = 2
    """Newest checkpoints to keep."""
    keep_every: CountOrZero = 0
    """Also keep every checkpoint whose step is a multiple of this (0: none)."""
    num_samples: Count = 64
    """Samples in each preview grid and in the report."""
    preview_steps: Count = 50
    """DDIM steps of the previews."""
    final_sampler: Literal["ddpm", "ddim"] = "ddpm"
    """Sampler of the report's samples, once the run is complete."""
    final_steps: Count = 1000
    """Sampling steps of the report's samples, at most `timesteps`."""
    clip_samples: bool = False
    """Clip the predicted image to [-1, 1] while sampling."""
    correct_samples: bool = False
    """Draw the report's samples as sample's --baseline known does, if the data carry white noise;
    ddpm only."""
    max_skipped: Count = 10
    """Consecutive steps with a non-finite loss or gradient after which the run stops."""
    tensorboard: bool = False
    """Also log to TensorBoard (extra `log`)."""
    wandb: bool = False
    """Also log to Weights & Biases (extra `log`)."""
    dry_run: bool = False
    """Check everything, print the plan and the memory estimate, and stop."""


def _is_record(value: dict) -> bool:
    """Whether it is of the form of `robustdm.models.pretrained.Source.record`."""
    texts, mappings = ("source", "format", "sha256", "variance_type"), ("unet", "scheduler")
    return value.keys() >= {*texts, *mappings} and all(
        isinstance(value[name], str) for name in texts
    ) and all(value[name] is None or isinstance(value[name], dict) for name in mappings)
