"""The exact teachers' log densities: those of the laws they sample, at every noise level."""

from __future__ import annotations

import math

import torch

from fewstep.core.process import Flow
from fewstep.evaluation.exact import LABEL, ring

T = torch.tensor([0.0, 0.3, 0.8], dtype=torch.float64)
X = torch.tensor([[1.0, 0.2], [0.1, -0.4], [2.0, 0.0]], dtype=torch.float64)


def test_log_density_is_that_of_the_marginal_mixture() -> None:
    teacher = ring(Flow(), [1, 2, 3], 1.5, 0.3, torch.float64)
    for x, t, found in zip(X, T, teacher.log_density(X, T, {}), strict=True):
        weights, means, covariances = teacher.marginal(float(t))
        parts = torch.distributions.MultivariateNormal(means, covariances).log_prob(x)
        expected = (parts + weights.log()).logsumexp(0) + math.log(2 * math.pi)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_its_slope_is_the_score_of_the_denoiser() -> None:
    teacher = ring(Flow(), [1, 2, 3], 1.5, 0.3, torch.float64)
    x, t, told = X.clone().requires_grad_(), T + 0.1, {LABEL: torch.tensor([0, 1, -1])}
    (score,) = torch.autograd.grad(teacher.log_density(x, t, told).sum(), x)
    alpha, sigma = (1 - t)[:, None], t[:, None]
    torch.testing.assert_close(score, (alpha * teacher(X, t, told) - X) / sigma**2)
