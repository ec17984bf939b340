"""Distances between two sets of samples. Pure functions on (N, D) float tensors; nothing is trained or downloaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.errors import FewstepError

K_DENSITY = 5
"""Neighbours of density and coverage."""
KERNEL_PART = 2000
"""Most samples of a part of `KernelDistance`."""
ROWS = 2048
"""Rows of a matrix of distances that are in memory at a time."""


def frechet_distance(a: Tensor, b: Tensor, counts_a: Tensor | None = None, counts_b: Tensor | None = None) -> float:
    """Fréchet distance of the Gaussians fitted to two sets of features, (N, D) and (M, D); float64.

    |mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) (Heusel et al. 2017). Biased upwards for small N:
    compare only figures of equal N. `counts_a` (N,) and `counts_b` (M,) say how often each sample counts; once unless
    told.
    """
    (mean_a, a), (mean_b, b) = _centred(a.double(), counts_a), _centred(b.double(), counts_b)
    if min(len(a), len(b)) < a.shape[1]:
        cross = torch.linalg.svdvals(a @ b.T).sum()  # the same number; cheaper for few samples
    else:
        values, vectors = torch.linalg.eigh(a.T @ a)
        root = vectors * values.clamp(min=0).sqrt() @ vectors.T
        cross = torch.linalg.eigvalsh(root @ (b.T @ b) @ root).clamp(min=0).sqrt().sum()
    return float((mean_a - mean_b).square().sum() + a.square().sum() + b.square().sum() - 2 * cross)


def _centred(x: Tensor, counts: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean (D,) of samples (N, D), each of which counts so often, and a root R (N, D) of their covariance: R^T R."""
    counts = x.new_ones(len(x)) if counts is None else counts.to(x)
    mean = counts @ x / counts.sum()
    return mean, (x - mean) * (counts / (counts.sum() - 1)).sqrt()[:, None]


class KernelDistance:
    """Kernel distance of two sets of features, (N, D) and (M, D): the KID of Bińkowski et al. 2018.

    The unbiased squared maximum mean discrepancy with the kernel (x.y / D + 1)^3; may be below zero. Not over random
    subsets but over whole sets, or the mean of disjoint parts of at most 2000, which is unbiased as well and keeps
    memory at 96 kB a sample. Kernels are computed once, in float64.

    Where both sets are of the same prompts, samples of one prompt are alike, also across the sets; that alone would
    make the distance negative. `prompts`, (N,) and (M,), says which sample is of which, and pairs of one prompt are
    left out of all three means: unbiased again.
    """

    def __init__(self, a: Tensor, b: Tensor, prompts: tuple[Tensor, Tensor] | None = None) -> None:
        self._count = -(-max(len(a), len(b)) // KERNEL_PART)
        self._kernels = []
        of_a, of_b = prompts or (torch.arange(len(a)), torch.arange(len(a), len(a) + len(b)))
        for x, y, p, q in zip(*(self._split(t) for t in (a.double(), b.double(), of_a, of_b)), strict=True):
            masks = [(u[:, None] != v).double() for u, v in ((p, p), (q, q), (p, q))]
            found = [(x @ y.T / x.shape[1] + 1) ** 3 for x, y in ((x, x), (y, y), (x, y))]
            self._kernels.append([(k * mask, mask) for k, mask in zip(found, masks, strict=True)])
        self._sizes = len(a), len(b)

    def __call__(self, counts_a: Tensor | None = None, counts_b: Tensor | None = None) -> float:
        """The distance where each sample counts so often, (N,) and (M,); pairs of one sample with itself never do."""
        counts_a = torch.ones(self._sizes[0]) if counts_a is None else counts_a
        counts_b = torch.ones(self._sizes[1]) if counts_b is None else counts_b
        parts = zip(self._kernels, self._split(counts_a.double()), self._split(counts_b.double()), strict=True)
        found = []
        for kernels, u, v in parts:
            aa, bb, ab = (
                x @ k @ y / (x @ mask @ y) for (k, mask), x, y in zip(kernels, (u, v, u), (u, v, v), strict=True)
            )
            found.append(aa + bb - 2 * ab)
        return float(sum(found) / len(found))

    def _split(self, x: Tensor) -> Sequence[Tensor]:
        return x.tensor_split(self._count)


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


def neighbours(real: Tensor, generated: Tensor, k: int = 3, k_density: int = K_DENSITY) -> Neighbours:
    """Features (N, D) and (M, D) -> who lies in whose k-nearest-neighbour balls. Equal N and M advised.

    Precision and recall: Kynkäänniemi et al. 2019, k = 3. Density and coverage: Naeem et al. 2020, k = 5; they
    withstand single outliers, whose large balls count for all of precision.

    Raises:
        FewstepError: not more samples than neighbours.
    """
    if min(len(real), len(generated)) <= max(k, k_density):
        raise FewstepError(
            f"found {len(real)} and {len(generated)} samples, expected more than {max(k, k_density)} of each for "
            "nearest-neighbour balls, fix: raise --count"
        )
    real, generated = real.double(), generated.double()

    def radii(x: Tensor) -> tuple[Tensor, Tensor]:
        most = max(k, k_density) + 1
        near = torch.cat([torch.cdist(part, x).topk(most, largest=False).values for part in x.split(ROWS)])
        return near[:, k], near[:, k_density]  # the nearest is the sample itself

    (of_real, density_balls), (of_generated, _) = radii(real), radii(generated)
    precise, density = torch.zeros(len(generated), dtype=torch.bool), torch.zeros(len(generated), dtype=torch.float64)
    recalled, covered = [], []
    for rows in torch.arange(len(real)).split(ROWS):
        between = torch.cdist(real[rows], generated)
        near = between <= density_balls[rows, None]
        precise |= (between <= of_real[rows, None]).any(0)
        density += near.sum(0) / k_density
        recalled.append((between <= of_generated).any(1))
        covered.append(near.any(1))
    return Neighbours(precise.double(), torch.cat(recalled).double(), density, torch.cat(covered).double())


def precision_recall(real: Tensor, generated: Tensor, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019) with k-nearest-neighbour balls; features (N, D), (M, D).

    Precision: share of generated samples inside the real set's balls. Recall: the reverse. Equal N and M advised.
    """
    found = neighbours(real, generated, k, k)
    return float(found.precise.mean()), float(found.recalled.mean())


def density_coverage(real: Tensor, generated: Tensor, k: int = K_DENSITY) -> tuple[float, float]:
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
