"""Distances with known answers."""

from __future__ import annotations

import math

import pytest
import torch

from fewstep.errors import FewstepError
from fewstep.evaluation import metrics
from fewstep.evaluation.metrics import (
    KernelDistance,
    density_coverage,
    frechet_distance,
    kernel_distance,
    mmd,
    neighbours,
    precision_recall,
    sliced_wasserstein,
    spread,
)


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


def test_counting_a_sample_twice_is_having_it_twice() -> None:
    a, b = normal(30, 3, 0), normal(40, 3, 1) + 1
    counts = torch.tensor([2.0] * 10 + [1.0] * 20 + [0.0] * 10)
    repeated = torch.cat([b[:10], b[:10], b[10:30]])
    assert frechet_distance(a, b, None, counts) == pytest.approx(frechet_distance(a, repeated), rel=1e-9)
    assert frechet_distance(b, a, counts) == pytest.approx(frechet_distance(repeated, a), rel=1e-9)
    kernels = KernelDistance(a, b)
    assert kernels(None, torch.cat([torch.ones(30), torch.zeros(10)])) == pytest.approx(kernel_distance(a, b[:30]))


def test_kernel_distance_is_unbiased_at_zero_and_right_for_a_shift() -> None:
    same = [kernel_distance(normal(100, 4, s), normal(100, 4, 200 + s)) for s in range(30)]
    assert abs(sum(same) / 30) < 0.02
    # In one dimension E (xy + 1)^3 is 1 + 3 E x E y + 3 E x^2 E y^2 + E x^3 E y^3; for N(0, 1) and N(1, 1):
    within_a, within_b, between = 1 + 3, 1 + 3 + 3 * 4 + 16, 1 + 3 * 2
    found = kernel_distance(normal(4000, 1, 0), normal(4000, 1, 1) + 1)
    assert found == pytest.approx(within_a + within_b - 2 * between, rel=0.06)


def test_sets_of_the_same_prompts_are_no_closer_than_their_laws() -> None:
    """Each prompt has a place of its own, and both sets one sample there: equal laws, so zero in the mean."""
    prompts = torch.arange(20)
    plain, right = [], []
    for s in range(40):
        places = 2 * normal(20, 3, 500 + s)
        a, b = places + 0.1 * normal(20, 3, 600 + s), places + 0.1 * normal(20, 3, 700 + s)
        plain.append(kernel_distance(a, b))
        right.append(KernelDistance(a, b, (prompts, prompts))())
    assert sum(plain) / 40 < -3
    assert abs(sum(right) / 40) < 0.3


def test_large_sets_are_compared_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = normal(60, 3, 0), normal(50, 3, 1) + 0.5
    whole, near = kernel_distance(a, b), density_coverage(a, b) + precision_recall(a, b)
    monkeypatch.setattr(metrics, "ROWS", 7)
    assert density_coverage(a, b) + precision_recall(a, b) == pytest.approx(near)
    monkeypatch.setattr(metrics, "KERNEL_PART", 30)
    halves = (kernel_distance(a[:30], b[:25]) + kernel_distance(a[30:], b[25:])) / 2
    assert kernel_distance(a, b) == pytest.approx(halves)
    assert halves != pytest.approx(whole)


def test_density_and_coverage_see_a_planted_mode_loss_and_an_outlier() -> None:
    centres = torch.tensor([[0.0, 0], [20, 0]], dtype=torch.float64)
    real = normal(400, 2, 0) + centres[torch.arange(400) % 2]
    density, coverage = density_coverage(real, normal(400, 2, 1))
    assert density > 0.8
    assert 0.4 < coverage < 0.52
    density, coverage = density_coverage(real, normal(400, 2, 2) + centres[torch.arange(400) % 2])
    assert density == pytest.approx(1, abs=0.1)
    assert coverage > 0.9
    outlier = torch.cat([real[:-1], torch.tensor([[300.0, 0]], dtype=torch.float64)])
    far = normal(400, 2, 3) + torch.tensor([60.0, 0])
    assert precision_recall(outlier, far)[0] == 1  # one real outlier's ball holds them all
    assert density_coverage(outlier, far)[0] < 0.25


def test_too_few_samples_for_neighbours_are_refused() -> None:
    with pytest.raises(FewstepError, match="expected more than 3"):
        precision_recall(normal(3, 2, 0), normal(9, 2, 1))


def test_spread_is_the_mean_distance_of_two_seeds() -> None:
    points = torch.tensor([[[0.0, 0], [3, 4], [0, 0]], [[1, 1], [1, 1], [1, 1]]])
    assert spread(points).tolist() == pytest.approx([10 / 3, 0])


def test_agreement_with_torchmetrics_on_the_same_features() -> None:
    from torchmetrics.image.fid import _compute_fid
    from torchmetrics.image.kid import poly_mmd

    a, b = normal(200, 16, 0), 1.3 * normal(200, 16, 1) + 0.4
    theirs = _compute_fid(a.mean(0), torch.cov(a.T), b.mean(0), torch.cov(b.T))
    assert frechet_distance(a, b) == pytest.approx(float(theirs), abs=1e-4)
    assert kernel_distance(a, b) == pytest.approx(float(poly_mmd(a, b)), abs=1e-4)
    a, b = a[:12], b[:14]  # fewer samples than features
    theirs = _compute_fid(a.mean(0), torch.cov(a.T), b.mean(0), torch.cov(b.T))
    assert frechet_distance(a, b) == pytest.approx(float(theirs), abs=1e-4)


def test_neighbours_agree_with_the_definitions_written_out() -> None:
    real, made = normal(30, 3, 0), normal(25, 3, 1) + 0.5

    def ball(x: torch.Tensor, i: int, k: int) -> float:
        return sorted(float((x[i] - other).norm()) for other in x)[k]

    gaps = [[float((r - m).norm()) for m in made] for r in real]
    balls = [ball(real, i, 5) for i in range(30)]
    density = sum(gaps[i][j] <= balls[i] for i in range(30) for j in range(25)) / (5 * 25)
    coverage = sum(min(gaps[i]) <= balls[i] for i in range(30)) / 30
    assert density_coverage(real, made) == pytest.approx((density, coverage))
    both = neighbours(real, made)
    assert float(both.density.mean()) == pytest.approx(density)
    assert float(both.covered.mean()) == pytest.approx(coverage)
    recall = sum(any(gaps[i][j] <= ball(made, j, 3) for j in range(25)) for i in range(30)) / 30
    assert precision_recall(real, made)[1] == pytest.approx(recall)
