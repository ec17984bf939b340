"""`fewstep distill [METHOD] [OPTIONS]`: train a few-step student."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Literal

import torch

from fewstep.api import EMOJI, STUDENT_FOLDER, RoleOptions, distill, load_teacher
from fewstep.commands.common import choose_device, parse
from fewstep.data.prompts import read_prompts
from fewstep.methods import preset
from fewstep.training.options import TrainOptions


@dataclass(kw_only=True)
class RunOptions:
    """Where a run reads and writes."""

    teacher: str = EMOJI
    """`emoji` (embedded), a diffusers pipeline folder, or a Hub id."""
    out: Path = Path("runs/student")
    """Run folder: log, checkpoints, student. Refused if it holds another run."""
    prompts: Path | None = None
    """Text file with one prompt a line. The embedded teacher has captions of its own."""
    resume: bool = False
    """Continue the run in --out from its newest complete checkpoint."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1`, ..."""
    height: int | None = None
    """Of the teacher's samples in pixels, for families that make several sizes; its pipeline's own unless told."""
    width: int | None = None
    """Likewise."""
    num_frames: int | None = None
    """Frames of the teacher's videos, likewise."""
    base_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the frozen teacher's weights; what is trained is float32."""


def main(arguments: list[str]) -> None:
    """Parse, distil, say where the student is."""
    method = arguments.pop(0) if arguments and not arguments[0].startswith("-") else "tdm"
    options = preset(method)

    parts = {"run": RunOptions, "roles": RoleOptions, "train": TrainOptions}
    fields = [(name, kind, field(default_factory=kind)) for name, kind in parts.items()]
    fields.append(("method", type(options), field(default_factory=lambda: options)))
    kind = make_dataclass("Distill", fields)
    kind.__doc__ = f"Distil a teacher into a few-step student by {method} ({options.build().paper})."
    args = parse(kind, f"distill {method}", arguments)
    run = args.run
    prompts = read_prompts(run.prompts) if run.prompts else None
    teacher = load_teacher(
        run.teacher,
        dtype=getattr(torch, run.base_dtype),
        device=choose_device(run.device),
        height=run.height,
        width=run.width,
        num_frames=run.num_frames,
    )
    distill(
        teacher,
        args.method,
        out=run.out,
        prompts=prompts,
        roles=args.roles,
        train_options=args.train,
        resume=run.resume,
    )
    if os.environ.get("RANK", "0") == "0":
        print(f"student: {run.out / STUDENT_FOLDER}", file=sys.stderr)
