"""The report: one HTML file that puts samplers side by side, with a slider, a blind test, figures and training curves.

Pure presentation: everything is handed in, nothing is sampled or judged here. The file loads nothing from anywhere; a
content security policy inside it forbids that even to markup that slipped through, and its one script runs by its hash.
The pictures come last in the file (`page_pictures.py`), so that everything else is there before them.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path

from fewstep.errors import FewstepError
from fewstep.evaluation.charts import Curve, bars_svg, curve_svg, curves_png, number, read_curves, run_class
from fewstep.evaluation.page_pictures import choose_form, data_block, picture_blocks
from fewstep.evaluation.page_tables import figures, headline, settings_of_each, settings_table, text, voted
from fewstep.evaluation.pictures import Candidate, check_candidates, replace_file, write_grid
from fewstep.evaluation.preferences import Vote
from fewstep.training.log import read_alarms

__all__ = ["Candidate", "write_curves", "write_grid", "write_page"]

_SCRIPTS = ("core.js", "grid.js", "pair.js", "votes.js", "blind.js", "page.js")
_VIEWS = (("report", "Report"), ("pair", "Slider"), ("blind", "Blind test"))


def write_curves(path: Path, log: Path) -> Path:
    """The training curves of a `log.jsonl` as one PNG; FewstepError if there is no log or no curve in it."""
    return replace_file(path, curves_png(log))


def write_page(
    path: Path,
    *,
    title: str,
    subtitle: str,
    candidates: Sequence[Candidate],
    prompts: Sequence[str],
    seeds: Sequence[int],
    runs: Mapping[str, Path],
    histograms: Mapping[str, Mapping[str, Sequence[float]]],
    value_labels: Mapping[str, Sequence[str]],
    settings: Mapping[str, object],
    notes: Sequence[str],
    votes: Sequence[Vote] = (),
    command: str | None = None,
    pair: tuple[str, str] | None = None,
    megabytes: float = 100,
) -> Path:
    """Writes the report as one self-contained HTML file and returns its path.

    Args:
        candidates: the samplers, in the order of the columns; picture i of each is of prompts[i] and seeds[i].
        runs: training logs (`log.jsonl`) by the names of their runs; curves of several are drawn over each other.
        histograms: attribute -> candidate name -> share of each value among pictures whose caption leaves it open.
        value_labels: attribute -> name of each value, for every attribute of `histograms`.
        settings: of the comparison, shown as a folded table; nested mappings are flattened with dots.
        notes: paragraphs of plain text.
        votes: of the blind test, whose table is shown.
        command: what to type to get this page again.
        pair: names of the candidates that the figures on top compare, (reference, student); by default the one
            with most network calls and the last one.
        megabytes: what the pictures may take; small ones are kept without loss (some 5 KB for one of 64 x 64), larger
            ones as WebP, scaled down as far as is needed.

    The file is whole or not there, and is written piece by piece: one block of pictures is in memory at a time.
    FewstepError for pictures, seeds, labels or names that do not belong together, and for a missing log.
    """
    check_candidates(candidates, prompts)
    if len(seeds) != len(prompts):
        raise FewstepError(f"found {len(seeds)} seeds, expected {len(prompts)}, fix: pass one seed per prompt")
    reference, student = _pair(candidates, pair)
    form = choose_form(candidates, megabytes)
    sections = [
        headline(reference, student),
        _section("pictures", "Pictures", _asset("grid.html")),
        _section("scores", "Figures and costs", f"{figures(candidates, student)}{_COSTS}"),
        _section("preferences", "Preferences", voted(votes)) if votes else "",
        _variety(histograms, value_labels, candidates, student) if histograms else "",
        _training({name: read_curves(log) for name, log in runs.items()}, _alarms(runs)),
        _section("notes", "Notes", "".join(f"<p>{text(note)}</p>" for note in [*notes, form.told(candidates)])),
        _reproduce(command, settings, candidates),
    ]
    body = "\n".join(part for part in sections if part)

    def pieces() -> Iterator[bytes]:
        before, after = _document(title, subtitle, body, data_block(candidates, prompts, seeds))
        yield before.encode("utf-8", "replace")
        for block in picture_blocks(candidates, form):
            yield block.encode()
        yield after.encode()

    return replace_file(path, pieces())


def _pair(candidates: Sequence[Candidate], pair: tuple[str, str] | None) -> tuple[Candidate, Candidate]:
    if pair is None:
        return max(candidates, key=lambda c: c.calls), candidates[-1]
    by_name = {c.name: c for c in candidates}
    if unknown := [name for name in pair if name not in by_name]:
        raise FewstepError(f"found pair {unknown}, expected two of {list(by_name)}, fix: name two candidates")
    return by_name[pair[0]], by_name[pair[1]]


def _document(title: str, subtitle: str, body: str, data: str) -> tuple[str, str]:
    """What comes before the pictures, and after them."""
    style, views, script = _asset("page.css"), _asset("views.html"), "".join(_asset(name) for name in _SCRIPTS)
    sha = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{sha}'"
    tabs = "".join(f'<a href="#{view}">{label}</a>' for view, label in _VIEWS)
    before = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{text(title)}</title>
<style>
{style}</style>
</head>
<body>
<nav class="tabs" aria-label="Views">{tabs}<button id="theme" hidden></button></nav>
<main>
<noscript><p>Pictures, slider and blind test need the script inside this file; allow it to run.</p></noscript>
<div class="view" id="report">
<header>
<h1>{text(title)}</h1>
<p class="subtitle">{text(subtitle)}</p>
</header>
{body}
</div>
{views}</main>
{data}<script>{script}</script>
"""
    return before, "</body>\n</html>\n"


_COSTS = (
    '<p class="hint">Time: one picture drawn alone, its prompt encoded and the picture decoded, on the machine that '
    "wrote this page.</p>"
)


def _asset(name: str) -> str:
    return (files("fewstep") / "assets" / "page" / name).read_text(encoding="utf-8")


def _variety(
    histograms: Mapping[str, Mapping[str, Sequence[float]]],
    value_labels: Mapping[str, Sequence[str]],
    candidates: Sequence[Candidate],
    student: Candidate,
) -> str:
    known = {c.name for c in candidates}
    parts = []
    for attribute, by_candidate in histograms.items():
        labels = value_labels.get(attribute, ())
        lengths = {len(shares) for shares in by_candidate.values()}
        if lengths != {len(labels)} or not set(by_candidate) <= known:
            raise FewstepError(
                f"found histograms of {attribute!r} with {sorted(lengths)} values of {sorted(by_candidate)}, expected "
                f"{len(labels)} labelled values of {sorted(known)}, fix: give each value of the attribute a label"
            )
        finite = [s for shares in by_candidate.values() for s in shares if math.isfinite(s)]
        largest = max([*finite, 1.5 / len(labels)])
        panels = [
            f"<figure{' class=chosen' if name == student.name else ''}><figcaption>{text(name)}</figcaption>"
            f"{bars_svg(labels, shares, largest)}</figure>"
            for name, shares in by_candidate.items()
        ]
        parts.append(f'<h3>{text(attribute)}</h3><div class="panels narrow">{"".join(panels)}</div>')
    hint = (
        "What a prompt leaves open should vary. Share of each value among the pictures whose prompt leaves it open; "
        "the dashed line is the data, where all values are equally frequent."
    )
    return _section("variety", "Variety", f'<p class="hint">{hint}</p>{"".join(parts)}')


def _training(runs: Mapping[str, Sequence[Curve]], alarms: str) -> str:
    by_name: dict[str, list[tuple[int, Curve]]] = {}
    for place, curves in enumerate(runs.values()):
        for curve in curves:
            by_name.setdefault(curve.name, []).append((place, curve))
    if not by_name:
        return ""
    panels = {True: [], False: []}  # type: ignore[var-annotated]
    for found in by_name.values():
        panels[found[0][1].is_main].append(_panel(found))
    swatches = (f'<span><i class="swatch{run_class(i)}"></i>{text(name)}</span>' for i, name in enumerate(runs))
    legend = f'<p class="legend">{"".join(swatches)}</p>'
    hint = "Over iterations (student updates). The line is a mean, the band the range behind it."
    other = f'<div class="panels">{"".join(panels[False])}</div>'
    folded = f"<details><summary>{len(panels[False])} more</summary>{other}</details>" if panels[False] else ""
    body = f'<p class="hint">{hint}</p>{legend}<div class="panels">{"".join(panels[True])}</div>{folded}'
    return _section("training", "Training", alarms + body)


def _alarms(runs: Mapping[str, Path]) -> str:
    """What the monitors told of each run (docs/monitors.md), oldest first."""
    lines = []
    for run, log in runs.items():
        for alarm in read_alarms(log):
            value = "not finite" if alarm["value"] is None else number(alarm["value"])
            done = "" if alarm["done"] == "told" else f" ({alarm['done']})"
            told = f"{alarm['number']} = {value}, healthy: {alarm['healthy']}; {alarm['advice']}{done}"
            where = f"{run}, iteration {alarm['iteration']}"
            lines.append(f"<li><b>{text(alarm['name'])}</b> ({text(where)}): {text(told)}</li>")
    return f"<ul>{''.join(lines)}</ul>" if lines else ""


def _panel(found: Sequence[tuple[int, Curve]]) -> str:
    """One number of all runs that logged it."""
    curves = [curve for _, curve in found]
    missing = sum(curve.not_finite for curve in curves)
    hint = "; ".join(part for part in (curves[0].hint, f"{missing} not finite" if missing else "") if part)
    head = f"{text(curves[0].title)} <span>last {', '.join(number(curve.last) for curve in curves)}</span>"
    svg = curve_svg(*curves, places=[place for place, _ in found])
    return f"<figure><figcaption>{head}</figcaption>{svg}<small>{text(hint)}</small></figure>"


def _reproduce(command: str | None, settings: Mapping[str, object], candidates: Sequence[Candidate]) -> str:
    shown = ""
    if command:
        shown = f'<div class="command"><pre><code>{text(command)}</code></pre><button hidden>Copy</button></div>'
    body = f"{shown}{settings_of_each(candidates)}{settings_table(settings)}"
    return _section("reproduce", "Settings", body) if body else ""


def _section(name: str, heading: str, body: str) -> str:
    return f'<section id="{name}"><h2>{heading}</h2>{body}</section>'
