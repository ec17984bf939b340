"""Student and teacher of a run in progress as something to sample, and the hooks that draw and score them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from torch import Tensor

from fewstep.attention import Layout
from fewstep.core.tensors import Condition
from fewstep.embedded.names import EMOJI, name_of
from fewstep.evaluation.held_out import PROMPTS, HeldOut
from fewstep.methods import Options
from fewstep.methods.self_forcing import layout_of
from fewstep.models.backbone import Backbone
from fewstep.models.roles import Roles
from fewstep.models.student import Student
from fewstep.models.teacher import Teacher
from fewstep.streaming.student import CausalStudent
from fewstep.training.loop import Hooks
from fewstep.training.parallel import leads


class LiveTeacher(Teacher):
    """The teacher of roles in training, as something to sample; sharded ones in all processes at once."""

    def __init__(self, seats: Roles) -> None:
        assert isinstance(seats.backbone, Backbone)
        super().__init__(seats.backbone)
        self._seats = seats

    def _at_hand(self) -> bool:
        return True

    def _call(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self._seats.teacher(x, t, condition)


class LiveStudent(Student):
    """The student of roles in training, as something to sample."""

    def __init__(self, seats: Roles, options: Options) -> None:
        backbone = seats.backbone
        assert isinstance(backbone, Backbone)
        grids = {count: options.time_grid(count) for count in options.counts}
        card = {"teacher": backbone.source}
        super().__init__(backbone, backbone.network, grids, seats.steps_aware, card, options.eta)
        self._seats = seats

    def denoise(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self._seats.student(x, t, condition)


class LiveCausalStudent(CausalStudent):
    """The same for one that makes videos chunk by chunk."""

    def __init__(self, seats: Roles, options: Options, layout: Layout) -> None:
        backbone = seats.backbone
        assert isinstance(backbone, Backbone)
        assert seats.causal is not None
        grids = {count: options.time_grid(count) for count in options.counts}
        card = {"teacher": backbone.source}
        super().__init__(backbone, backbone.network, grids, card, options.eta, layout, seats.causal)
        self._seats = seats

    def denoise(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self._seats.student(x, t, condition)


def usual_hooks(
    seats: Roles,
    options: Options,
    texts: Sequence[str],
    out: Path,
    wants_scores: bool,
    held_out: Sequence[str] | None = None,
) -> Hooks:
    """Sample grids, and scores if they are wanted: against the teacher, and the judge's if it knows the data."""
    from fewstep.evaluation.compare import default_prompts
    from fewstep.evaluation.film_run import held_out_films
    from fewstep.evaluation.pictures import save_pictures
    from fewstep.evaluation.scenes import evaluation_captions

    layout = layout_of(options)
    student = LiveStudent(seats, options) if layout is None else LiveCausalStudent(seats, options, layout)
    embedded, films = name_of(student.backbone.source) == EMOJI, student.backbone.makes_films
    shown = 4 if len(student.backbone.latent_shape) == 4 else 16  # of videos a few
    prompts = default_prompts(shown) if embedded else list(texts[:shown])  # `conditions` knows them
    if films:
        prompts = held_out_films(shown, seed=1)

    def draw(iteration: int) -> None:
        for count in student.grids:
            images = student.sample(prompts, list(range(len(prompts))), count)
            if leads():
                save_pictures(out / "samples" / f"{iteration:06d}-{count}-steps.png", images)

    usual = list(map(str, evaluation_captions(PROMPTS))) if embedded else texts[:PROMPTS]
    if films:
        usual = held_out_films(PROMPTS)
    teacher = HeldOut(LiveTeacher(seats).sample, held_out or usual)

    def score(iteration: int) -> dict[str, float]:
        from fewstep.evaluation.run import evaluate_scenes

        numbers: dict[str, float] = {}
        found: dict[int, dict[str, float]] = {}
        for count in student.grids:
            found[count] = teacher.compare(partial(student.sample, steps=count))
            row = {f"held out {name}": value for name, value in found[count].items()}
            if embedded:
                row |= evaluate_scenes(student, steps=count, count=256).scores.row()
            numbers |= {f"{name}, {count} steps": value for name, value in row.items()}
        scored = "frechet" if embedded else "held out distance"
        scores = [numbers[f"{scored}, {count} steps"] for count in student.grids]
        numbers["score"] = sum(scores) / len(scores)
        numbers["sharpness"] = max(each["sharpness"] for each in found.values())
        numbers["variety"] = min(each["variety"] for each in found.values())
        return numbers

    return Hooks(sample=draw, evaluate=score if wants_scores else None)
