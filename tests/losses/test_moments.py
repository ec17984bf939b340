"""The divergence of a sample's two moments: Decoupled DMD's card, T10."""

from __future__ import annotations

import math

import pytest
import torch

from fewstep.losses.moments import element_moments, moment_divergence


def with_moments(mean: float, variance: float) -> torch.Tensor:
    """(3, 4, 8, 8) samples with exactly these moments, each."""
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x - x.mean((1, 2, 3), keepdim=True)
    return mean + x * math.sqrt(variance) / x.square().mean((1, 2, 3), keepdim=True).sqrt()


def test_nothing_and_no_slope_at_the_wanted_moments() -> None:
    sample = with_moments(0.075, 0.81).requires_grad_()
    values = moment_divergence(sample, 0.075, 0.81)
    torch.testing.assert_close(values, torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-14)
    (slope,) = torch.autograd.grad(values.sum(), sample)
    torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-14)


@pytest.mark.parametrize(("mean", "variance"), [(0.5, 0.81), (0.075, 0.2), (-1.0, 3.0)])
def test_it_is_the_divergence_of_gaussians(mean: float, variance: float) -> None:
    found = moment_divergence(with_moments(mean, variance), 0.075, 0.81)
    laws = (torch.distributions.Normal(m, math.sqrt(v)) for m, v in ((mean, variance), (0.075, 0.81)))
    right = torch.distributions.kl_divergence(*laws)
    torch.testing.assert_close(found, torch.full((3,), float(right), dtype=torch.float64), rtol=1e-5, atol=0)


def test_its_gradient_is_the_closed_form() -> None:
    """(mu - m)/(d v) + (x - mu)(1/v - 1/s^2)/d: narrow samples are widened, wide ones drawn in."""
    sample = with_moments(0.3, 0.4).requires_grad_()
    (slope,) = torch.autograd.grad(moment_divergence(sample, 0.1, 0.9).sum(), sample)
    x = sample.detach()
    right = ((0.3 - 0.1) / 0.9 + (x - 0.3) * (1 / 0.9 - 1 / 0.4)) / x[0].numel()
    torch.testing.assert_close(slope, right)


def test_every_sample_is_judged_by_itself() -> None:
    """Not the batch as a whole: a dark and a light one do not make up for one another."""
    sample = torch.cat([with_moments(-1.0, 0.5)[:1], with_moments(1.0, 0.5)[:1]])
    assert moment_divergence(sample, 0.0, 1.5).min() > 0.1


def test_measured_moments_are_means_over_samples() -> None:
    samples = torch.cat([with_moments(-1.0, 0.5), with_moments(2.0, 1.5)]).float()
    assert element_moments(samples) == pytest.approx((0.5, 1.0), rel=1e-5)
