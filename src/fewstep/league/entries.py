"""Who plays in the league: every preset but those excluded with a reason, and compositions by options alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from fewstep.errors import FewstepError
from fewstep.methods import METHODS, Options, PhasedOptions, preset

_VIDEOS = "its student makes videos chunk by chunk, and the league's teachers make single pictures"
EXCLUDED: dict[str, str] = {
    "phased-paper": "its shift, loss and guidance are those of a flow teacher of shift 5; `phased` plays instead",
    "tsm": "imitates the teacher at all noise levels to prepare a smaller student; makes no few-step student by itself",
    **{name: _VIDEOS for name, make in METHODS.items() if make().build().needs.causal},
}
"""Presets that do not play, with the reason. MSD is no preset: it is one of the others for each part of the prompts."""

COMPOSITIONS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "f-distill-fkl": ("f-distill", {"divergence": "forward_kl"}),
    "tdm-decoupled": ("tdm", {"guidance": "decoupled"}),
    "tdm-gan": ("tdm", {"gan_weight": 5e-3}),
    "tdm-js": ("tdm", {"divergence": "jensen_shannon"}),
    "tdm-solver": ("tdm", {"solver_weight": 10.0}),
}
"""Name -> preset and what differs: f-distill's divergence for small data; TDM with Decoupled DMD's guidance; with
DMD2's adversarial term (its weight, too); with f-distill's weight of each sample by the density ratio of teacher and
student; kept near the guided teacher's own solver."""

UNIFIED = (1, 2, 4)
"""Step counts of a student that serves several (TDM-unify's paper); it is trained once and scored at each."""

_SCALES = ("guidance_scale", "critic_training_scale", "critic_scale")


@dataclass(frozen=True)
class Entry:
    """One row of the league's tables."""

    name: str
    preset: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Options that differ from the preset's."""

    def options(self, steps: int) -> Options | None:
        """The options for a student of `steps` calls; None where the method has no such student.

        Phased DMD's calls are cut into two phases, so it has none of one step; regression to pairs (DMD) is for one
        step only; a student of several step counts stands at the largest of them, and is scored at all.
        """
        options: Any = replace(preset(self.preset), **self.changes)  # type: ignore[type-var]
        if isinstance(options, PhasedOptions):
            return None if steps == 1 else replace(options, steps=steps, phase_calls=(steps - steps // 2, steps // 2))
        if getattr(options, "regression_weight", 0) and steps != 1:
            return None
        if getattr(options, "step_counts", ()):
            return replace(options, steps=steps, step_counts=UNIFIED) if steps == max(UNIFIED) else None
        return replace(options, steps=steps)


def entries(only: Sequence[str] = ()) -> list[Entry]:
    """All entries, or those named.

    Raises:
        FewstepError: a name that does not play, with the reason if there is one.
    """
    everyone = {name: Entry(name, name) for name in METHODS if name not in EXCLUDED}
    everyone |= {name: Entry(name, base, changes) for name, (base, changes) in COMPOSITIONS.items()}
    for name in only:
        if name not in everyone:
            reason = f" ({EXCLUDED[name]})" if name in EXCLUDED else ""
            raise FewstepError(f"found method {name!r}{reason}, expected some of {list(everyone)}, fix: change --only")
    return [entry for name, entry in everyone.items() if not only or name in only]


def guided_by(options: Options, scale: float) -> Options:
    """The options with every guidance above 1, the teacher's and the critic's, set to `scale`; the rest stay as is."""
    return _changed(options, {name: scale for name in _SCALES if getattr(options, name, 1) > 1})


def unguided(options: Options) -> Options:
    """The options where there is no condition to guide by, so that those that then mean the same are equal."""
    plain: dict[str, Any] = dict.fromkeys(_SCALES, 1.0)
    plain |= {"critic_dropout": 0.0, "guidance_levels": "cleaner", "joint_normaliser": False}
    plain |= {option.name: option.default for option in fields(options) if option.name == "guidance"}
    return _changed(options, plain)


def _changed(options: Any, changes: Mapping[str, Any]) -> Options:
    """The options with those of `changes` that they have."""
    there = {option.name for option in fields(options)}
    return replace(options, **{name: value for name, value in changes.items() if name in there})
