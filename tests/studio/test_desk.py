"""Drawing with a real (tiny) student and its teacher."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import fewstep
from fewstep.errors import FewstepError
from fewstep.studio import desk as desk_module
from fewstep.studio.desk import Desk, Steps
from fewstep.training.options import TrainOptions

PROMPT = "a frog"


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path) -> Path:
    """A steps-aware one, for 1, 2, 4 and 8 steps."""
    out, told = tmp_path_factory.mktemp("aware"), TrainOptions(iterations=1, batch=2, warmup=0, tensorboard=False)
    fewstep.distill(tiny_teacher, "tdm-unify", out=out, prompts=[PROMPT], train_options=told)
    return out / "student"


def test_what_it_draws_is_what_the_models_draw(student: Path, tiny_teacher: Path) -> None:
    desk = Desk(lambda: {"mine": student}, None)
    assert desk.names() == ["mine"]
    assert desk.steps("mine") == Steps((1, 2, 4, 8), aware=True)
    assert desk.teacher("mine") == str(tiny_teacher)
    loaded = fewstep.load_student(student)
    for steps in (1, 4):
        drawing = desk.by_student("mine", PROMPT, 3, steps)
        assert (drawing.steps, drawing.calls) == (steps, steps)
        assert torch.equal(drawing.sample, loaded.sample([PROMPT], [3], steps)[0])
    teacher = fewstep.load_teacher(tiny_teacher)
    assert desk.teacher_before("mine", PROMPT, 3) is None
    drawing = desk.by_teacher("mine", PROMPT, 3)
    assert (drawing.steps, drawing.calls) == (teacher.steps, teacher.calls())
    assert torch.equal(drawing.sample, teacher.sample([PROMPT], [3])[0])
    assert desk.teacher_before("mine", PROMPT, 3) is drawing
    assert desk.teacher_before("mine", PROMPT, 4) is None


def test_one_student_is_kept_and_drawings_are(student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[Path] = []

    def load(folder: Path, **more: object) -> fewstep.api.Student:
        loads.append(folder)
        return fewstep.load_student(folder)

    monkeypatch.setattr(desk_module, "load_student", load)
    other = tmp_path / "other"
    shutil.copytree(student, other)
    desk = Desk(lambda: {"a": student, "b": other}, None)
    assert loads == []
    first = desk.by_student("a", PROMPT, 0, 1)
    desk.by_student("a", PROMPT, 1, 1)
    assert loads == [student]
    desk.by_student("b", PROMPT, 0, 1)
    assert desk.by_student("a", PROMPT, 0, 1) is first
    assert loads == [student, other]
    desk.by_student("a", PROMPT, 2, 1)
    assert loads == [student, other, student]


def test_refusals(student: Path, tmp_path: Path) -> None:
    desk = Desk(lambda: {"mine": student, "broken": tmp_path}, str(tmp_path / "nowhere"))
    for prompt in ("", " \n", "x" * 5000):
        with pytest.raises(FewstepError, match="expected 1 to 4000 characters"):
            desk.by_student("mine", prompt, 0, 1)
    with pytest.raises(FewstepError, match="found no student '../x'"):
        desk.by_student("../x", PROMPT, 0, 1)
    with pytest.raises(FewstepError, match="expected one of"):
        desk.by_student("mine", PROMPT, 0, 3)
    with pytest.raises(FewstepError, match="no student at"):
        desk.steps("broken")
    assert desk.streamers() == []
    with pytest.raises(FewstepError, match="'mine', which makes whole samples"):
        desk.streamer("mine")
    with pytest.raises(FewstepError, match="found nothing at .*nowhere"):
        desk.by_teacher("mine", PROMPT, 0)


def test_without_students_there_is_the_embedded_teacher() -> None:
    assert Desk(dict, None).teacher(None) == "emoji"
    assert Desk(dict, "mine").teacher(None) == "mine"


@pytest.mark.parametrize(("asked", "steps"), [(0, 1), (1, 1), (3, 2), (4, 4), (7.9, 4), (8, 8), (99, 8)])
def test_a_place_on_the_slider_is_a_count_that_was_trained(asked: float, steps: int) -> None:
    assert Steps((1, 2, 4, 8), aware=True).nearest(asked) == steps
