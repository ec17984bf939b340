"""What each family is distilled with unless the user says otherwise, and where every number comes from.

A recipe belongs to an adapter (`Backbone.recipe`); its settings take the place of the defaults of the methods', the
trainer's and the roles' options. A number without a paper or a released configuration says "not measured": nobody has
compared it with others on that family, so treat it as a first try.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

NOT_MEASURED = "not measured"
_Options = TypeVar("_Options")


@dataclass(frozen=True)
class Setting:
    """A value and its source: a paper, a released configuration, or "not measured"."""

    value: Any
    source: str = NOT_MEASURED

    @property
    def measured(self) -> bool:
        """Whether a paper or a release stands behind it."""
        return not self.source.startswith(NOT_MEASURED)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings of one family. The names are those of the options; ranges and units are written there."""

    guidance_scale: Setting = Setting(3.5)
    """Of the teacher, in methods that ask a plainly guided teacher; 1 where guidance is distilled into the teacher."""
    shift: Setting = Setting(1.0)
    """Of the student's time grid."""
    start_time: Setting = Setting(1.0)
    """Time of the student's first call."""
    grid: Setting = Setting(())
    """Times of the student's calls written out, for 4 steps; empty: by shift and start."""
    critic_updates: Setting = Setting(1)
    """Per student update."""
    student_rate: Setting = Setting(1e-4)
    """Peak learning rate of the student, for the kind of `roles`."""
    critic_rate: Setting = Setting(4e-4)
    """Peak learning rate of the critic."""
    roles: Setting = Setting("adapters")
    """How networks share weights."""
    rank: Setting = Setting(32)
    """Of adapters; without meaning for copies."""
    alpha: Setting = Setting(None)
    """Of adapters, which are scaled by alpha / rank; None: the rank, scale 1."""
    by_method: Mapping[str, Mapping[str, Setting]] = field(default_factory=dict)
    """Settings that another method than TDM has on this family, by the preset's name; they may name any option."""

    def settings(self, method: str) -> dict[str, Setting]:
        """Those that hold for the preset called `method`, by name of the option.

        The path is the family's, whatever the method. Guidance, rates, critic updates and roles were chosen for TDM;
        another method has them only with an entry in `by_method`, and guidance also where there is none to choose.
        """
        own = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name != "by_method"}
        more = dict(self.by_method.get(method, {}))
        if not method.startswith("tdm"):
            kept = _PATH + (_ROLES if more else ()) + (("guidance_scale",) if self.guidance_scale.value == 1 else ())
            own = {name: own[name] for name in kept}
        return own | more


_PATH = ("shift", "start_time", "grid")
_ROLES = ("roles", "rank", "alpha")


def applied(options: _Options, settings: Mapping[str, Setting]) -> _Options:
    """`options`, a dataclass, with the values of `settings` where it has such a field and still has its default.

    What a preset sets on purpose stays; so does the grid of a student of several step counts, or of another number.
    """
    values = {name: setting.value for name, setting in settings.items()}
    fits = len(values.get("grid", ())) == getattr(options, "steps", None)
    if not fits or getattr(options, "step_counts", None):
        values.pop("grid", None)
    untouched = [entry.name for entry in fields(options) if getattr(options, entry.name) == entry.default]  # type: ignore[arg-type]
    return replace(options, **{name: values[name] for name in untouched if name in values})  # type: ignore[type-var]
