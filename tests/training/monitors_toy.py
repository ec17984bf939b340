"""Toy runs with bad batches, for the tests of monitors to call and for torchrun to start."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import training_toy as toy
from torch import Tensor

from fewstep.training.loop import Hooks, TrainResult, train

BAD = (7, 8, 9)
"""Iterations whose batches are NaN: the third in a row is rolled back."""


def bad_data(iteration: int, samples: Tensor) -> dict[str, Tensor]:
    told = toy.toy_data(iteration, samples)
    return {"mean": told["mean"] * torch.nan} if iteration in BAD else told


def run(
    out: Path, data: Any = bad_data, resume: bool = False, hooks: Hooks | None = None, **changes: Any
) -> TrainResult:
    torch.set_num_threads(1)
    options = toy.toy_options(**{"on_alarm": "act", "schedule": "constant", "log_every": 1, **changes})
    roles = toy.ToyRoles(dtype=torch.float64)
    shape = (toy.DIMENSIONS,)
    return train(toy.ToyMethod(), roles, data, options, out, hooks, noise_shape=shape, resume=resume)


if __name__ == "__main__":
    run(Path(sys.argv[1]))
