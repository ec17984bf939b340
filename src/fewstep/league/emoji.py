"""The league on the embedded teacher: every method trained as the others are, on the same captions and scored alike."""

from __future__ import annotations

import shutil
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from fewstep.api import EMOJI, RoleOptions, distill, load_teacher
from fewstep.data.pairs import TeacherPairs
from fewstep.data.prompts import training_captions
from fewstep.errors import FewstepError
from fewstep.evaluation.run import evaluate_scenes, record, reference_features
from fewstep.league.budget import PAIR_STEPS, plan
from fewstep.league.cells import Cell, machine
from fewstep.league.entries import Entry, guided_by
from fewstep.methods import Options
from fewstep.training.log import read_log
from fewstep.training.options import TrainOptions

GUIDANCE = 3.5
"""Of every method that guides the teacher: that of the teacher's own samples, to which all are compared."""
START_TIME = 0.8
"""Of the first call, for all: at time 1 alpha is 0.006 and the first estimate mostly amplified error
(docs/findings/embedded-students.md)."""
ROLES: Literal["copies"] = "copies"
"""Full copies move further per iteration than adapters, for every method alike (the same page)."""
RATES: dict[str, Any] = {"student_rate": 1e-4, "critic_rate": 4e-4, "schedule": "cosine"}
"""Those of the engine; constant rates drift (the same page)."""


@dataclass(frozen=True)
class EmojiLeague:
    """Students of the embedded teacher, scored on held-out captions.

    Raises:
        FewstepError: a count of images that there is no reference for.
    """

    forwards: float
    """Network forwards of a training, for each place of the batch."""
    batch: int
    count: int
    """Images of a score."""
    precision: Literal["fp32", "bf16"]
    """Of the networks in training; samples that are scored are made in fp32."""
    device: torch.device

    name: ClassVar[str] = EMOJI

    def __post_init__(self) -> None:
        most = len(reference_features())
        if not 16 <= self.count <= most:
            raise FewstepError(f"found count {self.count}, expected 16 to {most} images, fix: change --count")

    @property
    def settings(self) -> dict[str, Any]:
        """The options of the command that decide the result."""
        return {name: getattr(self, name) for name in ("forwards", "batch", "count", "precision")}

    def options(self, entry: Entry, steps: int) -> Options | None:
        options = entry.options(steps)
        if options is None:
            return None
        guided: Any = guided_by(options, GUIDANCE)
        starts = any(option.name == "start_time" for option in fields(guided))
        return replace(guided, start_time=START_TIME) if starts else guided

    def run(self, cell: Cell, home: Path) -> dict[str, Any]:
        bought = plan(cell.options, self.forwards, self.batch)
        teacher = load_teacher(EMOJI, device=self.device)
        pairs = None
        if bought.pairs:
            pairs = TeacherPairs(
                teacher, training_captions(), bought.pairs, steps=PAIR_STEPS, guidance_scale=GUIDANCE, seed=cell.seed
            )
        with self._attention():
            student = distill(
                teacher,
                cell.options,
                out=home / "run",
                pairs=pairs,
                roles=RoleOptions(roles=ROLES),
                train_options=self._training(cell, bought.iterations),
                resume=True,
            )
        forwards, seconds = spent(home / "run")
        made = bought.pairs * PAIR_STEPS * 2 / self.batch  # guided
        scores = {
            str(steps): record(evaluate_scenes(student, steps=steps, count=self.count))
            for steps in sorted(student.grids)
        }
        for checkpoints in (home / "run").glob("**/checkpoints"):
            shutil.rmtree(checkpoints)  # the student is in run/student; a hundred cells would fill the disk
        return {
            "iterations": bought.iterations, "pairs": bought.pairs, "forwards": forwards + made, "seconds": seconds,
            "machine": machine(self.device), "scores": scores,
        }  # fmt: skip

    def _training(self, cell: Cell, iterations: int) -> TrainOptions:
        return TrainOptions(
            iterations=iterations,
            batch=self.batch,
            seed=cell.seed,
            warmup=min(10, iterations),
            precision=self.precision,
            log_every=1,
            log_most=0,  # see `spent`
            checkpoint_every=max(1, iterations // 5),
            keep=1,
            tensorboard=False,
            **RATES,
        )

    def _attention(self) -> AbstractContextManager[Any]:
        """Plain attention for bf16 on a CPU: the fused one's backward pass takes half as long again."""
        plain = self.precision == "bf16" and self.device.type == "cpu"
        return sdpa_kernel(SDPBackend.MATH) if plain else nullcontext()


def spent(run: Path) -> tuple[float, float]:
    """Network forwards for each place of the batch and seconds of training, from the logs (one line an iteration)."""
    lines = [line for path in sorted(run.glob("**/log.jsonl")) for line in read_log(path)]
    if not lines:
        raise FewstepError(f"found no log in {run}, expected that of a training, fix: remove the folder and run again")
    forwards = sum(value or 0 for line in lines for name, value in line.items() if name.startswith("forwards/"))
    return forwards, sum(line["time/iteration_s"] or 0 for line in lines)
