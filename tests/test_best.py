"""A run that is scored on held-out prompts keeps its best student, as a pipeline of its own, for any teacher."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fewstep
from fewstep.api import RoleOptions, TextOptions
from fewstep.errors import FewstepError
from fewstep.training.log import read_log
from fewstep.training.monitors.best import read_best
from fewstep.training.options import TrainOptions

PROMPTS = ["a frog", "a red apple on a blue background", "a 3d pizza"]


@pytest.mark.parametrize("text_encoder", ["cache", "keep"])
def test_the_best_student_is_exported_beside_the_last(tmp_path: Path, tiny_teacher: Path, text_encoder: str) -> None:
    teacher = fewstep.load_teacher(tiny_teacher)
    teacher.backbone.teacher_steps = 2
    options = TrainOptions(
        iterations=3, batch=2, warmup=0, evaluate_every=1, student_rate=0.3, ema_decay=0.0, tensorboard=False
    )
    student = fewstep.distill(
        teacher,
        "tdm",
        out=tmp_path,
        prompts=PROMPTS,
        held_out=["a blue car", "a dog"],
        roles=RoleOptions(roles="copies"),
        train_options=options,
        text=TextOptions(text_encoder=text_encoder),  # type: ignore[arg-type]
    )
    records = [r for r in read_log(tmp_path / "log.jsonl") if "evaluate/score" in r]
    assert [record["iteration"] for record in records] == [1, 2, 3]
    for name in ("score", "variety", "sharpness", "held out distance, 4 steps", "held out clipped, 4 steps"):
        assert f"evaluate/{name}" in records[0]
    scores = {int(record["iteration"] or 0): float(record["evaluate/score"] or 0) for record in records}
    best = read_best(tmp_path)
    assert best is not None
    assert scores[best.iteration] == min(scores.values())
    kept = fewstep.load_student(tmp_path / "best" / "student")
    assert kept.card["details"]["iterations"] == best.iteration
    same = torch.equal(kept.latents(PROMPTS, [1, 2, 3]), student.latents(PROMPTS, [1, 2, 3]))
    assert same == (best.iteration == 3)


def test_chains_of_runs_refuse_held_out_prompts(tmp_path: Path, tiny_teacher: Path) -> None:
    with pytest.raises(FewstepError, match="held_out for phased, a chain"):
        fewstep.distill(tiny_teacher, "phased", out=tmp_path / "run", prompts=PROMPTS, held_out=["a dog"])
    assert not (tmp_path / "run").exists()
