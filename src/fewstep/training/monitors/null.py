"""One look at the unconditional embedding, which guidance cannot do without."""

from __future__ import annotations

import torch

from fewstep.core.tensors import Condition
from fewstep.methods.base import LANDING, STEPS, Method, Roles


def null_numbers(method: Method, roles: Roles, condition: Condition) -> dict[str, float]:
    """null/told: 1 if the empty prompt's condition differs from the batch's; null/filled: 1 if it is not all zeros.

    Nothing where the method is not guided or there is no condition. A backbone whose empty prompt is meant to be zeros
    says so (`zero_null`). Costs no network call.
    """
    names = sorted(condition.keys() - {STEPS, LANDING})
    if getattr(method.options, "guidance_scale", 1) == 1 or not names:
        return {}
    null = roles.null(condition)
    told = any(not torch.equal(null[name], condition[name]) for name in names)
    numbers = {"null/told": float(told)}
    floats = [null[name] for name in names if null[name].is_floating_point()]
    if floats and not getattr(getattr(roles, "backbone", None), "zero_null", False):
        numbers["null/filled"] = float(any(bool(value.any()) for value in floats))
    return numbers
