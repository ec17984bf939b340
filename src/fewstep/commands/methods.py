"""`fewstep methods`: what there is to choose from."""

from __future__ import annotations

from dataclasses import dataclass, fields

from fewstep.commands.common import parse
from fewstep.methods import available


@dataclass(kw_only=True)
class Methods:
    """List the methods: paper, what they need, network forwards per sample and iteration."""


def main(arguments: list[str]) -> None:
    """Print the table."""
    from rich.console import Console
    from rich.table import Table

    parse(Methods, "methods", arguments)
    table = Table("method", "what", "paper", "steps", "needs", "forwards per iteration")
    for name, make in available().items():
        options = make()
        method = options.build()
        needs = [
            field.name.replace("_", " ") for field in fields(method.needs) if getattr(method.needs, field.name) is True
        ]
        counts = ", ".join(str(count) for count in options.counts)
        what = " ".join((make.__doc__ or method.title).split())
        table.add_row(name, what, method.paper, counts, ", ".join(needs), f"{method.forwards():.2f}")
    Console().print(table)
