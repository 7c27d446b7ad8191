"""Models that exist already: read, checked, and made the start of a run (``--init-from``).

What can be read is a diffusers directory (nested as ``DDPMPipeline`` saves it, or flat), its name
on the Hub, a run directory of `robustdm.train`, and an improved-diffusion state dict. All become
the arguments and weights of a diffusers ``UNet2DModel`` (runs on points: of our MLP). No code from
a file is ever run: pickles are read only when that is allowed, and then as tensors alone.
"""

from __future__ import annotations

import difflib
import hashlib
import inspect
import json
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from robustdm.errors import RunError, UsageError, importing
from robustdm.method.schedule import NoiseSchedule
from robustdm.models import improved, make_unet, unet_config
from robustdm.models.pipeline import schedule_from
from robustdm.models.weights import averaged_weights, sample_kind, shape_problems, some_of
from robustdm.runs.checkpoint import load_newest
from robustdm.runs.config import TrainConfig
from robustdm.runs.rundir import read_config
from robustdm.untrusted import load_pickle, load_safetensors

NETWORK_FIELDS = (
    "network", "block_channels", "layers_per_block", "attention_resolutions",
    "attention_head_dim", "norm_groups", "scale_shift_norm", "mlp_width", "mlp_depth",
)
SCHEDULE_FIELDS = ("schedule", "timesteps")
ORIGIN_FIELDS = ("init_from", "num_heads", "rescale_timesteps", "allow_pickle", "pretrained")
TOLERANCE = 1e-2
"""Largest relative difference of a probe forward: a GPU's TF32 stays far below it, another number
of attention heads far above."""

_JSON_LIMIT = 1 << 20  # bytes
_WEIGHTS = "diffusion_pytorch_model"
_PICKLES = (".pt", ".pth", ".bin", ".ckpt")
_SCHEDULER_FIELDS = dict(
    num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear",
    trained_betas=None,
)
# diffusers' EMAModel writes its own settings among the network's.
_EMA_KEYS = {"decay", "inv_gamma", "min_decay", "optimization_step", "power",
             "update_after_step", "use_ema_warmup"}
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@dataclass(frozen=True)
class Source:
    """A model that was read and checked.

    Attributes:
        name: as it was given.
        format: "diffusers", "improved-diffusion" or "run".
        sha256: of the file with the weights; of several, of their sha256s in a row.
        weights: float32, by the names of our network.
        unet: arguments of ``UNet2DModel``; None for a network for points.
        scheduler: what decides a diffusers scheduler's betas; None where the source does not say,
            or says it in ``fields``.
        variance_type: of the diffusers scheduler that samples from it.
        fields: of `TrainConfig`, as the source has them.
        reference: the network as its own library runs it, model(x, t); None where that is ours.
    """

    name: str
    format: str
    sha256: str
    weights: dict[str, Tensor]
    unet: dict | None
    scheduler: dict | None
    variance_type: str
    fields: dict = field(default_factory=dict)
    reference: Callable[[], Callable] | None = None

    def record(self) -> dict:
        """What config.yaml keeps: enough to build the network without the source."""
        return {
            "source": self.name, "format": self.format, "sha256": self.sha256, "unet": self.unet,
            "scheduler": self.scheduler, "variance_type": self.variance_type,
        }


def open_source(
    name: str, *, allow_pickle: bool = False, num_heads: int | None = None, resolution: int = 32,
    timesteps: int = 1000, rescale_timesteps: bool = True, ema: float | None = None,
    field: str = "init_from",
) -> Source:
    """Read and check a model.

    Args:
        name: a diffusers directory, a name on the Hub, a run directory, or a state dict of
            improved-diffusion (.pt, .safetensors).
        allow_pickle: read pickle files too, tensors only.
        num_heads: attention heads, where the source does not tell.
        resolution: side of the images, where the source does not tell.
        timesteps: length T of the diffusion, where the source does not tell.
        rescale_timesteps: of improved-diffusion: whether the network was told t * 1000 / T.
        ema: of a run: the decay rate of the average to read; the first of the run's if None.
        field: what to call ``name`` in errors.

    Raises:
        UsageError: if there is no such model, or it is one that cannot be treated.
    """
    path = Path(name).expanduser()
    try:
        is_run = (path / "config.yaml").is_file()
        if ema is not None and not is_run:
            raise UsageError(f"ema is {ema}, but only a run has averages to choose from: leave it "
                             "out")
        if num_heads is not None and is_run:
            raise UsageError(f"num_heads is {num_heads}, but a run tells it itself: leave it out")
        if path.is_file():
            table = timesteps if rescale_timesteps and timesteps != 1000 else None
            return _open_file(name, path, allow_pickle, num_heads, resolution, table)
        if is_run:
            return _open_run(name, path, ema)
        if path.is_dir():
            return _open_diffusers(name, path, allow_pickle, num_heads)
        if _is_hub_name(name):
            return _open_diffusers(name, _download(name, ["*.json"]), allow_pickle, num_heads, True)
        raise UsageError("there is no such file or directory: give a diffusers directory, a run "
                         "directory, an improved-diffusion .pt, or a name on the Hub (owner/model)")
    except UsageError as error:
        raise UsageError(f"{field} is {name!r}: {error}") from None
    except OSError as error:
        raise UsageError(f"{field} is {name!r}: it cannot be read ({error.strerror})") from None


# Making a run start from it.


def settle(config: TrainConfig) -> TrainConfig:
    """A configuration whose network and schedule are those of its ``init_from``.

    A resumed run takes them from its own config.yaml: the source may be gone.

    Raises:
        UsageError: as `open_source`.
    """
    if config.init_from is None or config.pretrained is not None:
        return config
    if config.resume:
        saved = TrainConfig.from_dict(read_config(config.out), str(config.out / "config.yaml"))
        names = ("pretrained", *NETWORK_FIELDS, *SCHEDULE_FIELDS)
        return replace(config, **{name: getattr(saved, name) for name in names})
    source = _open_for(config)
    return replace(config, pretrained=source.record(), **source.fields)


def check_settled(config: TrainConfig, settled: TrainConfig) -> None:
    """Raise a UsageError if ``config`` asks for another network or schedule than its source's."""
    told = () if "schedule" in untold(settled) else SCHEDULE_FIELDS
    for name in (*NETWORK_FIELDS, *told):
        asked, given = getattr(config, name), getattr(settled, name)
        if asked != given:
            raise UsageError(f"{name} is {asked!r}, but {given!r} in the model that init_from "
                             f"names, {config.init_from}: leave it out")


def untold(settled: TrainConfig) -> list[str]:
    """Fields that the model a settled configuration starts from does not tell itself."""
    told = settled.pretrained
    if told["format"] == "run":
        return []
    sized = told["format"] == "diffusers" and told["unet"]["sample_size"] is not None
    return ["resolution"] * (not sized) + ["schedule"] * (not told["scheduler"])


def start_from(config: TrainConfig, model: nn.Module) -> Source:
    """Load the weights that a settled configuration starts from into its network.

    Raises:
        UsageError: if they are not those that the configuration was settled with.
    """
    source = _open_for(config)
    if source.sha256 != config.pretrained["sha256"]:
        raise UsageError(
            f"init_from is {config.init_from!r}: its sha256 is {source.sha256}, but the run was "
            f"set up with {config.pretrained['sha256']}; put back that model, or start a new run"
        )
    _check_shapes(_shapes(model.state_dict()), _shapes(source.weights))
    model.load_state_dict(source.weights)
    return source


def _open_for(config: TrainConfig) -> Source:
    return open_source(
        config.init_from, allow_pickle=config.allow_pickle, num_heads=config.num_heads,
        resolution=config.resolution, timesteps=config.timesteps,
        rescale_timesteps=config.rescale_timesteps,
    )


def describe(source: Source, schedule: NoiseSchedule | None) -> list[str]:
    """What a source is, in a few lines; ``schedule`` is None where nobody tells it."""
    count = sum(value.numel() for value in source.weights.values())
    lines = [f"{source.name} ({source.format}), sha256 {source.sha256}"]
    if source.unet is None:
        lines.append(f"{count:,} parameters")
    else:
        unet = source.unet
        heads = sorted(improved.attention_heads(unet))
        lines.append(
            f"{count:,} parameters, {' or '.join(map(str, heads))} attention head"
            f"{'' if heads == [1] else 's'}, {unet['in_channels']} channels in, "
            f"{unet['out_channels']} out, made for images of {unet['sample_size']} pixels"
        )
    stated = source.scheduler is not None or "schedule" in source.fields
    noise = "unknown" if schedule is None else schedule.name if stated else (
        f"{schedule.name} (as configured: the weights do not tell it)")
    assumed = " (assumed: its file does not tell)" if source.format == "improved-diffusion" else ""
    lines.append(f"noise schedule {noise}, predicts epsilon{assumed}, variance "
                 f"{source.variance_type}")
    if source.format == "improved-diffusion" and schedule is not None and len(schedule) != 1000:
        told = "t * 1000 / T" if source.unet["num_train_timesteps"] else "t"
        lines.append(f"its network is told the timestep as {told} (--rescale-timesteps)")
    return lines


def probe(source: Source, model: nn.Module, shape: tuple[int, ...], steps: int) -> str:
    """Compare a network with the source as its own library runs it; one line for the screen.

    Args:
        source: what the network was loaded from.
        model: our network, in eval mode.
        shape: of one sample.
        steps: length of the diffusion.

    Raises:
        RunError: if they differ.
    """
    if source.reference is None:
        return "probe: none, for there is nothing to compare with"
    theirs, largest = difference(source.reference(), model, shape, steps)
    text = f"largest difference from the network of {source.format} {theirs:.2g}"
    if not theirs <= TOLERANCE * max(largest, 1e-3):
        raise RunError(f"init_from is {source.name!r}: {text}, of outputs up to {largest:.2g}: the "
                       "network was not understood; please report this model")
    return f"probe: {text}, of outputs up to {largest:.2g}"


@torch.no_grad()
def difference(
    reference: Callable, model: Callable, shape: tuple[int, ...], steps: int
) -> tuple[float, float]:
    """Largest difference between two networks on fixed inputs, and the reference's largest value.

    All output channels are compared, those of a learned variance too.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, *shape, generator=generator)
    t = torch.tensor([0, steps // 3, steps - 1])
    outputs = []
    for network in (reference, model):
        place = next(network.parameters()).device if isinstance(network, nn.Module) else "cpu"
        out = network(x.to(place), t.to(place))
        outputs.append(getattr(out, "sample", out).double().cpu())
    return (outputs[0] - outputs[1]).abs().max().item(), outputs[0].abs().max().item()


def network_of(source: Source) -> nn.Module:
    """A source's UNet, in eval mode."""
    from diffusers import UNet2DModel

    model = UNet2DModel(**source.unet)
    model.load_state_dict(source.weights)
    return model.eval().requires_grad_(False)


# Readers.


def _open_run(name: str, path: Path, ema: float | None) -> Source:
    config = TrainConfig.from_dict(read_config(path), "its config.yaml")
    rate = config.ema_rates[0] if ema is None else ema
    if rate not in config.ema_rates:
        raise UsageError(f"ema is {rate}: it has averages of {config.ema_rates}")
    average = f"ema_{rate}"
    found = load_newest(path / "checkpoints", names=[average])
    if found is None:
        raise UsageError("it has no checkpoint yet: train it for at least one interval")
    origin = config.pretrained or {}
    unet = None
    if config.network == "unet":
        unet = _arguments(
            {**(origin.get("unet") or _plain(unet_config(config, sample_kind(found)[0][0]))),
             "sample_size": config.resolution}
        )
    weights = averaged_weights(found, average, config)
    told = found.state["origin"]["sha256"].encode() if config.lora else b""
    file = (found.path / f"{average}.safetensors").read_bytes()
    fields = {name: getattr(config, name)
              for name in (*NETWORK_FIELDS, *SCHEDULE_FIELDS, "resolution", "clip_samples")}
    return Source(
        name, "run", _sha256(file + told), weights, unet, origin.get("scheduler"),
        origin.get("variance_type", "fixed_large"), fields,
    )


def _open_file(
    name: str, path: Path, allow_pickle: bool, num_heads: int | None, resolution: int,
    table: int | None,
) -> Source:
    if path.suffix == ".pkl":
        raise UsageError(
            "a .pkl (as EDM's) holds program code that loading it would run: export its weights "
            "with the program that wrote it, and give those"
        )
    weights, sha256 = _read_weights(path, allow_pickle)
    weights = _renamed(weights)
    if improved.FIRST not in weights:
        raise UsageError(
            f"its tensors ({', '.join(list(weights)[:3])}, ...) are not named as in "
            "improved-diffusion: for a diffusers model, name the directory with its config.json"
        )
    unet = _arguments(improved.unet_arguments(_shapes(weights), num_heads, resolution, table))
    _check_side("resolution", resolution, unet)
    expected = improved.from_diffusers(_skeleton(unet), unet)
    _check_shapes(_shapes(expected), _shapes(weights))
    scale = 1000 / table if table else 1
    return Source(
        name, "improved-diffusion", sha256, improved.to_diffusers(weights, unet), unet, None,
        _variance_type(unet, None), _network_fields(unet, resolution),
        lambda: lambda x, t: improved.forward(weights, num_heads, x, t * scale),
    )


def _open_diffusers(
    name: str, folder: Path, allow_pickle: bool, num_heads: int | None, on_hub: bool = False
) -> Source:
    index = folder / "model_index.json"
    if index.is_file():
        _check_pipeline(_read_json(index))
    nested = (folder / "unet" / "config.json").is_file()
    place = folder / "unet" if nested else folder
    if not (place / "config.json").is_file():
        raise UsageError("it holds no model: neither config.yaml (a run), nor unet/config.json or "
                         "config.json (diffusers)")
    unet, needed = _unet(_read_json(place / "config.json"), num_heads)
    file = folder / "scheduler" / "scheduler_config.json" if nested else (
        folder / "scheduler_config.json")
    scheduler = _read_json(file) if file.is_file() else None
    if scheduler is not None:
        _check_scheduler(scheduler)
    if on_hub:
        names = _weights_names(place, allow_pickle)
        _download(name, [f"{'unet/' if nested else ''}{file}" for file in names])
    files = _weights_files(place, allow_pickle)
    found, sha256 = _read_all(files, allow_pickle)
    weights = _renamed(found)
    _check_shapes(needed, _shapes(weights))

    def reference() -> nn.Module:
        from diffusers import UNet2DModel

        log = logging.getLogger("diffusers")
        level = log.level
        log.setLevel(logging.ERROR)  # it warns of the keys that we have looked at
        try:
            model = UNet2DModel.from_pretrained(
                place, use_safetensors=files[0].suffix == ".safetensors", local_files_only=True,
                attention_head_dim=unet["attention_head_dim"],
            )
        finally:
            log.setLevel(level)
        return model.float().eval().requires_grad_(False)

    # Names with the prefixes of wrappers are unknown to diffusers itself.
    foreign = any(_without_wrappers(key) != key for key in found)
    fields = _network_fields(unet, unet["sample_size"])
    known = None
    if unet["sample_size"] is not None:
        fields["resolution"] = unet["sample_size"]
    if scheduler is not None:
        known = {key: scheduler.get(key, value) for key, value in _SCHEDULER_FIELDS.items()}
        cosine = known["beta_schedule"] == "squaredcos_cap_v2"
        fields |= dict(schedule="cosine" if cosine else "linear",
                       timesteps=len(schedule_from(known)),
                       clip_samples=bool(scheduler.get("clip_sample", True)))
    return Source(
        name, "diffusers", sha256, weights, unet, known,
        _variance_type(unet, scheduler), fields, None if foreign else reference,
    )


def _check_pipeline(index: dict) -> None:
    kind = str(index.get("_class_name"))
    if kind in ("DDPMPipeline", "DDIMPipeline", "PNDMPipeline"):
        return
    parts = [part for part in ("text_encoder", "vae", "vqvae", "transformer") if part in index]
    if "text_encoder" in parts:
        why = ("a text-to-image model: its loss needs captions, a text encoder and a VAE; use "
               "robustdm.Objective in a training loop of your own that has them")
    elif parts:
        why = (f"a model of latents ({', '.join(parts)}): its data would have to be encoded first; "
               "encode them, and use robustdm.Objective in a training loop of your own")
    else:
        why = ("no pipeline of an unconditional model of pixels that predicts epsilon: only "
               "DDPMPipeline, DDIMPipeline and PNDMPipeline are")
    raise UsageError(f"{kind} is {why}")


def _unet(values: dict, num_heads: int | None) -> tuple[dict, dict[str, tuple[int, ...]]]:
    """The arguments of ``UNet2DModel`` that a config.json stands for, and its tensors' shapes."""
    kind = values.get("_class_name", "UNet2DModel")
    if kind != "UNet2DModel":
        raise UsageError(
            f"its network is a {kind}: that is conditioned on more than the timestep (on text, if "
            "UNet2DConditionModel); only UNet2DModel can be treated, others by robustdm.Objective "
            "in a training loop of your own"
        )
    own = {key: value for key, value in values.items()
           if not key.startswith("_") and key not in _EMA_KEYS}
    unet = _arguments(own)
    if unet["class_embed_type"] is not None or unet["num_class_embeds"] is not None:
        raise UsageError("its network is class-conditional: that needs labels in the data and in "
                         "the loss; only unconditional models can be treated")
    if unet["time_embedding_type"] == "fourier":
        raise UsageError("its network takes noise scales (time_embedding_type 'fourier'), not the "
                         "timesteps of a DDPM that predicts epsilon")
    needed = _shapes(_skeleton(unet))
    side = unet["sample_size"]
    if isinstance(side, list) and len(side) == 2 and side[0] == side[1]:
        unet["sample_size"] = side = side[0]
    if side is not None:
        _check_side("sample_size", side, unet)
    if "attention_head_dim" in own:
        if num_heads is not None:
            raise UsageError(f"num_heads is {num_heads}, but its config.json has "
                             f"attention_head_dim {own['attention_head_dim']}: leave it out")
    elif num_heads is None and str(values.get("_diffusers_version", "")).startswith("0.0."):
        # Before diffusers wrote every argument, a missing one meant DDPM's single head. Today's
        # default, heads of 8 channels, would load just as well and compute something else.
        unet["attention_head_dim"] = None
    else:
        unet["attention_head_dim"] = improved.head_dim(num_heads, improved.attention_widths(unet))
    return unet, needed


def _arguments(values: dict) -> dict:
    """All arguments of ``UNet2DModel``, plain, with its defaults where ``values`` say nothing."""
    from diffusers import UNet2DModel

    parameters = dict(list(inspect.signature(UNet2DModel.__init__).parameters.items())[1:])
    for key in values:
        if key not in parameters:
            close = difflib.get_close_matches(key, parameters, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "UNet2DModel has no such argument"
            raise UsageError(f"its config.json has an unknown key {key!r}: {hint}")
    return _plain({name: p.default for name, p in parameters.items()} | values)


def _check_side(name: str, side, unet: dict) -> None:
    stride = 2 ** (len(unet["block_out_channels"]) - 1)
    if type(side) is not int or side < 1 or side % stride:
        raise UsageError(f"{name} is {side!r}: it must be the side of square images, a multiple of "
                         f"{stride} for a network of {len(unet['block_out_channels'])} resolutions")


def _check_scheduler(values: dict) -> None:
    with importing("diffusers"):
        from diffusers import DDPMScheduler

    kind = values.get("_class_name", "DDPMScheduler")
    if kind not in [found.__name__ for found in DDPMScheduler().compatibles]:
        raise UsageError(f"its scheduler is a {kind}: only those with DDPM's discrete noise "
                         "schedule can be treated, such as DDPMScheduler and DDIMScheduler")
    wanted = values.get("prediction_type", "epsilon")
    if values.get("predict_epsilon") is False:
        wanted = "sample"
    if wanted != "epsilon":
        raise UsageError(f"it predicts {wanted!r} (prediction_type): the equivariance loss is "
                         "defined for epsilon; a loss for other predictions would be needed")
    if values.get("rescale_betas_zero_snr"):
        raise UsageError("its last timestep is noise alone (rescale_betas_zero_snr), where epsilon "
                         "tells nothing of the image: such schedules are not treated")


def _variance_type(unet: dict, scheduler: dict | None) -> str:
    channels, out = unet["in_channels"], unet["out_channels"]
    ddpm = scheduler is not None and scheduler.get("_class_name") == "DDPMScheduler"
    default = "fixed_small" if ddpm else "fixed_large"
    kind = str((scheduler or {}).get("variance_type", default))
    if out == 2 * channels:
        return kind if kind in ("learned", "learned_range") else "learned_range"
    if out != channels:
        raise UsageError(f"its network has {channels} channels in and {out} out: it must predict "
                         "the noise, and may predict a variance beside it")
    if kind in ("learned", "learned_range"):
        raise UsageError(f"its scheduler has variance_type {kind!r}, but its network only "
                         f"{out} output channels: {2 * channels} would be needed")
    if kind.removesuffix("_log") not in ("fixed_small", "fixed_large"):
        raise UsageError(f"its scheduler has variance_type {kind!r}, which is none of diffusers'")
    return kind


def _network_fields(unet: dict, side) -> dict:
    """The fields of `TrainConfig` that say what a ``UNet2DModel`` is, as far as they can."""
    attends = ["Attn" in kind for kind in unet["down_block_types"]]
    sides = [side // 2**i for i in range(len(attends))] if isinstance(side, int) else []
    return dict(
        network="unet",
        block_channels=tuple(unet["block_out_channels"]),
        layers_per_block=unet["layers_per_block"],
        attention_resolutions=tuple(s for s, a in zip(sides, attends, strict=False) if a),
        attention_head_dim=unet["attention_head_dim"],
        norm_groups=unet["norm_num_groups"],
        scale_shift_norm=unet["resnet_time_scale_shift"] == "scale_shift",
    )


# Weights.


def _weights_names(folder: Path, allow_pickle: bool) -> list[str]:
    """The files that weights may be in, as far as what is in a model's folder tells."""
    names = []
    for end in ("safetensors", "bin") if allow_pickle else ("safetensors",):
        index = folder / f"{_WEIGHTS}.{end}.index.json"
        names += _shards(index) if index.is_file() else [f"{_WEIGHTS}.{end}"]
    return names


def _weights_files(folder: Path, allow_pickle: bool) -> list[Path]:
    """The file, or files, that a model's weights are in."""
    for end in ("safetensors", "bin"):
        file = folder / f"{_WEIGHTS}.{end}"
        index = file.with_name(f"{file.name}.index.json")
        if not (file.is_file() or index.is_file()):
            continue
        if end == "bin" and not allow_pickle:
            raise UsageError(f"its weights are a pickle, {file.name}: add --allow-pickle to read "
                             "it (tensors only, no code is run), or save it as safetensors")
        return [file] if file.is_file() else [folder / name for name in _shards(index)]
    raise UsageError(f"it has no weights: {_WEIGHTS}.safetensors is missing")


def _shards(index: Path) -> list[str]:
    """The files that an index of weights in several files names: plain names, beside it."""
    names = _read_json(index).get("weight_map")
    names = sorted(set(map(str, names.values()))) if isinstance(names, dict) else []
    if not names:
        raise UsageError(f"{index.name} has no weight_map, which names a file for each tensor")
    suffix = index.name.removesuffix(".index.json").removeprefix(_WEIGHTS)
    for name in names:
        if not re.fullmatch(r"[\w-][\w.-]*", name) or not name.endswith(suffix):
            raise UsageError(f"{index.name} names {name!r}, which is no {suffix} file beside it")
    return names


def _read_all(files: list[Path], allow_pickle: bool) -> tuple[dict[str, Tensor], str]:
    """The tensors of some files, and a hash: of several files, that of their sha256s in a row."""
    weights: dict[str, Tensor] = {}
    hashes = []
    for file in files:
        found, sha256 = _read_weights(file, allow_pickle)
        if twice := weights.keys() & found.keys():
            raise UsageError(f"two of its files hold {min(twice)}")
        weights |= found
        hashes.append(sha256)
    return weights, hashes[0] if len(hashes) == 1 else _sha256("".join(hashes).encode())


def _read_weights(path: Path, allow_pickle: bool) -> tuple[dict[str, Tensor], str]:
    """float32 tensors by name, and the sha256 of the very bytes that were parsed."""
    pickle = path.suffix != ".safetensors"
    if pickle and path.suffix not in _PICKLES:
        raise UsageError(f"{path.suffix or 'a file without suffix'} is no format of weights: give "
                         f"{', '.join(_PICKLES)} or .safetensors")
    if pickle and not allow_pickle:
        raise UsageError(f"{path.suffix} files are pickles: add --allow-pickle to read it (tensors "
                         "only, no code is run)")
    try:
        data = path.read_bytes()
        if pickle:
            weights = load_pickle(data)
        else:
            weights = load_safetensors(data)
    except OSError as error:
        raise UsageError(f"{path.name} cannot be read: {error.strerror}") from None
    except Exception as error:  # each parser raises a dozen kinds for a damaged or hostile file
        text = (str(error).strip().splitlines() or [""])[0][:200]
        raise UsageError(f"{path.name} holds no plain tensors, and nothing of it was run "
                         f"({type(error).__name__}: {text})") from None
    if not isinstance(weights, dict) or not weights or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in weights.items()
    ):
        held = list(weights)[:5] if isinstance(weights, dict) else type(weights).__name__
        raise UsageError(f"{path.name} holds {held}: give a state dict alone, names and tensors")
    # A pickle can repeat a few bytes as a tensor of any size, and one tensor under any number of
    # names, which would be copies from here on.
    if sum(value.numel() for value in weights.values()) > 2 * len(data):
        raise UsageError(f"{path.name}: its tensors are larger than the file")
    found = {}
    for key, value in weights.items():
        try:
            if not value.is_floating_point():
                raise ValueError
            found[key] = value.float()  # before it is looked at: of float8 torch knows no isfinite
            if not bool(found[key].isfinite().all()):
                raise ValueError
        except (ValueError, RuntimeError):  # of sparse and other special tensors
            raise UsageError(
                f"{path.name}: {key} holds something else than finite numbers") from None
    return found, _sha256(data)


def _renamed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of today: without wrappers' prefixes, attention as diffusers has it now."""
    found = {}
    for name, value in weights.items():
        parts = _without_wrappers(name).split(".")
        if "attentions" in parts:
            parts = [_OLD_ATTENTION.get(part, part) for part in parts]
        new = ".".join(parts)
        if new in found:
            raise UsageError(f"two of its tensors stand for {new}")
        found[new] = value
    return found


def _without_wrappers(name: str) -> str:
    """A name without what torch.compile and DistributedDataParallel put before it."""
    parts = [part for part in name.split(".") if part != "_orig_mod"]
    while parts[:1] == ["module"]:
        parts = parts[1:]
    return ".".join(parts)


def _skeleton(unet: dict) -> dict[str, Tensor]:
    """The state dict of a ``UNet2DModel``, without memory for it."""
    with torch.device("meta"):
        return make_unet(unet).state_dict()


def _check_shapes(needed: dict[str, tuple], found: dict[str, tuple]) -> None:
    if problems := shape_problems(needed, found):
        raise UsageError(f"its weights do not fit its network: {some_of(problems)}")


def _shapes(weights: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in weights.items()}


# Files and the Hub.


def _read_json(path: Path) -> dict:
    try:
        with open(path, "rb") as file:
            text = file.read(_JSON_LIMIT + 1)
        values = json.loads(text) if len(text) <= _JSON_LIMIT else None
    except (OSError, ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise UsageError(f"{path.name} is no JSON object")
    return values


def _is_hub_name(name: str) -> bool:
    """Whether it looks like owner/model and not like a slip in a local path."""
    match = re.fullmatch(r"([A-Za-z0-9][\w.-]*)/[\w.-]+", name)
    return bool(match) and not Path(match[1]).is_dir()


def _download(name: str, patterns: list[str]) -> Path:
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # no network, no such model, no right to read it, no room, ...
        text = (str(error).strip().splitlines() or [type(error).__name__])[0].split(". ")[0][:200]
        raise UsageError(
            f"there is no such path here, and it could not be had from the Hub ({text}): check "
            f"the name; without a network, run `hf download {name} --local-dir DIR` where there "
            "is one, and give DIR"
        ) from None


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _plain(value):
    """Tuples as lists, as YAML and JSON give them back."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
