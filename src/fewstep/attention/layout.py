"""What a causal student remembers of a video that it makes chunk by chunk, and where that lies in time.

Chunks are counted from 0. Chunk i sees itself, the first `sink` chunks and the `window` chunks before it: cXsYwZ of
MotionStream (arXiv 2511.01266, eq. 3), and Self Forcing's rolling cache for sink 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from fewstep.core.tensors import CONTROLS, Condition
from fewstep.errors import FewstepError
from fewstep.unread import refuse_unread

Positions = Literal["slot", "absolute", "rolling"]
Kept = Literal["clean", "noisy", "last"]

FRAMES = 2
"""The axis of frames in videos (B, C, F, ...)."""


@dataclass(frozen=True)
class Layout:
    """The chunks of a causal student and its memory of them."""

    chunk: int = 3
    """Latent frames that are made together, 1 or more: 3 (published) or 1, frame by frame."""
    sink: int = 0
    """First chunks that are never forgotten, 0 or more (MotionStream, Reward Forcing: 1)."""
    window: int | None = None
    """Finished chunks before the current one that are remembered, 1 or more, beside the sink. None: all of them, which
    ends a stream where training did."""
    positions: Positions = "slot"
    """Rotary time of a frame: its `slot` in the memory, so that no stream ever leaves the trained range, or its own
    `absolute` number in the video. The same as long as sink and window are neighbours. `rolling`: slots, and the sink
    lies ahead of the current chunk, at a distance that ends up fixed (Live Avatar, arXiv 2512.04677)."""
    sink_decay: float = 1.0
    """Share of the sink that stays when a chunk leaves the window, in [0, 1]; the rest is that chunk's keys and values
    (EMA-Sink, arXiv 2512.04678, eq. 4; published 0.99 and 0.999). 1 leaves the sink as it is."""
    kept: Kept = "clean"
    """What is kept of a finished chunk: keys and values of one more pass at t = 0 (`clean`, Self Forcing), or those of
    each of its own calls, for later chunks' calls at the same time alone (`noisy`, Live Avatar's timestep forcing), or
    those of its `last` call for all calls (Live Avatar's algorithm 1 as written), both without such a pass. Their sink
    is the first chunk read clean, once, and is seen beside the window."""
    sink_ahead: int = 12
    """With `rolling` positions: latent frames from the current chunk's first to the sink's first, `chunk` or more
    (released: drawn from 4 to 30 in every call; 12 is the least that training on its 21 latent frames sees)."""
    sink_start: int = 30
    """With `rolling` positions: latent frames from the stream's first to the sink's for as long as that is farther
    than `sink_ahead` from the current chunk, 0 or more (released: 30); 0: always `sink_ahead`."""

    def validate(self) -> None:
        """Refuses values out of range and settings that contradict each other.

        Raises:
            FewstepError: with what was found, what was expected and the likely fix.
        """
        window = 1 if self.window is None else self.window
        for name, value, low in (("chunk", self.chunk, 1), ("sink", self.sink, 0), ("window", window, 1)):
            if value < low:
                raise FewstepError(f"found {name} = {value}, expected {low} or more, fix: chunk 3, sink 1, window 1")
        for name, choice, choices in (
            ("positions", self.positions, get_args(Positions)),
            ("kept", self.kept, get_args(Kept)),
        ):
            if choice not in choices:
                raise FewstepError(f"found {name} = {choice!r}, expected one of {choices}, fix: choose one of them")
        for name, value, low in (("sink_ahead", self.sink_ahead, self.chunk), ("sink_start", self.sink_start, 0)):
            if self.positions == "rolling" and value < low:
                raise FewstepError(
                    f"found {name} = {value}, expected {low} latent frames or more, so that the sink lies behind "
                    "nothing that is being made, fix: sink_ahead 12, sink_start 30"
                )
        if not 0 <= self.sink_decay <= 1:
            raise FewstepError(f"found sink_decay = {self.sink_decay}, expected a share in [0, 1], fix: use 0.99")
        if self.sink_decay < 1 and (self.sink != 1 or self.window is None):
            raise FewstepError(
                f"found sink_decay {self.sink_decay} with sink {self.sink} and window {self.window}, expected one sink "
                "chunk and a window that chunks can leave, since each is blended into the sink token by token, "
                "fix: set sink to 1 and window to 1 or more, or sink_decay to 1"
            )
        if self.kept != "clean" and (self.sink > 1 or self.sink_decay < 1):
            raise FewstepError(
                f"found kept {self.kept!r} with sink {self.sink} and sink_decay {self.sink_decay}, expected a sink "
                "of 0 or 1 chunks, read once, fix: set sink and sink_decay to 1, or kept to 'clean'"
            )

    def validate_unread(self) -> None:
        """Refuses, of a student that is to be trained, what nothing would read.

        Raises:
            FewstepError: with what would read it.
        """
        leaves = self.window is not None or self.kept != "clean"  # a noisy cache sees its sink beside all chunks
        if not leaves:
            refuse_unread(self, ["sink"], "a window that chunks can leave")
        if not leaves or not self.sink:
            refuse_unread(self, ["positions"], "a sink and a window, between which positions can differ,")
        if self.positions != "rolling":
            refuse_unread(self, ["sink_ahead", "sink_start"], "positions 'rolling'")

    def chunks(self, frames: int) -> int:
        """How many chunks `frames` are.

        Raises:
            FewstepError: not a whole number of them.
        """
        if frames < 1 or frames % self.chunk:
            raise FewstepError(
                f"found {frames} latent frames in chunks of {self.chunk}, expected a multiple of the chunk, "
                "fix: change num_frames (Wan: 1 more than 4 times the latent frames less 1) or chunk"
            )
        return frames // self.chunk

    def keeps(self, chunk: int, finished: int) -> bool:
        """Whether finished `chunk` is still remembered once `finished` of them are."""
        return chunk < self.sink or self.window is None or chunk >= finished - self.window

    def seen(self, chunk: int) -> list[int]:
        """The finished chunks that `chunk` sees, in order."""
        return [other for other in range(chunk) if self.keeps(other, chunk)]

    def seen_by_calls(self, chunk: int) -> int:
        """How many chunks the calls of `chunk` see beside their own; a noisy cache's sink stands beside the window."""
        if self.kept == "clean":
            return len(self.seen(chunk))
        return min(chunk, self.sink) + (chunk if self.window is None else min(chunk, self.window))

    def times(self, chunk: int, seen: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Rotary times of the frames of the `seen` chunks, and of those of `chunk` itself."""
        sinks = sum(other < self.sink for other in seen)
        return self.times_beside(sinks * self.chunk, chunk, seen[sinks:])

    def times_beside(
        self, sink_frames: int, chunk: int, seen: Sequence[int]
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Rotary times of the frames of a sink, then of the other `seen` chunks, and of those of `chunk` itself."""
        n, before = self.chunk, 0 if self.positions == "rolling" else sink_frames
        if self.positions == "absolute":
            starts = [number * n for number in [*seen, chunk]]
        else:
            starts = [before + slot * n for slot in range(len(seen) + 1)]
        sink = 0
        if self.positions == "rolling":  # eq. 2 of Live Avatar, whose current chunk begins at chunk * n
            sink = starts[-1] + max(self.sink_ahead, self.sink_start - chunk * n)
        past = [time for start in starts[:-1] for time in range(start, start + n)]
        return (*range(sink, sink + sink_frames), *past), tuple(range(starts[-1], starts[-1] + n))

    def told(self, condition: Condition, chunk: int) -> Condition:
        """`condition` as `chunk` is told it: of what is told frame by frame its own frames, nothing after their end."""
        if CONTROLS not in condition:
            return condition
        frames = condition[CONTROLS][:, :, chunk * self.chunk : (chunk + 1) * self.chunk]
        missing = self.chunk - frames.shape[FRAMES]
        if missing:
            frames = torch.cat([frames, frames.new_zeros(*frames.shape[:FRAMES], missing, *frames.shape[3:])], FRAMES)
        return condition | {CONTROLS: frames}
