from __future__ import annotations

import pytest
import torch
from core_examples import PROCESSES

from fewstep.core.prediction import noise_in
from fewstep.core.renoise import renoise
from fewstep.core.solvers import land


def pair(shape: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(3, *shape, dtype=torch.float64, generator=generator))


@pytest.mark.parametrize("name", PROCESSES)
def test_marginal_is_reproduced(name: str) -> None:
    """Card 8.1, identity 1: p_s through the kernel is p_tau; the noise of x_s stays in it with weight r sigma_s."""
    process = PROCESSES[name]
    x0, eps, n = pair((200_000,))
    s, tau = (torch.full((200_000,), value).double() for value in (0.3, 0.55))
    x_tau = renoise(process, land(process, x0 * 0.5 + 1, eps, s), s, tau, n)
    alpha, sigma = process.alpha(tau)[0], process.sigma(tau)[0]
    mean, variance = alpha, 0.25 * alpha**2 + sigma**2
    torch.testing.assert_close(x_tau.mean(), mean, atol=float(4 * (variance / 2e5).sqrt()), rtol=0)
    torch.testing.assert_close(x_tau.var(), variance, atol=0, rtol=4 * (2 / 2e5) ** 0.5)
    carried = (x_tau * eps).mean() / process.sigma(s)[0]
    expected = process.alpha(tau)[0] / process.alpha(s)[0]
    torch.testing.assert_close(
        carried, expected, rtol=0, atol=float(5 * variance.sqrt() / 2e5**0.5 / process.sigma(s)[0])
    )


def test_known_numbers() -> None:
    s, tau = torch.tensor([0.5, 0.0]), torch.tensor([0.75, 0.75])
    x, n = torch.tensor([[2.0], [2.0]]), torch.tensor([[1.0], [1.0]])
    wanted = torch.tensor([[0.5 * 2 + (0.75**2 - 0.25 * 0.25) ** 0.5], [0.25 * 2 + 0.75]])
    torch.testing.assert_close(renoise(PROCESSES["flow"], x, s, tau, n), wanted)


@pytest.mark.parametrize("name", PROCESSES)
def test_from_data_it_is_plain_noising_and_to_its_own_level_nothing(name: str) -> None:
    process = PROCESSES[name]
    x, _, n = pair((4, 3))
    t = torch.tensor([0.1, 0.4, 0.8, 1.0]).double()
    torch.testing.assert_close(renoise(process, x, torch.zeros_like(t), t, n), land(process, x, n, t))
    assert renoise(process, x, t, t, n).equal(x)


@pytest.mark.parametrize("name", PROCESSES)
def test_mixed_noise(name: str) -> None:
    """Card 8.1, identity 5: x_tau = alpha x0 + sigma eps_mix with eps_mix = (r sigma_s eps + beta n) / sigma."""
    process = PROCESSES[name]
    x0, eps, n = pair((4, 3))
    s, tau = torch.tensor([0.0, 0.2, 0.5, 0.9]).double(), torch.tensor([0.3, 0.3, 0.9, 0.95]).double()
    x_tau = renoise(process, land(process, x0, eps, s), s, tau, n)
    r, beta = process.transition(s, tau)
    mixed = ((r * process.sigma(s))[:, None] * eps + beta[:, None] * n) / process.sigma(tau)[:, None]
    torch.testing.assert_close(noise_in(x_tau, x0, process.alpha(tau), process.sigma(tau)), mixed)
    torch.testing.assert_close(mixed[0], n[0])
