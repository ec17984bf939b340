"""Noise tables of discrete processes, in the float32 arithmetic of diffusers so that the tables agree bit for bit."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fewstep.errors import FewstepError

SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
_MAX_BETA = 0.999


def betas_from_schedule(schedule: str, num_steps: int, beta_start: float, beta_end: float) -> Tensor:
    """The `num_steps` betas of a named schedule, float32; "squaredcos_cap_v2" ignores the two ends."""
    if schedule == "linear":
        return torch.linspace(beta_start, beta_end, num_steps, dtype=torch.float32)
    if schedule == "scaled_linear":
        return torch.linspace(beta_start**0.5, beta_end**0.5, num_steps, dtype=torch.float32) ** 2
    if schedule == "squaredcos_cap_v2":
        levels = [math.cos((i / num_steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(num_steps + 1)]
        betas = [min(1 - after / before, _MAX_BETA) for before, after in zip(levels, levels[1:], strict=False)]
        return torch.tensor(betas, dtype=torch.float32)
    raise FewstepError(f"found beta schedule {schedule!r}, expected one of {SCHEDULES}, fix: pass the betas themselves")


def zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """The table with alpha shifted and scaled so that it keeps its first value and ends at exactly 0.

    arXiv 2305.08891, algorithm 1.
    """
    alpha = alphas_cumprod.sqrt()
    return ((alpha - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))).square()
