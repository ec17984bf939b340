"""Small helpers on tensors with a batch axis first, and on conditions: dicts of such tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.errors import FewstepError

Condition = dict[str, Tensor]
"""What a network is told besides x and t: tensors with the batch at axis 0, by name. May be empty."""

CONTROLS = "controls"
"""Condition key of what is told frame by frame, such as tracks and a drive signal: (B, C, F, h, w) for F latent frames.
Zeros, like no such key, say nothing."""


def expand(values: Tensor, like: Tensor) -> Tensor:
    """Per-sample `values` (B,) as (B, 1, ..., 1), in the dtype and on the device of `like` (B, ...)."""
    return values.to(device=like.device, dtype=like.dtype).reshape(-1, *(1,) * (like.ndim - 1))


def flat_mean(x: Tensor) -> Tensor:
    """Mean of (B, ...) over everything but the batch: (B,)."""
    return x.flatten(1).mean(1)


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which times are kept for samples of `dtype`: float64 for float64, else float32."""
    return torch.promote_types(dtype, torch.float32)


def index_condition(condition: Condition, index: Tensor) -> Condition:
    """The rows `index` (long or bool, (b,)) of every tensor of `condition`."""
    return {name: value[index.to(value.device)] for name, value in condition.items()}


def cat_conditions(first: Condition, second: Condition) -> Condition:
    """Two conditions as one batch: rows of `first`, then rows of `second`.

    Raises:
        FewstepError: the names differ, or two tensors of one name differ in more than the batch axis.
    """
    if first.keys() != second.keys():
        raise FewstepError(
            f"found conditions with the names {sorted(first)} and {sorted(second)}, expected the same names in both, "
            "fix: build the null condition with the encoder that built the condition"
        )
    for name, value in first.items():
        if value.shape[1:] != second[name].shape[1:]:
            raise FewstepError(
                f"found condition {name!r} with the shapes {tuple(value.shape)} and {tuple(second[name].shape)}, "
                "expected them equal after the batch axis, fix: pad both to one length"
            )
    return {name: torch.cat([value, second[name]]) for name, value in first.items()}
