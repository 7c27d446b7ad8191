"""What rank 0 writes beside metrics and checkpoints: samples, reference, pipeline, summary."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from robustdm.data.noise import RECORD, noise_of
from robustdm.device import device_name
from robustdm.errors import RunError, UsageError
from robustdm.method.baselines import CLEAN, Baseline
from robustdm.metrics.noise import TooFewItems, smallest_variance
from robustdm.models import lora
from robustdm.models.pipeline import replacing, save_pipeline
from robustdm.ops.stream import shuffled
from robustdm.reporting import images
from robustdm.reporting.run_page import REDUCED_CONTRAST, write_report
from robustdm.runs.rundir import RunDir, write_bytes, write_json
from robustdm.training.trackers import Logger
from robustdm.training.trainer import Trainer

# Items whose noise is measured before training: a second's work.
_LOOKED_AT = 1024
# Samples of which the noise is told, at least.
_FEW = 32


class Outputs:
    """Writes a run's outputs; a full disk costs them and a warning, not the run.

    Args:
        trainer: the run's.
        run: its directory.
        loggers: what else is told of samples.
        warn: told, in one line, what went wrong.
    """

    def __init__(self, trainer: Trainer, run: RunDir, loggers: Logger,
                 warn: Callable[[str], None]):
        self.trainer, self.config, self.run_dir = trainer, trainer.config, run
        self.loggers, self.warn = loggers, warn
        self.lost: list[str] = []
        self.noise: dict = {}

    def write_first(self) -> None:
        """What can be written before the first step."""
        for path, reason in self.trainer.data.quarantine[:3]:
            self.warn(f"left out {path}: {reason} (all are listed in quarantine.txt)")
        self.write_quarantine()
        self.write_reference()

    def write_quarantine(self) -> None:
        """List the files that could not be read; streamed sets find them while they train."""
        bad = self.trainer.data.quarantine
        if bad:
            text = "".join(f"{path}\t{reason}\n" for path, reason in bad)
            self._keep(self.run_dir.path / "quarantine.txt", lambda file: file.write(text.encode()))

    def _keep(self, path: Path, save: Callable[[BinaryIO], object]) -> None:
        """Write a file that training can do without: a full disk costs the file and a warning."""
        content = io.BytesIO()
        save(content)
        try:
            write_bytes(path, content.getvalue())
        except RunError as error:
            self.lost.append(path.name)
            self.warn(str(error))

    def write_samples(self, samples: Tensor, name: str) -> dict[str, float]:
        data, place = self.trainer.data, self.run_dir.samples
        self._keep(place / f"{name}.npz",
                   lambda file: np.savez_compressed(file, samples=samples.numpy()))
        if data.is_image:
            shown = samples[:64] * (1.0 if self.config.clip_samples else REDUCED_CONTRAST)
            grid = images.grid(shown)
            self._keep(place / f"{name}.png",
                       lambda file: images.to_pil(grid).save(file, format="png"))
            self.loggers.images(self.trainer.step, "samples", grid)
        return data.measure(samples)

    def write_reference(self) -> None:
        """Training data and the same items clean, for the report; and a look at their noise."""
        data = self.trainer.data
        # At random: files and digits often stand in the order they were taken.
        indices = shuffled(self.config.seed, 0, len(data))[: max(self.config.num_samples, 256)]
        train, clean = data.batch(indices, "cpu"), data.clean(indices, "cpu")
        arrays = {"train": train.numpy()}
        if not torch.equal(train, clean):
            arrays["clean"] = clean.numpy()
        self.reference = {name: data.measure(torch.from_numpy(a)) for name, a in arrays.items()}
        self._keep(self.run_dir.samples / "reference.npz",
                   lambda file: np.savez_compressed(file, **arrays))
        self._look_for_noise()

    def _look_for_noise(self) -> None:
        """Measure the noise of the training data, as they are learned from, and record it."""
        try:
            found = noise_of(self.trainer.data, self.config.seed, _LOOKED_AT)
        except UsageError:  # too few items to tell
            return
        self.noise = found.record()
        text = json.dumps(self.noise, indent=1) + "\n"
        self._keep(self.run_dir.path / RECORD, lambda file: file.write(text.encode()))
        if found.kind == "clean" and self.trainer.data.is_image and self.config.objective != "ddpm":
            self.warn(
                f"the training images look clean (noise sd {found.rms:.3f}): there the robust "
                "objective costs quality (FID 29 against 7 in the paper); --objective ddpm does not"
            )

    def _correctable(self) -> float | None:
        """Noise that the last step of a chain can be corrected for: white, and learned as it is."""
        white = self.noise.get("kind") in ("gaussian", "mixture")
        return self.noise["rms"] if white and self.config.objective == "ddpm" else None

    def correction(self) -> dict[str, float]:
        """Settings of the sampler that draw the report's samples without the data's noise."""
        noise = self._correctable() if self.config.correct_samples else None
        return {} if noise is None else Baseline("known", noise).settings

    def _warn_of_noise(self, samples: dict[str, float]) -> None:
        """Say so if the samples carry most of the noise that the training data have."""
        train = self.reference["train"]
        # A set that knows its clean law measures noise better than the general estimate.
        key = "noise_rms" if "noise_rms" in train else "noise_level"
        known = key in samples and train.get(key, 0.0) > CLEAN
        if not known or self.config.objective == "ddpm":
            return
        floor = self.reference.get("clean", {}).get(key, 0.0)
        excess = train[key] ** 2 - floor**2
        kept = max(0.0, samples[key] ** 2 - floor**2) / excess if excess > 0 else 0.0
        if kept > 0.5:
            share = f"{kept:.0%}" if kept < 1 else "all or more"
            self.warn(
                f"the samples carry {share} of the training data's noise variance: train "
                "longer, raise --lam, or try another --lambda-mode"
            )

    def finish(self, samples: Tensor, averaged: nn.Module | None, **others) -> dict:
        """Write the last samples, the pipeline, the summary and the report.

        Args:
            samples: (n, ...) of the averaged weights.
            averaged: the network with these, for images.
            others: of the summary.

        Returns:
            The summary.

        Raises:
            RunError: if some of it could not be written.
        """
        trainer, config = self.trainer, self.config
        self.lost.clear()
        out = self.run_dir.path
        measures = {
            "samples": self.write_samples(samples, "final"),
            "training data": self.reference["train"],
        }
        if "clean" in self.reference:
            measures["clean data"] = self.reference["clean"]
        if trainer.data.is_image:
            self._warn_of_noise(measures["samples"])
            try:
                save_pipeline(
                    averaged, trainer.schedule, out / "pipeline",
                    clip_sample=config.clip_samples,
                    variance_type=(config.pretrained or {}).get("variance_type", "fixed_large"),
                    data_noise=self._correctable(),
                )
                if config.lora:
                    with replacing(out / "adapter") as folder:
                        lora.export(trainer.emas[0].model, folder)
            except (OSError, SafetensorError) as error:
                self.lost.append("pipeline")
                self.warn(f"{out / 'pipeline'} was not written: {error}")
        if self.lost:
            raise RunError(
                f"step {trainer.step} is saved, but {', '.join(self.lost)} could not be written to "
                f"{out}: make room, then --resume writes what is missing"
            )
        noise = {"training data": self.noise} if self.noise else {}
        if len(samples) >= _FEW and bool(samples.isfinite().all()):
            with contextlib.suppress(TooFewItems):
                noise["samples"] = {"rms": smallest_variance(samples) ** 0.5}
        summary = {
            "step": trainer.step,
            "measures": measures,
            "noise": noise,
            "skipped": int(trainer.metrics.skipped),
            "time_s": round(trainer.elapsed, 1),
            "device": device_name(trainer.device),
            "parameters": trainer.parameters,
        } | others
        write_json(out / "summary.json", summary)
        write_report(out)
        return summary
