"""HTML of the studio: drawings, cards of runs, curves, sample grids. Pictures lie inside it as data.

Whatever comes from a file or a user goes through `text`. The style is `assets/studio/studio.css`.
"""

from __future__ import annotations

import base64
import html
import io
import json
import time
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from fewstep.errors import FewstepError
from fewstep.evaluation.charts import Curve, curve_svg, number, read_curves
from fewstep.evaluation.clips import moving_bytes
from fewstep.evaluation.pictures import to_pil
from fewstep.studio.desk import Drawing
from fewstep.studio.runs import Grid, Run, RunsFolder
from fewstep.training.log import read_alarms

_SMALL = 256
"""Pictures below this side are enlarged pixel by pixel."""
_NEWEST, _EARLIER = 1280, 320
"""Widths, in pixels, above which sample grids are scaled down: the newest, and those before it."""
_BEFORE = 8
"""Earlier grids shown, at most."""
_ALARMS = 20
"""Alarms shown, at most; the last ones."""


def text(words: object) -> str:
    """As HTML that shows `words` and does nothing; nor do gradio's templates, which read braces and dollars."""
    signs = str.maketrans({sign: f"&#{ord(sign)};" for sign in "{}$`"})
    return html.escape(str(words)).translate(signs)


def pair(student: Drawing | None, teacher: Drawing | None, waiting: str) -> str:
    """Student and teacher side by side; `waiting` stands where the teacher has not drawn."""
    parts = [] if student is None else [_drawing("Student", student)]
    if teacher is not None:
        parts.append(_drawing("Teacher", teacher))
    elif waiting:
        parts.append(f'<figure class="waiting"><p>{text(waiting)}</p></figure>')
    note = "" if student is None or teacher is None else f'<p class="note">{_advantage(student, teacher)}</p>'
    return f'<div class="fewstep"><div class="pair">{"".join(parts)}</div>{note}</div>'


def _advantage(student: Drawing, teacher: Drawing) -> str:
    calls = f"{number(teacher.calls / student.calls)} times fewer network calls than its teacher"
    faster = teacher.seconds / student.seconds
    return calls + (f", {number(faster)} times faster here" if faster > 1 else "")


def _drawing(who: str, drawing: Drawing) -> str:
    steps = f"{drawing.steps} step{'s' * (drawing.steps != 1)}"
    calls = f"{drawing.calls} network call{'s' * (drawing.calls != 1)}"
    facts = f"<span>{steps}</span><span>{calls}</span><span>{_seconds(drawing.seconds)}</span>"
    return f"<figure>{_picture(drawing, who)}<figcaption><b>{who}</b>{facts}</figcaption></figure>"


def _picture(drawing: Drawing, what: str) -> str:
    """A picture as PNG, a video as an animation."""
    sample, target = drawing.sample, io.BytesIO()
    height, width = sample.shape[-2:]
    if sample.ndim == 4:
        return _image(moving_bytes(sample, "webp", drawing.fps), "webp", width, height, what)
    to_pil(sample).save(target, "PNG")
    return _image(target.getvalue(), "png", width, height, what)


def _image(content: bytes, kind: str, width: int, height: int, what: str) -> str:
    data = base64.b64encode(content).decode()
    small = ' class="small"' if max(width, height) < _SMALL else ""
    return f'<img{small} src="data:image/{kind};base64,{data}" width="{width}" height="{height}" alt="{text(what)}">'


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.0f} s"


def ago(seconds: float) -> str:
    """A time span in words: "5 s", "3 min", "2 h", "4 days"."""
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def gallery(folder: RunsFolder, chosen: str) -> str:
    """A card for each run; its button carries the run's name."""
    runs = folder.runs()
    if not runs:
        return f'<div class="fewstep"><p class="note">No runs in {text(folder.folder)} yet.</p></div>'
    cards = [_card(folder, run, run.name == chosen) for run in runs]
    return f'<div class="fewstep"><div class="cards">{"".join(cards)}</div></div>'


def _card(folder: RunsFolder, run: Run, chosen: bool) -> str:
    grids = folder.grids(run)
    face = _grid_image(grids[-1], _EARLIER) if grids else '<span class="empty">no samples</span>'
    lines = f"<b>{text(run.name)}</b><span>{text(run.method)}</span><span>{_state(run)}</span>"
    pressed = "true" if chosen else "false"
    return f'<button data-run="{text(run.name)}" aria-pressed="{pressed}">{face}{lines}</button>'


def _state(run: Run) -> str:
    done = f"{run.iteration} of {run.iterations}" if run.iterations else f"{run.iteration}"
    when = "finished" if run.finished else f"last line {ago(time.time() - run.changed)} ago"
    return f"iteration {done}, {when}"


def overview(folder: RunsFolder, name: str, every_curve: bool) -> str:
    """What one looks at while a run goes on: its state, newest sample grids, curves. What cannot be read says so."""
    try:
        run = folder.run(name)
        parts = [
            f'<h3>{text(run.name)}</h3><p class="note">{text(run.method)}, {_state(run)}</p>',
            _alarm(f"found an unreadable {run.settings['unreadable']}") if "unreadable" in run.settings else "",
            _watched(run.log, every_curve, _samples(folder.grids(run))),
        ]
    except (FewstepError, OSError) as error:
        parts = [_alarm(str(error))]
    return f'<div class="fewstep">{"".join(parts)}</div>'


def _alarm(message: str) -> str:
    return f'<p class="alarm">{text(message)}</p>'


def _watched(log: Path | None, every_curve: bool, samples: str) -> str:
    """Alarms, samples, curves."""
    if log is None:
        return f'{samples}<p class="note">No log yet.</p>'
    written = log.stat()
    try:
        curves, alarms = _read(log, written.st_mtime_ns, written.st_size)
        told = "".join(map(_told, reversed(alarms[-_ALARMS:])))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        return samples + _alarm(f"found an unreadable {log.name}: {type(error).__name__}: {error}")
    shown = [_curve(curve) for curve in curves if every_curve or curve.is_main]
    return f'{told}{samples}<div class="curves">{"".join(shown)}</div>'


def _told(alarm: Mapping[str, Any]) -> str:
    """What a monitor said (docs/monitors.md)."""
    value = alarm.get("value")
    found = f"{alarm.get('number')} = {'not finite' if value is None else number(value)}"
    done = f" ({alarm['done']})" if alarm.get("done", "told") != "told" else ""
    return _alarm(
        f"{alarm['name']} at iteration {alarm['iteration']}{done}: found {found}, healthy is {alarm.get('healthy')}; "
        f"{alarm.get('advice')}"
    )


def _curve(curve: Curve) -> str:
    hint = f"<small>{text(curve.hint)}</small>" if curve.hint else ""
    title = f"<span>{text(curve.title)}</span><b>{text(number(curve.last))}</b>"
    return f"<figure><figcaption>{title}</figcaption>{curve_svg(curve)}{hint}</figure>"


def _samples(grids: Sequence[Grid]) -> str:
    """The newest grid of every step count, and smaller ones before it, evenly over the run."""
    parts = []
    for steps in sorted({grid.steps for grid in grids}):
        *before, newest = [grid for grid in grids if grid.steps == steps]
        count = min(_BEFORE, len(before))
        earlier = [before[i * len(before) // count] for i in range(count)]
        small = "".join(_grid_figure(grid, _EARLIER) for grid in earlier)
        parts.append(f"{_grid_figure(newest, _NEWEST)}" + (f'<div class="earlier">{small}</div>' if small else ""))
    return "".join(parts)


def _grid_figure(grid: Grid, width: int) -> str:
    steps = f"{grid.steps} step{'s' * (grid.steps != 1)}"
    caption = f"<figcaption>iteration {grid.iteration}, {steps}</figcaption>"
    return f'<figure class="grid-of-samples">{_grid_image(grid, width)}{caption}</figure>'


def _grid_image(grid: Grid, width: int) -> str:
    """A sample grid, at most `width` wide."""
    label = f"samples at iteration {grid.iteration}"
    try:
        written = grid.path.stat()
        return _image(*_scaled(grid.path, written.st_mtime_ns, written.st_size, width), label)
    except (OSError, ValueError, Image.DecompressionBombError):
        return '<span class="empty">a picture that cannot be read</span>'


@lru_cache(256)
def _scaled(path: Path, written: int, size: int, width: int) -> tuple[bytes, str, int, int]:
    """A picture as WebP, with its width and height; remembered until the file is written anew."""
    with Image.open(path) as file:
        picture = file.convert("RGB")
    picture.thumbnail((width, 8 * width))
    target = io.BytesIO()
    picture.save(target, "WEBP", quality=88, method=2)
    return target.getvalue(), "webp", *picture.size


@lru_cache(8)
def _read(log: Path, written: int, size: int) -> tuple[list[Curve], list[dict[str, Any]]]:
    """The curves and alarms of a log, remembered until it grows."""
    return read_curves(log), read_alarms(log)


def settings(run: Run) -> str:
    """`run.json` to read."""
    return f'<div class="fewstep"><pre>{text(json.dumps(run.settings, indent=1, ensure_ascii=False))}</pre></div>'
