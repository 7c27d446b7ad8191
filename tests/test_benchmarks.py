"""benchmarks/run.py and compare.py: what they record, and that no wrong result gets a speed."""

import copy
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from robustdm import RunError, UsageError, ops
from robustdm.evaluation.features import Extractor
from robustdm.models import build_model
from robustdm.ops import native, reference

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import compare  # noqa: E402
import elementwise  # noqa: E402
import evaluation  # noqa: E402
import measure as measuring  # noqa: E402
import network  # noqa: E402
import report  # noqa: E402
import run  # noqa: E402
import sampling  # noqa: E402
import scaling  # noqa: E402
import timing  # noqa: E402
from case import against, looks_like  # noqa: E402
from measure import Budget, measure  # noqa: E402

CPU = torch.device("cpu")
# Too little time to compile anything.
QUICK = ["--suite", "cpu", "--tiny", "--repeats", "2", "--minutes", "0.3"]


MEASURING = ["--suite", "evaluation", "--tiny", "--repeats", "2", "--minutes", "0.0001"]


def no_compiling(wanted):
    return False


@pytest.fixture(autouse=True)
def no_interpreter(monkeypatch):
    """Triton's interpreter is for tests of the kernels; it is far too slow to be timed."""
    why_off = ops.why_off
    monkeypatch.setattr(ops, "why_off", lambda backend, op, device: (
        "no GPU" if backend == "triton" else why_off(backend, op, device)))


@pytest.fixture
def on(monkeypatch):
    """A cpp backend on every machine."""
    monkeypatch.setattr(native, "status", lambda: {"cpu": (True, "on"), "cuda": (False, "no GPU")})
    for op in ("noise_perturb", "fgsm_project"):
        monkeypatch.setattr(native, op, getattr(reference, op))


@pytest.fixture
def record(on, tmp_path):
    out = tmp_path / "record.json"
    arguments = [*QUICK, "--only", "noise_perturb 4x3x8x8 fp32", "--out", str(out),
                 "--plot", str(tmp_path / "plot.png")]
    assert run.main(arguments) == 0
    return json.loads(out.read_text())


def test_the_record(record, tmp_path):
    assert record["schema"] == report.SCHEMA and record["device"] == "cpu"
    assert record["versions"]["torch"] == torch.__version__ and record["cpu"]
    assert record["command"].startswith("python benchmarks/run.py --suite cpu --tiny")
    text = json.dumps(record)
    assert str(tmp_path) not in text and str(ROOT) not in text
    (case,) = record["cases"]
    assert case["nbytes"] == 3 * 4 * 4 * 3 * 8 * 8 and case["auto"] == "cpp"
    rows = {row["provider"]: row for row in case["rows"]}
    assert set(rows) == {"eager", "compile", "torch", "cpp", "triton"}
    assert rows["compile"]["reason"] == "no time left to compile"
    for name in ("eager", "torch", "cpp"):
        row = rows[name]
        assert row["status"] == "ok" and 0 < row["p20"] <= row["ms"] <= row["p80"]
        assert row["samples"] == 2 and row["error"] <= row["limit"]
        assert row["gb_s"] == pytest.approx(case["nbytes"] / row["ms"] / 1e6)
        assert row["vs_eager"] == pytest.approx(rows["eager"]["ms"] / row["ms"])
    assert case["fastest"] in ("eager", "torch", "cpp")
    unmeasured = {t["text"]: t["holds"] for t in record["targets"]}
    assert unmeasured["fgsm_project 128x3x32x32 fp32: cpp against eager"] is None
    assert unmeasured["largest error of our backends, float32"] is True
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_wrong_result_has_no_speed(on, monkeypatch, tmp_path, capsys):
    def wrong(*arguments):
        xt, x_ran = reference.noise_perturb(*arguments)
        return xt, x_ran + 1e-4

    monkeypatch.setattr(native, "noise_perturb", wrong)
    out = tmp_path / "record.json"
    assert run.main([*QUICK, "--only", "noise_perturb 4x3x8x8 fp32", "--out", str(out)]) == 1
    (row,) = (r for r in json.loads(out.read_text())["cases"][0]["rows"] if r["provider"] == "cpp")
    assert row["status"] == "WRONG" and not {"ms", "gb_s", "vs_eager"} & set(row)
    assert "WRONG" in capsys.readouterr().out


def test_a_backend_that_raises_fails_the_run(on, monkeypatch, tmp_path):
    def broken(*arguments):
        raise RuntimeError("no such symbol")

    monkeypatch.setattr(native, "fgsm_project", broken)
    (case,) = run.select(CPU, "fgsm_project 4x3x8x8 fp32", tiny=True)
    found = measure(case, CPU, 1, timing.Sensors(CPU), no_compiling)
    (row,) = (r for r in found["rows"] if r["provider"] == "cpp")
    assert row["status"] == "FAILED" and "no such symbol" in row["reason"]
    assert report.failures({"cases": [found]})


def test_a_case_that_cannot_be_built_or_timed_costs_no_other(on, monkeypatch, tmp_path):
    select = run.select

    def broken(device):
        raise torch.OutOfMemoryError("out of memory")

    def two(device, only, tiny):
        case = select(device, only, tiny)[0]
        return [replace(case, name="broken", build=broken), case]

    monkeypatch.setattr(run, "select", two)
    cpu_timer = timing.cpu_timer

    def failing(call, inputs):
        timer = cpu_timer(call, inputs)
        if getattr(call, "keywords", {}).get("backend") == "cpp":
            timer = replace(timer, sample=lambda: broken(None))
        return timer

    monkeypatch.setattr(measuring, "cpu_timer", failing)
    out = tmp_path / "record.json"
    assert run.main([*QUICK, "--only", "noise_perturb 4x3x8x8 fp32", "--out", str(out)]) == 1
    first, second = json.loads(out.read_text())["cases"]
    assert [r["status"] for r in first["rows"]] == ["FAILED"]
    rows = {r["provider"]: r for r in second["rows"]}
    assert rows["cpp"]["status"] == "FAILED" and "ms" not in rows["cpp"]
    assert rows["eager"]["ms"] > 0 and rows["torch"]["ms"] > 0


@pytest.mark.parametrize("before, after", [
    ({}, {"joules": 5.0}), ({"joules": 5.0}, {}), ({"joules": 5.0}, {"joules": 7.0})])
def test_a_sensor_that_comes_or_goes_costs_no_case(before, after):
    reads = iter([before | {"throttled": None}, after | {"throttled": None}])
    (case,) = run.select(CPU, "fgsm_project 4x3x8x8 fp32", tiny=True)
    found = measure(case, CPU, 1, SimpleNamespace(read=lambda: next(reads)), no_compiling)
    joules = {"case_joules": 2.0} if before and after else {}
    assert found["sensors"] == {"throttled": None, **after, **joules}


def test_sampling_that_fails_while_timed_costs_no_other_provider():
    def broken(sampler, steps):
        raise RuntimeError("no memory")

    rows = [{"sampler": "ddim", "status": "ok"} for _ in range(2)]
    task = sampling.make_task(run.BenchmarkConfig("sampling", tiny=True), CPU)
    timers = [(rows[0], broken), (rows[1], lambda sampler, steps: None)]
    for _ in sampling.timed(timers, 2, 0.0, task):
        pass
    assert rows[0]["status"] == "FAILED" and "no memory" in rows[0]["reason"]
    assert "ms" not in rows[0] and rows[1]["samples"] == 2


def test_every_case_is_right_on_the_cpu():
    for case in run.select(CPU, "", tiny=True):
        found = measure(case, CPU, 1, timing.Sensors(CPU), no_compiling)
        bad = [row for row in found["rows"] if row["status"] in ("WRONG", "FAILED")]
        assert not bad, (case.name, bad)
        assert {"eager", "torch"} <= set(report.measured(found)), found["rows"]


def test_checks_notice_what_is_wrong():
    torch.manual_seed(0)
    a, b = torch.randn(50, 200), torch.randn(50, 200)
    statistics, exact = looks_like(lambda: [b]), against(lambda: [b], 1e-6)
    assert statistics((), [a]).right and not exact((), [a]).right
    assert not statistics((), [1.2 * a]).right and not statistics((), [a + 0.2]).right
    assert not statistics((), [a * float("nan")]).right
    assert not exact((), [b * float("nan")]).right and not exact((), [b[:-1]]).right


def test_the_real_cases_need_no_list():
    names = [c.name for c in elementwise.cases(CPU) + network.cases(CPU)]
    assert len(names) == len(set(names))
    assert "adamw_ema 35.7M fp32" in names and "fgsm_project 32x3x256x256 fp32" in names
    shapes = network.norm_shapes("cifar10")
    assert shapes[128, 32, 32] == 8 and {(c, h) for c, h, _ in shapes} == {
        (128, 32), (256, 32), (384, 32), (128, 16), (256, 16), (384, 16), (512, 16), (256, 8),
        (512, 8), (256, 4), (512, 4)}


def test_the_time_is_shared_out():
    budget = Budget(100, 10, "cpu")
    assert budget.has_room() and budget.may_compile(True)
    budget.case_done(18.0, [8.0])  # 9 more such cases would take 90 s
    assert budget.needed == pytest.approx(90) and budget.has_room()
    assert not budget.may_compile(False)
    assert not Budget(0, 10, "cpu").has_room()


def gpu_record(record):
    """A record as a GPU would write it: the code for its table and targets runs without one."""
    made = copy.deepcopy(record)
    made.update(device="cuda", gpu="H200", driver="1.2")
    made["cases"][0]["name"] = "noise_perturb 32x3x256x256 fp32"
    for row in made["cases"][0]["rows"]:
        row["provider"] = {"cpp": "triton", "triton": "cpp"}.get(row["provider"], row["provider"])
        if "ms" in row:
            row.update(warm_ms=row["ms"], host_ms=row["ms"], peak_mib=1.0)
    made["cases"][0]["auto"] = "triton"
    return made


def test_targets_of_a_gpu(record, capsys):
    made = gpu_record(record)
    for row in made["cases"][0]["rows"]:
        if "ms" in row:
            row["ms"] = {"triton": 1.0, "eager": 5.0, "torch": 50.0}[row["provider"]]
    report.derive(made)
    holds = {t["text"]: t["holds"] for t in made["targets"]}
    assert holds["noise_perturb 32x3x256x256 fp32: triton against eager"] is True
    assert holds["noise_perturb 32x3x256x256 fp32: share of copy, triton"] is False
    assert holds["noise_perturb 32x3x256x256 fp32: triton against compile"] is None
    assert made["cases"][0]["fastest"] == "triton" and made["cases"][0]["auto_is_fastest"]
    report.print_record(made)
    assert "H200" in capsys.readouterr().out


# compare.py


def test_compare(record, tmp_path, capsys):
    slower = copy.deepcopy(record)
    slower["cpu"] = "another"
    for row in slower["cases"][0]["rows"]:
        if "ms" in row:
            row["ms"] *= 2
    old, new = tmp_path / "record.json", tmp_path / "new.json"
    new.write_text(json.dumps(slower))
    assert compare.main([str(old), str(new)]) == 0
    out = capsys.readouterr().out
    assert out.count("0.500") == 3 and "the machines differ: cpu" in out
    assert compare.main([str(old), str(old)]) == 0
    out = capsys.readouterr().out
    assert out.count("1.000") == 3 and "differ" not in out


@pytest.mark.parametrize("content", [None, "not json", "[1]", '{"schema": "other"}'])
def test_compare_refuses_other_files(tmp_path, content):
    file = tmp_path / "foreign.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UsageError, match=r"foreign\.json.*benchmarks/run\.py"):
        report.read_record(file)


def test_usage_errors_are_one_line(tmp_path):
    def call(*arguments):
        return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True,
                              text=True)

    done = call("benchmarks/compare.py", "no.json", "no.json")
    assert done.returncode == 2 and done.stderr.startswith("error: no.json does not exist")
    assert "Traceback" not in done.stderr
    for arguments, problem in (
        (["--only", "no such op"], "no case"), (["--repeats", "0"], "at least 1"),
        (["--only", "noise_perturb 4", "--out", str(tmp_path / "no/x.json")], "make the directory"),
    ):
        with pytest.raises(UsageError, match=problem):
            run.main([*QUICK, *arguments])


def test_list(capsys):
    assert run.main(["--suite", "cpu", "--tiny", "--list"]) == 0
    assert "fgsm_project 4x3x8x8 bf16: 6,144 B; read x_t and" in capsys.readouterr().out


def test_the_record_of_evaluation(tmp_path, capsys, monkeypatch):
    out = tmp_path / "record.json"
    assert run.main([*MEASURING, "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert record["schema"] == "robustdm-evaluation-1" and record["overlap"]["same"]
    assert len({m["held_mib"] for m in record["memory"]}) == 1 and record["metrics"]["seconds"] > 0
    assert record["features"]["images"] == 500 and "img/s" in capsys.readouterr().out
    whole = record["whole"]
    assert [r["provider"] for r in whole["rows"]] == [p.name for p in sampling.providers(CPU)]
    for row in whole["rows"]:
        assert row["status"] == ("off" if "compile" in row["provider"] else "ok")
        if "ms" in row:  # of a step, as in the sampling suite
            assert row["img_per_s"] == pytest.approx(
                whole["samples"] / (whole["steps"] * row["ms"] / 1e3))
    assert sum(row.get("samples") == 2 for row in whole["rows"]) == 6
    # What the overlap does to the features must show.
    extract = evaluation.extract
    monkeypatch.setattr(evaluation, "extract", lambda *a, **k: _shifted(extract(*a, **k)))
    assert run.main([*MEASURING, "--only", "overlap"]) == 1
    assert "features differ by 1" in capsys.readouterr().out
    with pytest.raises(UsageError, match="model is 'tiny'"):
        run.main(["--suite", "evaluation", "--model", "tiny"])
    for arguments, problem in ((["--only", "no such"], "choose one of features, metrics"),
                               (["--batch", "0"], "batch is 0")):
        with pytest.raises(UsageError, match=problem):
            run.main([*MEASURING, *arguments])


def test_the_batch_of_evaluation(tmp_path, monkeypatch):
    """What is drawn at once, and what an extractor gets at once."""
    call, sizes, out = Extractor.__call__, [], tmp_path / "record.json"
    monkeypatch.setattr(Extractor, "__call__", lambda self, images: (
        sizes.append(len(images)), call(self, images))[1])
    for stage, batch in (("features", 50), ("whole", 5)):
        sizes.clear()
        flags = ["--only", stage, "--batch", str(batch), "--out", str(out)]
        assert run.main([*MEASURING, *flags]) == 0
        record = json.loads(out.read_text())
        assert set(sizes) == {batch} and record["batch"] == batch and stage in record
    assert record["whole"]["samples"] == 10 and "features" not in record


def test_an_evaluation_of_wrong_samples_has_no_speed(tmp_path, capsys, monkeypatch):
    draw, out = sampling.sample, tmp_path / "record.json"
    monkeypatch.setattr(sampling, "sample", lambda *a, **k: draw(*a, **{**k, "seed": 1}))
    assert run.main([*MEASURING, "--only", "whole", "--out", str(out)]) == 1
    for row in json.loads(out.read_text())["whole"]["rows"]:
        assert row["status"] in ("off", "WRONG" if row["ours"] else "ok")
        assert ("ms" in row) == (row["status"] == "ok")
    assert "whole, ddpm, ours: WRONG" in capsys.readouterr().out


@pytest.mark.parametrize("program", [sampling, evaluation])
def test_diffusers_keeps_freed_memory_too(program, monkeypatch):
    done = []
    monkeypatch.setattr(program, "keep_freed_memory", lambda: done.append("kept"))
    monkeypatch.setattr(sampling, "checked", lambda found, *_: done.extend(
        p.name for p in found) or ())
    suite = program.__name__
    run.main(["--suite", suite, "--tiny", *(["--only", "whole"] if program is evaluation else [])])
    assert done == ["kept", *(p.name for p in sampling.providers(CPU))]


def test_a_stage_of_evaluation_that_fails_costs_no_other(tmp_path, capsys, monkeypatch):
    def broken(*arguments):
        raise RuntimeError("no memory")

    monkeypatch.setattr(evaluation, "_overlap", broken)
    out = tmp_path / "record.json"
    monkeypatch.setattr(evaluation, "_whole", broken)
    assert run.main([*MEASURING, "--out", str(out)]) == 1
    record = json.loads(out.read_text())
    assert record["failed"] == [f"{stage}: FAILED RuntimeError: no memory"
                                for stage in ("overlap", "whole")]
    assert record["features"]["img_per_s"] > 0 and len(record["memory"]) == 2
    assert "no memory" in capsys.readouterr().out


def test_the_record_of_scaling(tmp_path, capsys):
    out = tmp_path / "record.json"
    small = ["--suite", "scaling", "--tiny", "--repeats", "1", "--minutes", "0.001"]
    assert run.main([*small, "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert record["schema"] == scaling.SCHEMA and record["ranks"] == 2 and record["cpu"]
    (row,) = record["steps"]
    assert row["all_reduces"] == 1 and row["bytes"] == 4 * (row["parameters"] + 6)
    assert all(row[mode]["samples"] == 1 and row[mode]["ms"] > 0
               for mode in ("alone", "beside", "together", "all_reduce"))
    for mode in ("alone", "beside"):
        ms = row[mode]["ms"]
        assert row[f"predicted_{mode}"] == pytest.approx(ms / (ms + row["fitted_ms"]))
        assert row[f"measured_{mode}"] == pytest.approx(ms / row["together"]["ms"])
    for size in record["all_reduce"]:  # each of two ranks sends all of it, in packets
        assert size["sent"] is None or size["sent"] > 2 * size["bytes"]
    assert "of 2 ranks" in capsys.readouterr().out
    # A second all-reduce, or one of more, must show.
    for change in (dict(all_reduces=2), dict(bytes=row["bytes"] + 4)):
        assert scaling.failures({"steps": [row | change]})
    with pytest.raises(UsageError, match="batch is 4"):
        run.main([*small, "--batch", "4"])


@pytest.mark.parametrize("part, way", [
    (scaling.ALL_REDUCE, "raise"), ("MLP, batch 4", "raise"), ("MLP, batch 4", "exit"),
])
def test_a_rank_that_fails_costs_no_other_part(tmp_path, capsys, monkeypatch, part, way):
    measured, states = scaling._measure, []

    def broken(ranks, name, *rest):
        if name == part and not ranks.main:  # the other waits for this one
            if way == "exit":
                os._exit(9)
            raise RuntimeError("no [memory]")
        return measured(ranks, name, *rest)

    monkeypatch.setattr(scaling, "_measure", broken)
    write = run.write_json
    monkeypatch.setattr(run, "write_json", lambda path, record: (
        states.append((len(record["all_reduce"]), len(record["steps"]), len(record["failed"]))),
        write(path, record)))
    out = tmp_path / "record.json"
    assert run.main(["--suite", "scaling", "--tiny", "--repeats", "1", "--minutes", "0.001",
                     "--out", str(out)]) == 1
    record = json.loads(out.read_text())
    first = part == scaling.ALL_REDUCE
    assert (bool(record["all_reduce"]), len(record["steps"])) == (not first, int(first))
    assert states[0] == ((0, 0, 1) if first else (2, 0, 0))  # written after the first part
    (line,) = record["failed"]
    assert line.startswith(f"{part}: FAILED ") and line in capsys.readouterr().out.replace("\n", "")
    if way == "raise":
        assert "RuntimeError: no [memory]" in line


def test_latency_and_bandwidth_are_found():
    sizes = [4**k for k in range(6, 14)]
    found = scaling.fit(sizes, [0.3 + s / 2e6 for s in sizes])
    assert found == pytest.approx({"latency_ms": 0.3, "gb_s": 2.0, "error": 0.0}, abs=1e-9)
    assert scaling.fit([1000, 2000, 3000], [1.0, 2.0, 4.0])["error"] > 0.05


def _shifted(made):
    return made[0]._replace(features=made[0].features + 1), made[1]


# The sampling suite. So few minutes leave no time to compile.

DRAWING = ["--suite", "sampling", "--tiny", "--repeats", "2", "--minutes", "0.0001"]


def test_the_record_of_sampling(tmp_path, capsys):
    out = tmp_path / "record.json"
    assert run.main([*DRAWING, "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert record["schema"] == sampling.SCHEMA and record["weights"] == "random"
    assert record["command"].startswith("python benchmarks/run.py --suite sampling --tiny")
    assert (record["batch"], record["steps"], record["shape"]) == (2, 3, [3, 8, 8])
    for sampler in ("ddim", "ddpm"):
        rows = {r["provider"]: r for r in record["rows"] if r["sampler"] == sampler}
        assert list(rows) == [p.name for p in sampling.providers(CPU)]
        off = {name for name, row in rows.items() if row["status"] == "off"}
        assert off == {name for name in rows if "compile" in name}
        assert "no time left" in rows["ours compile"]["reason"]
        best = min(r["ms"] for name, r in rows.items() if name not in off and not r["ours"])
        for name in rows.keys() - off:
            row = rows[name]
            assert row["status"] == "ok" and row["error"] <= row["limit"] and row["samples"] == 2
            assert row["img_per_s"] == pytest.approx(2 / (50 * row["ms"] / 1e3))
            assert row["vs_eager"] == pytest.approx(rows["diffusers"]["ms"] / row["ms"])
            assert row["vs_best"] == pytest.approx(best / row["ms"])
            assert "vs_compile" not in row
    assert "ours bf16" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", ["noise", "spacing", "weights"])
def test_wrong_samples_have_no_speed(monkeypatch, tmp_path, capsys, wrong):
    if wrong == "weights":
        fast = sampling.fast_network

        def other(model, **options):
            network = fast(model, **options)
            with torch.no_grad():
                network.network.conv_out.weight *= 1.01
            return network

        monkeypatch.setattr(sampling, "fast_network", other)
    else:
        changed = dict(noise=dict(seed=1), spacing=dict(spacing="trailing"))[wrong]
        draw = sampling.sample
        monkeypatch.setattr(sampling, "sample", lambda *a, **k: draw(*a, **{**k, **changed}))
    out = tmp_path / "record.json"
    assert run.main([*DRAWING, "--only", "ours fused", "--out", str(out)]) == 1
    rows = [r for r in json.loads(out.read_text())["rows"] if r["ours"]]
    assert len(rows) == 2
    for row in rows:
        assert row["status"] == "WRONG" and not {"ms", "img_per_s", "vs_eager"} & set(row)
    assert capsys.readouterr().out.count("WRONG") == 4  # in the table, and below it


def test_a_provider_that_raises(monkeypatch, tmp_path):
    """Ours fails the run; others', or ours where something is missing, are off."""
    def broken(text, kind=RuntimeError):
        def build(task):
            raise kind(text)

        return build

    task = sampling.make_task(run.BenchmarkConfig("sampling", tiny=True), CPU)
    for provider, status in (
        (sampling.Provider("a", broken("no memory"), ours=True), "FAILED"),
        (sampling.Provider("a", broken("no memory")), "off"),
        (sampling.Provider("a", broken("no memory", sampling.Off), ours=True), "off"),
    ):
        rows, generate = sampling._checked(provider, task, {}, late=False)
        assert [row["status"] for row in rows] == [status] * 2 and generate is None
        assert all("no memory" in row["reason"] for row in rows)
        measured = {"sampler": "ddim", "provider": "b", "status": "ok", "ms": 1.0}
        failed = bool(sampling.failures({"rows": [*rows, measured]}))
        assert failed == (status == "FAILED") and sampling.failures({"rows": rows})
    monkeypatch.setattr(sampling, "_diffusers", lambda name, **k: sampling.Provider(
        name, broken("no memory")))
    out = tmp_path / "record.json"
    with pytest.raises(RunError, match="no memory"):
        run.main([*DRAWING, "--out", str(out)])
    assert [row["status"] for row in json.loads(out.read_text())["rows"]] == ["off"] * 2


def test_what_cannot_be_compiled_is_off(monkeypatch):
    monkeypatch.setattr("robustdm.models.inference.compile_network",
                        lambda model, probe: "no compiler")
    task = sampling.make_task(run.BenchmarkConfig("sampling", tiny=True), CPU)
    provider = next(p for p in sampling.providers(CPU) if p.name == "ours compile")
    rows, _ = sampling._checked(provider, task, {}, late=False)
    assert [(row["status"], row["reason"]) for row in rows] == [("off", "no compiler")] * 2


def test_providers_of_a_gpu_and_their_table(tmp_path, capsys):
    names = [p.name for p in sampling.providers(torch.device("cuda"))]
    assert len(names) == len(set(names)) and "ours bf16 compile graph" in names
    out = tmp_path / "record.json"
    assert run.main([*DRAWING, "--only", "ours fused", "--out", str(out)]) == 0
    made = json.loads(out.read_text())
    made.update(device="cuda", gpu="H200")
    for row in made["rows"]:
        row["peak_mib"] = 12.0
    sampling.print_record(made)
    text = capsys.readouterr().out
    assert "H200" in text and "MiB" in text


def test_usage_of_sampling(tmp_path, capsys):
    assert run.main([*DRAWING, "--list"]) == 0
    assert "ours fused\n" in capsys.readouterr().out
    for arguments, problem in (
        (["--only", "no such"], "no provider"), (["--model", "plane"], "model is 'plane'.*digits"),
        (["--batch", "0"], "batch is 0"), (["--steps", "2000"], "steps is 2000"),
        (["--plot", str(tmp_path / "x.png")], "no picture"),
        (["--out", str(tmp_path / "no/x.json")], "make the directory"),
    ):
        with pytest.raises(UsageError, match=problem):
            run.main([*DRAWING, *arguments])
    with pytest.raises(UsageError, match="batch is 4: the suite cpu has none.*sampling"):
        run.main([*QUICK, "--batch", "4"])


@pytest.mark.parametrize("model,weights", [("tiny", 6.47), ("digits", 0.435), ("cifar10", 35.7)])
def test_models_of_sampling(monkeypatch, model, weights):
    def meta(config, shape):
        with torch.device("meta"):
            return build_model(config, shape)

    monkeypatch.setattr(sampling, "build_model", meta)
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, device: self)
    task = sampling.make_task(run.BenchmarkConfig("sampling", model=model), CPU)
    count = sum(p.numel() for p in task.model.parameters()) / 1e6
    assert count == pytest.approx(weights, rel=0.01) and task.batch == 16
