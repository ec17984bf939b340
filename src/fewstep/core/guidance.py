"""Classifier-free guidance, always as one batched network call. Scale 1 means none, everywhere."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fewstep.core.tensors import Condition, cat_conditions

Denoiser = Callable[[Tensor, Tensor, Condition], Tensor]
"""model(x (B, ...), t (B,), condition) -> denoised (B, ...)."""


def guided_parts(
    model: Denoiser, x: Tensor, t: Tensor, condition: Condition, null_condition: Condition
) -> tuple[Tensor, Tensor]:
    """(conditional, unconditional) denoised samples, each (B, ...), from one call with 2B rows, conditional first."""
    both = model(torch.cat([x, x]), torch.cat([t, t]), cat_conditions(condition, null_condition))
    conditional, unconditional = both.chunk(2)
    return conditional, unconditional


def guided(
    model: Denoiser, x: Tensor, t: Tensor, condition: Condition, null_condition: Condition, scale: float
) -> Tensor:
    """uncond + scale (cond - uncond) on denoised samples (card tdm.md, eq. 8).

    Cost: one call with 2B rows; with scale 1 one plain call with B rows, and `null_condition` is not looked at.
    """
    if scale == 1:
        return model(x, t, condition)
    conditional, unconditional = guided_parts(model, x, t, condition, null_condition)
    return unconditional + scale * (conditional - unconditional)
