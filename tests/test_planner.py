"""The planner: closed forms against published tables, simulation, and what it refuses."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from robustdm import NoiseSchedule, Perturbation, UsageError
from robustdm.method import closed_form
from robustdm.method.closed_form import (
    ENERGY,
    OUTWARD_ENERGY,
    Setting,
    best,
    candidates,
    excess,
    generated_deviation,
    predict,
    spectrum,
)
from robustdm.method.perturbation import LAMBDA_MODES
from robustdm.method.sampling import Respaced, sample, timesteps
from robustdm.plan import PlanConfig, compare, main, plan

SCHEDULE = NoiseSchedule.linear(1000)
VARIANCES = torch.tensor([1e-3, 0.009, 0.036, 0.1, 0.25, 1.0])
# Generated over data standard deviation under 1000-step ancestral sampling, worked out separately.
TABLE = {
    ("ddpm", "ray"): [0.999, 1.008, 1.005, 1.003, 1.002, 1.000],
    ("robust_ran", "literal"): [0.871, 0.947, 0.964, 0.967, 0.964, 0.954],
    ("robust_adv", "literal"): [0.727, 0.866, 0.908, 0.918, 0.916, 0.898],
    ("robust_ran", "std"): [0.844, 0.934, 0.956, 0.961, 0.960, 0.950],
    ("robust_adv", "std"): [0.681, 0.838, 0.890, 0.905, 0.905, 0.889],
    ("robust_ran", "ray"): [0.020, 0.087, 0.328, 0.603, 0.783, 0.900],
    ("robust_adv", "ray"): [0.008, 0.027, 0.109, 0.315, 0.554, 0.776],
    ("robust_ran", "x"): [0.074, 0.236, 0.500, 0.694, 0.807, 0.888],
    ("robust_adv", "x"): [0.030, 0.091, 0.233, 0.431, 0.603, 0.756],
}


def test_the_table_of_the_closed_form():
    settings = [Setting(name, Perturbation(lambda_mode=mode)) for name, mode in TABLE]
    made = generated_deviation(SCHEDULE, settings, VARIANCES) / VARIANCES.double().sqrt()
    wanted = torch.tensor(list(TABLE.values()), dtype=torch.float64)
    assert (made - wanted).abs().max() < 0.0016


def test_the_energy_of_an_outward_step():
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    assert (u + 3**-0.5).clamp(max=1).square().mean().item() == pytest.approx(OUTWARD_ENERGY)


@pytest.mark.parametrize("objective", ["ddpm", "robust_ran", "robust_adv", "invariance"])
@pytest.mark.parametrize("sampling", [
    dict(sampler="ddpm"), dict(sampler="ddim"), dict(sampler="ddpm", variance="fixed_small"),
])
def test_the_sampler_itself_generates_what_is_predicted(objective, sampling):
    """The linear optimum, sampled with robustdm's sampler, in three directions."""
    data = torch.tensor([0.01, 0.2, 1.0])
    setting = Setting(objective)
    visited = Respaced(SCHEDULE, timesteps(SCHEDULE, 50))
    c = dict(zip(visited.timesteps.tolist(), excess(SCHEDULE, setting, visited.timesteps),
                 strict=True))

    def network(x, t):
        t = t[0].item()
        abar = SCHEDULE.alphas_cumprod[t].item()
        s, gain = math.sqrt(1 - abar), 1 + c[t].item()
        eps = s / (abar * data + s * s * gain)
        return x * (eps if objective == "invariance" else eps * gain)

    samples = sample(network, SCHEDULE, (3,), num=20_000, steps=50, batch_size=20_000, **sampling)
    wanted = generated_deviation(SCHEDULE, [setting], data, steps=50, **sampling)[0]
    assert torch.allclose(samples.std(0).double(), wanted, rtol=0.02)


def test_lambda_max_bounds_the_excess():
    visited = torch.tensor([0, 100, 999])
    free, bound = (excess(SCHEDULE, Setting(lambda_max=m), visited) for m in (None, 1.0))
    assert bound[0] < free[0] / 10 and 0 < bound[0] and bool((bound <= free).all())


def test_the_excess_is_a_mean_over_the_random_factor():
    visited = torch.tensor([0, 7, 999])
    for mode in LAMBDA_MODES:
        shape = Perturbation(lambda_mode=mode, gamma=0.05, omega=1.5, lam=0.2)
        wanted = torch.zeros(3, dtype=torch.float64)
        low, high = shape.beta_range
        for node in range(64):
            beta = torch.full((3,), low + (high - low) * (node + 0.5) / 64, dtype=torch.float64)
            energy = shape.radius(SCHEDULE, visited, beta) ** 2 / 3  # of a uniform perturbation
            wanted += shape.lambda_t(SCHEDULE, visited, beta) * energy / 64
        assert torch.allclose(excess(SCHEDULE, Setting("robust_ran", shape), visited), wanted,
                              rtol=1e-12)


def test_settings_planned_together_are_those_planned_alone():
    shape, visited = Perturbation(lam=0.4, gamma=0.02), torch.tensor([0, 7, 999])
    settings = [Setting(objective, replace(shape, lam=lam, omega=omega), bound)
                for objective in ENERGY for lam in (0.0, 0.4, 2.0) for omega in (1.0, 2.0)
                for bound in (None, 0.5)]
    settings.append(Setting(perturbation=Perturbation(beta_range=[0.5, 2.0])))
    together = closed_form._excesses(SCHEDULE, settings, visited)
    for one, found in zip(settings, together, strict=True):
        assert torch.allclose(excess(SCHEDULE, one, visited), found, rtol=1e-12)
    assert len(torch.unique(together[:, 1])) > 12


def test_the_best_setting_removes_most_noise_and_keeps_the_signal():
    signal = torch.tensor([4.0, 1.0, 0.25])
    some = candidates()[::37] + [Setting("ddpm")]
    made = predict(SCHEDULE, some, signal, 0.1, steps=100)
    chosen = best(made, 0.9)
    assert chosen.signal_kept >= 0.9 and chosen.noise_left < 0.5
    assert all(p.noise_left >= chosen.noise_left for p in made if p.signal_kept >= 0.9)
    assert made[-1].noise_left == pytest.approx(1, abs=0.2)  # few steps add noise of their own
    with pytest.raises(UsageError, match="keep is 0.9999"):
        best(made[:-1], 0.9999)


def test_spectrum():
    g = torch.Generator().manual_seed(0)
    scale = torch.zeros(40)
    scale[:4] = torch.tensor([2.0, 1, 0.5, 0.4])
    rotation = torch.linalg.qr(torch.randn(40, 40, generator=g))[0]
    variances = spectrum(torch.randn(4000, 40, generator=g) * scale @ rotation)
    assert variances[0].item() == pytest.approx(4, rel=0.1) and variances[4] < 1e-6


def test_the_command(tmp_path, capsys):
    made = plan(PlanConfig(sigma=0.2, signal_sd=(1.0, 0.5), keep=0.8, out=tmp_path / "plan",
                           steps=40))
    printed = capsys.readouterr().out
    assert "recommended" in printed and "python -m robustdm.train --objective" in printed
    assert json.loads((tmp_path / "plan/plan.json").read_text())["command"] == made["command"]
    assert (tmp_path / "plan/plan.png").stat().st_size > 10_000
    assert made["predictions"]["recommended"]["signal_kept"] >= 0.8
    # The flags are those of training.
    from robustdm.cli import parse_train

    parse_train(made["command"].split()[3:])


def test_the_command_estimates_the_noise_of_a_folder(tmp_path, capsys):
    from robustdm.data.digits import load_digits

    x = load_digits()
    x = x + 0.2 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    pixels = ((x + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1)
    np.savez(tmp_path / "noisy.npz", images=pixels.numpy())
    made = plan(PlanConfig(data=tmp_path / "noisy.npz", resolution=8, fraction=1.0, keep=0.7,
                           out=tmp_path / "plan", steps=20))
    assert 0.1 < made["sigma"] < 0.15, "clipping to 8 bits takes half of it"
    np.savez(tmp_path / "noisy.npz", images=x.numpy())
    made = plan(PlanConfig(data=tmp_path / "noisy.npz", resolution=8, fraction=1.0, keep=0.7,
                           value_range=(-1.0, 1.0), out=tmp_path / "plan", steps=20))
    assert made["sigma"] == pytest.approx(0.2, rel=0.05)


@pytest.mark.parametrize("flags, words", [
    (["--keep", "1.5"], "keep is 1.5"),
    (["--fraction", "0"], "fraction is 0"),
    ([], "sigma is not given"),
    (["--signal-sd", "1"], "sigma is not given"),
    (["--sigma", "-1"], "sigma is -1"),
    (["--sigma", "0.1", "--signal-sd", "0"], "signal_sd is"),
    (["--compare", "nothing.json"], "compare is 'nothing.json'"),
    (["--sigma", "0.1", "--data", "nowhere"], "nowhere"),
])
def test_bad_input_is_named(flags, words, tmp_path):
    with pytest.raises(UsageError, match=words):
        main([*flags, "--out", str(tmp_path)])


def test_prediction_beside_measurement():
    """The records of the studies: networks leave more noise than the optimum would."""
    results = Path(__file__).parent.parent / "benchmarks/results/cpu"
    text = compare(results / "subspace.json")
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if "|" in line}
    assert "0.00259 / 0.0233" in rows["robust_adv (ray)"]
    # A plain DDPM that is shrunk by lam 0.3 has the optimum of robust_adv, and comes nearer to it.
    assert "0.00259 / 0.0103" in rows["DDPM, shrunk 0.3"]
    assert "DDPM, stopped early" not in rows, "it has no setting to predict from"
    assert "pixel_std" in compare(results / "digits.json")
