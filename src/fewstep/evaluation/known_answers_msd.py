"""MSD's known answers: what parts of the conditions are worth, and where teacher score matching ends.

Item numbers are those of the card `msd.md`, section 8. What trains a part's student after that is one of the other
methods, whose answers are beside these.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor

from fewstep.core.guidance import Denoiser
from fewstep.core.process import Process
from fewstep.core.rollout import Path
from fewstep.evaluation.answer import Answer, at_least, at_most
from fewstep.evaluation.known_answers_roles import RANK, Network, NetworkBackbone
from fewstep.evaluation.known_answers_training import gaussian_teacher
from fewstep.evaluation.toy import alternate
from fewstep.methods.tsm import TSM, TSMOptions
from fewstep.models.backbone import Backbone
from fewstep.models.roles import Kind, build_roles
from fewstep.models.router import contiguous_split


def affine_error(conditions: Tensor, part: Tensor) -> float:
    """Mean square error of the best a y + b for y^2, with an a and a b for each part; `conditions`, `part` (N,)."""
    error = torch.zeros_like(conditions)
    for number in part.unique():
        y = conditions[part == number]
        features = torch.stack([y, torch.ones_like(y)], 1)
        fit = torch.linalg.lstsq(features, y.square()[:, None]).solution
        error[part == number] = y.square() - (features @ fit)[:, 0]
    return float(error.square().mean())


def evenly(count: int) -> Tensor:
    """`count` conditions in [0, 1], (count,) float64."""
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


def parts_of_conditions() -> Iterator[Answer]:
    """Item 3: students affine in a condition y whose samples have mean y^2 err by 1 / (180 K^4) in K contiguous parts.

    In random parts each student has as hard a task as one for all, and nothing is gained: that must be seen, too.
    """
    y = evenly(40_000)
    for parts in (1, 2, 4, 8):
        error = affine_error(y, contiguous_split(y[:, None], parts).part(y[:, None]))
        name = f"msd 8.3 {parts} contiguous parts: error over 1 / (180 K^4), distance from 1"
        yield at_most(name, abs(180 * parts**4 * error - 1), 1e-3)
    y = evenly(1000)
    part = contiguous_split(y[:, None], 4).part(y[:, None])
    shuffled = part[torch.randperm(1000, generator=torch.Generator().manual_seed(0))]
    gain = affine_error(y, shuffled) / affine_error(y, torch.zeros_like(part))
    yield at_least("msd 8.3 4 random parts: error over that of one student (as the card says)", gain, 0.95)


def imitation(process: Process, kind: Kind, iterations: int = 400) -> Iterator[Answer]:
    """Item 5: teacher score matching, through the real roles, brings a network that was moved away back to the teacher.

    On an 8-dimensional Gaussian: covariance of its own 4 deterministic steps against that of the teacher's, within 5 %.
    """
    law, options = gaussian_teacher(process), TSMOptions(weight="one")  # others tell a flow little near pure noise
    network = Network(law, law, torch.linspace(1, 0, 5, dtype=torch.float64))
    roles = build_roles(cast(Backbone, NetworkBackbone(network, process)), kind, rank=RANK, critic=False)
    student, generator = roles.student_parameters(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in student:
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    trained = {"params": student, "lr": 5e-3}
    alternate(TSM(options), roles, trained, [], dimensions=law.dimensions, iterations=iterations, batch=512)
    grid = options.time_grid(options.steps)
    right, found = (_sampled(model, grid, process, law.dimensions) for model in (roles.teacher, roles.student))
    error = float((found - right).norm() / right.norm())
    yield at_most(f"msd 8.5 teacher score matching through {kind}, {process.name}: covariance error", error, 0.05)


@torch.no_grad()
def _sampled(model: Denoiser, grid: Tensor, process: Process, dimensions: int) -> Tensor:
    """Covariance (d, d) of what a linear denoiser samples without fresh noise."""
    path = Path(model, torch.eye(dimensions), grid, process, {})
    matrix = path.landing(torch.full((dimensions,), len(grid) - 2)).x  # row i: where the i-th basis vector is taken
    return matrix.T @ matrix
