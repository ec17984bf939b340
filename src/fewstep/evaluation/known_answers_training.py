"""Card 8.3: alternating training end to end, on a Gaussian whose every right answer is a covariance matrix."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fewstep.core.guidance import Denoiser
from fewstep.core.process import Process
from fewstep.core.rollout import Path
from fewstep.core.tensors import Condition
from fewstep.evaluation.answer import Answer, at_least, at_most
from fewstep.evaluation.exact import GaussianTeacher
from fewstep.evaluation.toy import LinearStudent, PolynomialCritic, distil
from fewstep.losses.critic import CriticTarget
from fewstep.methods.base import STEPS
from fewstep.methods.tdm import TDM
from fewstep.methods.tdm_options import TDMOptions

_DIMENSIONS = 8
_ITERATIONS = {1: 800, 2: 1200, 4: 2000, 8: 2000}
_COUNTS = (1, 2, 4, 8)


def gaussian_teacher(process: Process) -> GaussianTeacher:
    """Zero mean, 8 dimensions, eigenvalues 0.1 to 4 (geometric) along random axes."""
    generator = torch.Generator().manual_seed(0)
    axes, _ = torch.linalg.qr(torch.randn(_DIMENSIONS, _DIMENSIONS, generator=generator, dtype=torch.float64))
    variances = torch.logspace(-1, 0.60206, _DIMENSIONS, dtype=torch.float64)
    return GaussianTeacher(process, torch.zeros(_DIMENSIONS), ((axes * variances) @ axes.T).float())


def gaussian_options(steps: int, target: CriticTarget) -> TDMOptions:
    """Settings of the reference runs.

    At K = 8, the last segments of range "separate" hold so little noise that their scores hardly tell large variances
    apart, and training is slow; "to_T" with a critic that is told the landing point is not.
    """
    wide = steps == 8
    return TDMOptions(
        steps=steps,
        critic_target=target,
        guidance_scale=1.0,
        tau_range="to_T" if wide else "separate",
        critic_call_condition=wide,
    )


def trained(
    process: Process, method: TDM, iterations: int, *, batch: int = 1024, critic_rate: float = 0.02
) -> tuple[GaussianTeacher, LinearStudent]:
    """Teacher and student after alternating training by `method`; students start as the teacher's own sampler."""
    o = method.options
    teacher = gaussian_teacher(process)
    grids = {steps: o.time_grid(steps) for steps in o.counts}
    student = LinearStudent(teacher, grids)
    wide = o.tau_range == "to_T"
    critic = PolynomialCritic(teacher, grids, terms=8 if wide else 6, to_top=wide)
    distil(
        method, teacher, student, critic, iterations=iterations, batch=batch, student_rate=4e-3, critic_rate=critic_rate
    )
    return teacher, student


@torch.no_grad()
def covariance_errors(teacher: GaussianTeacher, student: Denoiser, grid: Tensor, told: Condition) -> list[float]:
    """Relative Frobenius error of the covariance at each landing, noise to data; exact, since the student is linear."""
    path = Path(student, torch.eye(_DIMENSIONS), grid, teacher.process, told)
    errors = []
    for call, time in enumerate(grid[1:].tolist()):
        matrix = path.landing(torch.full((_DIMENSIONS,), call)).x  # row i: where the i-th basis vector is taken
        right = teacher.moments(time)[1]
        errors.append(float((matrix.T @ matrix - right).norm() / right.norm()))
    return errors


def gaussian(process: Process, steps: int, target: CriticTarget) -> Iterator[Answer]:
    """The reference run of card 8.3 for one cell of its table."""
    method = TDM(gaussian_options(steps, target))
    yield from gaussian_answers(process, method, _ITERATIONS[steps], batch=2048 if steps == 8 else 1024)


def gaussian_answers(process: Process, method: TDM, iterations: int, **settings: Any) -> Iterator[Answer]:
    """Covariance within 5 % at the last boundary for both critic targets, and at every boundary for the exact one.

    With the published target the other boundaries are over-dispersed, as the card's table has it. `settings` go to
    `trained`.
    """
    teacher, student = trained(process, method, iterations, **settings)
    steps, target = method.options.steps, method.options.critic_target
    errors = covariance_errors(teacher, student, method.options.time_grid(steps), {})
    name = f"8.3 Gaussian, {process.name}, K={steps}, {target} target: covariance error"
    yield at_most(f"{name}, last boundary", errors[-1], 0.05)
    if steps > 1 and target == "exact":
        yield at_most(f"{name}, worst of the others", max(errors[:-1]), 0.05)
    if steps > 1 and target == "denoised":
        yield at_least(f"{name}, worst of the others (as the card says)", max(errors[:-1]), 0.1)


def steps_aware_gaussian(process: Process) -> Iterator[Answer]:
    """TDM-unify: one student, told K, against the teacher's own DDIM at every K."""
    options = replace(gaussian_options(8, "exact"), steps=4, step_counts=_COUNTS, steps_condition=True)
    teacher, student = trained(process, TDM(options), iterations=1200)
    for steps in _COUNTS:
        grid = options.time_grid(steps)
        start = LinearStudent(teacher, {steps: grid})  # is the teacher's own sampler
        ddim = covariance_errors(teacher, start, grid, {})[-1]
        told = {STEPS: torch.full((_DIMENSIONS,), float(steps))}
        error = covariance_errors(teacher, student, grid, told)[-1]
        name = f"8.2-10 steps-aware Gaussian, {process.name}, K={steps}: covariance error against half the DDIM's"
        yield at_most(name, error, ddim / 2)
