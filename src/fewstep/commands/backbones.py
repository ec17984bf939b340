"""`fewstep backbones`: the families of teachers, and what each is distilled with unless the user says otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fewstep.commands.common import parse
from fewstep.models.backbone import Backbone
from fewstep.models.loading import built_in
from fewstep.models.recipes import NOT_MEASURED, Setting

COLUMNS = {
    "guidance": ("guidance_scale",),
    "shift": ("shift",),
    "first call": ("start_time",),
    "critic updates": ("critic_updates",),
    "rates of student, critic": ("student_rate", "critic_rate"),
    "roles": ("roles",),
    "rank": ("rank",),
    "more": ("alpha", "grid", "gan_weight", "eta"),
}
HEADINGS = ["family", "pipelines", "method", *COLUMNS, "sources"]


@dataclass(kw_only=True)
class Backbones:
    """List the families of teachers with the settings that `fewstep distill` takes for each; * is not measured."""


def main(arguments: list[str]) -> None:
    """Print the settings, a paragraph for each family and method."""
    parse(Backbones, "backbones", arguments)
    for family, pipelines, method, *values, sources in rows():
        named = [f"{name} {value}" for name, value in zip(COLUMNS, values, strict=True) if value]
        print(f"{family} ({pipelines}), {method}\n  {'; '.join(named)}\n  from: {sources}")


def rows() -> list[list[str]]:
    """One row of texts per family and method with settings of its own, in the order of `HEADINGS`."""
    return [row for kind in built_in() for row in _rows_of(kind)]


def markdown() -> str:
    """The table of docs/backbones.md."""
    lines = [HEADINGS, ["---"] * len(HEADINGS), *rows()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _rows_of(kind: type[Backbone]) -> Iterator[list[str]]:
    pipelines = ", ".join(name for name in kind.pipeline_classes if not name.startswith("StepsAware"))
    for method in ("tdm", *kind.recipe.by_method):
        settings = kind.recipe.settings(method)
        cells = [_cell(settings, names) for names in COLUMNS.values()]
        sources = dict.fromkeys(one.source for one in settings.values() if one.measured)
        yield [kind.__name__, pipelines, method, *cells, "; ".join(sources) or NOT_MEASURED]


def _cell(settings: dict[str, Setting], names: tuple[str, ...]) -> str:
    """The values of `names` that are set, with a star where nobody has measured them."""
    shown = [(name, settings[name]) for name in names if name in settings and settings[name].value not in ((), None)]
    if names == ("rank",) and settings["roles"].value == "copies":
        return ""
    lead = len(names) > 2  # a column of several options names them
    return ", ".join(f"{f'{name} ' if lead else ''}{_text(one.value)}{_star(one)}" for name, one in shown)


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _star(setting: Setting) -> str:
    return "" if setting.measured else "*"


if __name__ == "__main__":
    print(markdown())
