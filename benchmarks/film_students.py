"""Few-step students of the film teacher: `python benchmarks/film_students.py --teacher FOLDER --out DIR`.

The teacher (`films`, or the folder of `fewstep teacher train-video`) is distilled by TDM and by DMD2 with an equal
number of network forwards; then the students' 4 calls are scored beside the teacher's 4, 8 and 50 guided steps, and
beside rendered films, which are the best there is. Scores need no network (`fewstep.evaluation.films`); the Fréchet
distance is to the teacher's guided 50 steps from other noise, in what an exact reader finds in films
(`fewstep.evaluation.film_numbers`). Every row is a JSON file, so that an interrupted table goes on where it stopped;
`--report` prints the Markdown table for docs/results.md.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.api import FILMS, defaults, distill, load_teacher
from fewstep.commands.common import choose_device, quiet
from fewstep.data.films import draw_films
from fewstep.evaluation.film_numbers import film_features
from fewstep.evaluation.film_reading import read_films
from fewstep.evaluation.film_run import film_captions
from fewstep.evaluation.films import score_films
from fewstep.evaluation.metrics import frechet_distance
from fewstep.evaluation.pictures import replace_file
from fewstep.evaluation.run import REFERENCE_SEED, network_calls
from fewstep.methods.base import Options
from fewstep.models.student import Student
from fewstep.models.teacher import Teacher
from fewstep.models.videos import video_pixels

STUDENTS: dict[str, dict[str, Any]] = {
    "tdm": {},
    "dmd2": {"guidance_scale": 3.0},
    "dmd2 without GAN": {"preset": "dmd2", "guidance_scale": 3.0, "gan_weight": 0.0},
}
"""Row -> what of the method's preset, with the film recipe, is replaced. Roles and rates are those of TDM's for all."""
TEACHERS = (4, 8, 50)
"""Guided steps of the teacher, two calls each; the last is the reference."""
STEPS = 4
COLUMNS = {
    "calls": ("calls", "{:.0f}"), "frechet": ("Fréchet", "{:.3f}"), "thing": ("thing", "{:.1%}"),
    "motion": ("motion", "{:.1%}"), "background": ("background", "{:.1%}"), "fit": ("fit", "{:.3f}"),
    "same_thing": ("same thing", "{:.1%}"), "amplitude": ("speed", "{:.2f}"), "flicker": ("flicker", "{:.2f}"),
    "background_drift": ("drift of background", "{:.2f}"), "forwards": ("million forwards", "{:.4f}"),
    "train_seconds": ("training, s", "{:.0f}"),
}  # fmt: skip


def file(out: Path, name: str) -> Path:
    return out / f"{name.replace(' ', '-')}.json"


def options_of(name: str, teacher: str) -> Options:
    """The method of a row, at `STEPS` calls."""
    changes = dict(STUDENTS[name])
    options, _, _ = defaults(teacher, changes.pop("preset", name))
    return replace(options, steps=STEPS, **changes)  # type: ignore[call-arg]


def train(name: str, args: argparse.Namespace) -> tuple[Student, dict[str, float]]:
    """The student of a row after about `args.forwards` forwards, and what it cost."""
    options = options_of(name, args.teacher)
    _, roles, told = defaults(args.teacher, "tdm")
    iterations = max(2, round(args.forwards / (options.build().forwards() * args.batch)))
    told = replace(
        told, iterations=iterations, batch=args.batch, seed=args.seed, precision=args.precision, keep=1,
        warmup=min(told.warmup, iterations // 10), sample_every=max(1, iterations // 4), tensorboard=False,
        checkpoint_every=max(1, iterations // 10),
    )  # fmt: skip
    teacher = load_teacher(args.teacher, device=choose_device(args.device), num_frames=args.frames)
    start = time.perf_counter()
    folder = args.out / name.replace(" ", "-")
    student = distill(
        teacher, options, out=folder, roles=roles, train_options=told, resume=(folder / "run.json").exists()
    )
    cost = options.build().forwards() * args.batch * iterations / 1e6
    return student, {"forwards": cost, "train_seconds": time.perf_counter() - start, "iterations": iterations}


def drawn(model: Teacher | Student, steps: int, args: argparse.Namespace, first: int) -> Tensor:
    captions = [str(caption) for caption in film_captions(args.count)]
    return model.sample(captions, list(range(first, first + args.count)), steps)


def features(films: Tensor) -> Tensor:
    return film_features(films, read_films(films))


def score(films: Tensor, reference: Tensor, captions: Any = None) -> dict[str, Any]:
    """Scores of a row of films, for JSON."""
    scores = score_films(films, captions or film_captions(len(films)))
    return {**scores.__dict__, "frechet": frechet_distance(reference, features(films))}


def row(name: str, args: argparse.Namespace, reference: Tensor) -> dict[str, Any]:
    """Train and score, or score the teacher or rendered films."""
    if name == "rendered":
        films = draw_films(range(args.count), frames=args.frames, captions=film_captions(args.count))
        return {"calls": 0, **score(video_pixels(films.pixels), reference)}
    cost: dict[str, float] = {}
    model: Teacher | Student
    if name in STUDENTS:
        model, cost = train(name, args)
        steps = STEPS
    else:
        model = load_teacher(args.teacher, device=choose_device(args.device), num_frames=args.frames)
        steps = int(name.split()[1])
    films = drawn(model, steps, args, 0)
    return {"calls": network_calls(model, steps), **score(films, reference), **cost}


def report(out: Path, names: list[str]) -> None:
    """Print the Markdown table of the rows that are there."""
    print("| row | " + " | ".join(title for title, _ in COLUMNS.values()) + " |")
    print("|---" * (len(COLUMNS) + 1) + "|")
    for name in names:
        if file(out, name).is_file():
            found = json.loads(file(out, name).read_text())["row"]
            cells = [form.format(found[key]) if key in found else "" for key, (_, form) in COLUMNS.items()]
            print(f"| {name} | " + " | ".join(cells) + " |")


def main() -> None:
    """Make what is missing until the time is up, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default=FILMS)
    parser.add_argument("--out", type=Path, default=Path("runs/film-students"))
    parser.add_argument("--only", nargs="*", choices=list(STUDENTS), default=list(STUDENTS))
    parser.add_argument("--forwards", type=float, default=400_000, help="network forwards of films in a training")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--frames", type=int, default=24)
    parser.add_argument("--count", type=int, default=64, help="films per row")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="of the networks in training")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no row is begun after that")
    parser.add_argument("--report", action="store_true")
    args = parser.parse_args()
    names = ["rendered", *(f"teacher, {steps} steps" for steps in TEACHERS), *args.only]
    if not args.report:
        quiet()
        torch.set_num_threads(1)
        args.out.mkdir(parents=True, exist_ok=True)
        begin(names, args)
    report(args.out, names)


def begin(names: list[str], args: argparse.Namespace) -> None:
    """Make the rows that are missing, each whole or not at all."""
    end = time.monotonic() + 60 * args.minutes
    settings = {name: value for name, value in vars(args).items() if name not in ("out", "only", "minutes", "report")}
    kept = args.out / "reference.json"
    if not kept.is_file():
        teacher = load_teacher(args.teacher, device=choose_device(args.device), num_frames=args.frames)
        found = features(drawn(teacher, TEACHERS[-1], args, REFERENCE_SEED)).tolist()
        replace_file(kept, json.dumps({"settings": settings, "features": found}).encode())
    told = json.loads(kept.read_text())
    if told["settings"] != settings:
        changed = sorted(name for name in settings if settings[name] != told["settings"].get(name))
        raise SystemExit(
            f"found {args.out} made with other {', '.join(changed)}, expected the same, fix: another --out"
        )
    for name in names:
        if not file(args.out, name).is_file() and time.monotonic() < end:
            print(f"=== {name}", flush=True)
            content = {"settings": settings, "row": row(name, args, torch.tensor(told["features"]))}
            replace_file(file(args.out, name), (json.dumps(content, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
