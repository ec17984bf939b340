"""Tracks and drives in JSON files: what the frames of a film are told on the command line (docs/video.md).

A track is a list of `[x, y]` in pixels, a drive a list of numbers in [0, 1], frame by frame; `null`, and the frames
after the end of the list, leave it open.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.core.files import load_json
from fewstep.errors import FewstepError

_FAR = 1e6
"""Pixels; farther away nothing is meant."""


def read_told(tracks: Path | None, drives: Path | None) -> dict[str, Tensor]:
    """`tracks` (1, F, 2) and `drives` (1, F) of the files that are named, float32, nan where nothing is said.

    F is that of the longer one.

    Raises:
        FewstepError: a file that cannot be read, or that holds something else.
    """
    told: dict[str, Tensor] = {}
    if tracks is not None:
        told["tracks"] = _read(tracks, _is_point, [math.nan] * 2, "[x, y] in pixels", "[[8, 16], [10, 16], null]")
    if drives is not None:
        told["drives"] = _read(drives, _is_share, math.nan, "numbers in [0, 1]", "[0, 0.5, null, 1]")
    longest = max((value.shape[1] for value in told.values()), default=0)
    return {name: lasting(value, longest) for name, value in told.items()}


def lasting(told: Tensor, frames: int) -> Tensor:
    """What is told (1, F, ...) with nothing said after its end, up to `frames`.

    Raises:
        FewstepError: it is longer.
    """
    missing = frames - told.shape[1]
    if missing < 0:
        raise FewstepError(
            f"found tracks or drives of {told.shape[1]} frames for films of {frames}, expected as many at most, fix: "
            "shorten the list, or a teacher's films are longer with --num-frames"
        )
    return torch.cat([told, told.new_full((1, missing, *told.shape[2:]), math.nan)], 1)


def _read(path: Path, fits: Callable[[Any], bool], nothing: Any, what: str, example: str) -> Tensor:
    try:
        found = load_json(path)
    except (OSError, ValueError) as error:
        raise FewstepError(
            f"found no JSON at {path} ({type(error).__name__}: {str(error)[:200]}), expected a list of {what}, one for "
            f"each frame, fix: such as {example}"
        ) from error
    rows = found if isinstance(found, list) else []
    odd = next((row for row in rows if row is not None and not fits(row)), None)
    if not rows or odd is not None:
        raise FewstepError(
            f"found {str(odd if rows else found)[:80]} in {path}, expected a list of {what}, one for each frame, "
            f"fix: such as {example}, null where nothing is said"
        )
    return torch.tensor([nothing if row is None else row for row in rows], dtype=torch.float32)[None]


def _is_number(value: Any, low: float, high: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def _is_point(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(_is_number(each, -_FAR, _FAR) for each in value)


def _is_share(value: Any) -> bool:
    return _is_number(value, 0, 1)
