"""Re-DMD. Numbers are those of the card reward_forcing.md, section 8."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from toy_roles import WanRoles, draw, gradient

from fewstep.attention import Layout
from fewstep.core.process import Flow
from fewstep.core.tensors import expand
from fewstep.errors import FewstepError
from fewstep.evaluation.exact import MixtureTeacher
from fewstep.evaluation.toy import BulkDraw
from fewstep.methods import RewardForcingOptions, SelfForcingOptions
from fewstep.methods.base import Batch
from fewstep.methods.reward_forcing import PixelReward, Reward, RewardForcing, latent_motion

SHARED = {"chunk": 1, "sink": 1, "window": 1, "steps": 2, "sink_decay": 0.9}
OPTIONS, PLAIN = RewardForcingOptions(**SHARED), SelfForcingOptions(**SHARED)


def losses(roles: WanRoles, reward: Reward | None = None, **changes: Any) -> tuple[Tensor, Tensor]:
    """Values and the student's gradient; of plain DMD where `changes` say so."""
    plain = changes.pop("plain", False)
    method = PLAIN.build() if plain else RewardForcing(replace(OPTIONS, **changes), reward)
    path = method.rollout(roles.batch(), roles, draw())
    values = method.student_loss(path, roles, draw().sub("student")).values
    return values, gradient(values, roles.own.network)


def test_a_constant_reward_and_an_infinite_beta_are_plain_dmd_to_the_bit() -> None:
    """R8, and the issue's form of R9."""
    roles = WanRoles()
    wanted = losses(roles, plain=True)
    constant = lambda video, condition: torch.full((len(video),), 0.1)
    for found in (
        losses(roles, constant),
        losses(roles, beta=math.inf),
        losses(roles, beta=math.inf, relative_to="mean"),
    ):
        assert torch.equal(found[0], wanted[0])
        assert torch.equal(found[1], wanted[1])
    assert not torch.equal(losses(roles)[1], wanted[1])  # motion differs from video to video


def test_a_large_beta_comes_near_plain_dmd() -> None:
    roles = WanRoles()
    wanted = losses(roles, plain=True)[1]
    near, far = (float((losses(roles, beta=beta)[1] - wanted).norm() / wanted.norm()) for beta in (1e4, 1.0))
    assert near < 1e-3 * far


def test_as_published_a_constant_reward_scales_the_gradient() -> None:
    """R9: by exp(r / beta), which Adam does not feel."""
    roles = WanRoles()
    constant = lambda video, condition: torch.full((len(video),), 1.2)
    _, found = losses(roles, constant, relative_to="mean", beta=0.5, reward_mean=0.2, reward_spread=2.0)
    torch.testing.assert_close(found, math.exp(1.0 / (0.5 * 2)) * losses(roles, plain=True)[1], rtol=1e-4, atol=1e-8)


def test_no_gradient_flows_through_the_reward() -> None:
    """R10: a differentiable reward gives what a table of its values gives."""
    roles, seen = WanRoles(), []

    def asked(video: Tensor, condition: dict[str, Tensor]) -> Tensor:
        assert not torch.is_grad_enabled()
        assert condition.keys() == {"text"}
        seen.append(latent_motion(video, condition))
        return seen[-1]

    found = losses(roles, asked)[1]
    assert torch.equal(found, losses(roles, lambda video, condition: seen[0].clone())[1])


def test_teacher_and_critic_that_agree_give_no_gradient() -> None:
    """R11."""
    roles = WanRoles()
    roles.critic = roles.teacher
    assert losses(roles, guidance_scale=1.0)[1].abs().max() == 0


def test_weights_are_relative_to_the_batch_and_have_mean_one() -> None:
    method = RewardForcing(replace(OPTIONS, beta=0.5))
    weight = method._weight(torch.tensor([0.0, 1.0, -1.0]))
    assert float(weight.mean()) == pytest.approx(1)
    assert float(weight[1] / weight[0]) == pytest.approx(math.exp(2), rel=1e-5)
    for count in range(2, 30):
        assert torch.equal(method._weight(torch.full((count,), 0.1)), torch.ones(count))


def test_rewards_of_motion_and_of_pixels() -> None:
    still, moving = torch.ones(1, 2, 3, 1, 1), torch.arange(3.0).view(1, 1, 3, 1, 1).expand(1, 2, 3, 1, 1)
    assert latent_motion(torch.cat([still, moving]), {}).tolist() == [0.0, 1.0]

    class Decoder:
        def decode(self, latents: Tensor) -> Tensor:
            return (latents * 10).transpose(1, 2)

    scored = PixelReward(Decoder(), lambda pixels, condition: pixels.flatten(1).amax(1))(moving, {})
    assert scored.tolist() == [20.0]


def test_what_is_refused() -> None:
    roles = WanRoles()
    with pytest.raises(FewstepError, match="found one video at a time"):
        OPTIONS.build().rollout(replace(roles.batch(), samples=torch.arange(1)), roles, draw())
    with pytest.raises(FewstepError, match=r"rewards of shape \(1,\) for 2 videos"):
        losses(roles, lambda video, condition: torch.ones(1))


class OneNumber:
    """Videos of one number: m + g noise, its exact critic, and a mixture of two as the teacher (R12)."""

    process = Flow()

    def __init__(self) -> None:
        self.parameters = torch.tensor([0.3, 1.5], requires_grad=True)
        means, covariance = torch.tensor([[-2.0], [2.0]]), 0.25 * torch.ones(2, 1, 1)
        self._real = MixtureTeacher(self.process, torch.ones(2), means, covariance)
        self.causal = self

    def memory(self, student: object, layout: Layout, condition: dict[str, Tensor]) -> OneNumber:
        return self

    def snapshot(self) -> OneNumber:
        return self

    def denoise(self, x: Tensor, t: Tensor) -> Tensor:
        return self.parameters[0] + self.parameters[1] * x

    def student(self, x: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
        raise AssertionError("called through its memory")

    def teacher(self, x: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
        return self._real(x.flatten(1), t, {}).view_as(x)

    def critic(self, x: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
        mean, spread = self.parameters.detach()
        alpha, sigma = expand(self.process.alpha(t), x), expand(self.process.sigma(t), x)
        return mean + alpha * spread**2 / (alpha**2 * spread**2 + sigma**2) * (x - alpha * mean)

    def null(self, condition: dict[str, Tensor]) -> dict[str, Tensor]:
        return condition


def test_reward_moves_a_student_that_is_too_simple_towards_it() -> None:
    """R12: rewarded on the right, the mean moves right with 1 / beta, and the spread shrinks."""
    right = lambda video, condition: (video.flatten(1)[:, 0] > 0).double()
    found = []
    for beta in (math.inf, 0.5, 0.2):
        roles = OneNumber()
        options = RewardForcingOptions(
            chunk=1, steps=1, guidance_scale=1.0, normaliser="none", beta=beta, tau_law="uniform", shift=1.0
        )
        method = RewardForcing(options, right)
        numbers, adam = BulkDraw(512, torch.Generator().manual_seed(0)), torch.optim.Adam([roles.parameters], 0.05)
        batch, last = Batch({}, torch.arange(512), (1, 1, 1, 1)), []
        for iteration in range(160):
            adam.param_groups[0]["lr"] = 0.05 * (1 - iteration / 160)
            adam.zero_grad()
            path = method.rollout(batch, roles, numbers)
            method.student_loss(path, roles, numbers).values.mean().backward()
            adam.step()
            last.append(roles.parameters.detach().clone())
        found.append(torch.stack(last[-40:]).mean(0))
    (plain, plain_spread), (some, some_spread), (more, more_spread) = (pair.tolist() for pair in found)
    assert abs(plain) < 0.1
    assert plain + 0.1 < some < more - 0.1
    assert plain_spread > some_spread > more_spread
