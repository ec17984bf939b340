"""Teacher score matching: card msd.md section 8, items 4 and 5, and the loss against its formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.core.process import VE, DiscreteVP, Flow, Process
from fewstep.core.rollout import Path
from fewstep.core.solvers import ddim
from fewstep.core.streams import Draw, Streams
from fewstep.core.tensors import Condition
from fewstep.errors import FewstepError
from fewstep.evaluation.exact import LABEL, GaussianTeacher, MixtureTeacher, ring
from fewstep.evaluation.toy import BulkDraw
from fewstep.methods.base import Batch
from fewstep.methods.tsm import TSM, TSMOptions, tsm

COUNT = 64
PROCESSES = [Flow(), DiscreteVP.cosine()]


class Line(nn.Module):
    """a x + b, the same at all times."""

    def __init__(self, gain: float, offset: float) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain, dtype=torch.float64))
        self.offset = nn.Parameter(torch.tensor(offset, dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self.gain * x + self.offset


class Roles:
    """An exact teacher and a line; records every call."""

    def __init__(self, exact: MixtureTeacher) -> None:
        self.process, self.exact, self.network = exact.process, exact, Line(0.3, 0.1)
        self.null = exact.null
        self.calls: list[tuple[str, Tensor, Tensor, Condition]] = []

    def teacher(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        self.calls.append(("teacher", x, t, condition))
        return self.exact(x, t, condition)

    def student(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        self.calls.append(("student", x, t, condition))
        return self.network(x, t, condition)


class AtOneTime(TSM):
    """All samples at one time."""

    at = 0.5

    def _point(self, path: Path, draw: Draw) -> tuple[Tensor, Tensor, Condition]:
        x, t, condition = super()._point(path, draw)
        assert path.real is not None
        clean = path.real[0]
        t = torch.full_like(t, self.at)
        alpha, sigma = path.process.alpha(t)[:, None], path.process.sigma(t)[:, None]
        return alpha * clean + sigma * draw.normal("noise at t", x.shape[1:], x.dtype), t, condition


def two_modes(process: Process) -> MixtureTeacher:
    """0.7 N(-1, 0.3^2) + 0.3 N(1.5, 0.4^2), the card's mixture (dmd2.md, 8.11)."""
    means = torch.tensor([[-1.0], [1.5]], dtype=torch.float64)
    covariances = torch.tensor([0.09, 0.16], dtype=torch.float64)[:, None, None]
    return MixtureTeacher(process, torch.tensor([0.7, 0.3], dtype=torch.float64), means, covariances)


def gradients(roles: Roles, clean: Tensor, method: TSM) -> Tensor:
    """Per-sample gradients (N, 2) of slope and offset."""
    numbers = BulkDraw(len(clean), torch.Generator().manual_seed(1))
    batch = Batch({}, torch.arange(len(clean)), (1,), torch.float64, real=(clean, {}))
    loss = method.student_loss(method.rollout(batch, roles, numbers), roles, numbers)
    (outer,) = torch.autograd.grad(loss.values.sum(), roles.network.gain, retain_graph=True)
    assert outer.isfinite()
    _, x, *_ = roles.calls[-1]
    target = roles.calls[-2][1:]
    error = 2 * (roles.network(x, x, {}) - roles.teacher(*target)).detach()
    torch.testing.assert_close((error * x).sum(), outer)  # weight one: the method's own gradient
    return torch.cat([error * x, error], 1)


def test_it_is_denoising_with_less_variance() -> None:
    """Item 4: equal mean gradients, variance ratios of about 1.87 and 1.71 at sigma = 0.8."""
    process = VE()
    AtOneTime.at = float(process.time_of(torch.tensor(0.8)))
    method = AtOneTime(TSMOptions(points="data", weight="one"))
    clean = two_modes(process).sample(400_000, torch.Generator().manual_seed(0))
    matching, denoising = Roles(two_modes(process)), Roles(two_modes(process))
    denoising.exact = lambda x, t, condition: clean  # type: ignore[assignment, return-value]
    first, second = gradients(matching, clean, method), gradients(denoising, clean, method)
    assert torch.equal(matching.calls[-1][1], denoising.calls[-1][1])
    torch.testing.assert_close(first.mean(0), second.mean(0), rtol=0, atol=0.01)
    ratio = second.var(0) / first.var(0)
    assert ratio.tolist() == pytest.approx([1.87, 1.71], rel=0.02)


@pytest.mark.parametrize("law", ["Gaussian", "mixture"])
def test_its_optimum_is_the_best_affine_denoiser(law: str) -> None:
    """Item 5: the exact denoiser of a Gaussian; of a mixture, the linear one of its mean and variance."""
    process = VE()
    AtOneTime.at = float(process.time_of(torch.tensor(0.8)))
    exact = two_modes(process)
    if law == "Gaussian":
        exact = GaussianTeacher(process, *(torch.full((1,) * n, 0.4, dtype=torch.float64) for n in (1, 2)))
    mean, variance = (float(part) for part in exact.moments(0.0))
    roles, method = Roles(exact), AtOneTime(TSMOptions(points="data", weight="one"))
    clean = exact.sample(200_000, torch.Generator().manual_seed(0))
    numbers = BulkDraw(len(clean), torch.Generator().manual_seed(1))
    batch = Batch({}, torch.arange(len(clean)), (1,), torch.float64, real=(clean, {}))
    path = method.rollout(batch, roles, numbers)
    optimiser = torch.optim.LBFGS(roles.network.parameters(), max_iter=20)
    state = numbers._generator.get_state()

    def loss() -> Tensor:
        numbers._generator.set_state(state)
        optimiser.zero_grad()
        value = method.student_loss(path, roles, numbers).values.mean()
        value.backward()
        return value

    optimiser.step(loss)
    gain = variance / (variance + 0.64)
    tolerance = 1e-6 if law == "Gaussian" else 5e-3
    assert float(roles.network.gain) == pytest.approx(gain, abs=tolerance)
    assert float(roles.network.offset) == pytest.approx(mean * (1 - gain), abs=tolerance)


def batch(real: bool = False) -> Batch:
    label = {LABEL: torch.arange(COUNT) % 2}
    clean = torch.randn(COUNT, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return Batch(label, torch.arange(COUNT), (2,), torch.float64, real=(clean, label) if real else None)


def draw(iteration: int = 0) -> Draw:
    return Streams(0).at(iteration, range(COUNT))


def ring_roles(process: Process) -> Roles:
    return Roles(ring(process, [1, 2, 3, 4], 1.5, 0.3, torch.float64))


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: p.name)
@pytest.mark.parametrize("points", ["path", "data"])
def test_the_loss_is_the_formula_and_trains_the_student_alone(points: str, process: Process) -> None:
    method, roles = TSM(TSMOptions(points=points, guidance_scale=2.0)), ring_roles(process)
    path = method.rollout(batch(real=points == "data"), roles, draw())
    assert not roles.calls
    loss = method.student_loss(path, roles, draw())
    *_, (asked, _, _, _), (name, x, t, told) = roles.calls
    assert (asked, name) == ("teacher", "student")
    null = roles.null(told)
    with torch.no_grad():
        target = roles.exact(x, t, null) + 2 * (roles.exact(x, t, told) - roles.exact(x, t, null))
        expected = process.snr(t).clamp(max=5) * (roles.network(x, t, told) - target).square().mean(1)
    torch.testing.assert_close(loss.values.detach(), expected)
    loss.values.mean().backward()
    assert all(p.grad is not None for p in roles.network.parameters())
    assert all(not metric.requires_grad for metric in loss.metrics.values())


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: p.name)
def test_points_lie_on_the_teachers_own_path(process: Process) -> None:
    method, roles = TSM(TSMOptions(shift=2.0, path_steps=4)), ring_roles(process)
    path = method.rollout(batch(), roles, draw())
    x, t, _ = method._point(path, draw())
    assert t.min() >= 0.02
    assert t.max() <= 1
    call = ((path.grid[:, :-1] >= t[:, None].double() - 1e-12).sum(1) - 1).clamp(min=0)
    landing = path.landing(call)
    torch.testing.assert_close(path.landing_at(landing, t).x, x)
    noise = draw().normal("noise", (2,), torch.float64)
    sampled = ddim(roles.exact, noise, path.grid[0], process, batch().condition)
    torch.testing.assert_close(path.landing(torch.full((COUNT,), 3)).x, sampled)


@pytest.mark.parametrize(("points", "scale"), [("path", 1.0), ("path", 3.0), ("data", 1.0), ("data", 3.0)])
def test_forwards_are_what_is_claimed(points: str, scale: float) -> None:
    own = {"path_steps": 6} if points == "path" else {}
    method, roles = TSM(TSMOptions(points=points, guidance_scale=scale, **own)), ring_roles(Flow())
    for iteration in range(20):
        numbers = draw(iteration)
        method.student_loss(method.rollout(batch(real=points == "data"), roles, numbers), roles, numbers)
    made = sum(len(x) for _, x, *_ in roles.calls) / COUNT / 20
    assert made == pytest.approx(method.forwards(), rel=0.03)


def test_what_it_needs() -> None:
    assert not TSM(tsm()).needs.critic
    assert not TSM(tsm()).needs.real_data
    assert TSM(TSMOptions(points="data")).needs.real_data
    assert TSM(tsm()).critic_updates == 0
    assert tsm().counts == (4,)
    assert tsm().time_grid(4).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    with pytest.raises(FewstepError, match="real data"):
        TSM(TSMOptions(points="data")).rollout(batch(), ring_roles(Flow()), draw())


@pytest.mark.parametrize(
    "change",
    [{"shift": 3.0}, {"points": "data"}, {"path_steps": 3}, {"guidance_scale": 2.0}, {"weight": "one"},
     {"snr_cap": 0.5}, {"tau_min": 0.7}],
)  # fmt: skip
def test_every_option_does_something(change: dict[str, Any]) -> None:
    losses = []
    for options in (TSMOptions(), TSMOptions(**change)):
        method, roles = TSM(options), ring_roles(Flow())
        losses.append(method.student_loss(method.rollout(batch(real=True), roles, draw()), roles, draw()).values)
    assert not torch.allclose(*losses)


@pytest.mark.parametrize(
    "change",
    [{"steps": 0}, {"shift": 0.0}, {"points": "x"}, {"path_steps": 0}, {"guidance_scale": -1.0}, {"weight": "x"},
     {"snr_cap": 0.0}, {"tau_min": 0.0}, {"tau_min": 1.0}],
)  # fmt: skip
def test_values_out_of_range_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(FewstepError, match=next(iter(change))):
        TSMOptions(**change).build()
