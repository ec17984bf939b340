"""`fewstep league ...`: all methods with the same budget of network forwards, and the tables of what came of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from fewstep.commands.common import choose_device, parse
from fewstep.errors import FewstepError

USAGE = """usage: fewstep league ACTION [OPTIONS]

Trains all methods at 1, 2 and 4 steps with the same budget of network forwards and compares what they reach.

actions:
  mixtures   on a mixture of Gaussians whose law is known; minutes on a CPU
  emoji      on the embedded teacher; hours on a CPU
  report     write the tables into docs/results.md

Run an action again to continue where it stopped, or several times at once to share the work.
"""


@dataclass(kw_only=True)
class Play:
    """What both leagues are told."""

    out: Path = Path("runs/league")
    """Folder of all leagues; results are kept there cell by cell."""
    only: tuple[str, ...] = ()
    """Methods; all that play unless told."""
    steps: tuple[int, ...] = (4, 1, 2)
    """Network calls of the students, in the order in which they are trained, 1 or more."""
    seeds: tuple[int, ...] = (0, 1)
    """Seeds of training, 0 or more."""
    minutes: float = float("inf")
    """No training is begun after so many."""
    retry: bool = False
    """Run again what failed before."""


@dataclass(kw_only=True)
class Mixtures(Play):
    """Train small networks to sample a mixture of eight unequal modes; exits with 1 if any training fails."""

    forwards: float = 2000.0
    """Network forwards of each training, for each place of the batch, guided ones counting 2."""
    batch: int = 256
    """Samples per iteration, 1 or more."""
    count: int = 20_000
    """Samples of a score, 2000 or more."""


@dataclass(kw_only=True)
class Emoji(Play):
    """Train and score students of the embedded teacher; exits with 1 if any training fails."""

    forwards: float = 775.0
    """Network forwards of each training, for each place of the batch, guided ones counting 2; 775 are 100 iterations
    of TDM at 4 steps."""
    batch: int = 32
    """Samples per iteration, 1 or more."""
    count: int = 256
    """Images of a score, 16 to 1024; the teacher's own rows are of 256."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the networks in training. On CPUs with AVX512-BF16 bf16 is 1.3 times faster."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, ..."""


@dataclass(kw_only=True)
class Report:
    """Write the tables of all finished trainings between their marks in a Markdown file, and leave the rest alone."""

    out: Path = Path("runs/league")
    """Folder of all leagues."""
    results: Path = Path("docs/results.md")
    """The file. Without marks, the tables go before its first section."""


def main(arguments: list[str]) -> None:
    """Dispatch to an action."""
    actions = {"mixtures": _mixtures, "emoji": _emoji, "report": _report}
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return
    if arguments[0] not in actions:
        raise FewstepError(f"found action {arguments[0]!r}, expected one of {', '.join(actions)}, fix: see --help")
    actions[arguments[0]](arguments[1:])


def _mixtures(arguments: list[str]) -> None:
    from fewstep.league.mixtures import MixtureLeague

    args = parse(Mixtures, "league mixtures", arguments)
    _require("count", args.count, 2000)
    _play(MixtureLeague(args.forwards, args.batch, args.count), args)


def _emoji(arguments: list[str]) -> None:
    from fewstep.league.emoji import EmojiLeague

    args = parse(Emoji, "league emoji", arguments)
    device = choose_device(args.device)
    _play(EmojiLeague(args.forwards, args.batch, args.count, args.precision, device), args)


def _play(league: Any, args: Play) -> None:
    from fewstep.league.budget import plan
    from fewstep.league.cells import cells, play
    from fewstep.league.entries import entries

    players = entries(args.only)
    _require("batch", league.batch, 1)
    for name, numbers, least in (("steps", args.steps, 1), ("seeds", args.seeds, 0)):
        _require(name, min(numbers, default=-1), least)
    work = cells(league, players, args.steps, args.seeds)
    if not work:
        raise FewstepError(
            f"found no training for {args.only} at {args.steps} steps, expected one or more, fix: change --only or "
            "--steps"
        )
    for cell in work:  # a budget that does not pay for an iteration is refused before any work
        plan(cell.options, league.forwards, league.batch)
    torch.set_num_threads(1)  # two stall each other when anything else runs; for more, run the command twice
    if play(league, work, args.out, minutes=args.minutes, retry=args.retry):
        raise SystemExit(1)


def _report(arguments: list[str]) -> None:
    from fewstep.league.report import write_report

    args = parse(Report, "league report", arguments)
    for name in write_report(args.out, args.results):
        print(f"{args.results}: {name}")


def _require(name: str, found: int, least: int) -> None:
    if found < least:
        raise FewstepError(f"found {name} {found}, expected {least} or more, fix: change --{name}")
