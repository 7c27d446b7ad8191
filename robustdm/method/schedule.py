"""The noise schedule q(x_t | x_0) and the posterior coefficients, as float64 tables.

Code counts timesteps from 0 to T - 1; index i is the papers' t = i + 1.
"""

import math

import torch
from torch import Tensor

from robustdm.errors import UsageError


class NoiseSchedule:
    """Tables of a discrete variance-preserving diffusion; every table is (T,) float64.

    Attributes:
        betas: variance added by each forward step.
        alphas_cumprod: cumulative signal power, abar_t = prod(1 - beta).
        sqrt_alphas_cumprod: signal scale of x_t.
        sqrt_one_minus_alphas_cumprod: noise standard deviation of x_t, s_t.
        name: how the schedule was made, for records.

    Raises:
        UsageError: if betas is not a vector of numbers strictly between 0 and 1.

    Source: Ho et al. 2020, Eq. 2 to 7.
    """

    def __init__(self, betas: Tensor, name: str = "custom"):
        try:
            betas = torch.as_tensor(betas, dtype=torch.float64).cpu()
        except (TypeError, ValueError, RuntimeError):
            raise UsageError(f"betas is {betas!r}: it must be a vector of numbers strictly between "
                             "0 and 1") from None
        if betas.ndim != 1 or len(betas) == 0 or not bool(((betas > 0) & (betas < 1)).all()):
            raise UsageError(
                "betas must be a non-empty vector of numbers strictly between 0 and 1, "
                f"but has shape {tuple(betas.shape)} and range "
                f"[{betas.min().item() if betas.numel() else math.nan:.3g}, "
                f"{betas.max().item() if betas.numel() else math.nan:.3g}]"
            )
        self.name = name
        self.betas = betas
        self.alphas_cumprod = torch.cumprod(1 - betas, 0)
        self.sqrt_alphas_cumprod = self.alphas_cumprod.sqrt()
        self.sqrt_one_minus_alphas_cumprod = (1 - self.alphas_cumprod).sqrt()
        self._cache: dict = {}

    @classmethod
    def linear(cls, steps: int = 1000) -> "NoiseSchedule":
        """Linear betas from 1e-4 to 0.02 at 1000 steps, rescaled for other lengths.

        Source: Ho et al. 2020, section 4; rescaling as in Nichol & Dhariwal 2021.
        """
        _check_steps(steps)
        scale = 1000 / steps
        betas = torch.linspace(1e-4 * scale, 0.02 * scale, steps, dtype=torch.float64)
        return cls(betas.clamp(max=0.999), f"linear({steps})")

    @classmethod
    def cosine(cls, steps: int = 1000) -> "NoiseSchedule":
        """Cosine schedule with offset 0.008 and betas capped at 0.999.

        Source: Nichol & Dhariwal 2021, Eq. 17.
        """
        _check_steps(steps)
        u = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        alphas_cumprod = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = 1 - alphas_cumprod[1:] / alphas_cumprod[:-1]
        return cls(betas.clamp(max=0.999), f"cosine({steps})")

    @classmethod
    def from_diffusers(cls, scheduler) -> "NoiseSchedule":
        """The schedule of a diffusers scheduler (anything with a ``betas`` tensor).

        Raises:
            UsageError: if the scheduler has no betas or does not predict epsilon.
        """
        betas = getattr(scheduler, "betas", None)
        if betas is None:
            raise UsageError(
                f"{type(scheduler).__name__} has no betas: pass a discrete scheduler "
                "such as DDPMScheduler or DDIMScheduler"
            )
        prediction = getattr(getattr(scheduler, "config", None), "prediction_type", "epsilon")
        if prediction != "epsilon":
            raise UsageError(
                f"prediction_type is {prediction!r}: the equivariance loss needs a model that "
                "predicts epsilon"
            )
        return cls(betas, f"{type(scheduler).__name__}({len(betas)})")

    def __len__(self) -> int:
        return len(self.betas)

    def __repr__(self) -> str:
        return f"NoiseSchedule.{self.name}"

    def at(self, table: str, t: Tensor, like: Tensor | None = None) -> Tensor:
        """Look a table up at timesteps.

        Args:
            table: name of an attribute that is a (T,) table.
            t: (B,) int64 timesteps.
            like: (B, ...) tensor; if given, the result has its dtype and broadcasts against it.

        Returns:
            (B,) float64, or (B, 1, ...) in ``like``'s dtype.
        """
        # One copy a device: a table that had to cross to the GPU each step would stall it.
        key = (table, t.device)
        if key not in self._cache:
            self._cache[key] = getattr(self, table).to(t.device)
        values = self._cache[key][t]
        return values if like is None else expand(values, like)

    def q_sample(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Diffuse data: x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps.

        Args:
            x0: (B, ...) data.
            t: (B,) int64 timesteps.
            eps: (B, ...) standard normal noise.

        Source: Ho et al. 2020, Eq. 4.
        """
        signal = self.at("sqrt_alphas_cumprod", t, x0)
        return signal * x0 + self.at("sqrt_one_minus_alphas_cumprod", t, x0) * eps

    def predict_x0(self, xt: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """The data that x_t and a noise prediction imply: (x_t - s eps) / sqrt(abar_t).

        Source: Ho et al. 2020, Eq. 15.
        """
        noise = self.at("sqrt_one_minus_alphas_cumprod", t, xt)
        return (xt - noise * eps) / self.at("sqrt_alphas_cumprod", t, xt)


def expand(values: Tensor, like: Tensor) -> Tensor:
    """(B,) values in ``like``'s dtype, shaped (B, 1, ...) so that they broadcast against it."""
    return values.to(like.dtype).view(-1, *[1] * (like.ndim - 1))


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise UsageError(f"steps is {steps}: a schedule needs at least one timestep")
