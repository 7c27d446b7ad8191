"""The studies' machinery: arms, their reuse, tables and claims, on runs of a few steps."""

import json
from dataclasses import replace

import pytest
import torch

from robustdm import UsageError
from robustdm.models import PointMLP
from robustdm.reproduce import main
from robustdm.studies import approximations, digits, invitro, lambda_mode, subspace
from robustdm.studies.runner import Claim, Spread, arms_directory, load_samples, run_arm, summarise
from robustdm.tables import text_table
from robustdm.training.config import TrainConfig, preset_values

QUICK = dict(samples=40, sampler="ddim", sampling_steps=3)


@pytest.fixture
def arm(tmp_path):
    made = subspace.arms(1, 3, {"DDPM": subspace.OBJECTIVES["DDPM"]})[0]
    arms_directory(tmp_path / "study").mkdir()
    return replace(made, **QUICK)


def test_an_arm_repeats_bit_for_bit(arm, tmp_path):
    out = tmp_path / "study"
    first = run_arm(arm, arms_directory(out), threads=1)
    samples = load_samples(arm, out)
    again = run_arm(arm, arms_directory(out), threads=1)
    assert torch.equal(samples, load_samples(arm, out)) and samples.shape == (40, 32)
    assert first["measures"] == again["measures"] and set(first["measures"]) > {
        "off_subspace_sd", "component_ratio_5"}


def test_keys_tell_arms_apart_and_survive_a_change_of_defaults():
    keys = [a.key for a in lambda_mode.arms(3, None, None)]
    assert len(set(keys)) == len(keys)
    # Studies share arms: the lambda study adds only what the others do not have.
    shared = {a.key for a in subspace.arms(3, None) + invitro.arms(3, None) + digits.arms(3, None)}
    missing = {key.rsplit("-seed")[0] for key in set(keys) - shared}
    assert missing == {f"{group}-robust_adv-{mode}" for mode in ("std", "literal")
                       for group in ("subspace", "gaussians, outliers", "digits")}
    for made in subspace.arms(1, None) + digits.arms(1, None):
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
    arms = subspace.arms
    monkeypatch.setattr(subspace, "arms", lambda *a: [replace(arm, **QUICK) for arm in arms(*a)])
    command = ["subspace", "--seeds", "1", "--steps", "2", "--jobs", "1",
               "--out", str(tmp_path / "subspace")]
    assert main(command) == 0
    first = capsys.readouterr().out
    assert main(command) == 0
    second = capsys.readouterr().out
    assert "6 of 6 arms are done already" in second
    assert first[first.index("|"):] == second[second.index("|"):]
    results = json.loads((tmp_path / "subspace" / "results.json").read_text())
    assert len(results["arms"]) == 6 and len(results["claims"]) == 5
    assert "| robust_adv (ray)" in (tmp_path / "subspace" / "table.md").read_text()


def test_summaries():
    records = [{"name": "a", "measures": {"m": value}, "train_s": 1.0} for value in (1.0, 2.0, 6.0)]
    rows = summarise([*records, {"name": "b", "measures": {}}], ["m", "train_s", "none"])
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
    assert str(replace(of_paper, value=None, holds=None)) == (
        "not tested at this scale: x (paper: 0.4)")


def test_wrong_numbers_are_refused():
    with pytest.raises(UsageError, match="seeds is 0"):
        main(["subspace", "--seeds", "0"])


# Approximations.


def test_equal_work_is_equal_work():
    arms = approximations.arms(2, 40)
    exact = {a.group: a for a in arms if a.name == approximations.EXACT}
    assert set(exact) == {"subspace", "digits"} and len({a.key for a in arms}) == len(arms)
    for arm in arms:
        work = approximations.units(arm.config) * arm.config.steps
        if arm.name.endswith(approximations.EQUAL_WORK):
            assert work == pytest.approx(8 * 40, rel=0.03), arm.name
        else:
            assert arm.config.steps == 40
    assert approximations.units(exact["digits"].config) == 8
    late = next(a for a in arms if a.name == "at_last 0.25")
    assert approximations.units(late.config) == pytest.approx(0.75 * 3 + 0.25 * 8)


def config(**fields):
    return TrainConfig(**{**preset_values("subspace"), **fields})


def test_robustness_of_a_network_that_is_equivariant():
    """E(x) = c x / s, which takes over any perturbation of eps whole, leaves no residual."""
    schedule = approximations.schedule_of(config())

    def model(x, t):
        return x / schedule.at("sqrt_one_minus_alphas_cumprod", t).to(x)[:, None]

    found = approximations.robustness(model, config(), torch.randn(32, 5), seed=1)
    assert found["residual_fgsm"] < 1e-9 and found["residual_pgd10"] < 1e-9
    assert found["agreement"] == 1 and found["J_ratio"] == pytest.approx(1)
    blind = approximations.robustness(
        lambda x, t: 0 * x, config(objective="ddpm"), torch.randn(32, 5), seed=1)
    # What does not react at all leaves delta itself, and no gradient moves that from its start.
    assert blind["residual_fgsm"] == pytest.approx(1 / 3, rel=0.2) and "agreement" not in blind


def test_robustness_tells_methods_apart():
    torch.manual_seed(0)
    model = PointMLP(5, 32, 3).eval().requires_grad_(False)
    x0 = torch.randn(64, 5)
    found = {
        name: approximations.robustness(model, config(**fields), x0, seed=1)
        for name, fields in approximations.METHODS.items()
    }
    exact, ran = found[approximations.EXACT], found["robust_ran"]
    assert exact["agreement"] == exact["J_ratio"] == 1
    assert ran["J_ratio"] < found["outward_ran"]["J_ratio"] < 1
    assert ran["J_ratio"] < found["attack_fraction 0.5"]["J_ratio"] < 1
    assert found["reg_fraction 0.25"]["J_ratio"] == pytest.approx(1)
    assert "agreement" not in found["DDPM"]


def test_ten_small_steps_go_further_than_one_and_stay_in_the_ball():
    torch.manual_seed(0)
    model = PointMLP(5, 32, 3).double().requires_grad_(False)
    x0 = torch.randn(64, 5, dtype=torch.float64)
    objective = approximations.objective_of(config())
    draw = objective.draw(x0, seed=1, step=2)
    loss = objective(model, x0, draw)
    clean = model(loss.xt, draw.t)

    def moved(delta):
        return model(loss.xt + draw.noise[:, None] * delta, draw.t) - clean

    delta = approximations.projected_gradient(moved, draw)
    assert (delta.abs() <= draw.radius[:, None] * (1 + 1e-12)).all()
    assert moved(delta).square().sum() > moved(loss.delta).square().sum()
