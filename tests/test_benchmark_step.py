"""The step suite: an independent loop that computes the same loss, honest rows and ratios."""

import json
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from robustdm import NoiseSchedule, Objective
from robustdm.models import build_model
from robustdm.runs.config import TrainConfig

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import paper_loop  # noqa: E402
import run  # noqa: E402
import step  # noqa: E402


@pytest.mark.parametrize("method", ["ddpm", "robust_ran", "robust_adv"])
def test_the_papers_loop_computes_the_same_loss_and_gradient(method):
    """Two codes that share no line, fed with the same random numbers, in float64."""
    model = build_model(TrainConfig(block_channels=(8,), norm_groups=4), (2, 8, 8)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    loop = paper_loop.PaperLoop(model, method)
    objective = Objective(method, NoiseSchedule.linear(1000))
    x0 = torch.randn(6, 2, 8, 8, dtype=torch.float64)
    draw = objective.draw(x0, seed=1, step=2)
    unit = draw.delta / draw.radius.view(-1, 1, 1, 1)
    losses, fit = loop.loss(x0, paper_loop.Numbers(draw.t, draw.eps, draw.beta, unit))
    theirs = torch.autograd.grad(losses.mean(), list(model.parameters()))
    ours = objective(model, x0, draw)
    assert torch.allclose(losses, ours.fit + ours.reg, rtol=1e-9)
    assert torch.allclose(fit, ours.fit, rtol=1e-9)
    mine = torch.autograd.grad(ours.total, list(model.parameters()))
    wrong = sum((a - b).square().sum() for a, b in zip(theirs, mine, strict=True))
    assert wrong.sqrt() < 1e-9 * sum(b.square().sum() for b in mine).sqrt()


def test_a_step_of_the_papers_loop_trains_and_logs():
    model = build_model(TrainConfig(block_channels=(8,), norm_groups=4), (1, 8, 8))
    loop = paper_loop.PaperLoop(model, "robust_adv", lr=1e-3, ema_rate=0.5)
    before = [p.clone() for p in model.parameters()]
    loss = loop.step(torch.randn(4, 1, 8, 8))
    assert loss == loop.logged["loss"] > loop.logged["mse"] > 0 and loop.logged["grad_norm"] > 0
    for old, p, a in zip(before, model.parameters(), loop.average.parameters(), strict=True):
        assert torch.allclose(a, (old + p) / 2, atol=1e-6)
    assert any(not torch.equal(old, p) for old, p in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_each_rung_changes_one_thing(device):
    def changed(a, b):
        return {f.name for f in fields(a) if getattr(a, f.name) != getattr(b, f.name)}

    made = step.rows(device)
    ladder = [r.options for r in made if r.section == "ladder" and r.name != step.STRICT]
    assert ladder[0].paper and ladder[1] == step.Options()
    seen = [changed(a, b) for a, b in zip(ladder[1:], ladder[2:], strict=False)]
    assert all(len(s) == 1 for s in seen) and len(set.union(*seen)) == len(seen)
    top = ladder[-1] if device == "cuda" else ladder[-2]
    for row in made:
        if row.section == "leave one out":
            (name,) = changed(top, row.options)
            assert getattr(top, name) and not getattr(row.options, name)
        if row.section == "approximations":
            assert changed(top, row.options) == {"fields"}
    assert {"tf32", "graph"} <= set.union(*seen) if device == "cuda" else {"allocator"} <= (
        set.union(*seen))


def entry(name, objective, ms, section="ladder", **more):
    return {"section": section, "name": name, "objective": objective, "precision": "fp32",
            "compile": False, "fields": {}, "status": "ok", "ms": ms, "p20": ms, "p80": ms,
            "samples": 3, "error": 1e-7, **more}


def made_record():
    rows = [
        entry(step.PAPER, "ddpm", 10.0), entry(step.PAPER, "robust_adv", 25.0),
        entry("+ a", "ddpm", 4.0), entry("+ a", "robust_adv", 10.0),
        entry("+ b", "ddpm", 2.0), entry("+ b", "robust_adv", 6.0),
        entry("q", "robust_adv", 3.0, "approximations", fields={"reg_fraction": 0.25}),
    ]
    return {"rows": rows, "batch": 4, "flops": 1e9, "device": "cpu", "gpu": None, "cpu": "x",
            "threads": 2, "cores": 2, "model": "tiny", "parameters": 1, "load_before": 0.0,
            "load_after": 0.0, "seconds": 1.0, "versions": {"torch": "2"}}


def test_ratios_name_both_denominators():
    record = made_record()
    step.derive(record)
    rows = {(r["name"], r["objective"]): r for r in record["rows"]}
    best = rows["+ b", "robust_adv"]
    assert best["vs_own_ddpm"] == 3.0 and best["vs_paper_ddpm"] == 0.6
    assert best["faster_than_paper"] == pytest.approx(25 / 6)
    assert rows[step.PAPER, "robust_adv"]["vs_own_ddpm"] == 2.5
    assert rows["q", "robust_adv"]["vs_own_ddpm"] == 1.5  # the last rung's DDPM
    assert rows["q", "robust_adv"]["units"] == 4.25
    assert best["tflops"] == pytest.approx(1e9 * 4 * 8 / 6e-3 / 1e12)
    verdicts = {t["text"].partition(":")[2].strip(): t["reached"] for t in record["targets"]}
    assert verdicts["robust_adv / own DDPM"] is False
    assert verdicts["times faster than the paper-style robust_adv"] is True


def test_a_wrong_row_shows_no_speed(capsys):
    record = made_record()
    record["rows"][5] = {**entry("+ b", "robust_adv", 6.0), "status": "WRONG", "error": 0.5}
    for key in ("ms", "p20", "p80"):
        del record["rows"][5][key]
    step.derive(record)
    columns, lines = step.table(record)
    line = next(cells for cells in lines if cells[0] == "+ b")
    assert line[columns.index("adv ms")] == "WRONG" and line[columns.index("adv / own ddpm")] == ""
    assert line[columns.index("grad error")] == "5.0e-01"
    assert step.failures(record) == ["+ b, robust_adv: WRONG error 0.5, agreement None"]
    step.print_record(record)
    assert "WRONG" in capsys.readouterr().out


def test_wrong_gradients_and_attacks_are_noticed(monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "put back afterwards")
    task = step.Task("tiny", 4, "cpu", tiny=True)
    bench = step.Bench(task, keep=False, threads=torch.get_num_threads())
    reference = step.Options()
    assert bench.build(reference, "robust_adv")["status"] == "ok"
    good = bench.build(step.Options(bf16=True), "robust_adv")
    assert good["status"] == "ok" and 1e-4 < good["error"] < 0.1 and good["agreement"] > 0.97
    attack = Objective._attack
    monkeypatch.setattr(Objective, "_attack", lambda *args: -attack(*args))
    flipped = bench.build(step.Options(channels_last=True), "robust_adv")
    assert flipped["status"] == "WRONG" and flipped["agreement"] < 0.9


def test_the_suite_end_to_end(tmp_path, capsys):
    out = tmp_path / "step.json"
    assert run.main([
        "--suite", "step", "--tiny", "--no-compile", "--only", "+ elementwise", "--repeats", "1",
        "--steps", "2", "--out", str(out), "--plot", str(tmp_path / "step.png"),
    ]) in (0, 1)  # two steps of a network this small need not agree to 3 %
    record = json.loads(out.read_text())
    rows = {(r["name"], r["objective"]): r for r in record["rows"]}
    assert set(rows) == {(n, o) for n in (step.PAPER, step.REFERENCE, "+ elementwise ops")
                         for o in step.OBJECTIVES}
    assert all(r["status"] == "ok" and r["ms"] > 0 for r in rows.values())
    assert rows["+ elementwise ops", "robust_adv"]["vs_paper_ddpm"] > 0
    overlay = record["overlay"]
    assert len(overlay["reference"]) == len(overlay["fastest"]) == 2 == overlay["steps"]
    assert overlay["row"] in ("+ elementwise ops", step.REFERENCE)
    assert (tmp_path / "step.png").stat().st_size > 5000
    assert record["feeding"]["ratio"] > 0 and record["flops"] > 1e4
    assert "| + elementwise ops |" in step.markdown(out)
    assert "paper's loop" in capsys.readouterr().out


class Local:
    """A `step.Worker` without a process; calls for which ``broken`` is true raise."""

    starts = 1

    def __init__(self, task, keep):
        self.task, self.bench = task, step.Bench(task, False, torch.get_num_threads())

    def broken(self, name, args):
        return False

    def __call__(self, name, *args):
        if self.broken(name, args):
            raise step.RunError("RuntimeError: no CUDA graph")
        return getattr(self.bench, name)(*args)

    def close(self):
        pass


@pytest.mark.parametrize("call", ["build", "memory", "time"])
def test_a_row_that_fails_costs_no_other(monkeypatch, tmp_path, capsys, call):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "put back afterwards")
    monkeypatch.setattr(step, "Worker", Local)
    monkeypatch.setattr(Local, "broken", lambda self, name, args: (
        name == call and args[0].elementwise and args[1] == "robust_adv"))
    out, states = tmp_path / "step.json", []
    write = run.write_json
    monkeypatch.setattr(run, "write_json", lambda path, record: (
        states.append(len(record["rows"])), write(path, record)))
    assert run.main(["--suite", "step", "--tiny", "--no-compile", "--only", "+ elementwise",
                     "--repeats", "1", "--steps", "0", "--out", str(out)]) == 1
    rows = {(r["name"], r["objective"]): r for r in json.loads(out.read_text())["rows"]}
    failed = rows.pop(("+ elementwise ops", "robust_adv"))
    assert failed["status"] == "FAILED" and "no CUDA graph" in failed["reason"]
    assert "ms" not in failed and len(rows) == 8
    assert all(r["status"] == "ok" and r["ms"] > 0 for r in rows.values())
    assert set(range(1, 10)) <= set(states)  # written after every row
    assert "no CUDA graph" in capsys.readouterr().out


def test_a_run_that_measured_nothing_fails(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "put back afterwards")
    monkeypatch.setattr(step, "Worker", Local)
    monkeypatch.setattr(Local, "broken", lambda self, name, args: name == "build")
    out = tmp_path / "step.json"
    assert run.main(["--suite", "step", "--tiny", "--only", "x", "--out", str(out)]) == 1
    assert "nothing was measured" in step.failures(json.loads(out.read_text()))


def test_a_process_that_dies_costs_no_measured_row(monkeypatch):
    """Its later rounds are lost, its median is not; rows without a median are FAILED."""
    class Dying:
        starts, calls = 1, 0

        def __call__(self, what, options, name, steps):
            self.calls += 1
            if name == "robust_ran":
                self.starts += 1
                raise step.RunError("its process ended with exit code -9")
            return {"ms": 2.0}

    entries = [{"name": "a", "status": "ok", "ms": 1.0}, {"name": "b", "status": "ok"},
               {"name": "c", "status": "ok"}]
    worker = Dying()
    timed = [(e, worker, step.Options(), n, 1)
             for e, n in zip(entries, ("ddpm", "robust_ran", "robust_adv"), strict=True)]
    config = run.BenchmarkConfig("step", tiny=True, repeats=3)
    for _ in step._time(timed, config, 0.0):
        pass
    assert entries[0] == {"name": "a", "status": "ok", "ms": 1.0}
    assert [e["status"] for e in entries[1:]] == ["FAILED"] * 2
    assert "exit code -9" in entries[1]["reason"] and "another row" in entries[2]["reason"]


def test_the_headline_comes_first_and_shares_what_is_compiled(monkeypatch):
    """Of the rows of a GPU: a graph wraps the step that the row below it has compiled."""
    parts = step.groups(step.rows("cuda"), gpu=True)
    assert [row.name for row in parts[0]] == [
        step.PAPER, step.REFERENCE, "+ CUDA graph", "+ whole step compiled"]
    assert step.BY_VALUE[0] == "robust_adv"
    assert sum(map(len, parts)) == len(step.rows("cuda"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "put back afterwards")
    bench = step.Bench(step.Task("tiny", 2, "cpu", tiny=True), False, torch.get_num_threads())
    compiled = []
    monkeypatch.setattr(bench, "_compile", lambda trainer, options, found: compiled.append(options))
    monkeypatch.setattr(bench, "_check", lambda trainer, options, name: {"error": 0.0})
    monkeypatch.setattr(step.Ladder, "use_cuda_graph",
                        lambda self, warn: setattr(self, "_graph", object()))
    counts = []
    for part in parts:
        for row in part:
            if row.options.compile and row.options.attention == "auto":
                for name in row.objectives:
                    bench.build(row.options, dict(row.options.fields).get("objective", name))
        bench.drop()
        counts.append(len(compiled))
    assert counts[0] == 3  # for six entries
    assert len(compiled) == 3 + 3 + 10 + 5


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "put back afterwards")
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 2
    yield step.Bench(step.Task("tiny", 2, "cpu", tiny=True), False, torch.get_num_threads())
    torch._dynamo.config.recompile_limit = limit
    torch._dynamo.reset()


def test_rows_may_compile_more_graphs_than_dynamo_allows(bench, monkeypatch):
    """They share a function, and dynamo refuses to compile one more often than its limit."""
    real, rows = step.GradientStep.compile, {r.name: r for r in step.rows("cuda")}
    monkeypatch.setattr(step.GradientStep, "compile", lambda self: real(self, "eager"))
    for name in ("+ whole step compiled", "all but channels-last", "all but bf16 weights"):
        found = bench.build(rows[name].options, "ddpm")
        assert found["status"] == "ok" and found["graphs"] == 1, name
    graphs = sum(2 * len(r.objectives) for r in rows.values() if r.options.compile)
    assert graphs <= torch._dynamo.config.recompile_limit  # two where reg_every skips a term


def test_what_failed_to_compile_is_checked_before_another_row_uses_it(bench, monkeypatch):
    real, rows = step.GradientStep.compile, {r.name: r.options for r in step.rows("cuda")}

    def no_memory(self):
        real(self, "eager")
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(step.GradientStep, "compile", no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        bench.build(rows["+ CUDA graph"], "robust_adv")
    monkeypatch.setattr(step.GradientStep, "compile", lambda self: real(self, "eager"))
    found = bench.build(rows["+ whole step compiled"], "robust_adv")
    assert found["status"] == "ok" and found["compiled_error"] < 1e-6 and found["graphs"] == 1


@pytest.mark.parametrize("rounds, wanted", [
    ([["thermal (hardware)"], ["power cap"], None], ["power cap", "thermal (hardware)"]),
    ([None, [], []], []), ([None] * 3, None)])
def test_what_throttled_the_gpu_in_any_round_is_recorded(bench, rounds, wanted):
    """As read behind each round, warm-ups aside."""
    reads = iter([{"throttled": value} for after in ([], [], *rounds)
                  for value in (["sync boost"], after)])
    bench.sensors = SimpleNamespace(read=lambda: next(reads))
    bench.build(step.Options(), "ddpm")
    worker, entry = Local(bench.task, False), {"name": "a", "status": "ok"}
    worker.bench = bench
    config = run.BenchmarkConfig("step", tiny=True, repeats=3)
    for _ in step._time([(entry, worker, step.Options(), "ddpm", 1)], config, float("inf")):
        pass
    assert entry["samples"] == 3 and entry["throttled"] == wanted


def test_limits_and_settings_of_tf32(monkeypatch):
    """TF32 moves robust_adv's gradient by 7e-3; the paper's loop runs as torch is by default."""
    rows = {r.name: r.options for r in step.rows("cuda")}
    for name in ("+ TF32", "+ channels-last"):
        assert rows[name].limits == (2e-2, 0.995)
    assert rows[step.REFERENCE].limits == (1e-3, 0.999)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "put back afterwards")
    bench = step.Bench(step.Task("tiny", 2, "cpu", tiny=True), False, torch.get_num_threads())
    places = ((torch.backends.cudnn, "allow_tf32"), (torch.backends.cuda.matmul, "allow_tf32"),
              (torch.backends.cudnn, "benchmark"))
    before = [getattr(*place) for place in places]
    try:
        for name, wanted in (
            (step.PAPER, [True, False, False]), (step.STRICT, [False, False, False]),
            (step.REFERENCE, [False, False, True]), ("+ TF32", [True, True, True]),
            ("no cudnn.benchmark", [True, True, False]),
        ):
            bench._settings(rows[name])
            assert [getattr(*place) for place in places] == wanted, name
    finally:
        for place, value in zip(places, before, strict=True):
            setattr(*place, value)


def test_a_variant_leaves_out_its_default_and_no_other(monkeypatch):
    """As on a GPU in half precision: what the convolutions get, with and without each default."""
    monkeypatch.setattr(step.FusedResnetBlock2D, "on_gpu", lambda self, x: True)
    monkeypatch.setattr(step.PaddedConv2d, "wants_eight", lambda self, x: True)
    seen, forward = [], torch.nn.Conv2d._conv_forward

    def noting(self, x, weight, bias):
        seen.append((len(weight), weight.shape[1], bias is None))
        return forward(self, x, weight, bias)

    monkeypatch.setattr(torch.nn.Conv2d, "_conv_forward", noting)
    task, found = step.Task("tiny", 2, "cpu", tiny=True), {}
    for name in ("", *step.TOGGLES):
        options = step.Options(norms=True, without=name)
        config = task.config(options)
        network = step.Ladder(config, task.data(config), options).network
        seen.clear()
        network(torch.zeros(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64))
        found[name] = seen.copy()
    first, *blocks, last = found[""]
    assert first[1] == 8 and last[0] == 8 and any(no_bias for *_, no_bias in blocks)
    assert found["padded conv_out"] == [first, *blocks, (3, *last[1:])]
    assert found["folded conv1 bias"] == [first, *((a, b, False) for a, b, _ in blocks), last]


def test_rows_that_cannot_run_are_off(monkeypatch):
    cpu, gpu = (step.Task("tiny", 2, device, tiny=True) for device in ("cpu", "cuda"))
    xformers = step.Options(attention="xformers")
    assert step._missing(xformers, cpu) == "xformers needs a GPU"
    monkeypatch.setattr(step, "find_spec", lambda name: None)
    assert step._missing(xformers, gpu) == "xformers is not installed"
    for options in (step.Options(), step.Options(norms=True, compile=True)):
        assert step._missing(options, cpu) is None
    # Torch draws other masks in every pass; without dropout there is nothing to share.
    unfused = step.Options(compile=True)
    assert "cannot share dropout masks" in step._missing(unfused, cpu)
    monkeypatch.setitem(step.SMALLEST, "dropout", 0.0)
    assert step._missing(unfused, cpu) is None


@pytest.mark.parametrize("arguments, message", [
    (["--model", "cifr"], "model is 'cifr': choose one of cifar, "),
    (["--batch", "0"], "batch is 0: it must be at least 1"),
])
def test_wrong_arguments(arguments, message):
    from robustdm import UsageError

    with pytest.raises(UsageError, match=message):
        run.main(["--suite", "step", *arguments])
