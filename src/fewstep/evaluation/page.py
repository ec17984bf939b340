"""The report: one HTML file that puts samplers side by side, with their scores, variety and training curves.

Pure presentation: everything is handed in, nothing is sampled or judged here. The file loads nothing from anywhere; a
content security policy inside it forbids that even to markup that slipped through, and its one script runs by its hash.
"""

from __future__ import annotations

import base64
import hashlib
import io
import math
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from fewstep.errors import FewstepError
from fewstep.evaluation.charts import Curve, bars_svg, curve_svg, curves_png, number, read_curves
from fewstep.evaluation.pictures import Candidate, check_candidates, replace_file, to_pil, write_grid
from fewstep.training.log import read_alarms

__all__ = ["Candidate", "write_curves", "write_grid", "write_page"]

LOWER_IS_BETTER = {"frechet", "fid", "wasserstein", "mmd", "distance", "error"}
HIGHER_IS_BETTER = {"precision", "recall", "following", "thing", "evenness", "accuracy", "coverage"}
"""Words by which the name of a score tells its direction; a name with neither is shown without a mark."""
_SCORE_LABELS = {"frechet": "Fréchet distance", "following": "prompt-following"}
_HEADLINE_SCORES = ("frechet", "following", "recall")
_SHOWN_AT_FIRST = 24
"""So many rows of pictures are open when the page is; a button shows the others."""
_SCROLLING_TABLE = ".pictures { overflow: auto; max-height: 88vh; max-height: 88svh; }"
_MISSING = "—"


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
    curves: Path | None,
    histograms: Mapping[str, Mapping[str, Sequence[float]]] | None,
    value_labels: Mapping[str, Sequence[str]],
    settings: Mapping[str, object],
    notes: Sequence[str],
    command: str | None = None,
    headline: tuple[str, str] | None = None,
) -> Path:
    """Writes the report as one self-contained HTML file and returns its path.

    Args:
        candidates: the samplers, in the order of the columns; picture i of each is of prompts[i] and seeds[i].
        curves: a training run's `log.jsonl`; None leaves the section out.
        histograms: attribute -> candidate name -> share of each value among pictures whose caption leaves it open.
        value_labels: attribute -> name of each value, for every attribute of `histograms`.
        settings: shown as a folded table; nested mappings are flattened with dots.
        notes: paragraphs of plain text.
        command: what to type to get this page again.
        headline: names of the candidates that the figures on top compare, (reference, student); by default the one
            with most network calls and the last one.

    Pictures are embedded without loss (WebP; some 5 KB for one of 64 x 64). The file is whole or not there.
    FewstepError for pictures, seeds, labels or names that do not belong together, and for a missing log.
    """
    check_candidates(candidates, prompts)
    if len(seeds) != len(prompts):
        raise FewstepError(f"found {len(seeds)} seeds, expected {len(prompts)}, fix: pass one seed per prompt")
    reference, student = _pair(candidates, headline)
    sections = [
        _headline(reference, student),
        _pictures(candidates, prompts, seeds, student),
        _scores(candidates, student),
        _variety(histograms, value_labels, candidates, student) if histograms else "",
        _training(read_curves(curves), read_alarms(curves)) if curves is not None else "",
        _section("notes", "Notes", "".join(f"<p>{_text(note)}</p>" for note in notes)) if notes else "",
        _reproduce(command, settings),
    ]
    html = _document(title, subtitle, "\n".join(part for part in sections if part), columns=len(candidates))
    return replace_file(path, html.encode("utf-8", "replace"))


def _pair(candidates: Sequence[Candidate], headline: tuple[str, str] | None) -> tuple[Candidate, Candidate]:
    if headline is None:
        return max(candidates, key=lambda c: c.calls), candidates[-1]
    by_name = {c.name: c for c in candidates}
    if unknown := [name for name in headline if name not in by_name]:
        raise FewstepError(f"found headline {unknown}, expected two of {list(by_name)}, fix: name two candidates")
    return by_name[headline[0]], by_name[headline[1]]


def _document(title: str, subtitle: str, body: str, columns: int) -> str:
    assets = files("fewstep") / "assets" / "page"
    style, script = ((assets / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    # Below this width the picture table scrolls inside its own frame; above it, the page scrolls under its head row.
    breakpoint_px = columns * 92 + 240
    style += f"@media (max-width: {breakpoint_px if breakpoint_px < 1160 else 9999}px) {{ {_SCROLLING_TABLE} }}\n"
    sha = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{sha}'"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{_text(title)}</title>
<style>
{style}</style>
</head>
<body>
<main>
<header>
<h1>{_text(title)}</h1>
<p class="subtitle">{_text(subtitle)}</p>
</header>
{body}
</main>
<dialog class="zoom" tabindex="-1" aria-label="Picture, enlarged">
<figure><img alt=""><figcaption><b></b><span></span></figcaption></figure>
<nav><button data-step="-1" aria-label="Previous">←</button><button data-close>Close</button>\
<button data-step="1" aria-label="Next">→</button></nav>
</dialog>
<script>{script}</script>
</body>
</html>
"""


def _headline(reference: Candidate, student: Candidate) -> str:
    if reference is student:
        tile = _tile(str(student.calls), "network calls per picture", student.name)
        return f'<section class="headline"><div class="tiles">{tile}</div></section>'
    detail = f"{student.calls} instead of {reference.calls}"
    tiles = [_tile(_times(reference.calls, student.calls), "fewer network calls", detail)]
    if reference.seconds and student.seconds:
        detail = f"{_seconds(student.seconds)} instead of {_seconds(reference.seconds)} per picture"
        tiles.append(_tile(_times(reference.seconds, student.seconds), "less time", detail))
    for name in _HEADLINE_SCORES:
        ours, theirs = _score(student, name), _score(reference, name)
        if math.isfinite(ours):
            digits = _digits([ours, theirs])
            detail = f"{reference.name}: {_fixed(theirs, digits)}"
            tiles.append(_tile(_fixed(ours, digits), f"{_label(name)} {_mark(name)}", detail))
    pair = f"{_text(student.name)} <i>against</i> {_text(reference.name)}"
    return f'<section class="headline"><p>{pair}</p><div class="tiles">{"".join(tiles)}</div></section>'


def _times(a: float, b: float) -> str:
    return f"{a / b:.0f}×" if a >= 10 * b else f"{a / b:.2g}×"


def _tile(figure: str, what: str, detail: str) -> str:
    return f"<div><b>{_text(figure)}</b><span>{_text(what)}</span><small>{_text(detail)}</small></div>"


def _pictures(candidates: Sequence[Candidate], prompts: Sequence[str], seeds: Sequence[int], student: Candidate) -> str:
    """Rows are prompts, columns are candidates."""
    heads = "".join(
        f'<th scope="col"{_chosen(c, student)}>{_text(c.name)}<small>{_calls(c.calls)}</small></th>' for c in candidates
    )
    rows = []
    for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        text = _text(prompt)
        head = f'<th scope="row"><span dir="auto" title="{text}">{text}</span><small>seed {seed}</small></th>'
        cells = "".join(f"<td>{_picture(c, i, prompt)}</td>" for c in candidates)
        late = ' class="late"' if i >= _SHOWN_AT_FIRST else ""
        rows.append(f"<tr{late}>{head}{cells}</tr>\n")
    more = f'<button class="more" hidden>Show all {len(prompts)} prompts</button>'
    return _section(
        "pictures",
        "Pictures",
        '<p class="hint">Each row is one prompt and one seed: every column starts from the same noise. Click a picture '
        "to enlarge it; the arrow keys then go from sampler to sampler and from prompt to prompt.</p>"
        f'<div class="pictures" tabindex="0" role="region" aria-label="Pictures" style="--columns: {len(candidates)}">'
        f'<table><thead><tr><th scope="col">prompt</th>{heads}</tr></thead>\n<tbody>{"".join(rows)}</tbody></table>'
        f"</div>{more if len(prompts) > _SHOWN_AT_FIRST else ''}",
    )


def _picture(candidate: Candidate, i: int, prompt: str) -> str:
    target = io.BytesIO()
    to_pil(candidate.images[i]).save(target, "WEBP", lossless=True, quality=80, method=4)
    data = base64.b64encode(target.getvalue()).decode()
    height, width = candidate.images.shape[-2:]
    alt = _text(f"{candidate.name}: {prompt}")
    return f'<button><img src="data:image/webp;base64,{data}" width="{width}" height="{height}" alt="{alt}"></button>'


def _scores(candidates: Sequence[Candidate], student: Candidate) -> str:
    names = list(dict.fromkeys(name for c in candidates for name in c.scores or {}))
    heads = "".join(f'<th scope="col">{_text(_label(name))}&nbsp;{_mark(name)}</th>' for name in names)
    columns = {name: [_score(c, name) for c in candidates] for name in names}
    rows = []
    for i, c in enumerate(candidates):
        cells = [f"<td>{c.calls}</td><td>{_seconds(c.seconds)}</td>"]
        for name, values in columns.items():
            best = ' class="best"' if values[i] == _best(name, values) else ""
            cells.append(f"<td{best}>{_fixed(values[i], _digits(values))}</td>")
        rows.append(f'<tr{_chosen(c, student)}><th scope="row">{_text(c.name)}</th>{"".join(cells)}</tr>\n')
    legend = '<p class="hint">↓ lower is better, ↑ higher is better; the best of each column is bold.</p>'
    return _section(
        "scores",
        "Scores",
        '<div class="scores" tabindex="0" role="region" aria-label="Scores"><table>'
        f'<thead><tr><th scope="col">sampler</th><th scope="col">calls</th><th scope="col">per picture</th>{heads}</tr>'
        f"</thead>\n<tbody>{''.join(rows)}</tbody></table></div>{legend if names else ''}",
    )


def _variety(
    histograms: Mapping[str, Mapping[str, Sequence[float]]],
    value_labels: Mapping[str, Sequence[str]],
    candidates: Sequence[Candidate],
    student: Candidate,
) -> str:
    known = {c.name: c for c in candidates}
    parts = []
    for attribute, by_candidate in histograms.items():
        labels = value_labels.get(attribute, ())
        lengths = {len(shares) for shares in by_candidate.values()}
        if lengths != {len(labels)} or not set(by_candidate) <= set(known):
            raise FewstepError(
                f"found histograms of {attribute!r} with {sorted(lengths)} values of {sorted(by_candidate)}, expected "
                f"{len(labels)} labelled values of {sorted(known)}, fix: give each value of the attribute a label"
            )
        finite = [s for shares in by_candidate.values() for s in shares if math.isfinite(s)]
        largest = max([*finite, 1.5 / len(labels)])
        panels = [
            f"<figure{_chosen(known[name], student)}><figcaption>{_text(name)}</figcaption>"
            f"{bars_svg(labels, shares, largest)}</figure>"
            for name, shares in by_candidate.items()
        ]
        parts.append(f'<h3>{_text(attribute)}</h3><div class="panels narrow">{"".join(panels)}</div>')
    hint = (
        "What a prompt leaves open should vary. Share of each value among the pictures whose prompt leaves it open; "
        "the dashed line is the data, where all values are equally frequent."
    )
    return _section("variety", "Variety", f'<p class="hint">{hint}</p>{"".join(parts)}')


def _training(curves: Sequence[Curve], alarms: Sequence[Mapping[str, Any]]) -> str:
    if not curves:
        return ""
    main = [_panel(c) for c in curves if c.is_main]
    other = [_panel(c) for c in curves if not c.is_main]
    hint = "Over iterations (student updates). The line is a mean, the band the range behind it."
    folded = f'<details><summary>{len(other)} more</summary><div class="panels">{"".join(other)}</div></details>'
    body = f'<p class="hint">{hint}</p><div class="panels">{"".join(main)}</div>{folded if other else ""}'
    return _section("training", "Training", _alarms(alarms) + body)


def _alarms(alarms: Sequence[Mapping[str, Any]]) -> str:
    """What the monitors told (docs/monitors.md), oldest first."""
    lines = []
    for alarm in alarms:
        value = "not finite" if alarm["value"] is None else number(alarm["value"])
        done = "" if alarm["done"] == "told" else f" ({alarm['done']})"
        told = f"{alarm['number']} = {value}, healthy: {alarm['healthy']}; {alarm['advice']}{done}"
        lines.append(f"<li><b>{_text(alarm['name'])}</b> at iteration {alarm['iteration']}: {_text(told)}</li>")
    return f"<ul>{''.join(lines)}</ul>" if lines else ""


def _panel(curve: Curve) -> str:
    missing = f"{curve.not_finite} not finite" if curve.not_finite else ""
    hint = "; ".join(part for part in (curve.hint, missing) if part)
    head = f"{_text(curve.title)} <span>last {number(curve.last)}</span>"
    return f"<figure><figcaption>{head}</figcaption>{curve_svg(curve)}<small>{_text(hint)}</small></figure>"


def _reproduce(command: str | None, settings: Mapping[str, object]) -> str:
    parts = []
    if command:
        parts.append(f'<div class="command"><pre><code>{_text(command)}</code></pre><button hidden>Copy</button></div>')
    rows = "".join(f'<tr><th scope="row">{_text(k)}</th><td>{_text(str(v))}</td></tr>' for k, v in _flat(settings))
    if rows:
        parts.append(f'<details><summary>Settings</summary><div class="settings"><table>{rows}</table></div></details>')
    return _section("reproduce", "How to reproduce", "".join(parts)) if parts else ""


def _flat(settings: Mapping[str, object], prefix: str = "") -> list[tuple[str, object]]:
    out: list[tuple[str, object]] = []
    for name, value in settings.items():
        out += _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else [(f"{prefix}{name}", value)]
    return out


def _section(name: str, heading: str, body: str) -> str:
    return f'<section id="{name}"><h2>{heading}</h2>{body}</section>'


def _text(text: str) -> str:
    """Text from outside, made harmless for element content and quoted attributes."""
    return escape(text, quote=True)


def _chosen(candidate: Candidate, student: Candidate) -> str:
    return ' class="chosen"' if candidate is student else ""


def _calls(count: int) -> str:
    return f"{count} call{'s' * (count != 1)}"


def _seconds(seconds: float | None) -> str:
    if seconds is None or not math.isfinite(seconds):
        return _MISSING
    return f"{number(1000 * seconds)} ms" if seconds < 1 else f"{number(seconds)} s"


def _score(candidate: Candidate, name: str) -> float:
    return (candidate.scores or {}).get(name, math.nan)


def _label(name: str) -> str:
    return _SCORE_LABELS.get(name, name.replace("_", " "))


def _mark(name: str) -> str:
    return {-1: "↓", 1: "↑", 0: ""}[_direction(name)]


def _direction(name: str) -> int:
    words = set(name.lower().replace("_", " ").split())
    return 1 if words & HIGHER_IS_BETTER else -1 if words & LOWER_IS_BETTER else 0


def _best(name: str, values: Sequence[float]) -> float:
    """The best of a column; nan, which equals nothing, where no direction or no rival is known."""
    finite = [v for v in values if math.isfinite(v)]
    direction = _direction(name)
    return direction * max(direction * v for v in finite) if direction and len(finite) > 1 else math.nan


def _digits(values: Sequence[float]) -> int:
    """Decimals of a column of numbers: three digits of the largest, and of the smallest if one more is enough."""
    sizes = [math.ceil(math.log10(abs(v))) for v in values if v and math.isfinite(v)] or [0]
    return min(8, max(0, min(4 - max(sizes), 3 - min(sizes))))


def _fixed(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else _MISSING
