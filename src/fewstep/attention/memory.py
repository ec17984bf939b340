"""A causal student's memory: keys and values of the chunks it has finished.

Keys are kept as they are before rotation and turned when they are read, so that one store serves every policy of
positions. A finished chunk is read once more at t = 0 and what that pass makes of it is kept ("clean" cache); noisy
passes only read. Nothing that is kept is ever written to again and nothing kept has a gradient: a later loss cannot
reach into earlier chunks, and a forward that is computed again sees what it saw (card self_forcing.md, 6.7 and 6.8).

Bounded by sink and window, memory and the cost of a chunk are constant once the window is full.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.attention.causal import Call, CausalAttention, KeysAndValues, attention
from fewstep.attention.layout import Layout
from fewstep.core.guidance import Denoiser
from fewstep.core.tensors import CONTROLS, Condition, at_least_float32


@dataclass(frozen=True)
class Chunk:
    """What is kept of a finished chunk."""

    number: int
    layers: tuple[KeysAndValues, ...]


class CachedMemory:
    """Memory of one video per row of a batch, for a transformer.

    Args:
        student: the network as a denoiser.
        seat: the network's attention.
        layout: what is remembered.
        condition: what the student is told, until `tell` says otherwise; each chunk is told of `CONTROLS` its own
            frames, counted from the first chunk, and where they have come to an end nothing.
    """

    def __init__(self, student: Denoiser, seat: CausalAttention, layout: Layout, condition: Condition) -> None:
        self._student, self._seat, self.layout = student, seat, layout
        self.chunks: tuple[Chunk, ...] = ()
        """Those remembered, in order; the first is the blended sink where there is one."""
        self.finished = 0
        """Chunks that have been finished so far, forgotten ones included."""
        self._steered: Tensor | None = None
        self.tell(condition)

    def tell(self, condition: Condition) -> None:
        """Another prompt from now on: what is remembered of the video stays, of the old prompt nothing does."""
        self._condition = condition
        self._text: dict[int, KeysAndValues] = {}
        self._context = self._fresh()

    def steer(self, controls: Tensor | None) -> None:
        """The next chunk alone is told these `CONTROLS` (B, K, n, h, w), not the condition's own; None: those."""
        self._steered = controls

    def denoise(self, x: Tensor, t: Tensor) -> Tensor:
        """The next chunk (B, C, n, ...) at `t` (B,) -> denoised; one forward of n frames."""
        with self._seat.within(self._context):
            return self._student(x, t, self._told())

    @torch.no_grad()
    def remember(self, x: Tensor) -> None:
        """The next chunk is finished and is this; one forward of n frames at t = 0."""
        made = self._context.made = {}
        self.denoise(x, torch.zeros(len(x), dtype=at_least_float32(x.dtype), device=x.device))
        layers = tuple(made[layer] for layer in sorted(made))
        self.finished += 1
        self._steered = None
        known = [*self.chunks, Chunk(self.finished - 1, layers)]
        self.chunks = tuple(chunk for chunk in known if self.layout.keeps(chunk.number, self.finished))
        if self.layout.sink_decay < 1:
            for chunk in known:
                if not self.layout.keeps(chunk.number, self.finished):
                    self.chunks = (self._blended(self.chunks[0], chunk), *self.chunks[1:])
        self._context = self._fresh()

    def snapshot(self) -> CachedMemory:
        """This memory as it is now; shares what is kept, and is not changed by what happens to this one."""
        twin = copy.copy(self)
        twin._context = twin._fresh()
        return twin

    @property
    def awaits(self) -> bool:
        """Whether `remember` looks at the next chunk once it is finished; if not, its calls have left all there is."""
        return True

    @property
    def seen_frames(self) -> int:
        """Frames that each token of the next chunk attends to, its own chunk included."""
        return (len(self.chunks) + 1) * self.layout.chunk

    @property
    def remembered(self) -> tuple[Chunk, ...]:
        """All that is kept of finished chunks."""
        return self.chunks

    @property
    def bytes(self) -> int:
        """Memory of the keys and values of finished chunks."""
        return sum(part.nbytes for chunk in self.remembered for layer in chunk.layers for part in layer)

    def _told(self) -> Condition:
        """What the next chunk is told."""
        if self._steered is None:
            return self.layout.told(self._condition, self.finished)
        return self._condition | {CONTROLS: self._steered}

    def _blended(self, sink: Chunk, leaving: Chunk) -> Chunk:
        """Eq. 4 of Reward Forcing, token by token, in float32: bfloat16 loses steps of a thousandth."""
        decay = self.layout.sink_decay

        def blend(kept: Tensor, gone: Tensor) -> Tensor:
            exact = at_least_float32(kept.dtype)
            return decay * kept.to(exact) + (1 - decay) * gone.to(exact)

        pairs = zip(sink.layers, leaving.layers, strict=True)
        return Chunk(sink.number, tuple((blend(a, c), blend(b, d)) for (a, b), (c, d) in pairs))

    def _fresh(self) -> Reading:
        return Reading(self.chunks, self.layout.times(self.finished, [c.number for c in self.chunks]), self._text)


class Reading:
    """The context of calls of one chunk. Past keys are turned once for all of them where nothing is trained.

    Args:
        chunks: what the calls see beside their own chunk.
        times: rotary times of the frames of those, and of the chunk's own.
        text: see `Context`.
    """

    def __init__(
        self,
        chunks: tuple[Chunk, ...],
        times: tuple[tuple[int, ...], tuple[int, ...]],
        text: dict[int, KeysAndValues] | None,
    ) -> None:
        self._chunks, self.text = chunks, text
        self._past_times, self._times = times
        self._read: dict[int, KeysAndValues] = {}
        self.made: dict[int, KeysAndValues] | None = None
        """Where not None: filled with what the call makes of its own tokens, layer by layer."""

    def attend(self, call: Call, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Over the remembered chunks, then the call's own."""
        if self.made is not None:
            self.made[layer] = key.detach(), value.detach()
        query, key = call.turned(query, self._times), call.turned(key, self._times)
        if self._chunks:
            past_key, past_value = self._past(call, layer, key, value)
            key, value = torch.cat([past_key, key], 1), torch.cat([past_value, value], 1)
        return attention(query, key, value)

    def _past(self, call: Call, layer: int, key: Tensor, value: Tensor) -> KeysAndValues:
        if layer in self._read:
            return self._read[layer]
        keys, values = zip(*(chunk.layers[layer] for chunk in self._chunks), strict=True)
        past_key = call.turned(torch.cat([part.to(key.dtype) for part in keys], 1), self._past_times)
        past = past_key, torch.cat([part.to(value.dtype) for part in values], 1)
        if not torch.is_grad_enabled():
            self._read[layer] = past
        return past
