"""What bounds a server: also the options of `fewstep serve`, so nothing of the extra is imported here."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fewstep.errors import FewstepError

MOST_PICTURES = 10
"""Pictures of one request at most, as in the OpenAI API."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much a server takes on, and for how long."""

    batch: int = 0
    """Pictures drawn at a time; 0: what fits the student's size."""
    queue: int = 128
    """Pictures that may wait to be drawn, 10 or more; beyond, requests are answered 429."""
    linger: float = 0.005
    """Seconds that a picture which finds nobody waiting waits for company, 0 or more."""
    timeout: float = 60.0
    """Seconds for a request, above 0; beyond, it is taken from the queue and answered 504."""
    body: int = 65536
    """Bytes of a request's body, 1024 or more; beyond, it is answered 413."""
    body_seconds: float = 10.0
    """Seconds in which a body has to arrive, above 0; beyond, it is answered 408."""
    keep: int = 512
    """Pictures kept for answers by URL, 10 or more; the oldest make room."""
    keep_megabytes: int = 256
    """Their megabytes in memory, enough for ten pictures."""
    keep_seconds: float = 3600.0
    """How long a URL holds, above 0."""

    def validate(self) -> None:
        """FewstepError for numbers out of range."""
        for name, least in (("batch", 0), ("queue", MOST_PICTURES), ("body", 1024), ("keep", MOST_PICTURES)):
            if getattr(self, name) < least:
                raise FewstepError(f"found {name} = {getattr(self, name)}, expected {least} or more, fix: raise it")
        for name in ("timeout", "body_seconds", "keep_seconds"):
            if not 0 < getattr(self, name) < math.inf:
                raise FewstepError(f"found {name} = {getattr(self, name)}, expected seconds above 0, fix: change it")
        if not 0 <= self.linger < self.timeout:
            raise FewstepError(
                f"found linger = {self.linger}, expected 0 or more seconds and less than the timeout, fix: change it"
            )

    def check_room(self, width: int, height: int, frames: int = 1) -> None:
        """FewstepError unless one request's pictures, or videos, of that size can be kept together."""
        if self.keep_megabytes * 2**20 < MOST_PICTURES * (width * height * frames * 3 + 65536):
            raise FewstepError(
                f"found keep_megabytes = {self.keep_megabytes}, expected enough for {MOST_PICTURES} samples of "
                f"{width}x{height}{f', {frames} frames' if frames > 1 else ''}, fix: raise it"
            )
