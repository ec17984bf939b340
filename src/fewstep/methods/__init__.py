"""Published methods, each a short recipe over the engine. `METHODS` maps a name to the preset that returns its options.

A preset's options are a dataclass of which every field can be replaced; `options.build()` gives the method itself.
Installed packages add presets of their own as entry points of the group `fewstep.methods` (docs/architecture.md).
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points

from fewstep.errors import FewstepError
from fewstep.methods.base import Batch, Loss, Method, Needs, Options, Roles
from fewstep.methods.causal_init import CausalInitOptions, causal_init, teacher_forcing
from fewstep.methods.decoupled import DecoupledOptions, decoupled, decoupled_constrained, decoupled_shared
from fewstep.methods.dmd2 import DMD2Options, dmd, dmd2
from fewstep.methods.f_distill import FDistillOptions, f_distill
from fewstep.methods.live_avatar import LiveAvatarOptions, live_avatar
from fewstep.methods.motionstream import MotionStreamOptions, motionstream
from fewstep.methods.phased import PhasedOptions, phased, phased_paper
from fewstep.methods.reward_forcing import RewardForcingOptions, reward_forcing
from fewstep.methods.self_forcing import (
    SelfForcingOptions,
    SelfForcingSiDOptions,
    causvid,
    self_forcing,
    self_forcing_gan,
    self_forcing_sid,
)
from fewstep.methods.sid import SiDOptions, sid_anti_cfg, sid_long, sid_lsg, sid_none, sid_zero_cfg
from fewstep.methods.tdm_options import TDMOptions, tdm, tdm_paper, tdm_unify
from fewstep.methods.tsm import TSMOptions, tsm

METHODS: dict[str, Callable[[], Options]] = {
    "tdm": tdm,
    "tdm-paper": tdm_paper,
    "tdm-unify": tdm_unify,
    "dmd2": dmd2,
    "dmd": dmd,
    "f-distill": f_distill,
    "sid": sid_lsg,
    "sid-none": sid_none,
    "sid-long": sid_long,
    "sid-zero-cfg": sid_zero_cfg,
    "sid-anti-cfg": sid_anti_cfg,
    "decoupled": decoupled,
    "decoupled-constrained": decoupled_constrained,
    "decoupled-shared": decoupled_shared,
    "phased": phased,
    "phased-paper": phased_paper,
    "tsm": tsm,
    "causal-init": causal_init,
    "teacher-forcing": teacher_forcing,
    "causvid": causvid,
    "self-forcing": self_forcing,
    "self-forcing-sid": self_forcing_sid,
    "self-forcing-gan": self_forcing_gan,
    "reward-forcing": reward_forcing,
    "live-avatar": live_avatar,
    "motionstream": motionstream,
}


ENTRY_POINTS = "fewstep.methods"


def available() -> dict[str, Callable[[], Options]]:
    """All presets by name: ours, and those of installed packages, which cannot take the place of ours.

    Raises:
        FewstepError: a package names something that is no preset.
    """
    others = {entry.name: entry for entry in entry_points(group=ENTRY_POINTS)}
    return {name: _loaded(entry) for name, entry in others.items()} | METHODS


def preset(name: str) -> Options:
    """The options of the method called `name`.

    Raises:
        FewstepError: there is no such method, or the package that names it is at fault.
    """
    if name in METHODS:
        return METHODS[name]()
    for entry in entry_points(group=ENTRY_POINTS, name=name):
        return _loaded(entry)()
    raise FewstepError(f"found method {name!r}, expected one of {sorted(METHODS)}, fix: see `fewstep methods`")


def _loaded(entry: EntryPoint) -> Callable[[], Options]:
    """What an entry point names, after a look at it."""
    try:
        make = entry.load()
        make().build()
    except (ImportError, AttributeError, TypeError) as error:
        raise FewstepError(
            f"found the entry point {entry.name} = {entry.value!r} of the group {ENTRY_POINTS!r} that is no preset "
            f"({type(error).__name__}: {error}), expected a function without arguments that returns options of a "
            "method, fix: correct it in the package that names it"
        ) from error
    return make


__all__ = [
    "ENTRY_POINTS",
    "METHODS",
    "Batch",
    "CausalInitOptions",
    "DMD2Options",
    "DecoupledOptions",
    "FDistillOptions",
    "LiveAvatarOptions",
    "Loss",
    "Method",
    "MotionStreamOptions",
    "Needs",
    "Options",
    "PhasedOptions",
    "RewardForcingOptions",
    "Roles",
    "SelfForcingOptions",
    "SelfForcingSiDOptions",
    "SiDOptions",
    "TDMOptions",
    "TSMOptions",
    "available",
    "preset",
]
