from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from core_examples import PROCESSES
from torch import Tensor, nn

from fewstep.core import grids
from fewstep.core.process import Process
from fewstep.core.rollout import Path
from fewstep.core.solvers import ddim, ddim_step, land, noise_at
from fewstep.core.tensors import Condition, expand
from fewstep.errors import FewstepError

BATCH = 5
NOISE = torch.randn(BATCH, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
CONDITION = {"sample": torch.arange(BATCH), "shift": torch.linspace(-1, 1, BATCH, dtype=torch.float64)}


class Student(nn.Module):
    """Element-wise, so that its results do not depend on the batch; counts calls per (sample, time)."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.8, dtype=torch.float64))
        self.calls: Counter[tuple[int, float]] = Counter()
        self.rows: list[int] = []
        self.modes: list[bool] = []

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        self.rows.append(len(x))
        self.modes.append(torch.is_grad_enabled())
        for sample, time in zip(condition["sample"].tolist(), t.tolist(), strict=True):
            self.calls[sample, round(time, 6)] += 1
        return torch.sin(self.gain * x + expand(condition["shift"], x)) + expand(t, x) * torch.tanh(x)


def path_of(student: Student, process: str = "flow", grid: Tensor | None = None, **options: Any) -> Path:
    return Path(
        student, NOISE, grids.shifted(4, 3.0) if grid is None else grid, PROCESSES[process], CONDITION, **options
    )


def states(process: Process, grid: Tensor, rows: slice = slice(None), **options: Any) -> list[Tensor]:
    """x at every grid point by the sampler."""
    x = NOISE[rows] * process.noise_scale
    kept = [x]
    condition = {name: value[rows] for name, value in CONDITION.items()}
    with torch.no_grad():
        ddim(Student(), x, grid, process, condition, callback=lambda k, x, denoised: kept.append(x), **options)
    return kept


def calls(value: int | list[int]) -> Tensor:
    return torch.full((BATCH,), value) if isinstance(value, int) else torch.tensor(value)


def extra(k: int, shape: Any) -> Tensor:
    assert tuple(shape) == NOISE.shape[1:]
    return torch.randn(BATCH, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(50 + k))


@pytest.mark.parametrize("eta", [1.0, 0.9])
@pytest.mark.parametrize("process", PROCESSES)
def test_path_is_what_the_sampler_samples(process: str, eta: float) -> None:
    noisy = {} if eta == 1 else {"eta": eta}
    wanted = states(PROCESSES[process], grids.shifted(4, 3.0), **noisy, **({"noise": extra} if noisy else {}))
    path = path_of(Student(), process, **noisy, **({"extra_noise": extra} if noisy else {}))
    for call in range(4):
        assert path.input(calls(call)).equal(wanted[call])
        landing = path.landing(calls(call))
        assert landing.x.equal(wanted[call + 1])
        assert landing.x.equal(land(PROCESSES[process], landing.denoised, landing.eps_hat, landing.t))
    assert path.landing(calls(3)).x.equal(path.landing(calls(3)).denoised)


def test_different_calls_in_one_batch() -> None:
    wanted = states(PROCESSES["flow"], grids.shifted(4, 3.0))
    drawn = [2, 0, 3, 1, 2]
    path = path_of(Student())
    x, landing = path.input(calls(drawn)), path.landing(calls(drawn))
    grid = grids.shifted(4, 3.0)
    for b, call in enumerate(drawn):
        assert x[b].equal(wanted[call][b])
        assert landing.x[b].equal(wanted[call + 1][b])
        assert landing.t_from[b] == grid[call]
        assert landing.t[b] == grid[call + 1]
    t_from, t = path.times(calls(drawn))
    assert t_from.equal(landing.t_from)
    assert t.equal(landing.t)


def test_nothing_is_computed_before_it_is_asked_for_and_nothing_twice() -> None:
    student = Student()
    path = path_of(student)
    grid = [round(value, 6) for value in grids.shifted(4, 3.0).tolist()]
    assert path.input(calls(0)).equal(NOISE)
    assert student.rows == []
    path.input(calls([2, 0, 3, 1, 0]))
    assert student.rows == [3, 2, 1]  # samples that have arrived leave the batch
    path.landing(calls([1, 0, 0, 1, 0]))
    assert student.rows == [3, 2, 1, 3]  # samples 1, 4 make call 0, sample 3 call 1: one batch
    path.landing(calls([1, 0, 0, 1, 0]))
    path.input(calls([2, 1, 3, 2, 1]))
    assert student.rows == [3, 2, 1, 3]
    path.landing(calls(3))
    assert sum(student.rows) == 20
    assert student.calls == Counter({(b, grid[k]): 1 for b in range(BATCH) for k in range(4)})
    assert not any(student.modes)


def test_land_has_gradient_through_exactly_one_call() -> None:
    drawn = calls([2, 0, 3, 1, 2])
    student = Student()
    path = path_of(student)
    x = path.input(drawn)
    before = len(student.rows)
    landing = path.land(student, drawn)
    assert student.rows[before:] == [BATCH]
    assert student.modes[before:] == [True]
    assert not x.requires_grad
    assert landing.x.requires_grad
    assert landing.denoised.requires_grad
    (gradient,) = torch.autograd.grad(landing.x.sum(), student.gain)

    t_from, t = path.times(drawn)
    shift = expand(CONDITION["shift"], x)
    d_denoised = torch.cos(student.gain.detach() * x + shift) * x
    flow_gain = expand(1 - t / t_from, x)  # c_i of the card, 2.2
    torch.testing.assert_close(gradient, (flow_gain * d_denoised).sum())
    plain = path.landing(drawn)
    assert not plain.x.requires_grad
    assert not plain.denoised.requires_grad
    torch.testing.assert_close(landing.x.detach(), plain.x)
    torch.testing.assert_close(landing.eps_hat.detach(), plain.eps_hat)


def test_land_uses_the_student_it_is_given_on_the_old_path() -> None:
    path = path_of(Student())
    other = Student()
    with torch.no_grad():
        other.gain.mul_(-1)
    landing = path.land(other, calls(2))
    assert len(other.rows) == 1
    x = states(PROCESSES["flow"], grids.shifted(4, 3.0))[2]
    denoised = other(x, landing.t_from, CONDITION)
    torch.testing.assert_close(landing.x, ddim_step(PROCESSES["flow"], x, denoised, landing.t_from, landing.t))


def test_nothing_flows_into_noise_or_path() -> None:
    noise = NOISE.clone().requires_grad_()
    path = Path(Student(), noise, grids.uniform(4), PROCESSES["linear"], CONDITION)
    assert not path.input(calls(0)).requires_grad
    assert not path.input(calls(3)).requires_grad
    path.land(Student(), calls(0)).x.sum().backward()
    assert noise.grad is None


def test_step_counts_may_differ_within_a_batch() -> None:
    steps = torch.tensor([1, 2, 4, 2, 3])
    stacked = grids.stack(steps, lambda count: grids.shifted(count, 3.0))
    student = Student()
    path = path_of(student, "scaled_linear", stacked)
    assert path.steps.equal(steps)
    last = path.landing(steps - 1)
    assert student.rows == [5, 4, 2, 1]
    for b, count in enumerate(steps.tolist()):
        rows = slice(b, b + 1)
        wanted = states(PROCESSES["scaled_linear"], grids.shifted(count, 3.0), rows)
        assert last.x[rows].equal(wanted[-1])
    assert last.t.eq(0).all()
    assert last.x.equal(last.denoised)
    with pytest.raises(FewstepError, match=r"found calls \[1, 1, 1, 1, 1\]"):
        path.input(calls(1))


@pytest.mark.parametrize("call", [-1, 4])
def test_calls_off_the_path_are_refused(call: int) -> None:
    student = Student()
    path = path_of(student)
    for method in (path.input, path.landing, path.times, lambda call: path.land(student, call)):
        with pytest.raises(FewstepError, match="expected each in"):
            method(calls(call))
    assert student.rows == []


def test_landing_elsewhere_keeps_the_prediction() -> None:
    student = Student()
    path = path_of(student, "linear")
    landing = path.land(student, calls(1))
    count = len(student.rows)
    t = landing.t + 0.3 * (landing.t_from - landing.t)
    middle = path.landing_at(landing, t)
    assert len(student.rows) == count
    assert middle.denoised is landing.denoised
    assert middle.eps_hat is landing.eps_hat
    assert middle.t.equal(t)
    process = PROCESSES["linear"]
    torch.testing.assert_close(middle.x, ddim_step(process, path.input(calls(1)), landing.denoised, landing.t_from, t))
    torch.testing.assert_close(noise_at(process, middle.x, middle.denoised, t), middle.eps_hat)
    torch.testing.assert_close(path.landing_at(landing, landing.t_from).x, path.input(calls(1)))
    assert path.landing_at(landing, landing.t).x.equal(landing.x)


def test_extra_noise_is_the_same_for_path_and_land() -> None:
    drawn: list[int] = []

    def counted(k: int, shape: Any) -> Tensor:
        drawn.append(k)
        return extra(k, shape)

    student = Student()
    path = path_of(student, eta=0.8, extra_noise=counted)
    call = calls([0, 2, 1, 0, 2])
    landing = path.landing(call)
    assert sorted(drawn) == [0, 1, 2]
    assert path.land(student, call).x.detach().equal(landing.x)
    eps = noise_at(PROCESSES["flow"], path.input(call), landing.denoised, landing.t_from)
    fresh = torch.stack([extra(k, NOISE.shape[1:])[b] for b, k in enumerate(call.tolist())])
    torch.testing.assert_close(landing.eps_hat, 0.8 * eps + 0.6 * fresh)


def test_float32_students_get_float32_times() -> None:
    def student(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        assert x.dtype == t.dtype == torch.float32
        return 0.5 * x

    path = Path(student, NOISE.float(), grids.uniform(2), PROCESSES["linear"], {})
    landing = path.landing(calls(1))
    assert landing.x.dtype == landing.t.dtype == torch.float32


def test_eta_without_noise_is_refused() -> None:
    with pytest.raises(FewstepError, match="without extra noise"):
        path_of(Student(), eta=0.9)
    with pytest.raises(FewstepError, match=r"eta = 1\.1"):
        path_of(Student(), eta=1.1, extra_noise=extra)
