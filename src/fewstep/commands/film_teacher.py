"""`fewstep teacher train-video`, `table-video`, `card-video`: build and measure the embedded video teacher."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fewstep.commands.common import choose_device, parse
from fewstep.core.files import load_json
from fewstep.embedded.film_build import FILM_FOLDER, FilmBuildOptions, build_film_teacher
from fewstep.embedded.film_card import write_film_card
from fewstep.embedded.film_teacher import FilmOptions
from fewstep.errors import FewstepError
from fewstep.evaluation.film_run import evaluate_films, film_line, film_record, rendered_scores


@dataclass(kw_only=True)
class TrainVideo:
    """Build the embedded video teacher from nothing in one work folder; run it again to continue."""

    out: Path = Path("runs/video-teacher")
    """Work folder: autoencoder, training state, and in the end the pipeline folder."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`."""
    teacher: FilmOptions = field(default_factory=FilmOptions)
    stages: FilmBuildOptions = field(default_factory=FilmBuildOptions)


@dataclass(kw_only=True)
class TableVideo:
    """Score the video teacher over steps and guidance; for its card. Rendered films are the first row.

    Then once more with tracks and drives told, over the guidance of motion: error in pixels, correlation with a drive.
    """

    teacher: Path = Path("runs/video-teacher") / FILM_FOLDER
    """Its pipeline folder."""
    steps: tuple[int, ...] = (4, 8, 16, 50)
    """Solver steps."""
    scales: tuple[float, ...] = (1.0, 3.0)
    """Guidance scales; 1 means none."""
    motion: tuple[float, ...] = (0.0, 1.5)
    """Motion guidance beside the last of these where tracks and drives are told; 0 means none."""
    frames: int = 24
    """Frames of a film."""
    count: int = 64
    """Films a row."""
    seed: int = 0
    """Seed of the noise."""
    out: Path | None = None
    """JSON file for the numbers."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`."""


@dataclass(kw_only=True)
class CardVideo:
    """Write README.md into the video teacher's folder from its training notes and its table."""

    folder: Path = Path("runs/video-teacher") / FILM_FOLDER
    """Pipeline folder with training.json."""
    table: Path
    """JSON of `fewstep teacher table-video --out`."""


def _train(arguments: list[str]) -> None:
    args = parse(TrainVideo, "teacher train-video", arguments)
    torch.set_num_threads(1)
    print(build_film_teacher(args.out, args.teacher, args.stages, device=str(choose_device(args.device))))


def _table(arguments: list[str]) -> None:
    from fewstep.api import load_teacher

    args = parse(TableVideo, "teacher table-video", arguments)
    teacher = load_teacher(args.teacher, device=choose_device(args.device), num_frames=args.frames)
    result = rendered_scores(args.count, args.frames)
    rows = {"rendered": film_record(result)}
    print(film_line("rendered", result), flush=True)
    settings: list[tuple[str, dict[str, Any]]] = [
        (f"guidance {scale:g}", {"guidance_scale": scale}) for scale in args.scales
    ]
    for motion in args.motion:
        told = {"guidance_scale": args.scales[-1], "motion_guidance": motion, "tracks": True, "drives": True}
        settings.append((f"tracks and drives, motion {motion:g}", told))
    for words, told in settings:
        for steps in args.steps:
            result = evaluate_films(teacher, steps=steps, count=args.count, seed=args.seed, **told)
            name = f"{steps} steps, {words}"
            rows[name] = film_record(result)
            print(film_line(name, result), flush=True)
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1) + "\n")


@contextmanager
def measured(folder: Path, table: Path) -> Iterator[None]:
    """FewstepError in the place of what JSON of another shape raises within, where a card is written."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, StopIteration) as error:
        raise FewstepError(
            f"found {table}, or training.json in {folder}, that cannot be made into a card ({type(error).__name__}: "
            f"{str(error)[:200]}), expected what `fewstep teacher` writes as it trains and measures, fix: measure again"
        ) from error


def _card(arguments: list[str]) -> None:
    args = parse(CardVideo, "teacher card-video", arguments)
    with measured(args.folder, args.table):
        print(write_film_card(args.folder, load_json(args.table)))


FILM_ACTIONS = {"train-video": _train, "table-video": _table, "card-video": _card}
"""Actions of `fewstep teacher`, by name."""
