"""Bounds and laws of tau."""

from __future__ import annotations

import pytest
import torch

from fewstep.core.grids import shift_time, shifted, unshift_time
from fewstep.errors import FewstepError
from fewstep.methods.tau import TAU_LAWS, draw_tau, tau_bounds

U = torch.linspace(0, 1, 100_001, dtype=torch.float64)[:-1]


def times(value: float) -> torch.Tensor:
    return torch.full_like(U, value)


def draw(law: str, low: float, high: float, shift: float = 1.0, mean: float = 0.0, std: float = 1.0) -> torch.Tensor:
    return draw_tau(law, U, times(low), times(high), shift=shift, mean=mean, std=std)


def test_bounds_keep_their_margins() -> None:
    low, high = tau_bounds(torch.tensor([0.0, 0.25]), torch.tensor([0.25, 0.5]), margin=0.01, tau_min=0.02, shift=1.0)
    torch.testing.assert_close(low, torch.tensor([0.02, 0.26], dtype=torch.float64))
    torch.testing.assert_close(high, torch.tensor([0.24, 0.49], dtype=torch.float64))


def test_margins_take_the_same_share_of_every_shifted_segment() -> None:
    grid = shifted(4, 12.0)
    low, high = tau_bounds(grid[1:], grid[:-1], margin=0.01, tau_min=0.0, shift=12.0)
    u = unshift_time(grid, 12.0)
    torch.testing.assert_close(unshift_time(low, 12.0), u[1:] + 0.01)
    torch.testing.assert_close(unshift_time(high, 12.0), u[:-1] - 0.01)


@pytest.mark.parametrize("law", TAU_LAWS)
@pytest.mark.parametrize(("low", "high"), [(0.02, 0.24), (0.51, 0.74), (0.76, 0.99), (0.0, 1.0)])
def test_draws_fill_their_interval_and_no_more(law: str, low: float, high: float) -> None:
    tau = draw(law, low, high, shift=3.0)
    assert low - 1e-12 < tau.min() < low + 0.01
    assert high - 0.02 < tau.max() < high + 1e-12
    assert (tau.diff() >= 0).all()


def test_uniform_is_uniform_in_its_coordinate() -> None:
    torch.testing.assert_close(draw("uniform", 0.2, 0.6), torch.lerp(times(0.2), times(0.6), U))
    u = unshift_time(draw("uniform_unshifted", 0.2, 0.6, shift=3.0), 3.0)
    ends = unshift_time(torch.tensor([0.2, 0.6], dtype=torch.float64), 3.0)
    torch.testing.assert_close(u, torch.lerp(ends[0].expand_as(U), ends[1].expand_as(U), U))
    torch.testing.assert_close(shift_time(u, 3.0)[0], torch.tensor(0.2, dtype=torch.float64))


def test_logit_normal_is_the_truncated_law() -> None:
    generator = torch.Generator().manual_seed(0)
    free = torch.sigmoid(0.4 + 0.8 * torch.randn(2_000_000, generator=generator, dtype=torch.float64))
    kept = free[(free > 0.3) & (free < 0.7)]
    tau = draw("logit_normal", 0.3, 0.7, mean=0.4, std=0.8)
    levels = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    torch.testing.assert_close(tau.quantile(levels), kept[:500_000].quantile(levels), atol=2e-3, rtol=0)


def test_logit_normal_keeps_its_digits_far_out_in_the_tail() -> None:
    tau = draw("logit_normal", 0.95, 0.99, mean=-3.0, std=0.5)
    assert tau.unique().numel() > 50_000
    assert tau.median() < 0.96


def test_unknown_law_is_refused() -> None:
    with pytest.raises(FewstepError, match="tau law 'beta'"):
        draw("beta", 0.0, 1.0)
