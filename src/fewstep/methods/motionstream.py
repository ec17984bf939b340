"""MotionStream: streams that follow tracks while they are made (Shin et al., arXiv 2511.01266).

Self Forcing's DMD with three things of its own. What frames are told (tracks, a drive) is part of the condition, chunk
by chunk. The real score is guided by text and motion at once (`motion_guidance`; card motionstream.md, eq. 2 and 4),
so that the student needs one answer where its teacher needs three. And the memory is in training what it is in use: a
sink of one chunk, a window of one (c3s1w1), positions by slot, so that a stream never leaves what it was trained for.

Where the paper is silent: the student's three times are Self Forcing's shifted grid; the law of tau is uniform before
the shift, as there. The paper's teacher also has a first frame; ours has text.

Needs a teacher that reads controls, prompts that come with them (`fewstep.data.film_clips.FilmClips`), a causal
student, best one that `causal-init` prepared with both guidances, and a critic. Costs one forward of the teacher more
than Self Forcing.

Signs of failure: `motion_gap` near 0 (the teacher does not read its tracks: nothing to distil); else Self Forcing's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fewstep.methods.self_forcing import SelfForcing, SelfForcingOptions


@dataclass(frozen=True)
class MotionStreamOptions(SelfForcingOptions):
    """Settings of MotionStream: those of Self Forcing, with its own defaults."""

    steps: int = 3
    """Network calls K of the student, 1 or more (published: 3)."""
    sink: int = 1
    """First chunks that are never forgotten, 0 or more (published: 1)."""
    window: int | None = 1
    """Finished chunks before the current one that are remembered, beside the sink (published: 1)."""
    guidance_scale: float = 3.0
    """Guidance of text, w_t, 0 or more (published: 3)."""
    motion_guidance: float = 1.5
    """Guidance of motion, w_m, 0 or more, 0 = none (published: 1.5)."""

    def build(self) -> MotionStream:
        """The method with these settings."""
        return MotionStream(self)


class MotionStream(SelfForcing):
    """Self Forcing of streams that are steered; see the module and `MotionStreamOptions`."""

    name: ClassVar[str] = "motionstream"
    title: ClassVar[str] = "MotionStream"
    paper: ClassVar[str] = "arXiv 2511.01266"


def motionstream() -> MotionStreamOptions:
    """DMD of streams that follow tracks: 3 steps, c3s1w1, guidance of text 3 and of motion 1.5 (published)."""
    return MotionStreamOptions()
