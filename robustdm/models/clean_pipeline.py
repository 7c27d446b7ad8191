"""A diffusers pipeline that removes the noise of its training data in the last step."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from diffusers import DDPMPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from robustdm.errors import UsageError
from robustdm.method.baselines import Baseline
from robustdm.models.pipeline import NOISE, write_noise


class CleanPipeline(DDPMPipeline):
    """Samples a network that learned noisy data as ``--baseline known`` does: the chain ends at the
    noise of the data, and its last step predicts clean data.

    ``CleanPipeline.from_pretrained("runs/x/pipeline")`` opens what `robustdm.train` writes, and
    any folder or Hub repository of a DDPMPipeline if ``data_noise`` is given. The scheduler may be
    replaced by any whose states are sqrt(abar) x0 + sqrt(1 - abar) eps: DDIM, DPM-Solver++, ...

    Args:
        unet, scheduler: as of DDPMPipeline; the network predicts noise.
        data_noise: standard deviation of the noise in the training data, root mean square over
            items; images are in [-1, 1]. None corrects nothing.
        stop, safety: as of `robustdm.method.baselines.Baseline`.

    Raises:
        UsageError: for a value out of range.
    """

    def __init__(self, unet, scheduler, data_noise: float | None = None, stop: float = 1.0,
                 safety: float = 0.9):
        super().__init__(unet, scheduler)
        self.baseline = None
        if data_noise is not None:
            self.baseline = Baseline("known", data_noise, stop=stop, safety=safety)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs) -> CleanPipeline:
        """As of any diffusers pipeline; ``data_noise``, ``stop`` and ``safety`` may be given too.

        Only safetensors are read unless ``use_safetensors=False`` is given.

        Raises:
            UsageError: if ``data_noise`` is neither given nor stored beside the pipeline.
        """
        kwargs = {"use_safetensors": True} | kwargs
        ours = {name: kwargs.pop(name) for name in ("data_noise", "stop", "safety")
                if name in kwargs}
        if ours.get("data_noise") is None:
            ours["data_noise"] = _stored(pretrained_model_name_or_path, kwargs)
        plain = DDPMPipeline.from_pretrained(pretrained_model_name_or_path, **kwargs)
        return cls(plain.unet, plain.scheduler, **ours)

    def save_pretrained(self, save_directory, **kwargs) -> None:
        """Write a plain DDPMPipeline, and the noise beside it."""
        plain = DDPMPipeline(self.unet, self.scheduler)
        plain.save_pretrained(save_directory, **kwargs)
        if self.baseline is not None:
            write_noise(save_directory, self.baseline.strength)

    @torch.no_grad()
    def __call__(
        self, batch_size: int = 1, generator=None, num_inference_steps: int = 1000,
        output_type: str | None = "pil", return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Generate images; arguments and result as of DDPMPipeline.

        Raises:
            UsageError: for a scheduler of another kind, or a noise above all of its states.
        """
        scheduler, config = self.scheduler, self.unet.config
        if self.baseline is None:
            return super().__call__(batch_size, generator, num_inference_steps, output_type,
                                    return_dict)
        table = getattr(scheduler, "alphas_cumprod", None)
        kind = getattr(scheduler.config, "prediction_type", "epsilon")
        if table is None or float(scheduler.init_noise_sigma) != 1 or kind != "epsilon":
            raise UsageError(f"scheduler is a {type(scheduler).__name__} of {kind}: its states or "
                             "predictions are of another form; use DDPM, DDIM or DPM-Solver++ of "
                             "epsilon")
        scheduler.set_timesteps(num_inference_steps)
        settings = self.baseline.settings
        visited = [t for t in scheduler.timesteps if _noise(table, t) >= settings["stop"]]
        if not visited:
            raise UsageError(f"data_noise is {self.baseline.strength:g}: no state of the scheduler "
                             "has as much noise")
        side = config.sample_size
        shape = (batch_size, config.in_channels,
                 *((side, side) if isinstance(side, int) else side))
        device = self._execution_device
        x = randn_tensor(shape, generator=generator, device=device, dtype=self.unet.dtype)
        for t in self.progress_bar(visited[:-1]):
            x = scheduler.step(self.unet(x, t).sample, t, x, generator=generator).prev_sample
        t = visited[-1]
        noise, abar = _noise(table, t), table[int(t)].item()
        factor = (1 + (settings["data_noise"] / noise) ** 2) * noise
        eps = self.unet(x, t).sample[:, : x.shape[1]]  # some networks predict a variance too
        x = x / math.sqrt(abar) - factor * eps
        images: Tensor = (x / 2 + 0.5).clamp(0, 1)
        if output_type != "pt":
            images = images.cpu().permute(0, 2, 3, 1).float().numpy()
            if output_type == "pil":
                images = self.numpy_to_pil(images)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)


def _noise(table: Tensor, t: Tensor) -> float:
    abar = table[int(t)].item()
    return math.sqrt((1 - abar) / abar)


def _stored(name: Path | str, options: dict) -> float:
    path = Path(name) / NOISE
    if not Path(name).is_dir():
        from huggingface_hub import errors, hf_hub_download

        known = {k: options[k] for k in ("revision", "cache_dir", "token", "local_files_only")
                 if k in options}
        try:
            path = Path(hf_hub_download(str(name), NOISE, **known))
        except (errors.HfHubHTTPError, errors.HFValidationError, OSError):
            pass  # said below
    try:
        return float(json.loads(path.read_text(encoding="utf-8"))["rms"])
    except (OSError, ValueError, TypeError, KeyError):
        raise UsageError(f"data_noise is not given, and {name} has no {NOISE} with it: give the "
                         "standard deviation of the training data's noise, images in [-1, 1]"
                         ) from None
