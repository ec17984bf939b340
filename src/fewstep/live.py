"""Student and teacher of a run in progress as something to sample, and the hooks that draw and score them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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

_JUDGED = 256


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


@dataclass(frozen=True)
class Watched:
    """The prompts a run is watched by."""

    drawn: Sequence[str]
    held_out: Sequence[str]
    """Scored against the teacher."""
    judged: Sequence[str]
    """Scored by the judge of the embedded scenes."""


def watched(backbone: Backbone, texts: Sequence[str]) -> Watched:
    """An embedded teacher's held-out captions; for others the first of `texts`. Fewer are drawn of videos."""
    from fewstep.evaluation.compare import default_prompts
    from fewstep.evaluation.film_run import held_out_films
    from fewstep.evaluation.scenes import evaluation_captions

    shown = 4 if len(backbone.latent_shape) == 4 else 16
    if backbone.makes_films:
        return Watched(held_out_films(shown, seed=1), held_out_films(PROMPTS), [])
    if name_of(backbone.source) != EMOJI:
        return Watched(texts[:shown], texts[:PROMPTS], [])
    judged = [str(caption) for caption in evaluation_captions(_JUDGED)]
    return Watched(default_prompts(shown), judged[:PROMPTS], judged)


def usual_hooks(
    seats: Roles,
    options: Options,
    texts: Sequence[str],
    out: Path,
    wants_scores: bool,
    held_out: Sequence[str] | None = None,
) -> Hooks:
    """Sample grids, and scores if they are wanted: against the teacher, and the judge's if it knows the data."""
    from fewstep.evaluation.pictures import save_pictures

    layout = layout_of(options)
    student = LiveStudent(seats, options) if layout is None else LiveCausalStudent(seats, options, layout)
    prompts = watched(student.backbone, texts)

    def draw(iteration: int) -> None:
        for count in student.grids:
            images = student.sample(prompts.drawn, list(range(len(prompts.drawn))), count)
            if leads():
                save_pictures(out / "samples" / f"{iteration:06d}-{count}-steps.png", images)

    teacher = HeldOut(LiveTeacher(seats).sample, held_out or prompts.held_out)

    def score(iteration: int) -> dict[str, float]:
        from fewstep.evaluation.run import evaluate_scenes

        numbers: dict[str, float] = {}
        found: dict[int, dict[str, float]] = {}
        for count in student.grids:
            found[count] = teacher.compare(partial(student.sample, steps=count))
            row = {f"held out {name}": value for name, value in found[count].items()}
            if prompts.judged:
                row |= evaluate_scenes(student, steps=count, count=_JUDGED).scores.row()
            numbers |= {f"{name}, {count} steps": value for name, value in row.items()}
        scored = "frechet" if prompts.judged else "held out distance"
        scores = [numbers[f"{scored}, {count} steps"] for count in student.grids]
        numbers["score"] = sum(scores) / len(scores)
        numbers["sharpness"] = max(each["sharpness"] for each in found.values())
        numbers["variety"] = min(each["variety"] for each in found.values())
        return numbers

    return Hooks(sample=draw, evaluate=score if wants_scores else None)
