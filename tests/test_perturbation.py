"""Radius and weight of the perturbation, against the tables derived from the paper."""

import math

import pytest
import torch

from robustdm import NoiseSchedule, Perturbation, UsageError

SCHEDULE = NoiseSchedule.linear(1000)
BETAS = (0.5, 1.0, 2.0)
INDEX = (0, 1, 10, 50, 100, 250, 500, 750, 999)
# Linear schedule, T = 1000, omega = 2, gamma = 8/255, lam = 0.3; b = 0.5, 1, 2 in each row.
RADIUS = [
    (1.5786, 3.1473, 6.2845), (1.0726, 2.1304, 4.2460), (0.3818, 0.7167, 1.3866),
    (0.2638, 0.3543, 0.5353), (0.3723, 0.4207, 0.5176), (0.7145, 0.7371, 0.7825),
    (0.9766, 0.9930, 1.0257), (1.0141, 1.0298, 1.0612), (1.0157, 1.0314, 1.0627),
]
LAMBDA = {
    "literal": [(.658, .165, .041), (.969, .244, .061), (2.722, .725, .187), (3.939, 1.466, .485),
                (2.792, 1.235, .502), (1.455, .705, .332), (1.064, .523, .253),
                (1.025, .505, .245), (1.023, .504, .244)],
    "ray": [(103.9, 51.96, 25.98), (70.08, 35.04, 17.52), (22.19, 11.10, 5.55),
            (5.995, 2.998, 1.499), (3.209, 1.605, .802), (1.502, .751, .376), (1.082, .541, .271),
            (1.041, .520, .260), (1.039, .520, .260)],
    "std": [(.329, .165, .083), (.484, .244, .122), (1.361, .725, .375), (1.969, 1.466, .971),
            (1.396, 1.235, 1.004), (.727, .705, .664), (.532, .523, .507), (.512, .505, .490),
            (.512, .504, .489)],
    "x": [(65.8, 16.5, 4.13), (65.3, 16.4, 4.13), (58.1, 15.5, 4.00), (22.7, 8.46, 2.80),
          (8.62, 3.81, 1.55), (2.10, 1.02, .480), (1.11, .545, .264), (1.03, .505, .245),
          (1.02, .504, .244)],
}


def grid(method):
    t = torch.tensor(INDEX)
    return torch.stack([method(SCHEDULE, t, torch.full((len(t),), b)) for b in BETAS], dim=1)


def test_radius_table():
    wanted = torch.tensor(RADIUS, dtype=torch.float64)
    assert (grid(Perturbation().radius) - wanted).abs().max() < 6e-5


@pytest.mark.parametrize("mode", LAMBDA)
def test_lambda_tables(mode):
    wanted = torch.tensor(LAMBDA[mode], dtype=torch.float64)
    got = grid(Perturbation(lambda_mode=mode).lambda_t)
    # The table is printed with three decimals, or three digits where it is large.
    assert ((got - wanted).abs() <= (6e-4 + 3.5e-3 * wanted)).all(), (got - wanted).abs() / wanted


@pytest.mark.parametrize("mode", LAMBDA)
def test_scalar_arithmetic_agrees_to_twelve_digits(mode):
    pert = Perturbation(lambda_mode=mode, omega=1.7, gamma=0.05, lam=0.2)
    alpha = 1.0
    for i in range(1000):
        alpha *= 1 - (1e-4 + (0.02 - 1e-4) * i / 999)
        if i not in INDEX:
            continue
        s = math.sqrt(1 - alpha)
        for b in BETAS:
            radius = (s**1.7 + 0.05 * b) / s
            weight = 0.2 * math.sqrt(3) / {
                "ray": b * s**0.7, "x": b * s * radius, "std": radius, "literal": b * radius
            }[mode]
            t, beta = torch.tensor([i]), torch.tensor([b], dtype=torch.float64)
            assert math.isclose(pert.radius(SCHEDULE, t, beta).item(), radius, rel_tol=1e-10)
            assert math.isclose(pert.lambda_t(SCHEDULE, t, beta).item(), weight, rel_tol=1e-10)


def test_radius_in_x_units_has_the_floor():
    t = torch.arange(1000)
    s = SCHEDULE.sqrt_one_minus_alphas_cumprod
    for omega in (1.5, 2.0, 3.0):
        pert = Perturbation(omega=omega, gamma=0.03)
        in_x = s * pert.radius(SCHEDULE, t, torch.full((1000,), 0.7))
        assert torch.allclose(in_x, s**omega + 0.03 * 0.7, rtol=1e-12)
        assert (in_x.diff() > 0).all()


def test_modes_coincide_where_their_formulas_do():
    # gamma = 0 removes the floor, b = 1 the factor: ray = literal = std, and x = that / s.
    t, b = torch.arange(0, 1000, 37), torch.ones(28)
    ray, x, std, literal = (
        Perturbation(gamma=0, lambda_mode=m).lambda_t(SCHEDULE, t, b)
        for m in ("ray", "x", "std", "literal")
    )
    assert torch.allclose(ray, literal) and torch.allclose(ray, std)
    assert torch.allclose(x * SCHEDULE.sqrt_one_minus_alphas_cumprod[t], ray)
    assert torch.allclose(std * Perturbation(gamma=0).radius(SCHEDULE, t, b),
                          torch.full((28,), 0.3 * math.sqrt(3), dtype=torch.float64))


@pytest.mark.parametrize("field, value", [
    ("lambda_mode", "rays"), ("gamma", -0.1), ("lam", float("nan")), ("lam", -1.0),
    ("omega", float("inf")), ("beta_range", (0.0, 1.0)), ("beta_range", (2.0, 1.0)),
    ("beta_range", (0.5, float("inf"))), ("lam", "strong"), ("omega", None), ("gamma", [1]),
    ("beta_range", 1.0), ("beta_range", (1.0,)), ("beta_range", ("a", "b")),
])
def test_impossible_values_are_refused(field, value):
    with pytest.raises(UsageError, match=field):
        Perturbation(**{field: value})
