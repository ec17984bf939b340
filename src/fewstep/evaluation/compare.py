"""Teachers, students and checkpoints side by side: the same prompts and seeds, figures, costs, on one page.

All samples lie in a folder and are drawn once (`samples.py`): a comparison that was killed goes on, and a candidate
more draws only its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fewstep.data.films import FilmCaption
from fewstep.data.scenes import ATTRIBUTES, Caption
from fewstep.data.things import BACKGROUNDS, PLACEMENTS, STYLES
from fewstep.embedded.build import JUDGE_FILE, TABLE_FILE, shipped
from fewstep.embedded.judge import Judge
from fewstep.errors import FewstepError
from fewstep.evaluation.intervals import Estimate
from fewstep.evaluation.page import Candidate, write_grid, write_page
from fewstep.evaluation.preferences import Vote
from fewstep.evaluation.quality import Plan, measure_cost
from fewstep.evaluation.run import of_embedded
from fewstep.evaluation.samples import SampleSet, read_sample
from fewstep.evaluation.scenes import evaluation_captions, histogram, judge_features
from fewstep.evaluation.study import StudyOptions, Subject, complete, study
from fewstep.models.student import Student
from fewstep.models.teacher import Teacher
from fewstep.training.parallel import process_group

VALUE_LABELS = {"style": list(STYLES), "background": list(BACKGROUNDS), "placement": list(PLACEMENTS)}
_OPEN = tuple(name for name in ATTRIBUTES if name != "thing")
_IN_TABLE = {"frechet": "frechet/judge", "precision": "precision/judge", "recall": "recall/judge"}
"""Figures of the shipped table by the names that a study gives them."""


@dataclass(frozen=True)
class Entry:
    """One candidate: a model at a step count, and a guidance scale where it is a teacher."""

    name: str
    subject: Subject
    steps: int
    guidance_scale: float | None = None
    """A teacher's own unless told."""

    @property
    def scale(self) -> float | None:
        """The guidance scale in force; None for students."""
        model = self.subject.model
        if not isinstance(model, Teacher):
            return None
        return model.guidance_scale if self.guidance_scale is None else self.guidance_scale

    @property
    def calls(self) -> int:
        """Network calls per sample."""
        model = self.subject.model
        return model.calls(self.steps, self.scale) if isinstance(model, Teacher) else self.steps

    def settings(self) -> dict[str, Any]:
        """Everything that is known about it, for the page."""
        model, backbone = self.subject.model, self.subject.model.backbone
        told: dict[str, Any] = {"source": self.subject.source, "fingerprint": self.subject.fingerprint}
        told |= {"family": type(backbone).__name__, "size": backbone.size, "steps": self.steps}
        if isinstance(model, Teacher):
            return told | {"guidance scale": self.scale, "solver": "ddim", "times": _times(backbone, self.steps)}
        times = [round(float(t), 4) for t in model.grids[self.steps]]
        return told | {"times": times, **{name: value for name, value in model.card.items() if name != "grids"}}


class Kept:
    """Samples of a set, each read from its file when it is asked for; see `pictures.Pictures`."""

    def __init__(self, samples: SampleSet, prompts: Sequence[str], seeds: Sequence[int]) -> None:
        self._paths = [samples.path(*one) for one in zip(prompts, seeds, strict=True)]

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int, /) -> Tensor:
        return read_sample(self._paths[index])


def default_prompts(count: int) -> list[str]:
    """Held-out captions to look at; open ones and precise ones."""
    return [str(caption) for caption in evaluation_captions(count, seed=1)]


def compare(
    entries: Sequence[Entry],
    prompts: Sequence[str],
    first_seed: int,
    out: Path,
    *,
    scored: Sequence[Caption] | Sequence[FilmCaption] | Sequence[str] = (),
    options: StudyOptions | None = None,
    teacher: Subject | None = None,
    from_table: bool = False,
    runs: Mapping[str, Path] | None = None,
    votes: Sequence[Vote] = (),
    settings: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
    command: str | None = None,
    megabytes: float = 100,
    fps: int | None = None,
) -> tuple[Path, Path] | None:
    """Write `out`/compare.html and `out`/compare.png; None in processes that only helped to draw (torchrun).

    Args:
        entries: what to compare; the last is the student of the headline, the dearest its reference.
        prompts: one sample each; the same for all.
        first_seed: of the first prompt's sample; the next ones count up.
        out: folder.
        scored: prompts of the figures, captions of embedded scenes or films, or texts; none for no figures.
        options: how to score (`study.study`), and where samples are kept.
        teacher: what figures are relative to.
        from_table: take the embedded teacher's figures from the table that is shipped, without intervals, where it has
            them, rather than draw it (100 calls a sample at 50 steps).
        runs: training logs whose curves are shown, by the names of their runs.
        votes: answers of the page's blind test, whose table is shown.
        settings: shown folded, beside those of each candidate.
        notes: shown at the end.
        command: how to make the page again.
        megabytes: what the pictures on the page may take; larger ones are scaled down (`page_pictures.Form`).
        fps: frames a second of videos, for all candidates; of the first one's family unless told.

    Costs one sample of each entry per prompt, seed and scored prompt, less what was drawn before, and four to measure
    time.

    Raises:
        FewstepError: names that repeat, steps a student has not, settings of `study`: before any work.
    """
    options = options or StudyOptions()
    _check(entries, votes)
    seeds = list(range(first_seed, first_seed + len(prompts)))
    captions = [each for each in scored if isinstance(each, Caption)]
    candidates, histograms = [], {name: {} for name in _OPEN}  # type: ignore[var-annotated]
    with process_group(entries[0].subject.model.backbone.device) as group:
        drawn = {}
        for entry in entries:
            drawn[entry.name] = entry.subject.drawn(options.samples, entry.steps, entry.scale)
            plan = Plan(prompts, 1, first_seed)
            complete(drawn[entry.name], entry.subject, entry.steps, entry.scale, plan, group)
        for entry in entries:
            found = _from_table(entry, len(scored)) if from_table and scored else None
            if found is None and scored:
                found = _scored(entry, scored, captions, options, teacher)
            if not group.leads:
                continue
            figures, shares = found or ({}, {})
            for attribute, values in shares.items():
                histograms[attribute][entry.name] = values
            seconds = measure_cost(entry.subject.model, prompts[0], entry.steps, entry.scale).seconds
            kept = Kept(drawn[entry.name], prompts, seeds)
            rate = fps or entries[0].subject.model.backbone.frame_rate
            candidates.append(Candidate(entry.name, kept, entry.calls, seconds, figures, entry.settings(), rate))
    if not candidates:
        return None
    page = write_page(
        out / "compare.html",
        title="Few steps, side by side",
        subtitle=f"{len(prompts)} prompts, the same seeds for every candidate",
        candidates=candidates,
        prompts=prompts,
        seeds=seeds,
        runs=runs or {},
        histograms={name: by_name for name, by_name in histograms.items() if by_name},
        value_labels=VALUE_LABELS,
        votes=votes,
        settings=settings or {},
        notes=[*notes, *_how_scored(scored, options)],
        command=command,
        megabytes=megabytes,
    )
    return page, write_grid(out / "compare.png", candidates, prompts, min(12, len(prompts)))


def _check(entries: Sequence[Entry], votes: Sequence[Vote]) -> None:
    """Refuses what cannot work, before any work."""
    names = [entry.name for entry in entries]
    if len(set(names)) < len(names):
        raise FewstepError(f"found {names}, expected each candidate once, fix: drop the repeated one, or name it NAME=")
    for entry in entries:
        model = entry.subject.model
        if isinstance(model, Student) and entry.steps not in model.grids:
            raise FewstepError(
                f"found {entry.steps} steps for {entry.name!r}, expected one of {sorted(model.grids)} (what this "
                "student was trained for), fix: ask for one of these"
            )
        if entry.steps < 1 or (isinstance(model, Student) and entry.guidance_scale is not None):
            raise FewstepError(
                f"found {entry.steps} steps and guidance {entry.guidance_scale} for {entry.name!r}, expected 1 step or "
                "more, and guidance for teachers only, fix: change the candidate"
            )
    if unknown := sorted({name for vote in votes for name in (vote.a, vote.b)} - set(names)):
        raise FewstepError(
            f"found votes on {unknown}, expected votes on {names}, fix: pass the candidates (and names) of the page "
            "that was voted on"
        )


def _scored(
    entry: Entry,
    scored: Sequence[Caption] | Sequence[FilmCaption] | Sequence[str],
    captions: list[Caption],
    options: StudyOptions,
    teacher: Subject | None,
) -> tuple[dict[str, Estimate], dict[str, list[float]]] | None:
    """Figures with intervals, and shares of the attributes that captions leave open."""
    texts = [str(each) for each in scored]
    films = [each for each in scored if isinstance(each, FilmCaption)]
    results = study(
        entry.subject, teacher, texts, (entry.steps,), replace(options, paired=False),
        captions=captions or None, films=films or None, guidance_scale=entry.scale,
    )  # fmt: skip
    if results is None:
        return None
    shares: dict[str, list[float]] = {}
    if captions:
        plan = Plan(texts, options.per_prompt)
        drawn = entry.subject.drawn(options.samples, entry.steps, entry.scale)
        judge = Judge.load(shipped(JUDGE_FILE))
        named = np.concatenate([judge_features(judge, part)[1] for part in drawn.read(plan.texts, plan.seeds)])
        of_each = [caption for caption in captions for _ in range(options.per_prompt)]
        shares = {name: histogram(named[:, ATTRIBUTES.index(name)], of_each, name) for name in _OPEN}
    (result,) = results.values()
    return result.row, shares


def _from_table(entry: Entry, count: int) -> tuple[dict[str, Estimate], dict[str, list[float]]] | None:
    """The embedded teacher's figures where the shipped table has this very candidate at this number of samples."""
    if not isinstance(entry.subject.model, Teacher) or not of_embedded(entry.subject.model):
        return None
    row = json.loads(shipped(TABLE_FILE).read_text()).get(f"{entry.steps} steps, guidance {entry.scale:g}")
    if row is None or row["images"] != count:
        return None
    figures = {_IN_TABLE.get(name, name): value for name, value in row.items() if name in {*_IN_TABLE, "following"}}
    figures |= {"thing": row["thing"], **{f"evenness/{name}": row[f"{name} evenness"] for name in _OPEN}}
    shares = {name: values for name, values in row["histograms"].items() if name in _OPEN}
    return {name: Estimate(value) for name, value in figures.items()}, shares


def _how_scored(scored: Sequence[object], options: StudyOptions) -> list[str]:
    """A note on what the figures are."""
    if not scored:
        return []
    intervals = "brackets are 95 % intervals over prompts (bootstrap)" if options.resamples else "without intervals"
    return [
        f"Figures are of {len(scored)} prompts, {options.per_prompt} of each; {intervals}. Distances are to the "
        "teacher's samples for the same prompts and other seeds; compare figures of equal numbers of samples only."
    ]


def _times(backbone: Any, steps: int) -> list[float]:
    return [round(float(t), 4) for t in backbone.teacher_grid(steps)]
