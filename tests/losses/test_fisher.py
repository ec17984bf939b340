"""The score-identity loss: values and gradients of the card, to all its digits; its mixtures; who gets its gradient."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fewstep.core.process import DiscreteVP, Flow
from fewstep.errors import FewstepError
from fewstep.evaluation.exact import MixtureTeacher
from fewstep.losses.fisher import FISHER_WEIGHTS, fisher_loss, fisher_weight, handed_on

MEAN, VARIANCE, LEVEL = 0.5, 1.0, 0.8  # the card's example: data N(.5, 1), noise .8
START = (-0.4, 0.6)  # mean and standard deviation of the generator


def denoised(x: Tensor, mean: Tensor | float, variance: Tensor | float) -> Tensor:
    """E[x0 | x] of N(mean, variance) under noise LEVEL."""
    return (variance * x + LEVEL**2 * mean) / (variance + LEVEL**2)


def nodes(count: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Gauss-Hermite for two standard normals, z and eps, each (n, 1), with weights (n,): exact for polynomials."""
    points, weights = (torch.from_numpy(part) for part in np.polynomial.hermite_e.hermegauss(count))
    z, eps = torch.cartesian_prod(points, points).T[:, :, None]
    return z, eps, torch.cartesian_prod(weights, weights).prod(1) / (2 * torch.pi)


def example(mean: Tensor, std: Tensor, frozen: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sample, teacher and optimal critic at the nodes, and their weights; the critic's own numbers frozen or not."""
    z, eps, weights = nodes()
    sample = mean + std * z
    x = sample + LEVEL * eps
    fake = denoised(x, mean.detach(), std.detach() ** 2) if frozen else denoised(x, mean, std**2)
    return sample, denoised(x, MEAN, VARIANCE), fake, weights


def start() -> tuple[Tensor, Tensor]:
    mean, std = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in START)
    return mean, std


def gradient(alpha: float) -> Tensor:
    """Of the expected loss with respect to (mean, std)."""
    mean, std = start()
    sample, real, fake, weights = example(mean, std)
    return torch.stack(torch.autograd.grad((weights * fisher_loss(sample, real, fake, alpha)).sum(), (mean, std)))


def divergence() -> tuple[float, Tensor]:
    """F, and its gradient through the optimal critic's own numbers too."""
    mean, std = start()
    _, real, fake, weights = example(mean, std, frozen=False)
    value = (weights * (real - fake).square()[:, 0]).sum()
    return float(value.detach()), torch.stack(torch.autograd.grad(value, (mean, std)))


def test_value_is_one_minus_alpha_times_the_divergence() -> None:
    value, _ = divergence()
    assert value == pytest.approx(0.185733, abs=1e-6)
    sample, real, fake, weights = (part.detach() for part in example(*start()))
    for alpha in (0.0, 0.5, 1.0, 1.2):
        loss = (weights * fisher_loss(sample, real, fake, alpha)).sum()
        assert float(loss) == pytest.approx((1 - alpha) * value, abs=1e-12)


@pytest.mark.parametrize(
    ("alpha", "expected"),
    [
        (0.0, (-0.049342, -0.116959)),
        (0.5, (-0.137061, -0.154386)),
        (1.0, (-0.224780, -0.191813)),
        (1.2, (-0.259868, -0.206783)),
    ],
)
def test_gradients_are_the_cards(alpha: float, expected: tuple[float, float]) -> None:
    assert gradient(alpha).tolist() == pytest.approx(expected, abs=1e-6)


def test_alpha_of_one_half_has_half_the_gradient_of_the_divergence() -> None:
    _, exact = divergence()
    assert exact.tolist() == pytest.approx((-0.274123, -0.308772), abs=1e-6)
    torch.testing.assert_close(2 * gradient(0.5), exact)


def test_the_square_alone_points_the_wrong_way() -> None:
    alone = gradient(0.0) - gradient(1.0)  # the gradient is affine in alpha
    torch.testing.assert_close(alone, gradient(1.0) - gradient(2.0))
    assert alone.tolist() == pytest.approx((0.175438, 0.074854), abs=1e-6)


def test_the_reverse_kl_direction_is_another_one() -> None:
    _, real, fake, weights = (part.detach() for part in example(*start()))
    z, gap = nodes()[0][:, 0], (real - fake)[:, 0]
    direction = torch.stack([(weights * gap).sum(), (weights * gap * z).sum()])
    assert (-direction).tolist() == pytest.approx((-0.351220, -0.149854), abs=1e-6)


def test_alpha_of_one_is_the_gap_times_the_critics_error() -> None:
    sample, real, fake = torch.randn(3, 5, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    short = ((real - fake) * (fake - sample)).flatten(1).mean(1)
    torch.testing.assert_close(fisher_loss(sample, real, fake, 1.0), short)


def test_weights_depend_on_the_level_alone() -> None:
    tau = torch.tensor([0.25, 0.5], dtype=torch.float64)
    expected = {
        "one": (1, 1),
        "alpha": (0.75, 0.5),
        "alpha_squared": (0.5625, 0.25),
        "inverse_sigma": (4, 2),
        "inverse_sigma_squared": (16, 4),
        "root_snr": (3, 1),
        "snr": (9, 1),
    }
    assert expected.keys() == set(FISHER_WEIGHTS)
    for kind, values in expected.items():
        assert fisher_weight(kind, Flow(), tau).tolist() == pytest.approx(values)
    vp = DiscreteVP.cosine()
    torch.testing.assert_close(fisher_weight("alpha", vp, tau), vp.alpha(tau))


def test_unknown_weight_is_refused() -> None:
    with pytest.raises(FewstepError, match="found Fisher weight 'sigma'"):
        fisher_weight("sigma", Flow(), torch.ones(1))


def test_the_gradient_is_handed_on_to_the_sample_alone() -> None:
    torch.manual_seed(0)
    student, critic = nn.Linear(3, 3).double(), nn.Linear(3, 3).double()
    z = torch.randn(4, 3, dtype=torch.float64)

    def loss(sample: Tensor) -> Tensor:
        return fisher_loss(sample, sample.sin(), critic(sample), 1.0)

    origin = student(z)
    leaf = origin.detach().requires_grad_()
    values = handed_on(loss(leaf), leaf, origin)
    torch.testing.assert_close(values.detach(), loss(origin).detach(), rtol=0, atol=0)
    values.mean().backward()
    assert critic.weight.grad is None
    attached = torch.autograd.grad(loss(student(z)).mean(), student.weight)[0]
    torch.testing.assert_close(student.weight.grad, attached)


def mixture_gradient(data: MixtureTeacher, mean: Tensor, std: Tensor, critic: MixtureTeacher) -> tuple[Tensor, ...]:
    """Of the expected loss of steps N(mean_k, std_k^2) with respect to both, over three levels of noise."""
    z, eps, weights = nodes(8)
    total = torch.zeros((), dtype=torch.float64)
    for level in (0.3, 0.5, 0.7):
        tau = torch.full((len(z) * len(mean),), level, dtype=torch.float64)
        sample = (mean[:, None, None] + std[:, None, None] * z).view(-1, 1)
        x = (1 - level) * sample + level * eps.repeat(len(mean), 1)
        values = fisher_loss(sample, data(x, tau, {}), critic(x, tau, {}), 1.0)
        total = total + (weights.repeat(len(mean)) * values).sum()
    return torch.autograd.grad(total, (mean, std))


def law(mean: Tensor, std: Tensor) -> MixtureTeacher:
    """The even mixture of N(mean_k, std_k^2)."""
    return MixtureTeacher(Flow(), torch.ones(len(mean)).double(), mean[:, None], std.square()[:, None, None])


def test_mixture_converges_while_single_steps_do_not() -> None:
    """T8: data N(1, .5^2), two steps, the exact critic of their mixture."""
    data = law(torch.ones(1, dtype=torch.float64), torch.full((1,), 0.5, dtype=torch.float64))
    mean = torch.tensor([0.5, 1.3], dtype=torch.float64, requires_grad=True)
    std = torch.tensor([0.4, 0.5], dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([mean, std], 0.01, betas=(0.0, 0.99))
    for iteration in range(500):
        adam.param_groups[0]["lr"] = 0.01 * (1 - iteration / 500)
        mean.grad, std.grad = mixture_gradient(data, mean, std, law(mean.detach(), std.detach()))
        adam.step()
    right, spread = law(mean.detach(), std.detach()).moments(0.0)
    assert float(right) == pytest.approx(1, rel=0.02)
    assert float(spread.sqrt()) == pytest.approx(0.5, rel=0.02)
    assert float((mean[1] - mean[0]).detach()) > 0.1


def test_steps_that_share_the_data_among_them_rest() -> None:
    """T8: data half A, half B; the first step makes A and the second B."""
    mean = torch.tensor([-1.0, 2.0], dtype=torch.float64, requires_grad=True)
    std = torch.tensor([0.3, 0.6], dtype=torch.float64, requires_grad=True)
    data = law(mean.detach(), std.detach())
    for part in mixture_gradient(data, mean, std, law(mean.detach(), std.detach())):
        torch.testing.assert_close(part, torch.zeros_like(part), rtol=0, atol=1e-12)
    alone = mixture_gradient(data, mean, std, law(mean.detach()[:1], std.detach()[:1]))
    assert alone[0].abs().max() > 0.1
