"""The table of TDM runs on the embedded teacher: `python benchmarks/tdm_runs.py --out DIR [--only NAME ...]`.

Every run has the same budget (iterations x batch) and seed; one setting differs from the preset `tdm`. The result of a
run is a JSON file, so an interrupted table continues where it stopped. `--report` prints the Markdown table for
docs/results.md.
"""

from __future__ import annotations

import argparse
import json
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from fewstep.api import RoleOptions, distill, load_teacher
from fewstep.commands.common import choose_device, quiet
from fewstep.evaluation.run import evaluate_scenes, record
from fewstep.methods import preset
from fewstep.training.options import TrainOptions

BASE: dict[str, Any] = {
    "method": {"start_time": 0.8},
    "roles": {"roles": "copies"},
    "train": {"schedule": "cosine"},
}
"""What all runs share unless they say otherwise."""
RUNS: dict[str, dict[str, Any]] = {
    "default": {},
    "first call at 1": {"method": {"start_time": 1.0}},
    "loss on denoised": {"method": {"loss_on": "denoised"}},
    "critic target denoised": {"method": {"critic_target": "denoised"}},
    "tau to T": {"method": {"tau_range": "to_T"}},
    "huber elementwise": {"method": {"metric": "huber_elementwise"}},
    "huber vector, no normaliser": {"method": {"metric": "huber_vector", "huber_c": 0.00054, "normaliser": "none"}},
    "no normaliser": {"method": {"normaliser": "none"}},
    "adapters": {"roles": {"roles": "adapters"}, "train": {"student_rate": 4e-4, "critic_rate": 1.6e-3}},
    "constant rates": {"train": {"schedule": "constant"}},
    "critic updates 3": {"method": {"critic_updates": 3}},
    "guidance 2": {"method": {"guidance_scale": 2.0}},
    "guidance 5": {"method": {"guidance_scale": 5.0}},
    "solver term": {"method": {"solver_weight": 10.0}},
    "paper": {"preset": "tdm-paper"},
    "unify": {"preset": "tdm-unify"},
    "unify, not told K": {"preset": "tdm-unify", "method": {"steps_condition": False}},
    "long": {"times": 5},
    "more guidance than the solver": {
        "method": {
            "start_time": 1.0,
            "solver_weight": 10.0,
            "solver_substeps": 3,
            "guidance_scale": 5.0,
            "solver_guidance": 3.5,
        },
        "train": {"student_rate": 2e-4, "critic_rate": 8e-4},
        "times": 6,
    },
    "solver term, chosen grid": {
        "method": {
            "start_time": 1.0,
            "grid": (1.0, 0.72, 0.42, 0.17),
            "solver_weight": 10.0,
            "solver_substeps": 3,
            "guidance_scale": 4.0,
            "solver_guidance": 3.5,
        },
        "train": {"student_rate": 2e-4, "critic_rate": 8e-4, "ema_decay": 0.995},
        "times": 8,
    },
    "solver term, start at 1, long": {
        "method": {"start_time": 1.0, "solver_weight": 10.0, "solver_substeps": 3},
        "train": {"student_rate": 2e-4, "critic_rate": 8e-4, "ema_decay": 0.995},
        "times": 10,
    },
    "solver term, long": {
        "method": {"solver_weight": 10.0},
        "train": {"student_rate": 2e-4, "critic_rate": 8e-4, "ema_decay": 0.995},
        "times": 12,
    },
}
"""Name -> what differs: "preset", "method" options, "roles", "train" options, "times" the iterations."""


def run(name: str, args: argparse.Namespace) -> None:
    """Train and evaluate one run; its numbers go to OUT/NAME.json."""
    changes: dict[str, Any] = RUNS[name]
    parts = {part: {**shared, **changes.get(part, {})} for part, shared in BASE.items()}
    folder = args.out / name.replace(" ", "-").replace(",", "")
    iterations = args.iterations * changes.get("times", 1)
    train = {
        "iterations": iterations, "batch": args.batch, "seed": args.seed, "log_every": 5, "keep": 1,
        "checkpoint_every": args.iterations, "evaluate_every": max(1, iterations // 4),
        "precision": args.precision,
    }  # fmt: skip
    start = time.perf_counter()
    plain = args.precision == "bf16" and args.device == "cpu"  # fused attention is slow there
    with sdpa_kernel(SDPBackend.MATH) if plain else nullcontext():
        student = distill(
            load_teacher("emoji", device=choose_device(args.device)),
            replace(preset(changes.get("preset", "tdm")), **parts["method"]),  # type: ignore[type-var]
            out=folder,
            roles=RoleOptions(**parts["roles"]),
            train_options=TrainOptions(**{**train, **parts["train"]}),
            resume=True,
        )
    seconds = time.perf_counter() - start
    scores = {steps: record(evaluate_scenes(student, steps=steps, count=args.count)) for steps in sorted(student.grids)}
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    curve = {line["iteration"]: {k: v for k, v in line.items() if k.startswith("evaluate/")} for line in lines}
    curve = {iteration: values for iteration, values in curve.items() if values}
    shared = ("batch", "seed", "device", "precision")
    settings = {"iterations": iterations} | {option: getattr(args, option) for option in shared}
    result = {"name": name, "changes": parts, **settings, "seconds": seconds, "scores": scores, "curve": curve}
    folder.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")


def report(out: Path) -> None:
    """Print the Markdown table."""
    print(
        "| run | steps | iterations | Fréchet | following | recall | contrast | clipped | style evenness "
        "| background evenness | seconds |"
    )
    print("|---" * 11 + "|")
    for name in RUNS:
        path = (out / name.replace(" ", "-").replace(",", "")).with_suffix(".json")
        if not path.exists():
            continue
        result = json.loads(path.read_text())
        for steps, s in result["scores"].items():
            quality = f"{s['frechet']:.2f} | {100 * s['following']:.1f} % | {s['recall']:.3f}"
            look = f"{s['contrast']:.3f} | {100 * s['clipped']:.1f} %"
            variety = f"{s['style evenness']:.2f} | {s['background evenness']:.2f}"
            cost = f"{result['seconds']:.0f}"
            print(f"| {name} | {steps} | {result['iterations']} | {quality} | {look} | {variety} | {cost} |")


def main() -> None:
    """Run what is missing until the time is up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/table"))
    parser.add_argument("--only", nargs="*", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--count", type=int, default=256, help="images per evaluation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="of the networks in training")
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--report", action="store_true")
    args = parser.parse_args()
    if args.report:
        report(args.out)
        return
    quiet()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * args.minutes
    for name in args.only:
        folder = args.out / name.replace(" ", "-").replace(",", "")
        if not folder.with_suffix(".json").exists() and time.monotonic() < end:
            print(f"=== {name}", flush=True)
            run(name, args)


if __name__ == "__main__":
    main()
