"""What a run's steps came to, summed on the device, so that a step never waits for it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from robustdm.device import to_host
from robustdm.distributed import Ranks

BANDS = 4
"""Equal bands of t in which the loss is logged, low noise first."""


class StepMetrics:
    """Means of the current window of steps, and counts of skipped steps.

    Everything is updated in place, where a CUDA graph finds it.

    Args:
        samples: of a batch, on this rank.
        timesteps: of the noise schedule.
        ranks: the processes that share each batch.
        device: where the steps run.

    Attributes:
        skipped, skipped_in_a_row: scalars, steps of the run whose loss or gradient was not finite.
        finite: (B,) bool, which samples of the last batch had a finite loss.
    """

    def __init__(self, samples: int, timesteps: int, ranks: Ranks, device: torch.device):
        self._timesteps, self._ranks = timesteps, ranks
        self.skipped = torch.zeros((), device=device)
        self.skipped_in_a_row = torch.zeros((), device=device)
        self.finite = torch.ones(samples, dtype=torch.bool, device=device)
        self._sums = torch.zeros(4, device=device)
        self._bands = torch.zeros(2, BANDS, device=device)

    def add(self, t: Tensor, fit: Tensor, reg: Tensor, norm: Tensor, skipped: Tensor) -> None:
        """Add a step.

        Args:
            t, fit, reg: (B,) timesteps and losses of this rank's samples.
            norm: scalar norm of the gradient.
            skipped: scalar, 1.0 if the step was skipped, else 0.0.
        """
        taken = 1 - skipped
        self.finite[: len(fit)] = (fit + reg).isfinite()
        self.skipped += skipped
        self.skipped_in_a_row.add_(skipped).mul_(skipped)
        values = torch.stack([fit.mean(), reg.mean(), norm, torch.ones_like(norm)])
        self._sums += torch.where(taken.bool(), values, 0)
        fit = torch.where(taken.bool(), fit, 0)
        band = t * BANDS // self._timesteps
        self._bands[0].index_add_(0, band, fit)
        self._bands[1].index_add_(0, band, taken.expand_as(fit))

    def close_window(self) -> Callable[[], dict[str, float]]:
        """Begin a new window; the function returned gives the means of the one that ends, and waits
        only for what the device had been given until now."""
        skips = torch.stack([self.skipped, self.skipped_in_a_row])
        sums, bands = self._ranks.all_sum([self._sums / self._ranks.size, self._bands])
        arriving = to_host(torch.cat([sums, bands.flatten(), skips]))
        self._sums.zero_()
        self._bands.zero_()

        def read() -> dict[str, float]:
            fit, reg, norm, steps, *bands, skipped, in_a_row = arriving().tolist()
            record: dict[str, float] = {}
            if steps:
                fit, reg, norm = fit / steps, reg / steps, norm / steps
                record.update(loss=fit + reg, fit=fit, reg=reg, grad_norm=norm)
            for band, (total, count) in enumerate(zip(bands[:BANDS], bands[BANDS:], strict=True)):
                if count:
                    record[f"fit_band{band}"] = total / count
            record["skipped"] = int(skipped)
            if in_a_row:
                record["skipped_in_a_row"] = int(in_a_row)
            return record

        return read
