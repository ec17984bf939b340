"""All GPU work that is wanted now, in order of value: `python benchmarks/gpu_round.py --out DIR [--minutes 28]`.

Each part is skipped when its result is already in DIR, and continues where it stopped when it can. Parts:
  1 teacher      the embedded teacher from nothing and long, then its judge, reference and table
  2 runs         the table of TDM runs on the shipped teacher: critic target, tau range, metric, roles, ablations, drift
  3 league       all methods on the shipped teacher at full length: ten times the forwards of the CPU's league
  4 step         time and peak memory of a training step of full-size networks with random weights, against the plan's
  5 sparse       error and time of sparse attention by sparsity, at the token counts of Wan2.1-1.3B and CogVideoX-5B
Everything it writes is text, safetensors and PNG.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

PARTS = ("teacher", "runs", "league", "step", "sparse")
CONTINUED = ("runs", "league", "step")
"""Parts that know themselves what is left to do, and are called in every round."""
PROCESSES = 4
"""That share the league: its networks are too small for one process to fill a GPU."""


def fewstep(*words: str, limit: float) -> int:
    """Run a fewstep command for at most `limit` seconds; SIGTERM then, so that it saves where it stands."""
    print("$ fewstep", *words, flush=True)
    process = subprocess.Popen([sys.executable, "-m", "fewstep", *words])
    try:
        return process.wait(timeout=limit)
    except subprocess.TimeoutExpired:
        process.terminate()
        return process.wait()


def teacher(out: Path, limit: float) -> None:
    """The embedded teacher, long enough to be clearly good; the whole state stays in `out`/teacher."""
    work = out / "teacher"
    code = fewstep(
        "teacher", "train", "--out", str(work), "--device", "cuda", "--iterations", "40000", "--batch", "256",
        "--autoencoder-iterations", "6000", "--judge-iterations", "4000", limit=limit,
    )  # fmt: skip
    if code:
        return
    parts = [
        "--teacher",
        str(work / "emoji-teacher"),
        "--judge",
        str(work / "emoji-judge.safetensors"),
        "--device",
        "cuda",
    ]
    reference = work / "emoji-reference.safetensors"
    fewstep("teacher", "reference", *parts, "--out", str(reference), limit=limit)
    fewstep(
        "teacher", "table", *parts, "--reference", str(reference), "--out", str(work / "emoji-table.json"), limit=limit
    )


def runs(out: Path, limit: float) -> None:
    """The table of runs on the shipped teacher, the long run among them."""
    script = Path(__file__).parent / "tdm_runs.py"
    words = ["--out", out / "runs", "--device", "cuda", "--iterations", "400", "--minutes", str(limit / 60)]
    subprocess.run([sys.executable, script, *words], check=False)


def league(out: Path, limit: float) -> None:
    """All methods at an equal budget, cell by cell; what a kill interrupts goes on in the next round."""
    words = ["league", "emoji", "--out", str(out / "league"), "--device", "cuda", "--forwards", "7750"]
    command = [sys.executable, "-m", "fewstep", *words, "--minutes", f"{limit / 60:.2f}"]
    print("$", *command, f"(in {PROCESSES} processes)", flush=True)
    end, running = time.monotonic() + limit, [subprocess.Popen(command) for _ in range(PROCESSES)]
    for process in running:
        try:
            process.wait(timeout=max(1.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.terminate()
            process.wait()


def step(out: Path, limit: float) -> None:
    """Full-size networks, adapters and copies, row by row for at most ten minutes; rows that are there are kept."""
    script, end = Path(__file__).parent / "training_step.py", time.monotonic() + min(limit, 600)
    common = ["--device", "cuda", "--precision", "bf16", "--base-dtype", "bfloat16", "--iterations", "3"]
    for names, batch, more in (
        (("pixart-512", "pixart-1024", "sd3-m"), 8, ()),
        (("sdxl", "cogvideox-2b", "wan-1.3b"), 2, ("--checkpointing",)),
    ):
        words = [*names, *common, "--batch", str(batch), *more, "--out", str(out / "steps.json")]
        minutes = max(0.0, end - time.monotonic()) / 60
        subprocess.run([sys.executable, script, *words, "--minutes", f"{minutes:.2f}"], check=False)


def sparse(out: Path, limit: float) -> None:
    """FlexAttention over chosen blocks against dense attention; minutes, most of them of compiling."""
    script = Path(__file__).parent / "sparse_attention.py"
    words = ["--device", "cuda", "--sizes", "wan-1.3b", "cogvideox-5b", "--out", str(out / "sparse.json")]
    subprocess.run([sys.executable, script, *words], check=False)


def main() -> None:
    """Run what is not done yet until the time is up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=28.0)
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    end, done_file = time.monotonic() + 60 * args.minutes, args.out / "done.json"
    done = json.loads(done_file.read_text()) if done_file.exists() else []
    work = {"teacher": teacher, "runs": runs, "league": league, "step": step, "sparse": sparse}
    for name in args.parts:
        left = end - time.monotonic()
        if name in done or left < 60:
            continue
        work[name](args.out, left)
        if name not in CONTINUED:
            done.append(name)
            done_file.write_text(json.dumps(done))


if __name__ == "__main__":
    main()
