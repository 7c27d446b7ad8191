"""Several processes, the *ranks*, that do the work of one; torchrun or accelerate starts them.

Every rank computes its part of each batch. It holds the whole network, and one flat all-reduce a
step sums the gradients, so that all take the same step and stay equal bit for bit; or it holds a
part of the network, see `robustdm.models.sharded`. Random numbers belong to a sample's place in
the whole batch, hence N ranks train what one rank trains.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from robustdm.errors import PeerError, RobustDMError, RunError, UsageError

T = TypeVar("T")

_ROLL_CALL = 3.0  # seconds in which ranks that are alive answer
_NEWS = 0.5  # seconds between two looks at what the other ranks have done
_UNEVEN = 1.1  # the busiest rank's work, over an even share, from which batches are cut
_joined = itertools.count()


class Ranks:
    """The processes of a job, and what they tell each other; alone, it asks nobody.

    Args:
        rank, size: number of this process, and how many there are.
        host: group for what lies in host memory; None if alone.
        launcher: the launcher's store, which outlives a failed attempt; None without a launcher.
        patience: seconds after which a rank that does nothing is lost.
        remedy: said where a rank is lost.
    """

    def __init__(self, rank: int = 0, size: int = 1, host: dist.ProcessGroup | None = None,
                 launcher: dist.Store | None = None, patience: float = 600.0, remedy: str = ""):
        self.rank, self.size = rank, size
        self._host, self._launcher = host, launcher
        self._patience, self._remedy = patience, remedy
        # Where the ranks write in the launcher's store, which keeps all that was ever written.
        self._board = f"robustdm/join-{next(_joined)}" if host is not None else ""
        self._works = itertools.count()

    @property
    def main(self) -> bool:
        """Whether this is the rank that writes and prints."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """This rank's consecutive part of ``count`` things; parts differ by one at most."""
        return self._shares(count)[self.rank]

    def _shares(self, count: int, batch_size: int = 1) -> list[range]:
        """Every rank's part of ``count`` things, in whole batches."""
        whole = -(-count // batch_size)
        ends = [min(count, batch_size * (rank * whole // self.size))
                for rank in range(self.size + 1)]
        return [range(*ends[rank : rank + 2]) for rank in range(self.size)]

    def batches(self, count: int, batch_size: int) -> tuple[range, int]:
        """This rank's consecutive part of ``count`` samples, and the size of its batches.

        Parts are whole batches, those that one rank would compute: the last bits of a sample may
        depend on how many are computed with it. Where that would leave ranks idle for a tenth of
        the time or more, batches are smaller, so that there are enough for all.
        """
        shares = self._shares(count, batch_size)
        if max(map(len, shares)) > _UNEVEN * -(-count // self.size):
            turns = -(-count // (self.size * batch_size))
            batch_size = -(-count // (self.size * turns))
            shares = self._shares(count, batch_size)
        return shares[self.rank], batch_size

    def equal_share(self, count: int) -> range:
        """This rank's consecutive part of ``count`` things or a few more: parts are equal."""
        each = -(-count // self.size)
        return range(self.rank * each, (self.rank + 1) * each)

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

    def gather(self, part: Tensor | None) -> Tensor | None:
        """The ranks' parts (n, ...) of a tensor in host memory, joined on rank 0; None elsewhere,
        and where no rank has a part.

        Raises:
            RunError: if a rank is lost.
        """
        if self.size == 1:
            return part
        kinds = self.exchange(None if part is None else (tuple(part.shape), part.dtype))
        parts = [] if part is None else [part]
        with self._lost():
            if not self.main:
                for own in parts:
                    dist.send(own.contiguous(), 0, group=self._host)
                return None
            for rank, kind in enumerate(kinds):
                if rank and kind is not None:
                    parts.append(torch.empty(kind[0], dtype=kind[1]))
                    dist.recv(parts[-1], rank, group=self._host)
        return torch.cat(parts) if parts else None

    def scatter(self, whole: Tensor | None, batch_size: int) -> Tensor:
        """This rank's part, in whole batches, of a tensor (n, ...) in rank 0's host memory.

        Raises:
            RunError: if a rank is lost.
        """
        if self.size == 1:
            return whole
        kind = None if whole is None else (tuple(whole.shape), whole.dtype)
        (count, *shape), dtype = self.exchange(kind)[0]
        shares = self._shares(count, batch_size)
        with self._lost():
            if self.main:
                for rank, share in enumerate(shares):
                    if rank and share:
                        part = whole[share.start : share.stop].contiguous()
                        dist.send(part, rank, group=self._host)
                return whole[: shares[0].stop]
            part = torch.empty(len(shares[self.rank]), *shape, dtype=dtype)
            if len(part):
                dist.recv(part, 0, group=self._host)
        return part

    def main_first(self, make: Callable[[], T]) -> T:
        """What ``make`` returns, called on rank 0 before the others, who find what it has cached.

        Raises:
            PeerError: as `together` does.
        """
        with self.together():
            made = make() if self.main else None
        with self.together():
            return made if self.main else make()

    def same(self, what: str, value) -> None:
        """Raise a RunError, on other ranks than 0 a PeerError, unless the value is the same on all.
        """
        values = self.exchange(value)
        other = next((r for r, v in enumerate(values) if v != values[0]), None)
        if other is not None:
            a, b = values[0], values[other]
            if isinstance(a, dict) and isinstance(b, dict):
                changed = [key for key in {**a, **b} if a.get(key) != b.get(key)]
                a, b = ({key: found.get(key) for key in changed} for found in (a, b))
            raise (RunError if self.main else PeerError)(
                f"{what} differs between ranks: {a!r} on rank 0, {b!r} on rank {other}; every rank "
                "needs the same command, files and versions")

    def same_weights(self, what: str, weights: Iterable[Tensor], *others) -> None:
        """Raise a RunError unless weights, and other values, are the same on every rank."""
        if self.size > 1:
            self.same(what, (*others, bits(weights)))

    def remember(self, what: str) -> None:
        """Let later attempts of this job, after a failure, know of something."""
        if self._launcher is not None and self.main:
            self._launcher.set(f"robustdm/{what}", "1")

    def recall(self, what: str) -> bool:
        """Whether this job has remembered something, in this attempt or before."""
        known = self._launcher is not None and self.main and self._launcher.check(
            [f"robustdm/{what}"])
        return self.exchange(known)[0]

    @contextlib.contextmanager
    def apart(
        self, work: int, show: Callable[[int, int], None] | None = None
    ) -> Iterator[Callable[..., None]]:
        """A long part in which each rank does its share by itself, and which ends when all have.

        A rank that fails ends the others at their next report, not when their shares are done.

        Args:
            work: of all ranks together, in any unit.
            show: called as show(done, work) with what all ranks have done.

        Yields:
            report(done, ...): what this rank has done of its share; the last call must say all.

        Raises:
            PeerError: where another rank has failed.
            RunError: if a rank is lost.
        """
        if self.size == 1:
            yield lambda done, *_: show and show(done, work)
            return
        key = f"{self._board}/work-{next(self._works)}"
        done = told = total = 0
        looked = moved = time.monotonic()

        def look() -> None:
            nonlocal told, total, looked, moved
            before = total
            with self._lost():
                total = _store().add(key, done - told)
                failure = self._failure()
            if failure:
                raise PeerError(failure)
            told, looked = done, time.monotonic()
            if total > before:
                moved = looked
            if show and total:
                show(total, work)

        def report(mine: int, *_) -> None:
            nonlocal done
            done = mine
            if time.monotonic() - looked > _NEWS:
                look()

        try:
            yield report
            look()
            while total < work:
                if time.monotonic() - moved > self._patience:
                    raise RunError(f"{self._missing()} (nothing done for "
                                   f"{self._patience / 60:.3g} minutes); {self._remedy}")
                time.sleep(_NEWS / 10)
                look()
        except Exception as error:
            self._announce(error)
            raise

    def _announce(self, error: Exception) -> None:
        """Let the others know that this rank ends, and why.

        Raises:
            PeerError: if another rank has said the same before.
        """
        if self.size == 1 or isinstance(error, PeerError):
            return
        reason = f" failed: {error}"
        mine = first = f"rank {self.rank}{reason}"
        with contextlib.suppress(Exception):  # the store may be gone
            first = _store().compare_set(f"{self._board}/failure", "", mine).decode()
        if first != mine and first.endswith(reason):
            raise PeerError(first) from error

    def _failure(self) -> str:
        """What the first rank that failed has said; "" if none has."""
        key = f"{self._board}/failure"
        return _store().get(key).decode() if _store().check([key]) else ""

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """A part that all ranks get through, or none: where one fails, so do the others.

        Raises:
            PeerError: where another rank has failed; or several have, for the same reason, which
                is for the first of them to say.
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
        if failed is not None and reasons.index(mine) == self.rank:
            raise failed
        first = next((rank for rank, reason in enumerate(reasons) if reason is not None), None)
        if first is not None:
            raise PeerError(f"rank {first} failed: {reasons[first]}")

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """A part in which others than this class's methods communicate, too.

        Raises:
            RunError: if a rank is lost.
        """
        try:
            yield
        except RuntimeError as error:
            if not isinstance(error, dist.DistError) and "gloo" not in str(error):
                raise
            with self._lost():
                raise

    @contextlib.contextmanager
    def _lost(self) -> Iterator[None]:
        """Turn what a collective raises when a rank is gone into an error that names it."""
        try:
            yield
        except RobustDMError:
            raise
        except RuntimeError as error:
            failure = ""
            with contextlib.suppress(RuntimeError):  # the store may be gone
                failure = self._failure()
            if failure:
                raise PeerError(failure) from error
            text = re.sub(r"\[/\S+\]", "", str(error))  # where in the library's source
            reason = " ".join(text.split()).partition(". ")[0][:160]
            raise RunError(f"{self._missing()} ({reason}); {self._remedy}") from error

    def _missing(self) -> str:
        """Ask through the launcher's store, which outlives a rank, who is still there.

        Those whose process on this machine is gone, or else those who do not answer: a rank that
        is busy does not either.
        """
        silent, gone = [], []
        with contextlib.suppress(Exception):  # the store may be gone, too
            store = _store()
            store.set(f"robustdm/alive/{self.rank}", "1")
            end = time.monotonic() + _ROLL_CALL
            others = [r for r in range(self.size) if r != self.rank]
            while time.monotonic() < end:
                silent = [r for r in others if not store.check([f"robustdm/alive/{r}"])]
                gone = [r for r in silent if _is_gone(store.get(f"robustdm/process/{r}").decode())]
                if gone or not silent:
                    break
                time.sleep(0.1)
        if not silent:
            return "the ranks have lost each other"
        silent = gone or silent
        names = ", ".join(map(str, silent))
        return f"rank {names} is lost" if len(silent) == 1 else f"ranks {names} are lost"


ALONE = Ranks()


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that lies in parts on the ranks, each of which has to ask for it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def bits(tensors: Iterable[Tensor]) -> int:
    """A number that changes with any bit of float32 tensors, and with their order."""
    found = []
    for tensor in tensors:
        words = tensor.detach().float().reshape(-1).view(torch.int32).long()
        found.append((words * torch.arange(1, 2 * len(words), 2, device=words.device)).sum())
    places = torch.arange(1, 2 * len(found), 2, device=found[0].device)
    return (torch.stack(found) * places).sum().item()


def _store() -> dist.Store:
    """What the ranks of this attempt have of the launcher's store, which outlives a rank."""
    return dist.distributed_c10d._get_default_store()


def supervised() -> bool:
    """Whether torchrun has started this process: any exit code but 0 is a failure to it."""
    return "TORCHELASTIC_RUN_ID" in os.environ


_launchers: dict[tuple[str, str], dist.Store] = {}


def _launcher(timeout: timedelta) -> dist.Store:
    """The launcher's store, or where there is none rank 0's own; one for all the process's life.

    torch's own rendezvous would prefix torchrun's by the attempt's number, on which machines may
    disagree: one whose own ranks did not fail does not count.
    """
    place = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    if place not in _launchers:
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            _launchers[place] = dist.TCPStore(place[0], int(place[1]), is_master=False,
                                              timeout=timeout)
        else:
            _launchers[place] = next(dist.rendezvous("env://", timeout=timeout))[0]
    return _launchers[place]


def _meet(store: dist.Store, rank: int, size: int, timeout: timedelta) -> dist.Store:
    """A part of the store for the ranks that are alive now: in the whole of it lie the addresses
    of earlier ones, at which nobody answers.

    Every rank greets by a name of its own, and rank 0 answers those who are there.
    """
    if rank:
        mine = uuid.uuid4().hex
        store.set(f"robustdm/hello/{rank}", mine)
        store.wait([f"robustdm/welcome/{mine}"], timeout)
        meeting = store.get(f"robustdm/welcome/{mine}").decode()
        store.set(f"robustdm/{meeting}/here/{rank}", "1")
    else:
        meeting, answered = uuid.uuid4().hex, {}
        missing, end = set(range(1, size)), time.monotonic() + timeout.total_seconds()
        while missing:
            for other in sorted(missing):
                hello = f"robustdm/hello/{other}"
                if store.check([f"robustdm/{meeting}/here/{other}"]):
                    missing.remove(other)
                elif store.check([hello]) and (name := store.get(hello)) != answered.get(other):
                    store.set(f"robustdm/welcome/{name.decode()}", meeting)
                    answered[other] = name
            if missing and time.monotonic() > end:
                raise RuntimeError(f"rank {min(missing)} is not there")
            time.sleep(0.01)
    return dist.PrefixStore(f"robustdm/{meeting}", store)


def _process() -> str:
    """What identifies this process to others on its machine."""
    space = os.readlink("/proc/self/ns/pid") if os.path.exists("/proc/self/ns/pid") else ""
    return f"{os.getpid()} {space} {socket.gethostname()}"


def _is_gone(process: str) -> bool:
    """Whether a process, as `_process` names it, is known to have ended."""
    pid, space = process.split(maxsplit=1)
    if space != _process().split(maxsplit=1)[1]:
        return False  # on another machine, of which nothing is known
    try:
        os.kill(int(pid), 0)
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] in "ZX"  # ended, not yet reaped
    except ProcessLookupError:
        return True
    except OSError:
        return False


@contextlib.contextmanager
def join(
    device: str = "auto", timeout: float = 30.0, remedy: str = "nothing was written, start again"
) -> Iterator[Ranks]:
    """Join the ranks that torchrun, or accelerate launch, has started; `ALONE` without one.

    Args:
        device: as in the configuration; with several ranks, "auto", "cpu" or "cuda".
        timeout: minutes after which a rank that does not answer is lost.
        remedy: said where a rank is lost.

    Raises:
        UsageError: if the device cannot be shared out, or the ranks do not find each other.
    """
    size, limit = int(os.environ.get("WORLD_SIZE", 1)), timedelta(minutes=timeout)
    if size == 1 or "RANK" not in os.environ:
        yield Ranks(launcher=_launcher(limit)) if supervised() else ALONE
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
    ours, launcher = not dist.is_initialized(), None
    try:
        if ours:
            launcher = _launcher(limit)
            dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo",
                                    store=_meet(launcher, rank, size, limit),
                                    rank=rank, world_size=size, timeout=limit)
        _store().set(f"robustdm/process/{rank}", _process())
        host = dist.new_group(backend="gloo", timeout=limit)
        if on_gpu:  # NCCL connects at its first use: better now than after minutes of preparation
            dist.all_reduce(torch.zeros((), device="cuda"))
            torch.cuda.synchronize()
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        reason = reason if len(reason) < 300 else f"{reason[:150]} ... {reason[-150:]}"
        raise UsageError(f"the {size} ranks do not find each other ({reason}): start them with "
                         "torchrun, and see that its port is free") from error
    ranks = Ranks(rank, size, host, launcher, limit.total_seconds(), remedy)
    try:
        yield ranks
    except Exception as error:
        ranks._announce(error)
        raise
    # Not after an error: with a rank lost, this would wait for it.
    if ours:
        dist.destroy_process_group()
