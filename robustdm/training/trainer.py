"""The state of a training run, and its optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from robustdm import ops
from robustdm.data import Data, load_data
from robustdm.device import cudnn_benchmark, resolve_device, to_device, to_host
from robustdm.distributed import ALONE, Ranks
from robustdm.errors import RunError, UsageError
from robustdm.host import fastest_threads, threads_are_given
from robustdm.method.gradients import Gradients
from robustdm.method.objectives import Objective, dropout_seed
from robustdm.method.sampling import sample
from robustdm.models import build_model, lora
from robustdm.models.build import set_attention
from robustdm.models.load_run import objective_of
from robustdm.models.pretrained import describe, probe, settle, start_from
from robustdm.models.weights import (
    check_finite,
    check_model_shapes,
    is_amount,
    load_optimizer,
    not_finite,
    optimizer_tensors,
)
from robustdm.ops import stream
from robustdm.ops.dropout import unfused_dropout
from robustdm.runs.checkpoint import (
    Checkpoint,
    list_checkpoints,
    load_origin,
    save_origin,
)
from robustdm.runs.config import TrainConfig
from robustdm.runs.rundir import check_same_data
from robustdm.training.cuda_graph import StepGraph
from robustdm.training.optimizer import EMA, SkippingAdamW
from robustdm.training.parallel import parallel_of
from robustdm.training.signals import SIGNALS
from robustdm.training.step_metrics import StepMetrics

HELDOUT_DRAWS = 256
"""Pairs of a held-out item and a timestep behind the held-out loss."""
PROBE_STEP = 2**32 - 1
"""Step number of held-out and compilation draws: one that no run reaches."""
WISHES = (*SIGNALS, "stop", "save")
"""What a rank may want the others to know; it travels with the gradients."""


class Trainer:
    """The state of a run and what can be done with it; `train` drives it.

    Args:
        config: the run's configuration.
        data: what to train on; what the configuration names if None.
        weights: to start from; random ones, or those that the configuration names, if None.
        ranks: the processes that share each batch; every one has a trainer, and calls
            `train_step`, `close_window` and `check_ranks` as the others do.

    Attributes:
        origin: the model that the weights started from, in a few lines; "" if there is none.
        parallel: how this process holds the network: `Replicated`, or `Sharded` if in parts.
        network: runs the passes.
        weights: the parameters that the optimizer updates, or this rank's part of each.
        metrics: what the steps came to.
        parameters, trained: numbers of the network, all and those that training changes.
    """

    def __init__(
        self, config: TrainConfig, data: Data | None = None,
        weights: dict[str, Tensor] | None = None, ranks: Ranks = ALONE,
    ):
        self.config = config = settle(config)
        self.ranks = ranks
        lora.check(config, weights is not None)
        self.device = resolve_device(config.device)
        ops.resolve("noise_perturb", config.backend, self.device, torch.float32)  # or say so now
        self.data = load_data(config) if data is None else data
        self.objective = objective_of(config)
        self.schedule = self.objective.schedule
        self.model = build_model(config, self.data.shape)
        if weights is not None:
            self.model.load_state_dict(weights)
        kind = parallel_of(config, ranks)
        kind.place(self.model, self.device)
        if self.data.is_image:
            # Convolutions are faster channels-last, on CPUs as on GPUs.
            self.model.to(memory_format=torch.channels_last)
            set_attention(self.model, config, self.device)
            if config.backend != "torch":
                from robustdm.models.fuse import fuse  # networks for points do without diffusers

                fuse(self.model)
        self.origin = self._load_origin() if weights is None else ""
        if config.lora:
            lora.add(self.model, config)
        self.model.train()
        self.emas = [EMA(self.model, rate) for rate in config.ema_rates]
        self.parallel = kind(config, self.model, self.emas, self.objective, ranks, self.device)
        self.network, self.weights = self.parallel.network, self.parallel.weights
        self.gradient_step = self.parallel.gradient_step
        self.optimizer = SkippingAdamW(
            nn.ParameterList(self.weights), config.lr, config.weight_decay, self.emas,
            self.parallel.copies, config.backend,
        )
        self.metrics = StepMetrics(
            config.batch_size // ranks.size, len(self.schedule), ranks, self.device
        )
        self._trained = [p for p in self.weights if p.requires_grad]
        self._seeded_dropout = bool(unfused_dropout(self.network))
        self._graph: StepGraph | None = None
        self.parameters = sum(p.numel() for p in self.model.parameters())
        self.trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        self._origin_file: dict | None = None
        self.step = 0
        self.elapsed = 0.0
        self.lr = 0.0
        self._wishes = torch.zeros(len(WISHES), device=self.device)
        self._agreed = torch.zeros(len(WISHES), device=self.device)

    def _load_origin(self) -> str:
        """Start from the model that the configuration names; what it is, for the screen.

        A resumed run has its weights in a checkpoint: the model may be gone.
        """
        config = self.config
        resumed = config.resume and list_checkpoints(config.out / "checkpoints")
        if config.pretrained is None or resumed:
            return ""
        source = start_from(config, self.model)
        lines = describe(source, self.schedule)
        lines.append(probe(source, self.model.eval(), self.data.shape, len(self.schedule)))
        return "init from  " + "\n           ".join(lines)

    def _update(self, x0: Tensor, key: Tensor, regularised: bool) -> None:
        """All that a step does on the device, which a CUDA graph can hold.

        Every random number belongs to a sample's place in the whole batch, so the numbers of ranks
        and of ``accumulate`` pieces do not change the result (except for ``reg_fraction``, which is
        of each piece, and for the masks of dropout that is not fused, one per piece).

        Args:
            x0: (B, ...) this rank's part of the data, images channels-last.
            key: (3,) int64 on the device: seed, step, 0.
            regularised: what the objective says of the step.
        """
        size, first = len(x0) * self.ranks.size, len(x0) * self.ranks.rank
        pieces = x0.chunk(self.config.accumulate)
        parts: list[Gradients] = []
        grads: list[Tensor] = []
        for piece in pieces:  # draw, and differentiate
            part = self._differentiate(piece, key, first, regularised, len(piece) / size,
                                       last=piece is pieces[-1])
            found = [g for g in part.weights if g is not None]
            # Not in place: a compiled step may return one tensor for two equal gradients.
            grads = torch._foreach_add(grads, found) if grads else found
            parts.append(part)
            first += len(piece)
        t, fit, reg = (torch.cat([getattr(p, name) for p in parts]) for name in ("t", "fit", "reg"))

        loss = (fit + reg).mean()
        grads, loss, wishes, norm = self.parallel.reduce(grads, loss, self._wishes)
        self._agreed.copy_(wishes)

        rest = iter(grads)
        for p, g in zip(self._trained, parts[-1].weights, strict=True):
            p.grad = None if g is None else next(rest)
        norm, skipped = self.optimizer.clip_and_step(self.config.clip_norm, loss, norm)
        self.metrics.add(t, fit, reg, norm, skipped)

    def _differentiate(
        self, piece: Tensor, key: Tensor, first: int, regularised: bool,
        scale: float, last: bool = True,
    ) -> Gradients:
        """Draw a piece's random numbers, and compute its gradients."""
        # Not key + tensor([0, 0, first]): a constant made on the host would have to be copied.
        key = torch.cat([key[:2], key[2:] + first]) if first else key
        seed = None
        if self._seeded_dropout and not self.gradient_step.compiled:
            seed = dropout_seed(self.config.seed, self.step, first)
        return self.gradient_step(piece, key, regularised, seed, scale, last)

    def probe(self, x0: Tensor, kinds: Iterable[bool]) -> None:
        """Compute, and drop, the gradients of a batch's first piece: what there is to compile.

        Args:
            x0: a batch of the training stream.
            kinds: steps without (False) or with (True) the regulariser.
        """
        piece, *others = self._laid_out(x0).chunk(self.config.accumulate)
        for regularised in kinds:
            # The scale is a constant of what is compiled: that of training.
            scale = len(piece) / (len(x0) * self.ranks.size)
            with cudnn_benchmark(self.device, self.config.cudnn_benchmark):
                self._differentiate(piece, self._key(PROBE_STEP), 0, regularised, scale)

    def choose_threads(self) -> int:
        """Set the number of threads that this process computes with; changes no weights.

        Returns:
            What the configuration of the run should record: the number if it was given or found by
            timing steps, 0 if there was nothing to choose.
        """
        config, limit = self.config, torch.get_num_threads()
        if self.device.type != "cpu" or config.dry_run:
            return config.threads
        if config.threads and not (config.resume and config.threads > limit):
            torch.set_num_threads(config.threads)
            return config.threads
        if limit == 1 or self.ranks.size > 1 or threads_are_given():
            return 0
        x0 = torch.zeros(config.batch_size, *self.data.shape)
        kinds = [self.objective.regularises(config.steps - 1)]
        return fastest_threads(lambda: self.probe(x0, kinds), limit, config.steps)

    def use_cuda_graph(self, warn: Callable[[str], None]) -> None:
        """Replay steps as CUDA graphs from now on; ``warn`` is told why, where that cannot be."""
        reason = None
        if self.device.type != "cuda":
            reason = f"the device is {self.device}"
        elif self._seeded_dropout:
            reason = f"the masks of {unfused_dropout(self.network)[0]} are not drawn on the GPU"
        elif self.optimizer.backend != "cpp":
            off = ops.why_off("cpp", "adamw_ema", self.device)
            reason = f"it needs the fused optimizer ({off or 'backend is torch'})"
        if reason is None:
            self._graph = StepGraph(self._update, warn)
        else:
            warn(f"no CUDA graph: {reason}")

    @property
    def replays_graph(self) -> bool:
        """Whether steps are replayed as a CUDA graph, after the first few that warm up."""
        return self._graph is not None and self._graph.captured

    def train_step(self, x0: Tensor, wishes: Iterable = ()) -> None:
        """One optimizer step; skipped, and counted, if the loss or a gradient is not finite.

        Args:
            x0: this rank's part of the batch.
            wishes: of `WISHES`, for the other ranks; see `agreed`.
        """
        if self.ranks.size > 1:
            wanted = [float(wish in wishes) for wish in WISHES]
            self._wishes.copy_(to_device(torch.tensor(wanted), self.device))
        self.lr = self.config.lr * min(1.0, (self.step + 1) / max(1, self.config.warmup_steps))
        self.optimizer.prepare(self.lr, self.step)
        run = self._update if self._graph is None else self._graph
        regularised = self.objective.regularises(self.step)
        with cudnn_benchmark(self.device, self.config.cudnn_benchmark):
            run(self._laid_out(x0), self._key(self.step), regularised)
        self.step += 1

    def to_blame(self, indices: Tensor) -> Callable[[], list[str]]:
        """Names of the items of the last batch whose loss was not finite; of all of them if every
        loss was: then it is the gradient. The function returned waits for that step, and for the
        other ranks.

        Args:
            indices: of this rank's part of the batch.
        """
        arriving = to_host(self.metrics.finite)

        def names() -> list[str]:
            bad = indices[~arriving()]
            found = self.ranks.exchange((self.data.names(bad), self.data.names(indices)))
            return [name for part, _ in found for name in part] or [
                name for _, part in found for name in part]

        return names

    def in_a_row(self) -> Callable[[], int]:
        """How many steps until now were skipped in a row; the function returned waits for the last
        of them."""
        arriving = to_host(self.metrics.skipped_in_a_row)
        return lambda: int(arriving())

    def agreed(self) -> Callable[[], set]:
        """What any rank wished before the last step, the same on all; the function returned waits
        for that step."""
        arriving = to_host(self._agreed)
        return lambda: {wish for wish, n in zip(WISHES, arriving().tolist(), strict=True) if n > 0}

    def _laid_out(self, x0: Tensor) -> Tensor:
        if self.data.is_image:
            return x0.contiguous(memory_format=torch.channels_last)
        return x0

    def _key(self, step: int) -> Tensor:
        return to_device(torch.tensor([self.config.seed, step, 0]), self.device)

    def window(self) -> dict[str, float]:
        """Means since the last call, for one line of metrics.jsonl; waits for the device."""
        return self.close_window()()

    def close_window(self) -> Callable[[], dict[str, float]]:
        """As `StepMetrics.close_window`, with the step, the time and the learning rate."""
        record = {"step": self.step, "time": round(self.elapsed, 3), "lr": self.lr}
        read = self.metrics.close_window()
        return lambda: record | read()

    @torch.no_grad()
    def heldout_loss(self) -> float | None:
        """Plain noise-prediction loss of the averaged weights on fixed held-out draws."""
        heldout = self.data.heldout
        if heldout is None:
            return None
        # The loss falls a hundredfold from low t to high: random timesteps would decide the mean of
        # so few draws, so they are spaced evenly, and a small set is gone through several times.
        count = torch.arange(HELDOUT_DRAWS)
        x0 = heldout.batch(count % len(heldout), self.device)
        times = ((2 * count + 1) * len(self.schedule) // (2 * HELDOUT_DRAWS)).to(self.device)
        plain, network = Objective("ddpm", self.schedule), self._predictor()
        losses = []
        for first, piece in zip(range(0, len(x0), 64), x0.split(64), strict=True):
            draw = plain.draw(
                piece, seed=self.config.seed, step=PROBE_STEP, first_index=first,
                t=times[first : first + len(piece)],
            )
            losses.append(plain(network, piece, draw).fit)
        return torch.cat(losses).mean().item()

    def averaged(self) -> nn.Module | None:
        """The network with the first moving average; adapters are merged into its layers.

        Returns:
            Of a sharded network a copy in host memory, and None on other ranks than 0; all of them
            have to ask for it.
        """
        network = self.parallel.whole(self.emas[0].model, self.data.shape)
        if network is None:
            return None
        return lora.without(network, lora.scale(self.config)) if self.config.lora else network

    def _predictor(self) -> Callable[[Tensor, Tensor], Tensor]:
        network = self.emas[0].model
        if self.config.lora:
            network = lora.without(network, lora.scale(self.config))
        return self.parallel.predictor(network)

    def generate(
        self, sampler: str, steps: int, progress: Callable[[int, int], None] | None = None,
        **settings,
    ) -> Tensor:
        """This rank's share of the samples of the averaged weights, from fixed noise: all
        (num_samples, *shape) if it is alone.

        ``settings`` are others of `robustdm.method.sampling.sample`.

        With the others' there are a few more than that, for all ranks draw equally many: a sharded
        network is called by all of them, or by none.
        """
        config, mine = self.config, self.ranks.equal_share(self.config.num_samples)
        return sample(
            self._predictor(),
            self.schedule,
            self.data.shape,
            num=len(mine),
            first_index=mine.start,
            sampler=sampler,
            steps=min(steps, config.timesteps),
            clip=config.clip_samples,
            seed=config.seed,
            batch_size=max(1, 2**22 // int(np.prod(self.data.shape)) // 64),
            device=self.device,
            progress=progress,
            **settings,
        )

    def check_ranks(self) -> None:
        """Raise a RunError unless all ranks are at the same step with the same weights, bit for
        bit; where these are in parts, unless those that the ranks began with were the same."""
        if self.ranks.size > 1:
            self.ranks.same("the step and the bits of the weights",
                            (self.step, self.parallel.fingerprint()))

    # Checkpoints.

    def check_finite(self) -> None:
        """Raise a RunError if weights, averages or moments hold a NaN or an infinity."""
        if found := not_finite(self.state()[0]):
            raise RunError(
                f"after step {self.step} {found} is not finite, and no step made it so: is the "
                "memory sound? Nothing was saved, the last checkpoint is as it was: go on with "
                "--resume"
            )

    def keep_origin(self, root: Path) -> None:
        """Write what adapters are added to, once, beside the checkpoints, which hold only them.

        Raises:
            RunError: if it cannot be written.
        """
        if self.config.lora:
            self._origin_file = save_origin(root, lora.split(self.model)[0])

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict]:
        """Everything a continuation needs: tensors by file, and JSON."""
        moments, settings = optimizer_tensors(self.optimizer)

        def weights(network: nn.Module) -> dict[str, Tensor]:
            return lora.split(network)[1] if self.config.lora else network.state_dict()

        tensors = {"model": weights(self.model), "optimizer": self.parallel.moments(moments)}
        for ema in self.emas:
            tensors[f"ema_{ema.rate}"] = weights(ema.model)
        origin = {} if self._origin_file is None else {"origin": self._origin_file}
        return tensors, origin | {
            "shape": list(self.data.shape),
            "is_image": self.data.is_image,
            "elapsed": self.elapsed,
            "skipped": int(self.metrics.skipped),
            "random_layout": stream.LAYOUT_VERSION,
            "data": self.data.identity(),
            "optimizer": settings,
        }

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint.

        Raises:
            UsageError: if it belongs to other data, another network or another random layout.
            RunError: if it holds adapters, and their model's file is missing or damaged; if it is
                no checkpoint of a run at all.
        """
        try:
            self._restore(checkpoint)
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            what = " ".join(str(error).split())  # torch lists what it would take, line by line
            raise RunError(f"{checkpoint.path} is not a checkpoint of a run of this version "
                           f"({type(error).__name__}: {what}): continue it with the version that "
                           "wrote it") from error

    def _restore(self, checkpoint: Checkpoint) -> None:
        state = checkpoint.state
        if state["random_layout"] != stream.LAYOUT_VERSION:
            raise UsageError(
                f"{checkpoint.path} was drawn with random layout {state['random_layout']}, this "
                f"version has {stream.LAYOUT_VERSION}: continue it with the version that wrote it"
            )
        check_same_data(state["data"], self.data.identity(), checkpoint.path)
        for name in ("elapsed", "skipped"):
            if not is_amount(state[name]):
                raise ValueError(f"{name} is {state[name]!r}")
        check_finite(checkpoint)
        tensors = checkpoint.tensors
        if self.config.lora:
            own, self._origin_file = load_origin(checkpoint), state["origin"]
            tensors = tensors | {name: lora.joined(own, found) for name, found in tensors.items()
                                 if name != "optimizer"}
        networks = {"model": self.model} | {f"ema_{ema.rate}": ema.model for ema in self.emas}
        for name, network in networks.items():
            check_model_shapes(network, tensors[name])
        moments = self.parallel.own_moments(tensors["optimizer"])
        for name, network in networks.items():
            self.parallel.load(network, tensors[name])
        self.optimizer.write_copies()
        load_optimizer(self.optimizer, moments, state["optimizer"])
        self.step, self.elapsed = checkpoint.step, state["elapsed"]
        self.metrics.skipped.fill_(state["skipped"])
