"""The cells of a league, method x steps x seed: one result file each, shared among processes, resumable, never lost.

    out/<league>/settings.json             what all cells have in common; other settings are refused in this folder
    out/<league>/<cell>/result.json        a finished cell, or the error of one that failed; written whole or not at all
    out/<league>/<cell>/run                the training, where it was killed it goes on

Any number of processes may work on one folder: a cell belongs to who holds the lock of its folder, which the operating
system takes back however a process ends.
"""

from __future__ import annotations

import json
import platform
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from fewstep.errors import FewstepError
from fewstep.league.entries import Entry
from fewstep.methods import Options
from fewstep.training import folder
from fewstep.training.checkpoint import write_text

RESULT, SETTINGS = "result.json", "settings.json"


@dataclass(frozen=True)
class Cell:
    """One training and what became of it."""

    entry: Entry
    steps: int
    """Network calls of the student."""
    seed: int
    """Of networks, data and noise in training; scores of all cells are on the same captions and noise."""
    options: Options
    """Of the method, as this league has it."""

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.entry.name}-{self.steps}-steps-seed-{self.seed}"


class League(Protocol):
    """A teacher and a way to train and score a cell on it."""

    @property
    def name(self) -> str:
        """Of its folder and its tables."""
        ...

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the results, as JSON-able values: the options of the command."""
        ...

    def options(self, entry: Entry, steps: int) -> Options | None:
        """The method's options on this teacher, or None where it does not play."""
        ...

    def run(self, cell: Cell, home: Path) -> dict[str, Any]:
        """Train, or go on training, in `home`, and score.

        Returns: iterations, pairs, forwards (spent, for each place of the batch), seconds (of training) and
        scores, by step count.
        """
        ...


def cells(league: League, players: Sequence[Entry], steps: Sequence[int], seeds: Sequence[int]) -> list[Cell]:
    """All cells in the order of work: by step count as given, then seed, then method.

    An entry whose options are those of one before it, such as SiD's guidance where nothing can be guided, is left out.
    """
    found: list[Cell] = []
    for count in steps:
        for seed in seeds:
            taken: list[Options] = []
            for entry in players:
                options = league.options(entry, count)
                if options is not None and options not in taken:
                    taken.append(options)
                    found.append(Cell(entry, count, seed, options))
    return found


def play(
    league: League, work: Sequence[Cell], out: Path, *, minutes: float = float("inf"), retry: bool = False
) -> list[str]:
    """Run the cells that nobody has run or is running; returns the names of those of `work` that have failed.

    Args:
        league: where.
        work: which cells, in order.
        out: folder of all leagues.
        minutes: none is begun after so many.
        retry: also those that failed before.

    Raises:
        FewstepError: the folder holds a league of other settings.
    """
    home, end = out / league.name, time.monotonic() + 60 * minutes
    _begin(home, league.settings)
    for number, cell in enumerate(work, 1):
        if time.monotonic() >= end:
            print(f"{minutes:g} minutes are over, cells {number} to {len(work)} are not begun", flush=True)
            break
        with ExitStack() as stack:
            if not _wanted(home / cell.name, retry):
                continue
            try:
                stack.enter_context(folder.locked(home / cell.name))
            except FewstepError:
                continue  # another process has it
            if _wanted(home / cell.name, retry):  # it may have been finished while we looked
                print(f"[{number}/{len(work)}] {cell.name}", flush=True)
                print(f"    {_run(league, cell, home / cell.name)}", flush=True)
    there = {result["cell"]: result for result in results(home)}
    failed = [cell.name for cell in work if "error" in there.get(cell.name, ())]
    done = sum(cell.name in there for cell in work) - len(failed)
    print(f"{done} of {len(work)} cells finished, {len(failed)} failed", flush=True)
    return failed


def results(home: Path) -> Iterator[dict[str, Any]]:
    """The results in the folder of one league, by name of the cell."""
    for path in sorted(home.glob(f"*/{RESULT}")):
        yield json.loads(path.read_text())


def machine(device: torch.device) -> str:
    """What the seconds of a result were measured on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names = [line.split(":")[1] for line in _cpu_info() if line.startswith("model name")]
    threads = torch.get_num_threads()
    name = names[0].strip() if names else platform.machine()
    return f"{name}, {threads} thread{'s' * (threads > 1)}"


def _cpu_info() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def _begin(home: Path, settings: dict[str, Any]) -> None:
    """Keeps the settings, or refuses others."""
    path = home / SETTINGS
    if path.exists():
        kept = json.loads(path.read_text())
        if kept != json.loads(json.dumps(settings)):
            raise FewstepError(
                f"found a league of other settings in {home} ({kept}), expected {settings}, "
                "fix: set these options back, or choose another --out"
            )
        return
    home.mkdir(parents=True, exist_ok=True)
    with folder.locked(home):
        write_text(path, json.dumps(settings) + "\n")


def _wanted(home: Path, retry: bool) -> bool:
    """Whether a cell has no result, or an error that is to be tried again."""
    path = home / RESULT
    return not path.exists() or (retry and "error" in json.loads(path.read_text()))


def _run(league: League, cell: Cell, home: Path) -> str:
    """Run a cell, keep its result or its error, and say in a line what came of it."""
    about = {"cell": cell.name, "method": cell.entry.name, "steps": cell.steps, "seed": cell.seed}
    about |= {"options": asdict(cell.options)}  # type: ignore[call-overload]
    try:
        result = about | league.run(cell, home)
        told = "  ".join(f"{name} {value:.4g}" for name, value in _told(result).items())
    except Exception as error:
        traceback.print_exc()
        result, told = about | {"error": f"{type(error).__name__}: {error}"}, f"failed: {error}"
    write_text(home / RESULT, json.dumps(result, indent=1) + "\n")
    return told


def _told(result: dict[str, Any]) -> dict[str, float]:
    """The numbers of the line that says what came of a cell."""
    scores = result["scores"][str(result["steps"])]
    plain = {name: value for name, value in scores.items() if isinstance(value, float)}
    return plain | {name: result[name] for name in ("iterations", "forwards", "seconds")}
