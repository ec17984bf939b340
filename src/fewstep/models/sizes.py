"""Families whose samples can be chosen side by side: height and width in pixels, and frames of a video."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fewstep.errors import FewstepError
from fewstep.models.backbone import Backbone


@dataclass(frozen=True)
class Side:
    """What a side of a sample may be: `plus` more than any multiple of `multiple`, in pixels or frames."""

    usual: int
    """What the pipeline makes unless told otherwise."""
    multiple: int
    plus: int = 0


def frames_side(usual: int, compression: int) -> Side:
    """Frames of a video whose first frame has a latent of its own and every `compression` further ones share one."""
    return Side(usual, compression, 1 if compression > 1 else 0)


class SizedBackbone(Backbone):
    """An adapter of a family with `sides`; what is not chosen is the pipeline's own."""

    def __init__(self, pipeline: Any, source: str) -> None:
        super().__init__(pipeline, source)
        self._asked: dict[str, int] = {}

    @property
    @abstractmethod
    def sides(self) -> dict[str, Side]:
        """The sides that can be chosen: "height", "width", and "num_frames" for videos."""

    @property
    def size(self) -> dict[str, int]:
        """All sides of a decoded sample, as arguments of the pipeline's call."""
        return {name: side.usual for name, side in self.sides.items()} | self._asked

    @property
    def asked_size(self) -> dict[str, int] | None:
        return dict(self._asked) or None

    def set_size(self, size: Mapping[str, int]) -> None:
        for name, value in size.items():
            side = self.sides.get(name)
            if side is None:
                raise FewstepError(
                    f"found {name} = {value} for {type(self).__name__}, expected only {' and '.join(self.sides)}, "
                    f"fix: leave {name} out"
                )
            if value < 1 or value % side.multiple != side.plus:
                more = f" and {side.plus} more" if side.plus else ""
                near = max(value // side.multiple, 1) * side.multiple + side.plus
                raise FewstepError(
                    f"found {name} = {value}, expected a multiple of {side.multiple}{more}, fix: {name} = {near}"
                )
        self._asked = {**self._asked, **size}

    @property
    def student_call(self) -> dict[str, Any]:
        return {"guidance_scale": 1, **self._asked}
