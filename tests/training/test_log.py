from __future__ import annotations

import math
from pathlib import Path

import pytest

from fewstep.training.log import Log, read_log
from fewstep.training.progress import Progress


def _write(folder: Path, start: int, iterations: list[int]) -> Log:
    log = Log(folder, start, tensorboard=False)
    for iteration in iterations:
        log.write(iteration, {"loss/student": iteration / 10})
    return log


def test_resuming_keeps_each_line_once(tmp_path: Path) -> None:
    _write(tmp_path, 0, [2, 4, 6, 8]).close()
    _write(tmp_path, 4, [6, 8, 10]).close()
    assert [record["iteration"] for record in read_log(tmp_path / "log.jsonl")] == [2, 4, 6, 8, 10]


def test_a_line_torn_by_a_kill_is_dropped(tmp_path: Path) -> None:
    log = _write(tmp_path, 0, [1, 2])
    log.close()
    whole = log.path.read_text()
    log.path.write_text(whole + '{"iteration": 3, "loss/st')
    assert len(read_log(log.path)) == 2
    _write(tmp_path, 2, []).close()
    assert log.path.read_text() == whole


def test_a_fresh_log_is_empty(tmp_path: Path) -> None:
    log = _write(tmp_path, 0, [])
    log.close()
    assert log.path.read_text() == ""


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_json_does_not_have_is_null(tmp_path: Path, value: float) -> None:
    log = _write(tmp_path, 0, [])
    log.write(1, {"metric/gap": value})
    log.close()
    assert read_log(log.path) == [{"iteration": 1, "metric/gap": None}]


def test_tensorboard_events_are_written(tmp_path: Path) -> None:
    log = Log(tmp_path, 0, tensorboard=True)
    log.write(1, {"loss/student": 0.5})
    log.close()
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"loss/student" in events.read_bytes()


def test_plain_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(10, 0, shown=True)
    progress.advance(1, {})
    progress.advance(
        2, {"loss/student": 0.25, "time/iteration_s": 1.5, "memory/peak_gib": 2.0, "evaluate/distance": 0.125}
    )
    progress.close()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("2/10  student 0.25  distance 0.125  1.5 s/it  2.00 GiB  left 0:00:0")


def test_other_processes_say_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(10, 0, shown=False)
    progress.advance(1, {"loss/student": 0.25})
    progress.say("stopped")
    assert capsys.readouterr().err == ""
