"""What several commands share: parsing options, quiet libraries, choosing a device, loading what a user names."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import tyro

from fewstep.errors import FewstepError
from fewstep.models.student import Student, load_student
from fewstep.models.teacher import Teacher

T = TypeVar("T")


def parse(kind: Callable[..., T], command: str, arguments: list[str], default: Any = None) -> T:
    """Options of a command from its dataclass; exits with 2 on an unknown or malformed one."""
    quiet()
    more = {} if default is None else {"default": default}
    return tyro.cli(
        tyro.conf.configure(tyro.conf.OmitArgPrefixes)(kind),
        prog=f"fewstep {command}",
        args=arguments,
        **more,
    )


def quiet() -> None:
    """No notices of the libraries below us; warnings of our own stay."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for name in ("torchao", "bitsandbytes", "torch.utils._pytree", "huggingface_hub.repocard"):  # notices, not errors
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)


def choose_device(name: str) -> torch.device:
    """The device called `name`; "auto" is a GPU if there is one, and each of torchrun's processes has its own."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise FewstepError(f"found device {name!r}, which torch cannot use here ({error}), fix: pass cpu") from error
    return device


def guidance(model: Teacher | Student, scale: float | None, motion: float | None = None) -> dict[str, Any]:
    """The arguments of `sample` for guidance, of text and of motion, that the user may have given.

    Raises:
        FewstepError: guidance for a student.
    """
    if isinstance(model, Teacher):
        return {"guidance_scale": scale} | ({} if motion is None else {"motion_guidance": motion})
    for name, found, none in (("guidance_scale", scale, 1.0), ("motion_guidance", motion, 0.0)):
        if found not in (None, none):
            raise FewstepError(
                f"found {name} {found} for a student, expected none, since guidance is trained into it, "
                "fix: leave it out"
            )
    return {}


def sides_of(model: Teacher | Student) -> dict[str, int]:
    """The size that a student's teacher has to be loaded at, for samples of the same; none for a teacher."""
    return {} if isinstance(model, Teacher) else dict(model.card.get("size") or {})


def load(source: str, device: torch.device, **sides: int) -> Teacher | Student:
    """A student's folder, or that of MSD's parts, a checkpoint of a run, or anything `load_teacher` takes.

    A teacher has its pipeline's size unless `sides` tells another.

    Raises:
        FewstepError: sides for a student.
    """
    from fewstep.api import load_teacher
    from fewstep.checkpoints import is_checkpoint, load_checkpoint
    from fewstep.models.export import CARD
    from fewstep.models.student import ROUTER

    if any((Path(source) / name).is_file() for name in (CARD, ROUTER)) or is_checkpoint(Path(source)):
        if sides:
            raise FewstepError(
                f"found {sides} for a student, expected no size, since it has its teacher's, fix: leave it out"
            )
        return (load_checkpoint if is_checkpoint(Path(source)) else load_student)(Path(source), device=device)
    told: dict[str, Any] = dict(sides)
    return load_teacher(source, device=device, **told)
