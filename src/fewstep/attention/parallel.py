"""All chunks of a video in one forward, each seeing what it would see if they were made one after the other.

Two forms. *Noisy history* (CausVid, arXiv 2412.07772, and its ODE initialisation): chunk i sees the seen chunks as they
are in the same sequence, each at a noise level of its own. *Clean history* (teacher forcing): the sequence is [clean
frames | noisy frames]; clean chunks see clean ones up to themselves, noisy chunks see the clean ones before them and
themselves. The second is what a rollout with a cache computes, in parallel (card self_forcing.md, V1 to V4).

There is no mask: the queries of a chunk attend to the keys it sees, one call of plain attention per chunk. That works
with any kernel, with a backward on every device, and computes nothing that a mask would throw away.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.attention.causal import Call, KeysAndValues, attention
from fewstep.attention.layout import Layout
from fewstep.errors import FewstepError


@dataclass(frozen=True)
class View:
    """What the frames of one chunk see."""

    asking: list[int]
    """Frames of the sequence."""
    asking_times: tuple[int, ...]
    seen: list[int]
    """Frames of the sequence, the asking ones last."""
    seen_times: tuple[int, ...]


class Parallel:
    """The context of such a forward.

    Args:
        layout: chunks and what they see.
        chunks: how many.
        clean_history: whether the sequence begins with the clean frames.
    """

    text: dict[int, KeysAndValues] | None = None

    def __init__(self, layout: Layout, chunks: int, clean_history: bool) -> None:
        if layout.sink_decay < 1:
            raise FewstepError(
                f"found sink_decay {layout.sink_decay} for chunks in parallel, expected 1, since a blended sink is "
                "made chunk by chunk, fix: set sink_decay to 1 here; the rollout can have another"
            )
        frames = chunks * layout.chunk
        self.views = []
        for offset in (0, frames) if clean_history else (0,):
            for chunk in range(chunks):
                seen = layout.seen(chunk)
                seen_times, times = layout.times(chunk, seen)
                own = [offset + frame for frame in _frames(layout, [chunk])]
                self.views.append(View(own, times, _frames(layout, seen) + own, seen_times + times))

    def attend(self, call: Call, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Chunk by chunk, in the order of the sequence."""
        query, key, value = (part.unflatten(1, (-1, call.tokens)) for part in (query, key, value))
        parts = []
        for view in self.views:
            asked = call.turned(query[:, view.asking].flatten(1, 2), view.asking_times)
            told = call.turned(key[:, view.seen].flatten(1, 2), view.seen_times)
            parts.append(attention(asked, told, value[:, view.seen].flatten(1, 2)))
        return torch.cat(parts, 1)


def _frames(layout: Layout, chunks: list[int]) -> list[int]:
    return [chunk * layout.chunk + frame for chunk in chunks for frame in range(layout.chunk)]
