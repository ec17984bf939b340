"""How many iterations a budget of network forwards buys: methods are compared at equal cost, not at equal iterations.

The unit is a forward of a network of the teacher's size for each place of the batch: an iteration of TDM at 4 steps
costs 7.75 of them. A guided call counts 2, a discriminator's reading of features 1. Backward passes are not counted,
since what they cost depends on memory settings and hardware; the tables say what time was spent beside the forwards.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fewstep.errors import FewstepError
from fewstep.methods import Options, PhasedOptions

PAIR_STEPS = 8
"""Steps of the teacher for a pair of noise and sample; the embedded teacher's 8 steps are near its 50."""
PAIR_SHARE = 0.25
"""Share of the budget that goes to pairs where a method needs them. Ours; DMD made its pairs before, uncounted."""


@dataclass(frozen=True)
class Plan:
    """What a budget buys."""

    iterations: int
    """Of each phase, where there are phases."""
    forwards: float
    """Expected, for each place of the batch, pairs included; at most the budget."""
    pairs: int = 0
    """Pairs of noise and the teacher's sample that are made first."""


def phases(options: Options) -> list[Options]:
    """The options of every run that makes a student: one, or one for each phase."""
    if isinstance(options, PhasedOptions):
        return [replace(options, phase=phase) for phase in range(1, len(options.phase_calls) + 1)]
    return [options]


def plan(options: Options, forwards: float, batch: int) -> Plan:
    """The most iterations within `forwards` network forwards for each of the `batch` places.

    Raises:
        FewstepError: not even one iteration.
    """
    pairs = 0
    if options.build().needs.pairs:
        pairs = int(PAIR_SHARE * forwards * batch / pair_forwards(options))
    before = pairs * pair_forwards(options) / batch
    one = sum(phase.build().forwards() for phase in phases(options))
    iterations = int((forwards - before) / one + 1e-9)
    if iterations < 1:
        raise FewstepError(
            f"found a budget of {forwards:g} network forwards for {options.build().name}, expected at least "
            f"{before + one:.4g}, what one iteration costs, fix: raise --forwards"
        )
    return Plan(iterations, before + iterations * one, pairs)


def pair_forwards(options: Options) -> int:
    """Network forwards of one pair; guided steps cost 2."""
    return PAIR_STEPS * (1 if getattr(options, "guidance_scale", 1) == 1 else 2)
