"""`fewstep methods`: what there is to choose from."""

from __future__ import annotations

from dataclasses import dataclass, fields

from fewstep.commands.common import parse
from fewstep.methods import available
from fewstep.models.card import papers


@dataclass(kw_only=True)
class Methods:
    """List the methods: what they need, network forwards per sample and iteration, the papers to cite."""


def main(arguments: list[str]) -> None:
    """Print the table, and the papers."""
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
    console = Console()
    console.print(table)
    print("MSD (arXiv 2410.23274) trains one of these for each part of the prompts: fewstep msd METHOD --part K")
    print("Parts of one method in another, by options alone: docs/methods.md")
    cited = {paper["arxiv"]: paper for make in available().values() for paper in papers(make().build().paper)}
    console.print("To cite (BibTeX is in the card of a student and in its run.json):")
    for paper in cited.values():
        console.print(f"  arXiv {paper['arxiv']}  {paper['title']}", highlight=False)
