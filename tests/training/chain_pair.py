"""Chains of runs (Phased DMD, MSD) and samples, by one process and by two: what test_chains.py compares.

The two are those of sharded_pair.py, which calls `CHECKS`; FOLDER holds the teacher and what one process has made.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from tiny_pixart import PROMPTS
from torch import Tensor

from fewstep.api import RoleOptions, TextOptions, load_teacher
from fewstep.evaluation.samples import SampleSet
from fewstep.methods import preset
from fewstep.methods.phased import PhasedOptions
from fewstep.models import load_student, seeded_noise
from fewstep.several import distill_part, distill_phases
from fewstep.training.options import TrainOptions
from fewstep.training.parallel import process_group

SETTINGS = TrainOptions(
    iterations=2, batch=4, microbatch=2, log_every=1, tensorboard=False, student_rate=1e-3, critic_rate=1e-3,
    warmup=0, checkpoint_every=1,
)  # fmt: skip
TEXTS = [*PROMPTS, "a blue frog"]
SEEDS = list(range(12))
KEPT = TextOptions(text_encoder="keep")


def roles_of(kind: str, shard: bool) -> RoleOptions:
    """Small adapters, where there are any."""
    roles = RoleOptions(roles=kind, shard=shard)  # type: ignore[arg-type]
    return roles if kind == "copies" else replace(roles, rank=4)


def phased(folder: Path, out: Path, kind: str, *, shard: bool = False, resume: bool = False) -> None:
    """Two experts, for two calls and for one; the sharded one reads the teacher from disk part by part."""
    options = PhasedOptions(steps=3, phase_calls=(2, 1), grid=(1.0, 0.75, 0.5), critic_updates=1)
    distill_phases(
        load_teacher(folder / "pixart", defer=shard), options, out=out, prompts=TEXTS, train_options=SETTINGS,
        roles=roles_of(kind, shard), text=KEPT, resume=resume,
    )  # fmt: skip


def part(folder: Path, out: Path, kind: str, *, shard: bool = False, depth: float = 1.0) -> None:
    """Smaller: TSM, then TDM. Else TDM, then the same with a discriminator and TDM's critic."""
    teacher = load_teacher(folder / "pixart", defer=shard)

    def real(iteration: int, samples: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        backbone = teacher.backbone
        return seeded_noise(samples.tolist(), backbone.latent_shape), backbone.encode(["a frog"] * len(samples))

    distill_part(
        teacher, 1, out=out, parts=2, dm=replace(preset("tdm"), steps=2), gan_weight=0.01 if depth == 1 else 0.0,
        depth=depth, prompts=TEXTS, real=real, roles=roles_of(kind, shard),
        train_options=SETTINGS, text=KEPT,
    )  # fmt: skip


def begun(whole: Path, out: Path) -> Path:
    """A copy of a run of phases as if it had been killed within the second."""
    shutil.copytree(whole, out)
    shutil.rmtree(out / "phase-2" / "checkpoints" / "000002")
    shutil.rmtree(out / "student")
    return out


def sampled(folder: Path, out: Path) -> None:
    """As `fewstep evaluate` draws; the student is the one of one process."""
    student = load_student(folder / "one-phased-adapters" / "student")
    with process_group(student.backbone.device) as group:
        SampleSet(out, {}).complete((TEXTS * 3)[: len(SEEDS)], SEEDS, student.sample, 3, group)


CHECKS: dict[str, Callable[[Path], None]] = {
    "phases": lambda folder: phased(folder, folder / "two-phased-adapters", "adapters"),
    "phases begun by one": lambda folder: phased(folder, folder / "one-then-two-phased", "adapters", resume=True),
    "sharded phases": lambda folder: phased(folder, folder / "two-phased-copies", "copies", shard=True),
    "a part with a smaller student": lambda folder: part(folder, folder / "two-part-mixed", "mixed", depth=0.5),
    "a sharded part": lambda folder: part(folder, folder / "two-part-copies", "copies", shard=True),
    "samples": lambda folder: sampled(folder, folder / "two-samples"),
}


def alone(folder: Path) -> None:
    """What one process makes of the same, and what it begins for two."""
    phased(folder, folder / "one-phased-adapters", "adapters")
    phased(folder, folder / "one-phased-copies", "copies")
    part(folder, folder / "one-part-mixed", "mixed", depth=0.5)
    part(folder, folder / "one-part-copies", "copies")
    sampled(folder, folder / "one-samples")
    begun(folder / "one-phased-adapters", folder / "one-then-two-phased")
