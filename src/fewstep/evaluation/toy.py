"""Small roles and a bare training loop, with which the known answers exercise the real methods in seconds.

The students and critics here are as expressive as the known answer needs and start at the teacher, as copies of a
network would. The loop is the methods' algorithm box without anything a real run needs (that is `fewstep.training`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.core.guidance import Denoiser
from fewstep.core.process import Process
from fewstep.core.rollout import Path
from fewstep.core.solvers import noise_at
from fewstep.core.streams import Draw
from fewstep.core.tensors import Condition, expand
from fewstep.evaluation.exact import MixtureTeacher, PredictingAs
from fewstep.methods.base import LANDING, STEPS, Batch, Loss, Method, Roles

RealSamples = Callable[[int, torch.Generator], Tensor]
"""real(count, generator) -> clean samples (count, d), such as a teacher's `sample`."""
PairSamples = Callable[[int, torch.Generator], tuple[Tensor, Tensor]]
"""pairs(count, generator) -> standard normal noise and the teacher's samples from it, (count, d) each."""
Group = dict[str, Any]
"""A parameter group of an optimiser: "params" and "lr"."""


class ToyRoles:
    """An exact teacher, or one read through a network's output, with any two denoisers as student and critic.

    `discriminator`(x, t, condition) -> logits (B, heads), for methods that need one.
    """

    def __init__(
        self,
        teacher: MixtureTeacher | PredictingAs,
        student: Denoiser,
        critic: Denoiser,
        discriminator: Denoiser | None = None,
    ) -> None:
        self.process = teacher.process
        self.teacher = teacher
        self.student = student
        self.critic = critic
        self.discriminates = discriminator is not None
        if discriminator is not None:
            self.discriminator = discriminator

    def log_ratio(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self.discriminator(x, t, condition).flatten(1).mean(1)

    def null(self, condition: Condition) -> Condition:
        return self.teacher.null(condition)


class BulkDraw(Draw):
    """The interface of `core.streams.Draw` from one generator: fast, but not reproducible per sample.

    Every call gives new numbers, whatever its name.
    """

    def __init__(self, count: int, generator: torch.Generator) -> None:
        super().__init__((), range(count))
        self._count = count
        self._generator = generator

    def sub(self, name: str | int) -> BulkDraw:
        return self

    def normal(
        self,
        name: str,
        shape: Sequence[int],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        return torch.randn(self._count, *shape, generator=self._generator, dtype=dtype).to(device)

    def uniform(self, name: str) -> Tensor:
        return torch.rand(self._count, generator=self._generator, dtype=torch.float64)

    def integers(self, name: str, high: int | Tensor) -> Tensor:
        return (self.uniform(name) * torch.as_tensor(high)).floor().long()

    def common(self, name: str) -> float:
        return float(torch.rand((), generator=self._generator))


class LinearStudent(nn.Module):
    """One matrix per call, x -> x W, starting at the (zero-mean Gaussian) teacher's own denoiser at that time.

    `grids` gives the times of each step count; if the condition "steps" is there, it says which of them is meant.
    """

    def __init__(self, teacher: MixtureTeacher, grids: dict[int, Tensor]) -> None:
        super().__init__()
        calls = [(steps, float(time)) for steps, grid in grids.items() for time in grid[:-1]]
        self.counts = torch.tensor([float(steps) for steps, _ in calls])
        self.times = torch.tensor([time for _, time in calls], dtype=torch.float64)
        d = teacher.dimensions
        basis = torch.eye(d, dtype=teacher.means.dtype).repeat(len(calls), 1)
        self.weight = nn.Parameter(teacher(basis, self.times.repeat_interleave(d), {}))  # (calls d, d)

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        mismatch = (t[:, None] - self.times).abs()  # (B, calls)
        if STEPS in condition:
            mismatch = mismatch + (condition[STEPS][:, None] - self.counts).abs()
        return _tabled(x, mismatch.argmin(1), len(self.times)) @ self.weight


class PolynomialCritic(nn.Module):
    """x -> x P(tau) with P a matrix polynomial (Chebyshev) per segment, starting at the (zero-mean Gaussian) teacher.

    Up to its degree, the exact denoiser of the renoised landing points of a linear student has this form. The segment
    is found from tau, or, where the condition "landing" is there, from that; and from "steps" likewise. `to_top`: the
    polynomial of a segment reaches to the start of its grid (tau range "to_T"), not to the time of its call.
    `from_zero`: it begins at time 0 and not at the landing time, for clean predictions matched at all levels (DMD2).
    """

    def __init__(
        self,
        teacher: MixtureTeacher,
        grids: dict[int, Tensor],
        terms: int = 6,
        to_top: bool = False,
        from_zero: bool = False,
    ) -> None:
        super().__init__()
        self.counts = torch.tensor([float(steps) for steps, grid in grids.items() for _ in grid[1:]])
        self.low = torch.cat([grid[1:] for grid in grids.values()])
        self.high = torch.cat([grid[:-1] for grid in grids.values()])
        self.top = torch.cat([grid[:1].expand(len(grid) - 1) if to_top else grid[:-1] for grid in grids.values()])
        self.bottom = torch.zeros_like(self.low) if from_zero else self.low
        self.terms = terms
        self.weight = nn.Parameter(self._interpolated(teacher))

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self.features(x, t, condition) @ self.weight

    def features(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """x (B, d) times every polynomial of its segment, zeros for the others: (B, segments terms d)."""
        time = condition.get(LANDING, t)[:, None]
        mismatch = (time.clamp(self.low, self.low if LANDING in condition else self.high) - time).abs()  # (B, segments)
        if STEPS in condition:
            mismatch = mismatch + (condition[STEPS][:, None] - self.counts).abs()
        segment = mismatch.argmin(1)
        low, top = self.bottom[segment], self.top[segment]
        powers = chebyshev((2 * t - low - top) / (top - low), self.terms).to(x.dtype)  # (B, terms)
        features = (powers[:, :, None] * x[:, None]).flatten(1)  # (B, terms d)
        return _tabled(features, segment, len(self.low))

    def _interpolated(self, teacher: MixtureTeacher) -> Tensor:
        """The coefficients (segments terms d, d) that equal the teacher at the Chebyshev nodes of every segment."""
        d = teacher.dimensions
        nodes = torch.cos(torch.pi * (torch.arange(self.terms, dtype=torch.float64) + 0.5) / self.terms)
        times = (self.bottom[:, None] + self.top[:, None]) / 2 + (self.top - self.bottom)[:, None] / 2 * nodes
        basis = torch.eye(d, dtype=teacher.means.dtype).repeat(times.numel(), 1)
        values = teacher(basis, times.flatten().repeat_interleave(d), {}).view(*times.shape, d * d)
        return (torch.linalg.inv(chebyshev(nodes, self.terms)).to(values.dtype) @ values).reshape(-1, d)


class ResidualMLP(nn.Module):
    """The teacher's own denoised prediction plus a small network's correction, which starts at zero.

    The network sees x, time, log2 of the condition "steps" and the condition "landing" where they are given.
    """

    def __init__(self, teacher: MixtureTeacher, width: int = 128, depth: int = 3) -> None:
        super().__init__()
        self.teacher = teacher
        self.register_buffer("frequencies", torch.pi * 2.0 ** torch.arange(4))
        d = teacher.dimensions
        features = 3 * d + 3 * (1 + 2 * 4)
        sizes = [features] + [width] * depth
        layers = [layer for a, b in itertools.pairwise(sizes) for layer in (nn.Linear(a, b), nn.SiLU())]
        self.network = nn.Sequential(*layers, nn.Linear(width, 2 * d))
        nn.init.zeros_(self.network[-1].weight)
        nn.init.zeros_(self.network[-1].bias)

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        absent = torch.zeros_like(t)
        steps = condition[STEPS].log2() / 3 if STEPS in condition else absent
        numbers = torch.stack([t, steps, condition.get(LANDING, absent)], 1).to(x.dtype)  # (B, 3)
        angles = (numbers[:, :, None] * self.frequencies).flatten(1)
        start = self.teacher(x, t, condition)
        eps = noise_at(self.teacher.process, x, start, t)
        noise = expand(self.teacher.process.sigma(t), x) * eps
        gain, offset = self.network(torch.cat([x, start, eps, numbers, angles.sin(), angles.cos()], 1)).chunk(2, 1)
        return start + gain * noise + offset


class LogisticDiscriminator(nn.Module):
    """A logit (B, 1) quadratic in x whose coefficients are polynomials (Chebyshev) of tau in [0, 1]; 0 at first.

    The exact log ratio of two Gaussians, renoised, is quadratic in x at every tau. x is read in units of the
    standard deviation that N(0, `variance`) has there.
    """

    def __init__(self, process: Process, dimensions: int, terms: int = 6, variance: float = 1.0) -> None:
        super().__init__()
        self.process, self.terms, self.variance = process, terms, variance
        self.register_buffer("pairs", torch.tril_indices(dimensions, dimensions))
        monomials = 1 + dimensions + dimensions * (dimensions + 1) // 2
        self.weight = nn.Parameter(torch.zeros(terms * monomials))

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        std = (self.process.alpha(t).square() * self.variance + self.process.sigma(t).square()).sqrt()
        x = x / expand(std, x)
        first, second = self.pairs
        monomials = torch.cat([torch.ones_like(x[:, :1]), x, x[:, first] * x[:, second]], 1)
        powers = chebyshev(2 * t - 1, self.terms).to(x.dtype)
        return ((powers[:, :, None] * monomials[:, None]).flatten(1) @ self.weight)[:, None]


class MLPDiscriminator(nn.Module):
    """A logit (B, 1) by a small network of x, the teacher's denoised sample and noise there, and time; 0 at first."""

    def __init__(self, teacher: MixtureTeacher, width: int = 128, depth: int = 3) -> None:
        super().__init__()
        self.teacher = teacher
        self.register_buffer("frequencies", torch.pi * 2.0 ** torch.arange(4))
        sizes = [3 * teacher.dimensions + 1 + 2 * 4] + [width] * depth
        layers = [layer for a, b in itertools.pairwise(sizes) for layer in (nn.Linear(a, b), nn.SiLU())]
        self.network = nn.Sequential(*layers, nn.Linear(width, 1))
        nn.init.zeros_(self.network[-1].weight)
        nn.init.zeros_(self.network[-1].bias)

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        time = t.to(x.dtype)[:, None]  # (B, 1)
        angles = time * self.frequencies
        start = self.teacher(x, t, condition)
        eps = noise_at(self.teacher.process, x, start, t)
        return self.network(torch.cat([x, start, eps, time, angles.sin(), angles.cos()], 1))


def chebyshev(z: Tensor, terms: int) -> Tensor:
    """T_0 to T_{terms-1}, 2 or more, at z (B,) in [-1, 1]: (B, terms)."""
    values = [torch.ones_like(z), z]
    while len(values) < terms:
        values.append(2 * z * values[-1] - values[-2])
    return torch.stack(values, 1)


def _tabled(x: Tensor, row: Tensor, rows: int) -> Tensor:
    """x (B, d) in the columns of its `row` and zeros elsewhere, (B, rows d): times a table, that row's block."""
    one_hot = torch.nn.functional.one_hot(row, rows).to(x.dtype)
    return (one_hot[:, :, None] * x[:, None]).flatten(1)


def distil(
    method: Method,
    teacher: MixtureTeacher,
    student: nn.Module,
    critic: nn.Module,
    *,
    iterations: int,
    batch: int,
    student_rate: float,
    critic_rate: float,
    seed: int = 0,
    condition: Callable[[torch.Generator], Condition] | None = None,
    average: float = 0.98,
    discriminator: nn.Module | None = None,
    discriminator_rate: float = 0.01,
    real: RealSamples | None = None,
    pairs: PairSamples | None = None,
) -> None:
    """Alternating training (card 3) with Adam, beta1 = 0, rates falling to zero by a cosine; changes all networks.

    Args:
        average: decay of the running mean of the student's parameters, which replaces them at the end; 0 for none.
        condition: draws the conditions of a batch; none by default.
        discriminator: is trained with the critic, for methods that need one.
        discriminator_rate: its learning rate. Adam's steps do not feel the method's discriminator_weight.
        real: clean samples, without conditions, for methods that need them.
        pairs: noise and the teacher's samples, likewise.
    """
    critics = [{"params": list(critic.parameters()), "lr": critic_rate}]
    if discriminator is not None:
        critics.append({"params": list(discriminator.parameters()), "lr": discriminator_rate})
    alternate(
        method,
        ToyRoles(teacher, student, critic, discriminator),
        {"params": list(student.parameters()), "lr": student_rate},
        critics,
        dimensions=teacher.dimensions,
        dtype=teacher.means.dtype,
        iterations=iterations,
        batch=batch,
        seed=seed,
        condition=condition,
        average=average,
        real=real,
        pairs=pairs,
    )


def alternate(
    method: Method,
    roles: Roles,
    student: Group,
    critics: list[Group],
    *,
    dimensions: int,
    dtype: torch.dtype = torch.float32,
    iterations: int,
    batch: int,
    seed: int = 0,
    condition: Callable[[torch.Generator], Condition] | None = None,
    average: float = 0.98,
    real: RealSamples | None = None,
    pairs: PairSamples | None = None,
) -> None:
    """`distil` for any roles: what is trained of them are the `student` and the `critics`, each with its peak rate.

    Methods that train no critic have no `critics`.
    """
    generator = torch.Generator().manual_seed(seed)
    draw = BulkDraw(batch, generator)
    peaks = [float(group["lr"]) for group in (student, *critics)]
    student_adam = torch.optim.Adam([student], betas=(0.0, 0.999))
    critic_adams = [torch.optim.Adam(critics, betas=(0.0, 0.999))] if critics else []

    def path() -> Path:
        told = condition(generator) if condition else {}
        clean: tuple[Tensor, Condition] | None = (real(batch, generator), {}) if real else None
        made: tuple[Tensor, Tensor, Condition] | None = (*pairs(batch, generator), {}) if pairs else None
        return method.rollout(Batch(told, torch.arange(batch), (dimensions,), dtype, clean, made), roles, draw)

    def update(optimiser: torch.optim.Adam, loss: Loss) -> None:
        optimiser.zero_grad()
        loss.values.mean().backward(inputs=[p for group in optimiser.param_groups for p in group["params"]])
        optimiser.step()

    trained: list[nn.Parameter] = student["params"]
    mean = [parameter.detach().clone() for parameter in trained]
    for iteration in range(iterations):
        fade = 0.5 * (1 + math.cos(math.pi * iteration / iterations))
        groups = [group for adam in (student_adam, *critic_adams) for group in adam.param_groups]
        for group, peak in zip(groups, peaks, strict=True):
            group["lr"] = fade * peak
        walked = path()
        for _ in range(method.critic_updates):
            for adam in critic_adams:
                update(adam, method.critic_loss(walked, roles, draw))
        update(student_adam, method.student_loss(walked, roles, draw))
        for running, parameter in zip(mean, trained, strict=True):
            running.lerp_(parameter.detach(), 1 - average)
    with torch.no_grad():
        for running, parameter in zip(mean, trained, strict=True):
            parameter.copy_(running)
