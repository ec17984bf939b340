"""`fewstep msd [METHOD] --part K [OPTIONS]`: train one of several students, each for a part of the prompts."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field, make_dataclass

from fewstep.api import RoleOptions, load_teacher
from fewstep.commands.common import choose_device, parse
from fewstep.commands.distill import RunOptions
from fewstep.conditions import TextOptions
from fewstep.data.sources import read_prompts
from fewstep.errors import FewstepError
from fewstep.methods import preset
from fewstep.methods.matching_options import MatchingOptions
from fewstep.several import distill_part
from fewstep.training.folder import noted
from fewstep.training.options import TrainOptions


@dataclass(kw_only=True)
class PartOptions:
    """Which part is trained, and what kind of student."""

    part: int
    """1 to the number of parts. Run the command once for each, on one machine or several."""
    parts: int = 4
    """How many parts the prompts are cut into, contiguous in the space of text embeddings (paper: 4)."""
    depth: float = 1.0
    """Share of the teacher's layers that the student has, in (0, 1]. Half the layers take half the time."""
    width: float = 1.0
    """Share of the teacher's attention heads that the student has, in (0, 1]."""
    adversarial: float = 0.0
    """Weight of the student's adversarial loss in a last stage, 0 for none (DMD2: 1e-3 to 5e-3)."""


def main(arguments: list[str]) -> None:
    """Parse, train one part, say where its student is and how all parts are used."""
    words = ["fewstep", "msd", *arguments]
    method = arguments.pop(0) if arguments and not arguments[0].startswith("-") else "tdm"
    options = preset(method)
    if not isinstance(options, MatchingOptions):
        raise FewstepError(f"found method {method}, expected one of distribution matching, fix: such as tdm or dmd2")
    fields = [("run", RunOptions, field(default_factory=RunOptions)), ("part", PartOptions, field())]
    fields += [(name, kind, field(default_factory=kind)) for name, kind in _SHARED.items()]
    fields.append(("method", type(options), field(default_factory=lambda: options)))
    kind = make_dataclass("Part", fields, kw_only=True)
    kind.__doc__ = f"Train the student of one part of the prompts by {method} (MSD, arXiv 2410.23274)."
    args = parse(kind, f"msd {method}", arguments)
    run, part = args.run, args.part
    with noted(command=lambda: words):
        distill_part(
            load_teacher(run.teacher, device=choose_device(run.device), **run.base, defer=args.roles.shard),
            part.part,
            out=run.out,
            parts=part.parts,
            dm=args.method,
            gan_weight=part.adversarial,
            depth=part.depth,
            width=part.width,
            prompts=read_prompts(run.prompts) if run.prompts else None,
            roles=args.roles,
            train_options=args.train,
            text=args.text,
            resume=run.resume,
        )
    if os.environ.get("RANK", "0") == "0":
        print(f"student of part {part.part}: {run.out}/part-{part.part}/student", file=sys.stderr)
        print(f"when all {part.parts} parts are there: fewstep sample {run.out} ...", file=sys.stderr)


_SHARED = {"roles": RoleOptions, "train": TrainOptions, "text": TextOptions}
