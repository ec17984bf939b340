"""What the loop does about alarms, and which student it keeps."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import monitors_toy
import pytest
import torch
import training_toy as toy
from safetensors.torch import load_file

from fewstep.errors import FewstepError
from fewstep.training.log import read_alarms, read_log
from fewstep.training.loop import Hooks
from fewstep.training.monitors.best import read_best
from fewstep.training.monitors.guard import Alarmed


def _outcome(out: Path, iteration: int = 12) -> tuple[dict[str, bytes], list[str]]:
    """Every byte of a checkpoint, and the log, alarms included, without times and memory."""
    lines = []
    for line in (out / "log.jsonl").read_text().splitlines():
        record = json.loads(line)
        kept = {name: value for name, value in record.items() if not name.startswith(("time/", "memory/"))}
        lines.append(json.dumps(kept, sort_keys=True))
    return {p.name: p.read_bytes() for p in (out / f"checkpoints/{iteration:06d}").iterdir()}, lines


def test_bad_batches_are_skipped_and_the_third_in_a_row_is_rolled_back(tmp_path: Path) -> None:
    result = monitors_toy.run(tmp_path)
    alarms = read_alarms(result.log)
    assert [(a["name"], a["number"], a["iteration"], a["done"], a["to"]) for a in alarms] == [
        *(
            ("not-finite", f"finite/{role}", i, "skip", 6 * (i == 9))
            for i in (7, 8, 9)
            for role in ("student", "critic")
        ),
        *(("not-finite-for-long", f"finite/{role}", 9, "roll back", 6) for role in ("student", "critic")),
    ]
    rates = {record["iteration"]: record["rate/student"] for record in read_log(result.log)}
    assert rates[9] == 1e-4
    assert rates[10] == rates[12] == 0.5e-4
    state = json.loads((result.checkpoint / "state.json").read_text())
    assert state["monitors"]["roll_backs"] == 1
    assert all(bool(value.isfinite().all()) for value in load_file(result.checkpoint / "student.safetensors").values())


def test_a_roll_back_brings_back_weights_optimisers_and_average(tmp_path: Path) -> None:
    monitors_toy.run(tmp_path, keep=5)
    for name in ("student", "critic", "student_optimiser", "critic_optimiser", "ema"):
        then, again = (tmp_path / f"checkpoints/{i:06d}/{name}.safetensors" for i in (6, 9))
        assert then.read_bytes() == again.read_bytes()
    assert (tmp_path / "checkpoints/000012/student.safetensors").read_bytes() != then.read_bytes()


@pytest.mark.parametrize(("at", "lost"), [(8, False), (10, False), (10, True)])
def test_a_run_with_a_roll_back_resumes_to_the_bit(tmp_path: Path, at: int, lost: bool) -> None:
    """Stopped while the bad batches come, after the roll-back, and after it without a checkpoint since."""
    settings = {"keep": 5, "checkpoint_every": 4}
    monitors_toy.run(tmp_path / "whole", **settings)
    monitors_toy.run(tmp_path / "parts", iterations=at, **settings)
    if lost:
        shutil.rmtree(tmp_path / f"parts/checkpoints/{at:06d}")
    monitors_toy.run(tmp_path / "parts", resume=True, **settings)
    files, lines = _outcome(tmp_path / "whole")
    again, repeated = _outcome(tmp_path / "parts")
    assert repeated == lines
    assert again == files


def test_two_processes_roll_back_alike(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, monitors_toy.__file__, str(tmp_path / "two")], check=True, timeout=300, env=environment)
    monitors_toy.run(tmp_path / "one")
    one, two = (load_file(tmp_path / name / "checkpoints/000012/student.safetensors") for name in ("one", "two"))
    torch.testing.assert_close(two, one, rtol=0, atol=1e-9)
    keys = ("name", "iteration", "done", "to")
    told = [[{key: a[key] for key in keys} for a in read_alarms(tmp_path / n / "log.jsonl")] for n in ("one", "two")]
    assert told[0] == told[1] != []


def test_without_a_checkpoint_from_before_the_run_stops(tmp_path: Path) -> None:
    with pytest.raises(
        Alarmed, match=r"not-finite-for-long at iteration 9: .*no checkpoint from before.*--on-alarm warn"
    ):
        monitors_toy.run(tmp_path, checkpoint_every=0)
    assert [a["done"] for a in read_alarms(tmp_path / "log.jsonl")] == ["skip"] * 6 + ["stop"] * 2


def test_a_run_that_is_only_warned_stops_at_what_is_not_finite(tmp_path: Path) -> None:
    with pytest.raises(FewstepError, match="found a critic loss of nan .* at iteration 7"):
        monitors_toy.run(tmp_path, on_alarm="warn")


@pytest.mark.parametrize("on_alarm", ["off", "act"])
def test_monitors_change_no_bit_of_a_sound_run(tmp_path: Path, on_alarm: str) -> None:
    for name, told in (("plain", "warn"), ("other", on_alarm)):
        monitors_toy.run(tmp_path / name, toy.toy_data, on_alarm=told, iterations=30)
    plain, other = (
        {p.name: p.read_bytes() for p in (tmp_path / n / "checkpoints/000030").glob("*.safetensors")}
        for n in ("plain", "other")
    )
    assert plain == other
    shown = [{k for k in r if k.startswith("monitor/")} for r in read_log(tmp_path / "other/log.jsonl")]
    assert bool(shown[-1]) == (on_alarm != "off")
    assert read_alarms(tmp_path / "plain/log.jsonl") == []


def _scored(*scores: float, **more: float) -> tuple[Hooks, list[int]]:
    """Hooks whose evaluations give these scores in turn, by iteration, and the iterations they were called at."""
    called: list[int] = []

    def evaluate(iteration: int) -> dict[str, float]:
        called.append(iteration)
        return {"score": scores[iteration // 2 - 1], **more}

    return Hooks(evaluate=evaluate), called


def _run(out: Path, hooks: Hooks, **changes: Any) -> Any:
    return monitors_toy.run(out, toy.toy_data, hooks=hooks, evaluate_every=2, keep=9, checkpoint_every=2, **changes)


def test_the_best_student_is_kept_as_it_was(tmp_path: Path) -> None:
    _run(tmp_path, _scored(5.0, 3.0, 4.0, 3.0, 3.5, 9.0)[0])
    best = read_best(tmp_path)
    assert best is not None
    assert best.iteration == 4
    average = load_file(tmp_path / "checkpoints/000004/ema.safetensors")
    assert {name: value.tolist() for name, value in best.tensors("student").items()} == {
        name: value.tolist() for name, value in average.items()
    }
    assert [p.name for p in (tmp_path / "best").iterdir()] == ["000004"]


def test_no_score_no_best(tmp_path: Path) -> None:
    _run(tmp_path, Hooks(evaluate=lambda iteration: {"frechet": 1.0}))
    assert read_best(tmp_path) is None
    with pytest.raises(FewstepError, match="found patience = 3, expected 0 where evaluate_every is 0"):
        toy.run(tmp_path / "other", patience=3)


def test_a_best_student_of_the_future_is_dropped_and_found_again(tmp_path: Path) -> None:
    hooks, _ = _scored(5.0, 3.0, 2.0, 4.0, 1.0, 9.0)
    _run(tmp_path, hooks, iterations=10)
    before = {p.name: p.read_bytes() for p in (tmp_path / "best/000010").iterdir()}
    for late in (8, 10):  # as after a kill
        for path in (tmp_path / f"checkpoints/{late:06d}").iterdir():
            path.unlink()
        (tmp_path / f"checkpoints/{late:06d}").rmdir()
    _run(tmp_path, hooks, iterations=8, resume=True)
    assert [p.name for p in (tmp_path / "best").iterdir()] in ([], ["000006"])  # 6 made place for 10
    _run(tmp_path, hooks, iterations=10, resume=True)
    assert {p.name: p.read_bytes() for p in (tmp_path / "best/000010").iterdir()} == before


def test_patience_ends_a_run_and_a_resumed_one_stays_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hooks, called = _scored(5.0, 3.0, 4.0, 4.0, 4.0, 4.0)
    result = _run(tmp_path, hooks, on_alarm="warn", patience=2)
    assert (result.iteration, called) == (8, [2, 4, 6, 8])
    assert result.checkpoint.name == "000008"
    assert "ended early, after iteration 8; the best score, 3, was at iteration 4" in capsys.readouterr().err
    again = _run(tmp_path, hooks, on_alarm="warn", patience=2, resume=True)
    assert (again.iteration, called) == (8, [2, 4, 6, 8])
    further = _run(tmp_path, hooks, on_alarm="warn", patience=0, resume=True)
    assert further.iteration == 12


def test_drift_is_named_where_the_score_rises_and_samples_are_too_sharp(tmp_path: Path) -> None:
    rising = (5.0, 3.0, 3.5, 3.6, 3.7, 4.0)
    sharp = _run(tmp_path / "sharp", _scored(*rising, sharpness=1.2)[0])
    (alarm,) = read_alarms(sharp.log)
    assert (alarm["name"], alarm["since"], alarm["iteration"], alarm["done"]) == ("drift", 6, 10, "finish")
    assert sharp.iteration == 10
    dull = _run(tmp_path / "dull", _scored(*rising, sharpness=0.9)[0])
    assert (dull.iteration, read_alarms(dull.log)) == (12, [])


def test_a_distance_far_above_its_best_is_told_however_sharp_samples_are(tmp_path: Path) -> None:
    result = _run(tmp_path, _scored(5.0, 2.0, 3.1, 3.2, 3.3, 3.4, sharpness=0.9)[0])
    assert [(a["name"], a["since"], a["iteration"], a["done"]) for a in read_alarms(result.log)] == [
        ("worse", 6, 10, "told")
    ]
    assert result.iteration == 12


def test_lost_variety_is_named(tmp_path: Path) -> None:
    result = _run(tmp_path, _scored(*range(6, 0, -1), variety=0.3)[0], on_alarm="warn")
    assert [(a["name"], a["iteration"], a["done"]) for a in read_alarms(result.log)] == [("low-variety", 6, "told")]
