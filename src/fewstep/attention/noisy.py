"""A memory without a clean pass: chunks see what the calls of earlier chunks at the same time made (Live Avatar).

Every call of a chunk leaves its keys and values in a window of its own, which later chunks' calls at that time read
("timestep forcing", arXiv 2512.04677, eq. 1 and algorithm 3). Noise in the history is that of the chunks themselves; it
lets motion through and keeps small faults from being copied. Call j of a chunk then depends on calls j of earlier
chunks and on the chunk's own earlier calls only, so that calls can be spread over processes (`streaming.pipeline`).

Identity comes from the sink, which is clean: the first chunk, read once at t = 0 when it is finished, in the place of a
given reference where there was one (adaptive attention sink).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.attention.causal import CausalAttention, KeysAndValues
from fewstep.attention.layout import FRAMES, Layout
from fewstep.attention.memory import CachedMemory, Chunk, Reading
from fewstep.core.guidance import Denoiser
from fewstep.core.tensors import CONTROLS, Condition, at_least_float32
from fewstep.errors import FewstepError


class NoisyMemory(CachedMemory):
    """Memory of one video per row of a batch, by the times of calls; see the module and `CachedMemory`.

    All rows of a call have one time. A chunk whose calls are at other times than those of the chunk before sees nothing
    of it but the sink, and what was kept for times that a chunk has not is forgotten.

    Args:
        student: the network as a denoiser.
        seat: the network's attention.
        layout: what is remembered.
        condition: what the student is told, until `tell` says otherwise.
    """

    def __init__(self, student: Denoiser, seat: CausalAttention, layout: Layout, condition: Condition) -> None:
        self.windows: dict[float, tuple[Chunk, ...]] = {}
        """Finished chunks that calls at a time see, the sink apart; replaced, never changed. With kept `last`: those
        that all calls see, under -1."""
        self.sink: Chunk | None = None
        self._sink_frames, self._adapts = 0, bool(layout.sink)
        self._made: dict[float, tuple[KeysAndValues, ...]] = {}
        super().__init__(student, seat, layout, condition)

    def refer(self, x: Tensor, *, keep: bool = False) -> None:
        """A given reference (B, C, f, ...), clean latents of f frames, is the sink; one forward of f frames at t = 0.

        Its frames are told the prompt and nothing else.

        Args:
            x: such as the latent of a picture.
            keep: for good; otherwise until the first chunk is finished, which then takes its place.

        Raises:
            FewstepError: a layout without a sink, or a video that has begun.
        """
        if not self.layout.sink or self.finished:
            raise FewstepError(
                f"found a reference for a memory of {self.layout.sink} sink chunks after {self.finished} chunks, "
                "expected a sink and a video that has not begun, fix: set sink to 1 and give the reference first"
            )
        self._adapts = not keep
        self._read_sink(x, {name: value for name, value in self._condition.items() if name != CONTROLS})

    def denoise(self, x: Tensor, t: Tensor) -> Tensor:
        """The next chunk (B, C, n, ...) at `t` (B,), one time -> denoised; one forward of n frames."""
        at = -1.0 if self.layout.kept == "last" else float(t[0])
        window = self.windows.get(at, ())
        numbers = [chunk.number for chunk in window]
        times = self.layout.times_beside(self._sink_frames, self.finished, numbers)
        self._context = Reading((*self._sinks, *window), times, self._text)
        denoised, layers = self._called(x, t, self._told())
        self._made = {**self._made, at: layers}
        return denoised

    @torch.no_grad()
    def remember(self, x: Tensor) -> None:
        """The next chunk is finished; only where `awaits` is it looked at, at the cost of one forward of n frames."""
        if not self._made:
            raise FewstepError(
                "found a finished chunk that was never denoised within this memory, expected calls of it, since they "
                "are what a noisy cache keeps, fix: call denoise first, or set kept to 'clean'"
            )
        if self.awaits:
            self._read_sink(x, self._told())
        windows, most = {}, self.layout.window
        for at, layers in self._made.items():
            known = (*self.windows.get(at, ()), Chunk(self.finished, layers))
            windows[at] = known if most is None else known[-most:]
        self.windows, self._made, self._steered = windows, {}, None
        self.finished += 1

    @property
    def awaits(self) -> bool:
        """True of a first chunk that becomes the sink."""
        return self._adapts and self.finished == 0

    @property
    def seen_frames(self) -> int:
        longest = max((len(window) for window in self.windows.values()), default=0)
        return self._sink_frames + (longest + 1) * self.layout.chunk

    @property
    def remembered(self) -> tuple[Chunk, ...]:
        return (*self._sinks, *(chunk for window in self.windows.values() for chunk in window))

    @property
    def _sinks(self) -> tuple[Chunk, ...]:
        return () if self.sink is None else (self.sink,)

    @torch.no_grad()
    def _read_sink(self, x: Tensor, told: Condition) -> None:
        """The sink sees itself alone."""
        self._sink_frames = x.shape[FRAMES]
        self._context = Reading((), ((), tuple(range(self._sink_frames))), self._text)
        clean = torch.zeros(len(x), dtype=at_least_float32(x.dtype), device=x.device)
        self.sink = Chunk(0, self._called(x, clean, told)[1])

    def _called(self, x: Tensor, t: Tensor, told: Condition) -> tuple[Tensor, tuple[KeysAndValues, ...]]:
        """A call in the present context, and what it made of its own tokens."""
        made = self._context.made = {}
        with self._seat.within(self._context):
            denoised = self._student(x, t, told)
        return denoised, tuple(made[layer] for layer in sorted(made))
