"""A run made again from its run.json, and compared with the first: log lines, trained weights, the saved student.

    print(fewstep.reproduce("runs/mine").report())

On one machine, with the same versions and on the CPU, both are equal to the bit (docs/reproducibility.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fewstep.api import STUDENT_FOLDER, distill, load_teacher
from fewstep.asked import Asked, asked_for
from fewstep.core.files import checksum
from fewstep.data.sources import read_prompts
from fewstep.errors import FewstepError
from fewstep.material import fingerprint
from fewstep.methods.matching_options import MatchingOptions
from fewstep.methods.reward_forcing import Reward
from fewstep.models.router import Router, part_folder
from fewstep.models.student import ROUTER
from fewstep.models.teacher import Teacher
from fewstep.provenance import OWN, digest, real_digest, teacher_digest
from fewstep.several import distill_part
from fewstep.training import checkpoint
from fewstep.training.folder import describe, differing, machine
from fewstep.training.log import read_log
from fewstep.training.loop import Hooks, PairData, RealData

OF_THE_MOMENT = ("time/", "memory/")
"""Numbers of a log line that no two runs share."""


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
    reward: Reward | None = None,
    hooks: Hooks | None = None,
) -> Reproduction:
    """Make a finished run again, with the options and data that its run.json names, and compare.

    Costs as much as the run did. An interrupted reproduction goes on when it is called again.

    Args:
        run: folder of a run of `fewstep.distill` (also of one with phases); of MSD's parts, all of which are made
            again, or of one of them, which is made again in `out`/part-<k>.
        out: folder of the new run; `run` with `-again` unless told. MSD's router is copied there.
        prompts: as for `distill`, where they were passed in Python or lie elsewhere now; they have to be the same.
        real: clean data, where they were passed in Python.
        pairs: likewise.
        reward: likewise.
        hooks: likewise; without them the log lacks their numbers, and they are not compared.

    Raises:
        FewstepError: a run that is not finished, that does not tell where it comes from, or whose teacher, prompts or
            first student are others by now; all before any work.
    """
    run = Path(run)
    out = Path(f"{run}-again" if out is None else out)
    if out.resolve() == run.resolve():
        raise FewstepError(f"found {out} as the run and its copy, expected two folders, fix: choose another --out")
    several = (run / ROUTER).is_file()
    folders = [part_folder(run, number) for number in range(Router.load(run).parts)] if several else [run]
    calls = [(folder, asked_for(folder)) for folder in folders if folder.is_dir() or not several]
    if not calls:
        raise FewstepError(f"found no part-<k> in {run}, expected those of MSD, fix: train them (fewstep msd)")
    for _, asked in calls:
        _require_given(asked, real=real, pairs=pairs, reward=reward, hooks=hooks)
        _require_data(asked, real)
    ready = [(folder, asked, _teacher(asked), _prompts(asked, prompts)) for folder, asked in calls]
    compared, differences, surroundings = [], [], []
    for folder, asked, teacher, texts in ready:
        new = out if asked.part is None else part_folder(out, asked.part.number - 1)
        threads = torch.get_num_threads()
        torch.set_num_threads(asked.machine["threads"])
        try:
            surroundings += differing(asked.machine, machine(teacher.backbone.device))
            if asked.part is None:
                distill(
                    teacher, asked.options, out=out, prompts=texts, real=real, pairs=pairs, reward=reward,
                    start=asked.start, roles=asked.roles, train_options=asked.train[asked.turns[0]], text=asked.text,
                    sizes=asked.sizes, held_out=asked.held_out, hooks=hooks, resume=True,
                )  # fmt: skip
            else:
                _again(asked, folder.parent, teacher, texts, real, out)
        finally:
            torch.set_num_threads(threads)
        surroundings += differing(asked.versions, describe({})["versions"])
        ignored = (*OF_THE_MOMENT, "evaluate/") if "hooks" in asked.given and hooks is None else OF_THE_MOMENT
        for turn in asked.turns:
            lines, found = _compare_logs(folder / turn, new / turn, ignored)
            tensors, others = _compare_weights(folder / turn, new / turn)
            name = Path(folder.name if several else "", turn)
            compared.append(f"{lines} log lines and {tensors} tensors of {name if name.name else 'the run'}")
            differences += found + others
        files, found = _compare_students(folder / STUDENT_FOLDER, new / STUDENT_FOLDER)
        compared.append(f"{files} weight files of the student")
        differences += found
    return Reproduction(run, out, tuple(compared), tuple(differences), tuple(dict.fromkeys(surroundings)))


def _require_given(asked: Asked, **passed: object) -> None:
    """Refuses where what was passed in Python is not passed again, or MSD is passed what it does not take."""
    missing = [name for name in asked.given if name != "hooks" and passed.get(name) is None]
    if missing:
        again = f"fewstep.reproduce(..., {missing[0]}=...)" if missing[0] in passed else "repeat the call that made it"
        raise FewstepError(
            f"found a run with {' and '.join(missing)} passed in Python, which no file holds, expected the same again, "
            f"fix: {again}"
        )
    odd = [name for name in ("pairs", "reward", "hooks") if passed[name] is not None and asked.part is not None]
    if odd:
        raise FewstepError(f"found {odd[0]} for a part of MSD, expected none, as it takes none, fix: leave them out")


def _require_data(asked: Asked, real: RealData | None) -> None:
    """Refuses other real data, and where the student that the run began with is not there, or another."""
    if asked.real_digest and asked.real_digest != real_digest(real):
        raise FewstepError(
            "found other real data than the run was made with, expected the same images, texts and seed, fix: pass "
            "fewstep.reproduce(..., real=...) the RealImages of the call that made it"
        )
    if asked.start is not None and digest(asked.start) != asked.start_digest:
        raise FewstepError(
            f"found other files in {asked.start} than those of the student that the run began with, expected the same, "
            "fix: restore that folder"
        )


def _again(
    asked: Asked, home: Path, teacher: Teacher, texts: Sequence[str] | None, real: RealData | None, out: Path
) -> None:
    """A part of MSD, whose router in `home` it shares with the others."""
    assert asked.part is not None
    assert isinstance(asked.options, MatchingOptions)  # see `asked_for`
    if not (out / ROUTER).is_file():
        Router.load(home).save(out)
    part = asked.part
    distill_part(
        teacher, part.number, out=out, parts=part.of, dm=asked.options, gan_weight=part.gan_weight, tsm=part.tsm,
        depth=part.depth, width=part.width, prompts=texts, real=real, roles=asked.roles, train_options=asked.train,
        text=asked.text, resume=True,
    )  # fmt: skip


def _teacher(asked: Asked) -> Teacher:
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


def _prompts(asked: Asked, told: Sequence[str] | str | Path | None) -> Sequence[str] | None:
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
    texts = read_prompts(source) if isinstance(source, str | Path) else source
    now, before = fingerprint(texts), asked.fingerprint
    if now != before:
        raise FewstepError(
            f"found other prompts ({now['count']}, hash {now['hash']}) than the run was made with "
            f"({before['count']}, hash {before['hash']}), expected the same, fix: restore the file"
        )
    return texts


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
