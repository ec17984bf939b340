"""The league on a mixture of eight unequal modes in the plane, whose law is known exactly; minutes on a CPU.

Nothing can be guided there, so guidance is off and methods that differ in it alone are one. The normaliser is off as
well, since its quotient has no variance in the plane, and the critic's error is that of velocity, which one small
network can serve at all noise levels (`evaluation.known_answers_mixture`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from fewstep.core import grids
from fewstep.core.guidance import Denoiser
from fewstep.core.process import DiscreteVP
from fewstep.core.rollout import Path as Trajectory
from fewstep.core.solvers import ddim
from fewstep.core.streams import Draw
from fewstep.core.tensors import Condition
from fewstep.evaluation.exact import MixtureTeacher
from fewstep.evaluation.known_answers_mixture import kept_share, mean_mmd, mixture_teacher
from fewstep.evaluation.known_answers_phased import Phases
from fewstep.evaluation.metrics import sliced_wasserstein
from fewstep.evaluation.toy import BulkDraw, MLPDiscriminator, ResidualMLP, distil
from fewstep.league.budget import PAIR_STEPS, phases, plan
from fewstep.league.cells import Cell, machine
from fewstep.league.entries import Entry, unguided
from fewstep.methods import Options, PhasedOptions
from fewstep.methods.base import STEPS, Batch, Loss, Method, Roles
from fewstep.models.experts import switch_times
from fewstep.training.networks import Networks

PLANE: dict[str, Any] = {"normaliser": "none", "critic_weight": "inverse_sigma", "margin": 0.02}
"""Options of every method that has them; see the module."""
RATES: dict[str, Any] = {"student_rate": 5e-4, "critic_rate": 2e-3, "discriminator_rate": 2e-3}
"""Of the known answers of mixtures."""


def the_teacher() -> MixtureTeacher:
    """Eight round modes of weights 1 to 4 on a circle, on the cosine process."""
    return mixture_teacher(DiscreteVP.cosine(), "ring of 8")


@dataclass(frozen=True)
class MixtureLeague:
    """Students of the exact mixture: small networks that begin as the teacher."""

    forwards: float
    """Network forwards of a training, for each place of the batch."""
    batch: int
    count: int
    """Samples of a score."""

    name: ClassVar[str] = "mixtures"

    @property
    def settings(self) -> dict[str, Any]:
        """The options of the command that decide the result."""
        return {name: getattr(self, name) for name in ("forwards", "batch", "count")}

    def options(self, entry: Entry, steps: int) -> Options | None:
        options: Any = entry.options(steps)
        if options is None:
            return None
        there = {option.name for option in fields(options)}
        return unguided(replace(options, **{name: value for name, value in PLANE.items() if name in there}))

    def run(self, cell: Cell, home: Path) -> dict[str, Any]:
        """A cell of seconds: interrupted, it is begun again."""
        bought, teacher = plan(cell.options, self.forwards, self.batch), the_teacher()
        pairs = Pairs(teacher, bought.pairs, cell.seed) if bought.pairs else None
        forwards, start = bought.pairs * PAIR_STEPS / self.batch, time.process_time()
        student: nn.Module | None = None
        for options in phases(cell.options):
            method = Counted(options.build())
            student = trained(method, teacher, student, bought.iterations, self.batch, cell.seed, pairs)
            forwards += method.forwards_spent / self.batch
        seconds = time.process_time() - start  # of this core: the machine may do other work, too
        assert student is not None
        scores = {
            str(steps): score(samples(student, teacher, cell.options, steps, self.count), teacher)
            for steps in cell.options.counts
        }
        return {
            "iterations": bought.iterations, "pairs": bought.pairs, "forwards": forwards, "seconds": seconds,
            "machine": machine(torch.device("cpu")), "scores": scores,
        }  # fmt: skip


def trained(
    method: Counted,
    teacher: MixtureTeacher,
    before: nn.Module | None,
    iterations: int,
    batch: int,
    seed: int,
    pairs: Pairs | None,
) -> nn.Module:
    """A student by `method`; where it trains a further phase, `before` makes the calls of the earlier ones."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student: nn.Module = ResidualMLP(teacher)
        critic, judge = ResidualMLP(teacher), MLPDiscriminator(teacher)
    options = method.options
    if before is not None:
        assert isinstance(options, PhasedOptions)
        switches = switch_times(options.time_grid(options.steps), options.ends)
        student = Phases(before, student, switches[options.phase - 2])
    distil(
        cast(Method, method),
        teacher,
        student,
        critic,
        iterations=iterations,
        batch=batch,
        seed=seed,
        discriminator=judge if method.needs.discriminator else None,
        real=teacher.sample if method.needs.real_data else None,
        pairs=pairs,
        average=min(0.99, max(0.0, 1 - 10 / iterations)),  # over the last tenth at most, however few there are
        **RATES,
    )
    return student


class Counted:
    """A method that counts the rows its networks are called with, as the logs of real runs do."""

    def __init__(self, method: Method) -> None:
        self._method = method
        self.options, self.needs, self.critic_updates = method.options, method.needs, method.critic_updates
        self.forwards_spent = 0
        """Single network forwards; guided calls count 2."""

    def rollout(self, batch: Batch, roles: Roles, draw: Draw) -> Trajectory:
        self._networks = Networks(roles, "fp32", torch.device("cpu"))
        return self._method.rollout(batch, self._networks, draw)

    def critic_loss(self, path: Trajectory, roles: Roles, draw: Draw) -> Loss:
        return self._counted(self._method.critic_loss(path, self._networks, draw))

    def student_loss(self, path: Trajectory, roles: Roles, draw: Draw) -> Loss:
        return self._counted(self._method.student_loss(path, self._networks, draw))

    def _counted(self, loss: Loss) -> Loss:
        self.forwards_spent += sum(self._networks.rows.values())
        self._networks.rows.clear()
        return loss


class Pairs:
    """Noise with what the teacher's own few-step sampler makes of it, `count` pairs used at random."""

    def __init__(self, teacher: MixtureTeacher, count: int, seed: int) -> None:
        self.noise = torch.randn(count, teacher.dimensions, generator=torch.Generator().manual_seed(seed))
        self.made = walked(teacher, teacher, self.noise, PAIR_STEPS)

    def __call__(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """`count` of them, noise and samples (count, d) each."""
        drawn = torch.randint(len(self.noise), (count,), generator=generator)
        return self.noise[drawn], self.made[drawn]


@torch.no_grad()
def walked(model: Denoiser, teacher: MixtureTeacher, noise: Tensor, steps: int) -> Tensor:
    """Samples (N, d) of the deterministic uniform path of `steps` calls from standard normal noise."""
    return ddim(model, noise * teacher.process.noise_scale, grids.uniform(steps), teacher.process, {})


@torch.no_grad()
def samples(student: nn.Module, teacher: MixtureTeacher, options: Options, steps: int, count: int) -> Tensor:
    """Samples (count, d) of a student with its own noise at each step."""
    draw = BulkDraw(count, torch.Generator().manual_seed(1))
    noise = draw.normal("noise", (teacher.dimensions,))
    told: Condition = {STEPS: torch.full((count,), float(steps))} if getattr(options, "steps_condition", False) else {}
    grid = grids.stack(torch.full((count,), steps), options.time_grid)
    fresh = lambda call, shape: draw.normal(f"extra {call}", shape)
    path = Trajectory(student, noise, grid, teacher.process, told, options.eta, fresh)
    return path.landing(torch.full((count,), steps - 1)).x


def score(made: Tensor, teacher: MixtureTeacher) -> dict[str, float]:
    """Sliced W2, squared MMD and the smallest share of a mode over its weight (1 is right), of samples (N, d)."""
    data = teacher.sample(len(made), torch.Generator().manual_seed(2))
    return {
        "sliced W2": sliced_wasserstein(made, data, 64),
        "MMD^2": mean_mmd(made, data, blocks=max(1, min(4, len(made) // 2000))),
        "smallest mode": kept_share(made, teacher),
    }


def references(count: int, steps: Sequence[int] = (1, 2, 4, 8, 50)) -> dict[str, dict[str, float]]:
    """Scores by name of the teacher's own sampler, and of the law itself, which is the floor at this count."""
    teacher = the_teacher()
    noise = torch.randn(count, teacher.dimensions, generator=torch.Generator().manual_seed(1))
    rows = {f"teacher, {n} step{'s' * (n > 1)}": score(walked(teacher, teacher, noise, n), teacher) for n in steps}
    return rows | {"the law itself": score(teacher.sample(count, torch.Generator().manual_seed(3)), teacher)}
