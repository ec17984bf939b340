"""The tables of a report: key figures, figures with intervals, preferences, settings. All text is escaped."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from fewstep.evaluation.charts import number
from fewstep.evaluation.intervals import Estimate
from fewstep.evaluation.pictures import Candidate
from fewstep.evaluation.preferences import Preference, Vote, percent, preferences

LOWER_IS_BETTER = {
    "frechet",
    "kernel",
    "paired",
    "flicker",
    "clipped",
    "drift",
    "wasserstein",
    "mmd",
    "distance",
    "error",
}
HIGHER_IS_BETTER = {
    *("precision", "recall", "density", "coverage", "following", "thing", "evenness", "score", "accuracy"),
    *("fit", "identity"),
}
"""Beginnings of names of figures that tell their direction; one with neither is shown without a mark."""
_LABELS = {"frechet": "Fréchet distance", "kernel": "kernel distance", "following": "prompt-following"}
_HEADLINE = ("frechet", "following", "recall")
_NONE = Estimate(math.nan)
MISSING = "—"


def headline(reference: Candidate, student: Candidate) -> str:
    """The figures on top: what the student saves, and what it reaches."""
    if reference is student:
        tile = _tile(str(student.calls), "network calls per picture", student.name)
        return f'<section class="headline"><div class="tiles">{tile}</div></section>'
    tiles = [
        _tile(
            _times(reference.calls, student.calls),
            "fewer network calls",
            f"{student.calls} instead of {reference.calls}",
        )
    ]
    if reference.seconds and student.seconds:
        detail = f"{seconds(student.seconds)} instead of {seconds(reference.seconds)} per picture"
        tiles.append(_tile(_times(reference.seconds, student.seconds), "less time", detail))
    for base in _HEADLINE:
        name = next((name for name in student.scores if _base(name) == base), base)
        ours, theirs = (c.scores.get(name, _NONE).value for c in (student, reference))
        if math.isfinite(ours):
            digits = _digits([ours, theirs])
            detail = f"{reference.name}: {_fixed(theirs, digits)}"
            tiles.append(_tile(_fixed(ours, digits), f"{_label(name)} {_mark(name)}", detail))
    pair = f"{text(student.name)} <i>against</i> {text(reference.name)}"
    return f'<section class="headline"><p>{pair}</p><div class="tiles">{"".join(tiles)}</div></section>'


def _times(a: float, b: float) -> str:
    return f"{a / b:.0f}×" if a >= 10 * b else f"{a / b:.2g}×"


def _tile(figure: str, what: str, detail: str) -> str:
    return f"<div><b>{text(figure)}</b><span>{text(what)}</span><small>{text(detail)}</small></div>"


def figures(candidates: Sequence[Candidate], student: Candidate) -> str:
    """A row per figure and a column per candidate; costs first."""
    calls = [-float(c.calls) for c in candidates]
    times = [math.nan if c.seconds is None else -c.seconds for c in candidates]
    rows = [
        _row("network calls ↓", [str(c.calls) for c in candidates], candidates, student, calls),
        _row("time per picture ↓", [seconds(c.seconds) for c in candidates], candidates, student, times),
    ]
    for name in dict.fromkeys(name for c in candidates for name in c.scores):
        found = [c.scores.get(name, _NONE) for c in candidates]
        digits = _digits([each.value for each in found])
        goodness = [_direction(name) * each.value for each in found]
        label = f"{text(_label(name))}&nbsp;{_mark(name)}"
        rows.append(_row(label, [_estimate(each, digits) for each in found], candidates, student, goodness))
    return table("scores", ["", *(text(c.name) for c in candidates)], rows, [None, *candidates].index(student))


def _row(
    label: str, cells: Sequence[str], candidates: Sequence[Candidate], student: Candidate, goodness: Sequence[float]
) -> str:
    """Cells are ready-made; the best of them needs a known direction and a rival."""
    rivals = [good for good in goodness if math.isfinite(good)]
    best = max(rivals) if len(rivals) > 1 and max(rivals) > min(rivals) else math.nan
    out = []
    for cell, candidate, good in zip(cells, candidates, goodness, strict=True):
        classes = " ".join(name for name, is_so in (("best", good == best), ("chosen", candidate is student)) if is_so)
        out.append(f'<td class="{classes}">{cell}</td>' if classes else f"<td>{cell}</td>")
    return f'<tr><th scope="row">{label}</th>{"".join(out)}</tr>'


def table(css_class: str, heads: Sequence[str], rows: Sequence[str], chosen: int = -1) -> str:
    """Ready-made heads and rows in a frame that scrolls sideways where the screen is narrow."""
    cells = "".join(
        f'<th scope="col"{" class=chosen" if i == chosen else ""}>{head}</th>' for i, head in enumerate(heads)
    )
    return (
        f'<div class="{css_class}" tabindex="0" role="region" aria-label="{css_class}"><table><thead><tr>{cells}</tr>'
        f"</thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def voted(votes: Sequence[Vote]) -> str:
    """What votes say: each candidate against all others, and pair by pair."""
    alone, pairs = preferences(votes)
    voters = len({vote.voter for vote in votes})
    hint = (
        f"{len(votes)} blind votes of {voters} voter{'s' * (voters != 1)}. Share of the pictures preferred, equal ones "
        "half; in brackets Wilson's 95 % interval, in which every prompt counts once."
    )
    return f'<p class="hint">{hint}</p>' + "".join(_preferences(rows) for rows in (alone, pairs))


def _preferences(rows: Sequence[Preference]) -> str:
    heads = ["against all others" if rows[0].b is None else "pair", "preferred", "won", "equal", "lost", "prompts"]
    cells = []
    for row in rows:
        name = text(row.a) if row.b is None else f"{text(row.a)} <i>against</i> {text(row.b)}"
        numbers = "".join(f"<td>{n}</td>" for n in (row.wins, row.equal, row.losses, row.prompts))
        cells.append(f'<tr><th scope="row">{name}</th><td>{percent(row.share)}</td>{numbers}</tr>')
    return table("scores", heads, cells)


def settings_of_each(candidates: Sequence[Candidate]) -> str:
    """A row per setting and a column per candidate; those that differ are shown first, the others folded."""
    of_each = [dict(flat(c.settings)) for c in candidates]
    names = dict.fromkeys(name for found in of_each for name in found)
    differ: list[str] = []
    equal: list[str] = []
    for name in names:
        values = [str(found.get(name, MISSING)) for found in of_each]
        cells = "".join(f"<td>{text(value)}</td>" for value in values)
        (differ if len(set(values)) > 1 else equal).append(f'<tr><th scope="row">{text(name)}</th>{cells}</tr>')
    heads = ["", *(text(c.name) for c in candidates)]
    folded = (("What differs", differ), ("What is equal", equal))
    return "".join(
        f"<details><summary>{what}: {len(rows)}</summary>{table('settings', heads, rows)}</details>"
        for what, rows in folded
        if rows
    )


def settings_table(settings: Mapping[str, object]) -> str:
    """A row per setting, folded; nothing where there is none."""
    rows = [f'<tr><th scope="row">{text(k)}</th><td>{text(str(v))}</td></tr>' for k, v in flat(settings)]
    frame = f'<div class="settings" tabindex="0"><table>{"".join(rows)}</table></div>'
    return f"<details><summary>This comparison</summary>{frame}</details>" if rows else ""


def flat(settings: Mapping[str, object], prefix: str = "") -> list[tuple[str, object]]:
    """Nested mappings with dots in the names."""
    out: list[tuple[str, object]] = []
    for name, value in settings.items():
        out += flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else [(f"{prefix}{name}", value)]
    return out


def text(given: str) -> str:
    """Text from outside, made harmless for element content and quoted attributes."""
    return escape(given, quote=True)


def seconds(value: float | None) -> str:
    """A time as briefly as a table wants it."""
    if value is None or not math.isfinite(value):
        return MISSING
    return f"{number(1000 * value)} ms" if value < 1 else f"{number(value)} s"


def _base(name: str) -> str:
    return name.partition("/")[0]


def _label(name: str) -> str:
    base, _, space = name.partition("/")
    label = _LABELS.get(base, base).replace("_", " ")
    return f"{label}, {space}" if space else label


def _mark(name: str) -> str:
    return {-1: "↓", 1: "↑", 0: ""}[_direction(name)]


def _direction(name: str) -> int:
    word = _base(name).lower().replace("_", " ").split(" ")[0]
    return 1 if word in HIGHER_IS_BETTER else -1 if word in LOWER_IS_BETTER else 0


def _estimate(found: Estimate, digits: int) -> str:
    if found.low is None or found.high is None:
        return _fixed(found.value, digits)
    low, high = (_fixed(value, digits) for value in (found.low, found.high))
    return f"{_fixed(found.value, digits)} <small>[{low}, {high}]</small>"


def _digits(values: Sequence[float]) -> int:
    """Decimals of a row of numbers: three digits of the largest, and of the smallest if one more is enough."""
    sizes = [math.ceil(math.log10(abs(v))) for v in values if v and math.isfinite(v)] or [0]
    return min(8, max(0, min(4 - max(sizes), 3 - min(sizes))))


def _fixed(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else MISSING
