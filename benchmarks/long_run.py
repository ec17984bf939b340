"""Does a long run keep its memory, its open files and its folder as they are?

    python benchmarks/long_run.py --out DIR --iterations 3000                 # the embedded teacher; `--resume` goes on
    python benchmarks/long_run.py --out DIR --iterations 60 --batch 2 --every 10   # a short one

Distils the embedded teacher by TDM with logs, samples, evaluations and checkpoints, and notes every `--every` iterations
the resident memory, the open file handles, and the size of everything in the run's folder. At the end it prints
slopes by least squares over the second half, where caches and the allocator have settled, and fails if memory grows by
more than `--most` MiB per 1,000 iterations, if handles grow at all, or if the folder grows by more than its log.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from fewstep.api import RoleOptions, distill, load_teacher
from fewstep.commands.common import choose_device, quiet
from fewstep.methods import preset
from fewstep.training.loop import Hooks
from fewstep.training.options import TrainOptions

PAGE = os.sysconf("SC_PAGE_SIZE")
NOTES = "usage.jsonl"


def usage(folder: Path) -> dict[str, float]:
    """Resident MiB, open handles, MiB of checkpoints and the like, MiB of logs, files."""
    gc.collect()
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * PAGE / 2**20
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != NOTES]
    logs = sum(path.stat().st_size for path in files if "log.jsonl" in path.name or "tensorboard" in path.parts)
    rest = sum(path.stat().st_size for path in files) - logs
    handles = len(os.listdir("/proc/self/fd"))
    return {"resident": resident, "handles": handles, "folder": rest / 2**20, "logs": logs / 2**20, "files": len(files)}


def slope(notes: list[dict[str, float]], name: str) -> float:
    """Per 1,000 iterations, by least squares over the second half of the notes."""
    half = notes[len(notes) // 2 :]
    x = torch.tensor([note["iteration"] for note in half], dtype=torch.float64)
    y = torch.tensor([note[name] for note in half], dtype=torch.float64)
    x, y = x - x.mean(), y - y.mean()
    return 1000 * float((x * y).sum() / x.square().sum())


def run(out: Path, iterations: int, batch: int, every: int, resume: bool, device: str) -> list[dict[str, float]]:
    """The notes of one run, or of its part since it was resumed: each process has memory of its own."""
    teacher = load_teacher(device=choose_device(device))
    notes: list[dict[str, float]] = []

    def note(iteration: int, record: Mapping[str, float]) -> None:
        if iteration % every == 0:
            notes.append({"iteration": iteration, **usage(out)})
            with (out / NOTES).open("a") as file:
                file.write(json.dumps(notes[-1]) + "\n")

    options = TrainOptions(
        iterations=iterations,
        batch=batch,
        log_every=1,
        checkpoint_every=every,
        schedule="cosine",
        warmup=min(10, iterations),
    )
    method = replace(preset("tdm"), start_time=0.8)  # type: ignore[type-var]
    distill(teacher, method, out=out, roles=RoleOptions(), train_options=options, hooks=Hooks(log=note), resume=resume)
    return notes


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--iterations", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--every", type=int, default=50, help="iterations between notes, and between checkpoints")
    parser.add_argument("--most", type=float, default=4.0, help="MiB of memory per 1,000 iterations")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--device", default="cpu")
    told = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    notes = run(told.out, told.iterations, told.batch, told.every, told.resume, told.device)
    if len(notes) < 4:
        sys.exit("found fewer than 4 notes, expected more, fix: more iterations, or a smaller --every")
    names = ("resident", "handles", "folder", "logs", "files")
    print(f"{told.iterations} iterations, batch {told.batch}, {len(notes)} notes")
    print("| | first | last | slope of the second half, per 1,000 iterations |")
    print("|---|---|---|---|")
    slopes = {name: slope(notes, name) for name in names}
    for name in names:
        print(f"| {name} | {notes[0][name]:.4g} | {notes[-1][name]:.4g} | {slopes[name]:+.4g} |")
    growing = [name for name in ("handles", "files") if notes[-1][name] > notes[len(notes) // 2][name]]
    if slopes["resident"] > told.most:
        growing.append("resident")
    if growing:
        sys.exit(f"grows: {', '.join(growing)}")


if __name__ == "__main__":
    main()
