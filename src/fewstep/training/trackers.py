"""Where the numbers of a run go beside `log.jsonl`: TensorBoard, Weights & Biases, MLflow, trackio, or your own.

A tracker has three methods. Only the first process of a run has trackers. A resumed run goes on in the same run of the
tracker: what names it is kept as `tracker-NAME.json` in the run's folder. One of your own is a line in `TRACKERS`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from fewstep.errors import FewstepError
from fewstep.training.checkpoint import write_text

PROJECT = "fewstep"
"""The project, or experiment, that runs appear in; the run has the name of its folder."""


class Tracker(Protocol):
    """What a run tells."""

    def start(self, folder: Path, configuration: Mapping[str, Any], iteration: int) -> None:
        """The run in `folder` begins after `iteration`: 0, or that of the checkpoint it resumes from."""

    def log(self, iteration: int, numbers: Mapping[str, float]) -> None:
        """Numbers of an iteration; iterations rise. Some numbers may not be finite."""

    def finish(self) -> None:
        """The run is over, or stops to be resumed; nothing follows."""


class TensorBoard:
    """Events in `tensorboard/`; those after the checkpoint of a resumed run are hidden."""

    def start(self, folder: Path, configuration: Mapping[str, Any], iteration: int) -> None:
        from tensorboardX import SummaryWriter

        # the file is named by the second, which two runs of one process may share
        suffix = f".{iteration}"
        self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=iteration + 1, filename_suffix=suffix)

    def log(self, iteration: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._events.add_scalar(name, value, iteration)
        self._events.flush()  # says here that the disk is full; its thread would die of it, and then be waited for

    def finish(self) -> None:
        self._events.close()


class WeightsAndBiases:
    """Weights & Biases. Its own settings decide where to: WANDB_MODE=offline keeps everything in the run's folder.

    It takes a resumed run's iterations only from where it stopped itself, so lines that are repeated appear once.
    """

    def __init__(self) -> None:
        self._wandb = _package("wandb")

    def start(self, folder: Path, configuration: Mapping[str, Any], iteration: int) -> None:
        self._run = self._wandb.init(
            project=PROJECT, name=_name(folder), id=_kept(folder, "wandb"), resume="allow", dir=str(folder),
            config=flat(configuration),
        )  # fmt: skip
        _keep(folder, "wandb", self._run.id)

    def log(self, iteration: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=iteration)

    def finish(self) -> None:
        self._run.finish()


class MLflow:
    """MLflow; MLFLOW_TRACKING_URI says where to. It has no numbers that are not finite, and no commas in names."""

    def __init__(self) -> None:
        self._mlflow = _package("mlflow")

    def start(self, folder: Path, configuration: Mapping[str, Any], iteration: int) -> None:
        self._mlflow.set_experiment(PROJECT)
        kept = _kept(folder, "mlflow")
        run = self._mlflow.start_run(run_id=kept, run_name=None if kept else _name(folder))
        if kept is None:
            self._mlflow.log_params(flat(configuration))
        _keep(folder, "mlflow", run.info.run_id)

    def log(self, iteration: int, numbers: Mapping[str, float]) -> None:
        finite = {name.replace(",", ""): float(value) for name, value in numbers.items() if math.isfinite(value)}
        self._mlflow.log_metrics(finite, step=iteration)

    def finish(self) -> None:
        self._mlflow.end_run()


class Trackio:
    """trackio: a local database; TRACKIO_DIR says where."""

    def __init__(self) -> None:
        self._trackio = _package("trackio")

    def start(self, folder: Path, configuration: Mapping[str, Any], iteration: int) -> None:
        kept = _kept(folder, "trackio")
        name = kept or _name(folder)
        self._trackio.init(project=PROJECT, name=name, config=flat(configuration), resume="allow" if kept else "never")
        _keep(folder, "trackio", name)

    def log(self, iteration: int, numbers: Mapping[str, float]) -> None:
        self._trackio.log(dict(numbers), step=iteration)

    def finish(self) -> None:
        self._trackio.finish()


TRACKERS: dict[str, Callable[[], Tracker]] = {"wandb": WeightsAndBiases, "mlflow": MLflow, "trackio": Trackio}
"""By the name that `--tracker` takes."""


def make_tracker(name: str) -> Tracker:
    """The tracker called `name`, not started.

    Raises:
        FewstepError: no such tracker, or its package is missing.
    """
    if name not in TRACKERS:
        raise FewstepError(f"found tracker {name!r}, expected none or one of {', '.join(TRACKERS)}, fix: choose one")
    return TRACKERS[name]()


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """A nested configuration as one level of names with dots, values as text of at most 250 characters."""
    out: dict[str, str] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            out |= flat(value, f"{prefix}{name}.")
        else:
            out[f"{prefix}{name}"] = str(value)[:250]
    return out


def _package(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise FewstepError(
            f"found no package {name}, expected it for --tracker {name}, fix: pip install 'fewstep[{name}]'"
        ) from error


def _name(folder: Path) -> str:
    return folder.resolve().name


def _kept(folder: Path, name: str) -> str | None:
    """What names the tracker's run of this folder, if there is one."""
    path = folder / f"tracker-{name}.json"
    return json.loads(path.read_text())["run"] if path.is_file() else None


def _keep(folder: Path, name: str, run: str) -> None:
    write_text(folder / f"tracker-{name}.json", json.dumps({"run": run}) + "\n")
