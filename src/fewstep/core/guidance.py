"""Classifier-free guidance, always as one batched network call. Scale 1 means none, everywhere.

Where frames are told something (`CONTROLS`), guidance of text keeps that as it is, and joint guidance of text and
motion has a third branch that is told the text alone (MotionStream, arXiv 2511.01266, eq. 2).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fewstep.core.tensors import CONTROLS, Condition, cat_conditions
from fewstep.errors import FewstepError

Denoiser = Callable[[Tensor, Tensor, Condition], Tensor]
"""model(x (B, ...), t (B,), condition) -> denoised (B, ...)."""


def guided_parts(
    model: Denoiser, x: Tensor, t: Tensor, condition: Condition, null_condition: Condition
) -> tuple[Tensor, Tensor]:
    """(conditional, unconditional) denoised samples, each (B, ...), from one call with 2B rows, conditional first."""
    both = model(torch.cat([x, x]), torch.cat([t, t]), cat_conditions(condition, null_condition))
    conditional, unconditional = both.chunk(2)
    return conditional, unconditional


def joint_weights(text: float, motion: float) -> tuple[float, float, float]:
    """Weights, with sum 1, of the answers of `joint_parts` for the guidance `text` (w_t) and `motion` (w_m), 0 or more.

    Card motionstream.md, eq. 2, collected. With motion 0 it is guidance by `text` alone, with text 0 by motion alone.
    """
    share = 1.0 if motion == 0 else text / (text + motion)
    return text + motion, share - text, 1 - share - motion


def joint_parts(
    model: Denoiser, x: Tensor, t: Tensor, condition: Condition, null_condition: Condition
) -> tuple[Tensor, Tensor, Tensor]:
    """Denoised samples told both text and motion, motion alone, and text alone; one call with 3B rows.

    Raises:
        FewstepError: a condition without controls.
    """
    if CONTROLS not in condition:
        raise FewstepError(
            f"found motion guidance with conditions of {sorted(condition)}, expected controls among them (tracks or a "
            "drive signal), fix: set motion_guidance to 0, or use a teacher of controlled films with such prompts"
        )
    still = condition | {CONTROLS: torch.zeros_like(condition[CONTROLS])}
    told = cat_conditions(cat_conditions(condition, null_condition), still)
    both, of_motion, of_text = model(torch.cat([x] * 3), torch.cat([t] * 3), told).chunk(3)
    return both, of_motion, of_text


def joined(parts: tuple[Tensor, Tensor, Tensor], text: float, motion: float) -> Tensor:
    """Answers of `joint_parts` as the guided one."""
    weights = joint_weights(text, motion)
    return sum((weight * part for weight, part in zip(weights, parts, strict=True)), torch.zeros_like(parts[0]))


def guided(
    model: Denoiser,
    x: Tensor,
    t: Tensor,
    condition: Condition,
    null_condition: Condition,
    scale: float,
    motion: float = 0.0,
) -> Tensor:
    """uncond + scale (cond - uncond) on denoised samples (card tdm.md, eq. 8), or with `motion` joint guidance.

    Cost: one call with 2B rows, 3B with `motion`; with scale 1 and no motion one plain call with B rows, and
    `null_condition` is not looked at.
    """
    if motion:
        return joined(joint_parts(model, x, t, condition, null_condition), scale, motion)
    if scale == 1:
        return model(x, t, condition)
    conditional, unconditional = guided_parts(model, x, t, condition, null_condition)
    return unconditional + scale * (conditional - unconditional)
