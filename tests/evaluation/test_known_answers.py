"""The known answers hold, and deliberately broken variants of TDM fail them."""

from __future__ import annotations

import pytest
import torch

from fewstep.core.process import Flow
from fewstep.core.renoise import renoise
from fewstep.core.rollout import Landing, Path
from fewstep.core.streams import Draw
from fewstep.errors import FewstepError
from fewstep.evaluation.known_answers import full_checks, quick_checks, run_known_answers
from fewstep.evaluation.known_answers_fixed_points import critic_bias, right_gains
from fewstep.evaluation.known_answers_roles import RUNS, through_roles
from fewstep.evaluation.known_answers_training import gaussian_answers, gaussian_options
from fewstep.methods.base import Loss, Roles
from fewstep.methods.tdm import TDM, Query

ITERATIONS = 1200  # of the Gaussian at K = 2


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("name", quick_checks())
def test_known_answer(name: str) -> None:
    for answer in quick_checks()[name]():
        assert answer.passed, f"{answer.name}: {answer.measured:.4g}, expected {answer.limit}"


def test_full_checks_are_further_ones() -> None:
    assert full_checks()
    assert not quick_checks().keys() & full_checks().keys()


def test_only_named_checks_run() -> None:
    names = [answer.name for answer in run_known_answers(only=["wrong step", "identities, flow"])]
    assert len(names) == 10
    assert "walked in 2 steps" in " ".join(names)
    with pytest.raises(FewstepError, match="no check with 'grid of 25'.*--full"):
        run_known_answers(only=["grid of 25"])


def test_closed_form_gains_are_the_cards() -> None:
    """Item 9's table, first call first."""
    for std, steps, gains in [
        (1.0, 1, [1.0]),
        (1.0, 2, [0.4142, 1.4142]),
        (1.0, 4, [0.1623, 0.6833, 1.2361, 1.2649]),
        (1.0, 8, [0.0711, 0.2610, 0.5317, 0.8507, 1.1231, 1.2540, 1.2361, 1.1314]),
        (2.0, 4, [0.6056, 1.7210, 1.7203, 1.3152]),
        (0.5, 4, [0.0414, 0.2056, 0.6125, 1.1094]),
    ]:
        grid = gaussian_options(steps, "exact").time_grid(steps)
        assert right_gains(Flow(), std, grid) == pytest.approx(gains, abs=6e-5)


class Reversed(TDM):
    """Walks away from the teacher."""

    def student_loss(self, path: Path, roles: Roles, draw: Draw) -> Loss:
        loss = super().student_loss(path, roles, draw)
        return Loss(-loss.values, loss.metrics)


class FromDenoised(TDM):
    """Renoises the denoised sample instead of the landing point."""

    def _query(self, path: Path, landing: Landing, draw: Draw) -> Query:
        query = super()._query(path, landing, draw)
        clean = torch.zeros_like(landing.t)
        x = renoise(path.process, landing.denoised.detach(), clean, query.tau, query.noise)
        return Query(x, query.tau, query.noise)


class WrongRange(TDM):
    """Asks about tau in the upper half of the whole axis, whatever the call."""

    def _query(self, path: Path, landing: Landing, draw: Draw) -> Query:
        query = super()._query(path, landing, draw)
        tau = torch.lerp(landing.t.clamp(min=0.5), torch.ones_like(query.tau), draw.uniform("tau").to(query.tau) * 0.98)
        x = renoise(path.process, landing.x.detach(), landing.t, tau, query.noise)
        return Query(x, tau, query.noise)


class BelowTheLanding(TDM):
    """Counts segments from the wrong end, so that tau can lie below the landing point."""

    def _query(self, path: Path, landing: Landing, draw: Draw) -> Query:
        tau = 0.5 * landing.t
        noise = torch.randn_like(landing.x)
        return Query(renoise(path.process, landing.x.detach(), landing.t, tau, noise), tau, noise)


def passes(method: TDM, **settings: float) -> bool:
    return all(answer.passed for answer in gaussian_answers(Flow(), method, ITERATIONS, **settings))


def test_intact_method_passes() -> None:
    assert passes(TDM(gaussian_options(2, "exact")))


@pytest.mark.parametrize("broken", [Reversed, FromDenoised, WrongRange])
def test_broken_method_fails(broken: type[TDM]) -> None:
    assert not passes(broken(gaussian_options(2, "exact")))


def test_critic_that_never_trains_fails() -> None:
    assert not passes(TDM(gaussian_options(2, "exact")), critic_rate=0.0)


def test_tau_below_the_landing_point_is_refused() -> None:
    with pytest.raises(FewstepError, match="draw tau from the landing time upwards"):
        passes(BelowTheLanding(gaussian_options(2, "exact")))


def test_clean_renoising_fails_the_fixed_point() -> None:
    """Item 8 sees the wrong kernel too, without any training."""
    from fewstep.evaluation import known_answers_fixed_points as fixed_points

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fixed_points, "TDM", FromDenoised)
        assert max(critic_bias(Flow(), 4, "exact")[:-1]) > 0.05


def test_a_reversed_sign_fails_through_the_real_roles() -> None:
    method = Reversed(RUNS["tdm"]().options)  # type: ignore[arg-type]
    assert not any(answer.passed for answer in through_roles(Flow(), "tdm", "copies", method))
