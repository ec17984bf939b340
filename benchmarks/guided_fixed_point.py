"""Where guided matching rests and guided sampling ends, in closed form: `python benchmarks/guided_fixed_point.py`.

One dimension, flow process. With a prompt the data are N(1, 0.3^2), without one N(0, 1.09); all laws stay Gaussian and
the guided denoiser is linear, so nothing is trained or drawn. For every landing time of a K-step student it prints mean
and standard deviation of

- guided sampling: the ODE of the guided denoiser from N(0, 1) at t = 1, in many steps;
- guided TDM: the law at which the expected pull of guided teacher minus exact critic vanishes, tau uniform in the
  segment. "0" is a collapse: the pull is inwards however narrow the law is.
"""

from __future__ import annotations

import argparse
import math

import torch
from torch import Tensor

MEAN, TOLD, UNTOLD = 1.0, 0.09, 1.09
"""Mean and variance with a prompt; variance without."""


def guided_lines(t: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Slope G and offset H of the guided score -G x + H at times t."""
    alpha, sigma = 1 - t, t
    told = alpha.square() * TOLD + sigma.square()
    untold = alpha.square() * UNTOLD + sigma.square()
    return scale / told - (scale - 1) / untold, scale * alpha * MEAN / told


def sampled(times: list[float], scale: float, steps: int) -> dict[float, tuple[float, float]]:
    """Mean and std of the guided ODE's law at `times`, by midpoint steps; x(t) = gain n + shift for noise n."""
    grid = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    gain, shift, found = 1.0, 0.0, {1.0: (0.0, 1.0)}
    for start, end in zip(grid[:-1].tolist(), grid[1:].tolist(), strict=True):
        middle = torch.tensor((start + end) / 2, dtype=torch.float64)
        slope, offset = (float(v) for v in guided_lines(middle, scale))
        # flow: dx/dt = -(x + t score) / (1 - t), with score = -slope x + offset
        a = -(1 - float(middle) * slope) / (1 - float(middle))
        b = -float(middle) * offset / (1 - float(middle))
        factor = math.exp(a * (end - start))
        shift = shift * factor + b * (factor - 1) / a
        gain *= factor
        found[round(end, 9)] = (shift, abs(gain))
    return {t: found[round(t, 9)] for t in times}


def matched(low: float, high: float, scale: float, points: int = 4000) -> tuple[float, float]:
    """Mean and std at which guided TDM rests at the landing time `low` of the segment up to `high`."""
    tau = torch.linspace(low, high, points + 2, dtype=torch.float64)[1:-1]
    ratio = (1 - tau) / (1 - low)
    added = tau.square() - ratio.square() * low**2  # variance that renoising adds
    slope, offset = guided_lines(tau, scale)
    to_denoised = tau.square() / (1 - tau)
    mean = float((to_denoised * offset).sum() / (to_denoised * slope * ratio).sum())

    def inward(variance: float) -> float:
        critic = 1 / (ratio.square() * variance + added)
        return float((to_denoised * ratio * (slope - critic)).sum())

    narrow, wide = 1e-12, 10.0
    if inward(narrow) > 0:
        return mean, 0.0
    for _ in range(200):
        middle = math.sqrt(narrow * wide)
        narrow, wide = (narrow, middle) if inward(middle) > 0 else (middle, wide)
    return mean, math.sqrt(wide)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scales", type=float, nargs="*", default=[1.0, 2.0, 3.5, 5.0])
    parser.add_argument("--steps", type=int, nargs="*", default=[1, 2, 4, 8])
    args = parser.parse_args()
    print("last landing point, mean / std\n")
    print("| guidance | guided sampling | " + " | ".join(f"TDM, K = {steps}" for steps in args.steps) + " |")
    print("|---" * (len(args.steps) + 2) + "|")
    for scale in args.scales:
        ends = [sampled([0.0], scale, 4000)[0.0], *(matched(0.0, 1 / steps, scale) for steps in args.steps)]
        print(f"| {scale:g} | " + " | ".join(f"{mean:.3f} / {std:.3f}" for mean, std in ends) + " |")
    print("\nall landing points at K = 4, guidance 3.5, mean / std\n")
    print("| t | guided sampling | TDM |\n|---|---|---|")
    times = [0.75, 0.5, 0.25, 0.0]
    laws = sampled(times, 3.5, 4000)
    for t in times:
        mean, std = matched(t, t + 0.25, 3.5)
        print(f"| {t:g} | {laws[t][0]:.3f} / {laws[t][1]:.3f} | {mean:.3f} / {std:.3f} |")


if __name__ == "__main__":
    main()
