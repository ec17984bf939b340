"""Self Forcing reaches the exact law of an autoregressive process, frame by frame (evaluation.causal_toy)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from fewstep.evaluation.answer import Answer, at_most
from fewstep.evaluation.causal_toy import FRAMES, A, ArRoles, ArStudent, D, Q
from fewstep.evaluation.toy import BulkDraw
from fewstep.methods.base import Batch, Method
from fewstep.methods.self_forcing import SelfForcingOptions, SelfForcingSiDOptions

_PLAIN: dict[str, Any] = {
    "steps": 2, "chunk": 1, "shift": 1.0, "guidance_scale": 1.0, "normaliser": "none", "tau_law": "uniform",
}  # fmt: skip
CAUSAL_OPTIONS = {"DMD": SelfForcingOptions(**_PLAIN), "SiD": SelfForcingSiDOptions(**_PLAIN, alpha=0.5)}
"""Two steps, one frame at a time, no guidance."""
_BATCH = 128


def causal_law(loss: str) -> Iterator[Answer]:
    """Two calls a frame, trained on the student's own videos by "DMD" or "SiD": five seconds.

    The student's frames know nothing of each other at first. What stops at either call has to have the law of the
    data: the first frame's covariance, the transition and its noise.
    """
    options: Any = CAUSAL_OPTIONS[loss]
    roles = ArRoles(ArStudent(options.time_grid(options.steps)[:-1]))
    train_causal(options.build(), roles, 250)
    for call, error in enumerate(law_errors(roles.network)):
        yield at_most(f"Self Forcing, {loss}: largest error of the causal law at call {call}", error, 0.1)


def train_causal(method: Method, roles: ArRoles, iterations: int) -> None:
    """Updates of the student alone, by Adam; the critic is exact."""
    draw = BulkDraw(_BATCH, torch.Generator().manual_seed(0))
    batch = Batch({}, torch.arange(_BATCH), (D, FRAMES), torch.float64)
    adam = torch.optim.Adam(roles.network.parameters(), 0.03, betas=(0.0, 0.99))
    for iteration in range(iterations):
        adam.param_groups[0]["lr"] = 0.03 * (1 - iteration / iterations)
        path = method.rollout(batch, roles, draw)
        adam.zero_grad()
        method.student_loss(path, roles, draw).values.mean().backward()
        adam.step()


def law_errors(student: ArStudent) -> list[float]:
    """Of videos that stop at each call: the largest deviation of first covariance, transition and noise."""
    truth = (torch.eye(D, dtype=torch.float64), A, Q)
    return [
        max(float((found - true).abs().max()) for found, true in zip(student.law(call), truth, strict=True))
        for call in range(len(student.times))
    ]
