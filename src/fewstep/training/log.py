"""The log: one JSON line per logged iteration, and the same numbers for TensorBoard and other trackers."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fewstep.training.checkpoint import sync, write_text
from fewstep.training.trackers import TensorBoard, Tracker, make_tracker


class Log:
    """Writes `log.jsonl` (and `tensorboard/`) in the run's folder, and tells a tracker.

    Opening it at `iteration` drops every line after that iteration, and a line torn by a kill, so that a resumed run
    has each line exactly once. Keys: loss/, gradient_norm/, rate/, metric/, monitor/, forwards/, evaluate/ are the same
    in every repetition of a run; time/ and memory/ are not. Alarms are lines of their own (docs/monitors.md). A number
    that is not finite is written as null, which JSON has. A tracker that fails is warned about and told nothing more;
    the run and its `log.jsonl` go on. `known`: so many lines had the checkpoint's run; fewer are warned about.
    """

    def __init__(
        self,
        folder: Path,
        iteration: int,
        *,
        tensorboard: bool,
        tracker: str = "none",
        configuration: Mapping[str, Any] | None = None,
        known: object = 0,
    ) -> None:
        self.path = folder / "log.jsonl"
        self.lines = _keep_until(self.path, iteration)
        """Alarms among them."""
        if isinstance(known, int) and self.lines < known:
            warnings.warn(
                f"{self.path} has {self.lines} whole lines up to iteration {iteration}, where it had {known} when that "
                "checkpoint was written: lines were lost, and the run goes on without them",
                stacklevel=2,
            )
        self._file = self.path.open("a")
        self._trackers: list[Tracker] = [TensorBoard()] if tensorboard else []
        if tracker != "none":
            self._trackers.append(make_tracker(tracker))
        for each in self._trackers:
            each.start(folder, configuration or {}, iteration)

    def write(self, iteration: int, record: Mapping[str, float]) -> None:
        """Appends one line; it is in the file (not yet forced to disk) when this returns."""
        numbers = {name: value if math.isfinite(value) else None for name, value in record.items()}
        self._append({"iteration": iteration, **numbers})
        for each in list(self._trackers):
            try:
                each.log(iteration, record)
            except Exception as error:
                self._trackers.remove(each)
                warnings.warn(
                    f"{type(each).__name__} failed at iteration {iteration} and is told nothing more: {error!r}",
                    stacklevel=2,
                )

    def alarm(self, iteration: int, told: Mapping[str, Any]) -> None:
        """Appends a line {"iteration": ..., "alarm": `told`}: no numbers, and not for trackers."""
        self._append({"iteration": iteration, "alarm": dict(told)})

    def _append(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        self.lines += 1

    def sync(self) -> None:
        """Forces the lines so far to disk; called before a checkpoint that counts on them."""
        sync(self.path)

    def close(self) -> None:
        self._file.close()
        for each in self._trackers:
            each.finish()


def read_log(path: Path) -> list[dict[str, float | None]]:
    """The records of a `log.jsonl`, oldest first; without alarms, a torn last line and damaged ones (a warning)."""
    return [record for _, record in _whole_lines(path) if "alarm" not in record]


def read_alarms(path: Path) -> list[dict[str, Any]]:
    """The alarms of a `log.jsonl`, oldest first, as `monitors.watch.Alarm.record` writes them, with what was done."""
    return [record["alarm"] for _, record in _whole_lines(path) if isinstance(record.get("alarm"), dict)]


def _whole_lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Lines that were written to their end and can be read, with what they say."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    whole = []
    for number, line in enumerate(lines, start=1):
        if line.endswith(b"\n"):
            try:
                record = json.loads(line)
                whole.append((line.decode(), {**record, "iteration": int(record["iteration"])}))
            except (ValueError, LookupError, TypeError, RecursionError) as error:
                warnings.warn(f"line {number} of {path} is damaged and left out ({type(error).__name__})", stacklevel=3)
    return whole


def _keep_until(path: Path, iteration: int) -> int:
    """Drops lines of later iterations; how many there are left."""
    kept = [line for line, record in _whole_lines(path) if record["iteration"] <= iteration]
    write_text(path, "".join(kept))
    return len(kept)
