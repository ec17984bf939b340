"""Few-step SiD over toy roles: who gets gradients and through what, the chain, guidance, and every setting.

T numbers are those of the card sid_few_step.md, section 8; T1, T2, T5 and T8 are in tests/losses/test_fisher.py.
"""

from __future__ import annotations

import ast
import inspect
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.core.guidance import guided
from fewstep.core.process import DiscreteVP, Flow, Process
from fewstep.core.solvers import ddim
from fewstep.core.streams import Draw, Streams
from fewstep.core.tensors import Condition, expand
from fewstep.errors import FewstepError
from fewstep.evaluation.exact import LABEL, NULL_LABEL, PredictingAs, ring
from fewstep.evaluation.known_answers_sid import sid_gaussian, sid_gaussian_errors
from fewstep.evaluation.toy import ToyRoles
from fewstep.losses.fisher import fisher_loss, fisher_weight
from fewstep.methods import sid as sid_module
from fewstep.methods.base import Batch, Loss, Roles
from fewstep.methods.matching_options import MatchingOptions
from fewstep.methods.sid import (
    DrawnPath,
    SiD,
    SiDOptions,
    sid_anti_cfg,
    sid_long,
    sid_lsg,
    sid_none,
    sid_zero_cfg,
)
from fewstep.methods.tdm import TDM
from fewstep.methods.tdm_options import TDMOptions

COUNT = 24
PRESETS = {
    "none": sid_none(),
    "long": sid_long(),
    "lsg": sid_lsg(),
    "zero_cfg": sid_zero_cfg(),
    "anti_cfg": sid_anti_cfg(),
}
VARIANTS = PRESETS | {
    "ddim": SiDOptions(eta=1.0),
    "fixed": SiDOptions(chain_noise="fixed"),
    "one step": SiDOptions(steps=1),
    "legacy": SiDOptions(weight="one", normaliser="dmd", alpha=1.2),
    "adversarial": replace(sid_zero_cfg(), gan_weight=0.01),
    "unify": SiDOptions(step_counts=(1, 2, 4), steps_condition=True),
    "two critic updates": replace(sid_lsg(), critic_updates=2, teacher_regularisation=0.1),
}


class Scaled(nn.Module):
    """teacher(x) * gain + offset; `head` makes logits of x."""

    def __init__(self, teacher: Any, offset: float) -> None:
        super().__init__()
        self.teacher = [teacher]
        self.gain = nn.Parameter(torch.tensor([1.1, 0.9], dtype=torch.float64))
        self.offset = nn.Parameter(torch.full((2,), offset, dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self.teacher[0](x, t, condition) * self.gain + self.offset


class WatchedRoles:
    """Toy roles that record every call; the outputs of those named in `detached` carry no gradient."""

    def __init__(self, process: Process, detached: tuple[str, ...] = (), kind: str = "x0") -> None:
        self.process = process
        self.exact = PredictingAs(ring(process, [1, 2, 3, 4], 1.5, 0.3, torch.float64), kind)
        self.student_network, self.critic_network = Scaled(self.exact, 0.1), Scaled(self.exact, -0.1)
        self.head = nn.Parameter(torch.ones(2, 3, dtype=torch.float64))  # of the discriminator: the critic's own
        self.detached = detached
        self.calls: list[tuple[str, Tensor, Tensor, Condition, bool]] = []

    def teacher(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self._watched("teacher", self.exact, x, t, condition)

    def student(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self._watched("student", self.student_network, x, t, condition)

    def critic(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self._watched("critic", self.critic_network, x, t, condition)

    def discriminator(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self._watched("discriminator", lambda x, t, condition: x.tanh() @ self.head, x, t, condition)

    def null(self, condition: Condition) -> Condition:
        return self.exact.null(condition)

    def _watched(self, name: str, model: Any, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        self.calls.append((name, x, t, condition, torch.is_grad_enabled()))
        answer = model(x, t, condition)
        return answer.detach() if name in self.detached else answer

    def made(self, name: str) -> list[tuple[str, Tensor, Tensor, Condition, bool]]:
        return [call for call in self.calls if call[0] == name]

    def of_student(self) -> list[nn.Parameter]:
        return list(self.student_network.parameters())

    def of_critic(self) -> list[nn.Parameter]:
        return [*self.critic_network.parameters(), self.head]


def labels() -> Condition:
    return {LABEL: torch.arange(COUNT) % 2}


def batch(real: bool = True) -> Batch:
    data = torch.randn(COUNT, 2, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return Batch(labels(), torch.arange(COUNT), (2,), torch.float64, (data, labels()) if real else None)


def draw(iteration: int = 0) -> Draw:
    return Streams(0).at(iteration, range(COUNT))


def walk(options: SiDOptions, roles: Roles, iteration: int = 0) -> tuple[SiD, DrawnPath]:
    method = SiD(options)
    return method, method.rollout(batch(), roles, draw(iteration))


def student_loss(options: SiDOptions, roles: Roles, iteration: int = 0) -> Loss:
    method, path = walk(options, roles, iteration)
    return method.student_loss(path, roles, draw(iteration))


def critic_loss(options: SiDOptions, roles: Roles, iteration: int = 0) -> Loss:
    method, path = walk(options, roles, iteration)
    return method.critic_loss(path, roles, draw(iteration))


def gradient(options: SiDOptions, roles: WatchedRoles) -> Tensor:
    """Of the student's mean loss with respect to its parameters."""
    loss = student_loss(options, roles).values.mean()
    return torch.cat(torch.autograd.grad(loss, roles.of_student()))


# Who gets gradients


@pytest.mark.parametrize("process", [Flow(), DiscreteVP.cosine()], ids=lambda p: p.name)
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_trains_only_who_it_should(name: str, process: Process) -> None:
    roles = WatchedRoles(process)
    loss = critic_loss(VARIANTS[name], roles)
    assert loss.values.shape == (COUNT,)
    loss.values.mean().backward()
    judged = VARIANTS[name].gan_weight > 0
    assert all(p.grad.abs().sum() > 0 for p in roles.critic_network.parameters())
    assert (roles.head.grad is not None) == judged  # T11
    assert all(p.grad is None for p in roles.of_student())

    roles = WatchedRoles(process)
    loss = student_loss(VARIANTS[name], roles)
    assert loss.values.shape == (COUNT,)
    assert loss.values.isfinite().all()
    loss.values.mean().backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in roles.of_student())
    assert all(p.grad is None for p in roles.of_critic())
    assert all(not metric.requires_grad and metric.ndim == 0 for metric in loss.metrics.values())


def test_gradient_flows_through_teacher_and_critic() -> None:
    """T4: that of the formula with everything attached; each detached part changes it."""
    options, roles = SiDOptions(alpha=0.7), WatchedRoles(Flow())
    found = gradient(options, roles)
    _, x, tau, told, _ = roles.made("teacher")[0]

    path = walk(options, roles)[1]
    sample = path.land(roles.student, path.call).denoised
    alpha, sigma = expand(roles.process.alpha(tau), x), expand(roles.process.sigma(tau), x)
    noised = alpha * sample + (x - alpha * sample).detach()
    torch.testing.assert_close(noised, x)
    assert float(sigma.detach().min()) > 0
    real, fake = roles.teacher(noised, tau, told), roles.critic(noised, tau, told)
    values = fisher_weight("alpha", roles.process, tau) * fisher_loss(sample, real, fake, 0.7)
    torch.testing.assert_close(found, torch.cat(torch.autograd.grad(values.mean(), roles.of_student())))

    for detached in [("teacher",), ("critic",), ("teacher", "critic")]:
        other = gradient(options, WatchedRoles(Flow(), detached))
        assert not torch.allclose(found, other, rtol=0.05), detached


def test_tdm_does_not_care_whether_they_are_attached() -> None:
    """T4, the other side."""
    method, gradients = TDM(TDMOptions()), []
    for roles in (WatchedRoles(Flow()), WatchedRoles(Flow(), ("teacher", "critic"))):
        loss = method.student_loss(method.rollout(batch(), roles, draw()), roles, draw()).values.mean()
        gradients.append(torch.cat(torch.autograd.grad(loss, roles.of_student())))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


def test_with_both_detached_it_is_distribution_matching() -> None:
    """Which is why that mistake would go unnoticed in what a student learns, but not in T4."""
    roles, options = WatchedRoles(Flow(), ("teacher", "critic")), SiDOptions(alpha=0.3)
    found = gradient(options, roles)
    (_, x, tau, told, _), (_, same, *_) = roles.made("teacher")[0], roles.made("critic")[0]
    assert torch.equal(x, same)
    direction = roles.teacher(x, tau, told) - roles.critic(x, tau, told)
    path = walk(options, roles)[1]
    sample = path.land(roles.student, path.call).denoised
    values = -(1 - tau) * (direction * sample).mean(1)
    torch.testing.assert_close(found, torch.cat(torch.autograd.grad(values.mean(), roles.of_student())))


def test_gradient_is_affine_in_alpha() -> None:
    low, middle, high = (gradient(SiDOptions(alpha=alpha), WatchedRoles(Flow())) for alpha in (0.0, 0.6, 1.2))
    torch.testing.assert_close(middle, (low + high) / 2)


@pytest.mark.parametrize("kind", ["eps", "v", "flow"])
@pytest.mark.parametrize("name", ["none", "lsg"])
def test_losses_do_not_depend_on_what_the_networks_predict(name: str, kind: str) -> None:
    """T6."""
    plain, spoken = (WatchedRoles(DiscreteVP.linear(), kind=kind) for kind in ("x0", kind))
    for of in (student_loss, critic_loss):
        torch.testing.assert_close(
            of(VARIANTS[name], plain).values, of(VARIANTS[name], spoken).values, rtol=1e-6, atol=0
        )
    torch.testing.assert_close(gradient(VARIANTS[name], plain), gradient(VARIANTS[name], spoken), rtol=1e-6, atol=0)


def test_weight_and_normaliser_divide_the_loss() -> None:
    plain, weighted, legacy = (
        student_loss(options, WatchedRoles(Flow())).values
        for options in (SiDOptions(weight="one"), SiDOptions(), SiDOptions(weight="one", normaliser="dmd"))
    )
    roles = WatchedRoles(Flow())
    student_loss(SiDOptions(), roles)
    path = walk(SiDOptions(), roles)[1]
    _, x, tau, told, _ = roles.made("teacher")[0]
    torch.testing.assert_close(weighted, (1 - tau) * plain)
    distance = (path.landing(path.call).denoised - roles.exact(x, tau, told)).abs().mean(1)
    torch.testing.assert_close(legacy, plain / distance)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 1.2])
@pytest.mark.parametrize("steps", [1, 4])
def test_student_of_the_teachers_law_rests(steps: int, alpha: float) -> None:
    """T3: the best critic of such a student is the teacher, here of four modes."""
    roles = WatchedRoles(Flow())
    nn.init.ones_(roles.critic_network.gain)
    nn.init.zeros_(roles.critic_network.offset)
    found = gradient(SiDOptions(steps=steps, alpha=alpha), roles)
    torch.testing.assert_close(found, torch.zeros_like(found), rtol=0, atol=1e-12)


# The chain and the drawn call


def chain(options: SiDOptions, roles: WatchedRoles) -> tuple[DrawnPath, list[Tensor], list[Tensor]]:
    """The path, and the input and the clean prediction of each call."""
    path = walk(options, roles)[1]
    calls = [torch.full((COUNT,), call) for call in range(options.steps)]
    return path, [path.input(call) for call in calls], [path.landing(call).denoised for call in calls]


def test_times_are_those_of_the_card() -> None:
    """T7."""
    assert SiDOptions().time_grid(4).tolist() == [1, 0.75, 0.5, 0.25, 0]
    assert SiDOptions(start_time=0.625).time_grid(1).tolist() == [0.625, 0]


def test_without_new_noise_the_chain_is_the_deterministic_sampler() -> None:
    """T7: DDIM's, which for a flow is Euler's."""
    roles = WatchedRoles(Flow())
    path, inputs, denoised = chain(SiDOptions(eta=1.0), roles)
    grid = SiDOptions().time_grid(4)
    torch.testing.assert_close(ddim(roles.student, inputs[0], grid, roles.process, labels()), denoised[-1])
    for call in range(3):
        velocity = (inputs[call] - denoised[call]) / grid[call]
        torch.testing.assert_close(inputs[call + 1], inputs[call] + (grid[call + 1] - grid[call]) * velocity)


def test_fixed_noise_is_the_paths_own_first() -> None:
    """T7."""
    _, inputs, denoised = chain(SiDOptions(chain_noise="fixed"), WatchedRoles(Flow()))
    for call, t in enumerate((0.75, 0.5, 0.25)):
        torch.testing.assert_close(inputs[call + 1], (1 - t) * denoised[call] + t * inputs[0])


def test_fresh_noise_is_new_at_every_step() -> None:
    """T7."""
    _, inputs, denoised = chain(SiDOptions(), WatchedRoles(Flow()))
    noises = [inputs[0]]
    noises += [(inputs[n + 1] - (1 - t) * denoised[n]) / t for n, t in enumerate((0.75, 0.5, 0.25))]
    overlaps = torch.corrcoef(torch.stack([noise.flatten() for noise in noises])) - torch.eye(4)
    assert overlaps.abs().max() < 0.5
    assert all(0.7 < float(noise.std()) < 1.3 for noise in noises)


def test_only_the_drawn_call_carries_gradient() -> None:
    """T7: one call of the student, at the detached input of the drawn step, compared as a clean sample."""
    for iteration in range(6):
        roles = WatchedRoles(Flow())
        method, path = walk(SiDOptions(), roles, iteration)
        method.student_loss(path, roles, draw(iteration))
        (attached,) = [call for call in roles.made("student") if call[4]]
        assert not attached[1].requires_grad
        torch.testing.assert_close(attached[1], path.input(path.call))
        assert attached[2].unique().tolist() == [1 - 0.25 * int(path.call[0])]
        assert len(roles.made("student")) == 1 + int(path.call[0])  # nothing beyond the drawn call


def test_one_call_is_drawn_per_iteration_for_all() -> None:
    """Critic and student look at the same one, and all are drawn alike."""
    drawn = []
    for iteration in range(200):
        roles = WatchedRoles(Flow())
        path = walk(SiDOptions(), roles, iteration)[1]
        assert len(path.call.unique()) == 1
        drawn.append(int(path.call[0]))
    assert torch.tensor(drawn).bincount(minlength=4).min() > 30
    method, path = walk(SiDOptions(), roles, 3)
    clean = path.landing(path.call).denoised
    for of in (method.critic_loss, method.student_loss):
        before = len(roles.made("critic"))
        of(path, roles, draw(3))
        _, x, tau, *_ = roles.made("critic")[before]
        noise = (x - expand(1 - tau, x) * clean) / expand(tau, x)
        assert 0.7 < float(noise.detach().std()) < 1.3


def test_critic_regresses_to_the_clean_prediction_at_any_level() -> None:
    options, levels = SiDOptions(critic_weight="one"), []
    for iteration in range(20):
        roles = WatchedRoles(Flow())
        loss = critic_loss(options, roles, iteration).values
        _, x, tau, told, _ = roles.made("critic")[0]
        path = walk(options, roles, iteration)[1]
        error = roles.critic(x, tau, told) - path.landing(path.call).denoised
        torch.testing.assert_close(loss, error.square().mean(1))
        levels.append(tau)
    quantiles = torch.cat(levels).quantile(torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=torch.float64))
    assert quantiles.tolist() == pytest.approx([0.13, 0.41, 0.67, 0.86, 0.97], abs=0.06)


def test_statistics_of_each_step_are_logged() -> None:
    found = set()
    for iteration in range(30):
        roles = WatchedRoles(Flow())
        metrics = student_loss(SiDOptions(), roles, iteration).metrics
        path = walk(SiDOptions(), roles, iteration)[1]
        call, clean = int(path.call[0]), path.landing(path.call).denoised.float()
        torch.testing.assert_close(metrics[f"call_{call}_denoised_mean"], clean.mean())
        torch.testing.assert_close(metrics[f"call_{call}_denoised_std"], clean.std())
        torch.testing.assert_close(metrics[f"call_{call}_student_loss"], metrics["student_loss"])
        found |= {name for name in metrics if name.startswith("call_")}
    names = ("student_loss", "fisher", "denoised_mean", "denoised_std")
    assert found == {f"call_{call}_{name}" for call in range(4) for name in names}


# Guidance


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


# Settings


@pytest.mark.parametrize("name", VARIANTS)
def test_forwards_are_what_is_claimed(name: str) -> None:
    iterations, rows = 120, 0
    for iteration in range(iterations):
        roles = WatchedRoles(Flow())
        method, path = walk(VARIANTS[name], roles, iteration)
        for update in range(method.critic_updates):
            method.critic_loss(path, roles, draw(iteration).sub(update))
        method.student_loss(path, roles, draw(iteration))
        rows += sum(len(call[1]) for call in roles.calls)
    assert rows / COUNT / iterations == pytest.approx(method.forwards(), rel=0.04)


def test_presets_cost_what_the_page_says() -> None:
    costs = {name: SiD(options).forwards(4) for name, options in PRESETS.items()}
    assert costs == {"none": 6.5, "long": 7.5, "lsg": 9.5, "zero_cfg": 6.5, "anti_cfg": 7.5}


def test_every_option_is_documented() -> None:
    nodes = ast.parse(inspect.getsource(sid_module)).body
    (definition,) = [node for node in nodes if getattr(node, "name", "") == "SiDOptions"]
    documented = {
        field.target.id
        for field, text in zip(definition.body, definition.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    }
    inherited = {field.name: field.default for field in fields(MatchingOptions)}
    assert documented == {f.name for f in fields(SiDOptions) if inherited.get(f.name) != f.default}


@pytest.mark.parametrize(
    ("base", "changes"),
    [
        ({}, {"alpha": 0.5}),
        ({}, {"weight": "snr"}),
        ({}, {"normaliser": "dmd"}),
        ({}, {"eta": 0.5}),
        ({}, {"chain_noise": "fixed"}),
        ({"critic_dropout": 0.5}, {"critic_training_scale": 2.0}),
        ({"critic_dropout": 0.5}, {"critic_scale": 0.0}),
        ({}, {"critic_dropout": 0.5}),
        ({}, {"guidance_scale": 2.0}),
        ({}, {"critic_weight": "snr"}),
        ({}, {"tau_law": "uniform"}),
        ({}, {"logit_mean": 0.0}),
        ({}, {"logit_std": 1.0}),
        ({}, {"start_time": 0.7}),
        ({}, {"steps": 3}),
        ({}, {"tau_min": 0.3}),
        ({}, {"margin": 0.1}),
        ({}, {"gan_weight": 0.1}),
        ({"gan_weight": 0.1}, {"discriminator_weight": 0.1}),
        ({}, {"teacher_regularisation": 0.1}),
    ],
)
def test_every_option_changes_something(base: dict[str, Any], changes: dict[str, Any]) -> None:
    def values(options: SiDOptions) -> Tensor:
        iteration = next(n for n in range(99) if int(walk(options, WatchedRoles(Flow()), n)[1].call[0]) > 0)
        roles = WatchedRoles(Flow())
        return torch.cat([of(options, roles, iteration).values for of in (critic_loss, student_loss)]).detach()

    plain = SiDOptions(**base)
    assert not torch.equal(values(plain), values(replace(plain, **changes)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": -0.1}, "alpha = -0.1"),
        ({"weight": "sigma"}, "weight = 'sigma'"),
        ({"chain_noise": "ddim"}, "chain_noise = 'ddim'"),
        ({"chain_noise": "fixed", "eta": 1.0}, "chain_noise 'fixed' with eta 1"),
        ({"critic_dropout": 1.0}, "critic_dropout = 1.0"),
        ({"critic_scale": float("nan")}, "critic_scale = nan"),
        ({"critic_scale": -1.0}, "critic_scale -1.0 for a critic trained with 1.0"),
        ({"critic_training_scale": 0.0, "critic_dropout": 0.1}, "for a critic trained with 0.0"),
        ({"metric": "huber_vector"}, r"\['metric'\] for SiD"),
        ({"divergence": "pearson"}, r"\['divergence'\] for SiD"),
        ({"guidance": "decoupled"}, r"\['guidance'\] for SiD"),
        ({"steps": 0}, "expected 1 or more"),
    ],
)
def test_bad_settings_are_refused_with_a_fix(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FewstepError, match=message) as caught:
        replace(SiDOptions(), **changes).build()
    assert "fix:" in str(caught.value)


# End to end


class Reversed(SiD):
    """Walks away from the teacher."""

    def student_loss(self, path: Any, roles: Roles, draw: Draw) -> Loss:
        loss = super().student_loss(path, roles, draw)
        return Loss(-loss.values, loss.metrics)


class DetachedTeacher(SiD):
    """Takes the teacher for a constant."""

    def student_loss(self, path: Any, roles: Any, draw: Draw) -> Loss:
        cut = ToyRoles(roles.teacher, roles.student, roles.critic)
        cut.teacher, cut.null = lambda *asked: roles.teacher(*asked).detach(), roles.null
        return super().student_loss(path, cut, draw)


def test_trained_student_has_the_teachers_covariance() -> None:
    torch.set_num_threads(1)
    for answer in sid_gaussian(Flow(), 1):
        assert answer.passed, f"{answer.name}: {answer.measured:.4g}, expected {answer.limit}"


@pytest.mark.parametrize("broken", [Reversed, DetachedTeacher])
def test_broken_method_misses_it(broken: type[SiD]) -> None:
    torch.set_num_threads(1)
    error = sid_gaussian_errors(Flow(), broken(SiDOptions(steps=1)))[-1]
    assert not error <= 0.1
