"""How large the perturbation is and how strongly its residual is weighed, at every timestep.

Notation: s = sqrt(1 - abar_t) is the noise scale of x_t, b the random factor the paper calls beta
(``beta`` in code), r the radius in eps-units (added to eps); s * r is the radius in x-units.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real

from torch import Tensor

from robustdm.errors import UsageError
from robustdm.method.schedule import NoiseSchedule


def _is_number(value) -> bool:
    return isinstance(value, Real) and math.isfinite(value)


LAMBDA_MODES = ("ray", "x", "std", "literal")


@dataclass(frozen=True)
class Perturbation:
    """The l-inf ball of the perturbation and the weight of the regulariser.

    The paper writes lambda_t = lam * sqrt(3) / (beta * r(t)) and leaves open which radius r(t) is.
    Four readings are offered:

    =========  ============================  ===================================================
    mode       lambda_t                      r(t) is
    =========  ============================  ===================================================
    "ray"      lam sqrt3 / (b s**(omega-1))  as printed: no beta in it, hence no floor
    "x"        lam sqrt3 / (b s r_b)         the radius in x-units
    "std"      lam sqrt3 / r_b               the perturbation's own standard deviation, no b
    "literal"  lam sqrt3 / (b r_b)           the radius with its floor
    =========  ============================  ===================================================

    Args:
        omega: exponent of the noise scale in the radius.
        gamma: floor of the radius, in x-units at b = 1.
        lam: strength of the regulariser, lambda.
        lambda_mode: one of "ray", "x", "std", "literal".
        beta_range: range of the uniform factor b, both ends positive.

    Raises:
        UsageError: for a value out of range.

    Source: Briglia et al. 2026, Eq. 7 and 8 and Algorithm 1.
    """

    omega: float = 2.0
    gamma: float = 8 / 255
    lam: float = 0.3
    lambda_mode: str = "ray"
    beta_range: tuple[float, float] = (0.5, 2.0)

    def __post_init__(self):
        if self.lambda_mode not in LAMBDA_MODES:
            raise UsageError(
                f"lambda_mode is {self.lambda_mode!r}: choose one of {', '.join(LAMBDA_MODES)}"
            )
        for name in ("gamma", "lam"):
            value = getattr(self, name)
            if not (_is_number(value) and value >= 0):
                raise UsageError(f"{name} is {value}: it must be a finite number, 0 or more")
        if not _is_number(self.omega):
            raise UsageError(f"omega is {self.omega}: it must be a finite number")
        try:
            low, high = self.beta_range
        except (TypeError, ValueError):
            low = high = math.nan
        if not (_is_number(low) and _is_number(high) and 0 < low <= high):
            raise UsageError(
                f"beta_range is {self.beta_range}: give two positive numbers, the lower one first"
            )

    def radius(self, schedule: NoiseSchedule, t: Tensor, beta: Tensor) -> Tensor:
        """Radius of the l-inf ball in eps-units: r_b(t) = (s**omega + gamma b) / s.

        Args:
            schedule: the noise schedule.
            t: (B,) int64 timesteps.
            beta: (B,) the random factor b.

        Returns:
            (B,) float64.

        Source: Briglia et al. 2026, Eq. 7.
        """
        s = schedule.at("sqrt_one_minus_alphas_cumprod", t)
        return s ** (self.omega - 1) + self.gamma * beta / s

    def lambda_t(self, schedule: NoiseSchedule, t: Tensor, beta: Tensor) -> Tensor:
        """Weight of the regulariser at every timestep, in the chosen reading.

        Args:
            schedule: the noise schedule.
            t: (B,) int64 timesteps.
            beta: (B,) the random factor b.

        Returns:
            (B,) float64.

        Source: Briglia et al. 2026, Eq. 6 and section 3; the readings are listed above.
        """
        s = schedule.at("sqrt_one_minus_alphas_cumprod", t)
        if self.lambda_mode == "ray":
            scale = beta * s ** (self.omega - 1)
        elif self.lambda_mode == "x":
            scale = beta * s * self.radius(schedule, t, beta)
        elif self.lambda_mode == "std":
            scale = self.radius(schedule, t, beta)
        else:
            scale = beta * self.radius(schedule, t, beta)
        return self.lam * math.sqrt(3) / scale
