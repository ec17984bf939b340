"""A run that is killed again and again ends where an undisturbed one does, to the last bit."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import training_toy as toy

from fewstep.errors import FewstepError
from fewstep.training import checkpoint
from fewstep.training.log import read_log

_PROCESSES = multiprocessing.get_context("forkserver")
# Children need not import these anew.
_PROCESSES.set_forkserver_preload(["pytest", "torch._dynamo", "fewstep.training.loop"])
_FILE_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")  # audit events just before the act
_ITERATIONS = 14


def _run(out: Path, die_after: int | None = None) -> None:
    """In a child: continue the run; SIGKILL oneself just before the file operation number `die_after` in its folder."""
    if die_after is not None:
        left = die_after

        def count(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal left
            if event in _FILE_EVENTS and str(arguments[0]).startswith(str(out)):
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
    toy.run(out, resume=True, iterations=_ITERATIONS)


def _start(out: Path, die_after: int | None = None) -> Any:
    process = _PROCESSES.Process(target=_run, args=(out, die_after))
    process.start()
    return process


def _outcome(out: Path) -> tuple[dict[str, bytes], list[dict[str, Any]]]:
    """Every byte of the last checkpoint, and the log without times and memory."""
    last = out / "checkpoints" / f"{_ITERATIONS:06d}"
    lines = [
        {name: value for name, value in record.items() if not name.startswith(("time/", "memory/"))}
        for record in read_log(out / "log.jsonl")
    ]
    return {p.name: p.read_bytes() for p in last.iterdir()}, lines


def _require_whole(out: Path) -> None:
    """What looks like a checkpoint is one, also where a kill came while it was written."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checkpoint.newest(out / "checkpoints")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], list[dict[str, Any]], float]:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    warm_up = _PROCESSES.Process(target=int)  # starts the server, which takes longer than a run
    warm_up.start()
    warm_up.join(60)
    begin = time.perf_counter()
    process = _start(out)
    process.join(60)
    assert process.exitcode == 0
    files, lines = _outcome(out)
    assert len(files) == 7  # student, critic, ema, two optimisers, state, manifest
    assert len(lines) == _ITERATIONS / 2
    return files, lines, time.perf_counter() - begin


def test_killed_at_any_file_operation(
    tmp_path: Path, undisturbed: tuple[dict[str, bytes], list[dict[str, Any]], float]
) -> None:
    draw = random.Random(0)
    kills = 0
    while True:
        process = _start(tmp_path / "run", draw.randint(1, 60))
        process.join(60)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        kills += 1
        _require_whole(tmp_path / "run")
    assert kills >= 5
    assert _outcome(tmp_path / "run") == undisturbed[:2]
    assert not list((tmp_path / "run").rglob(".unfinished*"))


def test_killed_at_any_time(tmp_path: Path, undisturbed: tuple[dict[str, bytes], list[dict[str, Any]], float]) -> None:
    files, lines, seconds = undisturbed
    draw = random.Random(1)
    for _ in range(5):
        process = _start(tmp_path / "run")
        process.join(draw.uniform(0.2, 0.8) * seconds)
        process.kill()
        process.join(60)
        _require_whole(tmp_path / "run")
    process = _start(tmp_path / "run")
    process.join(60)
    assert process.exitcode == 0
    assert _outcome(tmp_path / "run") == (files, lines)


def _endless(out: Path, said: Path) -> None:
    """In a child: a run that only a signal ends; what it says goes to a file."""
    with said.open("w", buffering=1) as file:
        sys.stderr = file
        toy.run(out, iterations=1_000_000)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_process_ends_with_the_signals_code_and_its_folder_is_locked_meanwhile(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    out, told = tmp_path / "run", tmp_path / "said"
    process = _PROCESSES.Process(target=_endless, args=(out, told))
    process.start()
    while not (told.exists() and "left" in told.read_text()):  # the first logged iteration
        assert process.is_alive()
        time.sleep(0.01)
    with pytest.raises(FewstepError, match=f"in use by process {process.pid}"):
        toy.run(out, resume=True)
    assert process.pid is not None
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == code
    last = max(int(p.name) for p in (out / "checkpoints").iterdir())
    assert json.loads((out / "checkpoints" / f"{last:06d}" / "state.json").read_text())["iteration"] == last
    assert f"stopped after iteration {last}, saved {out / 'checkpoints'}" in told.read_text()
    assert "; resume with --resume" in told.read_text()
    assert [record["iteration"] for record in read_log(out / "log.jsonl")] == list(range(2, last + 1, 2))
