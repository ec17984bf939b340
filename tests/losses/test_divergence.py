"""The table of divergences: weights, gradients and variances against the card `f_distill.md`, section 8."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.losses.divergence import DIVERGENCES, clipped_ratio, divergence_weight, mean_one_by_time

F: dict[str, Callable[[Tensor], Tensor]] = {
    "reverse_kl": lambda r: -r.log(),
    "softened_reverse_kl": lambda r: (r + 1) * (0.5 + 0.5 / r).log(),
    "jensen_shannon": lambda r: r * r.log() - (r + 1) * ((r + 1) / 2).log(),
    "squared_hellinger": lambda r: 1 - r.sqrt(),
    "forward_kl": lambda r: r * r.log(),
    "jeffreys": lambda r: (r - 1) * r.log(),
    "neyman": lambda r: (1 - r).square() / r,
    "pearson": lambda r: (r - 1).square(),
}

GRADIENTS = {
    "reverse_kl": (-0.707965, -0.174909),
    "softened_reverse_kl": (-0.365955, -0.023621),
    "jensen_shannon": (-0.342010, -0.151287),
    "squared_hellinger": (-0.185399, -0.090750),
    "forward_kl": (-0.941176, -0.764014),
    "jeffreys": (-1.649141, -0.938923),
    "neyman": (-1.844110, 0.172179),
    "pearson": (-9.137267, -17.6465),
}
"""By mean and std of a student N(-0.5, 0.6^2) of a teacher N(0.3, 0.8^2), both with noise of 0.7 (item 1)."""

X = torch.linspace(-25, 25, 40_001, dtype=torch.float64)


def normal(mean: Tensor | float, variance: Tensor | float) -> Tensor:
    """The density at X."""
    variance = torch.as_tensor(variance, dtype=torch.float64)
    return torch.exp(-0.5 * (X - mean) ** 2 / variance) / (2 * math.pi * variance).sqrt()


def log_ratio(mean: float, variance: float, other_mean: float, other_variance: float) -> Tensor:
    """log of N(mean, variance) over the other at X, exact in the tails too."""
    squares = (X - other_mean) ** 2 / other_variance - (X - mean) ** 2 / variance
    return 0.5 * (squares + math.log(other_variance / variance))


def test_the_table_is_complete() -> None:
    assert set(F) == set(GRADIENTS) == set(DIVERGENCES)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_weight_is_the_second_derivative_times_r_squared(name: str) -> None:
    r = torch.logspace(-2, 2, 41, dtype=torch.float64).requires_grad_()
    (first,) = torch.autograd.grad(F[name](r).sum(), r, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), r)
    torch.testing.assert_close(divergence_weight(name, r.detach()), second * r.detach() ** 2, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_weighted_scores_are_the_gradient_of_the_divergence(name: str) -> None:
    """Item 1: the formula's integral, finite differences of the integrated divergence, and the card's numbers."""

    def divergence(mean: float, std: float) -> float:
        r = log_ratio(0.3, 1.13, mean, std**2 + 0.49).exp()
        return float(torch.trapezoid(normal(mean, std**2 + 0.49) * F[name](r), X))

    step = 1e-5
    differences = (
        (divergence(-0.5 + step, 0.6) - divergence(-0.5 - step, 0.6)) / (2 * step),
        (divergence(-0.5, 0.6 + step) - divergence(-0.5, 0.6 - step)) / (2 * step),
    )
    variance = 0.6**2 + 0.49
    weight = divergence_weight(name, log_ratio(0.3, 1.13, -0.5, variance).exp())
    gap = -(X - 0.3) / 1.13 + (X + 0.5) / variance  # score of the teacher less the student's
    expected_z = 0.6 * (X + 0.5) / variance  # E[z | x], the derivative by the std
    q = normal(-0.5, variance)
    formula = tuple(-float(torch.trapezoid(q * weight * gap * by, X)) for by in (torch.ones_like(X), expected_z))
    assert formula == pytest.approx(differences, rel=1e-6, abs=1e-7)
    assert formula == pytest.approx(GRADIENTS[name], rel=5e-6, abs=1e-6)


def test_weights_and_gradients_add_up() -> None:
    """Item 2."""
    r = torch.logspace(-3, 3, 31, dtype=torch.float64)
    h = {name: divergence_weight(name, r) for name in DIVERGENCES}
    torch.testing.assert_close(h["softened_reverse_kl"] + h["jensen_shannon"], h["reverse_kl"])
    torch.testing.assert_close(h["reverse_kl"] + h["forward_kl"], h["jeffreys"])


def test_all_divergences_have_one_curvature_but_for_a_factor_at_equal_laws() -> None:
    one = torch.ones(1, dtype=torch.float64)
    assert [divergence_weight(name, one).item() for name in DIVERGENCES] == [1, 0.5, 0.5, 0.25, 1, 2, 2, 2]


VARIANCES = {
    "reverse_kl": lambda d: 0.0,
    "forward_kl": lambda d: math.exp(d * d) - 1,
    "squared_hellinger": lambda d: math.exp(d * d / 4) - 1,
    "jeffreys": lambda d: (math.exp(d * d) - 1) / 4,
    "jensen_shannon": {0.5: 0.063, 1: 0.256, 2: 1.224, 3: 4.07}.get,
    "softened_reverse_kl": {0.5: 0.049, 1: 0.112, 2: 0.103, 3: 0.049}.get,
}


@pytest.mark.parametrize("gap", [0.5, 1, 2, 3])
@pytest.mark.parametrize("name", VARIANCES)
def test_variance_of_the_normalised_weight(name: str, gap: float) -> None:
    """Item 8: Var h / (E h)^2 under the student N(0, 1) with the teacher N(gap, 1)."""
    h, q = divergence_weight(name, log_ratio(gap, 1.0, 0.0, 1.0).exp()), normal(0.0, 1.0)
    mean = torch.trapezoid(q * h, X)
    assert float(torch.trapezoid(q * h.square(), X) / mean**2 - 1) == pytest.approx(
        VARIANCES[name](gap), rel=0.01, abs=6e-4
    )


def samples(count: int) -> tuple[Tensor, Tensor]:
    """Exact ratios of N(0.4, 1) over N(0, 1) at samples of the latter, and times."""
    generator = torch.Generator().manual_seed(0)
    x, tau = torch.randn(count, generator=generator).double(), torch.rand(count, generator=generator).double()
    return (0.4 * x - 0.08).exp(), tau


def test_exact_ratios_pass_the_first_stage_unchanged() -> None:
    """Item 4: their mean under the student is 1 in every bin."""
    ratio, tau = samples(400_000)
    torch.testing.assert_close(mean_one_by_time(ratio, tau, 10), ratio, rtol=0.01, atol=0)


@pytest.mark.parametrize("bins", [1, 10])
def test_the_first_stage_removes_a_bias_that_is_constant_in_a_bin(bins: int) -> None:
    """Item 4: exactly, whatever the number of samples."""
    ratio, tau = samples(64)
    bias = torch.linspace(-1, 2, bins).double()[(tau * bins).long()]
    plain, biased = (mean_one_by_time(r, tau, bins) for r in (ratio, ratio * bias.exp()))
    torch.testing.assert_close(biased, plain)
    for place in range(bins):
        inside = (tau * bins).long() == place
        if inside.any():
            assert plain[inside].mean().item() == pytest.approx(1)


def test_the_second_stage_alone_removes_a_global_bias_of_monomials_only() -> None:
    """Item 4."""
    ratio, _ = samples(64)
    for name in DIVERGENCES:
        plain, biased = (divergence_weight(name, r) for r in (ratio, 3 * ratio))
        same = torch.allclose(plain / plain.mean(), biased / biased.mean())
        assert same == (name in ("reverse_kl", "forward_kl", "squared_hellinger", "neyman", "pearson")), name


def test_a_sample_alone_in_its_bin_has_ratio_one() -> None:
    tau = torch.tensor([0.0, 0.12, 0.999, 1.0])
    torch.testing.assert_close(
        mean_one_by_time(torch.tensor([5.0, 0.1, 2.0, 6.0]), tau, 10), torch.tensor([1.0, 1.0, 0.5, 1.5])
    )


def test_ratios_are_clipped_and_constant() -> None:
    log_ratio = torch.tensor([-20.0, 0.0, 1.0, 200.0], requires_grad=True)
    ratio = clipped_ratio(log_ratio, (0.1, 20.0))
    torch.testing.assert_close(ratio, torch.tensor([0.1, 1.0, math.e, 20.0]))
    assert not ratio.requires_grad


def test_unknown_divergence_is_refused() -> None:
    with pytest.raises(FewstepError, match="found divergence 'alpha'"):
        divergence_weight("alpha", X)
