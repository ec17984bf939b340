"""What starting below t = 1 costs the embedded teacher's own guided steps: `python benchmarks/start_times.py`.

A student whose first call is made at t = 0.8 takes pure noise for what the data would be there. How far even many
guided steps from that time stay from the teacher's samples is a floor for whatever imitates them. About a minute a row
on one core.
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
    parser.add_argument("--starts", type=float, nargs="*", default=[0.8, 0.9, 1.0])
    parser.add_argument("--steps", type=int, nargs="*", default=[8])
    parser.add_argument("--count", type=int, default=256, help="images per row")
    args = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    teacher = load_teacher("emoji")
    print("| first call at | guided steps | Fréchet | following | contrast | clipped | background evenness |")
    print("|---" * 7 + "|")
    for start in args.starts:
        for steps in args.steps:
            grid = grids.shifted(steps, 1.0, start)
            teacher.backbone.teacher_grid = lambda count, grid=grid: grid  # type: ignore[method-assign, misc]
            s = asdict(evaluate_scenes(teacher, steps=steps, count=args.count).scores)
            print(
                f"| {start:g} | {steps} | {s['frechet']:.1f} | {100 * s['following']:.1f} % | {s['contrast']:.3f} "
                f"| {100 * s['clipped']:.1f} % | {s['evenness']['background']:.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
