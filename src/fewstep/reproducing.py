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

from fewstep.api import STUDENT_FOLDER, RoleOptions, distill, load_teacher
from fewstep.attention.sparse import SparseOptions
from fewstep.conditions import TextOptions
from fewstep.core.files import checksum
from fewstep.data.sources import read_prompts
from fewstep.errors import FewstepError
from fewstep.material import fingerprint
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
_SIDES = ("height", "width", "num_frames")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
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


@dataclass(frozen=True)
class _Asked:
    """What a run was asked for, as its run.json says."""

    teacher: dict[str, Any]
    """Arguments of `load_teacher`."""
    teacher_steps: int
    teacher_guidance: float
    digest: str
    """Of the teacher's files."""
    options: Options
    roles: RoleOptions
    train: TrainOptions
    text: TextOptions
    sizes: list[str]
    prompts: str | None
    fingerprint: dict[str, Any]
    """Of the prompts."""
    given: list[str]
    machine: dict[str, Any]
    versions: dict[str, str]


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
    asked = _asked(run / parts[0])
    for part in parts:
        _require_finished(run / part, asked.train.iterations)
    passed = {"real": real is not None, "pairs": pairs is not None, "hooks": True}
    if missing := [name for name in asked.given if not passed.get(name)]:
        raise FewstepError(
            f"found a run with {' and '.join(missing)} passed in Python, which no file holds, expected the same again, "
            f"fix: fewstep.reproduce(..., {missing[0]}=...)"
        )
    teacher, texts = _teacher(asked), _prompts(asked, prompts)
    threads = torch.get_num_threads()
    torch.set_num_threads(asked.machine["threads"])
    try:
        here = machine(teacher.backbone.device)
        distill(
            teacher, asked.options, out=out, prompts=texts, real=real, pairs=pairs, roles=asked.roles,
            train_options=asked.train, text=asked.text, sizes=asked.sizes, hooks=hooks, resume=True,
        )  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    surroundings = differing(asked.versions, describe({})["versions"]) + differing(asked.machine, here)
    ignored = (*OF_THE_MOMENT, "evaluate/") if "hooks" in asked.given and hooks is None else OF_THE_MOMENT
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


def _asked(run: Path) -> _Asked:
    """What run.json says that was asked for.

    Raises:
        FewstepError: it does not say it, or it is nothing that this version knows.
    """
    record = read_record(run)
    if not isinstance(record.get(ORIGIN), dict):
        raise FewstepError(
            f"found no {ORIGIN!r} in {run / RECORD}, expected that of a run which fewstep.distill began (an earlier "
            "version, MSD's parts and fewstep.training.train leave none), fix: repeat the call that made it"
        )
    origin, configuration = record[ORIGIN], record["configuration"]
    try:
        told, given = origin["teacher"], [str(name) for name in origin["given"]]
        asked = _Asked(
            teacher={
                "source": str(told["source"]),
                "dtype": _DTYPES[told["dtype"]],
                "quantised": told["quantised"],
                **{name: int(told["size"][name]) for name in told["size"].keys() & set(_SIDES)},
            },
            teacher_steps=int(told["steps"]),
            teacher_guidance=float(told["guidance_scale"]),
            digest=str(record[DATA]["teacher"]),
            options=_options(configuration["method"]),
            roles=_restored(RoleOptions, _with_sparse(origin["roles"])),
            train=_restored(TrainOptions, record["options"]),
            text=_restored(TextOptions, _with_path(origin["text"])),
            sizes=[str(size) for size in origin["sizes"]],
            prompts=None if origin["prompts"] is None else str(origin["prompts"]),
            fingerprint={"count": configuration["prompts"]["count"], "hash": configuration["prompts"]["hash"]},
            given=given,
            machine=dict(origin["machine"]),
            versions=record["versions"],
        )
        asked.train.validate()
        asked.roles.validate(asked.options.build().needs, asked.roles)
        if not (isinstance(asked.machine["threads"], int) and asked.machine["threads"] > 0):
            raise ValueError(f"threads {asked.machine['threads']}")
        asked.machine["device"]
    except FewstepError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise FewstepError(
            f"found {run / RECORD} that does not say what was asked for ({type(error).__name__}: {error}), expected "
            "what fewstep.distill writes there, fix: repeat the call that made the run"
        ) from error
    return asked


def _require_finished(run: Path, iterations: int) -> None:
    found = checkpoint.newest(run / "checkpoints")
    if found is None or found.iteration != iterations:
        at = "without a checkpoint" if found is None else f"at iteration {found.iteration}"
        raise FewstepError(
            f"found the run {run} {at}, expected it finished at iteration {iterations}, fix: resume it first (--resume)"
        )


def _teacher(asked: _Asked) -> Teacher:
    """The teacher as it was loaded; on the CPU where there is no device of its kind.

    Raises:
        FewstepError: its files are others by now.
    """
    device = "cuda" if asked.machine["device"] == "cuda" and torch.cuda.is_available() else "cpu"
    teacher = load_teacher(**asked.teacher, device=device, defer=asked.roles.shard)
    teacher.steps, teacher.guidance_scale = asked.teacher_steps, asked.teacher_guidance
    if teacher_digest(teacher) != asked.digest:
        raise FewstepError(
            f"found other files in the teacher's folder {asked.teacher['source']} than the run was made with, expected "
            "the same, fix: restore that folder"
        )
    return teacher


def _prompts(asked: _Asked, told: Sequence[str] | str | Path | None) -> Sequence[str] | None:
    """The prompts, which are the run's own; None for the embedded teacher's captions.

    Raises:
        FewstepError: nothing says where they are, or they are others.
    """
    source = asked.prompts if told is None else told
    if source is None:
        raise FewstepError(
            "found a run with prompts that were passed in Python, expected them again, as no file holds them, "
            "fix: fewstep.reproduce(..., prompts=[...]), or --prompts FILE"
        )
    if source == OWN:
        return None
    texts = read_prompts(source) if isinstance(source, str | Path) else list(source)
    now, before = fingerprint(texts), asked.fingerprint
    if now != before:
        raise FewstepError(
            f"found other prompts ({now['count']}, hash {now['hash']}) than the run was made with "
            f"({before['count']}, hash {before['hash']}), expected the same, fix: restore the file"
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


def _with_sparse(roles: Mapping[str, Any]) -> dict[str, Any]:
    return {**roles, "sparse": _restored(SparseOptions, roles.get("sparse", {}))}  # runs before there was one


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
