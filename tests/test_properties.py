"""What must hold of all inputs, tried on those that hypothesis thinks of."""

import dataclasses
import errno
import itertools
import os
import shutil
import tempfile
import typing
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import assume, given, reject, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from robustdm import NoiseSchedule, ops
from robustdm.cli import parse_train
from robustdm.data import batches
from robustdm.data.base import TensorData
from robustdm.data.streamed import StreamedImages
from robustdm.distributed import Ranks
from robustdm.errors import RunError, UsageError
from robustdm.method.draws import draw_samples
from robustdm.models import improved, pretrained
from robustdm.ops import reference
from robustdm.runs import checkpoint
from robustdm.runs.config import TrainConfig
from robustdm.runs.fields import load_yaml
from robustdm.runs.presets import PRESETS, preset_values
from tests.conftest import HAS_GPU, TOLERANCE
from tests.faults.deadly import kill_after_bytes

# Configurations.

HINTS = typing.get_type_hints(TrainConfig)
PLAIN_TEXT = st.text("abcXYZ019._/*-", min_size=1, max_size=9).filter(lambda s: s[0] != "-")
ANY_TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1)
RECORD = st.fixed_dictionaries({
    "source": ANY_TEXT, "format": ANY_TEXT, "sha256": ANY_TEXT, "variance_type": ANY_TEXT,
    "unet": st.none() | st.dictionaries(ANY_TEXT, st.integers() | st.lists(st.floats(0, 1))),
    "scheduler": st.none() | st.just({"trained_betas": [1e-5, 0.5]}),
})


def values_of(hint, text):
    """What a field of some type may be; not everything fits with every other field."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return st.sampled_from(args)
    if type(None) in args:
        return st.none() | values_of(args[0], text)
    if origin is tuple:
        count = dict(min_size=1, max_size=3) if args[-1] is ... else (
            dict(min_size=len(args), max_size=len(args)))
        return st.lists(values_of(args[0], text), **count).map(tuple)
    return {
        bool: st.booleans(), int: st.integers(1, 2**31), str: text, Path: text.map(Path),
        float: st.floats(0, 1, allow_subnormal=False) | st.sampled_from([1e-5, 1e300, 0.1 + 0.2]),
        dict: RECORD,
    }[hint]


def configurations(names, text=ANY_TEXT, most=5):
    """(a preset, some valid fields on top of it)."""
    @st.composite
    def draw(draw):
        preset = draw(st.sampled_from([name for name in PRESETS if name != "finetune"]))
        fields, own = {}, sorted(PRESETS[preset].keys() & set(names))
        any_of = st.sampled_from(names)
        any_of = st.sampled_from(own) | any_of if own else any_of
        for name in draw(st.lists(any_of, max_size=most, unique=True)):
            tried = {**fields, name: draw(values_of(HINTS[name], text))}
            try:
                TrainConfig(**{**preset_values(preset), **tried})
            except UsageError:
                continue
            fields = tried
        return preset, fields

    return draw()


@given(configurations(sorted(HINTS)))
def test_a_configuration_survives_its_file(tmp_path_factory, drawn):
    preset, fields = drawn
    config = TrainConfig(**{**preset_values(preset), **fields})
    file = tmp_path_factory.getbasetemp() / "config.yaml"
    file.write_text(yaml.safe_dump(config.to_dict(), sort_keys=False), encoding="utf-8")
    assert TrainConfig.from_dict(load_yaml(file)) == config


# These lead elsewhere than to the fields alone.
OTHERWISE = {"preset", "config", "resume", "init_from", "pretrained"}


def flag(name, value):
    """A field on the command line."""
    dashed = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{dashed}" if value else f"--no-{dashed}"]
    return [f"--{dashed}", *map(str, value if isinstance(value, tuple) else [value])]


@settings(max_examples=15)
@given(configurations(sorted(HINTS.keys() - OTHERWISE), PLAIN_TEXT, most=8), st.data())
def test_flags_and_file_are_the_configuration(tmp_path_factory, drawn, data):
    """Wherever a field is given, and flags win over the file."""
    preset, fields = drawn
    wanted = TrainConfig(**{**preset_values(preset), **fields, "preset": preset})
    in_file = data.draw(st.sets(st.sampled_from(sorted(fields)))) if fields else set()
    also = data.draw(st.sets(st.sampled_from(sorted(in_file)))) if in_file else set()
    plain = wanted.to_dict()
    content = {name: plain[name] for name in in_file}
    if "keep_last" in fields:
        content["keep_last"], also = 77, also | {"keep_last"}
    argv = ["--preset", preset]
    if content:
        file = tmp_path_factory.getbasetemp() / "fields.yaml"
        file.write_text(yaml.safe_dump(content))
        argv += ["--config", str(file)]
    for name in sorted(fields.keys() - in_file | also):
        argv += flag(name, fields[name])
    assert dataclasses.replace(parse_train(argv), config=None) == wanted


# Names of weights.


@st.composite
def improved_unets(draw):
    """Arguments of a UNet that improved-diffusion can have, and its number of heads."""
    widths = draw(st.lists(st.sampled_from([32, 64]), min_size=1, max_size=3))
    attends = [draw(st.booleans()) for _ in widths]
    heads = draw(st.sampled_from([1, 2, 4]))
    table = draw(st.none() | st.just(7))
    try:
        dim = improved.head_dim(heads, [w for w, a in zip(widths, attends, strict=True) if a]
                                + widths[-1:])
    except UsageError:
        reject()
    channels = draw(st.sampled_from([1, 3]))
    return pretrained._arguments({
        **improved._EXACT, "sample_size": 8, "in_channels": channels,
        "out_channels": channels * draw(st.sampled_from([1, 2])), "block_out_channels": widths,
        "layers_per_block": draw(st.integers(1, 2)), "attention_head_dim": dim,
        "down_block_types": ["AttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        "up_block_types": ["AttnUpBlock2D" if a else "UpBlock2D" for a in attends[::-1]],
        "attn_norm_num_groups": improved.GROUPS, "num_train_timesteps": table,
        "resnet_time_scale_shift": draw(st.sampled_from(["default", "scale_shift"])),
        "time_embedding_type": "learned" if table else "positional",
    }), heads


def numbered(unet):
    """A state dict in which no number occurs twice."""
    weights, count = {}, 0
    for name, value in pretrained._skeleton(unet).items():
        weights[name] = torch.arange(count, count + value.numel()).view(value.shape)
        count += value.numel()
    if "time_proj.weight" in weights:
        weights["time_proj.weight"] = improved._table(*weights["time_proj.weight"].shape)
    return weights


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@settings(max_examples=12)
@given(improved_unets())
def test_improved_diffusion_and_back_is_the_same(drawn):
    unet, heads = drawn
    weights = numbered(unet)
    theirs = improved.from_diffusers(weights, unet)
    shapes = {name: tuple(value.shape) for name, value in theirs.items()}
    told = improved.unet_arguments(shapes, heads, 8, unet["num_train_timesteps"])
    assert pretrained._arguments(told) == unet
    assert_same(improved.to_diffusers(theirs, unet), weights)
    # Nothing twice, and nothing left out but the table, which improved-diffusion computes.
    numbers = torch.cat([value.flatten() for value in theirs.values()])
    weights.pop("time_proj.weight", None)
    assert numbers.numel() == numbers.unique().numel() == sum(w.numel() for w in weights.values())


SKELETON = numbered(pretrained._arguments(dict(
    block_out_channels=[4, 4], norm_num_groups=2, layers_per_block=1, attention_head_dim=4,
    down_block_types=["AttnDownBlock2D", "DownBlock2D"],
    up_block_types=["UpBlock2D", "AttnUpBlock2D"])))


OLD = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}


def older(name):
    """A name as diffusers had it."""
    for new, old in OLD.items():
        name = name.replace(new, old)
    return name


@given(st.lists(st.sampled_from(["module", "_orig_mod"]), max_size=3), st.booleans(), st.data())
def test_wrapped_and_old_names_are_undone(prefix, old, data):
    at = data.draw(st.none() | st.integers(0, 2))  # a part of the network compiled by itself

    def wrapped(name):
        parts = (older(name) if old else name).split(".")
        if at is not None:
            parts.insert(min(at, len(parts) - 1), "_orig_mod")
        return ".".join([*prefix, *parts])

    names = {name: wrapped(name) for name in SKELETON}
    assert len(set(names.values())) == len(names)
    found = pretrained._renamed({names[name]: value for name, value in SKELETON.items()})
    assert_same(found, SKELETON)
    name = data.draw(st.sampled_from(sorted(SKELETON)))
    both = {name: SKELETON[name], "module." + name: SKELETON[name]}
    try:
        pretrained._renamed(both)
    except UsageError as error:
        assert name in str(error)
    else:
        raise AssertionError("two tensors became one")


# The order of the data.


@given(size=st.integers(1, 40), batch=st.integers(1, 24), seed=st.integers(0, 2**32 - 1),
       start=st.integers(0, 12), steps=st.integers(1, 12), ranks=st.integers(1, 5),
       flip=st.booleans(), resident=st.booleans())
def test_the_stream_is_a_function_of_the_step(
    size, batch, seed, start, steps, ranks, flip, resident
):
    """Begun anywhere and shared by any number of ranks; each epoch has every item once."""
    values = torch.arange(size * 4).view(size, 1, 2, 2).float()
    data = TensorData("x", values, None, 0.0, seed, resident=resident)
    config = TrainConfig(batch_size=batch, accumulate=1, seed=seed, flip=flip)

    def read(first, count, rank=0, among=1):
        stream = batches(data, config, first, "cpu", Ranks(rank, among))
        return list(itertools.islice(stream, count))

    whole = read(0, start + steps)
    items = torch.cat([indices for _, indices in whole])
    for epoch in items.split(size):
        assert len(epoch.unique()) == len(epoch) and (len(epoch) < size or epoch.max() == size - 1)
    parts = [read(start, steps, rank, ranks) for rank in range(ranks)]
    for k, (x, indices) in enumerate(whole[start:]):
        assert torch.equal(torch.cat([part[k][1] for part in parts]), indices)
        assert torch.equal(torch.cat([part[k][0] for part in parts]), x)
        straight = values[indices]
        turned = (x == straight.flip(-1)).flatten(1).all(1)
        assert ((x == straight).flatten(1).all(1) | turned & flip).all()


class Rows:
    """Row after row without end, from a first one on."""

    error = None

    def __init__(self, first):
        self._rows = itertools.count(first)

    def take(self, count):
        return [(row, b"") for row in itertools.islice(self._rows, count)]


@given(buffer=st.integers(1, 17), batch=st.integers(1, 24), seed=st.integers(0, 2**32 - 1),
       start=st.integers(0, 9), steps=st.integers(1, 6), ranks=st.integers(1, 4))
def test_a_stream_without_length_too(buffer, batch, seed, start, steps, ranks):
    data = StreamedImages.__new__(StreamedImages)
    data.buffer, data.seed = buffer, seed

    def read(first, count, rank=0, among=1):
        part = Ranks(rank, among).share(batch)
        if not part:
            return [[] for _ in range(count)]
        order = (numbers[part.start : part.stop] for numbers in data.order(batch, seed, first))
        begin = (first * batch + part.start) // buffer * buffer
        rows = data._batches(Rows(begin), order)
        return [[row for row, _ in rows] for rows in itertools.islice(rows, count)]

    whole = read(0, start + steps)
    rows = [row for step in whole for row in step]
    for block in range(len(rows) // buffer):
        assert sorted(rows[block * buffer :][:buffer]) == list(
            range(block * buffer, (block + 1) * buffer))
    parts = [read(start, steps, rank, ranks) for rank in range(ranks)]
    assert [sum(pieces, []) for pieces in zip(*parts, strict=True)] == whole[start:]


# The fused ops.

SCHEDULE = NoiseSchedule.linear(1000)
TABLES = torch.stack((
    SCHEDULE.sqrt_alphas_cumprod, SCHEDULE.sqrt_one_minus_alphas_cumprod,
    SCHEDULE.sqrt_one_minus_alphas_cumprod,
))


@st.composite
def layouts(draw, shape):
    """Strides of a tensor that lies in memory in any order of its axes, with gaps."""
    order, strides, step = draw(st.permutations(range(len(shape)))), [0] * len(shape), 1
    for axis in order:
        strides[axis] = step
        step *= max(1, shape[axis]) + draw(st.integers(0, 2))
    return tuple(strides)


@st.composite
def tensors(draw, shape, dtype):
    """Normal numbers in any layout; the gaps are NaN."""
    strides = draw(layouts(shape))
    reach = 1 + sum((side - 1) * step for side, step in zip(shape, strides, strict=True) if side)
    memory = torch.full((reach,), torch.nan, dtype=dtype)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9)))
    return memory.as_strided(shape, strides).copy_(torch.randn(shape, generator=generator))


def backend_and_dtype(draw, op):
    usable = [name for name in ("cpp", "triton") if not ops.why_off(name, op, torch.device("cpu"))]
    assume(usable)
    backend = draw(st.sampled_from(usable))
    halves = [] if backend == "triton" and not HAS_GPU else [torch.bfloat16]
    return backend, draw(st.sampled_from([torch.float32, torch.float16, *halves]))


def close(found, wanted, dtype, terms=0.0):
    """``terms``: size of what is added up; where it cancels, its rounding is what is left."""
    assert found.shape == wanted.shape and not found.isnan().any()
    size = max(float(wanted.double().norm()), terms)
    assert float((found.double() - wanted.double()).norm()) <= 2 * TOLERANCE[dtype] * size


@settings(max_examples=25)
@given(st.data())
def test_elementwise_ops_are_the_reference_s_in_any_layout(data):
    backend, dtype = backend_and_dtype(data.draw, "fgsm_project")
    shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    x, gradient, other = (data.draw(tensors(shape, dtype)) for _ in range(3))
    key = torch.tensor([data.draw(st.integers(0, 2**32 - 1)), data.draw(st.integers(0, 2**32 - 1)),
                        data.draw(st.sampled_from([0, 1, 2**31 - 1, 2**40]))])
    _, _, signal, noise, radius, lambda_t = draw_samples(
        key, TABLES, shape[0], dtype, 8 / 255, 0.3, "x", 0.5, 2.0, None, False)
    wide = [value.double() for value in (signal, noise, radius)]
    found = ops.noise_perturb(x, signal, noise, radius, key, backend=backend)
    for a, b in zip(found, reference.noise_perturb(x.double(), *wide, key, torch.float64),
                    strict=True):
        close(a, b, dtype, terms=1.0)
    found = ops.fgsm_project(x, gradient, noise, radius, key, backend=backend)
    for a, b in zip(found, reference.fgsm_project(x, gradient, noise, radius, key), strict=True):
        assert torch.equal(a, b)
    found = ops.equivariance_loss(x, other, gradient, radius, lambda_t, key, dtype=dtype,
                                  backend=backend)
    wanted = reference.equivariance_loss(x.double(), other.double(), gradient.double(), wide[2],
                                         lambda_t.double(), key, torch.float64, False, False)
    for a, b in zip(found, wanted, strict=False):
        close(a, b, torch.float32, terms=1.0)


@settings(max_examples=15)
@given(st.data())
def test_group_norm_act_is_the_reference_s_in_any_layout(data):
    backend, dtype = backend_and_dtype(data.draw, "group_norm_act")
    groups, per_group = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    shape = (data.draw(st.integers(1, 3)), groups * per_group,
             *data.draw(st.lists(st.integers(2, 5), min_size=1, max_size=2)))
    x = data.draw(tensors(shape, dtype))
    sizes = {"weight": shape[1:2], "bias": shape[1:2], "scale": shape[:2], "shift": shape[:2],
             "add": shape[:2]}
    named = {}
    for names in (("weight", "bias"), ("scale", "shift"), ("add",)):
        if data.draw(st.booleans()):
            named |= {name: data.draw(tensors(sizes[name], dtype)) for name in names}
    options = dict(silu=data.draw(st.booleans()), dropout=data.draw(st.sampled_from([0.0, 0.3])),
                   key=torch.tensor([1, 2, data.draw(st.integers(0, 2**33))]), layer=3)
    found = ops.group_norm_act(x, groups, **named, **options, backend=backend)
    y = reference.group_norm_act(x, groups, **named, **options)
    v = x + named["add"].view(*shape[:2], *[1] * (x.ndim - 2)) if "add" in named else x
    # Where a group is of almost equal numbers, rounding is all that is left of them.
    spread = v.double().reshape(shape[0], groups, -1).std(-1, correction=0)
    assume(bool((spread > 0.1).all()))
    close(found, y, dtype)


# The directory of checkpoints.


@dataclasses.dataclass
class Kept:
    """A checkpoint as it should be: what was saved, and whether that is still so."""

    version: int
    sound: bool = True
    whole: bool = True  # its files have the right sizes


MOMENTS = st.tuples(st.just("call"), st.integers(0, 12)) | (
    st.tuples(st.just("bytes"), st.integers(1, 600)))
STEPS = st.integers(1, 9)


class Checkpoints(RuleBasedStateMachine):
    """Saved, pruned and cleared by processes that may die at any moment, damaged on the disk, and
    read all the time."""

    @initialize()
    def begin(self):
        self.folder = Path(tempfile.mkdtemp())
        self.root = self.folder / "checkpoints"
        self.kept: dict[int, Kept] = {}
        self.version, self.dead = 0, False

    def teardown(self):
        if hasattr(self, "folder"):
            shutil.rmtree(self.folder)

    def save(self, step):
        tensors = {"model": {"w": torch.full((3,), float(self.version))}}
        checkpoint.save_checkpoint(self.root, step, tensors, {"version": self.version})

    def die(self, moment, work):
        """Do it in a process that is gone at a moment; whether it came through before."""
        child = os.fork()
        if not child:
            kind, number = moment
            if kind == "bytes":
                kill_after_bytes(number)
            calls = itertools.count()

            def counted(call):
                def made(*arguments, **options):
                    if next(calls) == number:
                        os._exit(9)
                    return call(*arguments, **options)

                return made

            for name in ("fsync", "rename", "unlink", "rmdir") if kind == "call" else ():
                setattr(os, name, counted(getattr(os, name)))
            try:
                work()
            except BaseException:
                os._exit(8)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, 9, -9)
        self.dead |= code != 0
        return code == 0

    def on_disk(self):
        """Step -> the version that is there, None if it is damaged."""
        found = {}
        for step, path in checkpoint.list_checkpoints(self.root):
            sound = not checkpoint.verify(path)
            found[step] = checkpoint.load_checkpoint(path).state["version"] if sound else None
        return found

    @precondition(lambda self: not self.dead)
    @rule(step=STEPS)
    def saved(self, step):
        self.version += 1
        self.save(step)
        self.kept[step] = Kept(self.version)

    @precondition(lambda self: not self.dead)
    @rule(step=STEPS, moment=MOMENTS)
    def killed_while_saving(self, step, moment):
        self.version += 1
        done = self.die(moment, lambda: self.save(step))
        there = self.on_disk().get(step, "nothing")
        if there == self.version:
            self.kept[step] = Kept(self.version)
        else:
            assert not done and (there != "nothing") == (step in self.kept)

    @precondition(lambda self: not self.dead)
    @rule(step=STEPS, call=st.integers(0, 5))
    def disk_fails_while_saving(self, step, call):
        self.version += 1
        calls, real = itertools.count(), os.fsync

        def failing(handle):
            if next(calls) == call:
                raise OSError(errno.EIO, "bad disk")
            real(handle)

        os.fsync = failing
        try:
            self.save(step)
            self.kept[step] = Kept(self.version)
        except checkpoint.CheckpointError:
            assert not list(self.root.glob(".*"))
        finally:
            os.fsync = real

    @rule(data=st.data())
    def damaged(self, data):
        sound = sorted(step for step, kept in self.kept.items() if kept.sound)
        if not sound:
            return
        step = data.draw(st.sampled_from(sound))
        path = dict(checkpoint.list_checkpoints(self.root))[step]
        file = data.draw(st.sampled_from(sorted(path.iterdir())))
        content = bytearray(file.read_bytes())
        how = data.draw(st.sampled_from(["flip", "cut", "remove"]))
        if how == "flip":
            content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(
                st.integers(0, 7))
            file.write_bytes(content)
        elif how == "cut":
            file.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
        else:
            file.unlink()
        kept = self.kept[step]
        kept.sound, kept.whole = False, how == "flip" and file.name != checkpoint.MANIFEST

    def wanted(self, keep_last, keep_every):
        """The steps that pruning must leave."""
        steps = sorted(self.kept, reverse=True)
        sound = [step for step in steps if self.kept[step].sound]
        if not sound:
            return set(steps)
        whole = [step for step in steps if self.kept[step].whole]
        every = {step for step in whole if keep_every and step % keep_every == 0}
        return {step for step in steps if step >= sound[0]} | set(whole[:keep_last]) | every

    @precondition(lambda self: not self.dead)
    @rule(keep_last=st.integers(1, 3), keep_every=st.integers(0, 3))
    def pruned(self, keep_last, keep_every):
        wanted = self.wanted(keep_last, keep_every)
        removed = checkpoint.prune(self.root, keep_last, keep_every)
        assert len(removed) == len(self.kept) - len(wanted)
        self.kept = {step: self.kept[step] for step in wanted}

    @precondition(lambda self: not self.dead)
    @rule(keep_last=st.integers(1, 3), moment=MOMENTS)
    def killed_while_pruning(self, keep_last, moment):
        wanted = self.wanted(keep_last, 0)
        self.die(moment, lambda: checkpoint.prune(self.root, keep_last))
        left = {step for step, _ in checkpoint.list_checkpoints(self.root)}
        assert wanted <= left <= self.kept.keys()
        self.kept = {step: self.kept[step] for step in left}

    @rule(moment=st.none() | MOMENTS)
    def resumed(self, moment):
        if moment and not self.die(moment, lambda: checkpoint.clean_stale(self.root)):
            return
        checkpoint.clean_stale(self.root)
        self.dead = False
        assert not self.root.is_dir() or not list(self.root.glob(".*"))

    @invariant()
    def what_was_saved_is_there(self):
        if not hasattr(self, "root"):
            return
        assert self.on_disk() == {
            step: kept.version if kept.sound else None for step, kept in self.kept.items()}
        sound = [step for step, kept in self.kept.items() if kept.sound]
        if not sound and self.kept:
            try:
                checkpoint.load_newest(self.root)
            except RunError:
                return
            raise AssertionError("something damaged was loaded")
        loaded = checkpoint.load_newest(self.root)
        if not sound:
            assert loaded is None
            return
        kept = self.kept[max(sound)]
        assert (loaded.step, loaded.state["version"]) == (max(sound), kept.version)
        assert loaded.tensors["model"]["w"].tolist() == [kept.version] * 3


TestCheckpoints = Checkpoints.TestCase
TestCheckpoints.settings = settings(max_examples=20, stateful_step_count=15)


@pytest.mark.parametrize("call", range(8))
def test_pruning_killed_before_every_call(call):
    """What the machine seldom comes to: a checkpoint of which some files are gone."""
    machine = Checkpoints()
    machine.begin()
    try:
        for step in (1, 2, 3):
            machine.saved(step)
        machine.killed_while_pruning(keep_last=1, moment=("call", call))
        machine.what_was_saved_is_there()
        machine.resumed(None)
        machine.what_was_saved_is_there()
    finally:
        machine.teardown()
