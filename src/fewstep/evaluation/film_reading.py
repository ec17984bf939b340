"""What a film shows, frame by frame, without a network: which thing, where, how large, by matching its drawings.

The things of films are known drawings, so a frame is explained by one of them at a place and a size on a plain
background: first all of them at all places by correlation, then place and size of the best one by least squares
(Gauss-Newton). On rendered films the thing is right in every frame and centres are exact to a few hundredths of a pixel
(`tests/evaluation/test_films.py`); what remains is the background's texture under soft edges.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from fewstep.data.film_paths import SIDE
from fewstep.data.films import FILM_THINGS, LOUD, QUIET, draw_things
from fewstep.errors import FewstepError

_WINDOW, _REACH = 18, 3  # side of a template, and how far it may stick out of the frame, in pixels
_SIDES = (QUIET, (QUIET + LOUD) / 2, LOUD)
_PART = 256  # frames read at a time
_SEEN = 0.02  # opacity above which a pixel counts as covered


@dataclass(frozen=True)
class Reading:
    """What films (B, F, 3, 32, 32) show."""

    things: Tensor
    """(B, F) indices into `FILM_THINGS`."""
    centres: Tensor
    """(B, F, 2) x, y in pixels, as in tracks."""
    sides: Tensor
    """(B, F) side of the thing in pixels."""
    fit: Tensor
    """(B, F) share of what differs from the background that the drawing explains; 1 is all, blobs have 0.5 and less."""
    colours: Tensor
    """(B, F, 3) of the background: the median in levels of 0 to 255."""
    opacity: Tensor
    """(B, F, 32, 32) in [0, 1] of the thing as it was found."""

    @property
    def covered(self) -> Tensor:
        """(B, F, 32, 32) bool: pixels that the thing covers, if only a little."""
        return self.opacity > _SEEN


@torch.no_grad()
def read_films(films: Tensor) -> Reading:
    """Reads uint8 films (B, F, 3, 32, 32); about 2 ms a frame on one core.

    Raises:
        FewstepError: another shape or dtype.
    """
    if films.dtype != torch.uint8 or films.ndim != 5 or films.shape[2:] != (3, SIDE, SIDE):
        raise FewstepError(
            f"found films of shape {tuple(films.shape)} and {films.dtype}, expected uint8 (B, F, 3, {SIDE}, {SIDE}), "
            "fix: read what `sample` returns of the embedded video teacher or its students"
        )
    parts = [_read(part.float() / 127.5 - 1) for part in films.flatten(0, 1).split(_PART)]
    things, centres, sides, fit, colours, opacity = (torch.cat(values) for values in zip(*parts, strict=True))
    shape = films.shape[:2]
    return Reading(
        things.view(shape), centres.view(*shape, 2), sides.view(shape), fit.view(shape),
        (colours.view(*shape, 3) + 1) * 127.5, opacity.view(*shape, SIDE, SIDE),
    )  # fmt: skip


def _read(frames: Tensor) -> tuple[Tensor, ...]:
    """Frames (N, 3, 32, 32) in [-1, 1] -> things, centres, sides, fits, colours, opacities."""
    colours = frames.flatten(2).median(2).values
    above = frames - colours[:, :, None, None]
    things, state = _coarse(above, colours)
    for _ in range(5):
        state = _improved(state, things, above, colours)
    drawn = draw_things(things, state[:, :2], state[:, 2])
    left = (above - _above(drawn, colours)).square().sum((1, 2, 3))
    fit = 1 - left / above.square().sum((1, 2, 3)).clamp(min=1e-6)
    return things, state[:, :2], state[:, 2], fit, colours, drawn[:, 3]


def _above(drawn: Tensor, colours: Tensor) -> Tensor:
    """What a drawn thing adds to a plain background of `colours` (N, 3)."""
    return drawn[:, :3] - drawn[:, 3:] * colours[:, :, None, None]


@cache
def _templates() -> tuple[Tensor, Tensor]:
    """All things at all `_SIDES` (60, 4, 18, 18), and the products of their channels summed over pixels (60, 4, 4)."""
    things = torch.arange(len(FILM_THINGS)).repeat_interleave(len(_SIDES))
    middle = torch.full((len(things), 2), SIDE / 2)
    drawn = draw_things(things, middle, torch.tensor(_SIDES).repeat(len(FILM_THINGS)))
    edge = (SIDE - _WINDOW) // 2
    drawn = drawn[:, :, edge : edge + _WINDOW, edge : edge + _WINDOW]
    return drawn, torch.einsum("kchw,kdhw->kcd", drawn, drawn)


def _coarse(above: Tensor, colours: Tensor) -> tuple[Tensor, Tensor]:
    """The thing (N,) and its x, y, side (N, 3), to a pixel, that leave the least squares unexplained."""
    templates, products = _templates()
    mixed = -(above * colours[:, :, None, None]).sum(1, keepdim=True)
    overlap = conv2d(torch.cat([above, mixed], 1), templates, padding=_REACH)  # (N, 60, 21, 21)
    own = products[:, [0, 1, 2], [0, 1, 2]].sum(1) - 2 * colours @ products[:, :3, 3].T
    own = own + colours.square().sum(1, keepdim=True) * products[:, 3, 3]  # squares of RGB less colour times opacity
    places = overlap.shape[-1]
    best = (2 * overlap - own[:, :, None, None]).flatten(1).argmax(1)
    kind, place = best // places**2, best % places**2
    first = _WINDOW / 2 - _REACH
    x, y = first + place % places, first + place // places
    side = torch.tensor(_SIDES)[kind % len(_SIDES)]
    return kind // len(_SIDES), torch.stack([x, y, side], 1)


def _improved(state: Tensor, things: Tensor, above: Tensor, colours: Tensor, nudge: float = 0.1) -> Tensor:
    """One step of Gauss-Newton for x, y, side (N, 3), of at most a pixel."""

    def drawn(shift: Tensor) -> Tensor:
        moved = state + shift
        return _above(draw_things(things, moved[:, :2], moved[:, 2]), colours).flatten(1)

    slopes = torch.stack([(drawn(e) - drawn(-e)) / (2 * nudge) for e in nudge * torch.eye(3)], 2)  # (N, pixels, 3)
    missing = above.flatten(1) - drawn(torch.zeros(3))
    normal = slopes.mT @ slopes
    damped = normal + 1e-3 * torch.diag_embed(torch.diagonal(normal, dim1=1, dim2=2)) + 1e-6 * torch.eye(3)
    step = torch.linalg.solve(damped, (slopes.mT @ missing[:, :, None]))[:, :, 0].clamp(-1, 1)
    low, high = torch.tensor([2.0, 2.0, QUIET - 3]), torch.tensor([SIDE - 2.0, SIDE - 2.0, LOUD + 3])
    return torch.minimum(torch.maximum(state + step, low), high)
