"""Known answers: claims of the library that have a right result, measured. `fewstep check` prints the table.

The teachers are exact (`evaluation.exact`), so every deviation is the library's own or sampling noise. Section and item
numbers are those of the card `tdm.md`, section 8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from typing import get_args

from fewstep.core.process import DiscreteVP, Flow, Process
from fewstep.errors import FewstepError
from fewstep.evaluation.answer import Answer
from fewstep.evaluation.known_answers_adversarial import adversarial_fixed_points, density_ratio, dmd2_gaussian
from fewstep.evaluation.known_answers_causal import causal_law
from fewstep.evaluation.known_answers_decoupled import guidance_and_matching, guided_gaussian
from fewstep.evaluation.known_answers_fixed_points import (
    closed_form_gains,
    critic_alone,
    transported_student,
    wrong_step_count,
)
from fewstep.evaluation.known_answers_identities import identities
from fewstep.evaluation.known_answers_mixture import guided_mixture, mixture, steps_aware_mixture
from fewstep.evaluation.known_answers_msd import imitation, parts_of_conditions
from fewstep.evaluation.known_answers_phased import resting_laws, subinterval_critic, two_phase_gaussian
from fewstep.evaluation.known_answers_roles import RUNS, through_roles
from fewstep.evaluation.known_answers_sid import sid_gaussian
from fewstep.evaluation.known_answers_training import gaussian, steps_aware_gaussian
from fewstep.losses.critic import CriticTarget

Check = Callable[[], Iterator[Answer]]
_QUICK_THROUGH_ADAPTERS = ("tdm",)


def quick_checks() -> dict[str, Check]:
    """The known answers that continuous integration runs, by name: about four minutes on one core."""
    flow, vp, cosine = Flow(), DiscreteVP.linear(), DiscreteVP.cosine()
    checks: dict[str, Check] = {}
    named: dict[str, Process] = {"flow": flow, "vp": vp, "cosine vp": cosine}
    for name, process in named.items():
        checks[f"identities, {name}"] = partial(identities, process)
    for name, process in (("flow", flow), ("cosine vp", cosine)):
        checks[f"transported student, {name}"] = partial(transported_student, process)
        checks[f"critic alone, {name}"] = partial(critic_alone, process)
    for name, process in (("flow", flow), ("vp", vp)):
        checks[f"closed-form gains, {name}"] = partial(closed_form_gains, process, 1.0)
    checks["wrong step count"] = partial(wrong_step_count, flow)
    for name, process, steps, target in _cells(flow, vp)[:5]:
        checks[f"Gaussian, {name}, K={steps}, {target}"] = partial(gaussian, process, steps, target)
    checks["steps-aware Gaussian"] = partial(steps_aware_gaussian, flow)
    checks["ring of 8, cosine vp"] = partial(mixture, cosine, "ring of 8")
    checks["adversarial fixed points"] = adversarial_fixed_points
    checks["density ratio, flow"] = partial(density_ratio, flow)
    for name, process in (("flow", flow), ("cosine vp", cosine)):
        checks[f"phased critic, {name}"] = partial(subinterval_critic, process)
    checks["phased resting laws"] = resting_laws
    checks["two-phase Gaussian"] = partial(two_phase_gaussian, flow)
    for name, process in (("flow", flow), ("vp", vp)):
        checks[f"SiD Gaussian, {name}, K=1"] = partial(sid_gaussian, process, 1)
    checks["guidance and matching"] = guidance_and_matching
    for name, process in (("flow", flow), ("vp", vp)):
        checks[f"decoupled guided Gaussian, {name}, K=2"] = partial(guided_gaussian, process)
    checks["dmd2 Gaussian, flow, K=1"] = partial(dmd2_gaussian, flow, 1, 5e-3)
    checks["msd parts of conditions"] = parts_of_conditions
    for name, process in (("flow", flow), ("vp", vp)):
        checks[f"msd imitation through copies, {name}"] = partial(imitation, process, "copies")
    for loss in ("DMD", "SiD"):
        checks[f"causal law, {loss}"] = partial(causal_law, loss)
    for method, (name, process) in product(RUNS, (("flow", flow), ("vp", vp))):
        checks[f"{method} through copies, {name}"] = partial(through_roles, process, method, "copies")
    for method in _QUICK_THROUGH_ADAPTERS:
        checks[f"{method} through adapters, flow"] = partial(through_roles, flow, method, "adapters")
    return checks


def full_checks() -> dict[str, Check]:
    """The remaining known answers, most of them runs of half a minute to two minutes."""
    flow, vp, cosine = Flow(), DiscreteVP.linear(), DiscreteVP.cosine()
    checks: dict[str, Check] = {
        f"closed-form gains, s={std}": partial(closed_form_gains, flow, std) for std in (2, 0.5)
    }
    for name, process, steps, target in _cells(flow, vp)[5:]:
        checks[f"Gaussian, {name}, K={steps}, {target}"] = partial(gaussian, process, steps, target)
    checks["steps-aware Gaussian, vp"] = partial(steps_aware_gaussian, vp)
    checks["ring of 8, flow"] = partial(mixture, flow, "ring of 8")
    for name, process in (("flow", flow), ("cosine vp", cosine)):
        checks[f"grid of 25, {name}"] = partial(mixture, process, "grid of 25")
        checks[f"steps-aware ring, {name}"] = partial(steps_aware_mixture, process)
    checks["guided two classes"] = partial(guided_mixture, flow)
    checks["dmd2 Gaussian, vp, K=1"] = partial(dmd2_gaussian, vp, 1, 5e-3)
    for name, process in (("flow", flow), ("vp", vp)):
        checks[f"dmd2 Gaussian, {name}, K=4"] = partial(dmd2_gaussian, process, 4, 0.0)
        checks[f"SiD Gaussian, {name}, K=4"] = partial(sid_gaussian, process, 4)
    for method, (name, process) in product(RUNS, (("flow", flow), ("vp", vp))):
        if process is vp or method not in _QUICK_THROUGH_ADAPTERS:
            checks[f"{method} through adapters, {name}"] = partial(through_roles, process, method, "adapters")
    for name, process in (("flow", flow), ("vp", vp)):
        checks[f"msd imitation through adapters, {name}"] = partial(imitation, process, "adapters")
    return checks


def _cells(flow: Process, vp: Process) -> list[tuple[str, Process, int, CriticTarget]]:
    """The cells of card 8.3's table for both processes, those of the quick checks first."""
    cells = product((("flow", flow), ("vp", vp)), (1, 2, 4, 8), get_args(CriticTarget))
    first = [("flow", 2, "denoised"), ("vp", 2, "exact"), *(("flow", steps, "exact") for steps in (1, 4, 8))]
    table = [(name, process, steps, target) for (name, process), steps, target in cells]
    return sorted(table, key=lambda cell: (cell[0], cell[2], cell[3]) not in first)


def run_known_answers(full: bool = False, only: Sequence[str] = ()) -> Iterator[Answer]:
    """Every known answer in turn, each yielded as soon as it is measured.

    About four minutes on one core; `full` adds some twenty. With `only`, those in whose name one of these texts occurs.

    Raises:
        FewstepError: `only` leaves none.
    """
    checks = quick_checks() | (full_checks() if full else {})
    named = {name: check for name, check in checks.items() if not only or any(text in name for text in only)}
    if not named:
        raise FewstepError(
            f"found no check with {' or '.join(map(repr, only))} in its name, expected some of: {'; '.join(checks)}; "
            f"fix: one of these{'' if full else ', or --full for the longer ones'}"
        )
    return (answer for check in named.values() for answer in check())
