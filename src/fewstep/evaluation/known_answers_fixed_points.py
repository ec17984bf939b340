"""Card 8.2: where training must come to rest, with oracles in place of what would have to be learnt."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fewstep.core.process import Process
from fewstep.core.rollout import Path
from fewstep.core.solvers import noise_at
from fewstep.core.tensors import Condition
from fewstep.evaluation.answer import Answer, at_least, at_most
from fewstep.evaluation.exact import GaussianTeacher, MixtureTeacher
from fewstep.evaluation.toy import BulkDraw, LinearStudent, ToyRoles, distil
from fewstep.losses.critic import CriticTarget
from fewstep.methods.base import LANDING, STEPS, Batch
from fewstep.methods.tdm import TDM
from fewstep.methods.tdm_options import TDMOptions

_DTYPE = torch.float64
_COUNTS = (1, 2, 4, 8)


def normal_teacher(process: Process, std: float) -> GaussianTeacher:
    """N(0, std^2) in one dimension."""
    return GaussianTeacher(process, torch.zeros(1, dtype=_DTYPE), torch.full((1, 1), std * std, dtype=_DTYPE))


def two_modes(process: Process) -> MixtureTeacher:
    """0.3 N(-2, 0.3^2) + 0.7 N(1.5, 0.5^2)."""
    covariances = torch.tensor([0.09, 0.25], dtype=_DTYPE)[:, None, None]
    means = torch.tensor([[-2.0], [1.5]], dtype=_DTYPE)
    return MixtureTeacher(process, torch.tensor([0.3, 0.7], dtype=_DTYPE), means, covariances)


class TransportedStudent:
    """The K-step student that follows the teacher's probability flow exactly, in one dimension (item 8).

    Between two levels that flow is the monotone map between the two marginals, F_to^-1 o F_from.
    """

    def __init__(self, teacher: MixtureTeacher, grid: Tensor) -> None:
        self.process, self.grid = teacher.process, grid
        self._x = torch.linspace(-9, 9, 40001, dtype=_DTYPE)
        self._cdf = [self._cumulative(teacher, float(time)) for time in grid]

    def _cumulative(self, teacher: MixtureTeacher, time: float) -> Tensor:
        weights, means, covariances = teacher.marginal(time)
        z = (self._x[:, None] - means[:, 0]) / covariances[:, 0, 0].sqrt()
        return (torch.special.ndtr(z) * weights).sum(1)

    def __call__(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        call = (t[:, None] - self.grid[:-1]).abs().argmin(1)
        landed = torch.empty_like(x)
        for k in call.unique().tolist():
            level = _interpolate(x[call == k, 0], self._x, self._cdf[k])
            landed[call == k, 0] = _interpolate(level, self._cdf[k + 1], self._x)
        t_to = self.grid[call + 1]
        kept = (self.process.sigma(t_to) / self.process.sigma(t))[:, None]
        share = self.process.alpha(t_to)[:, None] - kept * self.process.alpha(t)[:, None]  # c_i of card 2.2
        return (landed - kept * x) / share


def _interpolate(x: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
    """Piecewise linear function through (xs, ys), xs rising."""
    right = torch.searchsorted(xs, x.contiguous()).clamp(1, len(xs) - 1)
    x0, x1, y0, y1 = xs[right - 1], xs[right], ys[right - 1], ys[right]
    return y0 + (y1 - y0) * ((x - x0) / (x1 - x0).clamp(min=1e-300)).clamp(0, 1)


class BinnedCritic(nn.Module):
    """The teacher plus a trainable number per call and bin of x: its best value is the critic's mean error there."""

    def __init__(self, teacher: MixtureTeacher, grid: Tensor, bins: int = 24) -> None:
        super().__init__()
        self.teacher, self.low = teacher, grid[1:]
        self.edges = torch.linspace(-2.5, 2.5, bins - 1, dtype=_DTYPE)
        self.table = nn.Parameter(torch.zeros(len(self.low), bins, dtype=_DTYPE))

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        call = (condition[LANDING][:, None] - self.low).abs().argmin(1)
        return self.teacher(x, t, condition) + self.table[call, torch.bucketize(x[:, 0], self.edges)][:, None]


def transported_student(process: Process) -> Iterator[Answer]:
    """Item 8: for the exact flow map, the best critic is the teacher with the exact target, so the update is zero.

    With the published target that holds at the last boundary and for K = 1 only.
    """
    for steps in (1, 4):
        for target in ("exact", "denoised"):
            errors = critic_bias(process, steps, target)
            name = f"8 best critic - teacher, {process.name}, K={steps}, {target} target"
            yield at_most(f"{name}, last boundary", errors[-1], 0.05)
            if steps > 1 and target == "exact":
                yield at_most(f"{name}, others", max(errors[:-1]), 0.05)
            if steps > 1 and target == "denoised":
                yield at_least(f"{name}, others (as the card says)", max(errors[:-1]), 0.1)


def critic_bias(process: Process, steps: int, target: CriticTarget, count: int = 200_000) -> list[float]:
    """Rms, per call, of the best binned correction to the teacher: what a perfect critic would say differently.

    Two independent halves are multiplied, so that sampling noise averages to zero instead of adding up.
    """
    first, second = (_best_correction(process, steps, target, count, seed) for seed in (0, 1))
    weight = first[1] / first[1].sum(1, keepdim=True)
    return (weight * first[0] * second[0]).sum(1).clamp(min=0).sqrt().tolist()


def _best_correction(
    process: Process, steps: int, target: CriticTarget, count: int, seed: int
) -> tuple[Tensor, Tensor]:
    """The table of a `BinnedCritic` that minimises TDM's critic loss, and the curvature at it, both (K, bins)."""
    teacher = two_modes(process)
    options = TDMOptions(
        steps=steps,
        guidance_scale=1.0,
        critic_target=target,
        critic_weight="one",
        critic_call_condition=True,
        margin=0.05,
    )
    grid = options.time_grid(steps)
    critic, method = BinnedCritic(teacher, grid), TDM(options)
    roles = ToyRoles(teacher, TransportedStudent(teacher, grid), critic)
    generator = torch.Generator().manual_seed(seed)
    path = method.rollout(Batch({}, torch.arange(count), (1,), _DTYPE), roles, BulkDraw(count, generator))
    at_zero, at_one = _gradients(method, path, roles, critic.table, [critic.table * 0, critic.table * 0 + 1], seed)
    curvature = at_one - at_zero  # the loss is a parabola in each number of the table
    return torch.where(curvature > 0, -at_zero / curvature, 0), curvature


def _gradients(
    method: TDM, path: Path, roles: ToyRoles, table: nn.Parameter, points: list[Tensor], seed: int
) -> list[Tensor]:
    """Gradient of the critic's summed loss with respect to `table`, at each of `points`, on the same random numbers."""
    gradients = []
    for point in points:
        table.data = point.detach().clone()
        draw = BulkDraw(len(path.steps), torch.Generator().manual_seed(1000 + seed))
        loss = method.critic_loss(path, roles, draw).values.sum()
        gradients.append(torch.autograd.grad(loss, table)[0])
    return gradients


class OracleCritic(nn.Module):
    """The exact denoiser of the renoised landing points of a one-dimensional linear student, as it is now."""

    def __init__(self, process: Process, student: LinearStudent, grids: dict[int, Tensor]) -> None:
        super().__init__()
        self.process, self.grids = process, grids
        self.student = [student]  # a list, so that its parameters are not this module's
        self.unused = nn.Parameter(torch.zeros(1, dtype=_DTYPE))  # the harness trains something called critic

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        variance = torch.empty_like(t)
        for steps, grid in self.grids.items():
            for call, landing in enumerate(landing_variances(self.process, self.student[0], grid, steps)):
                here = (condition[STEPS] == steps) & ((condition[LANDING] - grid[call + 1]).abs() < 1e-6)
                variance[here] = landing
        r, beta = self.process.transition(condition[LANDING], t)
        total = r.square() * variance + beta.square()
        answer = (x - (self.process.sigma(t).square() / total)[:, None] * x) / self.process.alpha(t)[:, None]
        return answer + 0 * self.unused


@torch.no_grad()
def landing_variances(process: Process, student: LinearStudent, grid: Tensor, told: int) -> list[float]:
    """Variance at every landing of a one-dimensional linear student: the square of where the number 1 is taken."""
    path = Path(student, torch.ones(1, 1, dtype=_DTYPE), grid, process, {STEPS: torch.tensor([float(told)])})
    return [float(path.landing(torch.tensor([call])).x.square()) for call in range(len(grid) - 1)]


def right_gains(process: Process, std: float, grid: Tensor) -> list[float]:
    """Item 9: the denoised sample's gain a_i at each call of the student whose every landing has the right variance."""
    gains, variance = [], 1.0
    for t_from, t_to in zip(grid[:-1], grid[1:], strict=True):
        alpha_from, sigma_from = float(process.alpha(t_from)), float(process.sigma(t_from))
        alpha, sigma = float(process.alpha(t_to)), float(process.sigma(t_to))
        wanted = alpha**2 * std**2 + sigma**2
        share = alpha - sigma * alpha_from / sigma_from
        gains.append(((wanted / variance) ** 0.5 - sigma / sigma_from) / share)
        variance = wanted
    return gains


def learnt_gains(process: Process, std: float, start: float = 0.5, iterations: int = 300) -> dict[int, list[float]]:
    """Gains that TDM's student update reaches with the exact critic, for all step counts in one run, from `start`."""
    teacher = normal_teacher(process, std)
    options = TDMOptions(
        step_counts=_COUNTS, steps_condition=True, critic_call_condition=True, guidance_scale=1.0, normaliser="none"
    )
    grids = {steps: options.time_grid(steps) for steps in _COUNTS}
    student = LinearStudent(teacher, grids)
    nn.init.constant_(student.weight, start)
    critic = OracleCritic(process, student, grids)
    distil(TDM(options), teacher, student, critic, iterations=iterations, batch=256, student_rate=0.05, critic_rate=0.0)
    gains = student.weight.detach().flatten().split(list(_COUNTS))
    return {steps: gain.tolist() for steps, gain in zip(_COUNTS, gains, strict=True)}


def closed_form_gains(process: Process, std: float) -> Iterator[Answer]:
    """Items 9 and 10: with the exact critic, descent reaches the closed-form gains of every step count."""
    learnt = learnt_gains(process, std)
    for steps in _COUNTS:
        right = right_gains(process, std, TDMOptions(steps=steps).time_grid(steps))
        error = max(abs(a - b) for a, b in zip(learnt[steps], right, strict=True))
        yield at_most(f"9 gains of the K={steps} student, {process.name}, s={std:g}", error, 0.01)


def wrong_step_count(process: Process) -> Iterator[Answer]:
    """Item 10: a student told K = 4 but walked in 2 steps ends with the spread its gains predict, not the data's."""
    grids = {steps: TDMOptions(steps=steps).time_grid(steps) for steps in (2, 4)}
    student = LinearStudent(normal_teacher(process, 1.0), grids)
    gains = {steps: right_gains(process, 1.0, grid) for steps, grid in grids.items()}
    student.weight.data = torch.tensor([*gains[2], *gains[4]], dtype=_DTYPE)[:, None]
    x, grid = torch.ones(1, 1, dtype=_DTYPE), grids[2]
    for call, gain in enumerate((gains[4][0], gains[4][2])):  # the K = 4 calls at times 1 and 1/2
        t_from, t_to = grid[call : call + 1], grid[call + 1 : call + 2]
        eps = noise_at(process, x, gain * x, t_from)
        x = process.alpha(t_to)[:, None] * gain * x + process.sigma(t_to)[:, None] * eps
    wrong = landing_variances(process, student, grid, 4)[-1]
    yield at_most("10 variance of K=4 walked in 2 steps, against prediction", abs(wrong - float(x) ** 2), 1e-6)
    yield at_least("10 the same, distance from the data's variance", abs(wrong - 1), 0.1)
    yield at_most(
        "10 variance of K=2 in 2 steps, error", abs(landing_variances(process, student, grid, 2)[-1] - 1), 1e-6
    )


class LineCritic(nn.Module):
    """x times a polynomial in tau per call, one-dimensional."""

    def __init__(self, grid: Tensor, terms: int = 6) -> None:
        super().__init__()
        self.low, self.high = grid[1:], grid[:-1]
        self.table = nn.Parameter(torch.zeros(len(self.low), terms, dtype=_DTYPE))

    def gain(self, t: Tensor, call: Tensor) -> Tensor:
        z = (2 * t - self.low[call] - self.high[call]) / (self.high - self.low)[call]
        return (self.table[call] * z[:, None] ** torch.arange(self.table.shape[1])).sum(1)

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        call = (condition[LANDING][:, None] - self.low).abs().argmin(1)
        return self.gain(t, call)[:, None] * x


def critic_alone(process: Process) -> Iterator[Answer]:
    """Item 11: with a frozen, wrong student, the critic's least squares solution is the closed form of its target."""
    for target in ("exact", "denoised"):
        yield at_most(f"11 critic alone, {process.name}, K=4, {target} target", critic_error(process, target), 0.05)


def critic_error(process: Process, target: CriticTarget, count: int = 400_000) -> float:
    """Largest error, over tau, of the trained critic's gain, relative to the largest gain of its call."""
    teacher = normal_teacher(process, 1.0)
    options = TDMOptions(
        critic_target=target, critic_weight="one", critic_call_condition=True, guidance_scale=1.0, margin=0.05
    )
    grid = options.time_grid(4)
    student, critic = LinearStudent(teacher, {4: grid}), LineCritic(grid)
    nn.init.constant_(student.weight, 0.7)
    method, roles = TDM(options), ToyRoles(teacher, student, critic)
    draw = BulkDraw(count, torch.Generator().manual_seed(0))
    path = method.rollout(Batch({}, torch.arange(count), (1,), _DTYPE), roles, draw)
    calls, terms = critic.table.shape
    zero = torch.zeros(calls, terms, dtype=_DTYPE)
    points = [zero, *(zero.index_fill(1, torch.tensor([term]), 1.0) for term in range(terms))]
    slope, *others = _gradients(method, path, roles, critic.table, points, seed=0)
    hessian = torch.stack([other - slope for other in others], 2)  # (calls, terms, terms): the loss is quadratic
    critic.table.data = -torch.linalg.solve(hessian, slope)
    return _gain_error(process, student, critic, grid, target)


@torch.no_grad()
def _gain_error(process: Process, student: LinearStudent, critic: LineCritic, grid: Tensor, target: str) -> float:
    """Compares `critic` with the closed forms of item 11."""
    variances = [1.0, *landing_variances(process, student, grid, 4)]
    worst = 0.0
    for call in range(4):
        low, high = float(grid[call + 1]), float(grid[call])
        tau = torch.linspace(low + 0.06, high - 0.06, 20, dtype=_DTYPE)
        r, beta = process.transition(torch.full_like(tau, low), tau)
        total = r.square() * variances[call + 1] + beta.square()  # variance of x_tau
        if target == "exact":
            right = (1 - process.sigma(tau).square() / total) / process.alpha(tau)
        else:
            landed = (variances[call + 1] / variances[call]) ** 0.5  # x_{t_i} / x_{t_{i+1}}
            right = r * 0.7 * landed * variances[call] / total  # Cov(denoised, x_tau) / Var(x_tau)
        error = critic.gain(tau, torch.full((20,), call)) - right
        worst = max(worst, float(error.abs().max() / right.abs().max()))
    return worst
