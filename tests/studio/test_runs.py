"""What is found in a folder of runs, and that nothing outside of it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fewstep.errors import FewstepError
from fewstep.models.export import CARD
from fewstep.models.student import ROUTER
from fewstep.studio.runs import RunsFolder
from fewstep.training.log import read_alarms


def test_runs_with_their_state(folder: Path) -> None:
    found = {run.name: run for run in RunsFolder(folder).runs()}
    assert found.keys() == {"done", "going", "phased/phase-1"}  # not "linked", which leads outside
    done, going = found["done"], found["going"]
    assert (done.method, done.iteration, done.iterations, done.finished) == ("tdm", 20, 20, True)
    assert (going.method, going.iteration, going.iterations, going.finished) == ("<b>dmd2</b>", 30, 100, False)


def test_the_run_that_changed_last_is_in_front(folder: Path) -> None:
    (folder / "phased/phase-1/log.jsonl").touch()
    assert RunsFolder(folder).runs()[0].name == "phased/phase-1"


def test_a_run_itself_and_a_folder_that_is_not_there(folder: Path, tmp_path: Path) -> None:
    assert [run.name for run in RunsFolder(folder / "done").runs()] == ["done"]
    nothing = RunsFolder(tmp_path / "nowhere")
    assert (nothing.runs(), nothing.students()) == ([], {})


@pytest.mark.parametrize("name", ["..", "../secret", "/etc", "done/../../secret", "linked", "done/samples", "", "."])
def test_only_names_of_the_list_are_runs(folder: Path, name: str) -> None:
    with pytest.raises(FewstepError, match="found no run"):
        RunsFolder(folder).run(name)


def test_sample_grids_in_order_and_no_links(folder: Path) -> None:
    runs = RunsFolder(folder)
    (folder / "going" / "samples" / "000005-1-steps.png").touch()
    (folder / "going" / "samples" / ".unfinished-1-000040-4-steps.png").touch()
    (folder / "going" / "samples" / "notes.txt").touch()
    grids = [(grid.iteration, grid.steps) for grid in runs.grids(runs.run("going"))]
    assert grids == [(5, 1), (10, 4), (20, 4), (30, 4)]
    assert [grid.iteration for grid in runs.grids(runs.run("done"))] == [10, 20]


def test_students_of_runs_and_of_several_parts(folder: Path) -> None:
    for place, mark in (("done/student", CARD), ("parts", ROUTER), ("linked/student", CARD)):
        (folder / place).mkdir(parents=True, exist_ok=True)
        (folder / place / mark).touch()
    assert RunsFolder(folder).students() == {"done": folder / "done/student", "parts": folder / "parts"}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"options": 3, "configuration": {"method": "tdm"}}'])
def test_a_damaged_run_is_listed(folder: Path, text: str) -> None:
    (folder / "done" / "run.json").write_text(text)
    (folder / "done" / "log.jsonl").write_text("nonsense\n")
    run = RunsFolder(folder).run("done")
    assert (run.method, run.iteration, run.finished) == ("", 0, False)
    assert ("unreadable" in run.settings) == (not text.startswith('{"'))


def test_the_last_line_of_a_long_log_is_found(folder: Path) -> None:
    lines = [json.dumps({"iteration": i, "padding": "x" * 1000}) for i in range(1, 201)]
    (folder / "done" / "log.jsonl").write_text("\n".join(lines) + '\n{"iteration": 2')
    assert RunsFolder(folder).run("done").iteration == 200


def test_alarms_are_lines_of_the_log(folder: Path) -> None:
    (alarm,) = read_alarms(folder / "going" / "log.jsonl")
    assert (alarm["name"], alarm["value"]) == ("critic-lag", 1.5)
    assert read_alarms(folder / "done" / "log.jsonl") == []
