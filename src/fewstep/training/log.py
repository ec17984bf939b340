"""The log: one JSON line per logged iteration, and the same numbers as TensorBoard events."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from fewstep.training.checkpoint import sync, write_text


class Log:
    """Writes `log.jsonl` (and `tensorboard/`) in the run's folder.

    Opening it at `iteration` drops every line after that iteration, and a line torn by a kill, so that a resumed run
    has each line exactly once. Keys: loss/, gradient_norm/, rate/, metric/, forwards/, evaluate/ are the same in
    every repetition of a run; time/ and memory/ are not. A number that is not finite is written as null, which JSON
    has.
    """

    def __init__(self, folder: Path, iteration: int, *, tensorboard: bool) -> None:
        self.path = folder / "log.jsonl"
        _keep_until(self.path, iteration)
        self._file = self.path.open("a")
        self._events = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=iteration + 1)

    def write(self, iteration: int, record: Mapping[str, float]) -> None:
        """Appends one line; it is in the file (not yet forced to disk) when this returns."""
        numbers = {name: value if math.isfinite(value) else None for name, value in record.items()}
        self._file.write(json.dumps({"iteration": iteration, **numbers}) + "\n")
        self._file.flush()
        if self._events is not None:
            for name, value in record.items():
                self._events.add_scalar(name, value, iteration)

    def sync(self) -> None:
        """Forces the lines so far to disk; called before a checkpoint that counts on them."""
        sync(self.path)

    def close(self) -> None:
        self._file.close()
        if self._events is not None:
            self._events.close()


def read_log(path: Path) -> list[dict[str, float | None]]:
    """The records of a `log.jsonl`, oldest first; a torn last line is left out."""
    return [json.loads(line) for line in _whole_lines(path)]


def _whole_lines(path: Path) -> list[str]:
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [line for line in lines if line.endswith("\n")]


def _keep_until(path: Path, iteration: int) -> None:
    kept = [line for line in _whole_lines(path) if json.loads(line)["iteration"] <= iteration]
    write_text(path, "".join(kept))
