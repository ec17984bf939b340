"""A student as a server needs it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from fewstep.evaluation.clips import has_films
from fewstep.models.student import Student


@dataclass(frozen=True)
class Served:
    """What the application asks of a student."""

    name: str
    steps: tuple[int, ...]
    """Numbers of network calls that can be asked."""
    width: int
    height: int
    batch: int
    """Pictures that fit one batch."""
    draw: Callable[[Sequence[str], Sequence[int], int], Sequence[Tensor]]
    """draw(prompts, seeds, steps) -> uint8 pictures (3, H, W) or videos (F, 3, H, W) on the CPU, whatever the batch."""
    frames: int = 0
    """Of a video; 0: it draws pictures."""
    fps: int = 16
    """Frames a second unless a request says otherwise."""

    @property
    def size(self) -> str:
        return f"{self.width}x{self.height}"

    @property
    def forms(self) -> tuple[str, ...]:
        """Formats that can be asked; the first is the default."""
        if not self.frames:
            return ("png", "jpeg", "webp")
        return ("mp4", "webp", "gif") if has_films() else ("webp", "gif")


def served(student: Student, name: str) -> Served:
    """`student` as a server shows it, after one sample drawn, which warms up and shows its size."""

    def draw(prompts: Sequence[str], seeds: Sequence[int], steps: int) -> Sequence[Tensor]:
        return list(student.sample(prompts, seeds, steps, batch=len(prompts)))

    steps = tuple(sorted(student.grids))
    *frames, _, height, width = draw(["a picture"], [0], steps[0])[0].shape
    backbone = student.backbone
    return Served(name, steps, width, height, backbone.sample_batch, draw, sum(frames), backbone.frame_rate)
