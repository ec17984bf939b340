"""A folder of runs as training leaves them, and some things that must not be shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

ALARM = {
    "name": "critic-lag", "number": "metric/student/critic_lag", "iteration": 30, "since": 11, "value": 1.5,
    "healthy": "at most 1.2", "advice": "raise critic_updates", "action": "warn", "done": "told", "to": 0,
}  # fmt: skip


def write_run(folder: Path, iterations: int, lines: int, method: str = "tdm") -> None:
    """run.json, a log of `lines` lines, and a sample grid every ten iterations."""
    (folder / "samples").mkdir(parents=True)
    settings = {"configuration": {"method": {"name": method}}, "options": {"iterations": iterations}}
    (folder / "run.json").write_text(json.dumps(settings))
    log = [{"iteration": i, "loss/student": 1 / i, "metric/student/normaliser": i} for i in range(1, lines + 1)]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    for iteration in range(10, lines + 1, 10):
        picture = Image.new("RGB", (64, 32), (iteration, 0, 0))
        picture.save(folder / "samples" / f"{iteration:06d}-4-steps.png")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """runs/: a finished run, one in progress with an alarm, one of two phases, and a secret beside it, linked to."""
    runs, secret = tmp_path / "runs", tmp_path / "secret"
    write_run(runs / "done", 20, 20)
    write_run(runs / "going", 100, 30, "<b>dmd2</b>")
    with (runs / "going" / "log.jsonl").open("a") as log:
        log.write(json.dumps({"iteration": 30, "alarm": ALARM}) + "\n" + '{"iteration": 31, "loss/st')
    write_run(runs / "phased" / "phase-1", 10, 10)
    write_run(secret, 10, 10)
    (runs / "linked").symlink_to(secret)
    (runs / "done" / "samples" / "000030-4-steps.png").symlink_to(secret / "samples" / "000010-4-steps.png")
    return runs
