"""Published methods, each a short recipe over the engine. `METHODS` maps a name to the preset that returns its options.

A preset's options are a dataclass of which every field can be replaced; `options.build()` gives the method itself.
"""

from __future__ import annotations

from collections.abc import Callable

from fewstep.errors import FewstepError
from fewstep.methods.base import Batch, Loss, Method, Needs, Options, Roles
from fewstep.methods.causal_init import CausalInitOptions, causal_init, teacher_forcing
from fewstep.methods.decoupled import DecoupledOptions, decoupled, decoupled_constrained, decoupled_shared
from fewstep.methods.dmd2 import DMD2Options, dmd, dmd2
from fewstep.methods.f_distill import FDistillOptions, f_distill
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
}


def preset(name: str) -> Options:
    """The options of the method called `name`.

    Raises:
        FewstepError: there is no such method.
    """
    if name not in METHODS:
        raise FewstepError(f"found method {name!r}, expected one of {sorted(METHODS)}, fix: see `fewstep methods`")
    return METHODS[name]()


__all__ = [
    "METHODS",
    "Batch",
    "CausalInitOptions",
    "DMD2Options",
    "DecoupledOptions",
    "FDistillOptions",
    "Loss",
    "Method",
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
    "preset",
]
