"""What two processes check together: a script calls `make`, a test starts it with `start` and asks `said`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist


def start(script: str, folder: Path) -> None:
    """Run `script FOLDER` in two processes on one thread each; what its checks say is for the tests to look at."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script, str(folder)]
    subprocess.run(command, timeout=1800, env={**os.environ, "OMP_NUM_THREADS": "1"})


def make(checks: Mapping[str, Callable[[Path], None]], folder: Path) -> None:
    """In each process: make the checks in turn; the first that fails is the last."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=300))
    answers: dict[str, str] = {}
    for name, check in checks.items():
        try:
            check(folder)
            answers[name] = "well"
        except Exception:
            answers[name] = traceback.format_exc()
        (folder / f"checks-{dist.get_rank()}.json").write_text(json.dumps(answers))
        if answers[name] != "well":
            os._exit(1)  # the other process waits for this one
    dist.destroy_process_group()


def said(folder: Path, check: str) -> list[str]:
    """What the two said of a check: "well" twice, or what went wrong."""
    answers = [json.loads((folder / f"checks-{rank}.json").read_text()) for rank in (0, 1)]
    return [each.get(check, "was not reached") for each in answers]
