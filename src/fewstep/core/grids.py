"""Time grids of K steps: float64 tensors (K+1,) that fall from the start (1 unless told) to exactly 0.

Call k of a sampler is made at grid[k] and lands on grid[k+1]. On a discrete process with N levels, time t is index
t N - 1: `uniform(4)` is 999, 749, 499, 249 for N = 1000, the "trailing" spacing of diffusers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fewstep.core.process import VE, DiscreteVP, Process
from fewstep.errors import FewstepError


def shift_time(u: Tensor, shift: float) -> Tensor:
    """shift u / (1 + (shift - 1) u): for shift > 1, more of [0, 1] is spent at high noise (SD3)."""
    return shift * u / (1 + (shift - 1) * u)


def unshift_time(t: Tensor, shift: float) -> Tensor:
    """Inverse of `shift_time`."""
    return t / (shift - (shift - 1) * t)


def uniform(steps: int, start: float = 1.0) -> Tensor:
    """Equal steps from `start` in (0, 1] to 0: start (K - k) / K."""
    if steps < 1:
        raise FewstepError(f"found steps = {steps}, expected at least 1, fix: ask for 1 to 8 steps")
    return validated(start * torch.arange(steps, -1, -1, dtype=torch.float64) / steps)


def shifted(steps: int, shift: float, start: float = 1.0) -> Tensor:
    """`uniform(steps, start)` through `shift_time`; shift 1 leaves it as it is."""
    if shift <= 0:
        raise FewstepError(f"found shift = {shift}, expected a number above 0, fix: 1 means no shift, 3 is usual")
    return validated(shift_time(uniform(steps, start), shift))


def explicit(values: Sequence[float], num_indices: int | None = None) -> Tensor:
    """A grid written out: times in (0, 1], or indices in [0, N) when `num_indices` N is given; 0 is appended.

    `explicit([999, 856, 665, 399], 1000)` equals `shifted(4, 2.0)` but for rounding. A last time of exactly 0 may be
    written out too.
    """
    grid = torch.tensor(list(values), dtype=torch.float64)
    if num_indices is not None:
        grid = (grid + 1) / num_indices
    if grid.numel() and grid[-1] != 0:
        grid = torch.cat([grid, grid.new_zeros(1)])
    return validated(grid)


def from_scheduler(scheduler: Any, steps: int, process: Process, **set_timesteps: Any) -> Tensor:
    """The grid a diffusers scheduler uses for `steps` steps; the scheduler is left set to them.

    Flow and VE processes are read from `scheduler.sigmas`, discrete ones from `scheduler.timesteps`, which may be
    fractional. The last step goes to 0 whatever the scheduler's own last level is (`set_alpha_to_one`,
    `final_sigmas_type`). `set_timesteps` is handed on to it (such as mu).
    """
    scheduler.set_timesteps(steps, **set_timesteps)
    if isinstance(process, DiscreteVP):
        return explicit(scheduler.timesteps.tolist(), process.num_steps)
    sigmas = torch.as_tensor(scheduler.sigmas, dtype=torch.float64)
    return explicit((process.time_of(sigmas) if isinstance(process, VE) else sigmas).tolist())


def stack(steps: Tensor, grid_of: Callable[[int], Tensor]) -> Tensor:
    """Per-sample grids (B, Kmax+1) for `steps` (B,) long, each row `grid_of(K)` followed by zeros."""
    counts, row_of = steps.unique(return_inverse=True)
    rows = torch.zeros(len(counts), int(counts.max()) + 1, dtype=torch.float64)
    for row, count in zip(rows, counts.tolist(), strict=True):
        row[: count + 1] = grid_of(count)
    return rows[row_of]


def validated(grid: Tensor) -> Tensor:
    """`grid` itself if it is (K+1,) with K >= 1, falls strictly, starts at most at 1 and ends at 0."""
    good = grid.ndim == 1 and len(grid) > 1 and bool((grid.diff() < 0).all()) and 0 < grid[0] <= 1 and grid[-1] == 0
    if not good:
        raise FewstepError(
            f"found the time grid {[round(value, 6) for value in grid.flatten().tolist()]}, expected strictly falling "
            "times in (0, 1] and a final 0, fix: write indices together with the number of training steps"
        )
    return grid
