"""The numbers of a study as a table in the terminal, and as a picture of quality against network calls."""

from __future__ import annotations

import io
from collections.abc import Mapping

from fewstep.evaluation.study import TEACHER, Result

LOWER_IS_BETTER = ("frechet", "kernel", "paired", "flicker", "clipped", "drift")
"""Beginnings of names; of `contrast`, `motion`, `speed` and `variety` the teacher's own figure is best."""
AS_THE_TEACHER = ("contrast", "motion", "variety", "speed")


def quality_table(results: Mapping[str, Result], title: str) -> None:
    """Prints a column per candidate and a line per figure, with its interval."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", caption="brackets: 95 % intervals over prompts")
    table.add_column("")
    for name in results:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_row("network calls", *(str(result.cost.calls) for result in results.values()))
    table.add_row("seconds, one sample", *(f"{result.cost.seconds:.3g}" for result in results.values()))
    table.add_row("peak memory, GiB", *(f"{result.cost.peak_gib:.2f}" for result in results.values()))
    for metric in dict.fromkeys(metric for result in results.values() for metric in result.row):
        cells = (str(result.row[metric]) if metric in result.row else "" for result in results.values())
        table.add_row(f"{metric} {_mark(metric)}", *cells)
    console = Console()
    console.print(table, width=max(console.width, 30 + 32 * len(results)), crop=False, soft_wrap=True)


def quality_curve(results: Mapping[str, Result]) -> bytes:
    """A PNG: each figure against the network calls of a sample, with intervals; the teacher's as a line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = sorted((r for name, r in results.items() if name != TEACHER), key=lambda r: r.cost.calls)
    metrics = list(rows[0].row)
    columns = min(4, len(metrics))
    lines = -(-len(metrics) // columns)
    figure = Figure(figsize=(3.2 * columns, 2.4 * lines), layout="constrained")
    for place, metric in enumerate(metrics):
        axes = figure.add_subplot(lines, columns, place + 1)
        found = [r.row[metric] for r in rows]
        below = [0 if f.low is None else max(0.0, f.value - f.low) for f in found]
        above = [0 if f.high is None else max(0.0, f.high - f.value) for f in found]
        axes.errorbar([r.cost.calls for r in rows], [f.value for f in found], (below, above), marker="o", capsize=3)
        if TEACHER in results and metric in results[TEACHER].row:
            axes.axhline(results[TEACHER].row[metric].value, linestyle="--", color="grey")
        axes.set_xscale("log", base=2)
        axes.set_xticks([r.cost.calls for r in rows], [str(r.cost.calls) for r in rows])
        axes.set_title(f"{metric} {_mark(metric)}", fontsize=9)
    target = io.BytesIO()
    FigureCanvasAgg(figure).print_png(target)
    return target.getvalue()


def _mark(metric: str) -> str:
    if metric.startswith(AS_THE_TEACHER):
        return ""
    return "↓" if metric.startswith(LOWER_IS_BETTER) else "↑"
