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
from robustdm.distributed import ALONE, Ranks, bits, whole
from robustdm.errors import RunError, UsageError
from robustdm.host import fastest_threads, threads_are_given
from robustdm.method.gradients import Gradients, GradientStep, WorkingCopy
from robustdm.method.objectives import Objective, dropout_seed
from robustdm.method.sampling import sample
from robustdm.models import build_model, lora, sharded
from robustdm.models.build import set_attention
from robustdm.models.inference import fast_network
from robustdm.models.load_run import objective_of
from robustdm.models.pretrained import describe, probe, settle, start_from
from robustdm.models.sharded import ShardedStep
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
from robustdm.ops.resident import ResidentBatch
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
from robustdm.training.signals import SIGNALS

BANDS = 4
"""Equal bands of t in which the loss is logged, low noise first."""
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
        sharded: whether this process holds only a part of the network; see
            `robustdm.models.sharded`.
        weights: the parameters that the optimizer updates, or this rank's part of each.
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
        self.sharded = config.parallel == "fsdp" and ranks.size > 1
        if not self.sharded:  # else it moves block by block, and never lies there as a whole
            self.model.to(self.device)
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
        copied = config.precision == "bf16" and not self.sharded
        self.network = WorkingCopy(self.model) if copied else self.model
        self.emas = [EMA(self.model, rate) for rate in config.ema_rates]
        self._began = self._bits() if self.sharded else 0
        if self.sharded:
            where = self.device, config.precision
            self.weights = sharded.shard(self.model, *where)
            for ema in self.emas:
                ema.follow(self.weights, sharded.shard(ema.model, *where))
            self.gradient_step = ShardedStep(self.model, self.objective, ranks.size)
        else:
            self.weights = list(self.model.parameters())
            self.gradient_step = GradientStep(self.network, self.objective)
        self.optimizer = SkippingAdamW(
            nn.ParameterList(self.weights), config.lr, config.weight_decay, self.emas[0],
            list(self.network.parameters()) if copied else [], config.backend,
        )
        self._seeded_dropout = bool(unfused_dropout(self.network))
        self._graph: StepGraph | None = None
        self.parameters = sum(p.numel() for p in self.model.parameters())
        self.trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        self._origin_file: dict | None = None
        self.step = 0
        self.elapsed = 0.0
        self.lr = 0.0
        self.skipped = torch.zeros((), device=self.device)
        self.skipped_in_a_row = torch.zeros((), device=self.device)
        self._finite = torch.ones(config.batch_size // ranks.size, dtype=torch.bool,
                                  device=self.device)
        self._sums = torch.zeros(4, device=self.device)
        self._bands = torch.zeros(2, BANDS, device=self.device)
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

    def gradients(
        self, x0: Tensor | ResidentBatch, key: Tensor, regularised: bool
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]:
        """Give every weight the gradient of a batch, in ``accumulate`` pieces on each rank.

        Every random number belongs to a sample's place in the whole batch, so the number of pieces
        does not change the result (but for ``reg_fraction``, which is of each piece, and for the
        masks of dropout that is not fused, one per piece).

        Args:
            x0: (B, ...) this rank's part of the data, images channels-last.
            key: (3,) int64 on the device: seed, step, 0.
            regularised: what the objective says of the step.

        Returns:
            The scalar loss of the whole batch; the norm of its gradient if that lies in parts; and
            t, fit and reg of every sample of this rank's, (B,) each.
        """
        parts: list[Gradients] = []
        sums: list[Tensor] = []
        size = len(x0) * self.ranks.size
        first = len(x0) * self.ranks.rank
        pieces = x0.chunk(self.config.accumulate)
        for piece in pieces:
            part = self._piece(piece, key, first, regularised, len(piece) / size,
                               last=piece is pieces[-1])
            found = [g for g in part.weights if g is not None]
            # Not in place: a compiled step may return one tensor for two equal gradients.
            sums = torch._foreach_add(sums, found) if sums else found
            parts.append(part)
            first += len(piece)
        t, fit, reg = (torch.cat([getattr(p, name) for p in parts]) for name in ("t", "fit", "reg"))
        loss = (fit + reg).mean()
        norm = None
        if self.ranks.size > 1:
            # With the gradients, so that there is one all-reduce: all ranks skip a step or none.
            dtype = sums[0].dtype
            extras = [(loss / self.ranks.size).to(dtype), self._wishes.to(dtype)]
            if self.sharded:  # summed already
                square = torch.nn.utils.get_total_norm(sums) ** 2
                square, loss, agreed = self.ranks.all_sum([square, *extras])
                norm = square.sqrt()
            else:
                *sums, loss, agreed = self.ranks.all_sum([*sums, *extras])
            self._agreed.copy_(agreed)
        rest = iter(sums)
        weights = (p for p in self.weights if p.requires_grad)
        for p, g in zip(weights, parts[-1].weights, strict=True):
            p.grad = None if g is None else next(rest)
        return loss, norm, t, fit, reg

    def _piece(
        self, piece: Tensor | ResidentBatch, key: Tensor, first: int, regularised: bool,
        scale: float, last: bool = True,
    ) -> Gradients:
        # Not key + tensor([0, 0, first]): a constant made on the host would have to be copied.
        key = torch.cat([key[:2], key[2:] + first]) if first else key
        seed = None
        if self._seeded_dropout and not self.gradient_step.compiled:
            seed = dropout_seed(self.config.seed, self.step, first)
        if self.sharded:
            return self.gradient_step(piece, key, regularised, seed, scale, last)
        return self.gradient_step(piece, key, regularised, seed, scale)

    def probe(self, x0: Tensor | ResidentBatch, kinds: Iterable[bool]) -> None:
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
                self._piece(piece, self._key(PROBE_STEP), 0, regularised, scale)

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

    def train_step(self, x0: Tensor | ResidentBatch, wishes: Iterable = ()) -> None:
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
        for ema in self.emas[1:]:  # the optimizer updates the first
            ema.update(self.step)
        self.step += 1

    def _update(self, x0: Tensor | ResidentBatch, key: Tensor, regularised: bool) -> None:
        """What a step does on the device: a CUDA graph can hold it."""
        total, norm, t, fit, reg = self.gradients(x0, key, regularised)
        norm, skipped = self.optimizer.clip_and_step(self.config.clip_norm, total, norm)
        self._record(t, fit, reg, norm, skipped)

    def to_blame(self, indices: Tensor) -> Callable[[], list[str]]:
        """Names of the items of the last batch whose loss was not finite; of all of them if every
        loss was: then it is the gradient. The function returned waits for that step, and for the
        other ranks.

        Args:
            indices: of this rank's part of the batch.
        """
        arriving = to_host(self._finite)

        def names() -> list[str]:
            bad = indices[~arriving()]
            found = self.ranks.exchange((self.data.names(bad), self.data.names(indices)))
            return [name for part, _ in found for name in part] or [
                name for _, part in found for name in part]

        return names

    def in_a_row(self) -> Callable[[], int]:
        """How many steps until now were skipped in a row; the function returned waits for the last
        of them."""
        arriving = to_host(self.skipped_in_a_row)
        return lambda: int(arriving())

    def agreed(self) -> Callable[[], set]:
        """What any rank wished before the last step, the same on all; the function returned waits
        for that step."""
        arriving = to_host(self._agreed)
        return lambda: {wish for wish, n in zip(WISHES, arriving().tolist(), strict=True) if n > 0}

    def _laid_out(self, x0: Tensor | ResidentBatch) -> Tensor | ResidentBatch:
        if self.data.is_image and isinstance(x0, Tensor):
            return x0.contiguous(memory_format=torch.channels_last)
        return x0

    def _key(self, step: int) -> Tensor:
        return to_device(torch.tensor([self.config.seed, step, 0]), self.device)

    # Statistics are summed on the device, so that a step never waits for it, and in place, so that
    # a CUDA graph finds them.

    def _record(self, t: Tensor, fit: Tensor, reg: Tensor, norm: Tensor, skipped: Tensor) -> None:
        taken = 1 - skipped
        self._finite[: len(fit)] = (fit + reg).isfinite()
        self.skipped += skipped
        self.skipped_in_a_row.add_(skipped).mul_(skipped)
        values = torch.stack([fit.mean(), reg.mean(), norm, torch.ones_like(norm)])
        self._sums += torch.where(taken.bool(), values, 0)
        fit = torch.where(taken.bool(), fit, 0)
        band = t * BANDS // len(self.schedule)
        self._bands[0].index_add_(0, band, fit)
        self._bands[1].index_add_(0, band, taken.expand_as(fit))

    def window(self) -> dict[str, float]:
        """Means since the last call, for one line of metrics.jsonl; waits for the device."""
        return self.close_window()()

    def close_window(self) -> Callable[[], dict[str, float]]:
        """Begin a new window; the function returned gives the means of the one that ends, and waits
        only for what the device had been given until now."""
        skips = torch.stack([self.skipped, self.skipped_in_a_row])
        (sums, bands) = self.ranks.all_sum([self._sums / self.ranks.size, self._bands])
        arriving = to_host(torch.cat([sums, bands.flatten(), skips]))
        record: dict[str, float] = {"step": self.step, "time": round(self.elapsed, 3)}
        lr = self.lr
        self._sums.zero_()
        self._bands.zero_()

        def read() -> dict[str, float]:
            fit, reg, norm, steps, *bands, skipped, in_a_row = arriving().tolist()
            if steps:
                fit, reg, norm = fit / steps, reg / steps, norm / steps
                record.update(loss=fit + reg, fit=fit, reg=reg, grad_norm=norm)
            for band, (total, count) in enumerate(zip(bands[:BANDS], bands[BANDS:], strict=True)):
                if count:
                    record[f"fit_band{band}"] = total / count
            record.update(lr=lr, skipped=int(skipped))
            if in_a_row:
                record["skipped_in_a_row"] = int(in_a_row)
            return record

        return read

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
        plain, network = Objective("ddpm", self.schedule), self._averaged_network()
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
        network = self.emas[0].model
        if self.sharded:
            weights = {}
            for name, value in network.state_dict().items():
                value = whole(value)
                if self.ranks.main:
                    weights[name] = value.cpu()
            if not self.ranks.main:
                return None
            network = build_model(self.config, self.data.shape).eval()
            network.load_state_dict(weights, assign=True)
        return lora.without(network, lora.scale(self.config)) if self.config.lora else network

    def _averaged_network(self) -> Callable[[Tensor, Tensor], Tensor]:
        if self.sharded:
            return sharded.predictor(self.emas[0].model, self.device)
        return fast_network(self.averaged(), precision=self.config.precision, cuda_graph=False)

    def generate(
        self, sampler: str, steps: int, progress: Callable[[int, int], None] | None = None
    ) -> Tensor:
        """This rank's share of the samples of the averaged weights, from fixed noise: all
        (num_samples, *shape) if it is alone.

        With the others' there are a few more than that, for all ranks draw equally many: a sharded
        network is called by all of them, or by none.
        """
        config, mine = self.config, self.ranks.equal_share(self.config.num_samples)
        return sample(
            self._averaged_network(),
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
        )

    def check_ranks(self) -> None:
        """Raise a RunError unless all ranks are at the same step with the same weights, bit for
        bit; where these lie in parts, unless those that the ranks began with were the same."""
        if self.ranks.size > 1:
            self.ranks.same("the step and the bits of the weights",
                            (self.step, self._began if self.sharded else self._bits()))

    def _bits(self) -> int:
        networks = (self.model, *(ema.model for ema in self.emas))
        return bits(p for network in networks for p in network.parameters())

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
        if self.sharded:
            moments = sharded.joined(moments, list(self.model.parameters()))

        def weights(network: nn.Module) -> dict[str, Tensor]:
            return lora.split(network)[1] if self.config.lora else network.state_dict()

        tensors = {"model": weights(self.model), "optimizer": moments}
        for ema in self.emas:
            tensors[f"ema_{ema.rate}"] = weights(ema.model)
        origin = {} if self._origin_file is None else {"origin": self._origin_file}
        return tensors, origin | {
            "shape": list(self.data.shape),
            "is_image": self.data.is_image,
            "elapsed": self.elapsed,
            "skipped": int(self.skipped),
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
        moments = tensors["optimizer"]
        if self.sharded:
            moments = sharded.parted(moments, list(self.model.parameters()))
        for name, network in networks.items():
            if self.sharded:
                sharded.load(network, tensors[name])
            else:
                network.load_state_dict(tensors[name])
        self.optimizer.write_copies()
        load_optimizer(self.optimizer, moments, state["optimizer"])
        self.step, self.elapsed = checkpoint.step, state["elapsed"]
        self.skipped.fill_(state["skipped"])
