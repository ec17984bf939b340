"""Charts of a report: training curves and bars, as small inline SVG that takes its colours from the page's style sheet.

An SVG here has no colour and no font size of its own: `assets/page/page.css` styles the classes band, line, dot, axis,
grid, bar, uniform. The same curves exist as one PNG (`curves_png`), drawn by matplotlib.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from fewstep.errors import FewstepError
from fewstep.training.log import read_log

BUCKETS = 60
"""A curve has at most so many points; each is the mean of the records in its bucket."""
RUN_COLOURS = 6
"""So many runs have colours of their own in a chart of several."""
_GROUPS = ("loss/", "gradient_norm/", "metric/", "evaluate/", "monitor/")
_MAIN = ("loss/", "gradient_norm/", "evaluate/")
_MAIN_METRICS = ("real_fake_cosine", "real_fake_gap")
_HINTS = {
    "real_fake_cosine": "near 1 is healthy; falling: the critic lags",
    "real_fake_gap": "falls towards 0 as the two laws meet",
    "denoised_std": "growing: saturation; falling: blur",
}
_WIDTH, _HEIGHT = 320, 168
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 10, 24


@dataclass(frozen=True)
class Curve:
    """One logged number over the iterations, bucketed: mean, and the range that the mean hides.

    A bucket without a single finite value has nan in `mean`, `low` and `high`: the line breaks there.
    """

    name: str
    iterations: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]
    last: float
    not_finite: int
    """How many records were not finite (the log has null for them)."""

    @property
    def title(self) -> str:
        """The key in words: "loss/student" -> "loss, student"."""
        return self.name.removeprefix("metric/").removeprefix("evaluate/").replace("/", ", ").replace("_", " ")

    @property
    def hint(self) -> str:
        """What is healthy and what is not, where that is known."""
        return _HINTS.get(self.name.rpartition("/")[2], "")

    @property
    def is_main(self) -> bool:
        """Whether the curve belongs to those that one looks at first."""
        return self.name.startswith(_MAIN) or self.name.endswith(_MAIN_METRICS)

    @property
    def is_logarithmic(self) -> bool:
        """Whether the values are positive and span more than two decades."""
        finite = [v for v in (*self.low, *self.high) if math.isfinite(v)]
        return bool(finite) and min(finite) > 0 and max(finite) > 100 * min(finite)


def read_curves(log: Path) -> list[Curve]:
    """The curves of a `log.jsonl`, those looked at first in front; rates, times and memory are left out.

    FewstepError if the file is not there. A log without a line gives an empty list.
    """
    if not log.is_file():
        raise FewstepError(f"found no training log {log}, expected a log.jsonl, fix: name the folder of a finished run")
    points: dict[str, list[tuple[float, float]]] = {}
    for record in read_log(log):
        for name, value in record.items():
            if name.startswith(_GROUPS):
                number = math.nan if value is None else float(value)
                points.setdefault(name, []).append((float(record["iteration"] or 0), number))
    curves = [_curve(name, values) for name, values in points.items()]
    rank = {group: i for i, group in enumerate(_GROUPS)}
    return sorted(curves, key=lambda c: (not c.is_main, rank[c.name.partition("/")[0] + "/"]))


def _curve(name: str, points: list[tuple[float, float]]) -> Curve:
    size = math.ceil(len(points) / BUCKETS)
    iterations, mean, low, high = [], [], [], []
    for start in range(0, len(points), size):
        bucket = points[start : start + size]
        values = [v for _, v in bucket if math.isfinite(v)] or [math.nan]
        iterations.append(sum(i for i, _ in bucket) / len(bucket))
        mean.append(sum(values) / len(values))
        low.append(min(values))
        high.append(max(values))
    not_finite = sum(not math.isfinite(v) for _, v in points)
    return Curve(name, iterations, mean, low, high, points[-1][1], not_finite)


def curve_svg(*curves: Curve, places: Sequence[int] = ()) -> str:
    """The same number of one or several runs as SVG: bands from lowest to highest value, lines for means.

    A dot per point where points are few. `places` says which run each curve is of, in order unless told: the classes of
    the second run's marks are "line run-1" and so on; colours repeat after `RUN_COLOURS` runs.
    """
    finite = [v for curve in curves for v in (*curve.low, *curve.high) if math.isfinite(v)]
    first, last = min(c.iterations[0] for c in curves), max(c.iterations[-1] for c in curves)
    label = escape(f"{curves[0].title} over {number(last)} iterations")
    head = f'<svg class="curve" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">'
    if not finite:
        return f'{head}<text x="{_WIDTH / 2}" y="{_HEIGHT / 2}" text-anchor="middle">never finite</text></svg>'
    logarithmic = min(finite) > 0 and any(curve.is_logarithmic for curve in curves)
    warp = math.log10 if logarithmic else float
    bottom, top = warp(min(finite)), warp(max(finite))
    margin = 0.06 * (top - bottom) or 0.06 * abs(top) or 1.0
    bottom, top = bottom - margin, top + margin

    def x(iteration: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * ((iteration - first) / (last - first) if last > first else 0.5)

    def y(value: float) -> float:
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (top - warp(value)) / (top - bottom)

    parts = [head]
    for tick in _log_ticks(bottom, top) if logarithmic else ticks(bottom, top, 4):
        parts.append(f'<path class="grid" d="M{_LEFT} {y(tick):.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y(tick) + 3.5:.1f}" text-anchor="end">{number(tick)}</text>')
    for tick in ticks(first, last, 4) or [first]:
        parts.append(f'<text x="{x(tick):.1f}" y="{_HEIGHT - 6}" text-anchor="middle">{number(tick)}</text>')
    parts.append(f'<path class="axis" d="M{_LEFT} {_HEIGHT - _BOTTOM}H{_WIDTH - _RIGHT}"/>')
    for place, curve in zip(places or range(len(curves)), curves, strict=True):
        parts += _marks(curve, run_class(place), x, y)
    return "".join(parts) + "</svg>"


def run_class(place: int) -> str:
    """What the classes of the n-th run's marks end in; nothing for the first."""
    return f" run-{place % RUN_COLOURS}" if place % RUN_COLOURS else ""


def _marks(curve: Curve, run: str, x: Callable[[float], float], y: Callable[[float], float]) -> list[str]:
    """Band, line and dots of one run."""
    parts = []
    rows = list(zip(curve.iterations, curve.mean, curve.low, curve.high, strict=True))
    for piece in _runs(rows):
        upper = [f"{x(i):.1f} {y(high):.1f}" for i, _, _, high in piece]
        lower = [f"{x(i):.1f} {y(low):.1f}" for i, _, low, _ in reversed(piece)]
        line = "L".join(f"{x(i):.1f} {y(mean):.1f}" for i, mean, _, _ in piece)
        parts.append(f'<path class="band{run}" d="M{"L".join(upper + lower)}Z"/>')
        parts.append(f'<path class="line{run}" d="M{line}"/>')
        if len(rows) <= 12 or len(piece) == 1:
            parts += [f'<circle class="dot{run}" cx="{x(i):.1f}" cy="{y(m):.1f}" r="2.2"/>' for i, m, _, _ in piece]
    return parts


def _runs(rows: list[tuple[float, float, float, float]]) -> list[list[tuple[float, float, float, float]]]:
    """Splits where the mean is nan."""
    runs: list[list[tuple[float, float, float, float]]] = [[]]
    for row in rows:
        if math.isnan(row[1]):
            runs.append([])
        else:
            runs[-1].append(row)
    return [run for run in runs if run]


def bars_svg(labels: Sequence[str], shares: Sequence[float], largest: float) -> str:
    """Horizontal bars of shares in [0, 1], a dashed line at the uniform share 1 / n; `largest` is the axis's end.

    A share that is not finite has no bar, and an em dash for its number.
    """
    shown = [label if len(label) <= 16 else label[:15] + "…" for label in labels]
    left = 8 + 5.8 * max(len(label) for label in shown)
    full, row = 66.0, 17.0
    width, height = left + full + 32, row * len(labels) + 4
    size = f'width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}"'
    parts = [f'<svg class="bars" {size} role="img" aria-label="shares">']
    for i, (label, share) in enumerate(zip(shown, shares, strict=True)):
        top = 2 + row * i
        length = full * min(share / largest, 1.0) if math.isfinite(share) else 0.0
        text = f"{100 * share:.0f} %" if math.isfinite(share) else "—"
        baseline = f'y="{top + 12:.0f}" text-anchor="end"'
        parts.append(f'<text class="label" x="{left - 6:.1f}" {baseline}>{escape(label)}</text>')
        parts.append(f'<rect class="bar" x="{left:.1f}" y="{top + 3:.0f}" width="{length:.1f}" height="11" rx="2"/>')
        parts.append(f'<text x="{width - 1:.1f}" {baseline}>{text}</text>')
    uniform = left + full / len(labels) / largest
    parts.append(f'<path class="uniform" d="M{uniform:.1f} 0V{height:.0f}"/></svg>')
    return "".join(parts)


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten) inside [low, high]."""
    if not high > low:
        return []
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten between 10^low and 10^high, at most about five."""
    decades = range(math.ceil(low), math.floor(high) + 1)
    return [10.0**d for d in decades[:: math.ceil(len(decades) / 5) or 1]]


def number(value: float) -> str:
    """A number as briefly as an axis wants it: 0.05, 12, 3k, 2e-06; an em dash for one that is not finite."""
    if not math.isfinite(value):
        return "—"
    if value != 0 and not 1e-4 <= abs(value) < 1e6:
        return f"{value:.2g}"
    if abs(value) >= 1e4:
        return f"{value / 1000:.3g}k"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def curves_png(log: Path) -> bytes:
    """The training curves of a `log.jsonl` as one PNG, three panels in a row, drawn without a display.

    FewstepError if the log is missing or has no curve.
    """
    curves = [curve for curve in read_curves(log) if curve.is_main]
    if not curves:
        raise FewstepError(f"found no curve in {log}, expected lines with loss/..., fix: train for an iteration")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    rows = math.ceil(len(curves) / 3)
    layout = ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.12)
    figure = Figure(figsize=(12, 2.9 * rows), layout=layout, facecolor="white")
    FigureCanvasAgg(figure)
    for panel, curve in zip(figure.subplots(rows, 3, squeeze=False).flat, curves, strict=False):
        panel.fill_between(curve.iterations, curve.low, curve.high, color="#0f6b5c", alpha=0.15, linewidth=0)
        marker = "." if len(curve.mean) <= 12 else ""
        panel.plot(curve.iterations, curve.mean, color="#0f6b5c", linewidth=1.5, marker=marker)
        panel.set_title(curve.title, loc="left", fontsize=10)
        panel.set_yscale("log" if curve.is_logarithmic else "linear")
        panel.tick_params(labelsize=8, color="#999999")
        panel.grid(axis="y", color="#eeeeee")
        panel.spines[["top", "right", "left"]].set_visible(False)
    for panel in figure.axes[len(curves) :]:
        panel.set_visible(False)
    target = io.BytesIO()
    figure.savefig(target, format="png", dpi=110)
    return target.getvalue()
