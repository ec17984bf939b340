"""MSD: several students, each for a part of the prompts (Song et al., arXiv 2410.23274, ICML 2025).

A few-step student lacks capacity more than anything, and what a picture costs is only the student that makes it. So
the conditions are cut into K parts, a student is trained for each, by itself, and every prompt is sent to the student
of its part. A student may be smaller than the teacher: then it first learns to imitate it (`methods.tsm`), and the
published order is TSM, distribution matching, distribution matching with a discriminator.

This file has the order of stages. Each stage is an ordinary method, each part an ordinary chain of runs
(`fewstep.several`), partition and routing are in `models.router`. Sections are those of the card `msd.md`.

A regression to pairs in the dm stage (preset `dmd`) has those of all parts: conditions are cut, pairs are not (card 2).

When not to use it: where one student has capacity to spare, parts gain nothing (card 8.2), and K parts cost K
trainings. Parts must be contiguous: with random ones each student has as hard a task as one for all (card 8.3).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from fewstep.methods.base import Options
from fewstep.methods.matching_options import MatchingOptions, require
from fewstep.methods.tsm import TSMOptions


@dataclass(frozen=True)
class Stage:
    """One of the runs of a part."""

    name: str
    """"tsm", "dm" or "adm"."""
    options: Options
    keeps_critic: bool = False
    """Its critic goes on from that of the stage before."""


@dataclass(frozen=True)
class Part:
    """What a part was asked for beside its method, as its runs tell it in run.json; of `several.distill_part`."""

    number: int
    """From 1."""
    of: int
    gan_weight: float
    tsm: TSMOptions | None
    depth: float
    width: float
    prompts: dict[str, Any]
    """Count and hash of the prompts of all parts."""


def msd_stages(
    dm: MatchingOptions, *, smaller: bool = False, gan_weight: float = 0.0, tsm: TSMOptions | None = None
) -> tuple[Stage, ...]:
    """The stages of every part, in order: TSM if the student is `smaller`, DM, and ADM if `gan_weight` is above 0.

    Args:
        dm: any method of distribution matching; its own gan_weight is 0.
        smaller: the student is not a copy of the teacher.
        gan_weight: of the last stage, which continues `dm`, student and critic, with a discriminator (DMD2: 1e-3 to
            5e-3). The card has it start from DM's checkpoint and put heads on its fake score; a critic that began as
            the teacher once more would, until it has caught up, leave guidance alone at work.
        tsm: options of the first stage; unless told, the defaults on the time grid of `dm`.
    """
    fix = "set it to 0 (--gan-weight 0), and pass it as the adm stage's (--adversarial; gan_weight of distill_part)"
    require(dm.gan_weight == 0, "gan_weight of the dm stage", dm.gan_weight, "0", fix)
    require(gan_weight >= 0, "gan_weight", gan_weight, "0 or more", "0 leaves the stage out")
    first = Stage("tsm", tsm or TSMOptions(steps=dm.steps, shift=dm.shift))
    last = Stage("adm", replace(dm, gan_weight=gan_weight), keeps_critic=True)
    return (*[first] * smaller, Stage("dm", dm), *[last] * (gan_weight > 0))
