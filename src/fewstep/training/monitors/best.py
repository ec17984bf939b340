"""The best student so far, by the evaluation's `score`, and when to stop looking for a better one."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fewstep.training import checkpoint

SCORE = "evaluate/score"
"""What students are compared by, lower is better: a distance to the teacher on held-out prompts."""
SHARPNESS = "evaluate/sharpness"
"""The student's over the teacher's, likewise; above 1 it overshoots."""
FOLDER = "best"
GROUP = "student"
"""Name of the tensors' file."""
_OVERSHOOT = 1.05


class Best:
    """Remembers the lowest score and when it was; plain numbers, which a checkpoint keeps.

    The student itself lies in `best/<iteration>/` in the run's folder, written as checkpoints are: whole or not there.
    """

    def __init__(self) -> None:
        self.iteration = 0
        self.score = math.inf
        self.since = 0
        """Evaluations since then."""

    def improves(self, iteration: int, evaluated: Mapping[str, float]) -> bool:
        """Notes an evaluation; whether it is the best so far. One without a score, or with NaN for it, is not."""
        score = evaluated.get(SCORE, math.nan)
        if score < self.score:
            self.iteration, self.score, self.since = iteration, score, 0
            return True
        self.since += SCORE in evaluated
        return False

    def behind(self, evaluated: Mapping[str, float]) -> dict[str, float]:
        """behind: the score over the best one; drift: likewise where samples are sharper than the teacher's, else 1.

        Neither without a score, no drift without a sharpness.
        """
        if SCORE not in evaluated or not 0 < self.score < math.inf:
            return {}
        behind = evaluated[SCORE] / self.score
        if SHARPNESS not in evaluated:
            return {"behind": behind}
        return {"behind": behind, "drift": behind if evaluated[SHARPNESS] > _OVERSHOOT else 1.0}

    def state(self) -> dict[str, Any]:
        """What `load` takes, as JSON."""
        known = math.isfinite(self.score)
        return {"iteration": self.iteration, "score": self.score if known else None, "since": self.since}

    def load(self, state: Mapping[str, Any]) -> None:
        self.iteration, self.since = int(state["iteration"]), int(state["since"])
        self.score = math.inf if state["score"] is None else float(state["score"])


def save_best(out: Path, iteration: int, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> Path:
    """Puts a student into `out`/best in the place of the one there."""
    return checkpoint.save(out / FOLDER, iteration, {GROUP: tensors}, about, keep=1)


def read_best(out: Path) -> checkpoint.Checkpoint | None:
    """The best student of the run in `out`; None if there is none. Reads every byte of it.

    Its `tensors("student")` are what `Roles.load_student_state` takes, averaged if the run keeps an average.
    """
    return checkpoint.newest(out / FOLDER) if (out / FOLDER).is_dir() else None


def drop_later(out: Path, iteration: int) -> None:
    """Deletes a best student of after `iteration`, from which the run is resumed: it will be found again."""
    for folder in (out / FOLDER).glob("*"):
        if not folder.name.isdecimal() or int(folder.name) > iteration:
            shutil.rmtree(folder)
