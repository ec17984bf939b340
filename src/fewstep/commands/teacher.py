"""`fewstep teacher ...`: build and measure the embedded teacher."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fewstep.commands.common import choose_device, parse
from fewstep.commands.film_teacher import FILM_ACTIONS, measured
from fewstep.core.files import load_json, read_weights
from fewstep.data.build_sprites import build_sprites
from fewstep.embedded.build import JUDGE_FILE, REFERENCE_FILE, BuildOptions, build_teacher, shipped
from fewstep.embedded.card import write_card
from fewstep.embedded.judge import Judge
from fewstep.embedded.teacher import TeacherOptions
from fewstep.errors import FewstepError
from fewstep.evaluation.run import evaluate_scenes, line, record, reference_features, sample_reference

USAGE = """usage: fewstep teacher ACTION [OPTIONS]

actions:
  train      autoencoder, teacher and judge from nothing; resumable; also under torchrun
  reference  sample the reference set that evaluations compare with (1,024 images, 100 calls each)
  table      scores of the teacher at 1 to 50 steps, with and without guidance
  card       write the model card from what was measured
  sprites    rebuild the sprite sheet from the npm packages
  train-video, table-video, card-video   the same for the video teacher
"""


@dataclass(kw_only=True)
class Train:
    """Build the embedded teacher from nothing in one work folder; run it again to continue."""

    out: Path = Path("runs/teacher")
    """Work folder: parts, training state, and in the end the pipeline folder and the judge."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`."""
    teacher: TeacherOptions = field(default_factory=TeacherOptions)
    stages: BuildOptions = field(default_factory=BuildOptions)


@dataclass(kw_only=True)
class Reference:
    """Sample the reference set: judge features of the teacher's guided 50-step samples for held-out captions."""

    teacher: str = "emoji"
    """`emoji` or a pipeline folder of the same data set."""
    judge: Path | None = None
    """Judge weights; the shipped ones unless told."""
    count: int = 1024
    """Images."""
    out: Path = Path("runs/teacher") / REFERENCE_FILE
    """Safetensors file for the features."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`."""


@dataclass(kw_only=True)
class Table:
    """Score the teacher over steps, with and without guidance; for its card."""

    teacher: str = "emoji"
    """`emoji` or a pipeline folder of the same data set."""
    steps: tuple[int, ...] = (1, 2, 4, 8, 16, 50)
    """Solver steps."""
    scales: tuple[float, ...] = (1.0, 3.5)
    """Guidance scales; 1 means none."""
    count: int = 256
    """Images per row."""
    seed: int = 0
    """Seed of the noise."""
    judge: Path | None = None
    """Judge weights; the shipped ones unless told."""
    reference: Path | None = None
    """Reference features; the shipped ones unless told."""
    out: Path | None = None
    """JSON file for the numbers."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`."""


@dataclass(kw_only=True)
class Card:
    """Write README.md into a teacher's folder from its training notes, its table and the judge's accuracy."""

    folder: Path
    """Pipeline folder with training.json."""
    table: Path
    """JSON of `fewstep teacher table --out`."""
    judge: Path | None = None
    """JSON of the judge's accuracy; the shipped one unless told."""


@dataclass(kw_only=True)
class Sprites:
    """Rebuild the sprite sheet from the npm packages; needs npm and the extra `sprites`."""

    out: Path = Path("sprites.webp")
    """File to write."""


def main(arguments: list[str]) -> None:
    """Dispatch to an action."""
    actions = {
        "train": _train, "reference": _reference, "table": _table, "card": _card, "sprites": _sprites, **FILM_ACTIONS,
    }  # fmt: skip
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return
    if arguments[0] not in actions:
        raise FewstepError(f"found action {arguments[0]!r}, expected one of {', '.join(actions)}, fix: see --help")
    actions[arguments[0]](arguments[1:])


def _train(arguments: list[str]) -> None:
    args = parse(Train, "teacher train", arguments)
    torch.set_num_threads(1)
    folder = build_teacher(args.out, args.teacher, args.stages, device=str(choose_device(args.device)))
    print(folder)


def _judge(path: Path | None) -> Judge:
    return Judge.load(path or shipped(JUDGE_FILE))


def _reference(arguments: list[str]) -> None:
    from safetensors.torch import save_file

    from fewstep.api import load_teacher

    args = parse(Reference, "teacher reference", arguments)
    teacher = load_teacher(args.teacher, device=choose_device(args.device))
    features = sample_reference(teacher, _judge(args.judge), args.count)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_file({"features": features.half()}, args.out)
    print(args.out)


def _table(arguments: list[str]) -> None:
    from fewstep.api import load_teacher

    args = parse(Table, "teacher table", arguments)
    teacher = load_teacher(args.teacher, device=choose_device(args.device))
    reference = read_weights(args.reference)["features"].float() if args.reference else reference_features()
    judge, rows = _judge(args.judge), {}
    for scale in args.scales:
        for steps in args.steps:
            result = evaluate_scenes(
                teacher, steps=steps, count=args.count, seed=args.seed, reference=reference, judge=judge,
                guidance_scale=scale,
            )  # fmt: skip
            name = f"{steps} steps, guidance {scale:g}"
            rows[name] = record(result)
            print(line(name, result), flush=True)
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1) + "\n")


def _card(arguments: list[str]) -> None:
    args = parse(Card, "teacher card", arguments)
    with measured(args.folder, args.table):
        judge = load_json(args.judge or shipped("emoji-judge.json"))["held-out accuracy"]
        print(write_card(args.folder, load_json(args.table), judge))


def _sprites(arguments: list[str]) -> None:
    args = parse(Sprites, "teacher sprites", arguments)
    print(build_sprites(args.out))
