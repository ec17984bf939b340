"""`fewstep plan [METHOD] --teacher FOLDER [OPTIONS]`: memory, time and cost of a run before it is launched."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from copy import copy
from dataclasses import asdict, dataclass, field, make_dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from fewstep.api import EMOJI, defaults
from fewstep.commands.common import parse
from fewstep.commands.distill import SizeOptions, _given
from fewstep.conditions import mode_of
from fewstep.embedded.names import named
from fewstep.errors import FewstepError
from fewstep.planning.advice import Change, advise
from fewstep.planning.build import blueprint
from fewstep.planning.memory import Plan, Run, plan

_UNITS = {"GB": 10**9, "GIB": 2**30, "MB": 10**6, "MIB": 2**20}
_ACTIVATIONS = "activations of torch's own tensors; scratch memory of kernels comes on top (docs/plan.md)"


@dataclass(kw_only=True)
class PlanOptions:
    """The machines, and what is known about them. All other options are those of `fewstep distill`."""

    teacher: str = EMOJI
    """`emoji` or `films` (embedded), a diffusers pipeline folder, or a Hub id. Only configs are read."""
    gpus: int = 1
    """GPUs that train together, 1 or more."""
    memory: str = "80GB"
    """Of each GPU, in GB (10^9 bytes), GiB, MB or MiB."""
    reserve: str = "2GB"
    """Of it, left for CUDA's context, kernels' scratch memory and what the allocator wastes. Not measured."""
    base_dtype: Literal["float32", "bfloat16", "int8", "nf4"] = "float32"
    """Of the frozen teacher's weights."""
    text_encoder: Literal["auto", "cache", "offload", "keep"] = "auto"
    """As of `fewstep distill`: prompts encoded beforehand, by encoders that wait on the CPU, or that stay in memory;
    `auto`: cache, but keep for the embedded teachers."""
    words: int | None = None
    """Text tokens of the longest prompt, for families that cut padding off; the most there can be unless told."""
    prompt_count: int = 0
    """Prompts that a cache on disk would hold."""
    seconds_per_forward: float | None = None
    """Measured: one network forward of one sample on one GPU (`benchmarks/training_step.py` prints it)."""
    throughput: float | None = None
    """In its place: TFLOP/s that one GPU does on such a network."""
    price_per_hour: float | None = None
    """Of one GPU, in any currency."""
    json: bool = False
    """Print one JSON object in the place of tables."""


def main(arguments: list[str]) -> None:
    """Parse, plan, print."""
    method = arguments.pop(0) if arguments and not arguments[0].startswith("-") else "tdm"
    options, roles, train = defaults(_given(arguments, "--teacher") or EMOJI, method, _given(arguments, "--roles"))
    parts: dict[str, Any] = {
        "told": PlanOptions(), "size": SizeOptions(), "roles": roles, "train": train, "method": options,
    }  # fmt: skip
    fields = [(name, type(part), field(default_factory=partial(copy, part))) for name, part in parts.items()]
    kind = make_dataclass("Plan", fields)
    kind.__doc__ = f"Say what distilling a teacher by {method} takes, and what to change if it does not fit."
    args = parse(kind, f"plan {method}", arguments)
    told = args.told
    args.method.validate()
    args.roles.validate(args.method.build().needs, roles)
    room = size_in_bytes(told.memory) - size_in_bytes(told.reserve)
    size = asdict(args.size)
    if sizes := size.pop("sizes"):
        raise FewstepError(f"found --sizes {sizes}, expected one, fix: plan the largest with --width and --height")
    size = {name: value for name, value in size.items() if value is not None}
    print_ = blueprint(named(told.teacher), size=size)
    run = Run(
        args.method, args.roles, args.train, told.base_dtype, told.gpus, args.roles.shard,
        mode_of(told.text_encoder, print_.backbone), told.words,
    )  # fmt: skip
    found = plan(print_, run)
    changes = [] if found.total <= room else list(advise(print_, run, room))
    report = _report(found, run, told, room, changes)
    if told.json:
        print(json.dumps(report, indent=1))
    else:
        _print(report, Path(told.teacher).name, method, run)


def size_in_bytes(text: str) -> int:
    """ "80GB" -> 80 x 10^9, "24GiB" -> 24 x 2^30.

    Raises:
        FewstepError: no number with such a unit.
    """
    found = re.fullmatch(r"([0-9.]+) ?([GM]i?B)", text, re.IGNORECASE)
    if not found:
        raise FewstepError(f"found the size {text!r}, expected one like 80GB or 24GiB, fix: name number and unit")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def _report(found: Plan, run: Run, told: PlanOptions, room: int, changes: Iterable[Change]) -> dict[str, Any]:
    """Everything as numbers: bytes, seconds, and the price in the currency it was told in."""
    report: dict[str, Any] = {
        "parameters": dict(found.parameters),
        "bytes_per_gpu": dict(found.parts),
        "bytes_total": sum(found.parts.values()),
        "bytes_encoding": found.encoding,
        "bytes_saving": found.saving,
        "bytes_headroom": room - found.total,
        "fits": found.total <= room,
        "cache_bytes": found.cache_per_prompt * told.prompt_count,
        "cache_bytes_per_prompt": found.cache_per_prompt,
        "forwards_per_sample": found.forwards,
        "passes_per_sample": found.passes,
        "operations_per_forward": found.operations,
        "changes": [asdict(change) for change in changes],
        "note": _ACTIVATIONS,
    }
    seconds = told.seconds_per_forward
    if seconds is None and told.throughput:
        seconds = found.operations / (told.throughput * 1e12)
    if seconds is not None:
        iteration = found.seconds(run, seconds)
        hours = iteration * run.train.iterations / 3600
        report |= {"iteration_seconds": iteration, "hours": hours, "gpu_hours": hours * run.gpus}
        if told.price_per_hour is not None:
            report["price"] = hours * run.gpus * told.price_per_hour
    return report


def _print(report: dict[str, Any], teacher: str, method: str, run: Run) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table("", "numbers", title=f"{teacher}, {method}, {run.roles.roles}: parameters", title_justify="left")
    for name, number in report["parameters"].items():
        table.add_row(name if name == "frozen" else f"trained, {name}", f"{number:,}")
    console.print(table)
    table = Table("on each GPU", "GiB", title=f"{run.gpus} GPU(s), micro-batch {run.rows}", title_justify="left")
    for name, size in report["bytes_per_gpu"].items():
        table.add_row(name, _gib(size))
    table.add_section()
    if report["bytes_encoding"]:
        table.add_row("while prompts are encoded", _gib(report["bytes_encoding"]))
    table.add_row("while it trains", _gib(report["bytes_total"]))
    table.add_row("while the student is saved", _gib(report["bytes_saving"]))
    table.add_row("headroom", _gib(report["bytes_headroom"]))
    console.print(table)
    console.print(f"It {'fits' if report['fits'] else 'does not fit'}. Counted: {report['note']}.", highlight=False)
    if report["changes"]:
        table = Table("change, on top of those before", "what it means", "GiB", "fits", title="What to change")
        for change in report["changes"]:
            table.add_row(change["option"], change["why"], _gib(change["total"]), "yes" if change["fits"] else "no")
        console.print(table)
    each = report["cache_bytes_per_prompt"]
    console.print(f"Encoded prompts on disk: {each / 2**20:.2f} MiB each, {_gib(report['cache_bytes'])} GiB in all.")
    console.print(
        f"{report['forwards_per_sample']:.2f} forwards per sample and iteration, with backward passes worth "
        f"{report['passes_per_sample']:.2f}; {report['operations_per_forward'] / 1e9:,.1f} GFLOP a forward."
    )
    if "hours" in report:
        price = f", price {report['price']:,.2f}" if "price" in report else ""
        console.print(
            f"{report['iteration_seconds']:.3g} s an iteration, {report['hours']:.3g} h for {run.train.iterations} "
            f"({report['gpu_hours']:.3g} GPU hours{price}); without rest: encoding prompts, random numbers, optimiser."
        )
    else:
        console.print("For time and cost: --seconds-per-forward or --throughput, and --price-per-hour.")


def _gib(size: float) -> str:
    return f"{size / 2**30:,.2f}" if abs(size) >= 2**30 / 10 else f"{size / 2**30:.4f}"
