"""A discriminator that reads the features of a network: taps on its blocks by hooks, and a head for each tap.

DMD2 (arXiv 2405.14867) puts a head on the critic and trains both, f-distill (arXiv 2502.15681) on the frozen teacher.
Their heads stand on the bottleneck of a UNet; a transformer has none, so that several depths are tapped.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

DEPTHS = (0.5, 0.75, 0.99)
"""Shares of a network's depth after which its features are read (NVIDIA's FastGen for Qwen-Image)."""


class Head(nn.Module):
    """Tokens (B, N, width) -> logit (B,): a two-layer network of every token, averaged over the tokens; 0 at first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU())
        self.logit = nn.Linear(width, 1)
        nn.init.zeros_(self.logit.weight)
        nn.init.zeros_(self.logit.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden: Tensor = self.layers(tokens.to(self.logit.weight.dtype))
        return self.logit(hidden.mean(1)).squeeze(1)


class Heads(nn.Module):
    """One head per tapped block: a list of token features -> logits (B, heads)."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(Head(width) for _ in range(count))

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        return torch.stack([head(tokens) for head, tokens in zip(self.heads, features, strict=True)], 1)


def blocks_at(blocks: Sequence[nn.Module], depths: Sequence[float] = DEPTHS) -> list[nn.Module]:
    """The blocks that complete the given shares of the depth, each once: of 28 blocks the 14th, 21st and 28th."""
    return [blocks[place] for place in sorted({math.ceil(depth * len(blocks)) - 1 for depth in depths})]


@contextmanager
def tapped(modules: Sequence[nn.Module]) -> Iterator[list[Any]]:
    """The outputs of `modules`, in the order of their calls, collected while the context lasts; gradients go through.

    A module that activation checkpointing calls again in the backward pass is out of the context by then.
    """
    outputs: list[Any] = []

    def collect(module: nn.Module, inputs: Any, output: Any) -> None:
        outputs.append(output)

    hooks = [module.register_forward_hook(collect) for module in modules]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()
