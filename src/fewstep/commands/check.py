"""`fewstep check`: the known answers."""

from __future__ import annotations

from dataclasses import dataclass

from fewstep.commands.common import parse


@dataclass(kw_only=True)
class Check:
    """Run the known answers (exact teachers), print what was measured and its limit; exits with 1 if any fails."""

    full: bool = False
    """Also the ones that take minutes."""
    only: tuple[str, ...] = ()
    """Only checks in whose name one of these occurs, such as `through adapters`."""


def main(arguments: list[str]) -> None:
    """Run and print, row by row."""
    from rich.console import Console
    from rich.table import Table

    args = parse(Check, "check", arguments)
    from fewstep.evaluation.known_answers import run_known_answers

    table = Table("known answer", "measured", "limit", "")
    failed = 0
    for row in run_known_answers(full=args.full, only=args.only):
        print(f"{'ok  ' if row.passed else 'FAIL'} {row.name}", flush=True)
        failed += not row.passed
        table.add_row(row.name, f"{row.measured:.4g}", str(row.limit), "ok" if row.passed else "[red]FAIL")
    Console().print(table)
    if failed:
        raise SystemExit(1)
