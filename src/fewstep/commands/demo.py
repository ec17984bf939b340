"""`fewstep demo`: the whole promise in minutes, on a laptop without a GPU.

Distils the embedded teacher into one student for 1, 2, 4 and 8 steps and puts it beside its teacher.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from fewstep.api import EMOJI, STUDENT_FOLDER, load_student, load_teacher
from fewstep.commands.common import choose_device, parse
from fewstep.errors import FewstepError
from fewstep.evaluation.compare import Entry, compare, default_prompts
from fewstep.evaluation.run import reference_features
from fewstep.evaluation.scenes import evaluation_captions
from fewstep.evaluation.study import StudyOptions, Subject

SETTINGS = ("--roles", "copies", "--schedule", "cosine", "--start-time", "0.8")
"""What the table of runs chose for the embedded teacher (docs/findings/embedded-students.md)."""


@dataclass(kw_only=True)
class Demo:
    """Distil the embedded teacher by tdm-unify and compare: pictures, numbers, a model folder."""

    out: Path = Path("runs/demo")
    """Run folder; run again to continue an interrupted demo."""
    iterations: int = 150
    """Iterations of the distillation."""
    scores: int = 256
    """Images per candidate for the scores, 16 or more; 0: none."""
    processes: int = 0
    """Training processes; 0: one per core up to two, one on a GPU."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`."""


def main(arguments: list[str]) -> None:
    """Distil, compare, print where everything is."""
    args = parse(Demo, "demo", arguments)
    _validate(args)
    start = time.monotonic()
    device = choose_device(args.device)
    processes = args.processes or (1 if device.type == "cuda" else min(2, os.cpu_count() or 1))
    _say(f"distilling the embedded teacher: {args.iterations} iterations of tdm-unify in {processes} process(es)")
    _distill(args, processes, device)
    _say("sampling teacher and student, and scoring them")
    teacher, student = load_teacher(EMOJI, device=device), load_student(args.out / STUDENT_FOLDER, device=device)
    source = Subject(teacher, teacher.backbone.source)
    distilled = Subject(student, str(args.out / STUDENT_FOLDER))
    entries = [Entry(f"teacher, {steps} steps", source, steps) for steps in (50, 8, 4)]
    entries += [Entry(f"student, {steps} step{'s' * (steps > 1)}", distilled, steps) for steps in (1, 2, 8, 4)]
    written = compare(
        entries,
        default_prompts(12),
        0,
        args.out,
        scored=evaluation_captions(args.scores),
        options=StudyOptions(samples=args.out / "pictures"),
        teacher=source,
        from_table=True,
        runs={args.out.name: args.out / "log.jsonl"},
        notes=[
            "Teacher: the embedded miniature of PixArt-alpha, guided (two network calls a step). Student: TDM-unify, "
            "trained without a single image, no guidance at sampling.",
            "Prompts were held out from the training of teacher and student.",
        ],
        command="fewstep demo",
    )
    assert written is not None  # there is one process
    page, picture = written
    minutes = (time.monotonic() - start) / 60
    print(f"\ndone in {minutes:.1f} minutes")
    print(f"student  {args.out / STUDENT_FOLDER}\npicture  {picture}\npage     {page}")


def _validate(args: Demo) -> None:
    """Refuses what would be found out only when the student is trained."""
    most = len(reference_features())
    if args.scores and not 16 <= args.scores <= most:
        raise FewstepError(f"found scores = {args.scores}, expected 0, or 16 to {most}, fix: change --scores")
    if args.processes < 0:
        raise FewstepError(f"found processes = {args.processes}, expected 0 or more, fix: change --processes")


def _distill(args: Demo, processes: int, device: torch.device) -> None:
    words = [
        "distill", "tdm-unify", "--out", str(args.out), "--iterations", str(args.iterations), "--resume",
        "--checkpoint-every", "25", "--log-every", "1", "--keep", "1", "--device", device.type, *SETTINGS,
    ]  # fmt: skip
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} if processes > 1 else dict(os.environ)
    code = subprocess.run([sys.executable, *launcher, "-m", "fewstep", *words], env=environment, check=False).returncode
    if code in (130, 143):
        raise SystemExit(code)
    if code:
        raise FewstepError(
            f"found that the distillation ended with code {code}, expected 0, fix: see its message above"
        )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
