"""The studies' machinery: arms, their reuse, tables and claims, on runs of a few steps."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from markupsafe import escape

from robustdm import UsageError
from robustdm.evaluation.features import CifarResNet
from robustdm.method.baselines import blur
from robustdm.models import PointMLP
from robustdm.reporting.tables import text_table
from robustdm.reproduce import STUDIES, main
from robustdm.runs.config import TrainConfig
from robustdm.runs.presets import preset_values
from robustdm.studies import (
    digits,
    fig3,
    fig6_left,
    finetune,
    lambda_mode,
    points,
    robustness,
    runner,
    scales,
    subspace,
)
from robustdm.studies.approximations import EXACT, METHODS, Approximations
from robustdm.studies.claims import Claim, Results, Spread, interval, judge, ratio_claim, untested
from robustdm.studies.fig8 import Figure8, row
from robustdm.studies.fig24 import Figure24
from robustdm.studies.invitro import InVitro
from robustdm.studies.runner import (
    KNOWN,
    arms_directory,
    load_model,
    load_samples,
    read_arms,
    run_arm,
)
from robustdm.studies.study import Study
from robustdm.studies.table1 import Table1
from robustdm.studies.table2 import Table2
from robustdm.studies.tradeoff import EqualSignal, at_equal_signal

GONE = "DDPM, stopped early"  # a baseline that records still have
KEPT = Path(__file__).parent.parent / "benchmarks/results/cpu"
QUICK = dict(samples=40, sampler="ddim", sampling_steps=3)


def tiny(tmp_path, seeds=1, steps=None):
    return scales.make_scale("tiny", tmp_path / "study", seeds, 1, steps)


@pytest.fixture
def arm(tmp_path):
    made = subspace.arms(tiny(tmp_path, steps=3), {"DDPM": scales.OBJECTIVES["DDPM"]})[0]
    arms_directory(tmp_path / "study").mkdir()
    return replace(made, **QUICK)


def quick(monkeypatch, **sampling):
    """Every arm samples so."""
    arm = scales.Scale.arm
    monkeypatch.setattr(scales.Scale, "arm", lambda self, *a, **k: replace(
        arm(self, *a, **k), **sampling))


def test_an_arm_repeats_bit_for_bit(arm, tmp_path):
    out = tmp_path / "study"
    first = run_arm(arm, arms_directory(out))
    samples = load_samples(arm, out)
    again = run_arm(arm, arms_directory(out))
    assert torch.equal(samples, load_samples(arm, out)) and samples.shape == (40, 32)
    assert first["measures"] == again["measures"] and set(first["measures"]) > {
        "off_subspace_sd", "component_ratio_5"}


def test_keys_tell_arms_apart_and_survive_a_change_of_defaults(tmp_path):
    scale = tiny(tmp_path, seeds=3)
    keys = [a.key for a in lambda_mode.LambdaMode(scale).arms()]
    assert len(set(keys)) == len(keys)
    # Studies share arms: the lambda study adds only what the others do not have.
    others = (subspace.Subspace, digits.Digits, InVitro)
    shared = [a for study in others for a in study(scale).arms()]
    missing = {key.rsplit("-seed")[0] for key in set(keys) - {a.key for a in shared}}
    assert missing == {f"{group}-robust_adv-{mode}" for mode in ("std", "literal")
                       for group in ("subspace", "gaussians,-outliers", "digits")}
    for made in shared:
        assert made.config.lambda_mode in made.name or "adv" not in made.name


@pytest.mark.parametrize("change", [
    {"steps": 4}, {"lr": 0.5}, {"clip_samples": True}, {"data_dir": "other.npz"}, {"seed": 7},
    {"lam": 0.9}, {"batch_size": 2},
])
def test_what_decides_an_arm_changes_its_key(arm, change):
    """Else a study would show the cached numbers of another run as its own."""
    assert replace(arm, config=replace(arm.config, **change)).key != arm.key
    assert replace(arm, samples=41).key != arm.key != replace(arm, sampler="ddpm").key


def test_bookkeeping_leaves_the_key(arm):
    config = replace(arm.config, log_every=7, out="elsewhere", num_samples=3)
    assert replace(arm, config=config).key == arm.key


def test_a_study_end_to_end_and_again(tmp_path, capsys, monkeypatch):
    """The second call trains nothing and says the same."""
    quick(monkeypatch, **QUICK)
    command = ["subspace", "--seeds", "1", "--steps", "2", "--jobs", "1",
               "--out", str(tmp_path / "subspace")]
    assert main(command) == 0
    first = capsys.readouterr().out
    assert main(command) == 0
    second = capsys.readouterr().out
    assert "14 of 14 arms are done already" in second
    table = "subspace\n "
    assert first[first.index(table):] == second[second.index(table):]
    results = json.loads((tmp_path / "subspace" / "results.json").read_text())
    assert len(results["arms"]) == 14 and len(results["claims"]) == 10
    assert (tmp_path / "subspace" / "tradeoff.png").exists() and "page.html" in first
    assert "| robust_adv (ray)" in (tmp_path / "subspace" / "table.md").read_text()
    # What all arms have in common is written once, and read back whole.
    assert results["config"]["num_points"] == 5000 and "num_points" not in (
        results["arms"][0]["config"])
    arms = read_arms(tmp_path / "subspace" / "results.json", "compare")
    assert all(TrainConfig.from_dict(arm["config"], "x").num_points == 5000 for arm in arms)
    assert {arm["config"]["objective"] for arm in arms} > {"ddpm", "robust_adv"}


def test_arms_of_another_revision_are_named_and_set_aside(tmp_path, capsys, monkeypatch):
    quick(monkeypatch, **QUICK)
    command = ["subspace", "--seeds", "1", "--steps", "1", "--jobs", "1",
               "--out", str(tmp_path / "subspace")]
    assert main(command) == 0
    monkeypatch.setattr(runner, "git_revision", lambda: "f" * 40)
    assert main(command) == 0
    assert "another revision of the code" in capsys.readouterr().out
    assert main([*command, "--fresh"]) == 0
    said = capsys.readouterr().out
    assert "is moved to" in said and "done already" not in said
    assert "another revision of" not in said
    assert (tmp_path / "arms.1").is_dir(), "nothing is lost"


def test_another_file_in_the_same_place_is_another_arm(arm, tmp_path):
    path = tmp_path / "w.th"
    path.write_text("one")
    first = replace(arm, weights=path).key
    assert replace(arm, weights=path).key == first
    path.write_text("other")
    assert replace(arm, weights=path).key != first
    of_data = replace(arm, config=replace(arm.config, data_dir=path))
    first = of_data.training_key
    path.write_text("a third")
    assert of_data.training_key != first


def test_workers_take_their_threads_and_end_with_a_parent_that_is_killed(tmp_path):
    code = (
        "import os, time, torch\n"
        "from concurrent.futures import ProcessPoolExecutor\n"
        "from multiprocessing import get_context\n"
        "from robustdm.studies.runner import _begin_worker\n"
        "if __name__ == '__main__':\n"
        "    of = (os.getpid(), 3)\n"
        "    pool = ProcessPoolExecutor(1, get_context('spawn'), _begin_worker, of)\n"
        "    threads = pool.submit(torch.get_num_threads).result()\n"
        "    future = pool.submit(time.sleep, 60)\n"
        "    print(threads, list(pool._processes)[0], flush=True)\n"
        "    future.result()\n"
    )
    script = tmp_path / "parent.py"
    script.write_text(code)
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True,
                              env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    threads, worker = map(int, parent.stdout.readline().split())
    assert threads == 3  # and the worker has begun to watch
    parent.kill()
    parent.wait()
    for _ in range(100):
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return
        if Path(f"/proc/{worker}/stat").read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    os.kill(worker, signal.SIGKILL)
    raise AssertionError("the worker outlived its parent")


def test_summaries():
    records = [{"group": "g", "name": "a", "measures": {"m": value}, "train_s": 1.0}
               for value in (1.0, 2.0, 6.0)]
    records.append({"group": "g", "name": "b", "measures": {}})
    rows = Results(records).rows("g", ["m", "train_s", "none"])
    assert rows["a"]["m"].mean == 3.0 and rows["a"]["m"].sd == pytest.approx(7**0.5)
    assert rows["a"]["train_s"] == Spread(1.0, 0.0) and rows["b"] == {}
    table = text_table(rows, markdown=True).splitlines()
    assert table[0].split("|")[2].strip() == "m" and "3 ±2.6" in table[2] and "- |" in table[3]
    assert len({len(line) for line in table}) == 1


def test_claims_have_a_verdict():
    assert str(Claim("x", 0.2, "at most 0.3", True)) == "holds: x: 0.2 (at most 0.3)"
    assert str(Claim("x", 0.4, "at most 0.3", False)).startswith("FAILS: x")
    of_paper = Claim("x", Spread(0.5, 0.1), "below 1", True, "0.4")
    assert str(of_paper) == "reproduced: x: 0.5 ±0.1 (below 1; paper: 0.4)"
    assert replace(of_paper, holds=False).verdict == "NOT reproduced"
    assert replace(of_paper, holds=None).verdict == "undecided"
    assert str(untested("x", "0.4")) == "not tested at this scale: x (paper: 0.4)"


def test_wrong_numbers_are_refused():
    with pytest.raises(UsageError, match="seeds is 0"):
        main(["subspace", "--seeds", "0"])


# Approximations.


def test_equal_work_is_equal_work(tmp_path):
    arms = Approximations(tiny(tmp_path, 2, 40)).arms()
    exact = {a.group: a for a in arms if a.name == EXACT}
    assert set(exact) == {"subspace", "digits"} and len({a.key for a in arms}) == len(arms)
    for arm in arms:
        work = robustness.units(arm.config) * arm.config.steps
        if arm.name.endswith("(equal work)"):
            assert work == pytest.approx(8 * 40, rel=0.03), arm.name
        else:
            assert arm.config.steps == 40
    assert robustness.units(exact["digits"].config) == 8
    late = next(a for a in arms if a.name == "at_last 0.25")
    assert robustness.units(late.config) == pytest.approx(0.75 * 3 + 0.25 * 8)


def config(**fields):
    return TrainConfig(**{**preset_values("subspace"), **fields})


def test_robustness_of_a_network_that_is_equivariant():
    """E(x) = c x / s, which takes over any perturbation of eps whole, leaves no residual."""
    schedule = robustness.schedule_of(config())

    def model(x, t):
        return x / schedule.at("sqrt_one_minus_alphas_cumprod", t).to(x)[:, None]

    found = robustness.robustness(model, config(), torch.randn(32, 5), seed=1)
    assert found["residual_fgsm"] < 1e-9 and found["residual_pgd10"] < 1e-9
    assert found["agreement"] == 1 and found["J_ratio"] == pytest.approx(1)
    blind = robustness.robustness(
        lambda x, t: 0 * x, config(objective="ddpm"), torch.randn(32, 5), seed=1)
    # What does not react at all leaves delta itself, and no gradient moves that from its start.
    assert blind["residual_fgsm"] == pytest.approx(1 / 3, rel=0.2) and "agreement" not in blind


def test_robustness_tells_methods_apart():
    torch.manual_seed(0)
    model = PointMLP(5, 32, 3).eval().requires_grad_(False)
    x0 = torch.randn(64, 5)
    found = {
        name: robustness.robustness(model, config(**fields), x0, seed=1)
        for name, fields in METHODS.items()
    }
    exact, ran = found[EXACT], found["robust_ran"]
    assert exact["agreement"] == exact["J_ratio"] == 1
    assert ran["J_ratio"] < found["outward_ran"]["J_ratio"] < 1
    assert ran["J_ratio"] < found["attack_fraction 0.5"]["J_ratio"] < 1
    assert found["reg_fraction 0.25"]["J_ratio"] == pytest.approx(1)
    assert "agreement" not in found["DDPM"]


def test_ten_small_steps_go_further_than_one_and_stay_in_the_ball():
    torch.manual_seed(0)
    model = PointMLP(5, 32, 3).double().requires_grad_(False)
    x0 = torch.randn(64, 5, dtype=torch.float64)
    objective = robustness.objective_of(config())
    draw = objective.draw(x0, seed=1, step=2)
    loss = objective(model, x0, draw)
    clean = model(loss.xt, draw.t)

    def moved(delta):
        return model(loss.xt + draw.noise[:, None] * delta, draw.t) - clean

    delta = robustness.projected_gradient(moved, draw)
    assert (delta.abs() <= draw.radius[:, None] * (1 + 1e-12)).all()
    assert moved(delta).square().sum() > moved(loss.delta).square().sum()


# The paper's tables and figures.


def paper_study(name, tmp_path, monkeypatch, steps=2, seeds=1):
    """Run one on hardly trained networks; returns its record, its claims and its page."""
    made = scales.make_scale

    def small(*a, **k):
        scale = made(*a, **k)
        few = {"num_points": 500} if scale.base["data"] == "subspace" else {}
        return replace(scale, base=scale.base | few, samples=60, sampling_steps=3,
                       attacked_samples=60, attacked_steps=4)

    monkeypatch.setattr(scales, "make_scale", small)
    monkeypatch.setenv("ROBUSTDM_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "arms-beside" / name
    assert main([name, "--seeds", str(seeds), "--steps", str(steps), "--jobs", "1", "--out",
                 str(out)]) == 0
    results = json.loads((out / "results.json").read_text())
    return results["arms"], results["claims"], (out / "page.html").read_text()


def test_figure_3(tmp_path, monkeypatch, capsys):
    arms, claims, page = paper_study("fig3", tmp_path, monkeypatch, seeds=2)
    rows = {(r["group"], r["name"]) for r in arms}
    assert len(rows) == 20 + 3 and len(arms) == 2 * 23, "arms, and the data themselves"
    assert {n for g, n in rows if "90 %" in g} >= {
        "DDPM, shrunk 0.1", "DDPM, noise known", "invariance, lam 0.03"}
    ddpm, shrunk = (next(r for r in arms if r["name"] == n and "90 %" in r["group"])
                    for n in ("DDPM", "DDPM, shrunk 0.3"))
    assert ddpm["train_s"] == shrunk["train_s"], "a baseline trains nothing"
    assert ddpm["measures"] != shrunk["measures"]
    error = ddpm["measures"]["rho"] ** 2 / 32  # of a sample of mean error, about
    assert ddpm["measures"]["psnr"] == pytest.approx(-10 * math.log10(error / 4), abs=1)
    said = capsys.readouterr().out
    assert "reproduced: " in said and "95 % in" in said and "<img" in page
    clean = next(r["measures"] for r in arms if r["name"] == "clean data, drawn anew")
    train = next(r["measures"] for r in arms if r["name"] == "training data")
    assert clean["off_subspace_sd"] < 1e-6 and clean["signal"] == pytest.approx(1, abs=0.06)
    assert train["off_subspace_sd"] == pytest.approx(0.1 * 0.9**0.5, rel=0.1)
    assert 0 < clean["frechet"] < train["frechet"]


def test_tables_1_and_2_share_their_training(tmp_path):
    scale = tiny(tmp_path)
    first, second = ({a.training_key for a in study(scale).arms()} for study in (Table1, Table2))
    assert second < first and len(first) == 4 + 4 + 2, (
        "three methods and equal work at two sigmas, two on clean")


def test_figure_8(arm, tmp_path):
    arms = Figure8(tiny(tmp_path)).arms()
    assert len({a.name for a in arms}) == len(arms) == 2 * (1 + 5 * 4) + 1 + 2 * 4
    assert len({a.training_key for a in arms}) == 2
    of = {a.name: a for a in arms}
    assert of[row("DDPM")].attack is None and of[row("DDPM, shrunk 0.3", "fgsm", 0.5)].baseline
    made = [replace(arm, attack=of[name].attack, sampling_steps=4) for name in (
        row("DDPM"), *(row("DDPM", how, 1.0) for how in ("random", "fgsm", "eot")),
        row("DDPM", "fgsm", 0.5), row("DDPM", "eot as printed", 1.0))]
    kept = arms_directory(tmp_path / "study")
    assert len({str(run_arm(a, kept)["measures"]) for a in made}) == len(made)


def test_figure_24(tmp_path):
    arms = Figure24(tiny(tmp_path, steps=4)).arms()
    assert {a.config.steps for a in arms if "adv" in a.name} == {1, 2, 4, 8}


def test_figures_2_and_6(tmp_path, monkeypatch):
    quick(monkeypatch, **QUICK)
    monkeypatch.setattr(points, "DRAWN", 20)
    arms, claims, page = paper_study("fig2", tmp_path, monkeypatch)
    assert len(arms) == 2 * (4 + 7) and page.count("<img") == 3
    for arm in arms:
        if "shrunk" in arm["name"]:
            continue
        assert 0.9 < arm["measures"]["score_error"] < 3, "an untrained network knows no score"
    arms, claims, _ = paper_study("fig6-right", tmp_path, monkeypatch)
    assert all(1 < a["measures"]["cells"] < 6400 for a in arms)
    assert all(0 < a["measures"]["straightness"] <= 1 for a in arms)
    assert claims[-1]["holds"] is None and not claims[-1]["tested"]


def test_memorisation_of_digits(tmp_path, monkeypatch):
    quick(monkeypatch, samples=70, sampling_steps=2)
    arms, claims, page = paper_study("fig6-left", tmp_path, monkeypatch)
    assert {a["name"] for a in arms} == {
        "DDPM", "robust_adv", "held-out images", "training images, blurred",
        "DDPM's samples, blurred"}
    means = {a["name"]: a["measures"]["mean"] for a in arms}
    assert 0.9 < means["held-out images"] < 1, "held-out digits are not in the training set"
    assert means["DDPM"] < means["held-out images"]


def test_fine_tuning_spends_the_same_work(tmp_path):
    of = {a.name: a for a in finetune.FineTune(tiny(tmp_path, steps=400)).arms()}
    budget = 400 * 8
    assert finetune.shares("robust_adv") == (0.02, 0.05, 0.1, 0.2)
    for way in finetune.WAYS:
        for share in finetune.shares(way):
            made = of[finetune.row(way, share)]
            work = robustness.units(made.config) * made.config.steps
            assert work == pytest.approx(share * budget, abs=8) and made.start == of["DDPM"].config
            slower = 1.0 if way == finetune.AS_BEFORE else 0.2
            assert made.config.lr == pytest.approx(slower * of["DDPM"].config.lr)
    both = of["robust_adv from scratch, same total cost, 20%"]
    assert both.start is None
    assert both.config.steps * 8 == pytest.approx(400 * 3 + 0.2 * budget, abs=8)
    tuned = of["robust_adv, 10%"]
    assert tuned.started_from.training_key == of["DDPM"].training_key
    assert replace(tuned, start=None).training_key != tuned.training_key
    longer = replace(tuned, start=replace(tuned.start, steps=500))
    assert longer.key != tuned.key, "other weights to start from"
    shrunk = of["robust_adv, 2%, shrunk 0.03"]
    assert shrunk.training_key == of["robust_adv, 2%"].training_key
    assert (shrunk.baseline.method, shrunk.baseline.strength) == ("shrink", 0.03)


def test_fine_tuning_starts_from_the_pretrained_weights(arm, tmp_path):
    kept = arms_directory(tmp_path / "study")
    plain = replace(arm, config=replace(arm.config, steps=4))
    tuned = replace(arm, config=replace(arm.config, steps=1, lr=1e-12), start=plain.config)
    run_arm(tuned, kept)  # trains the other first, as it is not there
    first, second = (load_model(a, tmp_path / "study").state_dict() for a in (plain, tuned))
    for name, value in first.items():
        assert torch.allclose(value, second[name], atol=1e-6), name


def test_fine_tuning_of_digits(tmp_path, monkeypatch):
    quick(monkeypatch, samples=8, sampling_steps=2)
    monkeypatch.setattr(finetune, "SHARES", (0.1, 0.2))
    monkeypatch.setattr(finetune, "SHRUNK", (0.1,))
    monkeypatch.setattr(finetune, "THEN_SHRUNK", {"robust_adv": 0.1})
    monkeypatch.setattr(finetune, "WAYS", {n: finetune.WAYS[n] for n in ("DDPM continued",
                                                                         "robust_adv")})
    arms, claims, page = paper_study("finetune-digits", tmp_path, monkeypatch, steps=2)
    noisy = {a["name"]: a["measures"] for a in arms}
    assert "90 % with sigma 0.2" in {a["group"] for a in arms} and "noise_rms" in page
    assert noisy["training data"]["noise_rms"] == pytest.approx(0.19, abs=0.03)
    assert noisy["robust_adv, 20%"] != noisy["DDPM continued, 20%"]
    assert noisy["robust_adv, 10%"] != noisy["robust_adv, 10%, shrunk 0.1"]


def test_calibration(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ROBUSTDM_CACHE", str(tmp_path))
    out = tmp_path / "calibration"
    assert main(["calibration", "--seeds", "2", "--features", "pixels", "--out", str(out)]) == 0
    results = json.loads((out / "results.json").read_text())
    found = {r["name"]: r["measures"]["frechet"] for r in results["arms"] if r["seed"] == 0}
    # Noise adds p sigma^2 to every variance; in pixels that is the distance, nearly.
    assert found["sigma 0.2, float"] > 2 * found["sigma 0.1, float"] > 0
    assert found["sigma 0.1, 8-bit, sigma for [0, 1]"] == pytest.approx(
        found["sigma 0.2, 8-bit files"], rel=0.1)
    assert "not tested at this scale" in capsys.readouterr().out
    assert all(c["holds"] is None for c in results["claims"]), "pixels are not Inception's"


@pytest.mark.parametrize("name", STUDIES)
def test_a_kept_record_is_judged_as_it_was(name, tmp_path, monkeypatch):
    path = KEPT / "reproduction" / f"{name}.json"
    path = path if path.exists() else KEPT / f"{name}.json"
    records, kept = read_arms(path, "kept"), json.loads(path.read_text())["claims"]
    seeds = len({record.get("seed") for record in records})
    extra = dict(features="pixels") if name == "calibration" else {}
    study = study_class(name)(tiny(tmp_path, seeds), **extra)
    # Named otherwise since; those of the approximations are others now.
    made = {c.text: (c.target, c.paper, c.holds) for c in study.compare(
        Results(records, study.scale.noise)) if GONE not in c.text}
    if name == "approximations":
        assert len(made) == 50
    else:
        assert made == {c["text"]: (c["target"], c["paper"], c["holds"]) for c in kept
                        if GONE not in c["text"]}
    if name not in ("calibration", "timecost"):
        # Records from before it have no arm of known noise.
        assert {(a.group, a.name, a.config.seed) for a in study.arms() if a.name != KNOWN} <= {
            (r["group"], r["name"], r["seed"]) for r in records}
    monkeypatch.setattr(study, "figures", lambda of: {})
    study.write(records)
    page = (study.scale.out / "page.html").read_text()
    assert page.count("<table>") >= 2 and all(escape(text) in page for text in made)
    assert ("predicted signal" in page) == (name == "fig7")


def study_class(name):
    module, found = STUDIES[name].where.split(":")
    return getattr(import_module(f"robustdm.studies.{module}"), found)


def test_the_list_names_every_study(capsys):
    assert main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, study in STUDIES.items():
        assert any(line.startswith(f"{name} ") and study.claim in line for line in lines)
        assert issubclass(study_class(name), Study)


@pytest.mark.parametrize("args, words", [
    ([], "name is not given"),
    (["subspace", "--scale", "small"], "the scales of subspace are: tiny"),
    (["fig2", "--scale", "full"], "the scales of fig2 are: tiny"),
    (["table2", "--scale", "small"], "data_dir is not given"),
    (["table2", "--scale", "small", "--data-dir", "x"], "needs a feature space"),
    (["table2", "--data-dir", "x"], "tiny makes its own data"),
    (["table2", "--features", "resnet56"], "features is 'resnet56': tiny makes its own"),
    (["table2", "--scale", "small", "--data-dir", "x", "--features", "pixels"], "more pixels"),
    (["table2", "--steps", "0"], "steps is 0"),
])
def test_wrong_reproductions_are_refused(args, words):
    with pytest.raises(UsageError, match=words):
        main(args)


def test_steps_that_equal_another_study_s_default_are_taken(tmp_path):
    scale, none = tiny(tmp_path, steps=3000), tiny(tmp_path)
    assert {a.config.steps for a in points.point_arms(scale, scales.METHODS)} == {3000}
    assert fig6_left.digits(scale).base["steps"] == 3000
    assert fig6_left.digits(none).base["steps"] == 1200


def test_a_verdict_needs_an_interval_on_one_side_of_the_limit():
    ones = [1.0, 1.0, 1.0]
    claim = ratio_claim("x", [0.70, 0.71, 0.72], ones)
    assert claim.holds and claim.target == "at most 0.95"
    assert claim.value.startswith("0.71 ±0.01; 95 % in 0.68")
    assert ratio_claim("x", [1.4, 1.41, 1.42], ones).holds is False
    # All seeds agree, and so does chance in one of four cases.
    assert ratio_claim("x", [0.5, 0.7, 0.94], ones).verdict == "undecided"
    # Sure, but no effect.
    assert ratio_claim("x", [0.98, 0.981, 0.982], ones).holds is False
    assert ratio_claim("x", [0.98, 0.981, 0.982], ones, at_least=0.8, at_most=1.25).holds
    assert ratio_claim("x", [0.1, 0.11, 0.12], ones, at_least=0.8, at_most=1.25).holds is False
    assert ratio_claim("x", [2.0], [4.0]).verdict == "undecided", "one seed decides nothing"
    # A ratio to a noise that is not there would be of any size and sign.
    assert not ratio_claim("x", [0.3, 0.2, 0.3], [-0.1, 0.1, 0.1]).tested
    # Differences may be negative: the interval is then Student's of the values themselves.
    low, high = interval([-1.0, 0.0, 1.0])
    assert low == pytest.approx(-4.303 / 3**0.5, rel=1e-3) and high == -low
    assert judge("x", [1.0, 1.1, 1.2], at_least=0.0).holds
    assert judge("x", [-1.0, 0.0, 1.0], at_least=0.0).holds is None
    # Differences that all are positive may still be chance.
    assert judge("x", [0.01, 0.5, 1.0], at_least=0.0).holds is None


def test_a_ratio_and_its_inverse_are_judged_alike():
    low, high = interval([0.2, 0.4, 0.5], ratio=True)
    assert interval([5.0, 2.5, 2.0], ratio=True) == pytest.approx((1 / high, 1 / low))


def test_noise_of_a_shrunk_network_at_equal_signal():
    def record(name, noise, signal):
        return {"group": "g", "name": name, "seed": 0, "measures": {"n": noise, "s": signal}}

    records = [record("DDPM", 1.0, 1.0), record("DDPM, shrunk 0.1", 0.01, 0.8),
               record("DDPM, blurred", 5.0, 0.9), record("robust", 0.2, 0.9),
               record("too much", 0.1, 0.5)]
    assert at_equal_signal(Results(records), "g", "robust", "n", "s") == [pytest.approx(0.1)]
    claim = EqualSignal("g", "robust", "n", "s").claim(Results(records))
    assert claim.value.startswith("2;") and claim.target == "at most 0.95"
    assert at_equal_signal(Results(records), "g", "too much", "n", "s") is None
    assert not EqualSignal("g", "too much", "n", "s").claim(Results(records)).tested
    more = [*records, record("more", 0.5, 1.2)]
    assert at_equal_signal(Results(more), "g", "more", "n", "s") == [1.0], "the plain DDPM's"
    # A measure of signal that does not fall with the strength is none.
    turned = [*records, record("DDPM, shrunk 0.3", 0.001, 0.85)]
    assert at_equal_signal(Results(turned), "g", "robust", "n", "s") is None
    # Samples that are smoother than clean ones have no noise to compare.
    smooth = [*records, record("smooth", -0.1, 0.9)]
    assert not EqualSignal("g", "smooth", "n", "s").claim(Results(smooth)).tested
    none = Results([*records, record("DDPM, shrunk 0.2", -0.1, 0.7)])
    assert at_equal_signal(none, "g", "robust", "n", "s") is None


@pytest.fixture
def images(tmp_path, monkeypatch):
    """The small scale on random 32x32 images, with a network that is smaller still."""
    g = torch.Generator().manual_seed(0)
    x = torch.rand(170, 3, 8, 8, generator=g).repeat_interleave(4, 2).repeat_interleave(4, 3)
    np.savez(tmp_path / "images.npz", (255 * x).byte().permute(0, 2, 3, 1).numpy())
    weights = tmp_path / "w.th"
    torch.save(CifarResNet(3).state_dict(), weights)
    monkeypatch.setenv("ROBUSTDM_CACHE", str(tmp_path / "cache"))
    made = scales.make_scale("small", tmp_path / "s" / "out", 1, 1, 2, tmp_path / "images.npz",
                             "resnet20", weights)
    assert "not FID" in made.differs[1]
    base = made.base | dict(data="images", block_channels=(8, 8), norm_groups=4,
                            layers_per_block=1, batch_size=8, attention_resolutions=(),
                            compile=False, precision="fp32", holdout=0.45)
    return replace(made, base=base, samples=70, sampling_steps=2, attacked_samples=70,
                   attacked_steps=2)


def test_images_have_every_baseline_and_a_sheet(images):
    claims = Table2(images).run()
    others = {c.text.rsplit("/ ", 1)[1] for c in claims if "not in the paper" in c.text}
    assert {name.split(" (")[0] for name in others} == {
        "DDPM, shrunk 0.1", "DDPM, shrunk 0.3", "DDPM, noise known", "DDPM, blurred",
        "DDPM, equal work", "DDPM shrunk until it keeps as much signal"}
    assert (images.out / "samples.png").exists()
    text = (images.out / "table.md").read_text()
    assert "noise_excess" in text and "clean data, drawn anew" in text and "training data" in text
    rows = {(r["group"], r["name"]): r["measures"] for r in json.loads(
        (images.out / "results.json").read_text())["arms"]}
    noisy = "90 % with sigma 0.2"
    assert abs(rows[noisy, "clean data, drawn anew"]["noise_excess"]) < 0.1
    assert rows[noisy, "training data"]["noise_excess"] == pytest.approx(0.19, abs=0.06)
    assert rows[noisy, "training data"]["signal"] == pytest.approx(1, abs=0.15)


def test_noise_and_signal_of_images_are_told_apart():
    """Noise of a known strength; half the contrast; a blur."""
    g = torch.Generator().manual_seed(0)
    clean = torch.rand(400, 3, 4, 4, generator=g).repeat_interleave(4, 2).repeat_interleave(4, 3)
    truth = scales.ImageTruth.of(clean)
    same = truth.measure(clean)
    assert same["noise_excess"] == 0 and same["signal"] == pytest.approx(1, abs=1e-3)
    noisy = truth.measure(clean + 0.3 * torch.randn(clean.shape, generator=g))
    assert noisy["noise_excess"] == pytest.approx(0.3, rel=0.15)
    assert noisy["signal"] == pytest.approx(1, abs=0.06), "noise is not signal"
    flat = truth.measure(0.5 * clean)
    assert flat["signal"] == pytest.approx(0.5, abs=1e-3) and flat["noise_excess"] <= 0
    textured = clean + 0.2 * torch.randn(clean.shape, generator=g)
    smooth = scales.ImageTruth.of(textured).measure(blur(textured, 1.0))
    assert smooth["noise_excess"] < -0.1, "texture that is gone is no negative noise to divide by"


def test_figure_3_on_images(images, monkeypatch):
    linear = fig3.linear_images
    monkeypatch.setattr(fig3, "linear_images", lambda scale: (
        lambda made: replace(made, base=made.base | dict(num_points=500)))(linear(scale)))
    assert fig3.Figure3(images).run()
    text = (images.out / "table.md").read_text()
    assert "rho_paper" in text and "component_ratio_25" in text and "25 leading" in text


def test_memorisation_of_images(images):
    assert len(fig6_left.Figure6Left(images).run()) == 4
    assert "held-out images" in (images.out / "table.md").read_text()
