"""The prepared GPU session: it runs through, and nothing that fails costs anything else."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import gpu_session  # noqa: E402
import graph_smoke  # noqa: E402

SCRIPT = Path(gpu_session.__file__)
FAILURES = {
    "cannot start": ("/no/such/program",),
    "hangs": (sys.executable, "-c", "print('before', flush=True); import time; time.sleep(60)"),
    "exits with an error": (sys.executable, "-c", "print('{'); raise SystemExit(3)"),
    "prints no JSON": (sys.executable, "-c", "print('{broken')"),
    "is killed": (sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"),
    "prints no text": (sys.executable, "-c", "import os; os.write(1, bytes([0xff] * 9))"),
}


def harmless(number: int) -> gpu_session.Stage:
    code = f"print('stage {number}', end=' '); print('{{\"value\": {number}}}')"
    return gpu_session.Stage(f"stage {number}", 0, 30, (sys.executable, "-c", code), json=True)


@pytest.fixture(autouse=True)
def no_look_at_the_machine(monkeypatch):
    monkeypatch.setattr(gpu_session, "machine", lambda: {"versions": {}, "driver": None})


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("failure", FAILURES)
def test_a_stage_that_fails_loses_nothing_of_the_others(tmp_path, failure, place):
    chosen = [harmless(n) for n in range(3)]
    chosen[place] = gpu_session.Stage("broken", 0, 1, FAILURES[failure], json=True)
    gpu_session.session("A", chosen, tmp_path, 60.0, time.monotonic())
    record = json.loads((tmp_path / "session-A.json").read_text())
    assert record["complete"] and [s["name"] for s in record["stages"]] == [
        "broken" if n == place else f"stage {n}" for n in range(3)]
    for number, entry in enumerate(record["stages"]):
        if number == place:
            assert entry.get("rc") != 0 or entry["json"] is None and "no JSON" in entry["reason"]
        else:
            assert entry["rc"] == 0 and entry["json"] == {"value": number}
    log = (tmp_path / "log-A.txt").read_text()
    assert all(f"stage {n}" in log for n in range(3) if n != place)
    assert not list(tmp_path.glob("*.new"))


def test_what_a_killed_stage_printed_and_started_is_not_left(tmp_path):
    child = ("import subprocess, sys; p = subprocess.Popen(['sleep', '60']); "
             "print(p.pid, flush=True)")
    stage = gpu_session.Stage("parent", 0, 2, (sys.executable, "-c", child + "; p.wait()"))
    entry, text = gpu_session.run_stage(stage, 60.0, tmp_path)
    assert entry["reason"] == "killed after 2 s" and entry["tail"] == text
    time.sleep(0.2)
    state = Path(f"/proc/{int(text)}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"


@pytest.mark.parametrize("code, value", [("raise SystemExit(1)", None), ("write(2)", 2)])
def test_what_an_earlier_call_measured_is_not_taken_for_this_one(tmp_path, code, value):
    path = tmp_path / "found.json"
    path.write_text('{"value": 1}')
    write = f"write = lambda v: open({str(path)!r}, 'w').write('{{\"value\": %d}}' % v); "
    stage = gpu_session.Stage("reads", 0, 30, (sys.executable, "-c", write + code), reads=(path,))
    entry, _ = gpu_session.run_stage(stage, 60.0, tmp_path)
    assert entry["files"] == {"found.json": value and {"value": value}}, entry["tail"]
    assert path.exists()


def test_late_stages_are_left_out_first(tmp_path):
    slow = gpu_session.Stage("slow", 0, 30, (sys.executable, "-c", "import time; time.sleep(2)"))
    long = gpu_session.Stage("long", 25, 30, ("true",))
    record = gpu_session.session("A", [slow, long, harmless(1)], tmp_path,
                                 25 + gpu_session.MARGIN, time.monotonic())
    assert [s["rc"] for s in record["stages"]] == [0, None, 0]
    assert "left out" in record["stages"][1]["reason"]


def test_a_session_that_is_ended_leaves_its_record(tmp_path):
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[1]); import gpu_session as g\n"
        "from pathlib import Path\n"
        "g.machine = dict\n"
        "stage = lambda name, code: g.Stage(name, 0, 60, (sys.executable, '-c', code))\n"
        "g.session('A', [stage('first', ''), stage('second', 'import time; time.sleep(60)'),"
        " stage('third', '')], Path(sys.argv[2]), 200.0, time.monotonic())\n")
    process = subprocess.Popen([sys.executable, "-c", code, str(SCRIPT.parent), str(tmp_path)],
                               stderr=subprocess.DEVNULL)
    path = tmp_path / "session-A.json"
    for _ in range(200):
        if path.exists() and json.loads(path.read_text())["stages"]:
            break
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    process.wait(20)
    record = json.loads(path.read_text())
    assert not record["complete"]
    assert [(s["name"], s["rc"]) for s in record["stages"]] == [("first", 0), ("second", None)]


def test_predictions_stand_beside_what_was_measured():
    rows = [{"objective": "robust_adv", "ms": 30.0, "compile": True, "vs_paper_ddpm": 0.6,
             "faster_than_paper": 4.0},
            {"objective": "robust_adv", "ms": 20.0, "compile": False, "vs_paper_ddpm": 0.1}]
    found = gpu_session.judged("step, compiled and graph", {"step-graph.json": {"rows": rows}})
    assert [v["measured"] for v in found.values()] == [0.6, 4.0]
    assert [v["predicted"] for v in found.values()] == [0.69, 3.5]
    for name in gpu_session.PREDICTED:  # no record, or a broken one: nothing was measured
        assert all(v["measured"] is None for v in gpu_session.judged(name, {}).values())


def test_a_variant_does_not_stand_beside_the_prediction_of_another():
    cases = [{"op": "group_norm_act", "priority": 0, "name": f"group_norm_act {name}",
              "rows": [{"provider": "triton", "of_copy": value, "vs_compile": value}]}
             for name, value in (("forward+backward 1 bf16", 0.4), ("forward+backward no dropout 1 "
                                 "bf16", 0.8), ("forward+backward AdaGN 1 bf16", 0.9))]
    found = gpu_session.judged("kernels", {"kernels.json": {"cases": cases}})
    assert {v["measured"] for v in found.values()} == {0.4, None}


def test_a_stage_that_printed_garbage_is_no_success(tmp_path, monkeypatch, capsys):
    broken = gpu_session.Stage("broken", 0, 5, (sys.executable, "-c", "print('{')"), json=True)
    monkeypatch.setattr(gpu_session, "stages", lambda *arguments: [broken, harmless(1)])
    for only, code in (("stage 1", 0), ("", 1)):
        monkeypatch.setattr(sys, "argv", ["x", "A", "--out", str(tmp_path), "--only", only])
        assert gpu_session.main() == code
    monkeypatch.setattr(sys, "argv", ["x", "A", "--out", str(tmp_path), "--only", "typo"])
    with pytest.raises(SystemExit) as refused:
        gpu_session.main()
    assert refused.value.code == 2 and "--only is 'typo'" in capsys.readouterr().err


@pytest.mark.parametrize("replayed, wanted", [(True, "+ CUDA graph"), (False, "whole step comp")])
def test_part_b_avoids_graphs_that_part_a_saw_fail(tmp_path, replayed, wanted):
    record = {"stages": [{"name": "graph smoke", "json": {"replayed": replayed}}]}
    graph = gpu_session.works(record)
    made = gpu_session.stages("B", tmp_path, tmp_path, tmp_path, graph, rehearse=False)
    assert wanted in " ".join(made[1].command)
    # On a machine whose folder is empty in each call, B knows nothing of A: it tries the graph.
    assert gpu_session.works(None) and gpu_session.works({"stages": [{}]})
    assert not gpu_session.works({"stages": [{"name": "graph smoke", "json": None}]})


@pytest.mark.parametrize("part", ["A", "B"])
def test_a_call_fits_into_its_time(tmp_path, part):
    made = gpu_session.stages(part, tmp_path, tmp_path, tmp_path, True, rehearse=False)
    assert all(s.least < s.most for s in made)
    assert sum(s.least for s in made) < gpu_session.SECONDS[part] - gpu_session.MARGIN


def test_the_smoke_test_trains_alike_twice():
    found = graph_smoke.compare("cpu", "fp32", tiny=True)
    assert found["difference"] == 0.0 and not found["replayed"]
    assert len(found["eager"]["losses"]) == graph_smoke.STEPS
    assert found["graph"]["warned"] and not found["eager"]["warned"]


@pytest.mark.parametrize("part, names", [
    ("A", ["machine", "doctor", "graph smoke", "tests", "step, eager"]),
    ("B", ["train", "step, compiled and graph", "kernels", "sampling"]),
])
def test_the_rehearsal(tmp_path, part, names):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = subprocess.run([sys.executable, str(SCRIPT), part, "--rehearse", "--out", str(tmp_path)],
                          env=environment, capture_output=True, text=True)
    record = json.loads((tmp_path / f"session-{part}.json").read_text())
    assert [s["name"] for s in record["stages"]] == names
    bad = [(s["name"], s.get("reason"), s.get("tail")) for s in record["stages"] if s["rc"] != 0]
    assert not bad and done.returncode == 0, bad
    assert len(list(tmp_path.iterdir())) <= 8
    files = {k: v for s in record["stages"] for k, v in s.get("files", {}).items()}
    assert all(files.values())
    if part == "B":
        assert (tmp_path / "grid.png").stat().st_size > 100
        assert files["metrics.jsonl"][-1]["step"] == 3 and record["stages"][1]["predictions"]
