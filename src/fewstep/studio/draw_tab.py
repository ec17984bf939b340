"""The tab that draws: a student at a step count, and its teacher beside it."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from fewstep.embedded.build import TEACHER_FOLDER
from fewstep.errors import FewstepError
from fewstep.studio.desk import Desk, Drawing, Steps
from fewstep.studio.pages import pair
from fewstep.studio.told import told

_LARGEST_SEED = 2**32 - 1
_ASK = "Press Draw for the teacher's picture."


class DrawAnswers:
    """What the tab answers; the arguments are the values of its controls, in their order."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk

    def both(
        self, name: str | None, prompt: str, seed: int | None, along: float, choice: int | None, with_teacher: bool
    ) -> Iterator[str]:
        """Draw with the student, then with its teacher."""
        with told():
            seed = _checked(seed)
            drawing = self._student(name, prompt, seed, along, choice)
            if name is not None and not with_teacher:
                yield pair(drawing, None, "")
                return
            yield pair(drawing, self.desk.teacher_before(name, prompt, seed), f"{self.teacher(name)} is drawing.")
            yield pair(drawing, self.desk.by_teacher(name, prompt, seed), "")

    def student(
        self, name: str | None, prompt: str, seed: int | None, along: float, choice: int | None, with_teacher: bool
    ) -> str:
        """Draw with the student alone, beside what its teacher drew before of the same."""
        with told():
            seed = _checked(seed)
            drawing = self._student(name, prompt, seed, along, choice)
            before = self.desk.teacher_before(name, prompt, seed) if with_teacher else None
            return pair(drawing, before, _ASK if with_teacher else "")

    def choose(self, name: str | None) -> tuple[Any, ...]:
        """The controls for a student, among those that are there now; for the first of them if it is not."""
        with told():
            kinds = (gr.Dropdown, gr.Slider, gr.Radio, gr.Checkbox)
            return tuple(kind(**more) for kind, more in zip(kinds, self.controls(name), strict=True))

    def controls(self, name: str | None) -> tuple[dict[str, Any], ...]:
        """Arguments of the list of students, of slider and choice of steps, and of the teacher's tick.

        The slider is shown for students that are told their steps, the choice for others. A student whose card cannot
        be read has neither; what is wrong with it is said when it is to draw.
        """
        names = self.desk.names()
        name = name if name in names else next(iter(names), None)
        known, teacher = Steps((1,), False), "unknown"
        try:
            teacher = self.teacher(name)
            known = known if name is None else self.desk.steps(name)
            there = name is not None
        except FewstepError:
            there = False
        counts, last = list(known.counts), known.counts[-1]
        several = known.aware and len(counts) > 1
        ends = {"minimum": counts[0], "maximum": max(last, counts[0] + 1)}
        info = f"trained for {', '.join(map(str, counts))}"
        return (
            {"choices": names, "value": name, "visible": name is not None},
            {**ends, "value": last, "info": info, "visible": there and several},
            {"choices": counts, "value": last, "visible": there and not several},
            {"label": f"Beside its teacher ({teacher})", "visible": name is not None},
        )

    def teacher(self, name: str | None) -> str:
        """The teacher as a reader knows it."""
        source = self.desk.teacher(name)
        return "emoji" if Path(source).name == TEACHER_FOLDER else source

    def _student(self, name: str | None, prompt: str, seed: int, along: float, choice: int | None) -> Drawing | None:
        if name is None:
            return None
        known = self.desk.steps(name)
        steps = known.nearest(along) if known.aware else choice or known.counts[-1]
        return self.desk.by_student(name, prompt, seed, steps)


def _checked(seed: int | None) -> int:
    if seed is None or not 0 <= seed <= _LARGEST_SEED:
        raise FewstepError(f"found seed {seed}, expected 0 to {_LARGEST_SEED}, fix: change it")
    return int(seed)


def draw_tab(page: gr.Blocks, desk: Desk) -> None:
    """Lay out the controls and say what they do."""
    answers = DrawAnswers(desk)
    students, along, counts, tick = answers.controls(None)
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            student = gr.Dropdown(label="Student", **students)
            prompt = gr.Textbox("a 3d frog on a blue background", label="Prompt", lines=2)
            slider = gr.Slider(label="Steps", step=1, **along)
            choice = gr.Radio(label="Steps", **counts)
            with gr.Row():
                seed = gr.Number(0, label="Seed", precision=0, min_width=120)
                another = gr.Button("Another seed", min_width=120)
            with_teacher = gr.Checkbox(True, **tick)
            draw = gr.Button("Draw", variant="primary")
        with gr.Column(scale=3, min_width=300):
            pictures = gr.HTML(pair(None, None, "Press Draw."))
    controls, asked = [student, slider, choice, with_teacher], [student, prompt, seed, slider, choice, with_teacher]
    one: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "device", "show_progress": "minimal"}
    gr.on([draw.click, prompt.submit], answers.both, asked, pictures, api_name="draw", **one)
    gr.on(
        [slider.input, choice.input], answers.student, asked, pictures, api_name="draw_student",
        trigger_mode="always_last", **one,
    )  # fmt: skip
    drawn = another.click(lambda: secrets.randbelow(_LARGEST_SEED), None, seed, api_visibility="private")
    drawn.then(answers.both, asked, pictures, api_visibility="private", **one)
    student.input(answers.choose, student, controls, api_name="choose")
    page.load(answers.choose, student, controls, api_visibility="private")
