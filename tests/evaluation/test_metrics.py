"""Distances with known answers."""

from __future__ import annotations

import math

import pytest
import torch

from fewstep.evaluation.metrics import frechet_distance, mmd, precision_recall, sliced_wasserstein


def normal(count: int, dim: int, seed: int) -> torch.Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def whiten(x: torch.Tensor) -> torch.Tensor:
    """Exactly zero mean and unit covariance."""
    x = x - x.mean(0)
    return x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T


def test_frechet_distance_of_known_gaussians() -> None:
    x = whiten(normal(500, 4, 0))
    scale, shift = torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=torch.float64), torch.tensor([1.0, 0, -2.0, 0])
    expected = float(shift.square().sum() + (scale - 1).square().sum())
    assert frechet_distance(x, x * scale + shift) == pytest.approx(expected, abs=1e-6)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-6)


def test_frechet_distance_of_rotated_covariances() -> None:
    x = whiten(normal(500, 2, 1))
    a = x * torch.tensor([3.0, 1.0])
    turn = torch.tensor([[math.cos(0.7), -math.sin(0.7)], [math.sin(0.7), math.cos(0.7)]], dtype=torch.float64)
    b = a @ turn.T
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    product = torch.linalg.eigvals(cov_a @ cov_b).real.sqrt().sum()
    assert frechet_distance(a, b) == pytest.approx(float(cov_a.trace() + cov_b.trace() - 2 * product), rel=1e-6)


def test_precision_and_recall_see_a_planted_mode_loss() -> None:
    centres = torch.tensor([[0.0, 0], [20, 0]], dtype=torch.float64)
    real = normal(400, 2, 0) + centres[torch.arange(400) % 2]
    one_mode = normal(400, 2, 1)
    precision, recall = precision_recall(real, one_mode)
    assert precision > 0.9
    assert 0.4 < recall < 0.52
    wild = torch.cat([real[:200] + 0.01, real[:200] + 500])
    precision, recall = precision_recall(real, wild)
    assert precision == pytest.approx(0.5, abs=0.02)
    assert recall > 0.8


def test_sliced_wasserstein_of_a_shift_and_a_scale() -> None:
    x = normal(2000, 3, 0)
    shift = torch.tensor([3.0, 0, 0], dtype=torch.float64)
    assert sliced_wasserstein(x, x + shift, 4000) == pytest.approx(3 / math.sqrt(3), rel=0.03)
    assert sliced_wasserstein(x, 2 * x, 1000) == pytest.approx(1, rel=0.05)
    assert sliced_wasserstein(x, x[torch.randperm(2000)]) == pytest.approx(0, abs=1e-12)


def test_mmd_is_unbiased_at_zero_and_right_for_two_gaussians() -> None:
    same = [mmd(normal(300, 1, s), normal(300, 1, 100 + s), (1.0,)) for s in range(20)]
    assert abs(sum(same) / 20) < 3e-3
    # E k(x, y) for x ~ N(0, 1), y ~ N(m, 1), bandwidth 1 is exp(-m^2 / 6) / sqrt(3).
    expected = 2 * (1 - math.exp(-4 / 6)) / math.sqrt(3)
    assert mmd(normal(3000, 1, 0), normal(3000, 1, 1) + 2, (1.0,)) == pytest.approx(expected, rel=0.05)
