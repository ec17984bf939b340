"""Variants of Decoupled DMD, and short ways to what its losses are made of."""

from __future__ import annotations

from typing import Any

import torch
from ring_toy import WatchedRoles, batch, draw
from torch import Tensor

from fewstep.core.process import DiscreteVP, Flow
from fewstep.core.rollout import Landing
from fewstep.methods import DMD2Options
from fewstep.methods.base import Loss
from fewstep.methods.dmd2 import DMD2
from fewstep.methods.matching import Matching, Pull

PROCESSES = [Flow(), DiscreteVP.cosine()]
MOMENTS: dict[str, Any] = {"regulariser": "mean_variance", "moment_mean": 0.1, "moment_variance": 0.9}
COMPATIBLE: dict[str, Any] = {"guidance_levels": "shared", "joint_normaliser": True}
VARIANTS: dict[str, dict[str, Any]] = {
    "hybrid": {},
    "constrained": {"matching_levels": "cleaner"},
    "full": {"guidance_levels": "full"},
    "shared": {"guidance_levels": "shared"},
    "compatible": COMPATIBLE,
    "inverted": {"guidance_levels": "noisier"},
    "one step": {"steps": 1},
    "plain teacher": {"guidance_scale": 1.0},
    "with a GAN": {"gan_weight": 5e-3},
    "moments": MOMENTS,
    "GAN alone": {"regulariser": "gan", "gan_weight": 5e-3},
    "nothing": {"regulariser": "none"},
    "moments and regression": MOMENTS | {"steps": 1, "regression_weight": 0.25},
    "several step counts": {"step_counts": (1, 2, 4), "steps_condition": True},
}


def student_loss(method: Matching, roles: WatchedRoles, iteration: int = 0) -> Loss:
    path = method.rollout(batch(roles), roles, draw(iteration))
    return method.student_loss(path, roles, draw(iteration))


def gradient(method: Matching, roles: WatchedRoles) -> Tensor:
    """Of every sample's loss with respect to what the student answers for it, (COUNT, 2)."""
    values = student_loss(method, roles).values
    offset = roles.networks["student"].offset  # added to every answer
    return torch.stack([torch.autograd.grad(value, offset, retain_graph=True)[0] for value in values])


def pulls(method: Matching, roles: WatchedRoles, iteration: int = 0) -> tuple[Landing, list[Pull]]:
    """The compared point of a random call, and the terms of its update."""
    numbers = draw(iteration).sub("student")
    path = method.rollout(batch(roles), roles, draw(iteration))
    call = numbers.integers("call", path.steps)
    landing = method._compared(path, path.landing(call), numbers)
    return landing, method._pulls(roles, landing, method._student_query(path, landing, numbers), numbers)[0]


def dmd2(**changes: Any) -> DMD2:
    """DMD2 with the settings that the compatibility mode has."""
    return DMD2(DMD2Options(gan_weight=0.0, tau_law="uniform_unshifted", **changes))
