"""`fewstep evaluate`: numbers for students and the embedded teacher."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from fewstep.api import EMOJI
from fewstep.commands.common import choose_device, guidance, load, parse
from fewstep.evaluation.run import Evaluated, evaluate_scenes, record
from fewstep.models.teacher import Teacher


@dataclass(kw_only=True)
class Evaluate:
    """Score samples for held-out captions against the teacher's guided 50-step samples (shipped features)."""

    student: str = EMOJI
    """A student's folder, or `emoji` for the teacher itself."""
    steps: tuple[int, ...] = ()
    """Step counts to score; the model's own unless told."""
    guidance_scale: float | None = None
    """For the teacher only: 1 means none."""
    count: int = 256
    """Images per step count, 16 to the size of the reference set; compare only figures of equal count."""
    seed: int = 0
    """Seed of the noise."""
    out: Path | None = None
    """JSON file for the numbers."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, ..."""


def main(arguments: list[str]) -> None:
    """Parse, evaluate, print a table."""
    args = parse(Evaluate, "evaluate", arguments)
    model = load(args.student, choose_device(args.device))
    more = guidance(model, args.guidance_scale)
    rows = {}
    default = (model.steps,) if isinstance(model, Teacher) else tuple(sorted(model.grids))
    for steps in args.steps or default:
        result = evaluate_scenes(model, steps=steps, count=args.count, seed=args.seed, **more)
        rows[f"{steps} steps"] = result
        print(line(f"{steps} steps", result), flush=True)
    if args.out:
        numbers = {name: record(result) for name, result in rows.items()}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(numbers, indent=1) + "\n")


def line(name: str, result: Evaluated) -> str:
    """One line of the printed table."""
    s = result.scores
    even = ", ".join(f"{attribute} {value:.2f}" for attribute, value in s.evenness.items())
    return (
        f"{name:<12} calls {result.calls:>3}  frechet {s.frechet:8.3f}  following {100 * s.following:5.1f} %  thing "
        f"{100 * s.thing:5.1f} %  precision {s.precision:.3f}  recall {s.recall:.3f}  contrast "
        f"{s.contrast:.3f}  clipped {100 * s.clipped:4.1f} %  evenness: {even}"
    )
