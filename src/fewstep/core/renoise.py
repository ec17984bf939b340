"""Forward noising from a point that is itself noisy."""

from __future__ import annotations

from torch import Tensor

from fewstep.core.process import Process
from fewstep.core.tensors import expand


def renoise(process: Process, x_s: Tensor, s: Tensor, tau: Tensor, noise: Tensor) -> Tensor:
    """x_tau = r x_s + beta n ~ q(x_tau | x_s), for tau >= s (card tdm.md, eq. 3).

    Not alpha_tau x0 + sigma_tau n from a denoised sample: the noise that x_s holds is kept. For s = 0 the two agree.

    Args:
        process: supplies r and beta (`Process.transition`).
        x_s: (B, ...) samples at time `s` (B,).
        tau: (B,) target times, none before its `s`.
        noise: standard normal of the shape of `x_s`.
    """
    r, beta = process.transition(s, tau)
    return expand(r, x_s) * x_s + expand(beta, x_s) * noise
