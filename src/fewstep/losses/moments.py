"""Mean and variance of a sample's elements, held at given values: the plainest thing that keeps few-step samples sane.

Decoupled DMD (arXiv 2511.22677) puts it in the place of distribution matching (eq. 7): stable, and of lower quality.
"""

from __future__ import annotations

import torch
from torch import Tensor


def moment_divergence(sample: Tensor, mean: float, variance: float) -> Tensor:
    """KL(N(mu_i, s_i^2) || N(mean, variance)) (B,), mu_i and s_i^2 of the elements of each `sample` (B, ...).

    In nats; 0 with no slope where a sample has the wanted moments, infinite where all its elements are equal. Its
    gradient with respect to an element is that of a mean over elements, like the matching losses'.

    Args:
        sample: clean samples, with gradient.
        mean: wanted, in units of the data (SDXL's latents: 0.075).
        variance: wanted, above 0 (SDXL's latents: 0.81).
    """
    elements = sample.flatten(1)
    spread, centre = torch.var_mean(elements, dim=1, correction=0)
    ratio = spread / variance
    return 0.5 * (ratio + (centre - mean).square() / variance - 1 - ratio.log())


def element_moments(samples: Tensor) -> tuple[float, float]:
    """The mean over `samples` (N, ...) of each one's mean, and of each one's variance: what to ask of others."""
    spread, centre = torch.var_mean(samples.double().flatten(1), dim=1, correction=0)
    return float(centre.mean()), float(spread.mean())
