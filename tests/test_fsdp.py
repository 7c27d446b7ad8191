"""Ranks that hold parts of a network train what ranks do that hold all of it."""

import json
import os
import signal
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import robustdm.runs.checkpoint as checkpoint
import robustdm.training.trainer as trainer_module
from robustdm.data import batches
from robustdm.distributed import join, whole
from robustdm.errors import UsageError
from robustdm.models.sharded import blocks
from robustdm.runs.checkpoint import load_newest
from robustdm.runs.config import TrainConfig
from robustdm.training import parallel
from robustdm.training.memory import estimate_bytes
from robustdm.training.step_metrics import StepMetrics
from robustdm.training.trainer import Trainer
from tests import ranks
from tests.test_distributed import TINY, UNET, assert_equal, go, tiny, weights

ATTENDS = UNET | dict(attention_resolutions=(4,), dropout=0.0, flip=False)


def fsdp(path, base=TINY, **changes):
    return tiny(path, base, parallel="fsdp", **changes)


@pytest.fixture(scope="module", autouse=True)
def imported(tmp_path_factory):
    """Here once, and not on each rank, what a run imports."""
    import torch.distributed.fsdp  # noqa: F401

    Trainer(tiny(tmp_path_factory.mktemp("imported"), UNET))


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """Most of the time of a short run is that of its plots."""
    monkeypatch.setattr("robustdm.training.outputs.write_report", lambda out: None)


class Sent(TorchDispatchMode):
    """Counts what the ranks send each other."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            self.calls[function._schema.name.removeprefix("c10d::")] += 1
        return function(*args, **(kwargs or {}))


def double_steps(rank, config, count):
    """Weights, averages and moments after some steps in float64, and what is sent in each step."""
    real = trainer_module.build_model
    trainer_module.build_model = lambda *arguments: real(*arguments).double()
    parallel.bits = lambda weights: 0  # of float32, as are the metrics
    StepMetrics.add = lambda *_: None
    with join("cpu", 0.5) as found:
        trainer, sent = Trainer(config, ranks=found), []
        stream = batches(trainer.data, config, 0, trainer.device, found)
        for _ in range(count):
            x0 = next(stream)[0]
            x0 = x0.load(trainer._key(trainer.step)) if not isinstance(x0, torch.Tensor) else x0
            with Sent() as seen:
                trainer.train_step(x0.double())
            sent.append((seen.calls["_reduce_scatter_base_"], seen.calls["allreduce_"],
                         seen.calls["_allgather_base_"] > 0, len(seen.calls)))
        state = {file: torch.cat([whole(v).flatten().double() for v in group.values()]).tolist()
                 for file, group in trainer.state()[0].items()}
        return state, sent, len(list(blocks(trainer.model)))


@pytest.mark.parametrize("base, pieces", [(TINY, 1), (TINY, 3), (ATTENDS, 1)],
                         ids=["mlp", "mlp-pieces", "unet"])
def test_parts_take_the_steps_of_wholes(tmp_path, base, pieces):
    config = fsdp(tmp_path, base, backend="torch", accumulate=pieces)
    (first, sent, count), (second, _, _) = ranks.run(2, double_steps, config, 2)
    expected, whole_sent, _ = ranks.run(2, double_steps, replace(config, parallel="ddp"), 2)[0]
    assert first == second and first.keys() == {"model", "optimizer", "ema_0.995"}
    for file in expected:
        a, b = torch.tensor(expected[file]), torch.tensor(first[file])
        assert a.abs().max() > 1e-4 and (a - b).norm() <= 1e-10 * a.norm(), file
    assert whole_sent == [(0, 1, False, 1)] * 2
    # One for each block, and what lies at the top: however many pieces, and whatever the attack.
    assert sent == [(count + 1, 1, True, 3)] * 2


def rows(config):
    return [json.loads(line) for line in (config.out / "metrics.jsonl").open()]


def test_a_run_goes_on_in_parts_or_whole(tmp_path):
    """Without clipping, sums are of the same numbers everywhere: the bits are the same."""
    def config(name, parallel="ddp", count=2, **changes):
        return tiny(tmp_path / name, parallel=parallel, accumulate=2 // count, clip_norm=0.0,
                    checkpoint_every=0, keep_last=9, sample_every=2, ema_rates=(0.995, 0.9),
                    **changes)

    one, two = config("one", count=1), config("two", "fsdp")
    assert go(0, one) == (6, None, 0, True)
    assert ranks.run(2, go, two) == [(6, None, 0, True), (6, None, 0, False)]
    assert_equal(one.out, two.out)
    # Averages change between previews: none may be of weights gathered for the one before.
    for a, b in zip(rows(one), rows(two), strict=True):
        for key in ("step", "loss", "fit_band0", "grad_norm", "heldout_loss", "samples"):
            assert a.get(key, 0) == pytest.approx(b.get(key, 0), rel=1e-5), key
    assert sum("heldout_loss" in row for row in rows(two)) == 3
    ranks.run(2, go, config("mixed", "fsdp", stop_after=2))
    ranks.run(2, go, config("mixed", "ddp", stop_after=1, resume=True))
    go(0, config("mixed", "ddp", 1, stop_after=1, resume=True))
    ranks.run(2, go, config("mixed", "fsdp", resume=True))
    assert_equal(one.out, tmp_path / "mixed")
    assert not any(map(checkpoint.verify, (tmp_path / "mixed/checkpoints").glob("step-*")))


def images(rank, config):
    """A run of images, and how many numbers of the network a rank holds, at most and at rest."""
    held = []
    if config.parallel == "fsdp":
        real = Trainer.__init__

        def hooked(self, *arguments, **names):
            real(self, *arguments, **names)
            parameters = list(self.model.parameters())
            states = [v for s in self.optimizer.state.values() for v in s.values() if v.ndim]
            held.append(sum(p.numel() for p in parameters))
            held.append(sum(p.to_local().numel() for p in parameters))
            assert not states

            def count(*_):
                held.append(held[1] + sum(p.numel() for p in self.model.parameters()
                                          if not hasattr(p, "to_local")))

            for block in blocks(self.model):
                block.conv1.register_forward_hook(count) if hasattr(block, "conv1") else None

        Trainer.__init__ = hooked
    return go(rank, config), held[:2], max(held[2:], default=0)


def test_images_previews_and_the_pipeline(tmp_path):
    """Its averages also stand in the pipeline; no rank holds more than parts and a block or two."""
    from diffusers import UNet2DModel

    one, two = tiny(tmp_path / "one", UNET), fsdp(tmp_path / "two", UNET, precision="fp32")
    assert go(0, replace(one, accumulate=2))[0] == 4
    (result, (size, part), most), (_, (_, other), _) = ranks.run(2, images, two)
    assert result == (4, None, 0, True)
    assert part + other == size and max(part, other) < 0.52 * size
    assert part < most < 0.8 * size
    for a, b in zip(rows(one), rows(two), strict=True):
        for key in ("step", "loss", "grad_norm", "heldout_loss", "samples"):
            assert a.get(key, 0) == pytest.approx(b.get(key, 0), rel=1e-4), key
    averages = load_newest(two.out / "checkpoints").tensors["ema_0.995"]
    exported = UNet2DModel.from_pretrained(two.out / "pipeline/unet").state_dict()
    assert exported.keys() == averages.keys()
    assert all(torch.equal(exported[name], averages[name]) for name in averages)
    assert sorted(p.name for p in one.out.iterdir()) == sorted(p.name for p in two.out.iterdir())


def nan_on_one(rank, config):
    with join("cpu", 0.5) as found:
        trainer = Trainer(config, ranks=found)
        real, stream = trainer.gradient_step, batches(trainer.data, config, 0, "cpu", found)

        def spoilt(*arguments):
            found = real(*arguments)
            if rank == 1 and trainer.step == 2:
                found.weights[-1][0] = float("inf")  # in a part that no other rank sees
            return found

        trainer.gradient_step = spoilt
        spoilt.compiled = False
        for step in range(4):
            before = [p.detach().clone() for p in trainer.weights]
            x0 = next(stream)[0]
            trainer.train_step(x0 * float("nan") if rank == 1 and step == 1 else x0)
            moved = not all(map(torch.equal, before, trainer.weights))
            assert moved == (step not in (1, 2)), step
        averages = trainer.emas[0].averages().values()
        moments = [v for s in trainer.optimizer.state.values() for v in s.values() if v.ndim]
        return (int(trainer.metrics.skipped), all(bool(p.isfinite().all()) for p in averages),
                [sum(t.numel() for t in group) for group in (trainer.weights, averages, moments)],
                trainer.parameters)


def test_a_nan_on_one_rank_is_skipped_on_all(tmp_path):
    first, second = ranks.run(2, nan_on_one, fsdp(tmp_path))
    assert first[:2] == second[:2] == (2, True)
    # Weights, averages, and two moments: each rank has half of all.
    for a, b, copies in zip(first[2], second[2], (1, 1, 2), strict=True):
        assert a + b == copies * first[3] and max(a, b) < 0.52 * copies * first[3]


def two_steps(rank, config):
    """The weights before and after, and what the averages are worth."""
    with join("cpu", 0.5) as found:
        trainer = Trainer(config, ranks=found)

        def weights():
            return {n: whole(value).tolist() for n, value in trainer.model.state_dict().items()}

        def dtype(p):
            return str(p.dtype)

        before, seen = weights(), set()
        stream = batches(trainer.data, config, 0, trainer.device, found)
        parts = isinstance(trainer.parallel, parallel.Sharded)
        for block in blocks(trainer.network) if parts else ():
            block.register_forward_pre_hook(lambda m, _: seen.update(map(dtype, m.parameters())))
        for _ in range(2):
            trainer.train_step(next(stream)[0])
        assert {p.dtype for p in trainer.weights} == {torch.float32}
        return before, weights(), trainer.heldout_loss(), seen


@pytest.mark.parametrize("base, changes, close", [
    (ATTENDS, dict(precision="bf16"), 0.25), (TINY, dict(freeze=("inlet.*", "*.bias")), 1e-3),
], ids=["bf16", "freeze"])
def test_bf16_and_frozen_weights(tmp_path, base, changes, close):
    config = fsdp(tmp_path, base, **changes)
    (start, parts, loss, seen), _ = ranks.run(2, two_steps, config)
    (begin, wholes, other, _), _ = ranks.run(2, two_steps, replace(config, parallel="ddp"))
    assert start == begin and loss == pytest.approx(other, rel=1e-2)
    assert seen == {"torch.bfloat16" if "precision" in changes else "torch.float32"}
    frozen = [name for name in start if parts[name] == start[name]]
    assert bool(frozen) == ("freeze" in changes) and frozen == [
        name for name in start if wholes[name] == start[name]]
    a, b, c = (torch.cat([torch.tensor(each[name]).flatten() for name in each])
               for each in (start, parts, wholes))
    assert 0 < (b - c).norm() < close * (c - a).norm()


def full_disk(rank, config):
    real, count = checkpoint._write_file, []

    def write(path, chunks):
        count.append(path)
        if len(count) == 2:
            next(iter(chunks))
            raise OSError(28, "No space left on device")
        return real(path, chunks)

    checkpoint._write_file = write
    return go(rank, config)


def test_a_full_disk_leaves_no_rank_waiting(tmp_path):
    config = fsdp(tmp_path / "run", num_samples=1)  # nor one without a sample to draw
    assert ranks.run(2, full_disk, config) == [(6, None, 0, True), (6, None, 0, False)]
    summary = json.loads((config.out / "summary.json").read_text())
    assert "No space left" in summary["warnings"][0]
    assert [step for step, _ in checkpoint.list_checkpoints(config.out / "checkpoints")] == [4, 6]


def signalled_in_a_preview(rank, config):
    if rank == 1:
        real, count = Trainer.generate, []

        def generate(self, sampler, steps, progress):
            def interrupted(*done):
                count.append(done)
                if len(count) == 2:
                    os.kill(os.getpid(), signal.SIGTERM)
                progress(*done)

            return real(self, sampler, steps, interrupted)

        Trainer.generate = generate
    return go(rank, config)


def test_a_signal_to_one_rank_ends_a_preview_on_all(tmp_path):
    config = fsdp(tmp_path / "run", sample_every=2, preview_steps=5, steps=50)
    first, second = ranks.run(2, signalled_in_a_preview, config)
    assert first == second and first[1:] == ("SIGTERM", 143, False) and first[0] == 4
    assert weights(config.out)[1] == first[0]


def killed(rank, config):
    if rank == 1:
        real, count = Trainer.train_step, []

        def step(self, *arguments):
            count.append(1)
            if len(count) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            real(self, *arguments)

        Trainer.train_step = step
    return go(rank, config)


def test_a_lost_rank_is_named(tmp_path):
    (kind, text), gone = ranks.run(2, killed, fsdp(tmp_path / "run", steps=50))
    assert kind == "RunError" and text.startswith("rank 1 is lost (") and gone is None


def other_weights(rank, config):
    real = trainer_module.build_model

    def build(*arguments):
        model = real(*arguments)
        with torch.no_grad():
            next(model.parameters()).view(-1)[0].add_(1e-6 * rank)
        return model

    trainer_module.build_model = build
    return go(rank, config)


def test_ranks_that_begin_with_other_weights_are_refused(tmp_path):
    first, _ = ranks.run(2, other_weights, fsdp(tmp_path / "run"))
    assert first[0] == "RunError" and "the bits of the weights differs" in first[1]


def test_what_cannot_be_had_is_refused(tmp_path):
    for changes, text in ((dict(compile=True), "compile is True: a network in parts runs eagerly"),
                          (dict(lora=4), "lora is 4: what adapters add")):
        with pytest.raises(UsageError, match=text):
            TrainConfig(**ATTENDS | changes, parallel="fsdp")
    trainer = Trainer(fsdp(tmp_path))
    assert isinstance(trainer.parallel, parallel.Replicated)
    assert trainer.weights == list(trainer.model.parameters())


def test_memory_is_counted_for_one_rank():
    def weights(base, ranks, **changes):
        config = TrainConfig(**base | dict(parallel="fsdp", batch_size=64) | changes)
        return estimate_bytes(config, (1, 8, 8) if base is UNET else (3,), ranks)["weights"]

    # Three 3 -> 8 -> 8 -> 3 layers and one for the time, 128 -> 8; all of it is gathered.
    size = 4 * (32 + 72 + 27 + 1032)
    assert weights(TINY, 2, objective="ddpm") == size * 5 // 2 + size
    assert weights(TINY, 2) == size * 5 // 2 + 2 * size  # two backward passes
    assert weights(TINY, 1) == weights(TINY, 1, parallel="ddp") == 5 * size
    few, many = (weights(UNET, n, objective="ddpm", block_channels=(32, 32)) for n in (1, 64))
    assert few / 64 < many < 0.3 * few
