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

Positions = Literal["slot", "absolute"]

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
    `absolute` number in the video. The same as long as sink and window are neighbours."""
    sink_decay: float = 1.0
    """Share of the sink that stays when a chunk leaves the window, in [0, 1]; the rest is that chunk's keys and values
    (EMA-Sink, arXiv 2512.04678, eq. 4; published 0.99 and 0.999). 1 leaves the sink as it is."""

    def validate(self) -> None:
        """Refuses values out of range and settings that contradict each other.

        Raises:
            FewstepError: with what was found, what was expected and the likely fix.
        """
        window = 1 if self.window is None else self.window
        for name, value, low in (("chunk", self.chunk, 1), ("sink", self.sink, 0), ("window", window, 1)):
            if value < low:
                raise FewstepError(f"found {name} = {value}, expected {low} or more, fix: chunk 3, sink 1, window 1")
        if self.positions not in get_args(Positions):
            raise FewstepError(
                f"found positions = {self.positions!r}, expected one of {get_args(Positions)}, fix: choose one of them"
            )
        if not 0 <= self.sink_decay <= 1:
            raise FewstepError(f"found sink_decay = {self.sink_decay}, expected a share in [0, 1], fix: use 0.99")
        if self.sink_decay < 1 and (self.sink != 1 or self.window is None):
            raise FewstepError(
                f"found sink_decay {self.sink_decay} with sink {self.sink} and window {self.window}, expected one sink "
                "chunk and a window that chunks can leave, since each is blended into the sink token by token, "
                "fix: set sink to 1 and window to 1 or more, or sink_decay to 1"
            )

    def validate_unread(self) -> None:
        """Refuses, of a student that is to be trained, what nothing would read.

        Raises:
            FewstepError: with what would read it.
        """
        if self.window is None:
            refuse_unread(self, ["sink"], "a window that chunks can leave")
        if self.window is None or not self.sink:
            refuse_unread(self, ["positions"], "a sink and a window, between which positions can differ,")

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

    def times(self, chunk: int, seen: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Rotary times of the frames of the `seen` chunks, and of those of `chunk` itself."""
        numbers = [*seen, chunk] if self.positions == "absolute" else range(len(seen) + 1)
        of_chunks = [tuple(range(number * self.chunk, (number + 1) * self.chunk)) for number in numbers]
        return tuple(time for part in of_chunks[:-1] for time in part), of_chunks[-1]

    def told(self, condition: Condition, chunk: int) -> Condition:
        """`condition` as `chunk` is told it: of what is told frame by frame its own frames, nothing after their end."""
        if CONTROLS not in condition:
            return condition
        frames = condition[CONTROLS][:, :, chunk * self.chunk : (chunk + 1) * self.chunk]
        missing = self.chunk - frames.shape[FRAMES]
        if missing:
            frames = torch.cat([frames, frames.new_zeros(*frames.shape[:FRAMES], missing, *frames.shape[3:])], FRAMES)
        return condition | {CONTROLS: frames}
