"""What lies in a folder of runs: settings, logs, sample grids, students. Read only, and nothing outside of it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep.errors import FewstepError
from fewstep.models.export import CARD
from fewstep.models.student import ROUTER

_DEPTH = 4
"""Levels of folders that are looked through."""
_OF_A_RUN = {"checkpoints", "samples", "student", "lora", "tensorboard"}
_GRID = re.compile(r"(\d+)-(\d+)-steps\.png")
_TAIL = 65536
"""Bytes at the end of a log in which its last line is looked for."""


@dataclass(frozen=True)
class Run:
    """One run as a list shows it."""

    name: str
    """Its folder, seen from the folder of runs."""
    folder: Path
    method: str
    iteration: int
    """The last that the log tells of; 0: none yet."""
    iterations: int
    """How many were asked for."""
    changed: float
    """When something was last logged, seconds since 1970."""
    settings: dict[str, Any]
    """`run.json`."""

    @property
    def log(self) -> Path | None:
        """Its log, if it has one."""
        return _file(self.folder / "log.jsonl")

    @property
    def finished(self) -> bool:
        return 0 < self.iterations <= self.iteration


@dataclass(frozen=True)
class Grid:
    """One sample grid of a run."""

    iteration: int
    steps: int
    path: Path


@dataclass(frozen=True)
class RunsFolder:
    """A folder of runs, which need not exist. Links are not followed, so that all that is read lies inside."""

    folder: Path

    def runs(self) -> list[Run]:
        """All runs, the one that changed last in front."""
        return sorted(map(self._read, self._folders(self.folder, _DEPTH)), key=lambda run: -run.changed)

    def run(self, name: str) -> Run:
        """The run of this name.

        Raises:
            FewstepError: there is none, whatever else may lie at that path.
        """
        for folder in self._folders(self.folder, _DEPTH):
            if self._name(folder) == name:
                return self._read(folder)
        raise FewstepError(f"found no run {name!r} in {self.folder}, expected one of the list, fix: reload the page")

    def students(self) -> dict[str, Path]:
        """Folders of students by name: those of runs, and those of several parts with their router."""
        found = {}
        for folder in self._folders(self.folder, _DEPTH, ("run.json", ROUTER)):
            for path in (folder / "student", folder):
                if (path / CARD).is_file() or (path / ROUTER).is_file():
                    found[self._name(folder)] = path
                    break
        return found

    def grids(self, run: Run) -> list[Grid]:
        """Its sample grids, oldest first."""
        places = run.folder / "samples"
        if not places.is_dir() or places.is_symlink():
            return []
        found = [(_GRID.fullmatch(path.name), path) for path in places.iterdir() if not path.is_symlink()]
        grids = [Grid(int(match[1]), int(match[2]), path) for match, path in found if match]
        return sorted(grids, key=lambda grid: (grid.iteration, grid.steps))

    def _read(self, folder: Path) -> Run:
        settings, log = _json(folder / "run.json"), _file(folder / "log.jsonl")
        told, method = _inside(settings, "options"), _inside(settings, "configuration", "method")
        last = 0 if log is None else _last_iteration(log)
        changed = (log or folder / "run.json").stat().st_mtime
        name = self._name(folder)
        return Run(name, folder, str(method.get("name", "")), last, _whole(told.get("iterations")), changed, settings)

    def _name(self, folder: Path) -> str:
        return self.folder.absolute().name if folder == self.folder else folder.relative_to(self.folder).as_posix()

    def _folders(self, folder: Path, depth: int, marks: tuple[str, ...] = ("run.json",)) -> Iterator[Path]:
        """Folders that hold one of the files `marks`."""
        if any(_file(folder / mark) for mark in marks):
            yield folder
        if depth == 0 or not folder.is_dir():
            return
        with os.scandir(folder) as entries:
            inner = sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
        for name in inner:
            if name not in _OF_A_RUN and not name.startswith("."):
                yield from self._folders(folder / name, depth - 1, marks)


def _file(path: Path) -> Path | None:
    """A file that is no link."""
    return path if path.is_file() and not path.is_symlink() else None


def _inside(tree: Any, *names: str) -> dict[str, Any]:
    """An object within objects; an empty one where there is none."""
    for name in names:
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree if isinstance(tree, dict) else {}


def _whole(value: Any) -> int:
    return value if isinstance(value, int) else 0


def _json(path: Path) -> dict[str, Any]:
    """An object from a file; one that cannot be read says so in the place of its content."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"a {type(content).__name__}")
    except (OSError, ValueError) as error:
        return {"unreadable": f"{path.name}: {error}"}
    return content


def _last_iteration(log: Path) -> int:
    """The iteration of the last whole line."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _TAIL))
        lines = file.read().rpartition(b"\n")[0].splitlines()
    try:
        return _whole(json.loads(lines[-1])["iteration"]) if lines else 0
    except (ValueError, KeyError, TypeError):
        return 0  # the page of the run says what is wrong with the line
