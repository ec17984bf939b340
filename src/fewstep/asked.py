"""What a finished run was asked for, as its run.json says it; `fewstep.reproducing` asks for it again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import torch

from fewstep.api import RoleOptions
from fewstep.attention.sparse import SparseOptions
from fewstep.conditions import TextOptions
from fewstep.errors import FewstepError
from fewstep.methods import METHODS, Options
from fewstep.methods.matching_options import MatchingOptions
from fewstep.methods.msd import Part
from fewstep.methods.tsm import TSMOptions
from fewstep.provenance import DATA, ORIGIN
from fewstep.training import checkpoint
from fewstep.training.folder import RECORD, read_record
from fewstep.training.log import read_alarms
from fewstep.training.options import TrainOptions

_SIDES = ("height", "width", "num_frames")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_T = TypeVar("_T")


@dataclass(frozen=True)
class Asked:
    """What a run was asked for, or a chain of them that one call began."""

    turns: tuple[str, ...]
    """Folders of the runs, relative to that of the call: "" for itself, or phases or stages in their order."""
    teacher: dict[str, Any]
    """Arguments of `load_teacher`."""
    teacher_steps: int
    teacher_guidance: float
    digest: str
    """Of the teacher's files."""
    options: Options
    part: Part | None
    """Of MSD."""
    roles: RoleOptions
    train: dict[str, TrainOptions]
    """By turn."""
    text: TextOptions
    sizes: list[str]
    prompts: str | None
    fingerprint: dict[str, Any]
    """Of the prompts."""
    start: str | None
    """The student that this one began with, and the hash of its files below."""
    start_digest: str | None
    real_digest: dict[str, str]
    """{"real": hash} where the run's real data could be hashed."""
    held_out: list[str] | None
    """Prompts of evaluations; None where they were not told."""
    given: list[str]
    machine: dict[str, Any]
    versions: dict[str, str]


def asked_for(run: Path) -> Asked:
    """What run.json says that was asked for, in the folder of a finished run, of a run of phases or of a part of MSD.

    Raises:
        FewstepError: it does not say it, it is nothing that this version knows, or a run is not finished.
    """
    turns = _turns(run)
    record = read_record(run / turns[0])
    if not isinstance(record.get(ORIGIN), dict):
        raise FewstepError(
            f"found no {ORIGIN!r} in {run / turns[0] / RECORD}, expected that of a run which fewstep.distill or "
            "distill_part began (an earlier version and fewstep.training.train leave none), fix: repeat the call that "
            "made it"
        )
    origin, configuration = record[ORIGIN], record["configuration"]
    try:
        told, part = origin["teacher"], _part(origin.get("part"))
        prompts = configuration["prompts"] if part is None else part.prompts
        asked = Asked(
            turns=turns,
            teacher={
                "source": str(told["source"]),
                "dtype": _DTYPES[told["dtype"]],
                "quantised": told["quantised"],
                **{name: int(told["size"][name]) for name in told["size"].keys() & set(_SIDES)},
            },
            teacher_steps=int(told["steps"]),
            teacher_guidance=float(told["guidance_scale"]),
            digest=str(record[DATA]["teacher"]),
            options=_options(configuration["method"] if part is None else origin["method"]),
            part=part,
            roles=_restored(RoleOptions, _with_sparse(origin["roles"])),
            train={turn: _restored(TrainOptions, read_record(run / turn)["options"]) for turn in turns},
            text=_restored(TextOptions, _with_path(origin["text"])),
            sizes=[str(size) for size in origin["sizes"]],
            prompts=None if origin["prompts"] is None else str(origin["prompts"]),
            fingerprint={"count": prompts["count"], "hash": prompts["hash"]},
            start=None if origin.get("start") is None else str(origin["start"]),
            start_digest=None if origin.get("start") is None else str(record[DATA]["start"]),
            real_digest={"real": str(record[DATA]["real"])} if "real" in record[DATA] else {},
            held_out=None if origin.get("held_out") is None else [str(text) for text in origin["held_out"]],
            given=[str(name) for name in origin["given"]],
            machine=dict(origin["machine"]),
            versions=record["versions"],
        )
        for settings in asked.train.values():
            settings.validate()
        if part is not None and not isinstance(asked.options, MatchingOptions):
            raise ValueError(f"method {origin['method']['name']} of a part")
        if part is None:
            asked.roles.validate(asked.options.build().needs, asked.roles)
        if not (isinstance(asked.machine["threads"], int) and asked.machine["threads"] > 0):
            raise ValueError(f"threads {asked.machine['threads']}")
        asked.machine["device"]
    except FewstepError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise FewstepError(
            f"found {run / turns[0] / RECORD} that does not say what was asked for ({type(error).__name__}: {error}), "
            "expected what fewstep.distill writes there, fix: repeat the call that made the run"
        ) from error
    for turn in turns:
        _require_finished(run / turn, asked.train[turn])
    return asked


def _turns(run: Path) -> tuple[str, ...]:
    """The runs in the folder: itself, or its phases or stages."""
    if (run / RECORD).is_file():
        return ("",)
    found = tuple(sorted(path.parent.name for path in run.glob(f"*/{RECORD}")))
    if not found:
        raise FewstepError(f"found no {RECORD} in {run}, expected the folder of a run (its --out), fix: check the path")
    return found


def _part(told: Mapping[str, Any] | None) -> Part | None:
    if told is None:
        return None
    return Part(
        number=int(told["number"]),
        of=int(told["of"]),
        gan_weight=float(told["gan_weight"]),
        tsm=None if told["tsm"] is None else _restored(TSMOptions, told["tsm"]),
        depth=float(told["depth"]),
        width=float(told["width"]),
        prompts=dict(told["prompts"]),
    )


def _require_finished(run: Path, settings: TrainOptions) -> None:
    found = checkpoint.newest(run / "checkpoints")
    if found is None or (found.iteration != settings.iterations and not _ended_early(run, found, settings)):
        at = "without a checkpoint" if found is None else f"at iteration {found.iteration}"
        raise FewstepError(
            f"found the run {run} {at}, expected it finished at iteration {settings.iterations}, "
            "fix: resume it first (--resume)"
        )


def _ended_early(run: Path, found: checkpoint.Checkpoint, settings: TrainOptions) -> bool:
    """Whether patience, or an alarm that finishes a run, ended it at this checkpoint."""
    since = found.state.get("monitors", {}).get("best", {}).get("since", 0)
    finished = [alarm["iteration"] for alarm in read_alarms(run / "log.jsonl") if alarm.get("done") == "finish"]
    return 0 < settings.patience <= since or found.iteration in finished


def _options(told: Mapping[str, Any]) -> Options:
    """The options of the method that a configuration names."""
    kinds = {make().build().name: type(make()) for make in METHODS.values()}
    values = {name: value for name, value in told.items() if name not in ("name", "phase")}
    if told["name"] not in kinds:
        raise FewstepError(
            f"found a run of the method {told['name']!r}, expected one of {sorted(kinds)}, fix: repeat the call that "
            "made it"
        )
    return _restored(kinds[told["name"]], values)


def _restored(kind: type[_T], values: Mapping[str, Any]) -> _T:
    """The dataclass that JSON was made of.

    Raises:
        FewstepError: options that it has not.
    """
    known = {entry.name for entry in fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(values.keys() - known):
        raise FewstepError(
            f"found the options {unknown} in {RECORD}, expected those of {kind.__name__} in this version, fix: install "
            "the version of fewstep that the run was made with"
        )
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def _with_sparse(roles: Mapping[str, Any]) -> dict[str, Any]:
    return {**roles, "sparse": _restored(SparseOptions, roles.get("sparse", {}))}  # runs before there was one


def _with_path(text: Mapping[str, Any]) -> dict[str, Any]:
    return {**text, "cache": None if text["cache"] is None else Path(text["cache"])}
