"""Pictures that are answered by URL: in memory, for a while, a bounded number of them."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Kept:
    """A file's content."""

    content: bytes
    media_type: str
    until: float


class PictureStore:
    """Files under names that nobody can guess (256 random bits); the oldest make room for new ones.

    Args:
        count: files kept at most, 1 or more.
        size: bytes kept at most; a larger file is not kept at all.
        seconds: how long a file is kept.
        clock: seconds that never run backwards.
    """

    def __init__(self, count: int, size: int, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._count, self._limit, self._seconds, self._clock = count, size, seconds, clock
        self._files: dict[str, Kept] = {}  # oldest first
        self.size = 0
        """Bytes kept."""

    def __len__(self) -> int:
        return len(self._files)

    def put(self, content: bytes, media_type: str) -> str:
        """Keep a file; its name, of letters, digits, "-" and "_"."""
        name = secrets.token_urlsafe(32)
        self._files[name] = Kept(content, media_type, self._clock() + self._seconds)
        self.size += len(content)
        self._drop()
        return name

    def get(self, name: str) -> Kept | None:
        """The file of that name, unless it has expired or made room."""
        self._drop()
        return self._files.get(name)

    def _drop(self) -> None:
        now = self._clock()
        while self._files:
            name, oldest = next(iter(self._files.items()))
            if oldest.until > now and len(self._files) <= self._count and self.size <= self._limit:
                break
            del self._files[name]
            self.size -= len(oldest.content)
