"""Distances between two sets of samples. Pure functions on (N, D) float tensors; nothing is trained or downloaded."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.errors import FewstepError


def frechet_distance(a: Tensor, b: Tensor, counts_a: Tensor | None = None, counts_b: Tensor | None = None) -> float:
    """Fréchet distance of the Gaussians fitted to two sets of features, (N, D) and (M, D); float64.

    |mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) (Heusel et al. 2017). Biased upwards for small N:
    compare only figures of equal N. `counts_a` (N,) and `counts_b` (M,) say how often each sample counts; once unless
    told.
    """
    mean_a, cov_a = _moments(a.double(), counts_a)
    mean_b, cov_b = _moments(b.double(), counts_b)
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)


def _moments(x: Tensor, counts: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean (D,) and unbiased covariance (D, D) of samples (N, D), each of which counts so often."""
    counts = x.new_ones(len(x)) if counts is None else counts.to(x)
    mean = counts @ x / counts.sum()
    centred = x - mean
    return mean, (centred * counts[:, None]).T @ centred / (counts.sum() - 1)


class KernelDistance:
    """Kernel distance of two sets of features, (N, D) and (M, D): the KID of Bińkowski et al. 2018.

    The unbiased squared maximum mean discrepancy with the kernel (x.y / D + 1)^3 over whole sets, not over random
    subsets; may be below zero. Kernels are computed once, in float64: N^2 + M^2 + NM numbers.
    """

    def __init__(self, a: Tensor, b: Tensor) -> None:
        a, b = a.double(), b.double()

        def kernel(x: Tensor, y: Tensor) -> Tensor:
            return (x @ y.T / x.shape[1] + 1) ** 3

        self._aa, self._bb, self._ab = kernel(a, a).fill_diagonal_(0), kernel(b, b).fill_diagonal_(0), kernel(a, b)

    def __call__(self, counts_a: Tensor | None = None, counts_b: Tensor | None = None) -> float:
        """The distance where each sample counts so often, (N,) and (M,); pairs of one sample with itself never do."""
        u = self._ab.new_ones(len(self._aa)) if counts_a is None else counts_a.to(self._ab)
        v = self._ab.new_ones(len(self._bb)) if counts_b is None else counts_b.to(self._ab)

        def within(k: Tensor, w: Tensor) -> Tensor:
            return w @ k @ w / (w.sum().square() - w.square().sum())

        return float(within(self._aa, u) + within(self._bb, v) - 2 * (u @ self._ab @ v) / (u.sum() * v.sum()))


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """`KernelDistance` of two sets of features, (N, D) and (M, D)."""
    return KernelDistance(a, b)()


@dataclass(frozen=True)
class Neighbours:
    """What nearest-neighbour balls say sample by sample; the means are the published figures."""

    precise: Tensor
    """(M,) of the generated: 1 where inside some ball of the real."""
    recalled: Tensor
    """(N,) of the real: 1 where inside some ball of the generated."""
    density: Tensor
    """(M,) of the generated: number of balls of the real it is in, over k; 0 or more, 1 in the mean for equal laws."""
    covered: Tensor
    """(N,) of the real: 1 where some generated sample is in its ball."""


def neighbours(real: Tensor, generated: Tensor, k: int = 3, k_density: int = 5) -> Neighbours:
    """Features (N, D) and (M, D) -> who lies in whose k-nearest-neighbour balls. Equal N and M advised.

    Precision and recall: Kynkäänniemi et al. 2019, k = 3. Density and coverage: Naeem et al. 2020, k = 5; they withstand
    single outliers, whose large balls count for all of precision.

    Raises:
        FewstepError: not more samples than neighbours.
    """
    if min(len(real), len(generated)) <= max(k, k_density):
        raise FewstepError(
            f"found {len(real)} and {len(generated)} samples, expected more than {max(k, k_density)} of each for "
            "nearest-neighbour balls, fix: raise --count"
        )
    real, generated = real.double(), generated.double()

    def radii(x: Tensor, k: int) -> Tensor:
        return torch.cdist(x, x).kthvalue(k + 1, dim=1).values

    between = torch.cdist(real, generated)
    inside, near = between <= radii(real, k)[:, None], between <= radii(real, k_density)[:, None]
    return Neighbours(
        precise=inside.any(0).double(),
        recalled=(between <= radii(generated, k)[None, :]).any(1).double(),
        density=near.double().sum(0) / k_density,
        covered=near.any(1).double(),
    )


def precision_recall(real: Tensor, generated: Tensor, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019) with k-nearest-neighbour balls; features (N, D), (M, D).

    Precision: share of generated samples inside the real set's balls. Recall: the reverse. Equal N and M advised.
    """
    found = neighbours(real, generated, k, k)
    return float(found.precise.mean()), float(found.recalled.mean())


def density_coverage(real: Tensor, generated: Tensor, k: int = 5) -> tuple[float, float]:
    """Density and coverage (Naeem et al. 2020); features (N, D), (M, D); see `neighbours`."""
    found = neighbours(real, generated, k, k)
    return float(found.density.mean()), float(found.covered.mean())


def spread(features: Tensor) -> Tensor:
    """Variety across seeds: (P, S, D), S samples of each of P prompts -> mean distance of two of them, (P,)."""
    seeds = features.shape[1]
    return torch.cdist(features.double(), features.double()).sum((1, 2)) / (seeds * (seeds - 1))


def sliced_wasserstein(a: Tensor, b: Tensor, projections: int = 256, seed: int = 0) -> float:
    """Sliced 2-Wasserstein distance of two sets of equal size, (N, D) each: root mean square over directions."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(projections, a.shape[1], generator=generator, dtype=torch.float64)
    directions = directions / directions.norm(dim=1, keepdim=True)
    gap = (a.double() @ directions.T).sort(0).values - (b.double() @ directions.T).sort(0).values
    return float(gap.square().mean().sqrt())


def mmd(a: Tensor, b: Tensor, bandwidths: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0)) -> float:
    """Unbiased squared maximum mean discrepancy with a sum of Gaussian kernels; (N, D), (M, D); may be below zero."""
    a, b = a.double(), b.double()

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        squared = torch.cdist(x, y).square()
        return sum((torch.exp(-squared / (2 * h * h)) for h in bandwidths), torch.zeros_like(squared))

    n, m = len(a), len(b)
    within_a = (kernel(a, a).sum() - n * len(bandwidths)) / (n * (n - 1))
    within_b = (kernel(b, b).sum() - m * len(bandwidths)) / (m * (m - 1))
    return float(within_a + within_b - 2 * kernel(a, b).mean())
