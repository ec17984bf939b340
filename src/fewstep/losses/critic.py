"""How the critic (fake score) learns the law of the student's renoised landing points.

A landing point x_s at time s is renoised to tau >= s by x_tau = r x_s + beta n (card tdm.md, eq. 3). The critic is
asked for the denoised prediction at (x_tau, tau). Two targets are known (card 2.6):

- the student's own denoised sample, as published: right where s = 0, not the score of the queried law elsewhere;
- the exact one below (eq. 10): unbiased at every boundary, noisy where tau is close to s.

All errors are measured on the denoised sample; the weights say in which space that is a plain square.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from fewstep.core.process import Process
from fewstep.core.tensors import expand, flat_mean
from fewstep.errors import FewstepError

CriticTarget = Literal["denoised", "exact"]
CriticWeight = Literal["one", "min_snr", "snr", "inverse_sigma", "beta_ratio"]
Importance = Literal["none", "mean", "clipped_sum"]
CRITIC_TARGETS: tuple[str, ...] = get_args(CriticTarget)
CRITIC_WEIGHTS: tuple[str, ...] = get_args(CriticWeight)
IMPORTANCES: tuple[str, ...] = get_args(Importance)

_LOG_IMPORTANCE_BOUND = math.log(20.0)  # Flow-Factory clips the density ratio to [1/20, 20]


def exact_target(process: Process, x_tau: Tensor, landing_time: Tensor, tau: Tensor, noise: Tensor) -> Tensor:
    """The denoised sample whose conditional mean given x_tau is the score of the queried law (card eq. 10).

    x0* = (x_tau - sigma_tau^2 n / beta) / alpha_tau, with `noise` n the very noise of x_tau = r x_s + beta n, and s the
    `landing_time` (B,) < `tau` (B,). Its spread grows as 1/beta: keep a margin between s and tau and weight by
    (beta/sigma)^2. For s = 0 it is the clean sample itself. Not defined where alpha is 0 (tau = 1 of a flow process).
    """
    _, beta = process.transition(landing_time, tau)
    alpha, sigma = process.alpha(tau), process.sigma(tau)
    return (x_tau - expand(sigma.square() / beta, x_tau) * noise) / expand(alpha, x_tau)


def beta_ratio(process: Process, landing_time: Tensor, tau: Tensor) -> Tensor:
    """(beta/sigma_tau)^2 in [0, 1], shape (B,): the share of the noise at tau that renoising added. 1 for landing 0."""
    _, beta = process.transition(landing_time, tau)
    return (beta / process.sigma(tau)).square()


def critic_weight(
    kind: CriticWeight, process: Process, landing_time: Tensor, tau: Tensor, snr_cap: float = 5.0
) -> Tensor:
    """Weight (B,) of the squared error of the denoised sample.

    "one"; "min_snr": min(SNR, `snr_cap`), the error of eps wherever the SNR is below the cap (authors' demo, cap 5);
    "snr": the error of eps; "inverse_sigma": 1/sigma^2, the error of v and of flow velocity (TDM-R1, BLADE);
    "beta_ratio": (beta/sigma)^2.
    """
    if kind == "one":
        return torch.ones_like(tau)
    if kind == "min_snr":
        return process.snr(tau).clamp(max=snr_cap)
    if kind == "snr":
        return process.snr(tau)
    if kind == "inverse_sigma":
        return process.sigma(tau).square().reciprocal()
    if kind == "beta_ratio":
        return beta_ratio(process, landing_time, tau)
    raise FewstepError(f"found critic weight {kind!r}, expected one of {CRITIC_WEIGHTS}, fix: choose one of them")


def mixed_noise(process: Process, eps_hat: Tensor, noise: Tensor, landing_time: Tensor, tau: Tensor) -> Tensor:
    """The noise eps with x_tau = alpha_tau denoised + sigma_tau eps, for a point landed with `eps_hat` (card 2.5).

    eps = (r sigma_s eps_hat + beta n) / sigma_tau; equal to n where the landing time s is 0.
    """
    r, beta = process.transition(landing_time, tau)
    sigma = process.sigma(tau)
    carried = expand(r * process.sigma(landing_time) / sigma, noise) * eps_hat
    return carried + expand(beta / sigma, noise) * noise


def importance_weight(
    kind: Importance, process: Process, eps_hat: Tensor, noise: Tensor, landing_time: Tensor, tau: Tensor
) -> Tensor:
    """Density ratio q(x_tau | denoised) / q(x_tau | landing point), detached, shape (B,) (card eq. 9).

    "mean": the authors' exp of half the *mean* difference of squares, which is the d-th root of the ratio without its
    constant: nearly the same for all samples of a segment when d is large. "clipped_sum": the true ratio, clipped to
    [1/20, 20]; nearly all samples sit at a bound when d is large. "none": 1. Both are 1 where the landing time is 0.
    """
    if kind == "none":
        return torch.ones_like(tau)
    mixed = mixed_noise(process, eps_hat, noise, landing_time, tau)
    log_ratio = 0.5 * (flat_mean(noise.square()) - flat_mean(mixed.square()))
    if kind == "mean":
        return log_ratio.exp().detach()
    if kind == "clipped_sum":
        elements = noise[0].numel()
        log_ratio = elements * (log_ratio + 0.5 * beta_ratio(process, landing_time, tau).log())
        return log_ratio.clamp(-_LOG_IMPORTANCE_BOUND, _LOG_IMPORTANCE_BOUND).exp().detach()
    raise FewstepError(f"found importance {kind!r}, expected one of {IMPORTANCES}, fix: choose one of them")


def critic_loss(prediction: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Weighted mean square (B,) between denoised `prediction` and constant `target`; `weight` (B,)."""
    return weight * flat_mean((prediction - target.detach()).square())
