"""A student as a server needs it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from fewstep.errors import FewstepError
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
    """draw(prompts, seeds, steps) -> uint8 pictures (3, H, W) on the CPU, whatever the batch."""

    @property
    def size(self) -> str:
        return f"{self.width}x{self.height}"


def served(student: Student, name: str) -> Served:
    """`student` as a server shows it, after one picture drawn, which warms up and shows its size.

    Raises:
        FewstepError: it draws videos.
    """
    if len(student.backbone.latent_shape) == 4:
        raise FewstepError(
            "found a student of videos, expected one of pictures, which is all that the images API knows, fix: draw "
            "videos with `fewstep sample`"
        )

    def draw(prompts: Sequence[str], seeds: Sequence[int], steps: int) -> Sequence[Tensor]:
        return list(student.sample(prompts, seeds, steps, batch=len(prompts)))

    steps = tuple(sorted(student.grids))
    _, height, width = draw(["a picture"], [0], steps[0])[0].shape
    return Served(name, steps, width, height, student.backbone.sample_batch, draw)
