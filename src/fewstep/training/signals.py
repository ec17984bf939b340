"""Stopping politely: the first Ctrl-C or SIGTERM asks, the second one insists."""

from __future__ import annotations

import signal
import threading
from types import FrameType


class Stopped(SystemExit):
    """A run that was asked to stop and has saved a checkpoint. Uncaught it ends the process with code 130 or 143."""


class StopRequest:
    """Notes SIGINT and SIGTERM until it is closed; the loop looks at `code` at its next safe point.

    `code` is 0, or 128 + the signal's number. A second signal raises KeyboardInterrupt at once: nothing is saved
    then, and the newest checkpoint on disk stays valid. Handlers can be set in the main thread only; in another one
    `code` stays 0.
    """

    def __init__(self) -> None:
        self.code = 0
        signals = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
        self._previous = {number: signal.signal(number, self._note) for number in signals}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.code:
            raise KeyboardInterrupt
        self.code = 128 + number

    def close(self) -> None:
        """Gives the signals back to whoever handled them before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
