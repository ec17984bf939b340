"""Which divergence distribution matching descends: one weight per sample (f-distill, arXiv 2502.15681).

For D_f(p || q) = E_q f(p/q), p the teacher's law and q the student's at one noise level, the gradient is that of the
reverse KL with every sample weighted by h(r) = f''(r) r^2, r = p/q at the sample (card f_distill.md, section 2).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from fewstep.errors import FewstepError

Divergence = Literal[
    "reverse_kl",
    "softened_reverse_kl",
    "jensen_shannon",
    "squared_hellinger",
    "forward_kl",
    "jeffreys",
    "neyman",
    "pearson",
]
DIVERGENCES: tuple[str, ...] = get_args(Divergence)

_WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "reverse_kl": torch.ones_like,  # f = -log r
    "softened_reverse_kl": lambda r: 1 / (r + 1),  # f = (r + 1) log(1/2 + 1/(2r)): the non-saturating GAN's
    "jensen_shannon": lambda r: r / (r + 1),  # f = r log r - (r + 1) log((r + 1)/2)
    "squared_hellinger": lambda r: r.sqrt() / 4,  # f = 1 - sqrt r
    "forward_kl": lambda r: r,  # f = r log r
    "jeffreys": lambda r: 1 + r,  # f = (r - 1) log r
    "neyman": lambda r: 2 / r,  # f = (1 - r)^2 / r
    "pearson": lambda r: 2 * r.square(),  # f = (r - 1)^2
}


def divergence_weight(kind: Divergence, ratio: Tensor) -> Tensor:
    """h(r) of each sample, of the shape of `ratio` (> 0); 1 for the reverse KL."""
    if kind not in _WEIGHTS:
        raise FewstepError(f"found divergence {kind!r}, expected one of {DIVERGENCES}, fix: choose one of them")
    return _WEIGHTS[kind](ratio)


def clipped_ratio(log_ratio: Tensor, clip: tuple[float, float]) -> Tensor:
    """exp of `log_ratio` within `clip`, detached."""
    return log_ratio.detach().clamp(-10, 10).exp().clamp(*clip)


def mean_one_by_time(ratio: Tensor, tau: Tensor, bins: int) -> Tensor:
    """`ratio` (B,) over its mean among the samples whose `tau` (B,) is in the same of `bins` equal parts of [0, 1].

    Exact ratios have mean 1 under q at every time; estimated ones are brought there (f-distill's first stage). A sample
    alone in its bin gets 1: use few bins for small batches.
    """
    place = (tau * bins).long().clamp(0, bins - 1)
    total = ratio.new_zeros(bins).index_add(0, place, ratio)
    count = ratio.new_zeros(bins).index_add(0, place, torch.ones_like(ratio))
    return ratio / (total / count.clamp(min=1))[place]
