"""Sides of a teacher's samples that can be chosen: height and width in pixels, and frames of a video."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fewstep.errors import FewstepError


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


def check_size(sides: Mapping[str, Side], told: Mapping[str, int], family: str) -> None:
    """Raises FewstepError for a `told` side that the `family` does not have among `sides`, or cannot make."""
    for name, value in told.items():
        side = sides.get(name)
        if side is None:
            raise FewstepError(
                f"found {name} = {value} for {family}, expected "
                f"{' or '.join(sides) or 'no size, as its samples have one size'}, fix: leave {name} out"
            )
        if value < 1 or value % side.multiple != side.plus:
            more = f" and {side.plus} more" if side.plus else ""
            near = max(value // side.multiple, 1) * side.multiple + side.plus
            raise FewstepError(
                f"found {name} = {value}, expected a multiple of {side.multiple}{more}, fix: {name} = {near}"
            )
