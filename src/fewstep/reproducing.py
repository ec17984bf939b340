"""A run made again from its run.json, and compared with the first: log lines, trained weights, the saved student.

    print(fewstep.reproduce("runs/mine").report())

On one machine, with the same versions and on the CPU, both are equal to the bit (docs/reproducibility.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import torch

from fewstep.api import STUDENT_FOLDER, RoleOptions, _fingerprint, distill, load_teacher
from fewstep.conditions import TextOptions
from fewstep.core.files import checksum
from fewstep.data.sources import read_prompts
from fewstep.errors import FewstepError
from fewstep.methods import METHODS, Options
from fewstep.models.teacher import Teacher
from fewstep.provenance import DATA, ORIGIN, OWN, machine, teacher_digest
from fewstep.training import checkpoint
from fewstep.training.folder import RECORD, describe, differing, read_record
from fewstep.training.log import read_log
from fewstep.training.loop import Hooks, PairData, RealData
from fewstep.training.options import TrainOptions

OF_THE_MOMENT = ("time/", "memory/")
"""Numbers of a log line that no two runs share."""
_T = TypeVar("_T")


@dataclass(frozen=True)
class Reproduction:
    """What came of making a run again."""

    run: Path
    out: Path
    """Where it was made again."""
    compared: tuple[str, ...]
    """What was compared, in words."""
    differences: tuple[str, ...]
    """What is not equal, in words; empty: nothing, to the bit."""
    surroundings: tuple[str, ...]
    """Versions and machine, where they are others than the first run's."""

    @property
    def equal(self) -> bool:
        """Whether everything that was compared is the same to the bit."""
        return not self.differences

    def report(self) -> str:
        """A few lines for people."""
        lines = [f"{self.run} made again in {self.out}; compared: {', '.join(self.compared)}."]
        lines += [f"other surroundings: {one}" for one in self.surroundings]
        lines += [f"differs: {one}" for one in self.differences] or ["equal to the bit"]
        return "\n".join(lines)


def reproduce(
    run: str | Path,
    out: str | Path | None = None,
    *,
    prompts: Sequence[str] | str | Path | None = None,
    real: RealData | None = None,
    pairs: PairData | None = None,
    hooks: Hooks | None = None,
) -> Reproduction:
    """Make a finished run again, with the options and data that its run.json names, and compare.

    Costs as much as the run did. An interrupted reproduction goes on when it is called again.

    Args:
        run: folder of a run of `fewstep.distill` (also of one with phases).
        out: folder of the new run; `run` with `-again` unless told.
        prompts: as for `distill`, where they were passed in Python or lie elsewhere now; they have to be the same.
        real: clean data, where they were passed in Python.
        pairs: likewise.
        hooks: likewise; without them the log lacks their numbers, and they are not compared.

    Raises:
        FewstepError: a run that is not finished, that does not tell where it comes from, or whose teacher or prompts
            are others by now; all before any work.
    """
    run = Path(run)
    out = Path(f"{run}-again" if out is None else out)
    if out.resolve() == run.resolve():
        raise FewstepError(f"found {out} as the run and its copy, expected two folders, fix: choose another --out")
    parts = _parts(run)
    record = read_record(run / parts[0])
    origin, configuration = record.get(ORIGIN), record["configuration"]
    if not isinstance(origin, dict):
        raise FewstepError(
            f"found no {ORIGIN!r} in {run / parts[0] / RECORD}, expected that of a run which fewstep.distill began (an "
            "earlier version, MSD's parts and fewstep.training.train leave none), fix: repeat the call that made it"
        )
    for part in parts:
        _require_finished(run / part)
    passed = {"real": real is not None, "pairs": pairs is not None, "hooks": True}
    if missing := [name for name in origin["given"] if not passed[name]]:
        raise FewstepError(
            f"found a run with {' and '.join(missing)} passed in Python, which no file holds, expected the same again, "
            f"fix: fewstep.reproduce(..., {missing[0]}=...)"
        )
    teacher = _teacher(origin, record)
    texts = _prompts(origin, configuration, prompts, run)
    threads = torch.get_num_threads()
    torch.set_num_threads(origin["machine"]["threads"])
    try:
        here = machine(teacher.backbone.device)
        distill(
            teacher,
            _options(configuration["method"]),
            out=out,
            prompts=texts,
            real=real,
            pairs=pairs,
            roles=_restored(RoleOptions, origin["roles"]),
            train_options=_restored(TrainOptions, record["options"]),
            text=_restored(TextOptions, _with_path(origin["text"])),
            sizes=origin["sizes"],
            hooks=hooks,
            resume=True,
        )
    finally:
        torch.set_num_threads(threads)
    surroundings = differing(record["versions"], describe({})["versions"]) + differing(origin["machine"], here)
    ignored = (*OF_THE_MOMENT, "evaluate/") if "hooks" in origin["given"] and hooks is None else OF_THE_MOMENT
    compared, differences = [], []
    for part in parts:
        lines, found = _compare_logs(run / part, out / part, ignored)
        tensors, others = _compare_weights(run / part, out / part)
        compared.append(f"{lines} log lines and {tensors} tensors of {part.name or 'the run'}")
        differences += found + others
    files, found = _compare_students(run / STUDENT_FOLDER, out / STUDENT_FOLDER)
    compared.append(f"{files} weight files of the student")
    return Reproduction(run, out, tuple(compared), (*differences, *found), tuple(surroundings))


def _parts(run: Path) -> list[Path]:
    """The runs in the folder, relative to it: itself, or its phases."""
    if (run / RECORD).is_file():
        return [Path()]
    found = sorted(path.parent.relative_to(run) for path in run.glob(f"*/{RECORD}"))
    if not found:
        raise FewstepError(f"found no {RECORD} in {run}, expected the folder of a run (its --out), fix: check the path")
    return found


def _require_finished(run: Path) -> None:
    wanted, found = read_record(run)["options"]["iterations"], checkpoint.newest(run / "checkpoints")
    if found is None or found.iteration != wanted:
        at = "without a checkpoint" if found is None else f"at iteration {found.iteration}"
        raise FewstepError(
            f"found the run {run} {at}, expected it finished at iteration {wanted}, fix: resume it first (--resume)"
        )


def _teacher(origin: Mapping[str, Any], record: Mapping[str, Any]) -> Teacher:
    """The teacher as it was loaded; on the CPU where there is no device of its kind.

    Raises:
        FewstepError: its files are others by now.
    """
    told, device = origin["teacher"], origin["machine"]["device"]
    teacher = load_teacher(
        told["source"],
        dtype=getattr(torch, told["dtype"]),
        device=device if device != "cuda" or torch.cuda.is_available() else "cpu",
        **told["size"],
        defer=origin["roles"]["shard"],
        quantised=told["quantised"],
    )
    teacher.steps, teacher.guidance_scale = told["steps"], told["guidance_scale"]
    if teacher_digest(teacher) != record[DATA]["teacher"]:
        raise FewstepError(
            f"found other files in the teacher's folder {told['source']} than the run was made with, expected the "
            "same, fix: restore that folder"
        )
    return teacher


def _prompts(
    origin: Mapping[str, Any], configuration: Mapping[str, Any], told: Sequence[str] | str | Path | None, run: Path
) -> Sequence[str] | None:
    """The prompts, which are the run's own; None for the embedded teacher's captions.

    Raises:
        FewstepError: nothing says where they are, or they are others.
    """
    source = origin["prompts"] if told is None else told
    if source is None:
        raise FewstepError(
            f"found a run with prompts that were passed in Python ({run}), expected them again, as no file holds them, "
            "fix: fewstep.reproduce(..., prompts=[...]), or --prompts FILE"
        )
    if source == OWN:
        return None
    texts = read_prompts(source) if isinstance(source, str | Path) else list(source)
    now = _fingerprint(texts)
    if now != configuration["prompts"]:
        raise FewstepError(
            f"found other prompts ({now['count']}, hash {now['hash']}) than the run was made with "
            f"({configuration['prompts']['count']}, hash {configuration['prompts']['hash']}), expected the same, "
            "fix: restore the file"
        )
    return texts


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


def _with_path(text: Mapping[str, Any]) -> dict[str, Any]:
    return {**text, "cache": None if text["cache"] is None else Path(text["cache"])}


def _compare_logs(run: Path, out: Path, ignored: tuple[str, ...]) -> tuple[int, list[str]]:
    """Lines that both have, and the first that differs."""
    first, second = (
        {
            record["iteration"]: {name: value for name, value in record.items() if not name.startswith(ignored)}
            for record in read_log(folder / "log.jsonl")
        }
        for folder in (run, out)
    )
    both = sorted(number for number in first.keys() & second.keys() if number is not None)
    for number in both:
        before, now = first[number], second[number]
        if before != now:
            name = next(n for n in (*before, *now) if before.get(n, "missing") != now.get(n, "missing"))
            told = f"{name} was {before.get(name, 'missing')}, is {now.get(name, 'missing')}"
            return len(both), [f"{out / 'log.jsonl'} since iteration {int(number)}: {told}"]
    return len(both), []


def _compare_weights(run: Path, out: Path) -> tuple[int, list[str]]:
    """Tensors of the last checkpoints, and the largest difference in each file that is not the same."""
    first, second = (checkpoint.newest(folder / "checkpoints") for folder in (run, out))
    assert first is not None  # see `_require_finished`
    assert second is not None  # it has just been trained
    count, differences = 0, []
    for file in sorted({*first.files, *second.files}):
        group, ending = Path(file).stem, Path(file).suffix
        if ending != ".safetensors" or "/" in file:
            continue
        before, now = first.tensors(group), second.tensors(group)
        count += len(before)
        if before.keys() != now.keys() or any(before[name].shape != now[name].shape for name in before):
            differences.append(f"{second.folder / file}: other tensors")
        elif any(not torch.equal(before[name], now[name]) for name in before):
            largest = max(float((before[name].double() - now[name].double()).abs().max()) for name in before)
            differences.append(f"{second.folder / file}: by {largest:.3g} at most")
    return count, differences


def _compare_students(run: Path, out: Path) -> tuple[int, list[str]]:
    """Weight files of the saved students, and those that differ."""
    names = {path.relative_to(folder) for folder in (run, out) for path in folder.rglob("*.safetensors")}
    both = [name for name in sorted(names) if (run / name).is_file() and (out / name).is_file()]
    differences = [f"{out / name} is only in one of both" for name in sorted(names - set(both))]
    differences += [f"{out / name}" for name in both if checksum(run / name) != checksum(out / name)]
    return len(both), differences
