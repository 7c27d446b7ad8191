"""Several processes, the *ranks*, that do the work of one; torchrun or accelerate starts them.

Every rank holds the whole network and computes its part of each batch; one flat all-reduce a step
sums the gradients, so that all take the same step and stay equal bit for bit. Random numbers belong
to a sample's place in the whole batch, hence N ranks train what one rank trains.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from robustdm.errors import PeerError, RobustDMError, RunError, UsageError

_ROLL_CALL = 3.0  # seconds in which ranks that are alive answer


class Ranks:
    """The processes of a job, and what they tell each other; alone, it asks nobody.

    Args:
        rank, size: number of this process, and how many there are.
        host: group for what lies in host memory; None if alone.
    """

    def __init__(self, rank: int = 0, size: int = 1, host: dist.ProcessGroup | None = None):
        self.rank, self.size = rank, size
        self._host = host

    @property
    def main(self) -> bool:
        """Whether this is the rank that writes and prints."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """This rank's consecutive part of ``count`` things; parts differ by one at most."""
        return range(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def all_sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Sums over the ranks of tensors of one dtype and device, by a single all-reduce; the same
        bits on every rank.

        Raises:
            RunError: if a rank is lost.
        """
        if self.size == 1:
            return list(tensors)
        flat = tensors[0].new_empty(sum(t.numel() for t in tensors))
        # In the layout that each has, less what gaps there may be: empty_like knows it.
        pieces = flat.split([t.numel() for t in tensors])
        views = [piece.as_strided(t.shape, torch.empty_like(t, device="meta").stride())
                 for piece, t in zip(pieces, tensors, strict=True)]
        torch._foreach_copy_(views, list(tensors))
        with self._lost():
            dist.all_reduce(flat)
        return views

    def exchange(self, value) -> list:
        """Every rank's value, a picklable one, in the order of the ranks.

        Raises:
            RunError: if a rank is lost.
        """
        if self.size == 1:
            return [value]
        values = [None] * self.size
        with self._lost():
            dist.all_gather_object(values, value, group=self._host)
        return values

    def gather(self, part: Tensor) -> Tensor | None:
        """The ranks' parts (n, ...) of a tensor in host memory, joined on rank 0; None elsewhere.

        Raises:
            RunError: if a rank is lost.
        """
        if self.size == 1:
            return part
        shapes = self.exchange(tuple(part.shape))
        with self._lost():
            if not self.main:
                dist.send(part.contiguous(), 0, group=self._host)
                return None
            parts = [part]
            for rank in range(1, self.size):
                parts.append(torch.empty(shapes[rank], dtype=part.dtype))
                dist.recv(parts[-1], rank, group=self._host)
        return torch.cat(parts)

    def same(self, what: str, value) -> None:
        """Raise a RunError unless the value is the same on every rank."""
        values = self.exchange(value)
        other = next((r for r, v in enumerate(values) if v != values[0]), None)
        if other is not None:
            a, b = values[0], values[other]
            if isinstance(a, dict) and isinstance(b, dict):
                changed = [key for key in {**a, **b} if a.get(key) != b.get(key)]
                a, b = ({key: found.get(key) for key in changed} for found in (a, b))
            raise RunError(f"{what} differs between ranks: {a!r} on rank 0, {b!r} on rank {other}; "
                           "every rank has to see the same files, and the same versions of "
                           "everything")

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """A part that all ranks get through, or none: where one fails, so do the others.

        Raises:
            PeerError: where another rank has failed; or all have, for the same reason, which is for
                rank 0 to say.
        """
        try:
            yield
            failed = None
        except Exception as error:
            failed = error
        if self.size == 1:
            reasons = [None]
        else:
            reasons = self.exchange(None if failed is None else str(failed))
        mine = reasons[self.rank]
        if failed is not None and (self.main or mine != reasons[0]):
            raise failed
        first = next((rank for rank, reason in enumerate(reasons) if reason is not None), None)
        if first is not None:
            raise PeerError(f"rank {first} failed: {reasons[first]}")

    @contextlib.contextmanager
    def _lost(self) -> Iterator[None]:
        """Turn what a collective raises when a rank is gone into an error that names it."""
        try:
            yield
        except RobustDMError:
            raise
        except RuntimeError as error:
            text = re.sub(r"\[/\S+\]", "", str(error))  # where in the library's source
            reason = " ".join(text.split()).partition(". ")[0][:160]
            raise RunError(f"{self._missing()} ({reason}); checkpoints are as they were, go on "
                           "with --resume") from error

    def _missing(self) -> str:
        """Ask through the launcher's store, which outlives a rank, who is still there."""
        silent = []
        with contextlib.suppress(Exception):  # the store may be gone, too
            store = dist.distributed_c10d._get_default_store()
            store.set(f"robustdm/alive/{self.rank}", "1")
            end = time.monotonic() + _ROLL_CALL
            others = [r for r in range(self.size) if r != self.rank]
            while time.monotonic() < end:
                silent = [r for r in others if not store.check([f"robustdm/alive/{r}"])]
                if not silent:
                    break
                time.sleep(0.1)
        if not silent:
            return "the ranks have lost each other"
        names = ", ".join(map(str, silent))
        return f"rank {names} is lost" if len(silent) == 1 else f"ranks {names} are lost"


ALONE = Ranks()


def restarts() -> int:
    """How many times the launcher has started this job anew (torchrun --max-restarts)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def job() -> str | None:
    """What tells torchrun's job from others: its name, or the process that it is; None without."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    return f"launcher {os.getppid()}" if name == "none" else name


@contextlib.contextmanager
def join(device: str = "auto", timeout: float = 10.0) -> Iterator[Ranks]:
    """Join the ranks that torchrun, or accelerate launch, has started; `ALONE` without one.

    Args:
        device: as in the configuration; with several ranks, "auto", "cpu" or "cuda".
        timeout: minutes after which a rank that does not answer is lost.

    Raises:
        UsageError: if the device cannot be shared out, or the ranks do not find each other.
    """
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1 or "RANK" not in os.environ:
        yield ALONE
        return
    rank, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", 0))
    on_gpu = device == "cuda" or device == "auto" and torch.cuda.is_available()
    if device not in ("auto", "cpu", "cuda"):
        raise UsageError(f"device is {device!r}: {size} ranks share the devices out themselves, "
                         "use auto, cpu or cuda")
    if on_gpu:
        count = torch.cuda.device_count()
        if local >= count:
            raise UsageError(f"rank {rank} finds {count} GPUs, and needs number {local}: start at "
                             "most as many ranks on a machine (--nproc-per-node) as it has GPUs, "
                             "or use --device cpu")
        torch.cuda.set_device(local)
    limit = timedelta(minutes=timeout)
    ours = not dist.is_initialized()
    try:
        if ours:
            store, _, _ = next(dist.rendezvous("env://", timeout=limit))
            # The launcher's store outlives a failed attempt, whose addresses nobody answers at.
            store = dist.PrefixStore(f"robustdm/attempt-{restarts()}", store)
            dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", store=store,
                                    rank=rank, world_size=size, timeout=limit)
        host = dist.new_group(backend="gloo", timeout=limit)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"the {size} ranks do not find each other ({reason}): start them with "
                         "torchrun, and see that its port is free") from error
    yield Ranks(rank, size, host)
    # Not after an error: with a rank lost, this would wait for it.
    if ours:
        dist.destroy_process_group()
