"""TDM over toy roles: its losses against the formulas, who gets gradients, what it costs, and every setting at work."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fewstep.core.guidance import guided
from fewstep.core.process import DiscreteVP, Flow, Process
from fewstep.core.solvers import ddim, ddim_step
from fewstep.core.streams import Draw, Streams
from fewstep.core.tensors import Condition
from fewstep.evaluation.exact import LABEL, NULL_LABEL, PredictingAs, ring
from fewstep.methods import METHODS, TDMOptions
from fewstep.methods.base import LANDING, STEPS, Batch
from fewstep.methods.tdm import TDM

COUNT = 32
PROCESSES = [Flow(), DiscreteVP.cosine()]


class Scaled(nn.Module):
    """teacher(x) * gain + offset, with trainable numbers; remembers what it was called with."""

    def __init__(self, teacher: nn.Module, offset: float) -> None:
        super().__init__()
        self.teacher = [teacher]
        self.gain = nn.Parameter(torch.ones(2, dtype=torch.float64))
        self.offset = nn.Parameter(torch.full((2,), offset, dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self.teacher[0](x, t, condition) * self.gain + self.offset


class WatchedRoles:
    """Toy roles that record every call."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.exact = ring(process, [1, 2, 3, 4], 1.5, 0.3, torch.float64)
        self.student_network, self.critic_network = Scaled(self.exact, 0.1), Scaled(self.exact, -0.1)
        self.calls: list[tuple[str, Tensor, Tensor, Condition, bool]] = []

    def teacher(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self._watched("teacher", self.exact, x, t, condition)

    def student(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self._watched("student", self.student_network, x, t, condition)

    def critic(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self._watched("critic", self.critic_network, x, t, condition)

    def null(self, condition: Condition) -> Condition:
        return self.exact.null(condition)

    def _watched(self, name: str, model: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        self.calls.append((name, x, t, condition, torch.is_grad_enabled()))
        return model(x, t, condition)

    def made(self, name: str) -> list[tuple[str, Tensor, Tensor, Condition, bool]]:
        return [call for call in self.calls if call[0] == name]

    def forwards(self) -> float:
        return sum(len(x) for _, x, *_ in self.calls) / COUNT


def batch() -> Batch:
    return Batch({LABEL: torch.arange(COUNT) % 2}, torch.arange(COUNT), (2,), torch.float64)


def draw(iteration: int = 0) -> Draw:
    return Streams(0).at(iteration, range(COUNT))


def iterate(method: TDM, roles: WatchedRoles, iteration: int = 0) -> dict[str, Tensor]:
    """One iteration as the trainer makes it; returns the per-sample losses and metrics."""
    numbers = draw(iteration)
    path = method.rollout(batch(), roles, numbers)
    critics = [method.critic_loss(path, roles, numbers.sub(update)) for update in range(method.critic_updates)]
    student = method.student_loss(path, roles, numbers)
    return {"critic": critics[0].values, "student": student.values, **critics[0].metrics, **student.metrics}


VARIANTS = {
    "default": {},
    "plain teacher": {"guidance_scale": 1.0},
    "8 steps": {"steps": 8},
    "5 critic updates": {"critic_updates": 5},
    "all segments": {"segments": "all"},
    "regularised critic": {"teacher_regularisation": 0.02},
    "random landing": {"landing": "random"},
    "unify": {"step_counts": (1, 2, 4, 8), "steps_condition": True},
    "unify, all segments": {"step_counts": (1, 2, 4), "steps_condition": True, "segments": "all"},
    "to_T, told": {"tau_range": "to_T", "critic_call_condition": True},
    "stochastic": {"eta": 0.9},
    "kept near the solver": {"solver_weight": 10.0, "solver_substeps": 3},
    "kept near the unguided solver": {"solver_weight": 10.0, "solver_guidance": 1.0},
    "paper": {"critic_target": "denoised", "importance": "mean", "metric": "huber_vector", "loss_on": "landing"},
    "TDM-R1": {"shift": 3.0, "tau_law": "uniform_unshifted", "tau_range": "to_T", "critic_weight": "inverse_sigma"},
    "Flow-Factory": {
        "tau_law": "logit_normal",
        "metric": "huber_elementwise",
        "critic_target": "denoised",
        "importance": "clipped_sum",
    },
}


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: p.name)
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_trains_only_who_it_should(name: str, process: Process) -> None:
    method, roles = TDM(TDMOptions(**VARIANTS[name])), WatchedRoles(process)
    student, critic = list(roles.student_network.parameters()), list(roles.critic_network.parameters())
    path = method.rollout(batch(), roles, draw())

    loss = method.critic_loss(path, roles, draw())
    assert loss.values.shape == (COUNT,)
    assert loss.values.isfinite().all()
    loss.values.mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in critic)
    assert all(p.grad is None for p in student)
    for p in critic:
        p.grad = None

    loss = method.student_loss(path, roles, draw())
    assert loss.values.shape == (COUNT,)
    assert loss.values.isfinite().all()
    loss.values.mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in student)
    assert all(p.grad is None for p in critic)
    assert all(not metric.requires_grad and metric.ndim == 0 for metric in loss.metrics.values())


@pytest.mark.parametrize("name", VARIANTS)
def test_forwards_are_what_is_claimed(name: str) -> None:
    method, roles = TDM(TDMOptions(**VARIANTS[name])), WatchedRoles(Flow())
    iterations = 40
    for iteration in range(iterations):
        iterate(method, roles, iteration)
    assert roles.forwards() / iterations == pytest.approx(method.forwards(), rel=0.04)


@pytest.mark.parametrize("name", [name for name in METHODS if name.startswith("tdm")])
def test_presets_stay_within_their_budget(name: str) -> None:
    method = METHODS[name]().build()
    assert method.forwards(4) <= 15
    assert method.forwards(4) == pytest.approx(7.75)


def test_no_call_is_made_twice_or_for_nothing() -> None:
    """Without gradient, the student is called on each point of the path at most once; the critic needs no teacher."""
    method, roles = TDM(TDMOptions(segments="all")), WatchedRoles(Flow())
    path = method.rollout(batch(), roles, draw())
    assert not roles.calls  # nothing before something is asked for
    method.critic_loss(path, roles, draw())
    assert len(roles.made("student")) == 4
    assert not roles.made("teacher")
    method.student_loss(path, roles, draw())
    assert sum(grad for *_, grad in roles.made("student")) == 4
    assert len(roles.made("student")) == 8
    assert len(roles.made("teacher")) == 4  # guided: one call with twice the rows
    assert all(len(x) == 2 * COUNT for _, x, *_ in roles.made("teacher"))


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: p.name)
def test_path_is_what_the_sampler_makes(process: Process) -> None:
    method, roles = TDM(TDMOptions()), WatchedRoles(process)
    path = method.rollout(batch(), roles, draw())
    last = path.landing(torch.full((COUNT,), 3))
    noise = draw().normal("noise", (2,), torch.float64)
    sampled = ddim(roles.student_network, noise, method.options.time_grid(4), process, batch().condition)
    torch.testing.assert_close(last.x, sampled)


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: p.name)
def test_student_loss_is_the_formula(process: Process) -> None:
    """Half the mean square of the guided difference over the mean distance, at the recorded query points."""
    method, roles = TDM(TDMOptions(guidance_scale=2.5)), WatchedRoles(process)
    path = method.rollout(batch(), roles, draw())
    values = method.student_loss(path, roles, draw()).values
    *_, (_, x_in, t_in, told, _) = roles.made("student")
    ((_, x_tau, tau, *_),) = roles.made("critic")
    with torch.no_grad():
        null = {LABEL: torch.full((COUNT,), NULL_LABEL)}
        conditional, unconditional = roles.exact(x_tau, tau, told), roles.exact(x_tau, tau, null)
        real = conditional + 1.5 * (conditional - unconditional)
        fake = roles.critic_network(x_tau, tau, told)
        denoised = roles.student_network(x_in, t_in, told)
    expected = 0.5 * (real - fake).square().mean(1) / (denoised - real).abs().mean(1)
    torch.testing.assert_close(values, expected)


def test_loss_on_the_landing_point_has_the_gradient_of_the_denoised_one_times_c() -> None:
    """Card 2.2: the two differ by the factor c_i = alpha_i - sigma_i alpha_{i+1} / sigma_{i+1} per segment."""
    gradients = {}
    for where in ("denoised", "landing"):
        method, roles = TDM(TDMOptions(steps=2, loss_on=where)), WatchedRoles(Flow())
        path = method.rollout(batch(), roles, draw())
        values = method.student_loss(path, roles, draw()).values
        call = draw().sub("student").integers("call", path.steps)
        gradients[where] = torch.stack(
            [torch.autograd.grad(v, roles.student_network.offset, retain_graph=True)[0] for v in values]
        )
    factor = torch.tensor([1 - 0.5 / 1.0, 1.0], dtype=torch.float64)[call]
    torch.testing.assert_close(gradients["landing"], factor[:, None] * gradients["denoised"])


@pytest.mark.parametrize("own", [None, 1.5])
@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: p.name)
def test_solver_term_is_the_distance_from_the_guided_teachers_own_landing(process: Process, own: float | None) -> None:
    """Half its mean square, on top of the rest; the teacher's path is what the sampler makes on a grid cut in three."""
    method = TDM(TDMOptions(solver_weight=10.0, solver_substeps=3, guidance_scale=2.0, solver_guidance=own))
    plain = TDM(TDMOptions(guidance_scale=2.0))
    values = []
    for each in (method, plain):
        roles = WatchedRoles(process)
        values.append(each.student_loss(each.rollout(batch(), roles, draw()), roles, draw()).values)
    path = method.rollout(batch(), roles, draw())
    call = draw().sub("student").integers("call", path.steps)

    def teacher(x: Tensor, t: Tensor, told: Condition) -> Tensor:
        return guided(roles.exact, x, t, told, roles.null(told), own or 2.0)

    expected = torch.empty(COUNT, dtype=torch.float64)
    for row in range(COUNT):
        x_in, t_in = path.input(call)[[row]], path.grid[row, call[row]]
        t_out, told = path.grid[row, call[row] + 1], {LABEL: batch().condition[LABEL][[row]]}
        with torch.no_grad():
            x, times = x_in, torch.linspace(t_in, t_out, 4, dtype=torch.float64)
            for t, to in zip(times[:-1].split(1), times[1:].split(1), strict=True):
                x = ddim_step(process, x, teacher(x, t, told), t, to)
            denoised = roles.student_network(x_in, t_in[None], told)
            landed = ddim_step(process, x_in, denoised, t_in[None], t_out[None])
        expected[row] = 10.0 * 0.5 * (landed - x).square().mean()
    torch.testing.assert_close(values[0] - values[1], expected)


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: p.name)
def test_a_student_that_is_the_solver_is_left_alone_by_the_solver_term(process: Process) -> None:
    roles = WatchedRoles(process)
    nn.init.constant_(roles.student_network.offset, 0.0)  # the student is the teacher
    method = TDM(TDMOptions(solver_weight=1.0, solver_substeps=1, guidance_scale=1.0))
    assert iterate(method, roles)["solver_loss"] < 1e-20
    method = TDM(TDMOptions(solver_weight=1.0, solver_substeps=2, guidance_scale=1.0))
    assert iterate(method, roles)["solver_loss"] > 1e-5


def test_critic_and_student_draw_independently() -> None:
    method, roles = TDM(TDMOptions(steps=1)), WatchedRoles(Flow())
    iterate(method, roles)
    trained, asked = roles.made("critic")
    assert (trained[2] != asked[2]).all()  # tau
    assert not torch.allclose(trained[1], asked[1])


def test_each_critic_update_draws_anew_and_the_same_draw_repeats() -> None:
    method, roles = TDM(TDMOptions()), WatchedRoles(Flow())
    path = method.rollout(batch(), roles, draw())
    first, again, other = (method.critic_loss(path, roles, draw().sub(n)).values for n in (0, 0, 1))
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert not torch.allclose(first, other)


def test_a_sample_does_not_depend_on_its_batch() -> None:
    method, roles = TDM(TDMOptions(step_counts=(1, 2, 4), steps_condition=True)), WatchedRoles(Flow())
    together = iterate(method, roles)
    half = Batch({LABEL: batch().condition[LABEL][16:]}, torch.arange(16, COUNT), (2,), torch.float64)
    numbers = Streams(0).at(0, range(16, COUNT))
    path = method.rollout(half, roles, numbers)
    torch.testing.assert_close(method.critic_loss(path, roles, numbers.sub(0)).values, together["critic"][16:])
    torch.testing.assert_close(method.student_loss(path, roles, numbers).values, together["student"][16:])


@pytest.mark.parametrize("kind", ["v", "flow", "x0"])
def test_losses_do_not_depend_on_what_the_network_predicts(kind: str) -> None:
    plain, spoken = WatchedRoles(Flow()), WatchedRoles(Flow())
    spoken.exact = PredictingAs(spoken.exact, kind)
    for network in (spoken.student_network, spoken.critic_network):
        network.teacher = [spoken.exact]
    first, second = (iterate(TDM(TDMOptions()), roles) for roles in (plain, spoken))
    for name in ("critic", "student"):
        torch.testing.assert_close(first[name], second[name], rtol=1e-5, atol=1e-8)


def test_step_count_is_told_to_student_and_critic_but_not_to_the_teacher() -> None:
    options = TDMOptions(step_counts=(1, 2, 4), steps_condition=True, teacher_regularisation=0.1)
    method, roles = TDM(options), WatchedRoles(Flow())
    iterate(method, roles)
    assert all(STEPS in told for name, *_, told, _ in roles.calls if name != "teacher")
    assert all(STEPS not in told for *_, told, _ in roles.made("teacher"))
    drawn = roles.made("critic")[0][3][STEPS]
    assert set(drawn.tolist()) == {1.0, 2.0, 4.0}
    unaware = WatchedRoles(Flow())
    iterate(TDM(replace(options, steps_condition=False)), unaware)
    assert all(STEPS not in told for *_, told, _ in unaware.calls)


@pytest.mark.parametrize("landing", ["fixed", "random"])
def test_critic_is_told_the_landing_time_below_tau(landing: str) -> None:
    method, roles = TDM(TDMOptions(critic_call_condition=True, landing=landing)), WatchedRoles(Flow())
    iterate(method, roles)
    for _, _, tau, told, _ in roles.made("critic"):
        assert (told[LANDING] < tau).all()
        on_grid = (told[LANDING][:, None] == torch.tensor([0.0, 0.25, 0.5, 0.75])).any(1)
        assert on_grid.all() if landing == "fixed" else not on_grid.any()
    assert all(LANDING not in told for name, *_, told, _ in roles.calls if name != "critic")


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("tau_range", ["separate", "to_T"])
def test_tau_lies_in_its_range(tau_range: str, shift: float) -> None:
    method = TDM(TDMOptions(tau_range=tau_range, shift=shift, critic_call_condition=True))
    roles, grid = WatchedRoles(Flow()), method.options.time_grid(4)
    beyond = 0
    for iteration in range(8):
        iterate(method, roles, iteration)
    for _, _, tau, told, _ in roles.made("critic"):
        call = (told[LANDING][:, None] - grid[1:]).abs().argmin(1)
        assert ((tau > grid[call + 1]) & (tau < 1) & (tau >= 0.02)).all()
        beyond += int((tau > grid[call]).sum())
    assert beyond == 0 if tau_range == "separate" else beyond > 0


def test_metrics_say_how_teacher_and_critic_agree() -> None:
    roles = WatchedRoles(Flow())
    nn.init.constant_(roles.critic_network.offset, 0.0)  # the critic is the teacher
    metrics = iterate(TDM(TDMOptions(guidance_scale=1.0)), roles)
    assert metrics["real_fake_cosine"] == pytest.approx(1.0)
    assert metrics["real_fake_gap"] == pytest.approx(0.0, abs=1e-9)
    assert metrics["direction"] == pytest.approx(0.0, abs=1e-9)
    assert {"critic_loss", "student_loss", "normaliser", "denoised_mean", "denoised_std"} <= metrics.keys()


def test_regularisation_adds_the_distance_of_velocities() -> None:
    plain, pulled = WatchedRoles(Flow()), WatchedRoles(Flow())
    first = iterate(TDM(TDMOptions()), plain)["critic"]
    second = iterate(TDM(TDMOptions(teacher_regularisation=0.5)), pulled)["critic"]
    tau = plain.made("critic")[0][2]
    torch.testing.assert_close(second - first, 0.5 * 0.1**2 / tau**2)  # the critic is 0.1 below the teacher


def test_needs() -> None:
    assert TDM(TDMOptions()).needs.critic
    assert not TDM(TDMOptions()).needs.landing_condition
    assert TDM(TDMOptions(critic_call_condition=True)).needs.landing_condition
