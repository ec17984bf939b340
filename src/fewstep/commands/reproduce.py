"""`fewstep reproduce RUN`: make a run again from its run.json and compare."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from fewstep.commands.common import parse


@dataclass(kw_only=True)
class Reproduce:
    """Make a finished run again, with its options and data, and compare; exits with 1 if anything differs."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of the run."""
    out: Path | None = None
    """Folder of the new run; RUN-again unless told. An interrupted one is continued."""
    prompts: str | None = None
    """PATH or PATH:COLUMN, where the run's prompts were passed in Python or lie elsewhere now."""


def main(arguments: list[str]) -> None:
    """Parse, run, compare, print."""
    from fewstep.reproducing import reproduce

    args = parse(Reproduce, "reproduce", arguments)
    found = reproduce(args.run, args.out, prompts=args.prompts)
    print(found.report())
    if not found.equal:
        raise SystemExit(1)
