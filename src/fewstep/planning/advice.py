"""What to change when a run does not fit, cheapest first, each with the memory that results."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

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

    First what changes no result (what is computed twice, how a batch is cut, where things lie), then what does.
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
    if run.text_encoder == "resident":
        run = replace(run, text_encoder="cache")
        yield "prompts encoded beforehand", "their states on disk, same result", run
    if run.gpus > 1 and not run.shard:
        run = replace(run, shard=True)
        yield "--shard", f"weights in {run.gpus} parts, gathered block by block, same result", run
    if run.base_dtype == "float32":
        run = replace(run, base_dtype="bfloat16")
        yield "--base-dtype bfloat16", "the teacher in half precision", run
    if run.train.precision == "fp32":
        run = trained(run, precision="bf16")
        yield "--precision bf16", "arithmetic of the networks in half precision, faster on a GPU", run
    if run.train.optimiser == "adamw":
        run = trained(run, optimiser="adamw8bit")
        yield "--optimiser adamw8bit", "moments rounded to a byte", run
    if run.roles.roles != "adapters":
        run = role(run, roles="adapters")
        yield "--roles adapters", "low-rank student and critic; rates of copies do not suit them", run
    for kind in ("int8", "nf4"):
        if run.base_dtype != "nf4" and run.base_dtype != kind:
            run = replace(run, base_dtype=kind)
            yield f"--base-dtype {kind}", "the teacher itself rounded", run
    if not run.shard:
        more = min(8, run.train.batch)
        if more > 1:
            run = replace(run, gpus=more, shard=True)
            yield f"--shard --gpus {more}", "more GPUs", run
