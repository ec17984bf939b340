"""Samplers with one signature, and the one deterministic step that they and the training rollout share.

`SOLVERS[name](model, x, grid, process, condition, ...)` starts from `x` (B, ...) at grid[0] (for pure noise n that is
`process.noise_scale * n`), makes its calls along `grid` (K+1,) (see `core.grids`) and returns the sample at t = 0.
`model` is any denoiser; wrap `core.guidance.guided` for a guided one. All take `callback(k, x, denoised)`, called after
step k with the state it landed on. Nothing here touches the autograd mode: use `torch.no_grad()` to sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor

from fewstep.core.guidance import Denoiser
from fewstep.core.prediction import noise_in
from fewstep.core.process import Process
from fewstep.core.tensors import Condition, at_least_float32, expand
from fewstep.errors import FewstepError

Noise = Callable[[int, Sequence[int]], Tensor]
"""noise(k, shape of one sample) -> (B, *shape) standard normal for step k, such as a `Draw.normal` named by k."""
Callback = Callable[[int, Tensor, Tensor], None]


def land(process: Process, denoised: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """alpha_t denoised + sigma_t eps (card tdm.md, eq. 2, right); `t` (B,)."""
    return expand(process.alpha(t), denoised) * denoised + expand(process.sigma(t), denoised) * eps


def noise_at(process: Process, x: Tensor, denoised: Tensor, t: Tensor) -> Tensor:
    """The eps that `x` (B, ...) at time `t` (B,) holds beside `denoised` (card eq. 2, left)."""
    return noise_in(x, denoised, process.alpha(t), process.sigma(t))


def mix_noise(eps: Tensor, fresh: Tensor, eta: float) -> Tensor:
    """eta eps + sqrt(1 - eta^2) n' (card 2.8, from Video-BLADE): eta 1 keeps eps, eta 0 replaces it."""
    if not 0 <= eta <= 1:
        raise FewstepError(f"found eta = {eta}, expected a number in [0, 1], fix: 1 is deterministic, 0.9 is usual")
    return eta * eps + math.sqrt(1 - eta * eta) * fresh


def fresh_noise(noise: Noise | None, k: int, x: Tensor) -> Tensor:
    """The fresh noise of step k for `x` (B, ...), in its dtype and on its device.

    Raises:
        FewstepError: there is no source of noise, or it does not give one number per element of `x`.
    """
    if noise is None:
        raise FewstepError(
            "found a stochastic sampler without noise, expected noise(k, shape), fix: pass noise=... or use 'ddim'"
        )
    fresh = noise(k, x.shape[1:])
    if fresh.shape != x.shape:
        raise FewstepError(
            f"found noise of shape {tuple(fresh.shape)} for samples of shape {tuple(x.shape)}, expected the same, "
            "fix: noise(k, shape) is given the shape of one sample and adds the batch axis"
        )
    return fresh.to(x)


def ddim_step(process: Process, x: Tensor, denoised: Tensor, t_from: Tensor, t_to: Tensor) -> Tensor:
    """The deterministic step of card eq. 2: DDIM with its own eta 0; on a flow process the Euler step.

    Args:
        process: the noising process.
        x: (B, ...) at time `t_from` (B,), where `denoised` was predicted.
        t_to: (B,) time to land on. At 0 the result is `denoised`.
    """
    return land(process, denoised, noise_at(process, x, denoised, t_from), t_to)


def ddim(
    model: Denoiser,
    x: Tensor,
    grid: Tensor,
    process: Process,
    condition: Condition,
    *,
    eta: float = 1.0,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """K calls of `ddim_step`; on a flow process Euler's method.

    `eta` in [0, 1] is the share of the predicted noise that is kept (`mix_noise`): 1, the default, is deterministic.
    It is not the eta of the DDIM paper. Below 1 it needs `noise`.
    """
    for k, t_from, t_to in _steps(x, grid):
        denoised = model(x, t_from, condition)
        eps = noise_at(process, x, denoised, t_from)
        if eta != 1:
            eps = mix_noise(eps, fresh_noise(noise, k, x), eta)
        x = land(process, denoised, eps, t_to)
        if callback:
            callback(k, x, denoised)
    return x


def lcm(
    model: Denoiser,
    x: Tensor,
    grid: Tensor,
    process: Process,
    condition: Condition,
    *,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Stochastic multistep sampling of consistency models and DMD2: predict, then renoise with fresh noise; K calls."""
    return ddim(model, x, grid, process, condition, eta=0.0, noise=noise, callback=callback)


def heun(
    model: Denoiser,
    x: Tensor,
    grid: Tensor,
    process: Process,
    condition: Condition,
    *,
    callback: Callback | None = None,
) -> Tensor:
    """Heun's second-order method, 2K - 1 calls (the last step is an Euler step).

    Every process is brought to flow coordinates, y = x / (alpha + sigma) over u = sigma / (alpha + sigma), where the
    velocity is eps - x0 and nothing is singular at either end. On a flow process this is diffusers' FlowMatchHeun.
    """
    for k, t_from, t_to in _steps(x, grid):
        denoised = model(x, t_from, condition)
        velocity = noise_at(process, x, denoised, t_from) - denoised
        landed = ddim_step(process, x, denoised, t_from, t_to)
        if k < len(grid) - 2:
            ahead = model(landed, t_to, condition)
            velocity = (velocity + noise_at(process, landed, ahead, t_to) - ahead) / 2
            y, u_from, scale_to, u_to = _flow_coordinates(process, x, t_from, t_to)
            landed = scale_to * (y + (u_to - u_from) * velocity)
        x = landed
        if callback:
            callback(k, x, denoised)
    return x


def dpmpp_2m(
    model: Denoiser,
    x: Tensor,
    grid: Tensor,
    process: Process,
    condition: Condition,
    *,
    callback: Callback | None = None,
) -> Tensor:
    """DPM-Solver++(2M), midpoint form (arXiv 2211.01095, algorithm 2), K calls; first and last step are of order 1.

    Equal to diffusers' DPMSolverMultistep with solver_order 2 and final_sigmas_type "zero".
    """
    log_snr = _half_log_snr(process, grid)
    previous: Tensor | None = None
    for k, t_from, t_to in _steps(x, grid):
        denoised = model(x, t_from, condition)
        ahead = denoised
        if previous is not None and k < len(grid) - 2:
            ratio = (log_snr[k + 1] - log_snr[k]) / (log_snr[k] - log_snr[k - 1])
            ahead = denoised + ratio / 2 * (denoised - previous)
        x = ddim_step(process, x, ahead, t_from, t_to)
        previous = denoised
        if callback:
            callback(k, x, denoised)
    return x


SOLVERS: dict[str, Callable[..., Tensor]] = {"ddim": ddim, "heun": heun, "dpmpp_2m": dpmpp_2m, "lcm": lcm}


def _steps(x: Tensor, grid: Tensor) -> list[tuple[int, Tensor, Tensor]]:
    """(k, grid[k], grid[k+1]) with the times as (B,) on the device of `x`."""
    times = grid.to(device=x.device, dtype=at_least_float32(x.dtype)).unsqueeze(1).expand(-1, len(x))
    return [(k, times[k], times[k + 1]) for k in range(len(grid) - 1)]


def _flow_coordinates(
    process: Process, x: Tensor, t_from: Tensor, t_to: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y and u at `t_from`, then alpha + sigma and u at `t_to`, ready to be combined with `x`."""
    sigma_from, sigma_to = process.sigma(t_from), process.sigma(t_to)
    scale_from, scale_to = process.alpha(t_from) + sigma_from, process.alpha(t_to) + sigma_to
    u_from, u_to = expand(sigma_from / scale_from, x), expand(sigma_to / scale_to, x)
    return x / expand(scale_from, x), u_from, expand(scale_to, x), u_to


def _half_log_snr(process: Process, grid: Tensor) -> list[float]:
    """log(alpha / sigma) along the grid as floats; -inf at alpha = 0, +inf at the end."""
    times = grid.double()
    return (process.alpha(times).log() - process.sigma(times).log()).tolist()
