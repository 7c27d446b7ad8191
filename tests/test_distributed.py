"""Several ranks train what one rank trains, agree on everything, and end together."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from threading import Thread

import pytest
import torch
import torch.distributed as dist

from robustdm.data import batches, load_data
from robustdm.data.base import TensorData
from robustdm.data.streamed import StreamedImages
from robustdm.distributed import ALONE, Ranks, _meet, bits, join
from robustdm.errors import RunError, UsageError
from robustdm.runs.checkpoint import CheckpointError, list_checkpoints, load_newest
from robustdm.runs.config import TrainConfig
from robustdm.runs.presets import preset_values
from robustdm.runs.rundir import RunDir
from robustdm.training import loop, trainer
from robustdm.training.loop import train
from robustdm.training.trainer import Trainer
from tests import ranks
from tests.conftest import gradients_of

TINY = preset_values("plane") | dict(
    num_points=200, mlp_width=8, mlp_depth=1, batch_size=24, steps=6, log_every=3, sample_every=4,
    checkpoint_every=2, num_samples=5, preview_steps=2, final_steps=2, warmup_steps=1,
    rank_timeout=0.5)
UNET = preset_values("digits") | dict(
    block_channels=(8, 16), norm_groups=4, batch_size=12, steps=4, timesteps=50, dropout=0.1,
    flip=True, num_samples=3, preview_steps=2, final_steps=2, rank_timeout=0.5)


def tiny(path, base=TINY, **changes):
    return TrainConfig(**{**base, "out": path, **changes})


def go(rank, config):
    """What `train` did, on one rank."""
    result = train(config, "off")
    return result.step, result.stopped, result.exit_code, bool(result.summary)


def weights(out):
    found = load_newest(out / "checkpoints")
    return {f"{file}/{name}": value for file, group in found.tensors.items()
            for name, value in group.items()}, found.step


def assert_equal(a, b):
    (a, step_a), (b, step_b) = weights(a), weights(b)
    assert step_a == step_b and a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


# Joining.


def test_alone_nobody_is_asked(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with join() as found:
        assert found is ALONE and found.main and list(found.share(5)) == [0, 1, 2, 3, 4]
    x = torch.randn(3, 2)
    assert found.all_sum([x])[0] is x and found.gather(x) is x and found.exchange(7) == [7]
    with pytest.raises(ZeroDivisionError), found.together():
        1 / 0  # noqa: B018


def test_shares_are_all_of_it():
    for count in (0, 1, 5, 12):
        for size in (1, 2, 5, 7):
            parts = [Ranks(r, size).equal_share(count) for r in range(size)]
            assert [i for part in parts for i in part][:count] == list(range(count))
            assert len({len(part) for part in parts}) == 1
            parts = [Ranks(r, size).share(count) for r in range(size)]
            assert [k for part in parts for k in part] == list(range(count))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1


def talk(rank):
    with join("cpu", 0.5) as found:
        image = (torch.arange(24.0) * (rank + 1)).view(2, 3, 2, 2)
        image = image.to(memory_format=torch.channels_last)
        sums = found.all_sum([image, torch.ones(()), image.flatten()[::5]])
        gathered = found.gather(torch.full((rank + 1, 2), float(rank)))
        seen = []
        for value, error in ((0, None), (rank, None), (0, ValueError(f"bad {rank}")),
                             (0, ValueError("bad") if rank else None), (0, ValueError("bad"))):
            try:
                with found.together():
                    found.same("it", value)
                    if error:
                        raise error
                seen.append("ok")
            except Exception as caught:
                seen.append(f"{type(caught).__name__}: {caught}")
        return (sums[0].stride() == image.stride(), [s.tolist() for s in sums],
                None if gathered is None else gathered.tolist(), found.exchange(rank), seen)


def test_what_ranks_tell_each_other():
    first, second = ranks.run(2, talk)
    image = torch.arange(24.0).view(2, 3, 2, 2) * 3
    for strides, sums, _, exchanged, _ in (first, second):
        assert strides and exchanged == [0, 1]
        assert sums == [image.tolist(), 2.0, image.flatten()[::5].tolist()]
    assert first[2] == [[0, 0], [1, 1], [1, 1]] and second[2] is None
    differs = "RunError: it differs between ranks: 0 on rank 0, 1 on rank 1"
    assert first[4][0] == second[4][0] == "ok"
    assert first[4][1].startswith(differs) and second[4][1].startswith("PeerError: rank 0 failed")
    assert first[4][2] == "ValueError: bad 0" and second[4][2] == "ValueError: bad 1"
    assert first[4][3] == "PeerError: rank 1 failed: bad" and second[4][3] == "ValueError: bad"
    assert first[4][4] == "ValueError: bad" and second[4][4] == "PeerError: rank 0 failed: bad"


@pytest.mark.parametrize("device", ["cpu:0", "cuda:1"])
def test_devices_are_shared_out(device, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(UsageError, match=f"device is '{device}': 2 ranks"), join(device):
        pass


# The stream.


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("resident", [False, True])
def test_parts_are_all_of_a_batch(flip, resident):
    images = torch.randint(0, 256, (40, 1, 4, 4), dtype=torch.uint8)
    data = TensorData("x", images, None, 0.0, 0, resident=resident)
    data.is_image = True
    config = TrainConfig(**{**UNET, "flip": flip})

    def read(found):
        return next(batches(data, config, 3, "cpu", found))

    whole = read(ALONE)
    parts = [read(Ranks(r, 3)) for r in range(3)]
    for k in range(2):
        assert torch.equal(torch.cat([part[k] for part in parts]), whole[k])


def test_a_rank_may_skip_whole_blocks_of_a_stream():
    """Blocks are shuffled each; where a batch is longer than one, no part has samples of all."""
    class Rows:
        error = None

        def __init__(self, first):
            self.rows = itertools.count(first)

        def take(self, count):
            return [(next(self.rows), b"") for _ in range(count)]

    data = StreamedImages.__new__(StreamedImages)
    data.buffer, data.seed = 4, 3

    def read(rank, size, step):
        part = Ranks(rank, size).share(24)
        first = step * 24 + part.start
        order = iter([torch.arange(k * 24, k * 24 + 24)[part.start : part.stop]
                      for k in range(step, step + 2)])
        return list(data._batches(Rows(first // 4 * 4), order))

    for step in (0, 2):
        whole, parts = read(0, 1, step), [read(rank, 2, step) for rank in range(2)]
        assert [a + b for a, b in zip(*parts, strict=True)] == whole
        assert sorted(item for item, _ in whole[0]) == list(range(step * 24, step * 24 + 24))


# The step.


def double_steps(rank, config, count):
    """Gradients and weights of three steps in float64."""
    with join("cpu", 0.5) as found:
        trainer = Trainer(config, ranks=found)
        for module in (trainer.model, trainer.emas[0].model):
            module.double()
        trainer.metrics.add = lambda *_: None  # of float32
        calls = []
        real = dist.all_reduce

        def counted(*arguments, **names):
            calls.append(arguments[0].numel())
            return real(*arguments, **names)

        dist.all_reduce = counted
        grads = []
        stream = batches(trainer.data, config, 0, trainer.device, found)
        for _ in range(count):
            x0 = next(stream)[0]
            x0 = x0.load(trainer._key(trainer.step)) if not isinstance(x0, torch.Tensor) else x0
            gradients_of(trainer, x0.double(), trainer._key(trainer.step))
            grads.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters()]))
            calls.clear()
            trainer.train_step(x0.double())
        grads.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
        return [g.tolist() for g in grads], calls


@pytest.mark.parametrize("base", [TINY, UNET], ids=["mlp", "unet"])
def test_two_ranks_take_the_steps_of_one(tmp_path, base):
    config = tiny(tmp_path, base, backend="torch", dropout=0.0, flip=False)
    (whole, none), = [double_steps(0, config, 3)]
    (first, calls), (second, _) = ranks.run(2, double_steps, config, 3)
    assert none == []
    assert first == second, "weights and gradients are the same bits on both ranks"
    for a, b in zip(whole, first, strict=True):
        a, b = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
        assert a.abs().max() > 1e-4 and (a - b).norm() <= 1e-10 * a.norm()
    assert len(calls) == 1


def test_one_all_reduce_for_all_pieces(tmp_path):
    config = tiny(tmp_path, accumulate=3, backend="torch")
    (first, calls), (second, _) = ranks.run(2, double_steps, config, 2)
    count = sum(p.numel() for p in Trainer(config).model.parameters())
    assert len(calls) == 1 and calls[0] == count + 1 + 5 and first == second


def compiled_steps(rank, config):
    with join("cpu", 0.5) as found:
        trainer = Trainer(config, ranks=found)
        calls, real = [], dist.all_reduce
        dist.all_reduce = lambda *a, **k: (calls.append(a[0].numel()), real(*a, **k))[1]
        stream = batches(trainer.data, config, 0, trainer.device, found)
        for _ in range(3):
            calls.clear()
            trainer.train_step(next(stream)[0])
        weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
        return weights.tolist(), len(calls)


def test_a_compiled_step_is_that_of_several_ranks_too(tmp_path):
    """The compiled part ends before the all-reduce, which is one."""
    config = tiny(tmp_path, accumulate=3)
    (wanted, _), _ = ranks.run(2, compiled_steps, config)
    (first, calls), (second, _) = ranks.run(2, compiled_steps, replace(config, compile=True))
    assert calls == 1 and first == second and max(map(abs, first)) > 0.1
    assert first == pytest.approx(wanted, abs=1e-5)


# The run.


@pytest.mark.parametrize("base", [TINY, UNET], ids=["mlp", "unet"])
def test_two_ranks_train_what_one_does_in_two_pieces(tmp_path, base):
    one, two = (tiny(tmp_path / name, base) for name in ("one", "two"))
    assert go(0, replace(one, accumulate=2)) == (one.steps, None, 0, True)
    assert ranks.run(2, go, two) == [(two.steps, None, 0, True), (two.steps, None, 0, False)]
    assert_equal(one.out, two.out)

    def rows(config):
        return [json.loads(line) for line in (config.out / "metrics.jsonl").open()]

    for a, b in zip(rows(one), rows(two), strict=True):
        for key in ("step", "loss", "fit_band0", "grad_norm", "heldout_loss", "samples"):
            assert a.get(key, 0) == pytest.approx(b.get(key, 0), rel=1e-5), key
    assert sorted(p.name for p in one.out.iterdir()) == sorted(p.name for p in two.out.iterdir())
    assert json.loads((two.out / "summary.json").read_text())["ranks"] == 2


@pytest.mark.parametrize("before, after", [(1, 2), (2, 1), (2, 3)])
def test_resume_on_another_number_of_ranks(tmp_path, before, after):
    """With as many pieces in all, sums are of the same numbers: 1 and 2 ranks give the same bits.
    """
    def config(name, count, **changes):
        return tiny(tmp_path / name, accumulate={1: 2, 2: 1, 3: 1}[count], **changes)

    go(0, config("whole", 1))
    ranks.run(before, go, config("part", before, stop_after=3))
    assert weights(tmp_path / "part")[1] == 3
    ranks.run(after, go, config("part", after, resume=True))
    if after < 3:
        assert_equal(tmp_path / "whole", tmp_path / "part")
    else:
        a, b = weights(tmp_path / "whole")[0], weights(tmp_path / "part")[0]
        assert all(torch.allclose(a[k], b[k], rtol=1e-3, atol=1e-5) for k in a)


def nan_on_one(rank, config):
    def weights():
        return [p.detach().clone() for p in trainer.model.parameters()]

    with join("cpu", 0.5) as found:
        trainer = Trainer(config, ranks=found)
        stream = batches(trainer.data, config, 0, trainer.device, found)
        for step in range(3):
            before = weights()
            x0 = next(stream)[0]
            trainer.train_step(x0 * float("nan") if rank == 1 and step == 1 else x0)
            moved = not all(map(torch.equal, before, weights()))
            assert moved == (step != 1), step
        trainer.check_ranks()
        averages = trainer.emas[0].model.parameters()
        return int(trainer.metrics.skipped), all(bool(p.isfinite().all()) for p in averages)


def test_a_nan_on_one_rank_is_skipped_on_all(tmp_path):
    assert ranks.run(2, nan_on_one, tiny(tmp_path)) == [(1, True)] * 2


def endless_nans(rank, config):
    real = loop.batches

    def poisoned(*arguments):
        for x, indices in real(*arguments):
            if rank == 1:
                x[5] = torch.nan
                (config.out.parent / "item").write_text(str(int(arguments[0].members[indices[5]])))
            yield x, indices

    loop.batches = poisoned
    return go(rank, config)


def test_endless_nans_of_a_rank_end_all_and_are_named(tmp_path):
    first, second = ranks.run(2, endless_nans, tiny(tmp_path / "run", max_skipped=2))
    item = (tmp_path / "item").read_text()
    assert first[0] == "RunError" and second[0] == "PeerError"
    assert first[1].startswith("2 steps in a row gave a loss or gradient that is not finite, the "
                               f"last with the items {item}: ")


def signalled(rank, config):
    if rank == 1:
        real, count = Trainer.train_step, []

        def step(self, *arguments):
            count.append(1)
            if len(count) == 3:
                os.kill(os.getpid(), signal.SIGUSR1)
            real(self, *arguments)

        Trainer.train_step = step
    return go(rank, config)


def test_a_signal_to_one_rank_stops_all_at_the_same_step(tmp_path):
    config = tiny(tmp_path / "run", steps=50)
    first, second = ranks.run(2, signalled, config)
    # It came after the third step's wishes were made; those of the fourth are read in the fifth.
    assert first == second == (5, "SIGUSR1", 138, False)
    assert weights(config.out)[1] == 5


def only_rank_0_writes(rank, config):
    if rank:
        def refuse(*_, **__):
            raise AssertionError("another rank writes")

        RunDir.open = refuse
        from robustdm.training import loop, outputs

        loop.save_checkpoint = loop.make_loggers = outputs.write_json = refuse
        outputs.write_bytes = refuse
        outputs.save_pipeline = outputs.write_report = outputs.np.savez_compressed = refuse
    return go(rank, config)


def test_only_rank_0_writes(tmp_path):
    results = ranks.run(2, only_rank_0_writes, tiny(tmp_path / "run", UNET))
    assert [r[3] for r in results] == [True, False]


def other_configuration(rank, config):
    return go(rank, replace(config, num_points=200 + rank))


def other_data(rank, config):
    trainer.load_data = lambda config: load_data(replace(config, num_points=200 + rank))
    return go(rank, config)


def other_weights(rank, config):
    real = Trainer.__init__

    def changed(self, *arguments, **names):
        real(self, *arguments, **names)
        if rank:
            with torch.no_grad():
                next(self.model.parameters()).view(-1)[0].add_(1e-6)

    Trainer.__init__ = changed
    return go(rank, config)


def no_record(rank, config):
    def record(*_, **__):
        raise RunError("no room for the record")

    RunDir.record = record
    return go(rank, config)


def saves(rank, config):
    go(rank, config)
    return [step for step, _ in list_checkpoints(config.out / "checkpoints")]


def test_a_wish_to_save_is_granted_once(tmp_path):
    """It is known a step later: the wish of the step after a save was made before it."""
    config = tiny(tmp_path / "run", steps=12, checkpoint_every=0, checkpoint_minutes=1e-9,
                  keep_last=20)
    saved, _ = ranks.run(2, saves, config)
    assert saved == [2, 4, 6, 8, 10, 12]


def test_a_full_disk_is_tried_again_when_the_next_save_is_due(tmp_path, monkeypatch):
    def full(*_):
        tries.append(1)
        raise CheckpointError("no room")

    tries, clock = [], itertools.count()
    monkeypatch.setattr(loop.time, "monotonic", lambda: float(next(clock)))  # a second a look
    monkeypatch.setattr(loop, "save_checkpoint", full)
    with pytest.raises(CheckpointError):  # the last one has to succeed
        go(0, tiny(tmp_path / "run", steps=40, checkpoint_every=0, checkpoint_minutes=0.5,
                   sample_every=0, log_every=40))
    assert 2 < len(tries) < 14


def full_disk(rank, config):
    import robustdm.runs.checkpoint as checkpoint

    def full(*_):
        raise OSError(28, "No space left on device")

    checkpoint._check_space = full
    return go(rank, config)


@pytest.mark.parametrize("function, changes, expected", [
    (go, dict(batch_size=25), "UsageError: batch_size is 25: it is that of all 2 ranks"),
    (go, dict(out="a file"), "UsageError: out is"),
    (other_configuration, {},
     "RunError: what was asked for differs between ranks: {'num_points': 200} on rank 0, "),
    (no_record, {}, "RunError: no room for the record"),
    (other_data, {},
     "RunError: the training data differs between ranks: {'count': 190, 'sha256': "),
    (other_weights, {}, "RunError: the step and the bits of the weights differs"),
    (full_disk, {}, "CheckpointError: the checkpoint of step 6 was not written"),
])
def test_where_one_rank_fails_all_do(tmp_path, function, changes, expected):
    (tmp_path / "a file").write_text("")
    changes = {k: tmp_path / v if k == "out" else v for k, v in changes.items()}
    begin = time.monotonic()
    first, second = ranks.run(2, function, tiny(tmp_path / "run", **changes))
    assert ": ".join(first).startswith(expected)
    assert second[0] == "PeerError"
    assert time.monotonic() - begin < 20


def stopped(rank, config):
    with join("cpu", 0.05) as found:
        process = found.exchange(os.getpid())[1]
        if rank == 1:
            os.kill(process, signal.SIGSTOP)
        begin = time.monotonic()
        try:
            found.all_sum([torch.ones(2)])
        except RunError as error:
            return str(error), time.monotonic() - begin
        finally:
            os.kill(process, signal.SIGKILL)


def test_a_rank_that_hangs_is_named(tmp_path):
    (said, seconds), gone = ranks.run(2, stopped, None)
    assert said.startswith("rank 1 is lost (") and gone is None
    assert 2.5 < seconds < 30, "three seconds of patience, three of roll call"


def killed(rank):
    with join("cpu", 0.5) as found:
        found.exchange(rank)
        if rank == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        if rank == 0:
            time.sleep(5)  # busy, longer than others wait for an answer
        try:
            found.all_sum([torch.ones(2)])
        except RunError as error:
            return str(error)


def test_a_rank_that_is_busy_is_not_lost():
    first, second, gone = ranks.run(3, killed)
    assert second.startswith("rank 2 is lost (") and gone is None
    assert first.startswith("rank 2 is lost (")


def launched(monkeypatch):
    """A launcher's store, which is there as long as it is held."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True)
    for name, value in dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=store.port, RANK=0, WORLD_SIZE=1,
                            TORCHELASTIC_USE_AGENT_STORE=True, TORCHELASTIC_RUN_ID="none").items():
        monkeypatch.setenv(name, str(value))
    return store


def test_only_the_job_that_began_a_run_goes_on_with_it_unasked(tmp_path, monkeypatch):
    config = tiny(tmp_path / "run")
    mine = launched(monkeypatch)
    go(0, replace(config, stop_after=3))
    port = os.environ["MASTER_PORT"]
    other = launched(monkeypatch)
    with pytest.raises(UsageError, match="it holds a run; add --resume"):
        go(0, config)
    monkeypatch.setenv("MASTER_PORT", port)
    assert go(0, config) == (6, None, 0, True)
    assert go(0, config) == (6, None, 0, False), "nothing is left to do, which is no failure"
    assert mine.port != other.port


def test_a_stop_that_is_saved_is_no_failure_to_a_launcher_that_restarts(tmp_path, monkeypatch):
    def interrupt(self, x0, wishes=()):
        os.kill(os.getpid(), signal.SIGUSR1)
        return real(self, x0, wishes)

    real = Trainer.train_step
    monkeypatch.setattr(Trainer, "train_step", interrupt)
    assert go(0, tiny(tmp_path / "alone"))[1:3] == ("SIGUSR1", 138)
    store = launched(monkeypatch)
    assert go(0, tiny(tmp_path / "run"))[1:3] == ("SIGUSR1", 0)
    del store


def test_ranks_meet_anew_in_every_attempt():
    def client():
        return dist.TCPStore("127.0.0.1", server.port, is_master=False)

    server, limit = dist.TCPStore("127.0.0.1", 0, is_master=True), timedelta(seconds=20)
    for attempt in range(2):
        found = [None, None]

        def join_as(rank, found=found):
            found[rank] = _meet(client(), rank, 2, limit)

        threads = [Thread(target=join_as, args=(rank,)) for rank in range(2)]
        for thread in threads[:: 1 - 2 * attempt]:  # the other way round
            thread.start()
        for thread in threads:
            thread.join()
        assert not found[0].check(["address"])
        found[0].set("address", str(attempt))
        assert found[1].get("address") == str(attempt).encode()
    with pytest.raises(RuntimeError, match="rank 1 is not there"):  # who greeted is gone
        _meet(client(), 0, 2, timedelta(seconds=0.2))


def test_bits_tell_tensors_apart():
    one, up = torch.ones(3), torch.tensor([1.0, 1.0 + 2**-23, 1.0])
    both = torch.tensor([1.0 + 2**-23, 1.0 - 2**-24, 1.0])
    found = [bits(t) for t in ([one], [up], [up.roll(1)], [both], [one, up], [up, one])]
    assert bits([one.clone()]) == found[0] and len(set(found)) == len(found)


def scales(rank, config):
    """What a piece's gradients are multiplied by, in what is compiled and in training."""
    with join("cpu", 0.5) as found:
        one = trainer.Trainer(config, ranks=found)
        x0 = next(batches(one.data, config, 0, "cpu", found))[0]
        used, real = [], one.gradient_step
        one.gradient_step = lambda *given: used.append(given[-2]) or real(*given)
        one.gradient_step.compiled = False
        one.probe(x0, [True])
        one.train_step(x0)
        return used


def test_what_is_compiled_is_what_training_computes(tmp_path):
    for used in ranks.run(2, scales, tiny(tmp_path / "run", accumulate=2)):
        assert used == [0.25] * 3


# The launcher.


def launch(*arguments, **environment):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc-per-node", "2", *arguments]
    return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def flags(out):
    return ["-m", "robustdm.train", "--preset", "plane", "--num-points", "200", "--mlp-width", "8",
            "--batch-size", "24", "--log-every", "1", "--checkpoint-every", "20", "--sample-every",
            "0", "--num-samples", "8", "--final-steps", "2", "--steps", "4000", "--out", str(out)]


def workers_of(launcher):
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            stat = (path / "stat").read_text().rpartition(")")[2].split()
            if int(stat[1]) == launcher.pid:
                environment = (path / "environ").read_bytes().decode()
                found[int(re.search("\0RANK=(\\d)", environment)[1])] = int(path.name)
        except (OSError, TypeError):
            pass
    return found


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds ranks in /proc")
def test_a_killed_rank_ends_the_job_and_the_restart_goes_on(tmp_path):
    out = tmp_path / "run"
    launcher = launch("--max-restarts", "1", *flags(out))
    try:
        end = time.monotonic() + 90
        while not list_checkpoints(out / "checkpoints"):
            assert time.monotonic() < end and launcher.poll() is None, launcher.stdout.read()
            time.sleep(0.1)
        first = workers_of(launcher)
        killed = time.monotonic()
        os.kill(first[1], signal.SIGKILL)
        while first.items() & workers_of(launcher).items():
            assert time.monotonic() < killed + 30, "the job goes on without a rank"
            time.sleep(0.1)
        sessions = []
        while len(sessions) < 2:
            ended = launcher.poll() is not None
            assert time.monotonic() < killed + 90 and not ended, launcher.stdout.read()
            time.sleep(0.2)
            sessions = json.loads((out / "run.json").read_text())["sessions"]
        time.sleep(1)
        launcher.send_signal(signal.SIGTERM)
        said = launcher.communicate(timeout=60)[0]
    finally:
        launcher.kill()
    assert "error: rank 0: rank 1 is lost (" in said, said
    assert f"continuing {out} after step " in said, said
    assert said.count("stopped after step") == 1, said
    assert load_newest(out / "checkpoints").step >= 20


def test_accelerate_launches_it_too(tmp_path):
    out = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
         "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--module",
         "robustdm.train", *flags(out)[2:], "--device", "cpu", "--stop-after", "2"],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    run = json.loads((out / "run.json").read_text())
    assert run["ranks"] == 2 and load_newest(out / "checkpoints").step == 2
