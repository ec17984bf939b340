"""TDM itself: who gets gradients, what it costs, that every knob does something, and that presets are what they say."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields, replace
from pathlib import Path as File
from typing import Any

import pytest
import torch

from fewstep.core import grids
from fewstep.core.process import DiscreteVP, Flow
from fewstep.core.solvers import ddim
from fewstep.core.streams import Draw, Streams
from fewstep.errors import FewstepError
from fewstep.evaluation.exact import LABEL, MixtureTeacher
from fewstep.evaluation.known_answers import correlated_gaussian
from fewstep.evaluation.toy import LinearStudent, ResidualMLP, ToyRoles
from fewstep.methods import METHODS, TDMOptions, preset
from fewstep.methods.base import Batch
from fewstep.methods.tdm import TDM

BATCH = 64


def two_class_teacher() -> MixtureTeacher:
    """Two classes of one mode each in three dimensions."""
    means = torch.tensor([[1.0, 0.5, -1.0], [-1.0, 0.0, 1.0]])
    return MixtureTeacher(Flow(), torch.ones(2), means, 0.2 * torch.eye(3).expand(2, 3, 3), classes=[0, 1])


def moved(teacher: MixtureTeacher, seed: int) -> ResidualMLP:
    """A network that is not the teacher any more."""
    torch.manual_seed(seed)
    network = ResidualMLP(teacher, width=16, depth=2)
    torch.nn.init.normal_(network.network[-1].weight, std=0.1)
    return network


def setting(options: TDMOptions) -> tuple[TDM, ToyRoles, Batch, Draw]:
    teacher = two_class_teacher()
    roles = ToyRoles(teacher, moved(teacher, 1), moved(teacher, 2))
    samples = torch.arange(BATCH)
    return TDM(options), roles, Batch({LABEL: samples % 2}, samples, (3,)), Streams(0).at(1, samples)


def losses(options: TDMOptions) -> torch.Tensor:
    """Critic's and student's loss of one iteration, one after the other: (2 B,)."""
    method, roles, batch, draw = setting(options)
    path = method.rollout(batch, roles, draw)
    critic = method.critic_loss(path, roles, draw.sub("critic")).values
    return torch.cat([critic, method.student_loss(path, roles, draw.sub("student")).values]).detach()


def test_gradients_reach_the_role_they_are_for_and_no_other() -> None:
    method, roles, batch, draw = setting(TDMOptions(normaliser="none"))
    path = method.rollout(batch, roles, draw)
    method.critic_loss(path, roles, draw).values.sum().backward()
    assert all(p.grad is None for p in roles.student.parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in roles.critic.parameters())
    roles.critic.zero_grad(set_to_none=True)
    method.student_loss(path, roles, draw).values.sum().backward()
    assert all(p.grad is None for p in roles.critic.parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in roles.student.parameters())


def test_the_students_gradient_is_the_score_difference_through_one_call() -> None:
    """Card 8.1, item 3: d loss / d denoised = -(guided teacher - critic) / d, at the detached input."""
    method, roles, batch, draw = setting(TDMOptions(normaliser="none", guidance_scale=2.5, steps=1))
    seen: list[torch.Tensor] = []
    student = roles.student

    def watched(x: torch.Tensor, t: torch.Tensor, condition: Any) -> torch.Tensor:
        denoised = student(x, t, condition)
        if denoised.requires_grad:
            assert not x.requires_grad
            denoised.retain_grad()
            seen.append(denoised)
        return denoised

    roles.student = watched  # type: ignore[assignment]
    asked: dict[str, tuple[Any, ...]] = {}
    teacher, critic = roles.teacher, roles.critic
    roles.critic = lambda x, t, c: asked.setdefault("critic", (x, t, critic(x, t, c)))[2]  # type: ignore[assignment]
    path = method.rollout(batch, roles, draw)
    method.student_loss(path, roles, draw).values.sum().backward()
    (denoised,) = seen
    x, tau, fake = asked["critic"]
    null = {LABEL: torch.full((BATCH,), -1)}
    free, told = teacher(x, tau, null), teacher(x, tau, batch.condition)
    real = free + 2.5 * (told - free)
    torch.testing.assert_close(denoised.grad, -(real - fake.detach()) / 3)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("process", [Flow(), DiscreteVP.linear()], ids=["flow", "vp"])
def test_the_training_rollout_is_the_sampler(steps: int, process: Any) -> None:
    teacher = correlated_gaussian(process)
    options = TDMOptions(steps=steps, guidance_scale=1.0)
    student = LinearStudent(teacher, {steps: options.time_grid(steps)})
    roles = ToyRoles(teacher, student, student)
    samples = torch.arange(16)
    draw = Streams(3).at(7, samples)
    path = TDM(options).rollout(Batch({}, samples, (8,), torch.float64), roles, draw)
    last = path.landing(torch.full((16,), steps - 1)).x
    noise = draw.normal("noise", (8,), torch.float64)
    torch.testing.assert_close(last, ddim(student, noise, grids.uniform(steps), process, {}).detach(), rtol=0, atol=0)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("updates", [1, 3])
def test_forwards_are_what_the_method_says_and_at_most_fifteen(name: str, updates: int) -> None:
    options = replace(preset(name), critic_updates=updates)  # type: ignore[type-var]
    method, roles, _, _ = setting(options)
    rows: Counter[str] = Counter()

    def counted(role: str) -> Any:
        inner = getattr(roles, role)

        def call(x: torch.Tensor, t: torch.Tensor, condition: Any) -> torch.Tensor:
            rows[role] += len(x)
            return inner(x, t, condition)

        return call

    roles.null = roles.teacher.null  # type: ignore[method-assign]
    for role in ("teacher", "student", "critic"):
        setattr(roles, role, counted(role))
    count = 4000
    samples = torch.arange(count)
    draw = Streams(0).at(1, samples)
    path = method.rollout(Batch({LABEL: samples % 2}, samples, (3,)), roles, draw)
    for update in range(updates):
        method.critic_loss(path, roles, draw.sub("critic").sub(update))
    method.student_loss(path, roles, draw.sub("student"))
    assert rows.total() / count == pytest.approx(method.forwards(), rel=0.02)
    assert preset(name).build().forwards(4) <= 15


OTHER: dict[str, Any] = {
    "steps": 2, "step_counts": (2, 4), "shift": 3.0, "grid": (0.9, 0.7, 0.5, 0.2), "eta": 0.8, "tau_range": "to_T",
    "tau_law": "logit_normal", "tau_min": 0.1, "margin": 0.05, "landing": "random", "segments": "all",
    "critic_target": "denoised", "critic_weight": "one", "snr_cap": 0.5, "teacher_regularisation": 0.1,
    "guidance_scale": 1.0, "normaliser": "none", "metric": "huber_vector", "loss_on": "landing",
}  # fmt: skip
UNDER: dict[str, tuple[dict[str, Any], Any]] = {
    "steps_condition": ({"step_counts": (2, 4)}, True),
    "importance": ({"critic_target": "denoised"}, "clipped_sum"),
    "critic_call_condition": ({"tau_range": "to_T"}, True),
    "logit_mean": ({"tau_law": "logit_normal"}, 1.0),
    "logit_std": ({"tau_law": "logit_normal"}, 0.5),
    "huber_c": ({"metric": "huber_elementwise"}, 0.1),
}
"""Options that act only together with others."""


@pytest.mark.parametrize("name", [field.name for field in fields(TDMOptions)])
def test_every_option_changes_something(name: str) -> None:
    if name == "critic_updates":
        assert TDM(TDMOptions(critic_updates=5)).critic_updates == 5
        return
    base, value = UNDER[name] if name in UNDER else ({}, OTHER[name])
    plain = TDMOptions(**base)
    assert not torch.equal(losses(plain), losses(replace(plain, **{name: value})))


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_unshifted_law_is_uniform_in_the_unshifted_coordinate(shift: float) -> None:
    base = TDMOptions(
        steps=1, tau_law="uniform_unshifted", shift=shift, margin=0.0, tau_min=0.0, critic_target="denoised"
    )
    options = replace(base, tau_min=1e-6)
    method, roles, _, _ = setting(options)
    samples = torch.arange(4000)
    draw = Streams(0).at(1, samples)
    path = method.rollout(Batch({LABEL: samples % 2}, samples, (3,)), roles, draw)
    tau = method._query(path, path.landing(torch.zeros(4000, dtype=torch.long)), draw).tau
    u = grids.unshift_time(tau.double(), shift)
    assert abs(float(u.mean()) - 0.5) < 0.02
    assert abs(float(u.std()) - 12**-0.5) < 0.02


def test_segments_own_disjoint_ranges_of_tau_and_to_t_reaches_the_top() -> None:
    for tau_range in ("separate", "to_T"):
        method, roles, _, _ = setting(TDMOptions(tau_range=tau_range))  # type: ignore[arg-type]
        samples = torch.arange(2000)
        draw = Streams(0).at(1, samples)
        path = method.rollout(Batch({LABEL: samples % 2}, samples, (3,)), roles, draw)
        call = samples % 4
        landing = path.landing(call)
        tau = method._query(path, landing, draw).tau
        assert (tau > landing.t).all()
        if tau_range == "separate":
            assert (tau < landing.t_from).all()
        else:
            assert float(tau[call == 3].max()) > 0.9


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 0}, {"steps": 3, "step_counts": (1, 2)}, {"step_counts": (2, 2), "steps": 2}, {"shift": 0.0},
        {"eta": 1.5}, {"tau_min": 1.0}, {"margin": 0.5}, {"guidance_scale": -1.0}, {"critic_updates": 0},
        {"metric": "l3"}, {"grid": (0.9, 0.5)}, {"grid": (0.5, 0.9, 0.2, 0.1)}, {"steps_condition": True},
        {"importance": "mean"}, {"margin": 0.0}, {"steps": 64}, {"snr_cap": 0.0},
        {"segments": "all", "step_counts": (3, 4)},
    ],
)  # fmt: skip
def test_bad_or_contradictory_options_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(FewstepError, match="fix:"):
        TDM(TDMOptions(**changes))


def test_presets() -> None:
    with pytest.raises(FewstepError, match="tdm-unify"):
        preset("nothing")
    paper = preset("tdm-paper")
    assert isinstance(paper, TDMOptions)
    assert (paper.critic_target, paper.importance, paper.metric, paper.loss_on) == (
        "denoised", "mean", "huber_vector", "landing",
    )  # fmt: skip
    assert preset("tdm-unify").build().needs.steps_condition


@pytest.mark.parametrize("name", METHODS)
def test_golden_curve(name: str) -> None:
    """Thirty iterations with a fixed seed: a change meant to be neutral leaves this file as it is."""
    method, roles, _, _ = setting(preset(name))  # type: ignore[arg-type]
    critic = torch.optim.SGD(roles.critic.parameters(), 0.02)
    student = torch.optim.SGD(roles.student.parameters(), 0.01)
    lines = []
    for iteration in range(1, 31):
        samples = torch.arange((iteration - 1) * BATCH, iteration * BATCH)
        draw = Streams(0).at(iteration, samples)
        path = method.rollout(Batch({LABEL: samples % 2}, samples, (3,)), roles, draw)
        values = []
        for optimiser, loss in ((critic, method.critic_loss), (student, method.student_loss)):
            optimiser.zero_grad()
            value = loss(path, roles, draw).values.mean()
            value.backward()
            optimiser.step()
            values.append(float(value.detach()))
        lines.append(values)
    golden = File(__file__).parent / "golden" / f"{name}.txt"
    if not golden.exists():
        golden.parent.mkdir(exist_ok=True)
        golden.write_text("\n".join(" ".join(f"{v:.6e}" for v in line) for line in lines) + "\n")
        pytest.fail(f"wrote {golden.name}; commit it and run again")
    stored = [[float(word) for word in line.split()] for line in golden.read_text().splitlines()]
    torch.testing.assert_close(torch.tensor(lines), torch.tensor(stored), rtol=2e-4, atol=1e-6)
