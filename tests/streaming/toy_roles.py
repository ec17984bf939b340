"""Tiny Wans as roles: a causal student, and a teacher and a critic that see whole videos."""

from __future__ import annotations

import torch
from tiny_causal import CHANNELS, PROCESS, ROWS, SIDE, TinyWan
from torch import Tensor, nn

from fewstep.core.streams import Draw, Streams
from fewstep.methods.base import Batch

FRAMES = 4


class WanRoles:
    """Networks that differ; a discriminator that reads means of channels."""

    process = PROCESS
    discriminates = True

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.networks = [TinyWan(dtype) for _ in range(3)]
        for seed, wan in enumerate(self.networks[1:]):
            torch.manual_seed(seed)
            with torch.no_grad():
                for parameter in wan.network.parameters():
                    parameter.add_(0.03 * torch.randn_like(parameter))
        self.own, self.real, self.fake = self.networks
        self.causal = self.own.seat
        self.student, self.teacher, self.critic = (wan.student for wan in self.networks)
        self.own.network.requires_grad_(True)
        self.fake.network.requires_grad_(True)
        self.heads = nn.Linear(CHANNELS, 1, dtype=dtype)

    def null(self, condition: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: torch.zeros_like(value) for name, value in condition.items()}

    def discriminator(self, x: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
        return self.heads(x.square().mean((2, 3, 4)))

    def log_ratio(self, x: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
        return self.discriminator(x, t, condition).mean(1)

    def batch(self) -> Batch:
        real = self.own.video(FRAMES, 9)
        shape = (CHANNELS, FRAMES, SIDE, SIDE)
        return Batch(self.own.condition, torch.arange(ROWS), shape, self.own.dtype, (real, self.own.condition))


def draw(iteration: int = 1, samples: range = range(ROWS)) -> Draw:
    return Streams(0).at(iteration, samples)


def gradient(values: Tensor, network: nn.Module) -> Tensor:
    """Of the mean of a loss with respect to all parameters, in a row; zeros where there is none."""
    parameters = list(network.parameters())
    found = torch.autograd.grad(values.mean(), parameters, allow_unused=True, retain_graph=True)
    pairs = zip(found, parameters, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])
