"""What its time grid costs the embedded teacher's own guided steps: `python benchmarks/teacher_grids.py`.

Two questions before a student is trained. A student whose first call is made at t = 0.8 takes pure noise for what the
data would be there; how far even many guided steps from that time stay from the teacher's samples is a floor for
whatever imitates them (`--starts`). And few steps are better at some times than at others (`--grids`). Half a minute a
row of 4 steps on one core.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict

import torch

from fewstep.api import load_teacher
from fewstep.commands.common import quiet
from fewstep.core import grids
from fewstep.evaluation.run import evaluate_scenes


def main() -> None:
    """Print the Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=float, nargs="*", default=[0.8, 0.9, 1.0], help="first times of even grids")
    parser.add_argument("--steps", type=int, nargs="*", default=[8], help="steps of the even grids")
    parser.add_argument("--grids", nargs="*", default=[], help="grids written out, such as 1,0.7,0.4,0.2")
    parser.add_argument("--count", type=int, default=256, help="images per row")
    args = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    teacher = load_teacher("emoji")
    rows = [("even", grids.shifted(steps, 1.0, start)) for start in args.starts for steps in args.steps]
    written = [[float(time) for time in grid.split(",")] for grid in args.grids]
    rows += [(", ".join(f"{time:g}" for time in times), grids.explicit(times)) for times in written]
    print("| first call at | guided steps | times | Fréchet | following | contrast | clipped | background evenness |")
    print("|---" * 8 + "|")
    for times, grid in rows:
        teacher.backbone.teacher_grid = lambda count, grid=grid: grid  # type: ignore[method-assign, misc]
        steps = len(grid) - 1
        s = asdict(evaluate_scenes(teacher, steps=steps, count=args.count).scores)
        print(
            f"| {grid[0]:g} | {steps} | {times} | {s['frechet']:.1f} | {100 * s['following']:.1f} % "
            f"| {s['contrast']:.3f} | {100 * s['clipped']:.1f} % | {s['evenness']['background']:.3f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
