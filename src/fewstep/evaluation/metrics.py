"""Distances between two sets of samples. Pure functions on (N, D) float tensors; nothing is trained or downloaded."""

from __future__ import annotations

import torch
from torch import Tensor


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Fréchet distance of the Gaussians fitted to two sets of features, (N, D) and (M, D); float64.

    |mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) (Heusel et al. 2017). Biased upwards for small N:
    compare only figures of equal N.
    """
    a, b = a.double(), b.double()
    gap = (a.mean(0) - b.mean(0)).square().sum()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return float(gap + cov_a.trace() + cov_b.trace() - 2 * cross)


def precision_recall(real: Tensor, generated: Tensor, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019) with k-nearest-neighbour balls; features (N, D), (M, D).

    Precision: share of generated samples inside the real set's balls. Recall: the reverse. Equal N and M advised.
    """
    real, generated = real.double(), generated.double()

    def radii(x: Tensor) -> Tensor:
        return torch.cdist(x, x).kthvalue(k + 1, dim=1).values

    between = torch.cdist(real, generated)
    precision = (between <= radii(real)[:, None]).any(0).double().mean()
    recall = (between <= radii(generated)[None, :]).any(1).double().mean()
    return float(precision), float(recall)


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
