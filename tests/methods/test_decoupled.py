"""Decoupled DMD against its card: T1 to T9, who gets gradients, what it costs, and what other schedules do instead."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fewstep.core.prediction import from_denoised
from fewstep.core.process import DiscreteVP, Flow, Process
from fewstep.core.rollout import Landing
from fewstep.core.solvers import lcm
from fewstep.core.streams import Draw, Streams
from fewstep.core.tensors import Condition, expand
from fewstep.errors import FewstepError
from fewstep.evaluation.exact import LABEL, ring
from fewstep.evaluation.known_answers_decoupled import (
    ENGINE,
    gaussian_options,
    guided_gaussian,
    resting_variances,
    selectivity,
    trained_law,
)
from fewstep.evaluation.known_answers_training import gaussian_teacher
from fewstep.evaluation.toy import LogisticDiscriminator, ToyRoles
from fewstep.losses.moments import moment_divergence
from fewstep.methods import DecoupledOptions, DMD2Options, preset
from fewstep.methods.base import Batch, Loss
from fewstep.methods.decoupled import Decoupled
from fewstep.methods.dmd2 import DMD2
from fewstep.methods.matching import Matching, Pull

COUNT = 32
PROCESSES = [Flow(), DiscreteVP.cosine()]
MOMENTS: dict[str, Any] = {"regulariser": "mean_variance", "moment_mean": 0.1, "moment_variance": 0.9}
COMPATIBLE: dict[str, Any] = {"guidance_levels": "shared", "joint_normaliser": True}
VARIANTS: dict[str, dict[str, Any]] = {
    "hybrid": {},
    "constrained": {"matching_levels": "cleaner"},
    "full": {"guidance_levels": "full"},
    "shared": {"guidance_levels": "shared"},
    "compatible": COMPATIBLE,
    "inverted": {"guidance_levels": "noisier"},
    "one step": {"steps": 1},
    "plain teacher": {"guidance_scale": 1.0},
    "with a GAN": {"gan_weight": 5e-3},
    "moments": MOMENTS,
    "GAN alone": {"regulariser": "gan", "gan_weight": 5e-3},
    "nothing": {"regulariser": "none"},
    "moments and regression": MOMENTS | {"steps": 1, "regression_weight": 0.25},
    "several step counts": {"step_counts": (1, 2, 4), "steps_condition": True},
}


class Scaled(nn.Module):
    """teacher(x) * gain + offset, with trainable numbers."""

    def __init__(self, teacher: Any, offset: float) -> None:
        super().__init__()
        self.teacher = [teacher]
        self.gain = nn.Parameter(torch.ones(2, dtype=torch.float64))
        self.offset = nn.Parameter(torch.full((2,), offset, dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self.teacher[0](x, t, condition) * self.gain + self.offset


class WatchedRoles(ToyRoles):
    """Toy roles on a ring of modes that record every call."""

    def __init__(self, process: Process) -> None:
        self.exact = ring(process, [1, 2, 3, 4], 1.5, 0.3, torch.float64)
        self.networks: dict[str, Any] = {"student": Scaled(self.exact, 0.1), "critic": Scaled(self.exact, -0.1)}
        self.networks["discriminator"] = LogisticDiscriminator(process, 2).double()
        nn.init.normal_(self.networks["discriminator"].weight, std=0.2, generator=torch.Generator().manual_seed(0))
        self.calls: list[tuple[str, Tensor, Tensor, Condition]] = []
        super().__init__(self.exact, *(self.watched(name, network) for name, network in self.networks.items()))
        self.teacher = self.watched("teacher", self.exact)

    def null(self, condition: Condition) -> Condition:
        return self.exact.null(condition)

    def watched(self, name: str, network: Any) -> Any:
        def call(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
            self.calls.append((name, x, t, condition))
            return network(x, t, condition)

        return call

    def made(self, name: str) -> list[tuple[str, Tensor, Tensor, Condition]]:
        return [call for call in self.calls if call[0] == name]

    def of(self, *names: str) -> list[nn.Parameter]:
        return [p for name in names for p in self.networks[name].parameters()]


def draw(iteration: int = 0) -> Draw:
    return Streams(0).at(iteration, range(COUNT))


def batch(roles: WatchedRoles) -> Batch:
    told = {LABEL: torch.arange(COUNT) % 2}
    clean = roles.exact.sample(COUNT, torch.Generator().manual_seed(1))
    pairs = (draw().normal("pair", (2,), torch.float64), clean, told)
    return Batch(told, torch.arange(COUNT), (2,), torch.float64, real=(clean, told), pairs=pairs)


def student_loss(method: Matching, roles: WatchedRoles, iteration: int = 0) -> Loss:
    path = method.rollout(batch(roles), roles, draw(iteration))
    return method.student_loss(path, roles, draw(iteration))


def gradient(method: Matching, roles: WatchedRoles) -> Tensor:
    """Of every sample's loss with respect to what the student answers for it, (COUNT, 2)."""
    values = student_loss(method, roles).values
    offset = roles.networks["student"].offset  # added to every answer
    return torch.stack([torch.autograd.grad(value, offset, retain_graph=True)[0] for value in values])


def pulls(method: Matching, roles: WatchedRoles, iteration: int = 0) -> tuple[Landing, list[Pull]]:
    """The compared point of a random call, and the terms of its update."""
    numbers = draw(iteration).sub("student")
    path = method.rollout(batch(roles), roles, draw(iteration))
    call = numbers.integers("call", path.steps)
    landing = method._compared(path, path.landing(call), numbers)
    return landing, method._pulls(roles, landing, method._student_query(path, landing, numbers), numbers)[0]


# Terms


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: p.name)
@pytest.mark.parametrize("kind", ["x0", "eps", "v", "flow"])
def test_the_terms_add_up_to_guided_matching(kind: str, process: Process) -> None:
    """T1, in whatever the networks predict: differences there are those of denoised samples times a number."""
    roles = WatchedRoles(process)
    method = Decoupled(DecoupledOptions(guidance_levels="shared", normaliser="none", guidance_scale=4.0))
    _, (matching, guidance) = pulls(method, roles)
    assert torch.equal(matching.query.x, guidance.query.x)
    x, tau, told = roles.made("critic")[-1][1:]
    alpha, sigma = process.alpha(tau), process.sigma(tau)
    real, untold, fake = (
        from_denoised(kind, answer, x, alpha, sigma)
        for answer in (
            roles.exact(x, tau, told),
            roles.exact(x, tau, roles.null(told)),
            roles.networks["critic"](x, tau, told).detach(),
        )
    )
    whole = untold + 4 * (real - untold) - fake
    zero = torch.zeros_like(x)
    spoken = [from_denoised(kind, p.direction, zero, alpha, sigma) for p in (matching, guidance)]
    torch.testing.assert_close(sum(spoken), whole)
    torch.testing.assert_close(spoken[0], real - fake)
    torch.testing.assert_close(spoken[1], 3 * (real - untold))


def dmd2(**changes: Any) -> DMD2:
    """DMD2 with the settings that the compatibility mode has."""
    return DMD2(DMD2Options(gan_weight=0.0, tau_law="uniform_unshifted", **changes))


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: p.name)
@pytest.mark.parametrize("steps", [1, 4])
def test_in_the_compatibility_mode_the_gradient_is_that_of_dmd2(steps: int, process: Process) -> None:
    """T2, up to the rounding of two sums in another order."""
    options = DecoupledOptions(steps=steps, **COMPATIBLE)
    found = gradient(Decoupled(options), WatchedRoles(process))
    right = gradient(dmd2(steps=steps), WatchedRoles(process))
    torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-14)


def test_where_nothing_is_rounded_it_is_that_of_dmd2_bit_for_bit() -> None:
    """T2, with numbers of few binary digits throughout."""

    class Coarse(WatchedRoles):
        """Answers in sixteenths, a power of two away from the student's."""

        def __init__(self) -> None:
            super().__init__(Flow())
            ends = {"teacher": 0.5, "critic": 0.125}
            for name, end in ends.items():
                setattr(self, name, lambda x, t, told, end=end: end * (1 + 2.0 * (told[LABEL][:, None] % 4)) + 0 * x)
            self.networks["student"].gain.data.zero_()
            self.networks["student"].offset.data.copy_(torch.tensor([-0.25, -0.75]))

        def null(self, condition: Condition) -> Condition:
            return {LABEL: torch.full_like(condition[LABEL], 2)}

    found, right = (gradient(method, Coarse()) for method in (Decoupled(DecoupledOptions(**COMPATIBLE)), dmd2()))
    assert torch.equal(found, right)
    assert right.abs().min() > 0


@pytest.mark.parametrize("changes", [{"guidance_levels": "shared"}, {"guidance_levels": "full"}, {}])
def test_normalisers_or_levels_of_their_own_are_something_else(changes: dict[str, Any]) -> None:
    """T2 must not pass with a normaliser each, as in public code."""
    found, right = (
        gradient(Decoupled(DecoupledOptions(**changes)), WatchedRoles(Flow())),
        gradient(dmd2(), WatchedRoles(Flow())),
    )
    assert float((found - right).norm() / right.norm()) > 0.1


def test_without_guidance_there_is_no_second_term_and_the_critic_alone_decides() -> None:
    """T3; that the data's law is then at rest is what the known answers of DMD2 say."""
    method, roles = Decoupled(DecoupledOptions(guidance_scale=1.0)), WatchedRoles(Flow())
    assert len(pulls(method, roles)[1]) == 1
    torch.testing.assert_close(
        gradient(method, WatchedRoles(Flow())), gradient(dmd2(guidance_scale=1.0), WatchedRoles(Flow()))
    )
    roles.critic = roles.exact  # the best there is, for a student of the teacher's law
    assert torch.equal(gradient(method, roles), torch.zeros(COUNT, 2, dtype=torch.float64))


@pytest.mark.parametrize("levels", ["cleaner", "full", "shared"])
def test_guidance_knows_nothing_of_the_critic(levels: str) -> None:
    """T4."""
    method = Decoupled(DecoupledOptions(guidance_levels=levels))
    plain, perturbed = WatchedRoles(Flow()), WatchedRoles(Flow())
    perturbed.networks["critic"].gain.data.mul_(1.7)
    (_, (first, one)), (_, (second, other)) = pulls(method, plain), pulls(method, perturbed)
    assert not torch.allclose(first.direction, second.direction)
    assert torch.equal(one.direction, other.direction)
    assert torch.equal(one.divisor, other.divisor)
    roles = WatchedRoles(Flow())
    student_loss(Decoupled(DecoupledOptions(guidance_levels=levels, regulariser="none")), roles)
    assert not roles.made("critic")


@pytest.mark.parametrize("name", ["hybrid", "constrained", "compatible", "nothing"])
def test_the_gradient_is_the_sum_of_directions_over_their_divisors(name: str) -> None:
    """T9, with the factor 1/2 in the loss: -g / elements."""
    method, roles = Decoupled(DecoupledOptions(**VARIANTS[name])), WatchedRoles(Flow())
    _, terms = pulls(method, roles)
    right = sum(-pull.direction / expand(pull.divisor, pull.direction) / 2 for pull in terms)
    torch.testing.assert_close(gradient(method, WatchedRoles(Flow())), right)


def test_each_term_has_the_normaliser_of_its_own_query() -> None:
    """Mean distance of the student's sample to the plain teacher, seen from where the term asks (card, section 2)."""
    roles = WatchedRoles(Flow())
    landing, terms = pulls(Decoupled(DecoupledOptions()), roles)
    for pull in terms:
        real = roles.exact(pull.query.x, pull.query.tau, landing.condition)
        torch.testing.assert_close(pull.divisor, (landing.denoised - real).abs().mean(1))


# Levels


@settings(max_examples=40)
@given(
    steps=st.integers(1, 8),
    shift=st.floats(0.5, 6),
    iteration=st.integers(0, 10**6),
    matching=st.sampled_from(["full", "cleaner"]),
)
def test_guidance_is_never_asked_at_a_noisier_level_than_the_students_input(
    steps: int, shift: float, iteration: int, matching: Any
) -> None:
    """T8; the paper's tau > t, in its own time."""
    options = DecoupledOptions(steps=steps, shift=shift, margin=0.01, tau_min=0.002, matching_levels=matching)
    landing, (of_matching, guidance) = pulls(Decoupled(options), WatchedRoles(Flow()), iteration)
    assert bool((guidance.query.tau < landing.t_from).all())
    assert bool((of_matching.query.tau < landing.t_from).all()) or matching == "full"
    assert not torch.equal(of_matching.query.tau, guidance.query.tau)
    assert not torch.equal(of_matching.query.noise, guidance.query.noise)


def test_matching_sees_all_levels_unless_it_is_constrained() -> None:
    """And the inverted schedule fails what T8 asks of guidance."""
    above = {}
    for name, changes in VARIANTS.items():
        if name in ("hybrid", "constrained", "full", "inverted"):
            landing, (matching, guidance) = pulls(Decoupled(DecoupledOptions(**changes)), WatchedRoles(Flow()))
            above[name] = tuple(bool((p.query.tau > landing.t_from).any()) for p in (matching, guidance))
    assert above == {
        "hybrid": (True, False),
        "constrained": (False, False),
        "full": (True, True),
        "inverted": (True, True),
    }


def test_the_critic_learns_all_levels_in_every_schedule() -> None:
    for name in ("hybrid", "constrained"):
        method, roles = Decoupled(DecoupledOptions(critic_updates=1, **VARIANTS[name])), WatchedRoles(Flow())
        for iteration in range(20):
            path = method.rollout(batch(roles), roles, draw(iteration))
            method.critic_loss(path, roles, draw(iteration))
        tau = torch.cat([tau for _, _, tau, _ in roles.made("critic")])
        assert tau.min() < 0.06
        assert tau.max() > 0.94


def test_levels_are_drawn_before_the_shift() -> None:
    """T8's example: shift 3 takes raw clean time 0.75 to 0.5, below which levels are uniform in raw time."""
    options = DecoupledOptions(shift=3.0, margin=0.0, tau_min=1e-6)
    grid = options.time_grid(4)
    assert float(grid[3]) == pytest.approx(0.5)  # the fourth call, at raw noise 1/4
    raw = []
    for iteration in range(60):
        landing, (_, guidance) = pulls(Decoupled(options), WatchedRoles(Flow()), iteration)
        last = landing.t_from < 0.51
        t = guidance.query.tau[last]
        assert bool((t <= 0.5).all())
        raw.append(t / (3 - 2 * t))
    found = torch.cat(raw)
    assert len(found) > 300
    assert float(found.mean()) == pytest.approx(0.125, abs=0.01)  # uniform in [0, 1/4]
    assert float(found.std()) == pytest.approx(0.25 / 12**0.5, rel=0.1)


def test_below_the_last_calls_level_only_what_is_not_resolved_is_pushed() -> None:
    """T7, for a call at noise 1/4: cleaner levels leave the coarse coordinate alone, noisier ones go on pushing it."""
    settings: dict[str, Any] = {"steps": 4, "guidance_scale": 2.0, "normaliser": "none"}
    coarse, fine = selectivity((0.75, 0.98), DecoupledOptions(**settings))
    assert abs(coarse) < 1e-6
    assert fine > 0.4
    inverted, _ = selectivity((0.75, 0.98), DecoupledOptions(guidance_levels="noisier", **settings))
    assert inverted > 0.2


# Other regularisers


def test_moments_take_the_place_of_matching() -> None:
    roles, other = WatchedRoles(Flow()), WatchedRoles(Flow())
    found = student_loss(Decoupled(DecoupledOptions(**MOMENTS, moment_weight=0.7)), roles)
    alone = student_loss(Decoupled(DecoupledOptions(regulariser="none")), other)
    numbers = draw()
    path = Decoupled(DecoupledOptions(**MOMENTS)).rollout(batch(roles), roles, numbers)
    landing = path.landing(numbers.sub("student").integers("call", path.steps))
    torch.testing.assert_close(found.values - alone.values, 0.7 * moment_divergence(landing.denoised, 0.1, 0.9))
    assert "moment_loss" in found.metrics
    with pytest.raises(FewstepError, match="without the moments to keep.*fix:"):
        student_loss(Decoupled(DecoupledOptions(regulariser="mean_variance")), roles)


def test_guidance_alone_runs_away() -> None:
    """T6's first column, from a mean of 0 towards 1; the rest is in the known answers."""
    assert trained_law(replace(ENGINE, regulariser="none"), 100)[0] == pytest.approx(2.6, abs=0.15)


# Who gets gradients, what it costs


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: p.name)
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_trains_only_who_it_should(name: str, process: Process) -> None:
    method, roles = Decoupled(DecoupledOptions(**VARIANTS[name])), WatchedRoles(process)
    assert method.critic_updates == (5 if method.needs.critic or method.needs.discriminator else 0)
    trained = ["critic"] * method.needs.critic + ["discriminator"] * method.needs.discriminator
    others = {"critic", "discriminator", "student"} - set(trained)
    path = method.rollout(batch(roles), roles, draw())
    if trained:
        loss = method.critic_loss(path, roles, draw())
        assert loss.values.shape == (COUNT,)
        found = torch.autograd.grad(loss.values.mean(), roles.of(*trained) + roles.of(*others), allow_unused=True)
        count = len(roles.of(*trained))
        assert all(part.abs().sum() > 0 for part in found[:count])
        assert all(part is None for part in found[count:])

    loss = method.student_loss(path, roles, draw())
    assert loss.values.shape == (COUNT,)
    assert loss.values.isfinite().all()
    found = torch.autograd.grad(loss.values.mean(), roles.of("student", "critic"), allow_unused=True)
    assert all(part.abs().sum() > 0 for part in found[:2])
    assert all(part is None for part in found[2:])
    assert all(not metric.requires_grad and metric.ndim == 0 for metric in loss.metrics.values())


@pytest.mark.parametrize("name", VARIANTS)
def test_forwards_are_what_is_claimed(name: str) -> None:
    method, roles = Decoupled(DecoupledOptions(**VARIANTS[name])), WatchedRoles(Flow())
    for iteration in range(25):
        path = method.rollout(batch(roles), roles, draw(iteration))
        for update in range(method.critic_updates):
            method.critic_loss(path, roles, draw(iteration).sub(update))
        method.student_loss(path, roles, draw(iteration))
    made = sum(len(x) for _, x, *_ in roles.calls) / COUNT / 25
    assert made == pytest.approx(method.forwards(), rel=0.04)


def test_forwards_in_the_docstring_are_right() -> None:
    assert preset("decoupled").build().forwards() == pytest.approx(14, abs=0.5)
    plain, apart = (method.forwards(1) for method in (dmd2(steps=1), Decoupled(DecoupledOptions(steps=1))))
    assert apart == plain + 1  # four network evaluations for three (card, section 3, 4)


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: p.name)
def test_backward_simulation_is_the_sampler(process: Process) -> None:
    method, roles = Decoupled(DecoupledOptions()), WatchedRoles(process)
    path = method.rollout(batch(roles), roles, draw())
    predictions: list[Tensor] = []
    lcm(
        roles.networks["student"],
        draw().normal("noise", (2,), torch.float64),
        method.options.time_grid(4),
        process,
        batch(roles).condition,
        noise=lambda k, shape: draw().normal(f"extra {k}", shape, torch.float64),
        callback=lambda k, x, denoised: predictions.append(denoised.detach()),
    )
    for call in range(4):
        torch.testing.assert_close(path.landing(torch.full((COUNT,), call)).denoised, predictions[call])


# Settings


def test_presets_are_the_papers_schedules() -> None:
    hybrid, constrained, shared = (preset(f"decoupled{end}") for end in ("", "-constrained", "-shared"))
    assert (hybrid.guidance_levels, hybrid.matching_levels) == ("cleaner", "full")
    assert (constrained.guidance_levels, constrained.matching_levels) == ("cleaner", "cleaner")
    assert (shared.guidance_levels, shared.joint_normaliser) == ("shared", True)
    for options in (hybrid, constrained, shared):
        assert (options.guidance, options.regulariser, options.counts) == ("decoupled", "dm", (4,))
        assert options.build().needs.critic
        assert not options.build().needs.real_data


UNDER: dict[str, tuple[dict[str, Any], Any]] = {
    "guidance_levels": ({}, "full"),
    "joint_normaliser": ({"guidance_levels": "shared"}, True),
    "regulariser": ({}, "none"),
    "matching_levels": ({}, "cleaner"),
    "moment_weight": (MOMENTS, 0.5),
    "moment_mean": (MOMENTS, 0.2),
    "moment_variance": (MOMENTS, 0.5),
    "tau_law": ({"shift": 3.0}, "uniform"),
    "gan_weight": ({}, 0.1),
    "discriminator_weight": (VARIANTS["GAN alone"], 0.1),
    "guidance_scale": ({}, 2.0),
}


@pytest.mark.parametrize("name", UNDER)
def test_every_option_changes_something(name: str) -> None:
    """Its own, and those of others that it has another use for; the rest are DMD2's."""

    def values(options: DecoupledOptions) -> Tensor:
        method, roles = Decoupled(options), WatchedRoles(Flow())
        path = method.rollout(batch(roles), roles, draw())
        losses = [method.student_loss(path, roles, draw()).values]
        losses += [method.critic_loss(path, roles, draw()).values] if method.critic_updates else []
        return torch.cat(losses).detach()

    base, value = UNDER[name]
    plain = DecoupledOptions(**base)
    first, second = values(plain), values(replace(plain, **{name: value}))
    assert first.shape != second.shape or not torch.equal(first, second)


def test_all_its_own_options_are_tried() -> None:
    own = {field.name for field in fields(DecoupledOptions)} - {field.name for field in fields(DMD2Options)}
    assert own <= UNDER.keys()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"regulariser": "kl"}, "regulariser = 'kl'"),
        ({"matching_levels": "noisier"}, "matching_levels = 'noisier'"),
        ({"guidance": "coupled"}, "use the method dmd2"),
        (MOMENTS | {"moment_weight": -1.0}, "moment_weight = -1"),
        (MOMENTS | {"moment_variance": 0.0}, "moment_variance = 0"),
        ({"regulariser": "gan"}, "regulariser 'gan' with gan_weight 0"),
        ({"regulariser": "none", "gan_weight": 0.1}, "regulariser 'none' with gan_weight 0.1"),
        ({"regulariser": "none", "guidance_scale": 1.0}, "regulariser 'none' with guidance_scale 1"),
        ({"regulariser": "none", "matching_levels": "cleaner"}, r"\['matching_levels'\] with regulariser 'none'"),
        (MOMENTS | {"divergence": "pearson"}, r"\['divergence'\] with regulariser 'mean_variance'"),
        ({"joint_normaliser": True}, "joint_normaliser with guidance_levels 'cleaner'"),
        ({"steps": 2, "grid": (1.0, 0.05), "tau_min": 0.04}, "no room for guidance at levels cleaner"),
    ],
)
def test_bad_settings_are_refused_with_a_fix(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FewstepError, match=message) as caught:
        DecoupledOptions(**changes).build()
    assert "fix:" in str(caught.value)


# End to end


SCHEDULES: dict[str, dict[str, Any]] = {
    "full": {"guidance_levels": "full"},
    "constrained": {"matching_levels": "cleaner"},
    "inverted": {"guidance_levels": "noisier"},
    "without guidance": {"guidance_scale": 1.0},
}


@pytest.mark.parametrize("process", [Flow(), DiscreteVP.linear()], ids=lambda p: p.name)
@pytest.mark.parametrize("name", SCHEDULES)
def test_other_schedules_rest_elsewhere(name: str, process: Process) -> None:
    """By more than the known answer's tolerance of 5 %: what it measures tells schedules apart."""
    variances = torch.linalg.eigvalsh(gaussian_teacher(process).covariances[0].double())
    hybrid, other = (
        resting_variances(variances, 2.0, process, options, call=1)
        for options in (gaussian_options(), replace(gaussian_options(), **SCHEDULES[name]))
    )
    assert float((other - hybrid).norm() / hybrid.norm()) > 0.1


def test_training_with_inverted_levels_fails_the_known_answer() -> None:
    """Where the method itself is within 0.05 of it."""
    inverted = Decoupled(replace(gaussian_options(), guidance_levels="noisier"))
    first, second = guided_gaussian(Flow(), inverted, right=gaussian_options(), iterations=300)
    assert min(first.measured, second.measured) > 0.2
