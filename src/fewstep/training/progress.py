"""What a person sees while it trains: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from datetime import timedelta
from time import perf_counter
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    import rich.progress


class Progress:
    """Shows iterations done, losses, time left and memory, on stderr; nothing where `shown` is False."""

    def __init__(self, iterations: int, done: int, *, shown: bool) -> None:
        self._iterations, self._first = iterations, done
        self._start = perf_counter()
        self._shown = shown
        self._bar = _bar() if shown and sys.stderr.isatty() else None
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task("", total=iterations, completed=done, text="")

    def advance(self, iteration: int, record: Mapping[str, float]) -> None:
        """To be called after each iteration; `record` is empty where nothing is logged."""
        self.show(iteration, summary(record))

    def show(self, iteration: int, text: str) -> None:
        """How far it is; plain lines only where there is a `text`."""
        if self._bar is not None:
            self._bar.update(self._task, completed=iteration)
            if text:
                self._bar.update(self._task, text=text)
        elif text:
            left = (perf_counter() - self._start) / (iteration - self._first) * (self._iterations - iteration)
            self.say(f"{iteration}/{self._iterations}  {text}  left {timedelta(seconds=round(left))}")

    def say(self, message: str) -> None:
        """A line of its own, above the bar if there is one."""
        if self._bar is not None:
            self._bar.console.print(message, highlight=False, markup=False)
        elif self._shown:
            print(message, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def summary(record: Mapping[str, float]) -> str:
    """One line of the numbers worth watching, from a log record; empty for an empty one."""
    parts = [f"{role} {record[f'loss/{role}']:.4g}" for role in ("student", "critic") if f"loss/{role}" in record]
    parts += [f"{name.removeprefix('evaluate/')} {value:.4g}" for name, value in record.items() if "evaluate/" in name]
    if "time/iteration_s" in record:
        parts.append(f"{record['time/iteration_s']:.3g} s/it  {record['memory/peak_gib']:.2f} GiB")
    return "  ".join(parts)


def peak_memory(device: torch.device) -> float:
    """GiB at most in use so far: of the GPU for CUDA, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _bar() -> rich.progress.Progress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    left = (TextColumn("left"), TimeRemainingColumn())
    numbers = TextColumn("{task.fields[text]}")
    return Progress(BarColumn(20), MofNCompleteColumn(), *left, numbers, console=Console(stderr=True))
