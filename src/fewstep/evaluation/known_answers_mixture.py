"""Mixtures in the plane: small networks as student and critic, samples against samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from fewstep.core.guidance import Denoiser
from fewstep.core.process import Process
from fewstep.core.solvers import ddim
from fewstep.core.tensors import Condition
from fewstep.evaluation.answer import Answer, at_least, at_most
from fewstep.evaluation.exact import LABEL, MixtureTeacher, ring, square_grid
from fewstep.evaluation.metrics import mmd, sliced_wasserstein
from fewstep.evaluation.toy import BulkDraw, ResidualMLP, ToyRoles, distil
from fewstep.methods.base import STEPS, Batch
from fewstep.methods.tdm import TDM
from fewstep.methods.tdm_options import TDMOptions

_SAMPLES = 100_000
_BATCH = 1024
_COUNTS = (1, 2, 4, 8)
Conditions = Callable[[torch.Generator], Condition]


def mixture_teacher(process: Process, name: str) -> MixtureTeacher:
    """Eight modes of weights 1 to 4 on a circle, or 25 of weights 1 to 3 on a grid; all round, four to five apart."""
    if name == "ring of 8":
        return ring(process, [1, 2, 3, 4, 1, 2, 3, 4], radius=1.5, std=0.28, dtype=torch.float32)
    return square_grid(process, side=5, spacing=0.8, std=0.16, dtype=torch.float32)


def mixture_options(**changes: object) -> TDMOptions:
    """Settings of these runs: no normaliser, whose quotient has no variance in the plane.

    The loss is on the landing point, which weighs the calls near pure noise by how little they move it; the critic's by
    the error of velocity, which one network can serve at all noise levels.
    """
    settings: dict[str, object] = {
        "guidance_scale": 1.0,
        "normaliser": "none",
        "loss_on": "landing",
        "critic_weight": "inverse_sigma",
        "margin": 0.02,
    }
    return TDMOptions(**(settings | changes))  # type: ignore[arg-type]


def start_of(teacher: MixtureTeacher) -> tuple[ResidualMLP, ResidualMLP]:
    """Student and critic, both at the teacher."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ResidualMLP(teacher), ResidualMLP(teacher)


def train(
    teacher: MixtureTeacher,
    student: ResidualMLP,
    critic: ResidualMLP,
    options: TDMOptions,
    iterations: int,
    condition: Conditions | None = None,
) -> None:
    """Alternating training at the rates that suit these networks."""
    distil(
        TDM(options),
        teacher,
        student,
        critic,
        iterations=iterations,
        batch=_BATCH,
        student_rate=5e-4,
        critic_rate=2e-3,
        average=0.99,
        condition=condition,
    )


@torch.no_grad()
def walked(model: Denoiser, teacher: MixtureTeacher, options: TDMOptions, steps: int) -> Tensor:
    """Samples (N, 2) of the deterministic K-step path of a student or of the teacher itself."""
    noise = torch.randn(_SAMPLES, 2, generator=torch.Generator().manual_seed(1))
    told = {STEPS: torch.full((_SAMPLES,), float(steps))} if options.steps_condition else {}
    return ddim(model, noise, options.time_grid(steps), teacher.process, told)


def mean_mmd(a: Tensor, b: Tensor, blocks: int = 8, size: int = 2000) -> float:
    """Squared MMD, averaged over disjoint blocks of samples."""
    pairs = zip(a.split(size)[:blocks], b.split(size)[:blocks], strict=True)
    return sum(mmd(x, y) for x, y in pairs) / blocks


def kept_share(samples: Tensor, teacher: MixtureTeacher) -> float:
    """The smallest mode's share of samples relative to its weight; 1 is right, 0 a lost mode."""
    nearest = torch.cdist(samples, teacher.means).argmin(1)
    share = torch.bincount(nearest, minlength=len(teacher.means)) / len(samples)
    return float((share / teacher.weights).min())


def mixture(process: Process, name: str, iterations: int = 1200) -> Iterator[Answer]:
    """The 4-step student is closer to the data than the teacher's own 8-step DDIM, and keeps every mode."""
    teacher, options = mixture_teacher(process, name), mixture_options()
    student, critic = start_of(teacher)
    train(teacher, student, critic, options, iterations)
    data = teacher.sample(_SAMPLES, torch.Generator().manual_seed(2))
    own, rival = walked(student, teacher, options, 4), walked(teacher, teacher, options, 8)
    title = f"{name}, {process.name}, 4 steps against the teacher's 8"
    yield at_most(f"{title}: sliced W2", sliced_wasserstein(own, data, 64), sliced_wasserstein(rival, data, 64))
    yield at_most(f"{title}: MMD^2", mean_mmd(own, data), mean_mmd(rival, data))
    yield at_least(f"{name}, {process.name}, 4 steps: smallest share of a mode", kept_share(own, teacher), 0.5)


def steps_aware_mixture(process: Process, iterations: int = 2500) -> Iterator[Answer]:
    """TDM-unify on the ring: one network, told K, against the teacher's DDIM at every K."""
    teacher = mixture_teacher(process, "ring of 8")
    options = mixture_options(step_counts=_COUNTS, steps_condition=True)
    student, critic = start_of(teacher)
    train(teacher, student, critic, options, iterations)
    data = teacher.sample(_SAMPLES, torch.Generator().manual_seed(2))
    for steps in _COUNTS:
        own, rival = (walked(model, teacher, options, steps) for model in (student, teacher))
        title = f"8.2-10 steps-aware ring, {process.name}, K={steps} against the teacher's {steps}: sliced W2"
        yield at_most(title, sliced_wasserstein(own, data, 64), sliced_wasserstein(rival, data, 64))


def two_classes(process: Process) -> MixtureTeacher:
    """Two modes to the left, class 0, and two to the right, class 1."""
    means = torch.tensor([[-1.5, 0.0], [-0.5, 1.0], [1.5, 0.0], [1.0, -1.0]])
    covariances = (0.3**2 * torch.eye(2)).expand(4, 2, 2)
    return MixtureTeacher(process, torch.tensor([1.0, 2.0, 2.0, 3.0]), means, covariances, classes=[0, 0, 1, 1])


def guided_mixture(process: Process, iterations: int = 800) -> Iterator[Answer]:
    """Item 12: with guidance 2.5 the student comes to rest where teacher and critic agree on average.

    The guided field is no diffusion's score, so nothing is claimed about the law that is reached.
    """
    options = mixture_options(guidance_scale=2.5)
    teacher = two_classes(process)
    student, critic = start_of(teacher)
    before = mean_direction(teacher, student, critic, options)

    def labels(generator: torch.Generator) -> Condition:
        return {LABEL: torch.randint(0, 2, (_BATCH,), generator=generator)}

    train(teacher, student, critic, options, iterations, labels)
    after = mean_direction(teacher, student, critic, options)
    yield at_most(
        f"12 guided two classes, {process.name}: mean direction against a fifth of its start", after, before / 5
    )


def mean_direction(
    teacher: MixtureTeacher, student: ResidualMLP, critic: ResidualMLP, options: TDMOptions, count: int = 20_000
) -> float:
    """Length of the mean of (guided teacher - critic) over class 0: the gradient of a constant added to the student."""
    shift = torch.zeros(2, requires_grad=True)
    method = TDM(replace(options, loss_on="denoised", normaliser="none"))
    shifted = ToyRoles(teacher, lambda x, t, told: student(x, t, told) + shift, critic)
    draw = BulkDraw(count, torch.Generator().manual_seed(3))
    batch = Batch({LABEL: torch.zeros(count, dtype=torch.long)}, torch.arange(count), (2,))
    loss = method.student_loss(method.rollout(batch, shifted, draw), shifted, draw).values.mean()
    return float(2 * torch.autograd.grad(loss, shift)[0].norm())
