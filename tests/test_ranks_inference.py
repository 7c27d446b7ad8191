"""Several ranks sample, measure and attack what one does, bit for bit, and rank 0 alone writes."""

import io
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from robustdm import attack, evaluate, sample, steps
from robustdm.device import resolve_device
from robustdm.distributed import Ranks, join
from robustdm.errors import RunError
from robustdm.method import sampling
from tests import ranks
from tests.test_sample import make_run

COMMANDS = {"sample": sample, "evaluate": evaluate, "attack": attack, "steps": steps}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Three runs with random weights, and two sets of images."""
    where = tmp_path_factory.mktemp("inference")
    make_run(where / "unet", block_channels=(8, 8))
    for seed in (0, 1):
        make_run(where / f"mlp{seed}", shape=(3,), data="plane", preset="plane", network="mlp",
                 num_points=600, mlp_width=8, seed=seed)
    noise = np.random.default_rng(0)
    for name, count in (("images", 700), ("clean", 200)):
        np.savez(where / f"{name}.npz", samples=noise.random((count, 1, 8, 8), np.float32) - 0.5)
    return where


@pytest.fixture(scope="module")
def one(made):
    """What one rank makes of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made)
        patch.setenv("ROBUSTDM_CACHE", "")
        call(0, made, jobs("one"))
    return made / "one"


def jobs(out):
    """Command lines, by where their results go; relative to the folder of the fixture."""
    small = ["--steps", "3", "--features", "pixels", "--batch-size", "4"]
    return {
        f"{out}/sample": ["sample", "--run", "unet", "--num", "10", "--steps", "3",
                          "--batch-size", "2"],
        f"{out}/few": ["sample", "--run", "mlp0", "--num", "1", "--steps", "2"],
        f"{out}/evaluate": ["evaluate", "--run", "unet", "--num", "70", *small, "--metrics",
                            "frechet", "kernel"],
        f"{out}/images": ["evaluate", "--samples", "images.npz", "--reference", "clean.npz",
                          "--features", "pixels"],
        f"{out}/attack": ["attack", "mlp0", "mlp1", "--num", "48", *small, "--methods", "random",
                          "fgsm", "--steps-attacked", "1.0"],
        f"{out}/steps": ["steps", "mlp0", "--num", "48", *small, "--samplers", "ddim"],
    }


def call(rank, where, lines):
    """Each command, one after the other, with a cache of its own."""
    os.chdir(where)
    with join("cpu", 0.5):  # the commands find the ranks joined
        for out, (name, *flags) in lines.items():
            os.environ["ROBUSTDM_CACHE"] = str(where / out / "cache")
            COMMANDS[name].main([*flags, "--device", "cpu", "--out", out])


@pytest.fixture(autouse=True)
def here(monkeypatch):
    monkeypatch.chdir(Path.cwd())  # goes back there
    monkeypatch.setenv("ROBUSTDM_CACHE", "")


def writes(rank, where, lines):
    """Files written, lines printed."""
    written, said = [], io.StringIO()

    def hook(event, arguments):
        if event == "open" and isinstance(arguments[2], int) and (
                arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            written.append(str(arguments[0]))
        if event in ("os.mkdir", "os.rename", "os.remove"):
            written.append(str(arguments[0]))

    sys.stdout = said
    sys.addaudithook(hook)
    call(rank, where, lines)
    return [path for path in written if not path.startswith("/dev/")], said.getvalue()


@pytest.mark.parametrize("count", [2, 3])
def test_ranks_make_what_one_makes(made, one, count):
    lines = {out: line for out, line in jobs(str(count)).items()
             if count == 2 or Path(out).name in ("sample", "few", "images")}
    (written, said), *others = ranks.run(count, writes, made, lines)
    assert len(written) >= 2 * len(lines) and "img/s" in said
    assert others == [([], "")] * (count - 1), "rank 0 alone writes and prints"
    for out in lines:
        alone, several = one / Path(out).name, made / out
        # Pictures and pages included.
        listed = [sorted(str(p.relative_to(where)) for p in where.rglob("*"))
                  for where in (alone, several)]
        assert listed[0] == listed[1]
        for path in alone.glob("*.npz"):
            a, b = (np.load(where / path.name)["samples"] for where in (alone, several))
            assert np.array_equal(a, b) and np.abs(a).max() > 0
        (path,) = alone.glob("*.json")
        a, b = (json.loads((where / path.name).read_text()) for where in (alone, several))
        assert (a["ranks"], b["ranks"]) == (1, count)
        for key in ("batch_size", "results", "measures", "entries", "objective_raised"):
            assert a.get(key) == b.get(key), (out, key)


def test_batches_are_cut_where_there_are_too_few(made):
    """As one rank computes them with smaller ones."""
    flags = ["sample", "--run", "unet", "--num", "5", "--steps", "2"]
    ranks.run(2, call, made, {"cut": flags})
    call(0, made, {"whole": [*flags, "--batch-size", "3"]})
    a, b = (np.load(made / out / "samples.npz")["samples"] for out in ("cut", "whole"))
    assert np.array_equal(a, b)
    assert json.loads((made / "cut/sample.json").read_text())["batch_size"] == 3


def test_shares_are_whole_batches():
    for count in (1, 2, 5, 9, 64, 65, 100, 1000):
        for size in (1, 2, 3, 8):
            for asked in (1, 7, 64, 256):
                found = [Ranks(r, size).batches(count, asked) for r in range(size)]
                (batch,) = {b for _, b in found}
                assert [k for part, _ in found for k in part] == list(range(count))
                assert all(part.start % batch == 0 for part, _ in found if part)
                assert batch == asked if size == 1 else 1 <= batch <= asked
                most = max(len(part) for part, _ in found)
                turns = -(-count // (size * asked))
                assert -(-most // batch) <= turns, "no more turns than whole batches take"
                assert batch == asked or most < max(
                    len(part) for part in Ranks(0, size)._shares(count, asked))
    assert Ranks(1, 2).batches(1000, 64) == (range(512, 1000), 64)
    assert Ranks(1, 2).batches(192, 64) == (range(96, 192), 48)


def test_a_rank_s_gpu_has_its_number(monkeypatch):
    """Threads of a process, such as the one of the features, begin with the first."""
    for name, value in (("is_available", True), ("device_count", 2), ("current_device", 1)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    assert [str(resolve_device(name)) for name in ("auto", "cuda", "cuda:0", "cpu")] == [
        "cuda:1", "cuda:1", "cuda:0", "cpu"]


# One failure ends all.


def failing(rank, where, out, flags, who):
    """Rank ``who`` fails in its second step, while the others have long to go."""
    os.chdir(where)
    real, calls = sampling.predict_noise, []

    def slow(*arguments):
        calls.append(1)
        if rank == who and len(calls) > 1:
            raise RunError("out of luck")
        time.sleep(0.02)
        return real(*arguments)

    sampling.predict_noise = slow
    sys.stdout = io.StringIO()
    name, *flags = flags
    try:
        COMMANDS[name].main([*flags, "--device", "cpu", "--out", out, "--num", "40", "--steps",
                             "900", "--batch-size", "4"])
    except Exception as error:
        return type(error).__name__, str(error), len(calls)


@pytest.mark.parametrize("flags", [
    ["sample", "--run", "mlp0"], ["evaluate", "--run", "mlp0"], ["attack", "mlp0"]],
    ids=lambda flags: flags[0])
def test_a_rank_that_fails_ends_the_others(made, flags):
    (kind, said, calls), second = ranks.run(2, failing, made, f"failed/{flags[0]}", flags, 1)
    assert (kind, said) == ("PeerError", "rank 1 failed: out of luck")
    assert second == ("RunError", "out of luck", 2)
    assert 1 <= calls < 900, "it had five times as many to do"
    assert not (made / "failed" / flags[0]).exists()


def wrong(rank, where, cases):
    os.chdir(where)
    found = []
    with join("cpu", 0.5):
        for name, *flags in cases:
            flags = [flag.replace("RANK", str(rank)) for flag in flags]
            try:
                COMMANDS[name].main([*flags, "--device", "cpu"])
                found.append(("", ""))
            except Exception as error:
                found.append((type(error).__name__, str(error)))
    return found


def test_what_is_wrong_is_said_once(made):
    (made / "file").write_text("")
    cases = [
        ["sample", "--run", "nowhere"], ["sample", "--run", "unet", "--out", "file"],
        ["sample", "--run", "unet", "--steps", "2000", "--out", "new"],
        ["evaluate", "--samples", "nowhere.npz", "--reference", "clean.npz"],
        ["evaluate", "--samples", "images.npz"],
        ["evaluate", "--samples", "images.npz", "--reference", "clean.npz", "--num", "8",
         "--features", "pixels"],
        ["evaluate", "--run", "unet", "--num", "1"],
        ["attack"], ["attack", "mlp0", "--steps-attacked", "250"],
        ["sample", "--run", "mlpRANK", "--out", "new"], ["attack", "mlpRANK", "--out", "new"],
        ["evaluate", "--run", "mlpRANK", "--out", "new"],
    ]
    found = ranks.run(2, wrong, made, cases)
    starts = ["nowhere is not", "out is 'file'", "steps is 2000", "samples is 'nowhere.npz'",
              "reference is not given", "8 samples are too few", "num is 1", "runs is empty",
              "steps_attacked is 250"]
    for k, start in enumerate(starts):
        said = [text for kind, text in (one[k] for one in found) if kind == "UsageError"]
        assert len(said) == 1 and said[0].startswith(start), (start, [one[k] for one in found])
        assert k == 5 or ("PeerError", f"failed: {said[0]}") in [
            (kind, text[7:]) for kind, text in (one[k] for one in found)]
    for first, second in zip(*(one[len(starts):] for one in found), strict=True):
        assert (first[0], second[0]) == ("RunError", "PeerError"), (first, second)
        assert "bits" in first[1] and "differs between ranks" in first[1]


# The parts.


def parts(rank):
    with join("cpu", 0.5) as found:
        found._patience, shown = 1.0, []
        with found.apart(12, lambda *news: shown.append(news)) as report:
            for done in range(1, 2 * rank + 2 if rank < 2 else 9):
                report(done)
                time.sleep(0.01)
        whole = torch.arange(10.0).view(5, 2) if found.main else None
        mine = found.scatter(whole, 2)
        again = found.gather(mine if len(mine) else None)
        once = found.scatter(whole[:1] if found.main else None, 2)
        kept = None if again is None else again.tolist()
        found.exchange(0)
        try:
            with found.apart(3):
                pass
        except RunError as error:
            return shown[-1], len(mine), kept, once.tolist(), str(error)


def test_what_ranks_do_apart():
    results = ranks.run(3, parts)
    assert [r[0] for r in results] == [(12, 12)] * 3
    assert [r[1] for r in results] == [2, 2, 1]
    assert [r[2] for r in results] == [torch.arange(10.0).view(5, 2).tolist(), None, None]
    assert sorted(len(r[3]) for r in results) == [0, 0, 1]
    for result in results:
        assert "nothing done for" in result[4] and "start again" in result[4]
