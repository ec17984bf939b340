"""Evaluate samplers of films: what they make of held-out captions, in exact measures (`fewstep.evaluation.films`)."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.data.films import FRAMES, FilmCaption, draw_film_caption, draw_films
from fewstep.evaluation.films import FilmScores, score_films
from fewstep.evaluation.run import SEEDS_APART, network_calls
from fewstep.models.student import Student
from fewstep.models.teacher import Teacher
from fewstep.models.videos import video_pixels


@dataclass(frozen=True)
class EvaluatedFilms:
    """Scores with what they cost."""

    scores: FilmScores
    calls: int
    """Network calls per film; guided steps count 2."""
    seconds: float
    """Wall time per film on this machine."""


def film_captions(count: int, seed: int = 0) -> list[FilmCaption]:
    """`count` held-out captions; the same for the same seed."""
    rng = np.random.default_rng([seed, 7])
    return [draw_film_caption(rng, for_evaluation=True) for _ in range(count)]


def held_out_films(count: int, seed: int = 0) -> list[str]:
    """`film_captions` as texts."""
    return [str(caption) for caption in film_captions(count, seed)]


def rendered_scores(count: int = 64, frames: int = FRAMES) -> EvaluatedFilms:
    """What rendered films of the evaluation captions score: the best there is."""
    captions, start = film_captions(count), time.perf_counter()
    films = draw_films(range(count), frames=frames, for_evaluation=True, captions=captions)
    seconds = (time.perf_counter() - start) / count
    scores = score_films(video_pixels(films.pixels), captions, tracks=films.tracks, drives=films.drives)
    return EvaluatedFilms(scores, 0, seconds)


@torch.no_grad()
def evaluate_films(
    model: Teacher | Student,
    *,
    steps: int | None = None,
    count: int = 64,
    seed: int = 0,
    tracks: bool = False,
    drives: bool = False,
    **more: Any,
) -> EvaluatedFilms:
    """Sample `count` films for the evaluation captions and score them; `more` goes to `sample`.

    With `tracks` the model is told where things are to be, and how far it is from there is scored; with `drives`
    likewise how loud they are: those of the rendered films of the same captions.

    Raises:
        FewstepError: the model does not make films of 32x32 pixels.
    """
    captions, first = film_captions(count), seed * SEEDS_APART
    told: dict[str, Tensor] = {}
    if tracks or drives:
        frames = model.backbone.latent_shape[1]
        rendered = draw_films(range(count), frames=frames, for_evaluation=True, captions=captions)
        told = {n: getattr(rendered, n) for n, wanted in (("tracks", tracks), ("drives", drives)) if wanted}
    start = time.perf_counter()
    films = model.sample([str(c) for c in captions], list(range(first, first + count)), steps, **told, **more)
    seconds = (time.perf_counter() - start) / count
    return EvaluatedFilms(score_films(films, captions, **told), network_calls(model, steps, **more), seconds)


def film_line(name: str, result: EvaluatedFilms) -> str:
    """One line of a printed table."""
    s = result.scores
    more = "" if s.error is None else f"  error {s.error:.3f} px"
    more += "" if s.correlation is None else f"  drive {s.correlation:.3f}"
    return (
        f"{name:<22} calls {result.calls:>3}  thing {100 * s.thing:5.1f} %  motion {100 * s.motion:5.1f} %  voice "
        f"{100 * s.voice:5.1f} %  background {100 * s.background:5.1f} %  fit {s.fit:5.3f}  same thing "
        f"{100 * s.same_thing:5.1f} %  speed {s.amplitude:.2f} px  flicker {s.flicker:.2f}  drift of colour "
        f"{s.colour_drift:.2f}, of background {s.background_drift:.2f}{more}"
    )


def film_record(result: EvaluatedFilms) -> dict[str, Any]:
    """Everything about an evaluation, for JSON."""
    return {"calls": result.calls, "seconds": round(result.seconds, 4), **asdict(result.scores)}
