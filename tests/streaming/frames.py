"""Videos of a few numbers a frame: networks of points made into networks of videos, and one that is a causal student.

Its memory and its parallel calls are the real ones (`fewstep.attention`), around a single attention without weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from fewstep.attention import CausalSeat
from fewstep.attention.causal import Call, Context
from fewstep.core.tensors import Condition

FRAMES = 4
SIZE = 2
"""Numbers a frame."""


class FrameByFrame(nn.Module):
    """A network of points (N, 2), called for all frames of videos (B, 2, F) at t (B,), or (B, F) for each its own."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = [network]

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        frames = x.shape[2]
        times = t[:, None].expand(-1, frames) if t.ndim == 1 else t
        told = {name: value.repeat_interleave(frames, 0) for name, value in condition.items()}
        made: Tensor = self.network[0](x.transpose(1, 2).flatten(0, 1), times.flatten(), told)
        return made.unflatten(0, (-1, frames)).transpose(1, 2)


class TinyCausal(FrameByFrame):
    """The same, plus what attention finds in the frames that it sees; one token a frame, one head."""

    context: Context | None = None

    @contextmanager
    def within(self, context: Context) -> Iterator[None]:
        before, self.context = self.context, context
        try:
            yield
        finally:
            self.context = before

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        made = super().forward(x, t, condition)
        if self.context is None:
            return made
        tokens = x.transpose(1, 2).unsqueeze(2)
        found = self.context.attend(Call(self.context, 1, 1, SIZE), 0, tokens, tokens, tokens)
        return made + 0.3 * found.squeeze(2).transpose(1, 2)


class TinySeat(CausalSeat):
    """The two ways to call it."""

    def __init__(self, network: TinyCausal) -> None:
        self._attention = network  # type: ignore[assignment]
