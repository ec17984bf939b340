"""The score-identity loss: Fisher divergence between noised laws, with gradient through teacher and critic.

The gap delta = real - fake of two denoised predictions is the gap of the two scores times sigma^2 / alpha. For the best
critic, E[delta^T fake] = E[delta^T sample], and so F = E|delta|^2 can be written in two ways, both of which estimate it
and whose gradients at a frozen critic differ (card sid_few_step.md, section 2):

    L1 = |delta|^2,    L2 = delta^T (real - sample),    loss = L2 - a L1.

Its value for the best critic is (1 - a) F: 0 for a = 1, and no measure of progress. Its gradient is half that of F for
a = 1/2, if the weight depends on the level alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from fewstep.core.process import Process
from fewstep.core.tensors import flat_mean
from fewstep.errors import FewstepError

FisherWeight = Literal["one", "alpha", "alpha_squared", "inverse_sigma", "inverse_sigma_squared", "root_snr", "snr"]
FISHER_WEIGHTS: tuple[str, ...] = get_args(FisherWeight)

_WEIGHTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "one": lambda alpha, sigma: torch.ones_like(sigma),
    "alpha": lambda alpha, sigma: alpha,  # SiD-DiT's 1 - sigma
    "alpha_squared": lambda alpha, sigma: alpha.square(),
    "inverse_sigma": lambda alpha, sigma: 1 / sigma,
    "inverse_sigma_squared": lambda alpha, sigma: 1 / sigma.square(),
    "root_snr": lambda alpha, sigma: alpha / sigma,
    "snr": lambda alpha, sigma: (alpha / sigma).square(),
}


def fisher_loss(sample: Tensor, real: Tensor, fake: Tensor, alpha: float) -> Tensor:
    """L2 - `alpha` L1 (B,), a mean over the elements of a sample; all (B, ...).

    `sample` is the student's, `real` and `fake` are teacher's and critic's predictions of it from its noised version.
    The gradient is meant to flow through all three, and to no parameters but the student's: see `handed_on`.
    """
    gap = real - fake
    return flat_mean(gap * (real - sample - alpha * gap))


def fisher_weight(kind: FisherWeight, process: Process, tau: Tensor) -> Tensor:
    """Weight (B,) of each sample's loss by its noise level; those of SiD-DiT, with alpha for a flow's 1 - sigma."""
    if kind not in _WEIGHTS:
        raise FewstepError(f"found Fisher weight {kind!r}, expected one of {FISHER_WEIGHTS}, fix: choose one of them")
    return _WEIGHTS[kind](process.alpha(tau), process.sigma(tau))


def handed_on(values: Tensor, sample: Tensor, origin: Tensor) -> Tensor:
    """`values` (B,) whose gradient reaches `origin` and nothing else.

    `sample` (B, ...) is the leaf from which the values were computed, `origin` the tensor it is a detached copy of.
    The backward pass through what lies between runs here, to the sample only: networks on the way get no gradients,
    whoever trains them. It runs on sums over elements, of the order of 1, for the sake of half precision.
    """
    (gradient,) = torch.autograd.grad(values.sum() * sample[0].numel(), sample)
    return values.detach() + flat_mean(gradient * (origin - origin.detach()))
