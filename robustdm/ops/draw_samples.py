"""Timesteps, radii and weights of a step, drawn in one launch."""

from types import ModuleType

import torch
from torch import Tensor

from robustdm.ops.checks import check_dtype, check_key, need
from robustdm.ops.dispatch import choose, implementation, registered
from robustdm.ops.reference import wide


def _kernels() -> ModuleType:
    from robustdm.kernels import draw_samples

    return draw_samples


def _run_draw_samples(
    key: Tensor, tables: Tensor, batch: int, dtype: torch.dtype, gamma: float, lam: float,
    lambda_mode: str, beta_low: float, beta_high: float, lambda_max: float | None,
    beta_per_batch: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    module = implementation("draw_samples", _kernels, backend, key.device, dtype)
    return module.draw_samples(key, tables, batch, dtype, gamma, lam, lambda_mode, beta_low,
                               beta_high, lambda_max, beta_per_batch)


_draw_samples = registered(_run_draw_samples)


@_draw_samples.register_fake
def _(key, tables, batch, dtype, *rest):
    t = key.new_empty(batch)
    scales = (tables.new_empty(batch, dtype=wide(dtype)) for _ in range(4))
    return t, tables.new_empty(batch), *scales


def draw_samples(
    key: Tensor, tables: Tensor, batch: int, dtype: torch.dtype, gamma: float, lam: float,
    lambda_mode: str, beta_low: float, beta_high: float, lambda_max: float | None = None,
    beta_per_batch: bool = False, backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Draw t and beta of every sample of a step, with the scales that follow, in one launch.

    Arguments and results: see `robustdm.ops.reference.draw_samples`.

    Raises:
        UsageError: for wrong shapes, dtypes or devices, or a backend that is off.
    """
    op = "draw_samples"
    need(op, tables.ndim == 2 and tables.shape[0] == 3 and tables.shape[1] > 0
         and tables.dtype == torch.float64,
         f"tables is {tables.dtype} of shape {tuple(tables.shape)}: give (3, T) float64, T > 0")
    check_dtype(op, dtype)
    check_key(op, "tables", tables, key)
    need(op, lambda_mode in ("ray", "x", "std", "literal"),
         f"lambda_mode is {lambda_mode!r}: choose one of ray, x, std, literal")
    run = choose(key, _draw_samples, _run_draw_samples)
    return run(key, tables.contiguous(), batch, dtype, gamma, lam, lambda_mode, beta_low,
               beta_high, lambda_max, beta_per_batch, backend)
