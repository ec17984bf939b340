"""The averaged student of a checkpoint, to be compared with others of its run.

    load_checkpoint("runs/mine/checkpoints/000500").sample(["a frog"], [0])

A checkpoint holds trained tensors only: the teacher that its run names is loaded again.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fewstep.api import load_teacher
from fewstep.attention.sparse import SparseOptions
from fewstep.errors import FewstepError
from fewstep.live import LiveStudent
from fewstep.methods import METHODS, Options, PhasedOptions
from fewstep.models.roles import build_roles
from fewstep.models.sizes import SizeList
from fewstep.models.student import Student
from fewstep.training.checkpoint import Checkpoint, inspected

_OF_ROLES = ("rank", "alpha", "layers")


def is_checkpoint(folder: Path) -> bool:
    """Whether it looks like a checkpoint's folder, `RUN/checkpoints/000500`."""
    return folder.name.isdecimal() and (folder / "state.json").is_file()


def load_checkpoint(folder: str | Path, *, device: str | torch.device = "cpu") -> Student:
    """The student of a checkpoint: the average where the run kept one. Files are not compared with their checksums.

    Raises:
        FewstepError: no checkpoint, one of a chain of runs (phases, parts), or a teacher that is no longer there.
    """
    folder = Path(folder)
    found = _found(folder)
    told = found.state["configuration"]
    options = _options(told["method"], folder)
    teacher = load_teacher(told["teacher"], device=device, quantised=told.get("quantised"), **told.get("size", {}))
    if told.get("sizes"):
        SizeList(teacher.backbone, told["sizes"], told["train"]["seed"]).first()
    needs = options.build().needs
    seats = build_roles(
        teacher.backbone,
        told["roles"]["roles"],
        **{name: told["roles"][name] for name in _OF_ROLES if name in told["roles"]},
        steps_aware=needs.steps_condition or needs.landing_condition,
        critic=False,
        sparse=SparseOptions(**told["roles"]["sparse"]) if "sparse" in told["roles"] else None,
        seed=told["train"]["seed"],
    )
    seats.load_student_state(found.tensors("ema", device) or found.tensors("student", device))
    student = LiveStudent(seats, options)
    student.card |= {"method": told["method"]["name"], "form": "checkpoint", "iteration": found.iteration}
    student.card |= {"versions": found.state["versions"], "details": told}
    return student


def _found(folder: Path) -> Checkpoint:
    try:
        return inspected(folder.parent, int(folder.name))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise FewstepError(
            f"found no checkpoint at {folder} ({type(error).__name__}: {error}), expected RUN/checkpoints/NUMBER, "
            "fix: check the path"
        ) from error


def _options(told: dict[str, Any], folder: Path) -> Options:
    """The options that the run was trained with."""
    fields = {name: _plain(value) for name, value in told.items() if name != "name"}
    for make in METHODS.values():
        options = make()
        if not isinstance(options, PhasedOptions) and options.build().name == told["name"]:
            return replace(options, **fields)
    raise FewstepError(
        f"found a checkpoint of {told['name']} at {folder}, expected one of a single run, since the others of its "
        "chain belong to the student, fix: compare the finished student"
    )


def _plain(value: Any) -> Any:
    """As it was before JSON: lists are tuples."""
    return tuple(_plain(each) for each in value) if isinstance(value, list) else value
