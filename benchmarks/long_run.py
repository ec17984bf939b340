"""Does a long run keep its memory, its open files and its folder as they are?

    python benchmarks/long_run.py --out DIR --iterations 3000                      # the embedded teacher
    python benchmarks/long_run.py --out DIR --iterations 60 --batch 2 --every 5    # a short one
    python benchmarks/long_run.py --out DIR --batch 2 --steps 2 --guidance-scale 2 # options of `fewstep distill tdm`

Starts `fewstep distill tdm` with logs, sample grids, checkpoints and, with `--evaluate-every`, evaluations, and looks
at it from outside every `--every` iterations, half way between two checkpoints: resident memory, open file handles,
and what lies in its folder. At the end it prints slopes by least squares over the second half of the run, where caches
and the allocator have settled. It fails if memory grows by more than `--most` MiB per 1,000 iterations, or handles or
checkpoints grow at all; the log and the grids grow by a line and a picture each time they are written, and no faster.
It also prints how scores went, and what the monitors told. What it saw at each look is kept beside the run, in
DIR.looks.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from fewstep.training.log import read_alarms, read_log

PAGE = os.sysconf("SC_PAGE_SIZE")
NAMES = ("resident MiB", "handles", "checkpoints MiB", "log MiB", "samples MiB")


def usage(process: int, run: Path) -> dict[str, float]:
    """What a process and its run's folder take now."""
    resident = int(Path(f"/proc/{process}/statm").read_text().split()[1]) * PAGE / 2**20
    handles = len(os.listdir(f"/proc/{process}/fd"))
    log = size(run / "log.jsonl") + size(run / "tensorboard")
    numbers = (resident, handles, size(run / "checkpoints"), log, size(run / "samples"))
    return dict(zip(NAMES, numbers, strict=True))


def size(place: Path) -> float:
    """MiB of a file, or of all files of a folder; files may go while they are counted."""
    total = 0
    for path in [place, *place.rglob("*")]:
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue
    return total / 2**20


def reached(log: Path) -> int:
    """The last iteration in a log."""
    lines = log.read_bytes()[-8192:].splitlines() if log.is_file() else []
    whole = [line for line in lines if line.startswith(b"{") and line.endswith(b"}")]
    return int(json.loads(whole[-1])["iteration"]) if whole else 0


def watch(command: list[str], run: Path, every: int) -> list[dict[str, float]]:
    """Runs `command`, and notes what it takes whenever another `every` iterations are in its log.

    Half way between what it does every so often, which takes memory for a moment.
    """
    notes: list[dict[str, float]] = []
    with subprocess.Popen(command) as process:
        while process.poll() is None:
            time.sleep(0.1)
            iteration = reached(run / "log.jsonl")
            if iteration >= (len(notes) + 0.5) * every:
                try:
                    notes.append({"iteration": iteration, **usage(process.pid, run)})
                except (FileNotFoundError, ProcessLookupError):
                    break  # it has just ended
    if process.returncode:
        sys.exit(f"the run ended with {process.returncode}")
    return notes


def slope(notes: list[dict[str, float]], name: str) -> float:
    """Per 1,000 iterations, by least squares."""
    x, y = (torch.tensor([note[key] for note in notes], dtype=torch.float64) for key in ("iteration", name))
    x, y = x - x.mean(), y - y.mean()
    return 1000 * float((x * y).sum() / x.square().sum())


def course(log: Path) -> None:
    """Prints the first, the best and the last evaluation, and alarms by name."""
    evaluated = [record for record in read_log(log) if "evaluate/score" in record]
    if evaluated:
        best = min(evaluated, key=lambda record: record["evaluate/score"] or 0.0)
        print("| evaluation at iteration | score | sharpness | variety |\n|---|---|---|---|")
        for record in (evaluated[0], best, evaluated[-1]):
            told = " | ".join(f"{record[f'evaluate/{name}']:.4g}" for name in ("score", "sharpness", "variety"))
            print(f"| {record['iteration']} | {told} |")
    alarms = [f"{alarm['name']} at {alarm['iteration']}" for alarm in read_alarms(log)]
    print(f"alarms: {', '.join(alarms) or 'none'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--iterations", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--every", type=int, default=50, help="iterations between notes, checkpoints and sample grids")
    parser.add_argument("--evaluate-every", type=int, default=0, help="iterations between evaluations; 0: none")
    parser.add_argument("--most", type=float, default=4.0, help="MiB of memory per 1,000 iterations")
    parser.add_argument("--device", default="cpu")
    told, more = parser.parse_known_args()
    every = str(told.every)
    command = [sys.executable, "-m", "fewstep", "distill", "tdm", "--out", str(told.out), "--device", told.device]
    command += ["--iterations", str(told.iterations), "--batch", str(told.batch), "--log-every", "1"]
    command += ["--checkpoint-every", every, "--sample-every", every, "--evaluate-every", str(told.evaluate_every)]
    command += more
    notes = watch(command, told.out, told.every)
    told.out.with_suffix(".looks.json").write_text(json.dumps(notes, indent=1) + "\n")
    half = notes[len(notes) // 2 :]
    if len(half) < 3:
        sys.exit(f"found {len(notes)} notes, expected 6 or more, fix: more iterations, or a smaller --every")
    print(f"{told.iterations} iterations, batch {told.batch}, {len(notes)} notes, torch {torch.__version__}")
    print("| | first | half way | last | slope of the second half, per 1,000 iterations |")
    print("|---|---|---|---|---|")
    slopes = {name: slope(half, name) for name in NAMES}
    for name in NAMES:
        print(f"| {name} | {notes[0][name]:.4g} | {half[0][name]:.4g} | {notes[-1][name]:.4g} | {slopes[name]:+.3g} |")
    course(told.out / "log.jsonl")
    limits = {"resident MiB": told.most, "handles": 0.0, "checkpoints MiB": 0.5}
    growing = [name for name, limit in limits.items() if slopes[name] > limit]
    if growing:
        sys.exit(f"grows: {', '.join(growing)}")


if __name__ == "__main__":
    main()
