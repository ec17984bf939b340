"""Roles that record every call, and short ways to run a loss of few-step SiD over them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.core.process import Process
from fewstep.core.streams import Draw, Streams
from fewstep.core.tensors import Condition
from fewstep.evaluation.exact import LABEL, PredictingAs, ring
from fewstep.methods.base import Batch, Loss, Roles
from fewstep.methods.sid import DrawnPath, SiD, SiDOptions, sid_anti_cfg, sid_long, sid_lsg, sid_none, sid_zero_cfg

COUNT = 24
PRESETS = {
    "none": sid_none(),
    "long": sid_long(),
    "lsg": sid_lsg(),
    "zero_cfg": sid_zero_cfg(),
    "anti_cfg": sid_anti_cfg(),
}
VARIANTS = PRESETS | {
    "ddim": SiDOptions(eta=1.0),
    "fixed": SiDOptions(chain_noise="fixed"),
    "one step": SiDOptions(steps=1),
    "legacy": SiDOptions(weight="one", normaliser="dmd", alpha=1.2),
    "adversarial": replace(sid_zero_cfg(), gan_weight=0.01),
    "unify": SiDOptions(step_counts=(1, 2, 4), steps_condition=True),
    "two critic updates": replace(sid_lsg(), critic_updates=2, teacher_regularisation=0.1),
}


class Scaled(nn.Module):
    """teacher(x) * gain + offset; `head` makes logits of x."""

    def __init__(self, teacher: Any, offset: float) -> None:
        super().__init__()
        self.teacher = [teacher]
        self.gain = nn.Parameter(torch.tensor([1.1, 0.9], dtype=torch.float64))
        self.offset = nn.Parameter(torch.full((2,), offset, dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self.teacher[0](x, t, condition) * self.gain + self.offset


class WatchedRoles:
    """Toy roles that record every call; the outputs of those named in `detached` carry no gradient."""

    def __init__(self, process: Process, detached: tuple[str, ...] = (), kind: str = "x0") -> None:
        self.process = process
        self.exact = PredictingAs(ring(process, [1, 2, 3, 4], 1.5, 0.3, torch.float64), kind)
        self.student_network, self.critic_network = Scaled(self.exact, 0.1), Scaled(self.exact, -0.1)
        self.head = nn.Parameter(torch.ones(2, 3, dtype=torch.float64))  # of the discriminator: the critic's own
        self.detached = detached
        self.calls: list[tuple[str, Tensor, Tensor, Condition, bool]] = []

    def teacher(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self._watched("teacher", self.exact, x, t, condition)

    def student(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self._watched("student", self.student_network, x, t, condition)

    def critic(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self._watched("critic", self.critic_network, x, t, condition)

    def discriminator(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self._watched("discriminator", lambda x, t, condition: x.tanh() @ self.head, x, t, condition)

    def null(self, condition: Condition) -> Condition:
        return self.exact.null(condition)

    def _watched(self, name: str, model: Any, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        self.calls.append((name, x, t, condition, torch.is_grad_enabled()))
        answer = model(x, t, condition)
        return answer.detach() if name in self.detached else answer

    def made(self, name: str) -> list[tuple[str, Tensor, Tensor, Condition, bool]]:
        return [call for call in self.calls if call[0] == name]

    def of_student(self) -> list[nn.Parameter]:
        return list(self.student_network.parameters())

    def of_critic(self) -> list[nn.Parameter]:
        return [*self.critic_network.parameters(), self.head]


def labels() -> Condition:
    return {LABEL: torch.arange(COUNT) % 2}


def batch(real: bool = True) -> Batch:
    data = torch.randn(COUNT, 2, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return Batch(labels(), torch.arange(COUNT), (2,), torch.float64, (data, labels()) if real else None)


def draw(iteration: int = 0) -> Draw:
    return Streams(0).at(iteration, range(COUNT))


def walk(options: SiDOptions, roles: Roles, iteration: int = 0) -> tuple[SiD, DrawnPath]:
    method = SiD(options)
    return method, method.rollout(batch(), roles, draw(iteration))


def student_loss(options: SiDOptions, roles: Roles, iteration: int = 0) -> Loss:
    method, path = walk(options, roles, iteration)
    return method.student_loss(path, roles, draw(iteration))


def critic_loss(options: SiDOptions, roles: Roles, iteration: int = 0) -> Loss:
    method, path = walk(options, roles, iteration)
    return method.critic_loss(path, roles, draw(iteration))


def gradient(options: SiDOptions, roles: WatchedRoles) -> Tensor:
    """Of the student's mean loss with respect to its parameters."""
    loss = student_loss(options, roles).values.mean()
    return torch.cat(torch.autograd.grad(loss, roles.of_student()))
