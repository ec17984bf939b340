"""Few-step SiD end to end on a Gaussian: the mixture of its steps gets the right covariance (card sid_few_step.md)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fewstep.core.process import Process
from fewstep.evaluation.answer import Answer, at_least, at_most
from fewstep.evaluation.exact import GaussianTeacher
from fewstep.evaluation.known_answers_training import gaussian_teacher
from fewstep.evaluation.toy import LinearStudent, PolynomialCritic, distil
from fewstep.methods.sid import SiD, SiDOptions

_ITERATIONS = {1: 500, 4: 1500}


def sid_gaussian(process: Process, steps: int) -> Iterator[Answer]:
    """The run with 1 or 4 `steps`, without guidance, of alpha = 1 and new noise at every step: a quarter of a minute.

    A linear critic knows of a mixture of centred Gaussians nothing but its mean covariance, so this is what must be
    right; the single calls divide it among themselves, and for K = 4 none but their mean is the data's, the last call's
    least of all (T8). A critic that told mixtures from Gaussians would say more about the single calls.
    """
    errors = sid_gaussian_errors(process, SiD(SiDOptions(steps=steps)))
    name = f"T8 Gaussian, {process.name}, K={steps}: covariance error of"
    yield at_most(f"{name} the mixture of steps", errors[-1], 0.05)
    if steps > 1:
        yield at_least(f"{name} the worst step (as the card says)", max(errors[:-1]), 0.1)


def sid_gaussian_errors(process: Process, method: SiD) -> list[float]:
    """Relative errors (Frobenius) of the trained student's covariances: of every step, then of their mixture."""
    o = method.options
    teacher, grid = gaussian_teacher(process), o.time_grid(o.steps)
    student = LinearStudent(teacher, {o.steps: grid})
    critic = PolynomialCritic(teacher, {4: torch.linspace(1, 0, 5, dtype=torch.float64)}, terms=5)
    one = o.steps == 1
    distil(
        method,
        teacher,
        student,
        critic,
        iterations=_ITERATIONS[o.steps],
        batch=1024 if one else 512,
        student_rate=4e-3 if one else 2e-3,
        critic_rate=0.02,
    )
    laws = clean_covariances(teacher, student, grid)
    right = teacher.moments(0.0)[1]
    return [float((law - right).norm() / right.norm()) for law in (*laws, torch.stack(laws).mean(0))]


@torch.no_grad()
def clean_covariances(teacher: GaussianTeacher, student: LinearStudent, grid: Tensor) -> list[Tensor]:
    """Covariance (d, d) of the clean prediction of every call of a linear student with new noise at every step."""
    process, basis = teacher.process, torch.eye(teacher.dimensions)
    law, laws = basis, []
    for t_from, t_to in zip(grid[:-1], grid[1:], strict=True):
        matrix = student(basis, t_from.expand(len(basis)), {})
        laws.append(matrix.T @ law @ matrix)
        law = (process.alpha(t_to).square() * laws[-1] + process.sigma(t_to).square() * basis).to(basis)
    return laws
