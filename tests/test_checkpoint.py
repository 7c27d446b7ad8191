"""Checkpoints: whatever happens to them, what is loaded is what was saved."""

import errno
import json
import os
import random
import shutil
import subprocess
import sys
import textwrap

import pytest
import safetensors.torch
import torch
from torch import nn

from robustdm.errors import RunError, UsageError
from robustdm.models.weights import check_model_shapes, load_optimizer, optimizer_tensors
from robustdm.runs import checkpoint
from robustdm.runs.checkpoint import (
    CheckpointError,
    clean_stale,
    list_checkpoints,
    load_checkpoint,
    load_newest,
    prune,
    save_checkpoint,
    verify,
)


def tensors_of(seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(4, 6, generator=generator)
    weight[0, 0] = float("nan")
    return {
        "model": {
            "weight": weight,
            "shared": weight,
            "turned": weight.T,
            "slice": weight[:, ::2],
            "half": weight.bfloat16(),
            "short": weight.half(),
            "double": weight.double() / 3,
        },
        "ema_0.99": {"weight": nn.Parameter(weight * 2)},
        "optimizer": {
            "0.step": torch.tensor(7.0),
            "count": torch.tensor([2**62, -1]),
            "small": torch.tensor([-5], dtype=torch.int8),
            "mask": torch.tensor([True, False, True]),
            "bytes": torch.arange(5, dtype=torch.uint8),
            "empty": torch.empty(0, 3),
        },
    }


def save(root, *steps):
    return [save_checkpoint(root, step, tensors_of(step), {"note": f"run {step}"})
            for step in steps]


def raw(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def assert_holds(loaded, step):
    assert loaded.step == loaded.state["step"] == step
    assert loaded.state["note"] == f"run {step}"
    expected = tensors_of(step)
    assert loaded.tensors.keys() == expected.keys()
    for name, group in expected.items():
        assert loaded.tensors[name].keys() == group.keys()
        for key, tensor in group.items():
            found = loaded.tensors[name][key]
            assert found.dtype == tensor.dtype and found.shape == tensor.shape
            assert torch.equal(raw(found), raw(tensor))


@pytest.fixture
def root(tmp_path):
    return tmp_path / "run" / "checkpoints"


# What is saved is what is loaded.


def test_round_trip_is_bit_exact(root):
    (path,) = save(root, 12)
    assert path == root / "step-00000012"
    assert verify(path) == []
    assert_holds(load_newest(root), 12)
    assert_holds(load_checkpoint(path), 12)
    assert sorted(os.listdir(root)) == ["step-00000012"]


def test_files_are_plain_safetensors_and_json(root):
    (path,) = save(root, 3)
    theirs = safetensors.torch.load_file(path / "model.safetensors")
    assert torch.equal(raw(theirs["turned"]), raw(tensors_of(3)["model"]["turned"]))
    with safetensors.safe_open(path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    data = (path / "optimizer.safetensors").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    del header["__metadata__"]
    # Aligned, so that readers may map the file instead of copying it.
    sizes = {"I64": 8, "F32": 4}
    assert all((start + entry["data_offsets"][0]) % sizes.get(entry["dtype"], 1) == 0
               for entry in header.values())
    state = json.loads((path / "state.json").read_text())
    assert state == {"note": "run 3", "step": 3}
    manifest = json.loads((path / "MANIFEST.json").read_text())
    assert manifest["files"].keys() == {
        "model.safetensors", "ema_0.99.safetensors", "optimizer.safetensors", "state.json"}


def test_only_the_named_files_are_read(root):
    (path,) = save(root, 3)
    (path / "optimizer.safetensors").unlink()
    assert load_newest(root, names=["ema_0.99"]).tensors.keys() == {"ema_0.99"}
    with pytest.raises(UsageError, match="holds no 'ema_0.5', but ema_0.99, model, optimizer"):
        load_newest(root, names=["ema_0.5"])


def test_no_checkpoint_is_none_and_a_wrong_path_is_named(root):
    assert load_newest(root) is None
    with pytest.raises(UsageError, match="no checkpoint at .*step-00000004"):
        load_checkpoint(root / "step-00000004")


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_modes_follow_the_umask(root, umask):
    before = os.umask(umask)
    try:
        (path,) = save(root, 1)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o777 & ~umask
    assert len(list(path.iterdir())) == 5
    for file in path.iterdir():
        assert file.stat().st_mode & 0o777 == 0o666 & ~umask


# Damage.

FILES = ["model.safetensors", "ema_0.99.safetensors", "optimizer.safetensors", "state.json",
         "MANIFEST.json"]


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_bit_is_found(root, name, caplog):
    good, bad = save(root, 100, 200)
    file = bad / name
    whole = file.read_bytes()
    positions = random.Random(name).sample(range(8 * len(whole)), 60)
    for position in [0, 8 * len(whole) - 1, *positions]:
        damaged = bytearray(whole)
        damaged[position // 8] ^= 1 << position % 8
        file.write_bytes(damaged)
        (problem,) = verify(bad)
        assert problem.startswith(name)
    caplog.clear()
    assert_holds(load_newest(root), 100)
    assert len(caplog.messages) == 1
    assert "step-00000200" in caplog.messages[0] and name in caplog.messages[0]
    with pytest.raises(RunError, match=name):
        load_checkpoint(bad)
    file.write_bytes(whole)
    assert_holds(load_newest(root), 200)


@pytest.mark.parametrize("name", FILES)
def test_every_truncation_is_found(root, name):
    save(root, 100)
    (bad,) = save(root, 200)
    file = bad / name
    whole = file.read_bytes()
    for length in [0, 1, len(whole) // 2, len(whole) - 1]:
        file.write_bytes(whole[:length])
        assert verify(bad)[0].startswith(name)
        assert load_newest(root).step == 100
    file.write_bytes(whole + b"\0")
    assert load_newest(root).step == 100
    file.unlink()
    assert "missing" in verify(bad)[0]
    assert load_newest(root).step == 100


def test_a_directory_that_was_renamed_is_not_believed(root):
    save(root, 100, 200)
    (root / "step-00000200").rename(root / "step-00000300")
    assert verify(root / "step-00000300") == ["MANIFEST.json: it is of step 200"]
    assert load_newest(root).step == 100
    # Under a name of one's own a copy is welcome.
    shutil.copytree(root / "step-00000100", root / "best")
    assert load_checkpoint(root / "best").step == 100


def test_without_a_sound_one_the_run_stops_and_says_why(root):
    for path in save(root, 100, 200):
        (path / "model.safetensors").write_bytes(b"")
    with pytest.raises(RunError, match="step-00000200: model.safetensors: 0 bytes.*step-00000100"):
        load_newest(root)


def forge(path, **files):
    """A checkpoint with a manifest that is right about hostile content."""
    path.mkdir(parents=True)
    listed = {}
    for name, content in {"state.json": b"{}", **files}.items():
        listed[name] = checkpoint._write_file(path / name, [content])
    (path / "MANIFEST.json").write_bytes(checkpoint._manifest_bytes(5, listed))


@pytest.mark.parametrize("content", [
    b"\xff" * 8 + b"{}",  # header of 2**64 - 1 bytes
    (2**40).to_bytes(8, "little") + b"{}",
    b"\x02" + bytes(7) + b"[]",
    b"\x80\x04cos\nsystem\n(S'true'\ntR.",
    b"",
])
def test_hostile_tensor_files_are_damage(root, content):
    forge(root / "step-00000005", **{"model.safetensors": content})
    with pytest.raises(RunError, match="model.safetensors"):
        load_newest(root)


def test_hostile_state_and_manifests_are_damage(root):
    forge(root / "step-00000005", **{"state.json": b"[" * 100_000})
    with pytest.raises(RunError, match="state.json"):
        load_newest(root)
    manifest = root / "step-00000005" / "MANIFEST.json"
    entry = {"size": 0, "sha256": ""}
    for files in ({"state.json": entry, "../evil.safetensors": entry}, {"state.json": 3}, {}, []):
        manifest.write_bytes(checkpoint._manifest_bytes(5, files))
        with pytest.raises(RunError, match="MANIFEST.json"):
            load_newest(root)
    manifest.write_bytes(checkpoint._manifest_bytes(5, {"state.json": entry}, version=99))
    with pytest.raises(RunError, match="format 99"):
        load_newest(root)
    manifest.write_bytes(b" " * (2 << 20))
    with pytest.raises(RunError, match="MANIFEST.json"):
        load_newest(root)


def test_a_pipe_in_place_of_a_file_does_not_hang(root):
    (path,) = save(root, 1)
    (path / "model.safetensors").unlink()
    os.mkfifo(path / "model.safetensors")
    assert "not a regular file" in verify(path)[0]


# Saves that do not get to their end.

# Each trial is a forked child of one process, to pay for importing torch once. `die` is the
# number of the call of os.fsync or os.rename before which the child is gone.
DRIVER = textwrap.dedent("""
    import os, resource, sys
    from pathlib import Path
    sys.path.insert(0, sys.argv[2])
    from tests.test_checkpoint import save
    from robustdm.runs import checkpoint

    base = Path(sys.argv[1])
    def fork(work):
        child = os.fork()
        if child == 0:
            try:
                work()
            except checkpoint.CheckpointError as error:
                print(error, flush=True)
                os._exit(7)
            except BaseException as error:
                print(repr(error), flush=True)
                os._exit(8)
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def dying(step, root, die):
        calls = [0]
        def guard(function):
            def guarded(*arguments):
                if calls[0] == die:
                    os._exit(9)
                calls[0] += 1
                return function(*arguments)
            return guarded
        os.fsync, os.rename = guard(os.fsync), guard(os.rename)
        save(root, step)

    def limited(root):
        resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))
        save(root, 200)

    for step in (100, 200):
        for die in range(20):
            root = base / f"kill-{step}-{die}"
            save(root, 100)
            code = fork(lambda: dying(step, root, die))
            print("kill", step, die, code, flush=True)
            if code == 0:
                break
    root = base / "limit"
    save(root, 100)
    print("limit", fork(lambda: limited(root)), flush=True)
""")


@pytest.fixture(scope="module")
def trials(tmp_path_factory):
    base = tmp_path_factory.mktemp("trials")
    top = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(base), top],
        capture_output=True, text=True, timeout=120, cwd=top,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return base, done.stdout.splitlines()


def test_a_kill_at_any_moment_leaves_a_sound_checkpoint(trials):
    base, lines = trials
    kills = [line.split()[1:] for line in lines if line.startswith("kill")]
    # 5 files, the staging directory, the rename, the parent: 8 moments; 9 where one is replaced.
    assert [int(step) for step, _, code in kills if code == "9"] == [100] * 9 + [200] * 8
    for step, die, code in kills:
        root = base / f"kill-{step}-{die}"
        newest = load_newest(root)
        published = code == "0" or int(die) == 7
        assert_holds(newest, int(step) if published else 100)
        clean_stale(root)
        assert not [name for name in os.listdir(root) if name.startswith(".")]
        assert_holds(load_newest(root), newest.step)
        save(root, 300)
        assert_holds(load_newest(root), 300)


def test_a_file_size_limit_is_one_clear_error(trials):
    base, lines = trials
    assert "limit 7" in lines
    (message,) = [line for line in lines if "File too large" in line]
    assert "step 200" in message and "earlier checkpoints are untouched" in message
    assert os.listdir(base / "limit") == ["step-00000100"]
    assert_holds(load_newest(base / "limit"), 100)


class FullDisk:
    """Stands for `open`: files on a disk that has room for so many bytes."""

    def __init__(self, room):
        self.room = room

    def __call__(self, path, mode="r", **keywords):
        file = open(path, mode, buffering=0, **keywords)
        if "x" not in mode:
            return file
        disk = self

        class Full:
            def __enter__(self):
                return self

            def __exit__(self, *_):
                file.close()

            def write(self, data):
                disk.room -= len(data)
                if disk.room < 0:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return file.write(data)

            def __getattr__(self, name):
                return getattr(file, name)

        return Full()


@pytest.mark.parametrize("step", [100, 200])
def test_a_full_disk_leaves_what_was_there(root, monkeypatch, step):
    (path,) = save(root, 100)
    size = sum(file.stat().st_size for file in path.iterdir())
    for room in (0, size // 3, size - 1):
        monkeypatch.setattr(checkpoint, "open", FullDisk(room), raising=False)
        with pytest.raises(CheckpointError, match=f"step {step} .*No space left") as info:
            save(root, step)
        assert "\n" not in str(info.value) and str(root) in str(info.value)
        assert info.value.exit_code == 1
        assert os.listdir(root) == ["step-00000100"]
        assert_holds(load_newest(root), 100)
    monkeypatch.setattr(checkpoint, "open", FullDisk(size + 10), raising=False)
    save(root, step)
    assert_holds(load_newest(root), step)


def test_the_space_is_estimated_before_anything_is_written(root, monkeypatch):
    save(root, 100)
    monkeypatch.setattr(checkpoint, "_write_file", None)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage",
                        lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(CheckpointError, match="needs 1 MiB and 0 MiB are free"):
        save(root, 200)
    assert os.listdir(root) == ["step-00000100"]


@pytest.mark.parametrize("call", [0, 1])
def test_a_failed_rename_puts_the_old_one_back(root, monkeypatch, call):
    save(root, 100)
    rename, calls = os.rename, []

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) == call + 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rename(*arguments)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(CheckpointError, match="Input/output error"):
        save(root, 100)
    assert os.listdir(root) == ["step-00000100"]
    assert_holds(load_newest(root), 100)


def test_a_directory_that_is_a_file_is_an_error_of_the_run(root):
    root.parent.mkdir()
    root.write_text("")
    with pytest.raises(CheckpointError, match="not written to"):
        save(root, 100)


def test_an_interrupt_leaves_nothing_behind(root, monkeypatch):
    save(root, 100)

    def interrupted(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "_sync_directory", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(root, 200)
    assert os.listdir(root) == ["step-00000100"]


def test_what_cannot_be_stored_is_refused_by_name(root):
    with pytest.raises(TypeError, match="'z'.*complex64"):
        save_checkpoint(root, 1, {"model": {"z": torch.zeros(2, dtype=torch.complex64)}}, {})
    with pytest.raises(ValueError, match="'../model'"):
        save_checkpoint(root, 1, {"../model": {}}, {})
    with pytest.raises(TypeError):
        save_checkpoint(root, 1, {}, {"generator": object()})
    assert not root.exists() or os.listdir(root) == []


def test_a_step_reached_again_is_replaced(root):
    save(root, 100, 200)
    (root / "step-00000200" / "model.safetensors").write_bytes(b"damaged")
    assert load_newest(root).step == 100
    save(root, 200)
    assert_holds(load_newest(root), 200)
    save_checkpoint(root, 200, {"model": {}}, {"note": "another"})
    assert load_newest(root).state["note"] == "another"
    assert sorted(os.listdir(root)) == ["step-00000100", "step-00000200"]


# Keeping and clearing.


def steps_in(root):
    return [step for step, _ in list_checkpoints(root)]


def test_prune_keeps_the_last_and_every_nth(root):
    save(root, *range(100, 1001, 100))
    removed = prune(root, keep_last=2, keep_every=300)
    assert steps_in(root) == [300, 600, 900, 1000]
    assert len(removed) == 6 and not any(path.exists() for path in removed)
    prune(root, keep_last=1)
    assert steps_in(root) == [1000]
    assert sorted(os.listdir(root)) == ["step-00001000"]


def test_prune_never_removes_the_newest_sound_one(root):
    # A flipped bit, seen only by the sha256, in the newer ones: the sound one is beyond keep_last.
    for path in save(root, 100, 200, 300, 400)[2:]:
        file = path / "model.safetensors"
        data = file.read_bytes()
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert prune(root, keep_last=1) == [root / "step-00000100"]
    assert load_newest(root).step == 200


def test_prune_does_not_count_incomplete_ones(root):
    for path in save(root, 100, 200, 300, 400)[1:3]:
        (path / "MANIFEST.json").unlink()
    prune(root, keep_last=2)
    assert steps_in(root) == [100, 400]


def test_prune_without_a_sound_one_removes_nothing(root):
    for path in save(root, 100, 200):
        (path / "state.json").write_text("{}")
    assert prune(root, keep_last=1) == []
    assert steps_in(root) == [100, 200]


def test_prune_leaves_strangers_alone(root):
    save(root, 100, 200)
    (root / "step-best").mkdir()
    (root / "notes.txt").write_text("mine")
    prune(root, keep_last=1)
    clean_stale(root)
    assert sorted(os.listdir(root)) == ["notes.txt", "step-00000200", "step-best"]


def test_stale_directories_are_cleared(root):
    clean_stale(root)
    save(root, 100)
    (root / ".tmp-dead").mkdir()
    (root / ".tmp-dead" / "model.safetensors").write_bytes(b"half")
    shutil.copytree(root / "step-00000100", root / ".old-step-00000100")
    assert_holds(load_newest(root), 100)
    clean_stale(root)
    assert os.listdir(root) == ["step-00000100"]


# Networks and optimizers.


def network(width=4):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 2))


def train(model, optimizer, steps, first=0):
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        optimizer.zero_grad()
        model(torch.randn(8, 3, generator=generator)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("options", [{}, {"fused": True}])
def test_training_goes_on_bit_for_bit(root, options):
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.8, 0.9), **options)
    train(model, optimizer, 3)
    tensors, rest = optimizer_tensors(optimizer)
    save_checkpoint(root, 3, {"model": model.state_dict(), "optimizer": tensors},
                    {"optimizer": rest})
    train(model, optimizer, 3, first=3)

    other = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    resumed = torch.optim.AdamW(other.parameters(), lr=0.5, **options)
    loaded = load_newest(root)
    check_model_shapes(other, loaded.tensors["model"])
    other.load_state_dict(loaded.tensors["model"])
    load_optimizer(resumed, loaded.tensors["optimizer"], loaded.state["optimizer"])
    assert resumed.param_groups[0]["lr"] == 0.01
    assert resumed.param_groups[0]["betas"] == (0.8, 0.9)
    train(other, resumed, 3, first=3)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_moments_take_the_memory_format_of_their_parameter():
    # A fused update walks through parameter and moments side by side, in the order of memory.
    def setup():
        torch.manual_seed(1)
        model = nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)
        return model, torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)

    def step(model, optimizer, seed):
        generator = torch.Generator().manual_seed(seed)
        images = torch.randn(2, 3, 8, 8, generator=generator)
        optimizer.zero_grad()
        model(images.to(memory_format=torch.channels_last)).square().mean().backward()
        optimizer.step()

    model, optimizer = setup()
    step(model, optimizer, 0)
    tensors, rest = optimizer_tensors(optimizer)
    other, resumed = setup()
    other.load_state_dict(model.state_dict())
    load_optimizer(resumed, {name: t.clone(memory_format=torch.contiguous_format)
                             for name, t in tensors.items()}, rest)
    step(model, optimizer, 1)
    step(other, resumed, 1)
    assert torch.equal(model.weight, other.weight)


def test_the_way_an_update_is_computed_is_not_restored():
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    train(model, optimizer, 1)
    tensors, rest = optimizer_tensors(optimizer)
    assert "fused" not in json.dumps(rest)
    plain = torch.optim.AdamW(model.parameters(), foreach=False)
    load_optimizer(plain, tensors, json.loads(json.dumps(rest)))
    assert plain.param_groups[0]["fused"] is None and plain.param_groups[0]["foreach"] is False


def test_an_optimizer_before_its_first_step(root):
    optimizer = torch.optim.AdamW(network().parameters())
    tensors, rest = optimizer_tensors(optimizer)
    assert tensors == {}
    load_optimizer(optimizer, tensors, rest)
    assert not optimizer.state


def test_another_architecture_is_named():
    tensors = network(5).state_dict()
    with pytest.raises(UsageError) as info:
        check_model_shapes(network(4), tensors)
    message = str(info.value)
    assert message.startswith("checkpoint of another architecture: parameter 0.weight has shape "
                              "(5, 3), the network needs (4, 3); parameter 0.bias")
    assert message.count("has shape") == 3 and "\n" not in message

    with pytest.raises(UsageError, match="; and 1 more; use the configuration") as info:
        check_model_shapes(network(4), {**tensors, "2.bias": torch.zeros(7)})
    assert str(info.value).count("has shape") == 3

    tensors = network(4).state_dict()
    del tensors["2.bias"]
    tensors["9.bias"] = torch.zeros(1)
    with pytest.raises(UsageError, match=r"2.bias is missing, the network needs \(2,\); "
                                         r"parameter 9.bias of shape \(1,\) is unknown"):
        check_model_shapes(network(4), tensors)
    check_model_shapes(network(4), network(4).state_dict())


def test_an_optimizer_of_another_architecture_is_refused():
    def state(model):
        optimizer = torch.optim.AdamW(model.named_parameters())
        train(model, optimizer, 1)
        return optimizer, *optimizer_tensors(optimizer)

    optimizer, tensors, rest = state(network(4))
    _, wide, _ = state(network(5))
    with pytest.raises(UsageError, match=r"parameter 0.weight has shape \(5, 3\), the network "
                                         r"needs \(4, 3\)"):
        load_optimizer(optimizer, wide, rest)
    _, deep, deep_rest = state(nn.Sequential(network(4), nn.Linear(2, 2)))
    with pytest.raises(UsageError, match="it has 6 parameters .* needs 4"):
        load_optimizer(optimizer, deep, deep_rest)
    with pytest.raises(UsageError, match="parameter 4.step is unknown"):
        load_optimizer(optimizer, deep, rest)
