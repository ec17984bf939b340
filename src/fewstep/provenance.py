"""Where a run comes from, as its run.json tells it: what was asked for, on what machine, with which data and papers.

`fewstep.reproducing` reads it. The configuration beside it in run.json is what decides the result; this is what it
takes to ask for it again.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fewstep.data.real import RealImages
from fewstep.embedded.names import name_of
from fewstep.methods.base import Options
from fewstep.models.card import papers
from fewstep.models.teacher import Teacher
from fewstep.training.folder import machine, noted

ORIGIN, DATA, PAPERS = "origin", "data", "papers"
"""Names in run.json."""
OWN = "the embedded teacher's own captions"


def recorded(
    teacher: Teacher,
    options: Options,
    prompts: str | None,
    sizes: Sequence[str],
    given: Sequence[str],
    *,
    start: str | Path | None = None,
    held_out: Sequence[str] | None = None,
    real: object = None,
    **parts: Any,
) -> AbstractContextManager[None]:
    """Runs that begin within tell in run.json where they come from.

    Args:
        teacher: whose files are hashed, once, when a run begins (about a second a GB).
        options: of the method.
        prompts: PATH or PATH:COLUMN, or `OWN`; None where they were passed as texts.
        sizes: as `distill` is told.
        given: names of what was passed in Python and no file holds, such as real data.
        start: the student that this one begins with, whose files are hashed as well.
        held_out: prompts of evaluations, where they are not the first ones of all.
        real: clean data that were passed in Python; of `RealImages` a hash is kept.
        parts: dataclasses of options by name.
    """
    backbone = teacher.backbone

    def origin() -> dict[str, Any]:
        return {
            "teacher": {
                "source": name_of(backbone.source) or _absolute(backbone.source),
                "dtype": _name(getattr(backbone.pipeline, backbone.network_name).dtype),
                "quantised": backbone.quantised,
                "size": backbone.told_size,
                "steps": teacher.steps,
                "guidance_scale": teacher.guidance_scale,
            },
            "method": {"name": options.build().name, **asdict(options)},  # type: ignore[call-overload]
            **{part: _plain(asdict(value)) for part, value in parts.items()},
            "prompts": prompts,
            "sizes": list(sizes),
            "start": None if start is None else _absolute(str(start)),
            "held_out": None if held_out is None else list(held_out),
            "given": list(given),
            "machine": machine(backbone.device),
        }

    def data() -> dict[str, str]:
        of_start = {} if start is None else {"start": digest(start)}
        return {"teacher": teacher_digest(teacher), **of_start, **real_digest(real)}

    return noted(
        origin=origin,
        data=data,
        papers=lambda: papers(options.build().paper),
    )


def teacher_digest(teacher: Teacher) -> str:
    """The `digest` of the teacher's pipeline folder."""
    return digest(teacher.backbone.folder or teacher.backbone.source)


def real_digest(real: object) -> dict[str, str]:
    """{"real": hash} of real data that can be hashed; else nothing."""
    return {"real": real.digest()} if isinstance(real, RealImages) else {}


def digest(folder: str | Path) -> str:
    """A hash of all files of a folder of weights, names and bytes; reads every weight once."""
    from fewstep.evaluation.samples import fingerprint

    return fingerprint(folder)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _absolute(source: str) -> str:
    """A Hub id as it is, a folder in full."""
    return str(Path(source).resolve()) if Path(source).is_dir() else source


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
