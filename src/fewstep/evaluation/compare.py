"""Teachers and students side by side: the same prompts and seeds, pictures, scores, costs, on one page."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep.data.scenes import ATTRIBUTES
from fewstep.data.things import BACKGROUNDS, PLACEMENTS, STYLES
from fewstep.embedded.build import TABLE_FILE, TEACHER_FOLDER, shipped
from fewstep.errors import FewstepError
from fewstep.evaluation.page import Candidate, write_grid, write_page
from fewstep.evaluation.run import evaluate_scenes, record
from fewstep.evaluation.scenes import evaluation_captions
from fewstep.models.student import Student
from fewstep.models.teacher import Teacher

COSTS = ("images", "calls", "seconds")
"""Keys of a record that are no scores."""
VALUE_LABELS = {"style": list(STYLES), "background": list(BACKGROUNDS), "placement": list(PLACEMENTS)}


@dataclass(frozen=True)
class Entry:
    """One row or column of a comparison: a model at a step count."""

    name: str
    model: Teacher | Student
    steps: int

    @property
    def calls(self) -> int:
        """Network calls per picture."""
        return self.model.calls(self.steps) if isinstance(self.model, Teacher) else self.steps

    @property
    def of_embedded(self) -> bool:
        """Whether it is the embedded teacher or a student of it, so that the judge can score it."""
        source = self.model.backbone.source if isinstance(self.model, Teacher) else self.model.card["teacher"]
        return Path(source) == shipped(TEACHER_FOLDER)


def default_prompts(count: int) -> list[str]:
    """Held-out captions to look at; open ones and precise ones."""
    return [str(caption) for caption in evaluation_captions(count, seed=1)]


def compare(
    entries: Sequence[Entry],
    prompts: Sequence[str],
    seeds: Sequence[int],
    out: Path,
    *,
    score_count: int = 0,
    log: Path | None = None,
    settings: dict[str, Any] | None = None,
    notes: Sequence[str] = (),
    command: str | None = None,
) -> tuple[Path, Path]:
    """Write `out`/compare.html and `out`/compare.png; returns both.

    Args:
        entries: what to compare; the last is the student of the headline, the dearest its reference.
        prompts: one picture each; the same for all.
        seeds: one per prompt.
        out: folder.
        score_count: images per entry for the judge's scores; 0 for none. The guided 50-step teacher's are read from its
            shipped card instead of being sampled again.
        log: a training log whose curves are shown.
        settings: shown folded.
        notes: shown at the end.
        command: how to make the page again.
    """
    if len({entry.name for entry in entries}) < len(entries):
        raise FewstepError(
            f"found {[entry.name for entry in entries]}, expected each candidate once, fix: drop the repeated one"
        )
    candidates, histograms = [], {name: {} for name in ATTRIBUTES if name != "thing"}  # type: ignore[var-annotated]
    for entry in entries:
        entry.model.sample(prompts[:1], seeds[:1], 1 if isinstance(entry.model, Teacher) else entry.steps)  # warm-up
        start = time.perf_counter()
        images = entry.model.sample(prompts, seeds, entry.steps)
        seconds = (time.perf_counter() - start) / len(prompts)
        found = _scores(entry, score_count) if score_count and entry.of_embedded else None
        scores = {k: v for k, v in found.items() if isinstance(v, float)} if found else None
        candidates.append(Candidate(entry.name, images, entry.calls, seconds, scores))
        for attribute, shares in (found or {}).get("histograms", {}).items():
            if attribute in histograms:
                histograms[attribute][entry.name] = shares
    out.mkdir(parents=True, exist_ok=True)
    page = write_page(
        out / "compare.html",
        title="Few steps, side by side",
        subtitle=f"{len(prompts)} prompts, the same seeds for every candidate",
        candidates=candidates,
        prompts=prompts,
        seeds=seeds,
        curves=log,
        histograms=histograms if score_count and any(histograms.values()) else None,
        value_labels=VALUE_LABELS,
        settings=settings or {},
        notes=list(notes),
        command=command,
    )
    return page, write_grid(out / "compare.png", candidates, prompts, min(12, len(prompts)))


def _scores(entry: Entry, count: int) -> dict[str, Any]:
    """The judge's scores: sampled, or from the shipped table where it has this very candidate."""
    if isinstance(entry.model, Teacher):
        row = json.loads(shipped(TABLE_FILE).read_text()).get(
            f"{entry.steps} steps, guidance {entry.model.guidance_scale:g}"
        )
        if row is not None and row["images"] == count:
            return {name: value for name, value in row.items() if name not in COSTS}
    row = record(evaluate_scenes(entry.model, steps=entry.steps, count=count))
    return {name: value for name, value in row.items() if name not in COSTS}
