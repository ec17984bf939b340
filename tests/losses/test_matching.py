"""The matching loss: its gradient is the direction, its metrics are the published formulas."""

from __future__ import annotations

import math

import pytest
import torch

from fewstep.errors import FewstepError
from fewstep.losses.matching import match, metric, normaliser

SHAPE = (5, 3, 4)
ELEMENTS = 12


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_l2_gradient_is_minus_direction_over_normaliser() -> None:
    sample = normal(0, *SHAPE).requires_grad_()
    direction, divisor = normal(1, *SHAPE), torch.rand(5, dtype=torch.float64) + 0.5
    match(sample, direction, normaliser=divisor, metric_kind="l2", c=1.0).sum().backward()
    torch.testing.assert_close(sample.grad, -direction / divisor[:, None, None] / ELEMENTS)


@pytest.mark.parametrize("kind", ["l2", "huber_vector", "huber_elementwise"])
def test_descent_moves_the_sample_along_the_direction(kind: str) -> None:
    sample, direction = normal(0, *SHAPE).requires_grad_(), normal(1, *SHAPE)
    match(sample, direction, normaliser=torch.ones(5), metric_kind=kind, c=0.1).sum().backward()
    assert (-sample.grad * direction > 0).all()


def test_target_is_a_constant() -> None:
    sample, direction = normal(0, *SHAPE).requires_grad_(), normal(1, *SHAPE).requires_grad_()
    match(sample, direction, normaliser=torch.ones(5), metric_kind="l2", c=1.0).sum().backward()
    assert direction.grad is None


def test_huber_vector_is_the_papers_formula_over_sqrt_d() -> None:
    difference, per_element = normal(2, *SHAPE), 0.00054
    c = per_element * math.sqrt(ELEMENTS)
    expected = ((difference.flatten(1).square().sum(1) + c * c).sqrt() - c) / math.sqrt(ELEMENTS)
    torch.testing.assert_close(metric("huber_vector", difference, per_element), expected)


def test_huber_vector_tends_to_the_norm_with_gradient_norm_at_most_one() -> None:
    difference = (100 * normal(2, *SHAPE)).requires_grad_()
    value = metric("huber_vector", difference, 1e-6)
    norm = difference.detach().flatten(1).norm(dim=1)
    torch.testing.assert_close(value, norm / math.sqrt(ELEMENTS), rtol=1e-6, atol=1e-5)
    value.sum().backward()
    assert (difference.grad.flatten(1).norm(dim=1) * math.sqrt(ELEMENTS) <= 1 + 1e-12).all()


@pytest.mark.parametrize("kind", ["huber_vector", "huber_elementwise"])
def test_hubers_tend_to_l2_for_a_large_constant(kind: str) -> None:
    difference, c = normal(2, *SHAPE), 1e3
    torch.testing.assert_close(c * metric(kind, difference, c), metric("l2", difference, 1.0), rtol=1e-5, atol=1e-8)


def test_huber_elementwise_tends_to_l1_for_a_small_constant() -> None:
    difference = normal(2, *SHAPE)
    torch.testing.assert_close(
        metric("huber_elementwise", difference, 1e-9), difference.abs().flatten(1).mean(1), rtol=1e-6, atol=1e-8
    )


def test_dmd_normaliser_is_per_sample_and_detached() -> None:
    denoised = normal(3, *SHAPE).float().requires_grad_()
    toward = normal(4, *SHAPE).float()
    value = normaliser("dmd", denoised, toward)
    assert not value.requires_grad
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, (denoised.detach() - toward).abs().flatten(1).mean(1))
    changed = toward.clone()
    changed[0] += 10
    torch.testing.assert_close(normaliser("dmd", denoised, changed)[1:], value[1:], rtol=0, atol=0)


def test_dmd_normaliser_stays_finite_where_student_and_teacher_agree() -> None:
    same = normal(3, *SHAPE)
    loss = match(same, torch.zeros(SHAPE), normaliser=normaliser("dmd", same, same), metric_kind="l2", c=1.0)
    torch.testing.assert_close(loss, torch.zeros(5, dtype=torch.float64))


def test_unknown_names_are_refused() -> None:
    x = normal(0, *SHAPE)
    with pytest.raises(FewstepError, match="normaliser 'l1'"):
        normaliser("l1", x, x)  # type: ignore[arg-type]
    with pytest.raises(FewstepError, match="metric 'l1'"):
        metric("l1", x, 1.0)  # type: ignore[arg-type]
