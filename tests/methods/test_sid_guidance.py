"""Few-step SiD: guidance of teacher and critic, and the adversarial term."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from sid_toy import COUNT, PRESETS, VARIANTS, WatchedRoles, batch, critic_loss, labels, student_loss, walk
from torch import Tensor, nn

from fewstep.core.guidance import guided
from fewstep.core.process import Flow, Process
from fewstep.core.tensors import Condition, expand
from fewstep.evaluation.exact import LABEL, NULL_LABEL, ring
from fewstep.evaluation.toy import ToyRoles
from fewstep.losses.fisher import fisher_loss
from fewstep.methods.sid import SiD, SiDOptions, sid_long, sid_lsg, sid_zero_cfg


def test_presets_are_the_cards_table() -> None:
    scales = {name: (o.critic_training_scale, o.critic_scale, o.guidance_scale) for name, o in PRESETS.items()}
    assert scales == {
        "none": (1, 1, 1),
        "long": (1, 1, 4.5),
        "lsg": (4.5, 4.5, 4.5),
        "zero_cfg": (0, 0, 1),
        "anti_cfg": (1, -1, 1),
    }


@pytest.mark.parametrize("scale", [0.0, 1.0, -1.0, 3.0])
def test_critic_scale_is_what_the_student_sees(scale: float) -> None:
    """T9: 0 is the empty prompt, 1 the prompt, -1 twice the empty prompt less the prompt."""
    roles = WatchedRoles(Flow())
    options = SiDOptions(critic_training_scale=scale, critic_scale=scale, weight="one")
    found = student_loss(options, roles).values
    _, x, tau, _, _ = roles.made("teacher")[0]
    told, untold = (roles.critic_network(x, tau, condition) for condition in (labels(), roles.null(labels())))
    fake = {0.0: untold, 1.0: told, -1.0: 2 * untold - told, 3.0: 3 * told - 2 * untold}[scale]
    path = walk(options, roles)[1]
    sample = path.landing(path.call).denoised
    torch.testing.assert_close(found, fisher_loss(sample, roles.exact(x, tau, labels()), fake, 1.0))


@pytest.mark.parametrize("scale", [0.0, -1.0, 4.5])
def test_residual_at_matched_laws_is_the_cards(scale: float) -> None:
    """T9: the gap is 1 - kappa_2 times the guidance; so Zero-CFG acts like a teacher's scale of 2, -1 like 3."""
    exact = ring(Flow(), [1, 2, 3, 4], 1.5, 0.3, torch.float64)
    x, tau = torch.randn(COUNT, 2, dtype=torch.float64), torch.full((COUNT,), 0.5, dtype=torch.float64)
    told, untold = exact(x, tau, labels()), exact(x, tau, exact.null(labels()))
    gap = told - guided(exact, x, tau, labels(), exact.null(labels()), scale)
    torch.testing.assert_close(gap, (1 - scale) * (told - untold))
    as_teacher = guided(exact, x, tau, labels(), exact.null(labels()), 2 - scale) - told
    torch.testing.assert_close(gap, as_teacher)


def test_critic_of_zero_cfg_is_never_told_the_prompt() -> None:
    """T9."""
    roles = WatchedRoles(Flow())
    options = VARIANTS["adversarial"]
    critic_loss(options, roles)
    student_loss(options, roles)
    assert all((told[LABEL] == NULL_LABEL).all() for _, _, _, told, _ in roles.made("critic"))
    for name in ("student", "teacher", "discriminator"):  # T11: logits stay conditional
        assert all(torch.equal(told[LABEL], labels()[LABEL][: len(x)]) for _, x, _, told, _ in roles.made(name))


@pytest.mark.parametrize("scale", [-1.0, 0.0, 3.0])
def test_guided_answer_of_the_critic_is_what_is_trained(scale: float) -> None:
    roles = WatchedRoles(Flow())
    options = SiDOptions(critic_training_scale=scale, critic_scale=scale, critic_weight="one")
    found = critic_loss(options, roles).values
    _, x, tau, _, _ = roles.made("critic")[0]
    x, tau = x[:COUNT], tau[:COUNT]
    answer = guided(roles.critic, x, tau, labels(), roles.null(labels()), scale)
    path = walk(options, roles)[1]
    torch.testing.assert_close(found, (answer - path.landing(path.call).denoised).square().mean(1))


def test_dropped_prompts_are_told_as_empty_to_the_critic_alone() -> None:
    roles = WatchedRoles(Flow())
    critic_loss(SiDOptions(critic_dropout=0.5), roles)
    told = roles.made("critic")[0][3][LABEL]
    assert ((told == NULL_LABEL) | (told == labels()[LABEL])).all()
    assert 0.2 < float((told == NULL_LABEL).double().mean()) < 0.8
    assert all(torch.equal(told[LABEL], labels()[LABEL][: len(x)]) for _, x, _, told, _ in roles.made("student"))
    before = len(roles.made("critic"))
    student_loss(SiDOptions(critic_dropout=0.5), roles)
    assert torch.equal(roles.made("critic")[before][3][LABEL], labels()[LABEL])


class Shifted:
    """Denoiser of N(mean of the label, spread^2) in the plane; the empty prompt's mean is 0."""

    spread = 0.4

    def __init__(self, process: Process, gain: float = 1.0) -> None:
        self.process, self.gain = process, gain

    def null(self, condition: Condition) -> Condition:
        return {LABEL: torch.full_like(condition[LABEL], NULL_LABEL)}

    def mean(self, condition: Condition) -> Tensor:
        table = self.gain * torch.tensor([[1.0, -0.5], [-0.3, 0.8], [0.0, 0.0]], dtype=torch.float64)
        return table[condition[LABEL]]  # NULL_LABEL is the last row

    def __call__(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        alpha, sigma = expand(self.process.alpha(t), x), expand(self.process.sigma(t), x)
        share = alpha * self.spread**2 / (alpha.square() * self.spread**2 + sigma.square())
        return self.mean(condition) + share * (x - alpha * self.mean(condition))


class ShiftedStudent(nn.Module):
    """Makes N(gain x mean of the label, spread^2) of pure noise."""

    def __init__(self, process: Process, gain: float) -> None:
        super().__init__()
        self.law = Shifted(process)
        self.gain = nn.Parameter(torch.tensor(gain, dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self.gain * self.law.mean(condition) + self.law.spread * x


def best_for(exact: Shifted, scale: float) -> Any:
    """A critic whose answer guided by `scale` is `exact`'s, while that to the empty prompt is arbitrary."""

    def critic(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        anything = x.sin()
        empty = (condition[LABEL] == NULL_LABEL)[:, None]
        prompts = {LABEL: condition[LABEL].clamp(min=0)}
        return torch.where(empty, anything, anything + (exact(x, t, prompts) - anything) / scale)

    return critic


@pytest.mark.parametrize("gain", [1.0, 3.0])
def test_lsg_rests_where_teacher_guidance_does(gain: float) -> None:
    """T10: with the best critic of each their gradients are equal, and 0 at the teacher's guided law, of scale 3."""
    process, gradients = Flow(), []
    for options in (sid_lsg(3.0), sid_long(3.0)):
        student = ShiftedStudent(process, gain)
        roles = ToyRoles(Shifted(process), student, best_for(Shifted(process, gain), options.critic_scale))
        loss = student_loss(replace(options, steps=1), roles)
        gradients.append(torch.autograd.grad(loss.values.mean(), student.gain)[0])
    torch.testing.assert_close(gradients[0], gradients[1])
    if gain == 3:
        assert abs(float(gradients[0])) < 1e-12
    else:
        assert float(gradients[0]) < -0.01  # towards the guided law


def test_guided_law_of_unequal_spreads_is_the_cards() -> None:
    """T10, with the Gaussian formula of the card decoupled_dmd.md, T5: one level .7, scale 3."""
    x = torch.linspace(-3, 3, 7, dtype=torch.float64)

    def denoised(mean: float, variance: float) -> Tensor:
        return (variance * x + 0.49 * mean) / (variance + 0.49)

    told, untold = denoised(1.0, 0.5), denoised(0.0, 1.5)
    torch.testing.assert_close(untold + 3 * (told - untold), denoised(1.49624, 0.00376), rtol=0, atol=1e-4)


# The adversarial term


def test_discriminator_sees_data_and_samples_under_the_same_noise() -> None:
    """T11."""
    roles, options = WatchedRoles(Flow()), VARIANTS["adversarial"]
    path = walk(options, roles)[1]
    critic_loss(options, roles)
    (_, real, tau, *_), (_, fake, same, *_) = roles.made("discriminator")
    assert torch.equal(tau, same)
    clean = [batch().real[0], path.landing(path.call).denoised]
    noises = [x - expand(1 - tau, x) * c for x, c in zip((real, fake), clean, strict=True)]
    torch.testing.assert_close(noises[0], noises[1])


def test_adversarial_term_is_weighted_like_the_rest() -> None:
    roles = WatchedRoles(Flow())
    plain = student_loss(sid_zero_cfg(), roles).values
    judged = student_loss(replace(sid_zero_cfg(), gan_weight=0.5), roles)
    _, x, tau, *_ = roles.made("discriminator")[0]
    logits = x.tanh() @ roles.head
    torch.testing.assert_close(judged.values - plain, 0.5 * (1 - tau) * nn.functional.softplus(-logits).mean(1))
    assert SiD(sid_zero_cfg()).needs.real_data is False
    assert SiD(replace(sid_zero_cfg(), gan_weight=0.5)).needs.discriminator
