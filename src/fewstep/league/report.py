"""The tables of docs/results.md: mean and spread over seeds, method by method, the best first."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep.data.things import STYLES
from fewstep.embedded.build import TABLE_FILE, shipped
from fewstep.errors import FewstepError
from fewstep.league.cells import SETTINGS, results
from fewstep.training.checkpoint import write_text

Row = Mapping[str, Any]
"""One score of a result, with what it cost."""


@dataclass(frozen=True)
class Column:
    """A column of a table."""

    title: str
    value: Callable[[Row], float | None]
    """None where a row has no such number."""
    form: str
    """As in `format`."""
    times: float = 1.0

    def text(self, rows: Sequence[Row]) -> str:
        """The mean over rows, and half the distance of the largest and the smallest where there are several."""
        values = [self.times * value for row in rows if (value := self.value(row)) is not None]
        if not values:
            return ""
        mean, spread = sum(values) / len(values), (max(values) - min(values)) / 2
        return f"{mean:{self.form}}" + (f" ± {spread:{self.form}}" if len(values) > 1 else "")


def _named(title: str, form: str, name: str | None = None, times: float = 1.0) -> Column:
    return Column(title, lambda row: row.get(name or title), form, times)


def _style(row: Row) -> float:
    return row["histograms"]["style"][0]


COST = [_named("iterations", ".0f"), _named("forwards", ".0f"), _named("seconds", ".0f")]
EMOJI = [
    _named("Fréchet", ".1f", "frechet"),
    _named("following, %", ".1f", "following", 100),
    _named("recall", ".3f"),
    _named("precision", ".3f"),
    _named("contrast", ".3f"),
    _named("clipped, %", ".1f", "clipped", 100),
    _named("style evenness", ".3f"),
    _named("background evenness", ".3f"),
    Column(f"open styles: {STYLES[0]}, %", _style, ".0f", 100),
    *COST,
]
MIXTURES = [
    _named("sliced W2", ".3f"),
    _named("MMD², 1e-3", ".2f", "MMD^2", 1000),
    _named("smallest mode", ".2f"),
    *COST,
]

_NOTES = {
    "mixtures": "A mixture of eight modes of weights 1 to 4 in the plane, on the cosine process; samples against "
    "samples of the exact law. Smallest mode: its share of the samples over its weight, 1 is right. Nothing is guided "
    "there, so methods that differ in guidance alone are one. Seconds are the core's own.",
    "emoji": "Students of the embedded teacher on held-out captions, against the teacher's guided 50-step samples with "
    "other seeds. Open styles: their shares where the caption leaves the style open. Seconds are the wall's.",
}
_COMMON = (
    "Every training has the same budget of network forwards for each place of the batch (guided calls count 2, the "
    "teacher's samples for pairs included, backward passes not); `forwards` and `seconds` are what it spent. Mean over "
    "seeds ± half the distance of the largest and the smallest. Best first, by the first column."
)


def write_report(out: Path, document: Path) -> list[str]:
    """Put the tables of every league in `out` into `document`; returns the leagues' names.

    A league's text is what stands between the marks `<!-- league:NAME -->` and `<!-- /league:NAME -->`. Where they are
    missing, they are put before the first section. The rest of the document is left as it is.

    Raises:
        FewstepError: there is no result, or no document.
    """
    found = {path.parent.name: list(results(path.parent)) for path in sorted(out.glob(f"*/{SETTINGS}"))}
    found = {name: there for name, there in found.items() if there}
    if not found:
        raise FewstepError(
            f"found no result in {out}, expected those of a league, fix: run `fewstep league mixtures` or "
            "`fewstep league emoji` first, or name their --out"
        )
    if not document.is_file():
        raise FewstepError(f"found no file {document}, expected the document for the tables, fix: change --results")
    text = document.read_text()
    for name in found:
        settings = json.loads((out / name / SETTINGS).read_text())
        text = _inserted(text, name, section(name, settings, found[name]))
    write_text(document, text)
    return list(found)


def section(name: str, settings: Mapping[str, Any], found: Sequence[Row]) -> str:
    """The text of one league: how it was made, the teacher's own rows, a table for each step count, and failures."""
    columns = EMOJI if name == "emoji" else MIXTURES
    title = "the embedded teacher" if name == "emoji" else "a mixture with a known law"
    finished = [row for row in found if "error" not in row]
    parts = [f"## The league on {title}", *map(_wrapped, (_made_by(name, settings, finished), _NOTES[name], _COMMON))]
    if finished:
        shown = [column for column in columns if column not in COST]
        if rows := _reference_rows(name, settings, shown):
            parts.append(_table(["sampler", *_titles(shown)], rows))
    for steps in sorted({int(steps) for row in finished for steps in row["scores"]}):
        scored = [row | row["scores"][str(steps)] | _cost(row) for row in finished if str(steps) in row["scores"]]
        parts.append(f"**{steps} step{'s' * (steps > 1)}**")
        parts.append(_table(["method", "seeds", *_titles(columns)], _method_rows(scored, columns)))
    failed = [f"- {row['cell']}: {row['error']}" for row in found if "error" in row]
    if failed:
        parts.append("\n".join(["Failed:", *failed]))
    return "\n\n".join(parts)


def _cost(row: Row) -> dict[str, Any]:
    """Of the training; a score's own seconds are those of sampling."""
    return {name: row[name] for name in ("iterations", "forwards", "seconds")}


def _made_by(name: str, settings: Mapping[str, Any], finished: Sequence[Row]) -> str:
    words = " ".join(f"--{option} {_plain(value)}" for option, value in settings.items())
    machines = "; ".join(sorted({row["machine"] for row in finished}))
    seeds = ", ".join(str(seed) for seed in sorted({row["seed"] for row in finished}))
    total = sum(row["seconds"] for row in finished)
    spent = f"{total / 3600:.1f} hours" if total >= 7200 else f"{total / 60:.0f} minutes"
    return f"`fewstep league {name} {words}`, seeds {seeds}, on {machines}; {spent} of training together."


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _method_rows(rows: Iterable[Row], columns: Sequence[Column]) -> list[list[str]]:
    """One for each method, by the mean of the first column."""
    by_method: dict[str, list[Row]] = {}
    for row in rows:
        by_method.setdefault(row["method"], []).append(row)

    def rank(method: str) -> float:
        values = [value for row in by_method[method] if (value := columns[0].value(row)) is not None]
        return sum(values) / len(values)

    return [
        [
            method,
            ", ".join(str(row["seed"]) for row in sorted(by_method[method], key=lambda row: row["seed"])),
            *(column.text(by_method[method]) for column in columns),
        ]
        for method in sorted(by_method, key=rank)
    ]


def _reference_rows(name: str, settings: Mapping[str, Any], columns: Sequence[Column]) -> list[list[str]]:
    """The teacher's own sampler: as shipped with the embedded teacher, or computed on the mixture."""
    if name == "emoji":
        table = json.loads(shipped(TABLE_FILE).read_text())
        rows = {
            f"teacher, {steps} guided step{'s' * (steps > 1)}": row
            for steps in (1, 2, 4, 8, 50)
            if (row := table[f"{steps} steps, guidance 3.5"])["images"] == settings["count"]
        }
    else:
        from fewstep.league.mixtures import references

        rows = references(settings["count"])
    return [[label, *(column.text([row]) for column in columns)] for label, row in rows.items()]


def _titles(columns: Sequence[Column]) -> list[str]:
    return [column.title for column in columns]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    first, *others = [f"| {' | '.join(line)} |" for line in (head, *rows)]
    return "\n".join([first, "|" + "---|" * len(head), *others])


def _wrapped(text: str) -> str:
    """As wide as the document's other text."""
    return textwrap.fill(text, 145, break_long_words=False, break_on_hyphens=False)


def _inserted(text: str, name: str, section: str) -> str:
    """The document with a league's section between its marks."""
    first, last = f"<!-- league:{name} -->", f"<!-- /league:{name} -->"
    block = f"{first}\n{section}\n{last}"
    if (first in text) != (last in text):
        raise FewstepError(f"found one of the marks {first} and {last}, expected both or none, fix: put it back")
    if first in text:
        before, rest = text.split(first, 1)
        return before + block + rest.split(last, 1)[1]
    before, mark, after = text.partition("\n## ")
    return f"{before.rstrip()}\n\n{block}\n{mark}{after}"
