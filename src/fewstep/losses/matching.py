"""Distribution matching as a regression: pull a sample along a direction.

The student's gradient is a difference of two scores, written as the difference of two denoised predictions
(card tdm.md, eq. 1). `match` turns such a direction into a loss whose gradient is that direction (eq. 6), optionally
through a pseudo-Huber metric (eq. 7) and divided by DMD's normaliser.

Legend: B samples, d elements per sample; all losses return (B,) and are means over the d elements, so that they do not
grow with the size of the latent.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from fewstep.core.tensors import flat_mean
from fewstep.errors import FewstepError

Normaliser = Literal["none", "dmd"]
Metric = Literal["l2", "huber_vector", "huber_elementwise"]
NORMALISERS: tuple[str, ...] = get_args(Normaliser)
METRICS: tuple[str, ...] = get_args(Metric)

_SMALLEST_NORMALISER = 1e-6  # in units of the data; reached only where student and teacher agree to rounding


def normaliser(kind: Normaliser, denoised: Tensor, toward: Tensor) -> Tensor:
    """The number by which each sample's matching loss is divided, detached, shape (B,).

    "dmd" is the mean absolute difference between the student's `denoised` and the guided teacher's `toward` (DMD eq. 8,
    card 3.4c): it makes the step size independent of how far the noise level lets the two differ. It is a mean over the
    elements of *one* sample; with one or two elements the quotient has infinite mean or variance, so use "none" there.
    "none" is 1.
    """
    if kind == "none":
        return torch.ones(denoised.shape[0], dtype=denoised.dtype, device=denoised.device)
    if kind == "dmd":
        distance = flat_mean((denoised.detach().double() - toward.detach().double()).abs())
        return distance.clamp(min=_SMALLEST_NORMALISER).to(denoised.dtype)
    raise FewstepError(f"found normaliser {kind!r}, expected one of {NORMALISERS}, fix: choose one of them")


def metric(kind: Metric, difference: Tensor, c: float) -> Tensor:
    """How far `difference` (B, ...) is from zero, shape (B,).

    - "l2": half the mean square; its gradient is the difference itself (over d).
    - "huber_vector": sqrt(mean square + c^2) - c, the paper's eq. 7 divided by sqrt(d), with its constant
      0.00054 sqrt(d) written as c = 0.00054 per element. No sample pulls with a norm above 1/sqrt(d), however far off.
    - "huber_elementwise": mean of sqrt(difference^2 + c^2) - c, as in the released code (c = 1e-3): close to L1.

    `c` is in units of the data, per element; "l2" does not read it.
    """
    if kind == "l2":
        return 0.5 * flat_mean(difference.square())
    if kind == "huber_vector":
        return (flat_mean(difference.square()) + c * c).sqrt() - c
    if kind == "huber_elementwise":
        return flat_mean((difference.square() + c * c).sqrt() - c)
    raise FewstepError(f"found metric {kind!r}, expected one of {METRICS}, fix: choose one of them")


def match(sample: Tensor, direction: Tensor, *, normaliser: Tensor, metric_kind: Metric, c: float) -> Tensor:
    """Loss (B,) that moves `sample` along `direction` (card eq. 6).

    The target sample + direction is a constant, so for "l2" the gradient with respect to `sample` is exactly
    -direction / (normaliser * d): a step of gradient *descent* moves the sample *along* the direction.
    `normaliser` is the (B,) tensor of the function of that name.
    """
    target = (sample + direction).detach()
    return metric(metric_kind, sample - target, c) / normaliser
