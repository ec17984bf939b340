"""Teachers whose denoised prediction is known in closed form at every noise level.

A mixture of Gaussians stays one under any process, so the posterior mean of the clean sample, the samples and every
marginal are exact. These are the known answers of the methods' tests; they are denoisers like any other:
`teacher(x (B, d), t (B,), condition) -> denoised (B, d)`, one "network call" each.

Legend: B batch, M components, d dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fewstep.core.prediction import from_denoised, to_denoised
from fewstep.core.process import Process
from fewstep.core.tensors import Condition
from fewstep.errors import FewstepError

LABEL = "label"  # condition key: (B,) integers, the class of a sample
NULL_LABEL = -1  # the unconditional law: all classes together


class MixtureTeacher:
    """Exact denoiser of p(x0) = sum_m weights_m N(means_m, covariances_m), diffused by `process`.

    `classes` (M,) gives each component a class; a condition {"label": (B,)} then restricts a sample's law to the
    components of its class, and label -1 means all of them, as the empty prompt does. Weights need not sum to one.
    The dtype of `means` is the dtype of everything this teacher returns.
    """

    def __init__(
        self,
        process: Process,
        weights: Tensor,
        means: Tensor,
        covariances: Tensor,
        classes: Sequence[int] | None = None,
    ) -> None:
        count, dimensions = means.shape
        if weights.shape != (count,) or covariances.shape != (count, dimensions, dimensions):
            raise FewstepError(
                f"found weights {tuple(weights.shape)}, means {tuple(means.shape)} and covariances "
                f"{tuple(covariances.shape)}, expected (M,), (M, d) and (M, d, d), fix: give one of each per component"
            )
        self.process = process
        self.weights = weights / weights.sum()
        self.means = means
        self.covariances = covariances
        self.classes = None if classes is None else torch.as_tensor(classes)
        self._variances, self._axes = torch.linalg.eigh(covariances)  # (M, d), (M, d, d): columns are directions

    @property
    def dimensions(self) -> int:
        return self.means.shape[1]

    def __call__(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self.denoise(x, t, condition)

    def denoise(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """E[x0 | x_t = x], shape (B, d).

        The posterior-weighted mean of mu + alpha Sigma C^-1 (x - alpha mu) with C = alpha^2 Sigma + sigma^2 I.
        """
        alpha, variance, offset = self._components(x, t)
        share = (_log_normal(offset, variance) + self._log_weights(condition, len(x))).softmax(-1)
        correction = torch.einsum("bme,mde->bmd", alpha * self._variances / variance * offset, self._axes)
        return torch.einsum("bm,bmd->bd", share, self.means + correction)

    def log_density(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """log p(x_t = x), shape (B,), up to the constant -d/2 log 2 pi; of classes, up to the log of their weight."""
        _, variance, offset = self._components(x, t)
        return (_log_normal(offset, variance) + self._log_weights(condition, len(x))).logsumexp(-1)

    def _components(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """alpha (B, 1, 1), and of each component, along its own axes: variance and offset of x, (B, M, d)."""
        alpha = self.process.alpha(t).to(x.dtype)[:, None, None]
        sigma = self.process.sigma(t).to(x.dtype)[:, None, None]
        variance = alpha.square() * self._variances + sigma.square()
        offset = torch.einsum("bmd,mde->bme", x[:, None] - alpha * self.means, self._axes)
        return alpha, variance, offset

    def _log_weights(self, condition: Condition, batch: int) -> Tensor:
        log_weights = self.weights.log().expand(batch, -1)
        if self.classes is None or LABEL not in condition:
            return log_weights
        label = condition[LABEL][:, None]
        return log_weights.masked_fill((label != self.classes) & (label != NULL_LABEL), -torch.inf)

    def null(self, condition: Condition) -> Condition:
        """The same batch with the unconditional label."""
        if LABEL not in condition:
            return condition
        return condition | {LABEL: torch.full_like(condition[LABEL], NULL_LABEL)}

    def sample(self, count: int, generator: torch.Generator, label: int = NULL_LABEL) -> Tensor:
        """`count` clean samples (count, d) of the whole law, or of one class."""
        weights = self.weights
        if label != NULL_LABEL and self.classes is not None:
            weights = weights * (self.classes == label)
        component = torch.multinomial(weights, count, replacement=True, generator=generator)
        noise = torch.randn(count, self.dimensions, generator=generator, dtype=self.means.dtype)
        spread = (self._axes * self._variances.sqrt()[:, None])[component]  # (count, d, d)
        return self.means[component] + torch.einsum("nde,ne->nd", spread, noise)

    def marginal(self, t: float) -> tuple[Tensor, Tensor, Tensor]:
        """The law at time t: weights (M,), means alpha mu (M, d), covariances alpha^2 Sigma + sigma^2 I (M, d, d)."""
        time = torch.tensor([t], dtype=torch.float64)
        alpha, sigma = float(self.process.alpha(time)), float(self.process.sigma(time))
        identity = torch.eye(self.dimensions, dtype=self.means.dtype)
        return self.weights, alpha * self.means, alpha**2 * self.covariances + sigma**2 * identity

    def moments(self, t: float) -> tuple[Tensor, Tensor]:
        """Mean (d,) and covariance (d, d) of the whole law at time t."""
        weights, means, covariances = self.marginal(t)
        mean = weights @ means
        offset = means - mean
        between = torch.einsum("m,md,me->de", weights, offset, offset)
        return mean, between + torch.einsum("m,mde->de", weights, covariances)


class GaussianTeacher(MixtureTeacher):
    """Exact denoiser of N(mean (d,), covariance (d, d)): affine in x at every time."""

    def __init__(self, process: Process, mean: Tensor, covariance: Tensor) -> None:
        super().__init__(process, torch.ones(1, dtype=mean.dtype), mean[None], covariance[None])


def _log_normal(offset: Tensor, variance: Tensor) -> Tensor:
    """Log density (..., ) of independent normals (..., d), up to a constant."""
    return -0.5 * (offset.square() / variance + variance.log()).sum(-1)


class PredictingAs:
    """A teacher that speaks `kind` ("eps", "v", "flow" or "x0") as a network would, read back as a denoiser.

    `network` is what such a model outputs; calling the object converts it to the denoised prediction, which must be the
    wrapped teacher's own up to rounding.
    """

    def __init__(self, teacher: MixtureTeacher, kind: str) -> None:
        self.teacher = teacher
        self.process = teacher.process
        self.kind = kind

    def null(self, condition: Condition) -> Condition:
        return self.teacher.null(condition)

    def network(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        alpha, sigma = self._scales(x, t)
        return from_denoised(self.kind, self.teacher(x, t, condition), x, alpha, sigma)

    def __call__(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        alpha, sigma = self._scales(x, t)
        return to_denoised(self.kind, self.network(x, t, condition), x, alpha, sigma)

    def _scales(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.process.alpha(t).to(x.dtype), self.process.sigma(t).to(x.dtype)


def ring(process: Process, weights: Sequence[float], radius: float, std: float, dtype: torch.dtype) -> MixtureTeacher:
    """Equal round modes in the plane, evenly spaced on a circle, with the given weights; classes 0, 1, 0, 1, ..."""
    count = len(weights)
    angle = torch.arange(count, dtype=dtype) * (2 * torch.pi / count)
    means = radius * torch.stack([angle.cos(), angle.sin()], dim=1)
    covariances = (std**2 * torch.eye(2, dtype=dtype)).expand(count, 2, 2)
    classes = [index % 2 for index in range(count)]
    return MixtureTeacher(process, torch.tensor(weights, dtype=dtype), means, covariances, classes)


def square_grid(process: Process, side: int, spacing: float, std: float, dtype: torch.dtype) -> MixtureTeacher:
    """side x side equal round modes in the plane, centred, with unequal weights 1, 2, 3, 1, 2, 3, ..."""
    axis = (torch.arange(side, dtype=dtype) - (side - 1) / 2) * spacing
    means = torch.cartesian_prod(axis, axis)
    covariances = (std**2 * torch.eye(2, dtype=dtype)).expand(side * side, 2, 2)
    weights = 1.0 + torch.arange(side * side) % 3
    return MixtureTeacher(process, weights.to(dtype), means, covariances)
