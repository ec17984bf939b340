"""Evaluate samplers of the embedded data set against the shipped reference: the teacher's guided 50-step samples."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.data.film_paths import SIDE
from fewstep.embedded.build import JUDGE_FILE, REFERENCE_FILE, shipped
from fewstep.embedded.judge import Judge
from fewstep.embedded.names import EMOJI, name_of
from fewstep.errors import FewstepError
from fewstep.evaluation.scenes import SceneScores, evaluation_captions, judge_features, score_scenes
from fewstep.models.student import Student, load_student
from fewstep.models.teacher import Teacher

REFERENCE_STEPS = 50
REFERENCE_SEED = 9_000_000
"""First noise seed of the reference set; evaluations use others."""
SEEDS_APART = 100_000
"""Distance of the first noise seeds of two evaluation seeds, and the most images of one evaluation."""


@dataclass(frozen=True)
class Evaluated:
    """Scores with what they cost."""

    scores: SceneScores
    calls: int
    """Network calls per image; guided steps count 2."""
    seconds: float
    """Wall time per image on this machine."""


def of_embedded(model: Teacher | Student) -> bool:
    """Whether it is the embedded teacher or a student of it, so that the judge can score it."""
    source = model.backbone.source if isinstance(model, Teacher) else model.card["teacher"]
    return name_of(source) == EMOJI


def of_films(model: Teacher | Student) -> bool:
    """Whether it makes films of the embedded data set at their own size, so that they can be read exactly."""
    backbone = model.backbone
    return backbone.makes_films and (backbone.size["height"], backbone.size["width"]) == (SIDE, SIDE)


def reference_features() -> Tensor:
    """(N, 128) judge features of the shipped reference set."""
    from safetensors.torch import load_file

    return load_file(shipped(REFERENCE_FILE))["features"].float()


def sample_reference(teacher: Teacher, judge: Judge, count: int, report: Callable[[str], None] = print) -> Tensor:
    """Features (count, 128) of the teacher's guided 50-step samples for the evaluation captions; 100 calls an image."""
    captions = [str(c) for c in evaluation_captions(count)]
    parts = []
    for start in range(0, count, 64):
        part = captions[start : start + 64]
        seeds = range(REFERENCE_SEED + start, REFERENCE_SEED + start + len(part))
        parts.append(judge_features(judge, teacher.sample(part, list(seeds), REFERENCE_STEPS))[0])
        report(f"reference {start + len(part)}/{count}")
    return torch.cat(parts)


def evaluate_scenes(
    model: Teacher | Student | str | Path,
    *,
    steps: int | None = None,
    count: int = 256,
    seed: int = 0,
    reference: Tensor | None = None,
    judge: Judge | None = None,
    **more: Any,
) -> Evaluated:
    """Sample `count` images for the evaluation captions and score them; see `api.evaluate`."""
    loaded = load_student(model) if isinstance(model, str | Path) else model
    reference = reference_features() if reference is None else reference
    judge = judge or Judge.load(shipped(JUDGE_FILE))
    if not 16 <= count <= len(reference):
        raise FewstepError(
            f"found count = {count}, expected 16 to {len(reference)}, the size of the reference set, fix: change count"
        )
    captions = evaluation_captions(count)
    first = seed * SEEDS_APART
    start = time.perf_counter()
    images = loaded.sample([str(c) for c in captions], list(range(first, first + count)), steps, **more)
    seconds = (time.perf_counter() - start) / count
    if images.shape[1:] != (3, 64, 64):
        raise FewstepError(
            f"found images of shape {tuple(images.shape[1:])}, expected (3, 64, 64), fix: evaluate the embedded "
            "teacher or a student of it; compare others with `fewstep compare`"
        )
    calls = network_calls(loaded, steps, **more)
    return Evaluated(score_scenes(judge, images, captions, reference), calls, seconds)


def network_calls(model: Teacher | Student, steps: int | None, **more: Any) -> int:
    """Network calls per sample of `model.sample(..., steps, **more)`."""
    if isinstance(model, Teacher):
        return model.calls(steps, more.get("guidance_scale"), more.get("motion_guidance", 0.0))
    return steps or max(model.grids)


def line(name: str, result: Evaluated) -> str:
    """One line of a printed table."""
    s = result.scores
    even = ", ".join(f"{attribute} {value:.2f}" for attribute, value in s.evenness.items())
    return (
        f"{name:<12} calls {result.calls:>3}  frechet {s.frechet:8.3f}  following {100 * s.following:5.1f} %  thing "
        f"{100 * s.thing:5.1f} %  precision {s.precision:.3f}  recall {s.recall:.3f}  contrast "
        f"{s.contrast:.3f}  clipped {100 * s.clipped:4.1f} %  evenness: {even}"
    )


def record(result: Evaluated) -> dict[str, Any]:
    """Everything about an evaluation, for JSON."""
    scores = result.scores
    cost = {"images": scores.images, "calls": result.calls, "seconds": round(result.seconds, 4)}
    return {**cost, **scores.row(), "histograms": scores.histograms}
