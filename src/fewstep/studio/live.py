"""A film that is made while somebody steers it: chunk after chunk follows a pointer, no faster than they are shown.

It knows nothing of HTTP; `live_routes` does. One thread makes chunks (`Live.chunks`), others say where the pointer is.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fewstep.streaming.student import CausalStudent

_AHEAD = 1
"""Chunks that are made beyond those whose showing has begun: one is made while the one before it is seen."""


@dataclass(frozen=True)
class Told:
    """What the page says of itself."""

    x: float | None = None
    """Where the pointer is now, as a share of the frame's width; None: nowhere, the film moves as it likes."""
    y: float | None = None
    loud: float | None = None
    """The drive, in [0, 1]; None: nothing is said of it."""
    at: float = 0.0
    """When that was so, by the page's own clock."""
    shown: int = 0
    """Chunks whose showing has begun."""
    paused: bool = False


@dataclass(frozen=True)
class Made:
    """A chunk."""

    number: int
    frames: Tensor
    """uint8 (n, 3, H, W)."""
    seconds: float
    """That making and decoding it took."""
    at: float
    """`Told.at` of the pointer that it follows."""


class Live:
    """One film.

    Args:
        student: makes it; has to read tracks.
        prompt: what it shows.
        seed: of its noise.
        alone: entered while a chunk is made.

    Raises:
        FewstepError: a student that reads no tracks, or that remembers every chunk.
    """

    def __init__(self, student: CausalStudent, prompt: str, seed: int, alone: AbstractContextManager[object]) -> None:
        backbone, self._frames = student.backbone, student.layout.chunk
        backbone.controls(torch.full((1, self._frames, 2), math.nan), None)  # refuses one that reads none
        self._size = torch.tensor([backbone.size["width"], backbone.size["height"]], dtype=torch.float32)
        self._decode, self._alone = backbone.stream_decoder(), alone
        self._told, self._followed, self._stopped = Told(), Told(), False
        self._changed = threading.Condition()
        self._stream = student.stream(prompt, seed, tracks=self._tracks(), drives=self._drives())

    def tell(self, told: Told) -> None:
        """Where the pointer is now, and how far the film has been shown; what comes late is dropped."""
        with self._changed:
            if told.at >= self._told.at:
                self._told = told
                self._changed.notify_all()

    def stop(self) -> None:
        """No more chunks."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def chunks(self, patience: float) -> Iterator[Made | None]:
        """The film until it is stopped; None whenever no chunk was wanted for `patience` seconds."""
        number = 0
        while True:
            with self._changed:
                self._changed.wait_for(partial(self._has_news, number), patience)
                if self._stopped:
                    return
                wanted = self._wants(number)
            if not wanted:
                yield None
                continue
            with self._alone:
                start = time.perf_counter()
                frames = self._decode(next(self._stream))[0]
                seconds = time.perf_counter() - start
            yield Made(number, frames, seconds, self._followed.at)
            number += 1

    def _has_news(self, number: int) -> bool:
        return self._stopped or self._wants(number)

    def _wants(self, number: int) -> bool:
        return not self._told.paused and number < self._told.shown + _AHEAD

    def _tracks(self) -> Iterator[Tensor]:
        """For each chunk the way from where the pointer was to where it is now, (1, n, 2)."""
        before: Tensor | None = None
        while True:
            told = self._followed = self._told
            if told.x is None or told.y is None:
                before = None
                yield torch.full((1, self._frames, 2), math.nan)
                continue
            now = torch.tensor([told.x, told.y]) * self._size
            share = torch.arange(1, self._frames + 1)[:, None] / self._frames
            yield torch.lerp(now if before is None else before, now, share)[None]
            before = now

    def _drives(self) -> Iterator[Tensor]:
        while True:
            loud = self._followed.loud
            yield torch.full((1, self._frames), math.nan if loud is None else loud)
