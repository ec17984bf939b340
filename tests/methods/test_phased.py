"""Phased DMD: card section 8's known answers, its formulas against the code, and who gets gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.core.prediction import from_denoised
from fewstep.core.process import DiscreteVP, Flow, Process
from fewstep.core.renoise import renoise
from fewstep.core.solvers import ddim, land
from fewstep.core.streams import Draw, Streams
from fewstep.core.tensors import Condition, expand
from fewstep.errors import FewstepError
from fewstep.evaluation.exact import ring
from fewstep.evaluation.known_answers_phased import (
    divergence_slopes,
    four_points,
    resting_laws,
    subinterval_critic,
    two_phase_gaussian,
)
from fewstep.losses.critic import exact_target
from fewstep.losses.divergence import DIVERGENCES
from fewstep.methods.base import LANDING, Batch
from fewstep.methods.phased import Phased, PhasedOptions, kl_weight, phased, phased_paper

COUNT = 48
PROCESSES = [Flow(), DiscreteVP.cosine()]


class Moved(nn.Module):
    """The exact denoiser, scaled and shifted by trainable numbers."""

    def __init__(self, exact: Any, offset: float) -> None:
        super().__init__()
        self.exact = [exact]
        self.gain = nn.Parameter(torch.ones(2, dtype=torch.float64))
        self.offset = nn.Parameter(torch.full((2,), offset, dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self.exact[0](x, t, condition) * self.gain + self.offset


class ExpertRoles:
    """Toy roles with an expert per phase, chosen by time; records every call."""

    def __init__(self, process: Process, switches: list[float]) -> None:
        self.process = process
        self.exact = ring(process, [1, 2, 3, 4], 1.5, 0.3, torch.float64)
        self.switches = torch.tensor(switches)
        self.experts = nn.ModuleList(Moved(self.exact, 0.1 + 0.1 * n) for n in range(len(switches) + 1))
        self.critic_network = Moved(self.exact, -0.1)
        self.calls: list[tuple[str, Tensor, Tensor, bool]] = []

    def student(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        expert = (t[:, None] < self.switches).sum(1)
        parts = torch.stack([network(x, t, condition) for network in self.experts])
        self.calls.append(("student", x, t, torch.is_grad_enabled()))
        return parts[expert, torch.arange(len(x))]

    def teacher(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        self.calls.append(("teacher", x, t, torch.is_grad_enabled()))
        return self.exact(x, t, condition)

    def critic(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        self.calls.append(("critic", x, t, torch.is_grad_enabled()))
        return self.critic_network(x, t, condition)

    def null(self, condition: Condition) -> Condition:
        return condition

    def made(self, name: str) -> list[tuple[str, Tensor, Tensor, bool]]:
        return [call for call in self.calls if call[0] == name]


def batch() -> Batch:
    return Batch({}, torch.arange(COUNT), (2,), torch.float64)


def draw(iteration: int = 0) -> Draw:
    return Streams(0).at(iteration, range(COUNT))


def iterate(method: Phased, roles: ExpertRoles, iteration: int = 0) -> tuple[Tensor, Tensor]:
    """Critic's and student's loss of one iteration."""
    numbers = draw(iteration)
    path = method.rollout(batch(), roles, numbers)
    critics = [method.critic_loss(path, roles, numbers.sub(update)) for update in range(method.critic_updates)]
    return critics[0].values, method.student_loss(path, roles, numbers).values


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: p.name)
def test_the_critic_of_an_interval_is_unbiased_and_the_wrong_target_is_not(process: Process) -> None:
    """T1, T2, T6."""
    for answer in subinterval_critic(process):
        assert answer.passed, f"{answer.name}: {answer.measured:.4g}, expected {answer.limit}"


def test_the_divergence_falls_as_steeply_as_the_card_says() -> None:
    """T6's number."""
    assert divergence_slopes(Flow(), 0.5, 0.8) == pytest.approx((-0.06135, -0.06135), abs=5e-6)


def test_phase_one_comes_to_rest_at_the_teachers_law_and_with_the_wrong_target_where_the_card_says() -> None:
    """T7, T8."""
    for answer in resting_laws():
        assert answer.passed, f"{answer.name}: {answer.measured:.4g}, expected {answer.limit}"


def test_two_phases_reach_the_data_and_the_second_leaves_the_first_alone() -> None:
    """T9."""
    for answer in two_phase_gaussian(Flow()):
        assert answer.passed, f"{answer.name}: {answer.measured:.4g}, expected {answer.limit}"


def walked(kind: str, steps: int = 48, top: float = 0.98, floor: float = 0.52) -> Tensor:
    """T11: where Euler takes 400 starts from near pure noise to just above the boundary 0.5, on four points.

    The velocity is exact, or the mean of a critic's target (the method's, or the `wrong` eps - x_s) over bins of x_t:
    what a critic of unlimited capacity would learn.
    """
    process, count, generator = Flow(), 40_000, torch.Generator().manual_seed(0)
    teacher = four_points(process)
    x = torch.linspace(-2, 2, 400, dtype=torch.float64)[:, None]
    dt = (top - floor) / steps
    for step in range(steps):
        t = top - step * dt

        def at(time: float, rows: int = count) -> Tensor:
            return torch.full((rows,), time, dtype=torch.float64)

        if kind == "exact":
            velocity = (x - teacher(x, at(t, len(x)), {})) / t
        else:
            first, noise = torch.randn(2, count, 1, generator=generator, dtype=torch.float64)
            x_s = land(process, teacher.sample(count, generator), first, at(0.5))
            seen = renoise(process, x_s, at(0.5), at(t), noise)
            told = noise - x_s if kind == "wrong" else (seen - exact_target(process, seen, at(0.5), at(t), noise)) / t
            edges = torch.quantile(seen[:, 0], torch.linspace(0, 1, 101, dtype=torch.float64)[1:-1])
            place = torch.bucketize(seen[:, 0].contiguous(), edges)
            mean = torch.zeros(100, dtype=torch.float64).index_add(0, place, told[:, 0]) / place.bincount(minlength=100)
            velocity = mean[torch.bucketize(x[:, 0].contiguous(), edges)][:, None]
        x = x - dt * velocity
    return x


def test_trajectories_of_an_intervals_critic_are_the_teachers_and_those_of_the_wrong_target_are_not() -> None:
    """T11: rms distance from the same starts."""
    right = walked("exact")
    assert float((walked("ours") - right).square().mean().sqrt()) < 0.02
    assert float((walked("wrong") - right).square().mean().sqrt()) > 0.08


def query(process: Process) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x_s, s, tau, noise and x_tau at random places."""
    generator = torch.Generator().manual_seed(0)
    x_s, noise = torch.randn(2, 64, 3, generator=generator, dtype=torch.float64)
    s = torch.rand(64, generator=generator, dtype=torch.float64) * 0.8 + 0.05
    tau = s + (0.99 - s) * torch.rand(64, generator=generator, dtype=torch.float64).clamp(min=0.05)
    return x_s, s, tau, noise, renoise(process, x_s, s, tau, noise)


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: p.name)
def test_targets_of_all_prediction_types_are_one(process: Process) -> None:
    """T3: eq. 11 and 12 and the card's eps target, per sample, by the ordinary conversions."""
    x_s, s, tau, noise, x = query(process)
    _, beta = (expand(part, x) for part in process.transition(s, tau))
    alpha_s, sigma_s, alpha, sigma = (
        expand(part, x) for part in (process.alpha(s), process.sigma(s), process.alpha(tau), process.sigma(tau))
    )
    targets = {
        "flow": (alpha_s**2 * sigma + alpha * sigma_s**2) / (alpha_s**2 * beta) * noise - x_s / alpha_s,
        "x0": x_s / alpha_s - alpha * sigma_s**2 / (alpha_s**2 * beta) * noise,
        "eps": sigma / beta * noise,
    }
    ours = exact_target(process, x, s, tau, noise)
    for kind, target in targets.items():
        torch.testing.assert_close(from_denoised(kind, ours, x, process.alpha(tau), process.sigma(tau)), target)


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: p.name)
def test_at_boundary_zero_it_is_ordinary_distribution_matching(process: Process) -> None:
    """T4: the target is the clean sample; eq. 10's weight, in velocities, is eq. 7's."""
    x_s, s, tau, noise, _ = query(process)
    s = torch.zeros_like(s)
    x = renoise(process, x_s, s, tau, noise)
    torch.testing.assert_close(exact_target(process, x, s, tau, noise), x_s)
    alpha, sigma = process.alpha(tau), process.sigma(tau)
    per_velocity = sigma / (alpha + sigma)
    torch.testing.assert_close(kl_weight(process, s, tau) * per_velocity, alpha**2 / (alpha * sigma + sigma**2))


@pytest.mark.parametrize("phase", [1, 2])
def test_the_critics_loss_is_the_papers_clamped_one(phase: int) -> None:
    """T5: eq. 13, written in velocities as the paper has it, at the points that the method asked about."""
    method, roles = Phased(PhasedOptions(phase=phase, margin=1e-3)), ExpertRoles(Flow(), [0.625])
    asked: dict[str, Tensor] = {}

    class Watched(Phased):
        def _critic_target(self, process, landing, query):
            asked.update(x_s=landing.x, s=landing.t, tau=query.tau, noise=query.noise, x=query.x)
            return super()._critic_target(process, landing, query)

    method = Watched(method.options)
    values = method.critic_loss(method.rollout(batch(), roles, draw()), roles, draw()).values
    s, t = (expand(asked[name], asked["x"]) for name in ("s", "tau"))
    alpha_s, alpha = 1 - s, 1 - t
    spread = (t**2 - (alpha / alpha_s * s) ** 2).sqrt()
    with torch.no_grad():
        velocity = (asked["x"] - roles.critic_network(asked["x"], asked["tau"], {})) / t
    c = (alpha_s**2 * t + alpha * s**2) / alpha_s**2
    error = (spread * velocity - (c * asked["noise"] - spread / alpha_s * asked["x_s"])).square()
    clamp = (1 / spread**2).clamp(max=10)
    torch.testing.assert_close(values, (clamp * error).mean(1))
    assert ((clamp == 10).any() and (clamp < 10).any()) or phase == 2


@pytest.mark.parametrize("pull_on", ["denoised", "landing"])
def test_with_weight_kl_the_students_gradient_is_eq_10(pull_on: str) -> None:
    o = PhasedOptions(
        guidance_scale=1.0, normaliser="none", pull_on=pull_on, pull_weight="kl", steps=2, phase_calls=(1, 1)
    )
    method, roles = Phased(o), ExpertRoles(Flow(), [0.75])
    values = method.student_loss(method.rollout(batch(), roles, draw()), roles, draw()).values
    (own,) = torch.autograd.grad(values.sum(), roles.experts[0].offset)
    ((_, x, tau, _),) = roles.made("critic")
    with torch.no_grad():
        gap = (roles.exact(x, tau, {}) - roles.critic_network(x, tau, {})) / -tau[:, None]  # T - F, in velocities
    weight = (1 - tau) * (1 - tau) / 0.5 / ((1 - tau) * tau + tau**2)
    landed_by = 0.5 if pull_on == "landing" else 1.0  # d x_s / d denoised of a call from pure noise
    torch.testing.assert_close(own, (weight[:, None] * gap * landed_by).sum(0) / 2)  # the loss is a mean over d = 2


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: p.name)
@pytest.mark.parametrize("phase", [1, 2, 3])
def test_only_the_last_executed_step_of_the_active_expert_has_gradient(phase: int, process: Process) -> None:
    """T10."""
    o = PhasedOptions(steps=6, phase_calls=(2, 2, 2), phase=phase)
    method, roles = Phased(o), ExpertRoles(process, [0.75, 0.4])
    path = method.rollout(batch(), roles, draw())
    method.critic_loss(path, roles, draw()).values.mean().backward()
    assert all(p.grad is not None for p in roles.critic_network.parameters())
    assert all(p.grad is None for p in roles.experts.parameters())
    assert not any(grad for *_, grad in roles.made("student"))
    assert not roles.made("teacher")
    roles.critic_network.zero_grad()
    roles.calls.clear()

    method.student_loss(path, roles, draw()).values.mean().backward()
    assert sum(grad for *_, grad in roles.made("student")) == 1
    assert not any(grad for name, *_, grad in roles.calls if name != "student")
    for number, expert in enumerate(roles.experts, start=1):
        reached = [p.grad is not None and bool(p.grad.abs().sum() > 0) for p in expert.parameters()]
        assert all(reached) if number == phase else not any(reached)
    assert all(p.grad is None for p in roles.critic_network.parameters())


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: p.name)
def test_every_call_of_a_phase_jumps_straight_to_its_boundary(process: Process) -> None:
    roles = ExpertRoles(process, [0.625])
    for phase, calls, boundary in ((1, {0, 1}, 0.5), (2, {2, 3}, 0.0)):
        method = Phased(PhasedOptions(phase=phase))
        path = method.rollout(batch(), roles, draw())
        ((call, _),) = method._visits(path, draw())
        assert set(call.tolist()) == calls
        jumped = method._compared(path, path.landing(call), draw())
        assert (jumped.t == boundary).all()
        alpha, sigma = process.alpha(jumped.t)[:, None], process.sigma(jumped.t)[:, None]
        torch.testing.assert_close(jumped.x, alpha * jumped.denoised + sigma * jumped.eps_hat)


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: p.name)
def test_the_path_that_training_walks_is_the_sampler_with_all_experts(process: Process) -> None:
    """And the last call of each phase lands where sampling goes on: no jump is made but the drawn one."""
    roles, noise = ExpertRoles(process, [0.625]), draw().normal("noise", (2,), torch.float64)
    for phase in (1, 2):
        method = Phased(PhasedOptions(phase=phase))
        path = method.rollout(batch(), roles, draw())
        states: list[Tensor] = []
        ddim(
            roles.student, noise * process.noise_scale, method.options.time_grid(4), process, {},
            callback=lambda k, x, denoised, states=states: states.append(x.detach()),
        )  # fmt: skip
        for call in range(4):
            landing = path.landing(torch.full((COUNT,), call))
            torch.testing.assert_close(landing.x, states[call])
        last = torch.full((COUNT,), method.options.ends[phase - 1] - 1)
        torch.testing.assert_close(method._compared(path, path.landing(last), draw()).x, states[int(last[0])])


@pytest.mark.parametrize("name", DIVERGENCES)
def test_any_divergence_weighs_a_phases_samples_by_the_ratio_at_their_noised_point(name: str) -> None:
    """By options alone: the reverse KL's loss times a weight of mean 1, which the ratio is asked for at x_tau."""
    asked: list[tuple[Tensor, Tensor]] = []

    def log_ratio(x: Tensor, tau: Tensor, condition: Condition) -> Tensor:
        asked.append((x, tau))
        return x.sum(1)

    losses = {}
    for divergence in ("reverse_kl", name):
        roles, options = ExpertRoles(Flow(), [0.625]), PhasedOptions(divergence=divergence, normaliser="none")
        method = Phased(options, log_ratio)
        losses[divergence] = method.student_loss(method.rollout(batch(), roles, draw()), roles, draw()).values.detach()
    weight = losses[name] / losses["reverse_kl"]
    torch.testing.assert_close(weight.mean(), torch.ones((), dtype=torch.float64))
    if name == "reverse_kl":
        assert not asked
        return
    ((_, x, tau, _),) = roles.made("critic")
    assert torch.equal(asked[0][0], x)
    assert torch.equal(asked[0][1], tau)
    assert float(weight.std()) > 0.01
    assert Phased(options).needs.discriminator  # without a ratio that is given, a discriminator's


@pytest.mark.parametrize(("intervals", "ceilings"), [("nested", (1.0, 1.0)), ("disjoint", (1.0, 0.5))])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_tau_lies_between_boundary_and_start_or_in_the_phase_alone(intervals, ceilings, shift: float) -> None:
    for phase, ceiling in zip((1, 2), ceilings, strict=True):
        method = Phased(PhasedOptions(phase=phase, intervals=intervals, shift=shift, critic_updates=20))
        roles = ExpertRoles(Flow(), [0.625])
        iterate(method, roles)
        tau = torch.cat([times for _, _, times, _ in roles.made("critic")])
        grid = method.options.time_grid(4)
        floor, top = (grid[2], grid[0]) if phase == 1 else (grid[4], grid[0] if ceiling == 1 else grid[2])
        assert (tau > floor).all()
        assert (tau < top).all()
        assert tau.max() > floor + 0.9 * (top - floor)


def test_the_critic_may_be_told_the_call_and_nobody_else_is() -> None:
    told: list[tuple[str, Condition]] = []

    class Watched(ExpertRoles):
        def student(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
            told.append(("student", condition))
            return super().student(x, t, condition)

        def teacher(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
            told.append(("teacher", condition))
            return super().teacher(x, t, condition)

        def critic(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
            told.append(("critic", condition))
            return super().critic(x, t, condition)

    method = Phased(PhasedOptions(critic_call_condition=True, phase=2))
    assert method.needs.landing_condition
    assert not Phased(PhasedOptions()).needs.landing_condition
    iterate(method, Watched(Flow(), [0.625]))
    assert {name for name, condition in told if LANDING in condition} == {"critic"}
    for name, condition in told:
        if name == "critic":
            assert set(condition[LANDING].tolist()) == {0.5, 0.25}


@pytest.mark.parametrize("phase", [1, 2, 3])
def test_forwards_are_what_is_claimed(phase: int) -> None:
    method = Phased(PhasedOptions(steps=6, phase_calls=(1, 3, 2), phase=phase, critic_updates=2))
    roles = ExpertRoles(Flow(), [0.9, 0.4])
    for iteration in range(30):
        iterate(method, roles, iteration)
    made = sum(len(x) for _, x, *_ in roles.calls) / COUNT / 30
    assert made == pytest.approx(method.forwards(), rel=0.04)


@pytest.mark.parametrize(
    ("shift", "times"),
    [(5.0, [1, 0.9375, 0.8333, 0.625]), (3.0, [1, 0.9, 0.75, 0.5]), (7.0, [1, 0.9545, 0.875, 0.7])],
)
def test_shifted_grids_are_the_papers(shift: float, times: list[float]) -> None:
    """T12."""
    options = PhasedOptions(shift=shift)
    assert options.time_grid(4)[:-1].tolist() == pytest.approx(times, abs=5e-5)
    assert float(options.levels(options.time_grid(4))[0]) == pytest.approx(times[2], abs=5e-5)


def test_the_presets_are_valid_and_the_papers_boundary_is_0833() -> None:
    for options in (phased(), phased_paper()):
        for phase in (1, 2):
            assert Phased(replace(options, phase=phase)).needs.critic
    grid = phased_paper().time_grid(4)
    assert float(phased_paper().levels(grid)[0]) == pytest.approx(0.8333, abs=5e-5)
    assert PhasedOptions(steps=4, phase_calls=(1, 1, 1, 1)).ends == (1, 2, 3, 4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"phase_calls": (2, 1)}, "one step count"),
        ({"phase_calls": (4, 0)}, "phase_calls"),
        ({"phase_calls": ()}, "phase_calls"),
        ({"phase": 3}, "phase = 3"),
        ({"phase": 0}, "phase = 0"),
        ({"step_counts": (2, 4)}, "one step count"),
        ({"critic_clamp": 0.0}, "critic_clamp"),
        ({"margin": 0.0}, "margin"),
        ({"margin": 0.3}, "no room"),
        ({"intervals": "other"}, "intervals"),
        ({"pull_on": "x"}, "pull_on"),
        ({"pull_weight": "x"}, "pull_weight"),
    ],
)
def test_contradictions_are_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(FewstepError, match=words):
        PhasedOptions(**change).build()


@pytest.mark.parametrize(
    "change",
    [
        {"phase_calls": (1, 3)}, {"phase": 2}, {"intervals": "disjoint", "phase": 2}, {"critic_weight": "one"},
        {"critic_clamp": 0.5}, {"pull_weight": "kl"}, {"eta": 0.5},
    ],
)  # fmt: skip
def test_every_option_does_something(change: dict[str, Any]) -> None:
    """All but pull_on, which changes the gradient alone: see the test of eq. 10."""
    before = replace(PhasedOptions(), phase=change.get("phase", 1) if "intervals" in change else 1)
    first, second = (
        torch.cat(iterate(Phased(options), ExpertRoles(Flow(), [0.625])))
        for options in (before, replace(before, **change))
    )
    assert not torch.allclose(first, second)
