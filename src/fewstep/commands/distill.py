"""`fewstep distill [METHOD] [OPTIONS]`: train a few-step student."""

from __future__ import annotations

import os
import sys
from copy import copy
from dataclasses import asdict, dataclass, field, make_dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from fewstep.api import BEST_FOLDER, EMOJI, STUDENT_FOLDER, defaults, distill, load_teacher
from fewstep.commands.common import choose_device, parse
from fewstep.conditions import TextOptions
from fewstep.data.sources import read_prompts
from fewstep.errors import FewstepError
from fewstep.models.quantised import PACKAGES
from fewstep.training.folder import noted


@dataclass(kw_only=True)
class RunOptions:
    """Where a run reads and writes."""

    teacher: str = EMOJI
    """`emoji` or `films` (embedded), a diffusers pipeline folder, or a Hub id."""
    out: Path = Path("runs/student")
    """Run folder: log, checkpoints, student. Refused if it holds another run."""
    prompts: str | None = None
    """PATH or PATH:COLUMN of a text, .jsonl, .csv, .parquet or .tar file, or of a folder of them (docs/prompts.md). The
    embedded teacher has captions of its own; `films` are those of the embedded films, with their tracks and drives."""
    resume: bool = False
    """Continue the run in --out from its newest complete checkpoint."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1`, ..."""
    base_dtype: Literal["float32", "bfloat16", "int8", "nf4"] = "float32"
    """Of the frozen teacher's weights; what is trained is float32. int8 (torchao) and nf4 (bitsandbytes, 4 bits) round
    the blocks of a bfloat16 network, for roles of adapters."""

    @property
    def base(self) -> dict[str, Any]:
        """`base_dtype` as arguments of `load_teacher`."""
        if self.base_dtype in PACKAGES:
            return {"dtype": torch.bfloat16, "quantised": self.base_dtype}
        return {"dtype": getattr(torch, self.base_dtype)}


@dataclass(kw_only=True)
class SingleOptions:
    """What a run of one student takes beside."""

    start: Path | None = None
    """Folder of a student whose weights this one begins with, such as that of `causal-init` for `self-forcing`; for
    roles `copies` or `mixed`."""
    held_out: str | None = None
    """Prompts as --prompts, for evaluations: of 16 of them the student's samples are compared with the teacher's. The
    first ones of --prompts unless told."""


@dataclass(kw_only=True)
class SizeOptions:
    """What the teacher and its student make, where the family makes several sizes."""

    height: int | None = None
    """Of the samples in pixels; the teacher's pipeline's own unless told."""
    width: int | None = None
    """Likewise."""
    num_frames: int | None = None
    """Frames of videos, likewise."""
    sizes: tuple[str, ...] = ()
    """Several sizes in the place of these, WIDTHxHEIGHT in pixels (of videos xFRAMES), such as 1024x1024 832x1216: each
    iteration has one of them, and the student is saved at the first."""


def main(arguments: list[str]) -> None:
    """Parse, distil, say where the student is."""
    words = ["fewstep", "distill", *arguments]
    method = arguments.pop(0) if arguments and not arguments[0].startswith("-") else "tdm"
    options, roles, train = defaults(_given(arguments, "--teacher") or EMOJI, method, _given(arguments, "--roles"))

    parts: dict[str, Any] = {
        "run": RunOptions(),
        "single": SingleOptions(),
        "size": SizeOptions(),
        "text": TextOptions(),
        "roles": roles,
        "train": train,
        "method": options,
    }
    fields = [(name, type(part), field(default_factory=partial(copy, part))) for name, part in parts.items()]
    kind = make_dataclass("Distill", fields)
    kind.__doc__ = f"Distil a teacher into a few-step student by {method} ({options.build().paper})."
    args = parse(kind, f"distill {method}", arguments)
    run = args.run
    prompts = None if run.prompts is None else read_prompts(run.prompts)
    size = asdict(args.size)
    sizes = size.pop("sizes")
    if sizes and any(size.values()):
        raise FewstepError(f"found --sizes {sizes} and {size}, expected one or the other, fix: leave one out")
    told = {**run.base, **size, "defer": args.roles.shard}
    teacher = load_teacher(run.teacher, device=choose_device(run.device), **told)
    with noted(command=lambda: words):
        distill(
            teacher,
            args.method,
            out=run.out,
            prompts=prompts,
            start=args.single.start,
            roles=args.roles,
            train_options=args.train,
            text=args.text,
            sizes=sizes,
            held_out=args.single.held_out,
            resume=run.resume,
        )
    if os.environ.get("RANK", "0") == "0":
        print(f"student: {run.out / STUDENT_FOLDER}", file=sys.stderr)
        if (run.out / BEST_FOLDER / STUDENT_FOLDER).is_dir():
            print(f"the best one, by its evaluations: {run.out / BEST_FOLDER / STUDENT_FOLDER}", file=sys.stderr)


def _given(arguments: list[str], name: str) -> str | None:
    """The value of the option `name` among `arguments`: defaults follow from it before the rest is read."""
    for place, word in enumerate(arguments):
        if word == name and place + 1 < len(arguments):
            return arguments[place + 1]
        if word.startswith(f"{name}="):
            return word.removeprefix(f"{name}=")
    return None
