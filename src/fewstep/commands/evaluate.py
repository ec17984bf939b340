"""`fewstep evaluate`: numbers for students and teachers, with intervals."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

from fewstep.api import EMOJI
from fewstep.commands.common import choose_device, guidance, load, parse, sides_of
from fewstep.data.sources import read_prompts
from fewstep.errors import FewstepError
from fewstep.evaluation.film_run import film_captions
from fewstep.evaluation.pictures import replace_file
from fewstep.evaluation.run import of_embedded, of_films
from fewstep.evaluation.scenes import evaluation_captions
from fewstep.evaluation.study import Result, StudyOptions, Subject, study
from fewstep.evaluation.table import quality_curve, quality_table
from fewstep.models.teacher import Teacher
from fewstep.training.folder import AGAIN, room


@dataclass(frozen=True, kw_only=True)
class Evaluate(StudyOptions):
    """Score samples against the teacher's, or against pictures, with 95 % intervals over prompts.

    Samples are kept and never drawn twice. Under torchrun all processes draw, the first one scores.
    """

    student: str = EMOJI
    """A student's folder; or a teacher: `emoji`, `films`, a pipeline folder or a Hub id."""
    teacher: str = ""
    """What to compare with, likewise; the one the student was made from unless told."""
    steps: tuple[int, ...] = ()
    """Step counts to score, such as 1 2 4 8; the model's own unless told."""
    guidance_scale: float | None = None
    """For a teacher in the place of the student only: 1 means none."""
    prompts: str | None = None
    """PATH or PATH:COLUMN (docs/prompts.md); held-out captions where the teacher is an embedded one."""
    count: int = 256
    """Prompts, 6 or more; compare only figures of equal count."""
    out: Path | None = None
    """JSON file for the numbers; beside it .png gets quality against network calls."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, ..."""


def main(arguments: list[str]) -> None:
    """Parse, draw, score, print a table."""
    args = parse(Evaluate, "evaluate", arguments)
    args.validate()
    device = choose_device(args.device)
    model = load(args.student, device)
    guidance(model, args.guidance_scale)
    own = args.prompts is None
    if own and not of_embedded(model) and not of_films(model):
        raise FewstepError(
            f"found no prompts for {args.student}, expected some, since only the embedded teachers have captions of "
            "their own, fix: pass --prompts FILE"
        )
    captions = evaluation_captions(args.count) if own and of_embedded(model) else None
    films = film_captions(args.count) if own and of_films(model) else None
    told = captions or films
    prompts = [str(c) for c in told] if told else list(islice(read_prompts(args.prompts or ""), args.count))
    if isinstance(model, Teacher):
        subject = Subject(model, model.backbone.source)
        steps = args.steps or (model.steps,)
    else:
        subject = Subject(model, args.student)
        steps = args.steps or tuple(sorted(model.grids))
    source = args.teacher or (args.student if isinstance(model, Teacher) else model.card["teacher"])
    teacher: Subject | None = subject
    if source != args.student:
        teacher = Subject(load(source, device, **sides_of(model)), source) if args.needs_teacher else None
    results = study(
        subject, teacher, prompts, steps, args, captions=captions, films=films,
        guidance_scale=args.guidance_scale,
    )  # fmt: skip
    if results is None:
        return
    quality_table(results, f"{args.student}: {len(prompts)} prompts, {args.per_prompt} of each, seed {args.seed}")
    if args.out:
        write_results(args.out, args, results)


def write_results(out: Path, args: Evaluate, results: dict[str, Result]) -> None:
    """The numbers as JSON, and a picture of them beside it."""
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(args).items()}
    rows = {name: result.record() for name, result in results.items()}
    with room(out.parent, AGAIN):
        replace_file(out, (json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n").encode())
        replace_file(out.with_suffix(".png"), quality_curve(results))
