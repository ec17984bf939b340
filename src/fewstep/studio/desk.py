"""The models that the studio draws with: loaded when first asked for, one student and one teacher at a time."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.api import load_teacher
from fewstep.errors import FewstepError
from fewstep.models.router import part_folder
from fewstep.models.student import ROUTER, Student, load_student, read_card
from fewstep.models.teacher import Teacher
from fewstep.streaming.student import CausalStudent

LONGEST_PROMPT = 4000
_KEPT = 64
"""Drawings that are remembered."""


@dataclass(frozen=True)
class Drawing:
    """One picture, or video, and what it took."""

    sample: Tensor
    """uint8 (3, H, W), or (F, 3, H, W), on the CPU."""
    steps: int
    calls: int
    """Network calls; a guided step counts two."""
    seconds: float
    """Wall seconds, without loading."""
    fps: int = 16
    """Frames a second of a video."""


@dataclass(frozen=True)
class Steps:
    """What step counts a student has."""

    counts: tuple[int, ...]
    aware: bool
    """Whether one network is told the count, so that its pictures refine with it."""

    def nearest(self, asked: float) -> int:
        """The largest count that is not above `asked`, or the smallest."""
        return max((count for count in self.counts if count <= asked), default=self.counts[0])


class Desk:
    """Draws with students by name and with their teacher; safe to call from several threads, one draws at a time.

    Args:
        students: folders by name, as they are now.
        teacher: what `load_teacher` takes; None: the teacher that a student names, and the embedded one for none.
        device: where to draw.
    """

    def __init__(
        self, students: Callable[[], dict[str, Path]], teacher: str | None, device: torch.device | str = "cpu"
    ) -> None:
        self._students, self._teacher, self._device = students, teacher, device
        self._loaded: dict[str, tuple[Any, Student | Teacher]] = {}
        self._drawings: OrderedDict[Any, Drawing] = OrderedDict()
        self.lock = threading.RLock()
        """Held while something is loaded or drawn."""

    def names(self) -> list[str]:
        """The students there are."""
        return list(self._students())

    def steps(self, student: str) -> Steps:
        """The step counts of a student; nothing is loaded.

        Raises:
            FewstepError: there is no such student, or its card cannot be read.
        """
        card, grids = self._card(student)
        return Steps(tuple(sorted(grids)), card["steps_aware"])

    def teacher(self, student: str | None) -> str:
        """What the teacher of a student, or of none, is called."""
        return self._teacher or ("emoji" if student is None else self._card(student)[0]["teacher"])

    def by_student(self, student: str, prompt: str, seed: int, steps: int) -> Drawing:
        """Draw with a student in `steps` network calls.

        Raises:
            FewstepError: no such student, a count it was not trained for, no prompt, or what loading it raises.
        """
        _check(prompt)
        folder = self._folder(student)
        written = folder, folder.stat().st_mtime  # one that is trained anew in its folder is loaded anew

        def draw() -> Drawing:
            model = self._model("student", written, lambda: load_student(folder, device=self._device))
            return _timed(model, prompt, seed, steps, steps)

        return self._remembered((written, prompt, seed, steps), draw)

    def by_teacher(self, student: str | None, prompt: str, seed: int) -> Drawing:
        """Draw with the teacher of a student, or of none, at its usual steps and guidance.

        Raises:
            FewstepError: no prompt, or what loading it raises.
        """
        _check(prompt)

        source, size, *_ = key = self._teacher_key(student, prompt, seed)
        told: dict[str, Any] = dict(size)

        def draw() -> Drawing:
            model = self._model("teacher", (source, size), lambda: load_teacher(source, device=self._device, **told))
            assert isinstance(model, Teacher)
            return _timed(model, prompt, seed, model.steps, model.calls())

        return self._remembered(key, draw)

    def streamers(self) -> list[str]:
        """The students that make films chunk by chunk."""
        return [name for name in self.names() if self._is_streamer(name)]

    def streamer(self, student: str) -> CausalStudent:
        """Such a student, loaded.

        Raises:
            FewstepError: no such student, one that makes whole samples, or what loading it raises.
        """
        folder = self._folder(student)
        if not self._is_streamer(student):
            raise FewstepError(
                f"found {student!r}, which makes whole samples, expected a student that makes films chunk by chunk, "
                "fix: train one by self-forcing or motionstream (docs/causal.md)"
            )
        with self.lock:
            written = folder, folder.stat().st_mtime
            model = self._model("student", written, lambda: load_student(folder, device=self._device))
        assert isinstance(model, CausalStudent)
        return model

    def _is_streamer(self, student: str) -> bool:
        try:
            return "causal" in self._card(student)[0]
        except FewstepError:
            return False

    def teacher_before(self, student: str | None, prompt: str, seed: int) -> Drawing | None:
        """What `by_teacher` drew before, if it did."""
        return self._drawings.get(self._teacher_key(student, prompt, seed))

    def _teacher_key(self, student: str | None, prompt: str, seed: int) -> tuple[Any, ...]:
        size = {} if student is None else self._card(student)[0].get("size") or {}
        return self.teacher(student), tuple(sorted(size.items())), prompt, seed

    def _folder(self, student: str) -> Path:
        found = self._students()
        if student not in found:
            raise FewstepError(f"found no student {student!r}, expected one of {sorted(found)}, fix: reload the page")
        return found[student]

    def _card(self, student: str) -> tuple[dict[str, Any], dict[int, Tensor]]:
        folder = self._folder(student)
        return read_card(part_folder(folder, 0) / "student" if (folder / ROUTER).is_file() else folder)

    def _model(self, role: str, key: Any, load: Callable[[], Student | Teacher]) -> Student | Teacher:
        """The model `key` in its role; another that had the role goes first, so that memory holds one."""
        if role not in self._loaded or self._loaded[role][0] != key:
            self._loaded.pop(role, None)
            model = load()
            model.sample(["a picture"], [0], 1 if isinstance(model, Teacher) else min(model.grids))  # warms up
            self._loaded[role] = key, model
        return self._loaded[role][1]

    def _remembered(self, key: Any, draw: Callable[[], Drawing]) -> Drawing:
        with self.lock:
            if key not in self._drawings:
                self._drawings[key] = draw()
                while len(self._drawings) > _KEPT:
                    self._drawings.popitem(last=False)
            self._drawings.move_to_end(key)
            return self._drawings[key]


def _timed(model: Student | Teacher, prompt: str, seed: int, steps: int, calls: int) -> Drawing:
    start = time.perf_counter()
    sample = model.sample([prompt], [seed], steps)[0]
    return Drawing(sample, steps, calls, time.perf_counter() - start, model.backbone.frame_rate)


def _check(prompt: str) -> None:
    if not prompt.strip() or len(prompt) > LONGEST_PROMPT:
        what = "no prompt" if not prompt.strip() else f"a prompt of {len(prompt)} characters"
        raise FewstepError(f"found {what}, expected 1 to {LONGEST_PROMPT} characters, fix: write what to draw")
