"""What networks predict, and its conversion to and from the denoised sample x0 (card tdm.md, 2.1).

With x = alpha x0 + sigma eps, at any alpha and sigma, not only on a variance-preserving process:

| kind   | network output      | denoised sample                                |
|--------|---------------------|------------------------------------------------|
| "eps"  | eps                 | (x - sigma eps) / alpha                        |
| "v"    | alpha eps - sigma x0| (alpha x - sigma v) / (alpha^2 + sigma^2)      |
| "flow" | eps - x0            | (x - sigma flow) / (alpha + sigma)             |
| "x0"   | x0                  | itself                                         |

"v" is not "flow". The two ends of the time axis: at sigma = 0 every kind but "x0" gives back x (there is nothing to
predict), and eps is *defined* as 0 there; at alpha = 0 "eps" says nothing about x0, and the result, kept finite by a
floor of 1e-6 under alpha, is meaningless: zero-terminal-SNR and flow processes need "v", "flow" or "x0" at t = 1.
"""

from __future__ import annotations

from torch import Tensor

from fewstep.core.tensors import expand
from fewstep.errors import FewstepError

PREDICTIONS = ("eps", "v", "flow", "x0")
_ALPHA_FLOOR = 1e-6


def to_denoised(kind: str, output: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Network `output` (B, ...) of the given kind at `x` (B, ...) as a denoised sample; `alpha`, `sigma` (B,)."""
    alpha, sigma = expand(alpha, x), expand(sigma, x)
    if kind == "eps":
        return (x - sigma * output) / alpha.clamp(min=_ALPHA_FLOOR)
    if kind == "v":
        return (alpha * x - sigma * output) / (alpha.square() + sigma.square())
    if kind == "flow":
        return (x - sigma * output) / (alpha + sigma)
    if kind == "x0":
        return output
    raise _unknown(kind)


def from_denoised(kind: str, denoised: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The network output of the given kind that means `denoised` (B, ...) at `x`: inverse of `to_denoised`."""
    if kind == "x0":
        return denoised
    eps = noise_in(x, denoised, alpha, sigma)
    if kind == "eps":
        return eps
    if kind == "v":
        return expand(alpha, x) * eps - expand(sigma, x) * denoised
    if kind == "flow":
        return eps - denoised
    raise _unknown(kind)


def noise_in(x: Tensor, denoised: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """eps = (x - alpha x0) / sigma (card eq. 2, left), and 0 where sigma is 0."""
    sigma = expand(sigma, x)
    clean = sigma == 0
    return ((x - expand(alpha, x) * denoised) / sigma.masked_fill(clean, 1)).masked_fill(clean, 0)


def _unknown(kind: str) -> FewstepError:
    return FewstepError(
        f"found prediction type {kind!r}, expected one of {PREDICTIONS}, "
        "fix: name what the network predicts, or let it return the denoised sample and use 'x0'"
    )
