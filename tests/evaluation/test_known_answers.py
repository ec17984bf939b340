"""The known answers hold, and deliberately broken variants of TDM fail them (tests of the tests)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from fewstep.core.tensors import expand
from fewstep.errors import FewstepError
from fewstep.evaluation import known_answers as known
from fewstep.evaluation.exact import MixtureTeacher
from fewstep.methods.tdm import TDM, Query


def assert_passed(rows: Any) -> None:
    failed = [(row.name, row.measured, row.limit) for row in rows if not row.passed]
    assert not failed


@pytest.mark.parametrize("process", known.PROCESSES)
def test_what_the_teachers_network_predicts_makes_no_difference(process: str) -> None:
    assert_passed(known.prediction_kinds(process, known.PROCESSES[process]()))


@pytest.mark.parametrize("process", known.PROCESSES)
def test_the_teachers_own_path_is_a_fixed_point(process: str) -> None:
    assert_passed(known.transport_is_a_fixed_point(process, known.PROCESSES[process]()))


def test_the_published_target_is_off_at_intermediate_boundaries_as_the_card_says() -> None:
    one = torch.float64
    teacher = MixtureTeacher(
        known.PROCESSES["flow"](),
        torch.tensor([0.3, 0.7], dtype=one),
        torch.tensor([[-2.0], [1.5]], dtype=one),
        torch.tensor([[[0.09]], [[0.25]]], dtype=one),
    )
    errors = known.regression_errors(teacher, 2, 100_000)
    assert errors[0][0] < 0.05
    assert 0.2 < errors[0][1] < 0.6  # rms 0.43 in x0 at a quarter of the segment
    assert errors[1][1] < 0.05


@pytest.mark.parametrize("process", known.PROCESSES)
def test_a_critic_alone_reaches_its_closed_form(process: str) -> None:
    assert_passed(known.critic_alone(process, known.PROCESSES[process]()))


@pytest.mark.parametrize("std", [1.0, 0.5])
def test_gains_go_to_the_closed_form(std: float) -> None:
    assert_passed(known.closed_form_gains(std))


def test_the_closed_form_is_the_cards_table() -> None:
    table = {1: [1.0], 2: [0.4142, 1.4142], 4: [0.1623, 0.6833, 1.2361, 1.2649]}
    for steps, gains in table.items():
        assert known.true_gains(1.0, steps) == pytest.approx(gains, abs=1e-4)
    assert known.true_gains(2.0, 4) == pytest.approx([0.6056, 1.7210, 1.7203, 1.3152], abs=1e-4)
    assert known.true_gains(0.5, 4) == pytest.approx([0.0414, 0.2056, 0.6125, 1.1094], abs=1e-4)


def test_a_student_told_k_serves_every_k_and_an_untold_one_cannot() -> None:
    assert_passed([known.steps_aware_gains()])
    assert not known.steps_aware_gains(steps_condition=False).passed


@pytest.mark.parametrize(("process", "target", "steps"), known.QUICK_RUNS)
def test_alternating_training_reaches_the_gaussian(process: str, target: str, steps: int) -> None:
    assert_passed(known.gaussian_run(process, target, steps))


class Reversed(TDM):
    """The sign of the update is reversed."""

    def _student_loss(self, *args: Any) -> Any:
        loss = super()._student_loss(*args)
        return replace(loss, values=-loss.values)


class FromDenoised(TDM):
    """x_tau is renoised from the clean prediction, not from the landing point."""

    def _query(self, path: Any, landing: Any, draw: Any) -> Query:
        query = super()._query(path, landing, draw)
        process = path.process
        clean = landing.denoised.detach()
        x = expand(process.alpha(query.tau), clean) * clean + expand(process.sigma(query.tau), clean) * query.noise
        return replace(query, x=x)


class Idle(TDM):
    """The critic never trains."""

    def critic_loss(self, *args: Any) -> Any:
        loss = super().critic_loss(*args)
        return replace(loss, values=0 * loss.values)


class WrongTime(TDM):
    """Teacher and critic are told another time of the segment than x_tau has."""

    def _query(self, path: Any, landing: Any, draw: Any) -> Query:
        query = super()._query(path, landing, draw)
        return replace(query, tau=landing.t + landing.t_from - query.tau)


class BelowTheLanding(TDM):
    """tau is drawn from below the landing point's own segment."""

    def _query(self, path: Any, landing: Any, draw: Any) -> Query:
        query = super()._query(path, landing, draw)
        return replace(query, tau=(query.tau - 0.5 * (landing.t_from - landing.t)).clamp(min=0.02))


BROKEN: list[Callable[..., TDM]] = [Reversed, FromDenoised, Idle, WrongTime]


@pytest.mark.parametrize("broken", BROKEN, ids=lambda kind: kind.__name__)
def test_a_broken_variant_fails(broken: Callable[..., TDM]) -> None:
    """With the settings of a known answer that the real method passes (flow, exact target, K = 2)."""
    options = replace(known.EXACT, steps=2)
    errors = known.gaussian_errors("flow", 2, options, broken(options), iterations=400)
    assert not max(errors) <= 0.05


def test_a_range_below_the_landing_point_is_refused_by_the_engine() -> None:
    options = replace(known.EXACT, steps=2)
    with pytest.raises(FewstepError, match="at or after the source"):
        known.gaussian_errors("flow", 2, options, BelowTheLanding(options), iterations=5)


def test_the_real_method_passes_where_the_broken_ones_fail() -> None:
    options = replace(known.EXACT, steps=2)
    start = known.gaussian_errors("flow", 2, options, iterations=0)
    assert max(known.gaussian_errors("flow", 2, options, iterations=400)) < 0.25 * max(start)


def test_rows_fail_on_not_a_number() -> None:
    assert not known.Row("x", float("nan"), 1.0).passed
    assert known.Row("x", 1.0, 1.0).passed
