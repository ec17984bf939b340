"""Where the networks are queried: bounds and laws of the noise level tau of a segment.

Bounds and margins live in the un-shifted time u, with t = shift u / (1 + (shift - 1) u), so that a margin takes the
same share of every segment of a shifted grid; with shift 1 they are plain times.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.special import erfc, ndtri

from fewstep.core.grids import shift_time, unshift_time
from fewstep.errors import FewstepError

TauRange = Literal["separate", "to_T"]
TauLaw = Literal["uniform", "uniform_unshifted", "logit_normal"]
TAU_RANGES: tuple[str, ...] = get_args(TauRange)
TAU_LAWS: tuple[str, ...] = get_args(TauLaw)


def tau_bounds(floor: Tensor, ceiling: Tensor, *, margin: float, tau_min: float, shift: float) -> tuple[Tensor, Tensor]:
    """The interval (low, high), both (B,) float64 times, that the margins leave of [floor, ceiling].

    `margin` is taken off both ends in un-shifted time; tau is never below `tau_min` (a time). Whoever chooses margins
    sees to it that low < high.
    """
    low = shift_time(unshift_time(floor.double(), shift) + margin, shift).clamp(min=tau_min)
    high = shift_time(unshift_time(ceiling.double(), shift) - margin, shift)
    return low, high


def draw_tau(law: TauLaw, u: Tensor, low: Tensor, high: Tensor, *, shift: float, mean: float, std: float) -> Tensor:
    """Times (B,) float64 in [low, high] from uniform numbers `u` (B,) in [0, 1).

    "uniform" in t; "uniform_unshifted": uniform in un-shifted time (TDM-R1); "logit_normal": a logistic of a normal
    with `mean` and `std`, truncated to the interval (Flow-Factory; mean 0 and std 1 are SD3's training law).
    """
    u = u.to(low)
    if law == "uniform":
        return torch.lerp(low, high, u)
    if law == "uniform_unshifted":
        return shift_time(torch.lerp(unshift_time(low, shift), unshift_time(high, shift), u), shift)
    if law == "logit_normal":
        z_low, z_high = (low.logit() - mean) / std, (high.logit() - mean) / std
        side = torch.where(z_low > 0, -1.0, 1.0)  # work in the lower tail, where the quantiles keep their digits
        z = side * ndtri(torch.lerp(_normal_cdf(side * z_low), _normal_cdf(side * z_high), u))
        return torch.sigmoid(mean + std * z).clamp(low, high)
    raise FewstepError(f"found tau law {law!r}, expected one of {TAU_LAWS}, fix: choose one of them")


def _normal_cdf(z: Tensor) -> Tensor:
    """Unlike torch.special.ndtr, exact far out in the lower tail."""
    return 0.5 * erfc(-z / math.sqrt(2))
