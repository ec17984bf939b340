"""Roles on a ring of four modes that record every call, and what a method is handed with them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fewstep.core.process import Process
from fewstep.core.streams import Draw, Streams
from fewstep.core.tensors import Condition
from fewstep.evaluation.exact import LABEL, ring
from fewstep.evaluation.toy import LogisticDiscriminator, ToyRoles
from fewstep.methods.base import Batch

COUNT = 32


class Scaled(nn.Module):
    """teacher(x) * gain + offset, with trainable numbers."""

    def __init__(self, teacher: nn.Module, offset: float) -> None:
        super().__init__()
        self.teacher = [teacher]
        self.gain = nn.Parameter(torch.ones(2, dtype=torch.float64))
        self.offset = nn.Parameter(torch.full((2,), offset, dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self.teacher[0](x, t, condition) * self.gain + self.offset


class WatchedRoles(ToyRoles):
    """Toy roles on a ring of modes that record every call."""

    def __init__(self, process: Process) -> None:
        exact = ring(process, [1, 2, 3, 4], 1.5, 0.3, torch.float64)
        self.networks = {"student": Scaled(exact, 0.1), "critic": Scaled(exact, -0.1)}
        self.networks["discriminator"] = LogisticDiscriminator(process, 2).double()
        nn.init.normal_(self.networks["discriminator"].weight, std=0.2, generator=torch.Generator().manual_seed(0))
        self.calls: list[tuple[str, Tensor, Tensor, Condition]] = []
        super().__init__(exact, *(self.watched(name, model) for name, model in self.networks.items()))
        self.exact, self.teacher = exact, self.watched("teacher", exact)

    def null(self, condition: Condition) -> Condition:
        return self.exact.null(condition)

    def watched(self, name: str, model: nn.Module):
        def call(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
            self.calls.append((name, x, t, condition))
            return model(x, t, condition)

        return call

    def made(self, name: str) -> list[tuple[str, Tensor, Tensor, Condition]]:
        return [call for call in self.calls if call[0] == name]

    def parameters(self, *names: str) -> list[nn.Parameter]:
        return [p for name in names for p in self.networks[name].parameters()]


def draw(iteration: int = 0) -> Draw:
    return Streams(0).at(iteration, range(COUNT))


def batch(roles: WatchedRoles) -> Batch:
    told = {LABEL: torch.arange(COUNT) % 2}
    clean = roles.exact.sample(COUNT, torch.Generator().manual_seed(1))
    pairs = (draw().normal("pair", (2,), torch.float64), clean, told)
    return Batch(told, torch.arange(COUNT), (2,), torch.float64, real=(clean, told), pairs=pairs)
