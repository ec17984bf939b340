"""Decoupled DMD against its card, T1 to T9: its terms, their levels, other regularisers, where it comes to rest."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from decoupled_toy import COMPATIBLE, MOMENTS, PROCESSES, VARIANTS, dmd2, gradient, pulls, student_loss
from hypothesis import given, settings
from hypothesis import strategies as st
from ring_toy import COUNT, WatchedRoles, batch, draw

from fewstep.core.prediction import from_denoised
from fewstep.core.process import DiscreteVP, Flow, Process
from fewstep.core.tensors import Condition, expand
from fewstep.errors import FewstepError
from fewstep.evaluation.exact import LABEL
from fewstep.evaluation.known_answers_decoupled import (
    ENGINE,
    bounded_law,
    gaussian_options,
    guided_gaussian,
    resting_variances,
    selectivity,
    trained_law,
)
from fewstep.evaluation.known_answers_training import gaussian_teacher
from fewstep.losses.moments import moment_divergence
from fewstep.methods import DecoupledOptions
from fewstep.methods.decoupled import Decoupled

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


def test_what_bounds_guidance_and_what_keeps_variety() -> None:
    """Card section 9, 2: moments bound saturation and not the collapse; an exact discriminator does both."""
    nothing, moments, judged = (
        bounded_law(replace(ENGINE, **changes), 100)
        for changes in (
            {"regulariser": "none"},
            {"regulariser": "mean_variance", "moment_mean": 0.0, "moment_variance": 1.09},
            {"regulariser": "gan", "gan_weight": 0.1},
        )
    )
    assert nothing[0] > 2.5 > 2 > moments[0] > 1.4 > judged[0] > 1
    assert max(nothing[1], moments[1]) < 0.05
    assert judged[1] > 0.2


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
    first, second = guided_gaussian(Flow(), inverted, right=gaussian_options(), iterations=200)
    assert min(first.measured, second.measured) > 0.2
