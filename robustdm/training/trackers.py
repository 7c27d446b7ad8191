"""Optional sinks for metrics and pictures: TensorBoard and Weights & Biases.

``metrics.jsonl`` is always written by the run directory; the sinks here are extras that may fail
without stopping a run.
"""

import os
import sys
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from robustdm.errors import UsageError
from robustdm.runs.config import TrainConfig

INSTALL = 'pip install "robustdm[log]"'


class Sink(Protocol):
    """Where scalars and pictures go. Any method may raise; ``Logger`` looks after that."""

    name: str

    def log(self, step: int, scalars: dict[str, float]) -> None:
        """Record scalars of one step."""

    def images(self, step: int, name: str, grid: np.ndarray) -> None:
        """Record pictures: (N, H, W, C) uint8."""

    def close(self) -> None:
        """Flush and stop."""


class Logger:
    """Passes everything on to its sinks; a sink that fails is named once and switched off.

    Args:
        sinks: where to log; none is fine.
        warn: called with one line when a sink fails.
    """

    def __init__(self, sinks: Iterable[Sink] = (), warn: Callable[[str], None] | None = None):
        self.sinks = list(sinks)
        self._warn = warn or (lambda text: print(text, file=sys.stderr, flush=True))

    def log(self, step: int, scalars: Mapping) -> None:
        """Record the numbers of a metrics line; nested ones are named "outer/inner"."""
        numbers = flatten(scalars)
        self._each(lambda sink: sink.log(step, numbers))

    def images(self, step: int, name: str, grid: np.ndarray) -> None:
        """Record pictures: (H, W, C) or (N, H, W, C) uint8."""
        pictures = np.asarray(grid)
        if pictures.ndim == 3:
            pictures = pictures[None]
        self._each(lambda sink: sink.images(step, name, pictures))

    def close(self) -> None:
        """Close every sink; safe to call twice."""
        self._each(lambda sink: sink.close())
        self.sinks = []

    def _each(self, call: Callable[[Sink], None]) -> None:
        for sink in list(self.sinks):
            try:
                call(sink)
            except Exception as error:  # a broken log must never cost a run
                self.sinks.remove(sink)
                self._warn(
                    f"warning: {sink.name} failed and is switched off for the rest of this run "
                    f"({one_line(error)}); metrics.jsonl goes on"
                )


class TensorBoardSink:
    """Event files in run_dir/tensorboard; ``tensorboard --logdir`` shows them."""

    name = "TensorBoard"

    def __init__(self, run_dir: Path, start_step: int = 0):
        from torch.utils.tensorboard import SummaryWriter

        # A resumed run repeats the steps after its checkpoint: hide what they replace.
        self._writer = SummaryWriter(
            log_dir=str(run_dir / "tensorboard"), purge_step=start_step + 1 if start_step else None
        )

    def log(self, step: int, scalars: dict[str, float]) -> None:
        for key, value in scalars.items():
            self._writer.add_scalar(key, value, step)

    def images(self, step: int, name: str, grid: np.ndarray) -> None:
        self._writer.add_images(name, grid, step, dataformats="NHWC")

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """A run of the project "robustdm" (or $WANDB_PROJECT); its id is kept in the run directory."""

    name = "Weights & Biases"

    def __init__(self, config: TrainConfig, run_dir: Path):
        import wandb

        id_file = run_dir / "wandb-id.txt"
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:12] + "\n")
        self._wandb = wandb
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "robustdm"), name=run_dir.name,
            dir=str(run_dir), config=config.to_dict(), id=id_file.read_text().strip(),
            resume="allow",
        )
        # W&B drops a step smaller than the last one, which a resumed run would log.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, scalars: dict[str, float]) -> None:
        self._run.log({**scalars, "step": step})

    def images(self, step: int, name: str, grid: np.ndarray) -> None:
        # One channel is a plain (H, W) picture to W&B.
        pictures = [self._wandb.Image(p[..., 0] if p.shape[-1] == 1 else p) for p in grid]
        self._run.log({name: pictures, "step": step})

    def close(self) -> None:
        self._run.finish()


def make_loggers(
    config: TrainConfig,
    run_dir: Path,
    start_step: int = 0,
    warn: Callable[[str], None] | None = None,
) -> Logger:
    """The sinks that the configuration asks for, started.

    Args:
        config: ``tensorboard`` and ``wandb`` decide.
        run_dir: directory of the run; must exist.
        start_step: steps done before this process (a resumed run).
        warn: called with one line when a sink fails later on.

    Raises:
        UsageError: if a package is missing or its service cannot be reached at the start.
    """
    wanted = []
    if config.tensorboard:
        wanted.append(("tensorboard", lambda: TensorBoardSink(run_dir, start_step)))
    if config.wandb:
        wanted.append(("wandb", lambda: WandbSink(config, run_dir)))
    sinks: list[Sink] = []
    for field, make in wanted:
        try:
            sinks.append(make())
        except ImportError as error:
            raise UsageError(
                f"{field} is True, but the package {field} cannot be imported "
                f"({one_line(error)}): {INSTALL}, or leave --{field} out"
            ) from error
        except Exception as error:
            hint = "run `wandb login` or set WANDB_MODE=offline" if field == "wandb" else (
                f"check that {run_dir} is writable")
            raise UsageError(
                f"{field} is True, but it could not start ({one_line(error)}): {hint}, "
                f"or leave --{field} out"
            ) from error
    return Logger(sinks, warn)


def flatten(values: Mapping, prefix: str = "") -> dict[str, float]:
    """The numbers of nested mappings, keys joined by "/"; everything else is left out."""
    numbers: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            numbers.update(flatten(value, f"{prefix}{key}/"))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            numbers[f"{prefix}{key}"] = float(value)
    return numbers


def one_line(error: Exception) -> str:
    """Type and message of an error without line breaks, at most 200 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
