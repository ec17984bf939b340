"""Phased DMD's known answers: what a critic of a noisy interval learns, and where phases come to rest.

Item numbers T1 to T9 are those of the card `phased_dmd.md`, section 8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from fewstep.core.process import Flow, Process
from fewstep.core.renoise import renoise
from fewstep.core.rollout import Landing, Path
from fewstep.core.solvers import land
from fewstep.core.tensors import Condition
from fewstep.evaluation.answer import Answer, at_least, at_most
from fewstep.evaluation.exact import GaussianTeacher, MixtureTeacher
from fewstep.evaluation.known_answers_training import covariance_errors, gaussian_teacher
from fewstep.evaluation.toy import LinearStudent, PolynomialCritic, distil
from fewstep.losses.critic import exact_target
from fewstep.methods.matching import Query
from fewstep.methods.phased import Phased, PhasedOptions, kl_weight

_DTYPE = torch.float64
MEAN, VARIANCE = 0.7, 0.3
"""The law of the data where it is a Gaussian in one dimension."""


def times(value: float, count: int = 1) -> Tensor:
    """`value` (count,) float64."""
    return torch.full((count,), value, dtype=_DTYPE)


def gaussian(process: Process) -> GaussianTeacher:
    """N(0.7, 0.3) in one dimension."""
    return GaussianTeacher(process, times(MEAN), times(VARIANCE)[None])


def four_points(process: Process) -> MixtureTeacher:
    """-1, 0, 1 and 2, equally likely (the paper's toy, fig. 2)."""
    means = torch.tensor([[-1.0], [0.0], [1.0], [2.0]], dtype=_DTYPE)
    return MixtureTeacher(process, torch.ones(4, dtype=_DTYPE), means, torch.zeros(4, 1, 1, dtype=_DTYPE))


def interval_bias(process: Process, tau: float, *, wrong: bool = False, boundary: float = 0.5) -> float:
    """T1: the largest error, over bins of x_tau, of the mean target against the exact denoised sample.

    `wrong`: with the denoised sample that the velocity eps - x_s would mean (paper, fig. 2c).
    """
    count, generator = 1_000_000, torch.Generator().manual_seed(0)
    teacher = four_points(process)
    x_s = land(process, teacher.sample(count, generator), _normal(count, generator), times(boundary, count))
    s, t, noise = times(boundary, count), times(tau, count), _normal(count, generator)
    x = renoise(process, x_s, s, t, noise)
    if wrong:
        alpha, sigma = process.alpha(t)[:, None], process.sigma(t)[:, None]
        target = (x - sigma * (noise - x_s)) / (alpha + sigma)
    else:
        target = exact_target(process, x, s, t, noise)
    error = (target - teacher(x, t, {}))[:, 0]
    edges = torch.quantile(x[:100_000, 0], torch.linspace(0, 1, 21, dtype=_DTYPE)[1:-1])
    place = torch.bucketize(x[:, 0].contiguous(), edges)
    means = error.new_zeros(20).index_add(0, place, error) / torch.bincount(place, minlength=20)
    return float(means.abs().max())


def regression_error(process: Process, boundary: float, tau: float) -> float:
    """T2: slope and intercept of the target's regression on x_tau against the exact denoiser's, by moments alone.

    The target is affine in (x_s, n), so evaluating it at three points gives its coefficients.
    """
    s, t = times(boundary, 3), times(tau, 3)
    x_s, noise = torch.tensor([[0.0], [1.0], [0.0]], dtype=_DTYPE), torch.tensor([[0.0], [0.0], [1.0]], dtype=_DTYPE)
    x = renoise(process, x_s, s, t, noise)
    target = exact_target(process, x, s, t, noise)
    by_s, by_noise = (target[1:] - target[0]).flatten().tolist()
    r, beta = (float(part[0]) for part in process.transition(s, t))
    mean, variance = (part.item() for part in gaussian(process).moments(boundary))
    slope = (by_s * r * variance + by_noise * beta) / (r * r * variance + beta * beta)
    intercept = by_s * mean - slope * r * mean
    points = torch.tensor([[0.0], [1.0]], dtype=_DTYPE)
    at_zero, at_one = gaussian(process)(points, t[:2], {}).flatten().tolist()
    return max(abs(slope - (at_one - at_zero)), abs(intercept - at_zero))


def divergence_slopes(process: Process, boundary: float, tau: float) -> tuple[float, float]:
    """T6: d KL / d mean of a generator N(0.1, 0.35) at the boundary, by finite differences and by eq. 10."""
    s, t = times(boundary), times(tau)
    r, beta = process.transition(s, t)
    data_mean, data_variance = (part.flatten() for part in gaussian(process).moments(tau))

    def divergence(mean: Tensor) -> Tensor:
        variance = r * r * 0.35 + beta * beta
        gap = (variance + (r * mean - data_mean).square()) / data_variance
        return 0.5 * (gap - 1 - (variance / data_variance).log())

    step = 1e-5
    differences = (divergence(times(0.1 + step)) - divergence(times(0.1 - step))) / (2 * step)
    x = (r * 0.1)[:, None]  # denoisers are affine: their mean difference is that at the mean, where the fake score is 0
    direction = gaussian(process)(x, t, {}) - x / process.alpha(t)[:, None]
    return float(differences), float(-kl_weight(process, s, t) * direction)


class Affine(nn.Module):
    """a x + b for each of the listed times, in one dimension: student or critic; starts as the teacher."""

    def __init__(self, teacher: MixtureTeacher, at: Sequence[float]) -> None:
        super().__init__()
        self.at = torch.tensor(at, dtype=_DTYPE)
        points, ones = torch.zeros(len(at), 1, dtype=_DTYPE), torch.ones(len(at), 1, dtype=_DTYPE)
        offset = teacher(points, self.at, {})
        self.offset = nn.Parameter(offset)
        self.gain = nn.Parameter(teacher(ones, self.at, {}) - offset)

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        row = (t[:, None] - self.at).abs().argmin(1)
        return self.gain[row] * x + self.offset[row]


class AtOneLevel(Phased):
    """Teacher and critic are asked at tau = 0.8 alone; there, an affine critic can be exact."""

    def _levels(self, path: Path, landing: Landing) -> tuple[Tensor, Tensor]:
        margin = self.options.margin
        return torch.full_like(landing.t, 0.8 - margin), torch.full_like(landing.t, 0.8 + margin)


class WrongTarget(AtOneLevel):
    """The critic regresses to the velocity n - x_s, as if x_s were clean."""

    def _critic_target(self, process: Process, landing: Landing, query: Query) -> tuple[Tensor, Tensor]:
        alpha, sigma = process.alpha(query.tau)[:, None], process.sigma(query.tau)[:, None]
        target = (query.x - sigma * (query.noise - landing.x.detach())) / (alpha + sigma)
        return target, super()._critic_target(process, landing, query)[1]


def resting_law(kind: Callable[[PhasedOptions], Phased], iterations: int = 400) -> tuple[float, float]:
    """T7, T8: mean and variance of x_s, s = 0.5, where training the first of two phases comes to rest."""
    process = Flow()
    teacher = gaussian(process)
    o = PhasedOptions(
        steps=2, phase_calls=(1, 1), guidance_scale=1.0, normaliser="none", pull_on="landing", critic_updates=5
    )
    student, critic = Affine(teacher, [1.0]), Affine(teacher, [0.8])
    distil(kind(o), teacher, student, critic, iterations=iterations, batch=1024, student_rate=0.02, critic_rate=0.02)
    with torch.no_grad():
        noise = torch.tensor([[0.0], [1.0]], dtype=_DTYPE)
        at_zero, at_one = land(process, student(noise, times(1.0, 2), {}), noise, times(0.5, 2)).flatten().tolist()
    return at_zero, (at_one - at_zero) ** 2


class Phases(nn.Module):
    """A frozen denoiser above a time, a trained one below it."""

    def __init__(self, before: nn.Module, trained: nn.Module, switch: float) -> None:
        super().__init__()
        self.before, self.trained, self.switch = [before], trained, switch  # in a list: not a part that is trained

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        early = (t > self.switch)[:, None]
        return torch.where(early, self.before[0](x, t, condition).detach(), self.trained(x, t, condition))


def two_phases(process: Process, iterations: int = 600) -> tuple[list[float], bool]:
    """T9: covariance errors at the boundary and of the final law in 8 dimensions; whether phase 2 left expert 1 alone.

    As in a real run, the second expert and the second critic start as the teacher.
    """
    teacher = gaussian_teacher(process)
    o = PhasedOptions(steps=2, phase_calls=(1, 1), guidance_scale=1.0, critic_updates=1)
    grid = o.time_grid(2)
    first, second = (LinearStudent(teacher, {2: grid}) for _ in range(2))
    settings = {"iterations": iterations, "batch": 1024, "student_rate": 4e-3, "critic_rate": 0.02}
    critic = PolynomialCritic(teacher, {1: torch.tensor([1.0, 0.5], dtype=_DTYPE)})
    distil(Phased(o), teacher, first, critic, **settings)  # type: ignore[arg-type]
    before = [parameter.detach().clone() for parameter in first.parameters()]
    student = Phases(first, second, switch=0.75)
    distil(
        Phased(replace(o, phase=2)),
        teacher,
        student,
        PolynomialCritic(teacher, {2: grid}),
        **settings,  # type: ignore[arg-type]
    )
    untouched = all(torch.equal(old, new) for old, new in zip(before, first.parameters(), strict=True))
    return covariance_errors(teacher, student, grid, {}), untouched


def subinterval_critic(process: Process) -> Iterator[Answer]:
    """T1, T2 and T6."""
    name = process.name
    for tau, limit in ((0.55, 0.08), (0.7, 0.03), (0.9, 0.03)):
        yield at_most(f"phased T1 bias of the target, {name}, tau={tau}", interval_bias(process, tau), limit)
    wrong = interval_bias(process, 0.7, wrong=True)
    yield at_least(f"phased T1 bias of the target eps - x_s, {name} (as the card says)", wrong, 0.1)
    pairs = ((0.5, 0.55), (0.5, 0.8), (0.75, 0.9), (0.9, 0.95))
    worst = max(regression_error(process, *pair) for pair in pairs)
    yield at_most(f"phased T2 regression on x_tau, {name}", worst, 1e-10)
    differences, formula = divergence_slopes(process, 0.5, 0.8)
    yield at_most(f"phased T6 eq. 10 against finite differences, {name}", abs(differences - formula), 1e-7)


def resting_laws() -> Iterator[Answer]:
    """T7 and T8, on a flow process."""
    mean, variance = resting_law(AtOneLevel)
    yield at_most("phased T7 mean at the boundary", abs(mean - 0.35), 0.01)
    yield at_most("phased T7 variance at the boundary", abs(variance - 0.325), 0.01)
    mean, variance = resting_law(WrongTarget)
    yield at_most("phased T8 mean with the target eps - x_s, as the card has it", abs(mean - 0.5907), 0.01)
    yield at_most("phased T8 variance with the target eps - x_s, as the card has it", abs(variance - 0.1610), 0.01)


def two_phase_gaussian(process: Process) -> Iterator[Answer]:
    """T9."""
    errors, untouched = two_phases(process)
    yield at_most(f"phased T9 covariance at the boundary, {process.name}", errors[0], 0.05)
    yield at_most(f"phased T9 covariance of the final law, {process.name}", errors[1], 0.05)
    yield at_least(f"phased T9 the first expert is left alone, {process.name}", float(untouched), 1)


def _normal(count: int, generator: torch.Generator) -> Tensor:
    return torch.randn(count, 1, generator=generator, dtype=_DTYPE)
