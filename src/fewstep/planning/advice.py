"""What to change when a run does not fit, cheapest first, each with the memory that results."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from fewstep.models.quantised import PACKAGES
from fewstep.planning.build import Blueprint
from fewstep.planning.memory import Run, plan


@dataclass(frozen=True)
class Change:
    """One change on top of those before it."""

    option: str
    why: str
    total: int
    """Bytes of one GPU with this change and all before it."""
    fits: bool


def advise(print_: Blueprint, run: Run, room: int) -> Iterator[Change]:
    """Changes one on top of the other until the run fits into `room` bytes, or nothing is left to change.

    First what changes no result (what is computed twice, how a batch is cut, where things lie), then what does. Nothing
    is advised that `distill` would refuse: a sharded run has neither a rounded base nor an 8-bit optimiser.
    """
    for option, why, changed in _changes(run):
        total = plan(print_, changed).total
        yield Change(option, why, total, total <= room)
        if total <= room:
            return


_Step = tuple[str, str, Run]


def _changes(run: Run) -> Iterator[_Step]:
    """(option, what it costs, the run with it), each made from the one before; those that are set are left out."""

    def role(run: Run, **told: object) -> Run:
        return replace(run, roles=replace(run.roles, **told))  # type: ignore[arg-type]

    def trained(run: Run, **told: object) -> Run:
        return replace(run, train=replace(run.train, **told))  # type: ignore[arg-type]

    if not run.roles.checkpointing:
        run = role(run, checkpointing=True)
        yield "--checkpointing", "about a third more time, same result", run
    if run.rows > 1:
        run = trained(run, microbatch=1)
        yield "--microbatch 1", "slower where the GPU is not full, same result", run
    if run.text_encoder == "keep":
        run = replace(run, text_encoder="cache")
        yield "--text-encoder cache", "prompts encoded beforehand, their states on disk", run
    if run.gpus > 1 and not run.shard:
        words, spread = _sharded(run, run.gpus)
        if words == "--shard" and run.train.batch % run.gpus == 0:
            run = spread
            yield words, f"weights in {run.gpus} parts, gathered block by block, same result", run
    if run.base_dtype == "float32":
        run = replace(run, base_dtype="bfloat16")
        yield "--base-dtype bfloat16", "the teacher in half precision", run
    if run.train.precision == "fp32":
        run = trained(run, precision="bf16")
        yield "--precision bf16", "arithmetic of the networks in half precision, faster on a GPU", run
    if run.train.optimiser == "adamw" and not run.shard:
        run = trained(run, optimiser="adamw8bit")
        yield "--optimiser adamw8bit", "moments rounded to a byte", run
    if run.roles.roles != "adapters":
        run = role(run, roles="adapters")
        yield "--roles adapters", "low-rank student and critic; rates of copies do not suit them", run
    for kind in () if run.shard else ("int8", "nf4"):
        if run.base_dtype != "nf4" and run.base_dtype != kind:
            run = replace(run, base_dtype=kind)
            yield f"--base-dtype {kind}", "the teacher itself rounded", run
    more = next(gpus for gpus in range(max(8, run.gpus), 0, -1) if run.train.batch % gpus == 0)
    if more > (run.gpus if run.shard else 1):
        words, run = _sharded(run, more)
        yield f"{words} --gpus {more}", "more GPUs", run


def _sharded(run: Run, gpus: int) -> tuple[str, Run]:
    """The run sharded over `gpus`, and the options that this takes: what cannot be sharded is as it was."""
    words, train, base = ["--shard"], run.train, run.base_dtype
    if base in PACKAGES:
        base = "bfloat16"
        words.append("--base-dtype bfloat16")
    if train.optimiser != "adamw":
        train = replace(train, optimiser="adamw")
        words.append("--optimiser adamw")
    if train.precision == "fp16":
        train = replace(train, precision="bf16")
        words.append("--precision bf16")
    return " ".join(words), replace(run, gpus=gpus, shard=True, train=train, base_dtype=base)
