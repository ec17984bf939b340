"""The two networks of Wan2.2-A14B as one, so that roles, adapters and optimisers need not know that there are two."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class WanExperts(nn.Module):
    """Calls `high` where the timestep is at least `boundary` and `low` below, sample by sample, as WanPipeline does.

    Args:
        high: network for the noisier times.
        low: network of the same shape for the others.
        boundary: network time, `boundary_ratio` of the pipeline times the number of training timesteps.
    """

    def __init__(self, high: nn.Module, low: nn.Module, boundary: float) -> None:
        super().__init__()
        self.high, self.low, self.boundary = high, low, float(boundary)
        self.together = False
        """Whether both are called every time, one for nothing if it has to be: as sharded networks need it."""

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        return_dict: bool = False,
    ) -> tuple[Tensor]:
        """As WanTransformer3DModel's, as a tuple: (B, C, f, h, w), (B,) and (B, L, width) -> (B, C, f, h, w)."""
        below = timestep < self.boundary
        rows = [(below == side).nonzero().flatten() for side in (False, True)]
        parts = []
        for network, own in zip((self.high, self.low), rows, strict=True):
            if len(own) or self.together:
                called = own if len(own) else own.new_zeros(1)
                answer = network(
                    hidden_states[called], timestep[called], encoder_hidden_states[called], return_dict=False
                )[0]
                parts.append(answer[: len(own)])
        return (torch.cat(parts)[torch.cat(rows).argsort()],)

    @property
    def config(self) -> Any:
        """That of `high`; `low` has the same."""
        return self.high.config

    @property
    def dtype(self) -> torch.dtype:
        return self.high.dtype  # type: ignore[return-value]

    def enable_gradient_checkpointing(self, checkpoint: Callable[..., Any] | None = None) -> None:
        """Of both, as diffusers' networks do."""
        for network in (self.high, self.low):
            network.enable_gradient_checkpointing(checkpoint)  # type: ignore[operator]

    def disable_gradient_checkpointing(self) -> None:
        """Of both."""
        for network in (self.high, self.low):
            network.disable_gradient_checkpointing()  # type: ignore[operator]

    @property
    def is_gradient_checkpointing(self) -> bool:
        return bool(self.high.is_gradient_checkpointing)
