"""A whole evaluation: draw what is missing, then score every step count against the teacher or a set of pictures."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from fewstep.data.films import FilmCaption
from fewstep.data.scenes import Caption
from fewstep.embedded.build import JUDGE_FILE, shipped
from fewstep.embedded.judge import Judge
from fewstep.errors import FewstepError
from fewstep.evaluation.intervals import drawn_counts
from fewstep.evaluation.metrics import K_DENSITY
from fewstep.evaluation.quality import Cost, Measured, Plan, Reference, Row, measure, measure_cost, quality
from fewstep.evaluation.run import REFERENCE_SEED, SEEDS_APART, of_embedded, reference_features
from fewstep.evaluation.samples import SampleSet, fingerprint, read_images
from fewstep.evaluation.scores import load_score
from fewstep.evaluation.spaces import load_space
from fewstep.evaluation.vbench import write_vbench
from fewstep.models.student import Student
from fewstep.models.teacher import Teacher
from fewstep.training.folder import AGAIN, room
from fewstep.training.parallel import Group, process_group

TEACHER = "teacher"
"""The name of the teacher's row and of the usual reference."""


@dataclass(frozen=True, kw_only=True)
class StudyOptions:
    """How to score samples."""

    per_prompt: int = 1
    """Samples per prompt, each with its own seed; 2 or more also measure variety across seeds."""
    seed: int = 0
    """Which noise: seeds begin at 100,000 times this number. The reference has others."""
    spaces: tuple[str, ...] = ("judge",)
    """Feature spaces, `NAME` or `NAME=SOURCE`: judge (embedded scenes only; films have their own),
    clip, dinov2, inception=FILE."""
    scores: tuple[str, ...] = ()
    """Scores of single pictures, `NAME` or `NAME=SOURCE`: clip, pickscore, aesthetic=FOLDER, hpsv2.1=FOLDER."""
    reference: str = TEACHER
    """What distances are to: the `teacher`'s samples for the same prompts and other seeds, or a folder of pictures."""
    paired: bool = False
    """Also draw the teacher's samples from the same noise: their distance, sample by sample, and a row of their own."""
    resamples: int = 200
    """Resamples of the prompts for the intervals; 0: none."""
    samples: Path = Path("runs/samples")
    """Folder of drawn samples, shared by all evaluations; what lies there is not drawn again."""
    vbench: Path | None = None
    """Folder to lay out the videos in as VBench expects them; needs the extra `video`."""

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher may have to be sampled."""
        return self.paired or self.reference == TEACHER

    def validate(self) -> None:
        """FewstepError that names the first option out of range."""
        for name, least in (("per_prompt", 1), ("seed", 0), ("resamples", 0)):
            if getattr(self, name) < least:
                raise FewstepError(
                    f"found {name} = {getattr(self, name)}, expected {least} or more, fix: change --"
                    + name.replace("_", "-")
                )
        if self.reference != TEACHER and not Path(self.reference).is_dir():
            raise FewstepError(
                f"found no folder {self.reference}, expected `{TEACHER}` or one with pictures, fix: check --reference"
            )


@dataclass(frozen=True)
class Subject:
    """A model with the folder or Hub id it came from."""

    model: Teacher | Student
    source: str

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the model's files (`samples.fingerprint`), computed once."""
        return fingerprint(self.source)

    def drawn(self, folder: Path, steps: int, guidance_scale: float | None) -> SampleSet:
        """Its samples with so many steps; guidance is told for teachers."""
        kind = "teacher" if isinstance(self.model, Teacher) else "student"
        told = {"kind": kind, "fingerprint": self.fingerprint, "steps": steps}
        return SampleSet(folder, told | {"guidance_scale": guidance_scale, "size": self.model.backbone.size})


@dataclass(frozen=True)
class Result:
    """One row of a study."""

    steps: int
    row: Row
    cost: Cost

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {"steps": self.steps, **asdict(self.cost), "metrics": {k: asdict(v) for k, v in self.row.items()}}


def study(
    subject: Subject,
    teacher: Subject | None,
    prompts: Sequence[str],
    steps: Sequence[int],
    options: StudyOptions,
    *,
    captions: Sequence[Caption] | None = None,
    films: Sequence[FilmCaption] | None = None,
    guidance_scale: float | None = None,
) -> dict[str, Result] | None:
    """Score `subject` at every step count; None in processes that only helped to draw (torchrun).

    Args:
        subject: the student, or a teacher itself.
        teacher: what it is compared with, at its usual steps and guidance; None where `needs_teacher` says no.
        prompts: P prompts, more than 5.
        steps: step counts.
        options: how.
        captions: what embedded scenes have to show; with them come prompt-following and evenness.
        films: what films of the embedded data set have to show; with them come the exact measures of films, and
            distances in what is read from them.
        guidance_scale: of a subject that is a teacher.

    Costs a sample of the subject for each prompt, seed and step count, and as many of the teacher unless the reference
    is shipped or a folder; once more with `paired`.

    Raises:
        FewstepError: bad options or missing weights, before any work.
    """
    options.validate()
    if films is not None and options.spaces == StudyOptions.spaces:
        options = replace(options, spaces=())  # films have one of their own
    if options.needs_teacher and (teacher is None or not isinstance(teacher.model, Teacher)):
        raise FewstepError("found no teacher to compare with, expected one, fix: pass --teacher, or --reference FOLDER")
    _check(subject, prompts, steps, options, captions if films is None else films)
    if options.reference != TEACHER and films is not None:
        raise FewstepError(
            "found a folder of pictures as the reference of films, expected the teacher, fix: leave --reference out, "
            "or pass --prompts for figures of single frames"
        )
    backbone = subject.model.backbone
    device = backbone.device
    spaces = dict(load_space(spec, device) for spec in options.spaces)
    scores = dict(load_score(spec, device) for spec in options.scores)
    plan = Plan(prompts, options.per_prompt, options.seed * SEEDS_APART)
    others = replace(plan, first_seed=REFERENCE_SEED)
    ships = captions is not None and plan.per_prompt == 1 and set(spaces) == {"judge"}
    wants_teacher = options.reference == TEACHER and not (ships and len(prompts) <= len(reference_features()))

    if isinstance(subject.model, Teacher) and guidance_scale is None:
        guidance_scale = subject.model.guidance_scale
    sets = {count: subject.drawn(options.samples, count, guidance_scale) for count in steps}
    teachers, usual, usual_scale = None, 0, None
    if teacher is not None and isinstance(teacher.model, Teacher) and (wants_teacher or options.paired):
        usual, usual_scale = teacher.model.steps, teacher.model.guidance_scale
        teachers = teacher.drawn(options.samples, usual, usual_scale)
    with room(options.samples, AGAIN), process_group(device) as group:
        for count, drawn in sets.items():
            complete(drawn, subject, count, guidance_scale, plan, group)
        if teacher is not None and teachers is not None:
            for each, wanted in ((others, wants_teacher), (plan, options.paired)):
                if wanted:
                    complete(teachers, teacher, usual, usual_scale, each, group)
    if not group.leads:
        return None

    counts = drawn_counts(len(prompts), options.resamples)
    judge = Judge.load(shipped(JUDGE_FILE)) if captions is not None else None
    shown = [caption for caption in captions or () for _ in range(plan.per_prompt)] or None
    played = [caption for caption in films or () for _ in range(plan.per_prompt)] or None

    def found(samples: SampleSet, which: Plan, partners: SampleSet | None = None) -> Measured:
        beside = partners.read(which.texts, which.seeds) if partners else None
        read = samples.read(which.texts, which.seeds)
        return measure(read, which.texts, spaces, scores, partners=beside, judge=judge, films=played)

    if options.reference != TEACHER:
        reference = Reference(measure(read_images(Path(options.reference)), (), spaces, {}).features, False)
    elif wants_teacher and teachers is not None:
        theirs = measure(teachers.read(others.texts, others.seeds), others.texts, spaces, {}, films=played)
        reference = Reference(theirs.features, True)
    else:
        reference = Reference({"judge": reference_features()[: len(prompts), None]}, True)

    results = {}
    paired = None
    if options.paired and teacher is not None and teachers is not None:
        paired = found(teachers, plan)
        row = quality(paired, counts, reference=reference, captions=shown)
        results[TEACHER] = Result(usual, row, measure_cost(teacher.model, prompts[0], usual))
    for count, drawn in sets.items():
        measured = found(drawn, plan, teachers if paired is not None else None)
        row = quality(measured, counts, reference=reference, paired=paired, captions=shown)
        cost = measure_cost(subject.model, prompts[0], count, guidance_scale)
        results[f"{count} steps"] = Result(count, row, cost)
        if options.vbench is not None:
            videos = (sample for part in drawn.read(plan.texts, plan.seeds, 1) for sample in part)
            write_vbench(options.vbench / f"{count}-steps", zip(plan.texts, videos, strict=True), backbone.frame_rate)
    return results


def _check(
    subject: Subject,
    prompts: Sequence[str],
    steps: Sequence[int],
    options: StudyOptions,
    captions: Sequence[object] | None,
) -> None:
    """Refuses what cannot work, before any work."""
    if len(prompts) <= K_DENSITY:
        raise FewstepError(
            f"found {len(prompts)} prompts, expected more than {K_DENSITY} for nearest neighbours, fix: give more"
        )
    for count in steps:
        known = subject.model.grids if isinstance(subject.model, Student) else None
        if count < 1 or (known is not None and count not in known):
            raise FewstepError(
                f"found steps = {count}, expected {'1 or more' if known is None else f'one of {sorted(known)}'}, "
                "fix: ask for one of these"
            )
    if "judge" in options.spaces and not of_embedded(subject.model):
        raise FewstepError(
            f"found the space judge for {subject.source}, expected one that knows its pictures, since the judge has "
            "only seen the embedded scenes, fix: --spaces dinov2 (or clip, inception=FILE), or --spaces and no name"
        )
    if captions is not None and len(captions) != len(prompts):
        raise FewstepError(f"found {len(captions)} captions for {len(prompts)} prompts, expected one each, fix: match")


def complete(
    samples: SampleSet, subject: Subject, steps: int, guidance_scale: float | None, plan: Plan, group: Group
) -> None:
    """Draws what is missing of a plan, this process's share, and says how far it is."""
    model = subject.model
    more: dict[str, Any] = {"guidance_scale": guidance_scale} if isinstance(model, Teacher) else {}

    def draw(prompts: list[str], seeds: list[int]) -> Tensor:
        return model.sample(prompts, seeds, steps, **more)

    def report(text: str) -> None:
        if group.leads:
            print(f"{Path(subject.source).name}, {steps} steps: {text}", file=sys.stderr, flush=True)

    samples.complete(plan.texts, plan.seeds, draw, model.backbone.sample_batch, group, report)
