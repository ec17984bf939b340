"""The critic's targets and weights against the card's equations 3, 9 and 10."""

from __future__ import annotations

import pytest
import torch

from fewstep.core.process import DiscreteVP, Flow, Process
from fewstep.core.renoise import renoise
from fewstep.core.tensors import expand, flat_mean
from fewstep.errors import FewstepError
from fewstep.losses.critic import (
    beta_ratio,
    critic_loss,
    critic_weight,
    exact_target,
    importance_weight,
    mixed_noise,
)

PROCESSES = [Flow(), DiscreteVP.linear()]
LANDING = torch.tensor([0.0, 0.25, 0.5, 0.75], dtype=torch.float64)
TAU = torch.tensor([0.1, 0.4, 0.55, 0.95], dtype=torch.float64)


def case(process: Process) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    denoised, eps_hat, noise = torch.randn(3, 4, 6, generator=generator, dtype=torch.float64)
    x_s = expand(process.alpha(LANDING), denoised) * denoised + expand(process.sigma(LANDING), denoised) * eps_hat
    x_tau = renoise(process, x_s, LANDING, TAU, noise)
    return {"denoised": denoised, "eps_hat": eps_hat, "noise": noise, "x_s": x_s, "x_tau": x_tau}


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: p.name)
def test_mixed_noise_explains_x_tau(process: Process) -> None:
    """Identity 5: x_tau = alpha denoised + sigma eps_mix; eps_mix = n for a clean landing."""
    c = case(process)
    mixed = mixed_noise(process, c["eps_hat"], c["noise"], LANDING, TAU)
    rebuilt = expand(process.alpha(TAU), mixed) * c["denoised"] + expand(process.sigma(TAU), mixed) * mixed
    torch.testing.assert_close(rebuilt, c["x_tau"])
    torch.testing.assert_close(mixed[0], c["noise"][0])


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: p.name)
def test_exact_target_is_the_score_of_the_kernel(process: Process) -> None:
    """Eq. 10 through eq. 1: score -n/beta, as a denoised sample; the clean sample itself for a clean landing."""
    c = case(process)
    target = exact_target(process, c["x_tau"], LANDING, TAU, c["noise"])
    _, beta = process.transition(LANDING, TAU)
    alpha, sigma = (expand(scale(TAU), target) for scale in (process.alpha, process.sigma))
    torch.testing.assert_close((alpha * target - c["x_tau"]) / sigma**2, -c["noise"] / expand(beta, target))
    torch.testing.assert_close(target[0], c["denoised"][0])


def test_exact_target_is_the_flow_velocity_of_the_papers() -> None:
    """Eq. 10's third form, which Phased DMD and TDM-R1 use."""
    process = Flow()
    c = case(process)
    target = exact_target(process, c["x_tau"], LANDING, TAU, c["noise"])
    velocity = (c["x_tau"] - target) / TAU[:, None]
    _, beta = process.transition(LANDING, TAU)
    alpha_s = 1 - LANDING
    factor = (TAU + (1 - TAU) * LANDING**2 / alpha_s**2) / beta
    torch.testing.assert_close(velocity, -c["x_s"] / alpha_s[:, None] + factor[:, None] * c["noise"])


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: p.name)
def test_importance_weights(process: Process) -> None:
    c = case(process)
    mixed = mixed_noise(process, c["eps_hat"], c["noise"], LANDING, TAU)
    weigh = [
        importance_weight(kind, process, c["eps_hat"], c["noise"], LANDING, TAU)
        for kind in ("none", "mean", "clipped_sum")
    ]
    torch.testing.assert_close(weigh[0], torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(weigh[1], (0.5 * (flat_mean(c["noise"] ** 2) - flat_mean(mixed**2))).exp())
    torch.testing.assert_close(weigh[1][0], torch.tensor(1.0, dtype=torch.float64))
    _, beta = process.transition(LANDING, TAU)
    kernel_x0 = torch.distributions.Normal(process.alpha(TAU)[:, None] * c["denoised"], process.sigma(TAU)[:, None])
    r, _ = process.transition(LANDING, TAU)
    kernel_xs = torch.distributions.Normal(r[:, None] * c["x_s"], beta[:, None])
    log_ratio = (kernel_x0.log_prob(c["x_tau"]) - kernel_xs.log_prob(c["x_tau"])).sum(1)
    torch.testing.assert_close(weigh[2], log_ratio.exp().clamp(1 / 20, 20))


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: p.name)
def test_weights_measure_the_error_in_their_space(process: Process) -> None:
    """min_snr below its cap is the error of eps; inverse_sigma the error of v and of flow velocity."""
    generator = torch.Generator().manual_seed(1)
    x, first, second = torch.randn(3, 4, 6, generator=generator, dtype=torch.float64)
    tau = torch.tensor([0.5, 0.7, 0.9, 0.98], dtype=torch.float64)
    alpha, sigma = process.alpha(tau)[:, None], process.sigma(tau)[:, None]

    def spoken(denoised: torch.Tensor, kind: str) -> torch.Tensor:
        eps = (x - alpha * denoised) / sigma
        return {"eps": eps, "v": alpha * eps - sigma * denoised, "flow": eps - denoised}[kind]

    zero = torch.zeros_like(tau)
    by_snr = critic_loss(first, second, critic_weight("min_snr", process, zero, tau, snr_cap=1e9))
    torch.testing.assert_close(by_snr, flat_mean((spoken(first, "eps") - spoken(second, "eps")) ** 2))
    velocity = "flow" if process.name == "flow" else "v"
    by_sigma = critic_loss(first, second, critic_weight("inverse_sigma", process, zero, tau))
    torch.testing.assert_close(by_sigma, flat_mean((spoken(first, velocity) - spoken(second, velocity)) ** 2))
    capped = critic_weight("min_snr", process, zero, torch.full_like(tau, 0.1), snr_cap=5.0)
    torch.testing.assert_close(capped, torch.full_like(tau, 5.0))


def test_beta_ratio_is_one_for_a_clean_landing_and_small_near_the_landing() -> None:
    process = Flow()
    tau = torch.tensor([0.3, 0.501], dtype=torch.float64)
    ratio = beta_ratio(process, torch.tensor([0.0, 0.5], dtype=torch.float64), tau)
    torch.testing.assert_close(ratio[0], torch.tensor(1.0, dtype=torch.float64))
    assert 0 < ratio[1] < 0.02


def test_critic_loss_gives_no_gradient_to_its_target() -> None:
    prediction, target = torch.ones(2, 3, requires_grad=True), torch.zeros(2, 3, requires_grad=True)
    critic_loss(prediction, target, torch.tensor([1.0, 2.0])).sum().backward()
    assert target.grad is None
    torch.testing.assert_close(prediction.grad, torch.tensor([[2.0], [4.0]]).expand(2, 3) / 3)


def test_unknown_names_are_refused() -> None:
    zero, tau = torch.zeros(1), torch.full((1,), 0.5)
    with pytest.raises(FewstepError, match="critic weight 'eps'"):
        critic_weight("eps", Flow(), zero, tau)  # type: ignore[arg-type]
    with pytest.raises(FewstepError, match="importance 'all'"):
        importance_weight("all", Flow(), torch.ones(1, 2), torch.ones(1, 2), zero, tau)  # type: ignore[arg-type]
