"""Confidence intervals by the bootstrap over prompts.

Samples of one prompt are not independent, so whole prompts are drawn with replacement, and a prompt's samples, and
those of the reference that belong to it, count as often as it was drawn. The draws are the same for the same seed, so
two models that are scored on the same prompts are resampled alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

LEVEL = 0.95
"""Share of the intervals that hold the value."""


@dataclass(frozen=True)
class Estimate:
    """A figure with its interval; `low` and `high` are None where there is none."""

    value: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.value:.4g}"
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


def drawn_counts(prompts: int, resamples: int, seed: int = 0) -> Tensor:
    """How often each prompt counts in each resample, (resamples, prompts), float64; rows sum to `prompts`."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(prompts, (resamples, prompts), generator=generator)
    return torch.zeros(resamples, prompts, dtype=torch.float64).scatter_add_(1, drawn, torch.ones_like(drawn).double())


def estimate(statistic: Callable[[Tensor], float], counts: Tensor) -> Estimate:
    """The statistic of the prompts as they are, with its interval.

    The percentiles of the resamples are shifted so that their mean is the value. For a mean that changes nothing;
    distances are biased upwards once more in a resample, and the shift takes that out. The interval is for the figure
    at this number of samples, which is itself biased (see `frechet_distance`).

    Args:
        statistic: counts of the prompts (P,), float64 -> the figure. Called once for each resample and once more.
        counts: of `drawn_counts`, (R, P); R = 0 gives no interval.
    """
    value = statistic(torch.ones(counts.shape[1], dtype=torch.float64))
    if not len(counts):
        return Estimate(value)
    found = torch.tensor([statistic(row) for row in counts], dtype=torch.float64)
    low, high = torch.quantile(found - found.mean(), torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2]).double())
    return Estimate(value, value + float(low), value + float(high))


def mean_of(values: Tensor, counts: Tensor) -> Estimate:
    """The mean of one number per prompt, (P,), with its interval; `counts` as in `estimate`."""
    numbers = values.double()
    return estimate(lambda count: float(count @ numbers / count.sum()), counts)
