"""Trackers: what each package is told, with a module in its place that writes down its calls."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import training_toy as toy

from fewstep.errors import FewstepError
from fewstep.training import trackers
from fewstep.training.log import Log, read_log


class Recorder(ModuleType):
    """A package whose every function notes its call and answers with the run called r1."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.calls: list[tuple[str, Any, dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*positional: Any, **named: Any) -> Any:
            self.calls.append((name, positional, named))
            run = SimpleNamespace(id="r1", info=SimpleNamespace(run_id="r1"))
            run.log, run.finish = self.__getattr__("log"), self.__getattr__("finish")
            return run

        return call

    def of(self, name: str) -> list[tuple[Any, dict[str, Any]]]:
        return [call[1:] for call in self.calls if call[0] == name]


@pytest.fixture
def package(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    module = Recorder(request.param)
    monkeypatch.setitem(sys.modules, request.param, module)
    return module


def run(folder: Path, name: str, start: int, iterations: range) -> None:
    told = {"method": {"name": "tdm", "steps": 4}, "noise_shape": (4, 16, 16)}
    log = Log(folder, start, tensorboard=False, tracker=name, configuration=told)
    for iteration in iterations:
        log.write(iteration, {"loss/student": iteration / 2, "evaluate/frechet, 4 steps": math.nan})
    log.close()


@pytest.mark.parametrize("package", ["wandb"], indirect=True)
def test_wandb_is_told_each_iteration_and_goes_on_in_the_same_run(package: Recorder, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    run(folder, "wandb", 0, range(1, 3))
    run(folder, "wandb", 2, range(3, 4))
    (_, first), (_, second) = package.of("init")
    assert (first["project"], first["name"], first["dir"]) == ("fewstep", "mine", str(folder))
    assert first["config"] == {"method.name": "tdm", "method.steps": "4", "noise_shape": "(4, 16, 16)"}
    assert (first["id"], second["id"], second["resume"]) == (None, "r1", "allow")
    logged = [(named["step"], positional[0]["loss/student"]) for positional, named in package.of("log")]
    assert logged == [(1, 0.5), (2, 1.0), (3, 1.5)]
    assert len(package.of("finish")) == 2


@pytest.mark.parametrize("package", ["mlflow"], indirect=True)
def test_mlflow_is_told_what_it_can_take(package: Recorder, tmp_path: Path) -> None:
    run(tmp_path, "mlflow", 0, range(1, 3))
    run(tmp_path, "mlflow", 2, range(3, 4))
    assert package.of("set_experiment")[0][0] == ("fewstep",)
    assert [named["run_id"] for _, named in package.of("start_run")] == [None, "r1"]
    assert package.of("log_params") == [
        (({"method.name": "tdm", "method.steps": "4", "noise_shape": "(4, 16, 16)"},), {})
    ]
    assert [call[0][0] for call in package.of("log_metrics")] == [{"loss/student": i / 2} for i in (1, 2, 3)]
    assert [call[1] for call in package.of("log_metrics")] == [{"step": i} for i in (1, 2, 3)]
    assert len(package.of("end_run")) == 2


@pytest.mark.parametrize("package", ["trackio"], indirect=True)
def test_trackio_goes_on_by_name(package: Recorder, tmp_path: Path) -> None:
    run(tmp_path, "trackio", 0, range(1, 2))
    run(tmp_path, "trackio", 1, range(2, 3))
    told = [(named["name"], named["resume"]) for _, named in package.of("init")]
    assert told == [(tmp_path.name, "never"), (tmp_path.name, "allow")]
    assert [named["step"] for _, named in package.of("log")] == [1, 2]


@pytest.mark.parametrize("name", list(trackers.TRACKERS))
def test_a_missing_package_is_named_with_its_extra_before_any_work(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(FewstepError, match=rf"fewstep\[{name}\]"):
        toy.run(tmp_path / "run", tracker=name)
    with pytest.raises(FewstepError, match="found tracker 'papyrus'"):
        toy.run(tmp_path / "run", tracker="papyrus")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("package", ["wandb"], indirect=True)
def test_a_run_tells_its_tracker(package: Recorder, tmp_path: Path) -> None:
    result = toy.run(tmp_path / "run", tracker="wandb")
    lines = read_log(result.log)
    assert [named["step"] for _, named in package.of("log")] == [line["iteration"] for line in lines]
    assert package.of("init")[0][1]["config"]["method.name"]


def test_a_tracker_that_fails_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def start(self, *arguments: Any) -> None: ...

        def log(self, *arguments: Any) -> None:
            raise ConnectionError("no route")

        def finish(self) -> None:
            raise AssertionError("told after it failed")

    monkeypatch.setitem(trackers.TRACKERS, "broken", Broken)
    with pytest.warns(UserWarning, match="Broken failed at iteration 1"):
        run(tmp_path, "broken", 0, range(1, 4))
    assert len(read_log(tmp_path / "log.jsonl")) == 3
