"""A method in one file, outside the package: each step of the student imitates several steps of its guided teacher.

    python examples/own_method.py [ITERATIONS]      # writes runs/own-method

Progressive distillation (Salimans and Ho, arXiv 2202.00512) in one go, on the student's own path: where a call of the
student lands is pulled to where the teacher's DDIM gets from the same input in `substeps` steps. No critic, no data. A
regression to a deterministic target, so it blurs where few steps cannot tell what the teacher can; TDM does not.

In Python the options go to `fewstep.distill` as they are. For the command line, name `imitation` in the pyproject.toml
of your package: [project.entry-points."fewstep.methods"], imitation = "my_package.own_method:imitation".
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

import fewstep
from fewstep.core import grids
from fewstep.core.guidance import guided
from fewstep.core.rollout import Path
from fewstep.core.solvers import ddim_step
from fewstep.core.streams import Draw
from fewstep.core.tensors import flat_mean
from fewstep.errors import FewstepError
from fewstep.methods.base import Batch, ChainNoise, Loss, Needs, Roles, spread_metrics
from fewstep.training.options import TrainOptions


@dataclass(frozen=True)
class ImitationOptions:
    """Settings; each is an option of the command line."""

    steps: int = 4
    """Network calls of the student, 1 or more."""
    substeps: int = 4
    """Steps of the teacher within one of the student's, 1 or more."""
    guidance_scale: float = 3.5
    """Of the teacher, 0 or more; 1 means none."""

    eta: ClassVar[float] = 1.0  # the student is sampled without fresh noise
    chain_noise: ClassVar[ChainNoise] = "fresh"

    @property
    def counts(self) -> tuple[int, ...]:
        """The step counts that the student is for."""
        return (self.steps,)

    def time_grid(self, steps: int) -> Tensor:
        """The K+1 times of the student's calls, float64."""
        return grids.shifted(steps, 1.0)

    def validate(self) -> None:
        if min(self.steps, self.substeps) < 1 or self.guidance_scale < 0:
            raise FewstepError(f"found {self}, expected steps and substeps of 1 or more, guidance_scale of 0 or more")

    def build(self) -> Imitation:
        return Imitation(self)


class Imitation:
    """The method: what of a path it needs, and the loss of its landing points."""

    name: ClassVar[str] = "imitation"
    title: ClassVar[str] = "Imitation of the teacher's steps"
    paper: ClassVar[str] = "arXiv 2202.00512, on the student's path"
    needs = Needs()
    critic_updates = 0

    def __init__(self, options: ImitationOptions) -> None:
        options.validate()
        self.options = options

    def forwards(self, steps: int | None = None) -> float:
        """Half of the path in the mean, the call with gradient, and the teacher's; a guided one counts 2."""
        o = self.options
        return ((steps or o.steps) - 1) / 2 + 1 + o.substeps * (1 if o.guidance_scale == 1 else 2)

    def rollout(self, batch: Batch, roles: Roles, draw: Draw) -> Path:
        noise = draw.normal("noise", batch.noise_shape, batch.dtype, batch.samples.device)
        return Path(roles.student, noise, self.options.time_grid(self.options.steps), roles.process, batch.condition)

    def critic_loss(self, path: Path, roles: Roles, draw: Draw) -> Loss:
        """There is no critic."""
        raise NotImplementedError

    def student_loss(self, path: Path, roles: Roles, draw: Draw) -> Loss:
        call = draw.integers("call", path.steps)  # (B,) which of its calls each sample is judged by
        landing = path.land(roles.student, call)  # the only call with gradient
        target = self._teacher_landing(path, roles, call)
        values = 0.5 * flat_mean((landing.x - target).square())  # (B,)
        return Loss(values, {"student_loss": values.detach().mean(), **spread_metrics(landing.denoised)})

    @torch.no_grad()
    def _teacher_landing(self, path: Path, roles: Roles, call: Tensor) -> Tensor:
        """(B, ...) where the guided teacher gets from the input of `call`, at the time where the student lands."""
        o, x, (start, end) = self.options, path.input(call), path.times(call)
        null, t = roles.null(path.condition), start
        for step in range(1, o.substeps + 1):
            to = torch.lerp(start, end, step / o.substeps)
            denoised = guided(roles.teacher, x, t, path.condition, null, o.guidance_scale)
            x, t = ddim_step(path.process, x, denoised, t, to), to
        return x


def imitation() -> ImitationOptions:
    """Each step imitates several of the guided teacher's; no critic, no data."""
    return ImitationOptions()


if __name__ == "__main__":
    iterations = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    told = TrainOptions(iterations=iterations, batch=16, warmup=min(10, iterations))
    student = fewstep.distill("emoji", replace(imitation(), substeps=2), out="runs/own-method", train_options=told)
    print(f"a student of {max(student.grids)} steps in runs/own-method/student")
