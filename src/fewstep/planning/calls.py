"""Which network calls a method makes in an iteration, told by the method itself: it is run on stand-ins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.core.process import Process
from fewstep.core.streams import Streams
from fewstep.core.tensors import Condition
from fewstep.errors import FewstepError
from fewstep.methods.base import Batch, Options
from fewstep.methods.decoupled import DecoupledOptions

_SHAPE = (4,)
"""Of the stand-ins' samples: what a method calls does not depend on it."""


@dataclass(frozen=True)
class Call:
    """One network call."""

    role: str
    """"teacher", "student", "critic" or "discriminator" (a call of the network whose features it reads)."""
    rows: int
    graph: bool
    """Whether a backward pass follows, so that activations are kept."""
    through: bool
    """Whether gradient is wanted of its input as well."""


def calls_of(options: Options, process: Process, rows: int) -> dict[str, list[Call]]:
    """The calls of a critic update and of the student's update for a micro-batch of `rows`, in order.

    Those without a backward are given with all rows: along a path, some are of fewer.

    Raises:
        FewstepError: the method's student is causal, whose calls are not all of one size.
    """
    if isinstance(options, DecoupledOptions) and options.measures:
        options = replace(options, moment_mean=1.0, moment_variance=1.0)
    method = options.build()
    if method.needs.causal:
        raise FewstepError(
            f"found {method.name}, whose student makes videos chunk by chunk, expected a method of whole samples, "
            "fix: plan dmd2 on the same teacher for what the networks take"
        )
    roles = _StandIns(process)
    samples = torch.arange(rows)
    noise = torch.zeros(rows, *_SHAPE)
    batch = Batch({}, samples, _SHAPE, real=(noise, {}), pairs=(noise + 1, noise, {}))
    draw = Streams(0).at(1, samples)
    path = method.rollout(batch, roles, draw)
    found: dict[str, list[Call]] = {}
    for phase, loss in (("critic", method.critic_loss), ("student", method.student_loss)):
        if phase == "critic" and not method.critic_updates:
            continue
        roles.calls = []
        loss(path, roles, draw.sub(phase).sub(0) if phase == "critic" else draw.sub(phase))
        found[phase] = [call if call.graph else replace(call, rows=max(call.rows, rows)) for call in roles.calls]
    return found


class _StandIns:
    """Roles of one number each, that note how they are called."""

    discriminates = True

    def __init__(self, process: Process) -> None:
        self.process = process
        self.calls: list[Call] = []
        self._weights = {role: nn.Parameter(torch.tensor(0.5)) for role in ("student", "critic", "discriminator")}

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name not in ("teacher", "student", "critic"):
            raise AttributeError(name)
        return lambda x, t, condition: self._call(name, x)

    def discriminator(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self._call("discriminator", x).mean(1, keepdim=True)

    def log_ratio(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self.discriminator(x, t, condition).flatten(1).mean(1)

    def null(self, condition: Condition) -> Condition:
        return condition

    def _call(self, role: str, x: Tensor) -> Tensor:
        through = torch.is_grad_enabled() and x.requires_grad
        graph = through or (torch.is_grad_enabled() and role in self._weights)
        self.calls.append(Call(role, len(x), graph, through))
        return x * self._weights.get(role, 0.5)
