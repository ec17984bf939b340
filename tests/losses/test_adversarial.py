"""The discriminator's and the student's adversarial losses: values, signs, best logit."""

from __future__ import annotations

import math

import torch

from fewstep.losses.adversarial import fooling_loss, telling_loss


def test_losses_are_softplus_averaged_over_the_heads() -> None:
    logits = torch.tensor([[0.0, 2.0], [-1.0, 3.0]])
    expected = torch.tensor([[math.log(2), math.log1p(math.exp(-2))], [math.log1p(math.e), math.log1p(math.exp(-3))]])
    torch.testing.assert_close(fooling_loss(logits), expected.mean(1))
    torch.testing.assert_close(fooling_loss(logits[:, 0]), expected[:, 0])
    torch.testing.assert_close(telling_loss(logits, -logits), 2 * expected.mean(1))


def test_student_raises_its_logits_and_the_discriminator_tells_both_apart() -> None:
    real, fake = (torch.zeros(3, 2, requires_grad=True) for _ in range(2))
    telling_loss(real, fake).sum().backward()
    assert (real.grad < 0).all()
    assert (fake.grad > 0).all()
    fooled = torch.zeros(3, 2, requires_grad=True)
    fooling_loss(fooled).sum().backward()
    assert (fooled.grad < 0).all()


def test_the_best_logit_is_the_log_ratio() -> None:
    """For a point with densities p and q, p softplus(-l) + q softplus(l) is least at l = log p/q."""
    p, q = 0.7, 0.2
    logit = torch.tensor([math.log(p / q)], dtype=torch.float64, requires_grad=True)
    nothing = torch.full((1,), 0.0, dtype=torch.float64)
    of_real = telling_loss(logit, nothing) - telling_loss(nothing, nothing) / 2
    of_fake = telling_loss(nothing, logit) - telling_loss(nothing, nothing) / 2
    (p * of_real + q * of_fake).sum().backward()
    assert abs(logit.grad.item()) < 1e-12


def test_no_overflow_for_certain_discriminators() -> None:
    sure = torch.tensor([1e4, -1e4], requires_grad=True)
    losses = fooling_loss(sure)
    losses.sum().backward()
    torch.testing.assert_close(losses.detach(), torch.tensor([0.0, 1e4]))
    assert sure.grad.isfinite().all()
