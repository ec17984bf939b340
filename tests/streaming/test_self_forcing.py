"""Self Forcing's losses on tiny Wans. Numbers are those of the card self_forcing.md, section 8."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from toy_roles import FRAMES, WanRoles, draw, gradient

from fewstep.core.streams import Draw
from fewstep.errors import FewstepError
from fewstep.methods import DMD2Options, SelfForcingOptions, SelfForcingSiDOptions, preset
from fewstep.methods.base import Method
from fewstep.methods.decoupled import Decoupled, DecoupledOptions
from fewstep.methods.self_forcing import CausalOptions, CausalRollout

OPTIONS = SelfForcingOptions(chunk=1, sink=1, window=1, steps=2)


def loss_of(method: Method, roles: WanRoles, iteration: int = 1) -> Tensor:
    path = method.rollout(roles.batch(), roles, draw(iteration))
    return method.student_loss(path, roles, draw(iteration).sub("student")).values


@dataclass(frozen=True)
class CausalDecoupledOptions(CausalOptions, DecoupledOptions):
    """Another method made causal, as a user would."""


class CausalDecoupled(CausalRollout, Decoupled):
    """Decoupled DMD of a causal student."""


MATCHINGS: dict[str, Method] = {
    "dmd": OPTIONS.build(),
    "f": replace(OPTIONS, divergence="jensen_shannon").build(),
    "gan": replace(OPTIONS, matching_weight=0.0, gan_weight=1.0).build(),
    "both": replace(OPTIONS, gan_weight=0.1).build(),
    "sid": SelfForcingSiDOptions(chunk=1, sink=1, window=1, steps=2, guidance_scale=1.0).build(),
    "decoupled": CausalDecoupled(CausalDecoupledOptions(chunk=1, window=1, steps=2)),  # type: ignore[arg-type]
    "causvid": replace(OPTIONS, history="data").build(),
}


@pytest.mark.parametrize("name", MATCHINGS)
def test_any_matching_trains_a_causal_student(name: str) -> None:
    """The student's loss reaches the student, the critic's the critic alone."""
    roles, method = WanRoles(), MATCHINGS[name]
    assert method.needs.causal
    path = method.rollout(roles.batch(), roles, draw())
    student = method.student_loss(path, roles, draw())
    assert gradient(student.values, roles.own.network).abs().max() > 1e-6
    critic = method.critic_loss(path, roles, draw().sub(0)).values
    assert gradient(critic, roles.fake.network).abs().max() > 1e-6
    assert gradient(critic, roles.own.network).abs().max() == 0


def test_teacher_and_critic_that_agree_give_no_gradient() -> None:
    """V9, exactly."""
    roles = WanRoles()
    roles.critic = roles.teacher
    values = loss_of(replace(OPTIONS, guidance_scale=1.0).build(), roles)
    assert torch.equal(values, torch.zeros_like(values))
    assert gradient(values, roles.own.network).abs().max() == 0


def test_the_loss_is_equation_6() -> None:
    """V9: its gradient with respect to the video is g / numel, video by video, over frames, channels and pixels."""
    roles, method, seen = WanRoles(), OPTIONS.build(), {}

    class Watching(type(method)):  # type: ignore[misc]
        def _student_query(self, path: Any, landing: Any, draw: Draw) -> Any:
            seen["video"], seen["query"] = landing.denoised, super()._student_query(path, landing, draw)
            return seen["query"]

    watching = Watching(OPTIONS)
    values = loss_of(watching, roles)
    (found,) = torch.autograd.grad(values.sum(), seen["video"])
    video, query = seen["video"].detach(), seen["query"]
    with torch.no_grad():
        told, none = roles.own.condition, roles.null(roles.own.condition)
        cond, uncond = (roles.teacher(query.x, query.tau, c) for c in (told, none))
        real, fake = uncond + 4.0 * (cond - uncond), roles.critic(query.x, query.tau, told)
        distance = (video - real).abs().mean((1, 2, 3, 4), keepdim=True)
    torch.testing.assert_close(found, (fake - real) / distance / video[0].numel(), rtol=1e-3, atol=1e-7)
    assert (query.tau != query.tau[0]).any() or len(query.tau) == 1


def test_one_chunk_and_one_step_is_dmd(exact: None) -> None:
    """V11: the same loss and gradient as of a student that makes whole videos."""

    class SameNoise(Draw):
        def normal(self, name: str, *more: Any, **told: Any) -> Tensor:
            return super().normal({"chunk 0, 0": "noise"}.get(name, name), *more, **told)

        def sub(self, name: str | int) -> Draw:
            return Draw((*self._key, name), self._indices)

    roles = WanRoles(torch.float64)
    causal = SelfForcingOptions(chunk=FRAMES, steps=1)
    shared = {"steps": 1, "shift": 5.0, "tau_law": "uniform_unshifted", "guidance_scale": 4.0, "gan_weight": 0.0}
    found = []
    for options in (causal, DMD2Options(**shared)):
        numbers, method = SameNoise((0,), range(2)), options.build()
        path = method.rollout(roles.batch(), roles, numbers)
        values = method.student_loss(path, roles, numbers.sub("student")).values
        found.append((values, gradient(values, roles.own.network)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-11)


def test_all_processes_stop_at_the_same_step() -> None:
    """V14: one exit for all chunks and samples of an iteration, whoever has them; every step has its turn."""
    roles, method = WanRoles(), replace(OPTIONS, steps=3).build()
    exits = [
        [method.rollout(roles.batch(), roles, draw(iteration, rows)).exit_call for rows in (range(2), range(2, 4))]
        for iteration in range(12)
    ]
    assert all(one == other for one, other in exits)
    assert {one for one, _ in exits} == {0, 1, 2}


def test_what_is_refused() -> None:
    roles = WanRoles()
    roles.causal = None  # type: ignore[assignment]
    with pytest.raises(FewstepError, match="expected one that makes videos chunk by chunk"):
        OPTIONS.build().rollout(roles.batch(), roles, draw())
    with pytest.raises(FewstepError, match="step_counts"):
        replace(OPTIONS, step_counts=(2, 4)).validate()
    with pytest.raises(FewstepError, match="matching_weight 0 with gan_weight 0"):
        replace(OPTIONS, matching_weight=0.0).validate()
    with pytest.raises(FewstepError, match="4 latent frames in chunks of 3"):
        preset("self-forcing").build().rollout(WanRoles().batch(), WanRoles(), draw())
