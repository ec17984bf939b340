"""`fewstep compare A B C ...`: one page that puts teachers and students side by side."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from fewstep.commands.common import choose_device, load, parse
from fewstep.data.sources import read_prompts
from fewstep.errors import FewstepError
from fewstep.evaluation.compare import Entry, compare, default_prompts
from fewstep.models.student import Student
from fewstep.models.teacher import Teacher


@dataclass(kw_only=True)
class Compare:
    """Side by side: the same prompts and seeds for every candidate, with scores and costs; one HTML file and a PNG."""

    candidates: Annotated[tuple[str, ...], tyro.conf.Positional]
    """`SOURCE` or `SOURCE:STEPS`; a source is a student's folder, `emoji`, a pipeline folder or a Hub id."""
    prompts: str | None = None
    """PATH or PATH:COLUMN (docs/prompts.md); held-out captions of the embedded data set unless told."""
    count: int = 12
    """Prompts to show where no file is given."""
    seed: int = 0
    """Seed of the first prompt's picture; the next ones count up."""
    scores: int = 0
    """Images per candidate for the judge's scores (embedded teacher and students of it); 0: none."""
    log: Path | None = None
    """log.jsonl of a run whose curves are shown."""
    out: Path = Path("runs/compare")
    """Folder for compare.html and compare.png."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, ..."""


def main(arguments: list[str]) -> None:
    """Parse, compare, print both paths."""
    args = parse(Compare, "compare", arguments)
    entries = read_entries(args.candidates, choose_device(args.device))
    prompts = list(read_prompts(args.prompts)) if args.prompts else default_prompts(args.count)
    seeds = list(range(args.seed, args.seed + len(prompts)))
    command = " ".join(["fewstep compare", *arguments])
    for path in compare(
        entries, prompts, seeds, args.out, score_count=args.scores, log=args.log, command=command
    ):  # fmt: skip
        print(path)


def read_entries(candidates: tuple[str, ...], device: torch.device) -> list[Entry]:
    """Candidates as a user writes them, each source loaded once."""
    if not candidates:
        raise FewstepError("found no candidate, expected at least one, fix: fewstep compare emoji:50 runs/student:4")
    models: dict[str, Teacher | Student] = {}
    entries = []
    for text in candidates:
        source, _, steps = text.rpartition(":") if text.rpartition(":")[2].isdigit() else (text, "", "")
        if source not in models:
            models[source] = load(source, device)
        model = models[source]
        number = int(steps) if steps else model.steps if isinstance(model, Teacher) else max(model.grids)
        kind = "teacher" if isinstance(model, Teacher) else "student"
        label = f"{kind}, {number} step{'s' if number > 1 else ''}"
        if len({c.rpartition(":")[0] for c in candidates}) > 2:
            label = f"{Path(source).name} {label}"
        entries.append(Entry(label, model, number))
    return entries
