"""`fewstep compare A B C ...`: one page that puts teachers, students and checkpoints side by side."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from fewstep.api import LORA_FOLDER, STUDENT_FOLDER
from fewstep.commands.common import choose_device, load, parse, sides_of
from fewstep.data.films import FilmCaption
from fewstep.data.scenes import Caption
from fewstep.data.sources import read_prompts
from fewstep.errors import FewstepError
from fewstep.evaluation.clips import MOST_FPS
from fewstep.evaluation.compare import Entry, compare, default_prompts
from fewstep.evaluation.film_run import film_captions, held_out_films
from fewstep.evaluation.preferences import preference_table, read_votes
from fewstep.evaluation.run import of_embedded, of_films
from fewstep.evaluation.scenes import evaluation_captions
from fewstep.evaluation.study import StudyOptions, Subject
from fewstep.models.export import CARD
from fewstep.models.teacher import Teacher

SHOWN = 12
"""Captions to look at where nobody gives prompts."""
_ENDING = re.compile(r"(?::(?P<steps>\d+))?(?:@(?P<guidance>\d+(?:\.\d+)?))?$")


@dataclass(kw_only=True)
class Compare:
    """Side by side: the same prompts and seeds for every candidate, with figures, costs, curves and a blind test.

    One HTML file that needs no network, and a PNG. Samples are kept and never drawn twice. With --votes and no
    candidate: the table of what was voted.
    """

    candidates: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """`[NAME=]SOURCE[:STEPS][@GUIDANCE]`; a source is a run, a student's folder, a checkpoint of a run
    (RUN/checkpoints/000500), `emoji`, a pipeline folder or a Hub id; guidance is for teachers."""
    prompts: str | None = None
    """PATH or PATH:COLUMN (docs/prompts.md); held-out captions of the embedded data unless told."""
    count: int | None = None
    """Prompts to show; all of the file, or 12 captions, unless told."""
    seed: int = 0
    """Seed of the first prompt's picture; the next ones count up."""
    scores: int = 0
    """Prompts per candidate for the figures, 6 or more; 0: none. Captions of their own, or the first of --prompts."""
    spaces: tuple[str, ...] = ("judge",)
    """Feature spaces of the figures (docs/evaluation.md): judge (embedded scenes only), dinov2, clip, ...; films of
    the embedded data set have one of their own."""
    fps: int | None = None
    """Frames a second of videos, 1 to 60; unless told, those that the teacher's family is made for."""
    rate: tuple[str, ...] = ()
    """Scores of single pictures, as --scores of `fewstep evaluate`: clip, pickscore, aesthetic=FOLDER."""
    log: tuple[Path, ...] = ()
    """log.jsonl of runs whose curves are shown; those of the students' runs unless told."""
    votes: tuple[Path, ...] = ()
    """Files that the blind test of the page saved: their table is put on the page, or printed without candidates."""
    samples: Path = Path("runs/samples")
    """Folder of drawn samples, shared with `fewstep evaluate`; what lies there is not drawn again."""
    megabytes: float = 100
    """What the pictures on the page may take; larger ones are scaled down."""
    out: Path = Path("runs/compare")
    """Folder for compare.html and compare.png."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, ..."""


def main(arguments: list[str]) -> None:
    """Parse, compare, print both paths; or print the table of votes."""
    args = parse(Compare, "compare", arguments)
    votes = read_votes(args.votes)
    if args.votes and not args.candidates:
        return preference_table(votes)
    _check(args)
    entries = read_entries(args.candidates, choose_device(args.device))
    films = all(of_films(entry.subject.model) for entry in entries)
    prompts, scored = _prompts(args, all(of_embedded(entry.subject.model) for entry in entries), films)
    options = StudyOptions(spaces=args.spaces, scores=args.rate, samples=args.samples)
    written = compare(
        entries,
        prompts,
        args.seed,
        args.out,
        scored=scored,
        options=options,
        teacher=_teacher(entries) if scored else None,
        runs=_runs(args.log, entries),
        votes=votes,
        settings={name: value for name, value in asdict(args).items() if name not in ("candidates", "votes")},
        command=" ".join(["fewstep compare", *arguments]),
        megabytes=args.megabytes,
        fps=args.fps,
    )
    for path in written or ():
        print(path)
    return None


def _check(args: Compare) -> None:
    """Refuses numbers out of range, before any model is loaded."""
    if args.fps is not None and not 1 <= args.fps <= MOST_FPS:
        raise FewstepError(f"found fps = {args.fps}, expected 1 to {MOST_FPS} frames a second, fix: change --fps")
    for name, least in (("count", 1), ("scores", 0), ("seed", 0), ("megabytes", 1)):
        found = getattr(args, name)
        if found is not None and found < least:
            raise FewstepError(f"found {name} = {found}, expected {least} or more, fix: change --{name}")


def _prompts(
    args: Compare, embedded: bool, films: bool
) -> tuple[list[str], list[Caption] | list[FilmCaption] | list[str]]:
    """Prompts to show, and prompts to score."""
    if args.prompts is None and films:
        return held_out_films(args.count or SHOWN, seed=1), film_captions(args.scores)
    if args.prompts is None:
        return default_prompts(args.count or SHOWN), evaluation_captions(args.scores)
    texts = list(islice(read_prompts(args.prompts), max(args.count, args.scores) if args.count else None))
    if films:
        return texts[: args.count], film_captions(args.scores)
    return texts[: args.count], evaluation_captions(args.scores) if embedded else texts[: args.scores]


def read_entries(candidates: tuple[str, ...], device: torch.device) -> list[Entry]:
    """Candidates as a user writes them, each source loaded once."""
    if not candidates:
        raise FewstepError("found no candidate, expected at least one, fix: fewstep compare emoji:50 runs/student:4")
    parsed = [_parse(text) for text in candidates]
    subjects: dict[str, Subject] = {}
    for _, source, _, _ in parsed:
        if source not in subjects:
            model = load(source, device)
            subjects[source] = Subject(model, model.backbone.source if isinstance(model, Teacher) else source)
    entries = []
    for name, source, steps, guidance in parsed:
        model = subjects[source].model
        steps = steps or (model.steps if isinstance(model, Teacher) else max(model.grids))
        alike = [each for each in subjects if isinstance(subjects[each].model, Teacher) == isinstance(model, Teacher)]
        label = name or _label(source, len(alike) > 1, isinstance(model, Teacher), steps, guidance)
        entries.append(Entry(label, subjects[source], steps, guidance))
    return entries


def _parse(text: str) -> tuple[str, str, int | None, float | None]:
    """`[NAME=]SOURCE[:STEPS][@GUIDANCE]` -> its parts; the source is the student's folder where it names a run."""
    ending = _ENDING.search(text)
    assert ending is not None  # it may be empty
    source, name = text[: ending.start()], ""
    if "=" in source and not Path(source).exists():
        name, _, source = source.partition("=")
    for folder in (STUDENT_FOLDER, LORA_FOLDER):
        if (Path(source) / folder / CARD).is_file():
            source = str(Path(source) / folder)
            break
    steps, guidance = ending["steps"], ending["guidance"]
    return name, source, int(steps) if steps else None, float(guidance) if guidance else None


def _label(source: str, told_apart: bool, is_teacher: bool, steps: int, guidance: float | None) -> str:
    words = f"{'teacher' if is_teacher else 'student'}, {steps} step{'s' * (steps > 1)}"
    words += "" if guidance is None else f", guidance {guidance:g}"
    return f"{_short(Path(source))} {words}" if told_apart else words


def _short(source: Path) -> str:
    """What tells a source from others: the run of a student, run and iteration of a checkpoint."""
    if source.name.isdecimal():
        return f"{source.parent.parent.name} at {int(source.name)}"
    return source.parent.name if source.name in (STUDENT_FOLDER, LORA_FOLDER) else source.name


def _teacher(entries: list[Entry]) -> Subject:
    """What figures are relative to: the first teacher among the candidates, else the one the first student names."""
    for entry in entries:
        if isinstance(entry.subject.model, Teacher):
            return entry.subject
    first: Any = entries[0].subject.model
    model = load(first.card["teacher"], first.backbone.device, **sides_of(first))
    return Subject(model, model.backbone.source)


def _runs(logs: tuple[Path, ...], entries: list[Entry]) -> dict[str, Path]:
    """Logs by the names of their runs: those that are told, else those beside students and checkpoints."""
    sources = [Path(entry.subject.source) for entry in entries if not isinstance(entry.subject.model, Teacher)]
    beside = [s.parent.parent if s.name.isdecimal() else s.parent for s in sources]
    found = list(dict.fromkeys(logs or [run / "log.jsonl" for run in beside if (run / "log.jsonl").is_file()]))
    names = [log.absolute().parent.name for log in found]
    return {name if names.count(name) == 1 else str(log.parent): log for name, log in zip(names, found, strict=True)}
