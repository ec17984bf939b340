"""Sides of a teacher's samples that can be chosen: height and width in pixels, and frames of a video."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from fewstep.core.streams import Streams
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


def parse_size(text: str) -> dict[str, int]:
    """Sides of WIDTHxHEIGHT in pixels, or of WIDTHxHEIGHTxFRAMES.

    Raises:
        FewstepError: it is not of that form.
    """
    numbers = text.lower().split("x")
    if len(numbers) not in (2, 3) or not all(number.isdecimal() for number in numbers):
        raise FewstepError(
            f"found the size {text!r}, expected WIDTHxHEIGHT in pixels, or WIDTHxHEIGHTxFRAMES, fix: such as 832x1216"
        )
    return dict(zip(("width", "height", "num_frames"), map(int, numbers), strict=False))


class Sized(Protocol):
    """What a list of sizes needs of a backbone."""

    told_size: dict[str, int]

    def set_size(self, told: Mapping[str, int]) -> None: ...

    @property
    def latent_shape(self) -> tuple[int, ...]: ...


class SizeList:
    """Sizes to train on: all samples of an iteration have one, drawn from the seed and the iteration alone.

    So it is the same in every process and after a resume. A size that is listed twice is drawn twice as often.

    Args:
        backbone: is set to each iteration's size, and to the first of the list otherwise.
        sizes: as `parse_size` reads them.
        seed: of the run.

    Raises:
        FewstepError: none, or one that the family cannot make; the backbone's size is then as it was.
    """

    def __init__(self, backbone: Sized, sizes: Sequence[str], seed: int) -> None:
        self.texts, self._backbone, self._streams = tuple(sizes), backbone, Streams(seed)
        before = backbone.told_size
        self._sizes = [parse_size(text) for text in sizes]
        if not self._sizes or len({tuple(size) for size in self._sizes}) > 1:
            raise FewstepError(
                f"found the sizes {list(sizes)}, expected one or more that all name the same sides, fix: such as "
                "1024x1024 832x1216"
            )
        try:
            for size in reversed(self._sizes):
                backbone.set_size(size)
        except FewstepError:
            backbone.told_size = before
            raise

    def __call__(self, iteration: int) -> tuple[int, ...]:
        """Shape of the latents of an iteration (1, 2, ...), which the backbone makes from now on."""
        drawn = int(self._streams.at(iteration, [0]).common("size") * len(self._sizes))
        self._backbone.set_size(self._sizes[drawn])
        return self._backbone.latent_shape

    def first(self) -> None:
        """Back to the size that samples and the saved student have."""
        self._backbone.set_size(self._sizes[0])

    def at_first(self, hook: Callable[..., Any] | None) -> Callable[..., Any] | None:
        """`hook`, called at the first size."""
        if hook is None:
            return None

        def called(*arguments: Any) -> Any:
            self.first()
            return hook(*arguments)

        return called
