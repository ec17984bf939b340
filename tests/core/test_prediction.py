from __future__ import annotations

import pytest
import torch
from core_examples import PROCESSES, GaussianTeacher

from fewstep.core.prediction import PREDICTIONS, from_denoised, noise_in, to_denoised
from fewstep.core.solvers import ddim_step
from fewstep.errors import FewstepError


def example(name: str, t: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(x0, eps, x, alpha, sigma) at the times `t`, float64."""
    process = PROCESSES[name]
    x0, eps = torch.randn(2, len(t), 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    alpha, sigma = process.alpha(t), process.sigma(t)
    x = alpha[:, None, None] * x0 + sigma[:, None, None] * eps
    return x0, eps, x, alpha, sigma


@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize("name", PROCESSES)
def test_round_trip_on_the_whole_time_axis(name: str, kind: str) -> None:
    t = torch.linspace(0, 1, 41, dtype=torch.float64)
    x0, _, x, alpha, sigma = example(name, t)
    output = from_denoised(kind, x0, x, alpha, sigma)
    assert output.isfinite().all()
    recovered = to_denoised(kind, output, x, alpha, sigma)
    if kind == "eps" and alpha[-1] == 0:  # pure noise says nothing about x0
        assert recovered[-1].isfinite().all()
        recovered, x0 = recovered[:-1], x0[:-1]
    torch.testing.assert_close(recovered, x0, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", PROCESSES)
def test_outputs_mean_what_their_names_say(name: str) -> None:
    t = torch.linspace(0.01, 1, 9, dtype=torch.float64)
    x0, eps, x, alpha, sigma = example(name, t)
    wide_alpha, wide_sigma = alpha[:, None, None], sigma[:, None, None]
    close = {"atol": 1e-9, "rtol": 1e-9}
    torch.testing.assert_close(from_denoised("eps", x0, x, alpha, sigma), eps, **close)
    torch.testing.assert_close(from_denoised("v", x0, x, alpha, sigma), wide_alpha * eps - wide_sigma * x0, **close)
    torch.testing.assert_close(from_denoised("flow", x0, x, alpha, sigma), eps - x0, **close)
    assert from_denoised("x0", x0, x, alpha, sigma) is x0


def test_formulas_of_the_card() -> None:
    """Card 2.1: the vp table on a vp process, the flow row on the flow process."""
    t = torch.tensor([0.2, 0.6], dtype=torch.float64)
    output = torch.randn(2, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    _, _, x, alpha, sigma = example("linear", t)
    a, s = alpha[:, None, None], sigma[:, None, None]
    torch.testing.assert_close(to_denoised("eps", output, x, alpha, sigma), (x - s * output) / a)
    torch.testing.assert_close(to_denoised("v", output, x, alpha, sigma), a * x - s * output)
    _, _, x, alpha, sigma = example("flow", t)
    torch.testing.assert_close(to_denoised("flow", output, x, alpha, sigma), x - sigma[:, None, None] * output)


def test_clean_samples_stay_and_hold_no_noise() -> None:
    x = torch.randn(2, 3, dtype=torch.float64)
    one, zero = torch.ones(2).double(), torch.zeros(2).double()
    for kind in ("eps", "v", "flow"):
        assert to_denoised(kind, torch.full_like(x, 7.0), x, one, zero).equal(x)
    assert noise_in(x, x + 1, one, zero).equal(torch.zeros_like(x))


@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize("name", ["linear", "flow"])
def test_direction_and_landing_do_not_depend_on_the_parameterisation(name: str, kind: str) -> None:
    """Card 8.1, identity 2, and eq. 1: the difference of two scores is alpha/sigma^2 times that of their x0."""
    process = PROCESSES[name]
    t, t_to = torch.full((5,), 0.7).double(), torch.full((5,), 0.4).double()
    _, _, x, alpha, sigma = example(name, t)
    teacher, other = GaussianTeacher(process), GaussianTeacher(process, mean=-1.0, variance=2.0)
    kept = {}
    for key, model in (("real", teacher), ("fake", other)):
        output = from_denoised(kind, model(x, t, {}), x, alpha, sigma)
        kept[key] = to_denoised(kind, output, x, alpha, sigma)
        landed = ddim_step(process, x, kept[key], t, t_to)
        torch.testing.assert_close(landed, ddim_step(process, x, model(x, t, {}), t, t_to), atol=1e-9, rtol=0)
    a, s = alpha[0], sigma[0]
    scores = [-(x - a * m.mean) / m.spread(t[0]).square() for m in (teacher, other)]
    torch.testing.assert_close(a / s**2 * (kept["real"] - kept["fake"]), scores[0] - scores[1], atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("function", [to_denoised, from_denoised])
def test_unknown_kind_is_refused(function: object) -> None:
    one = torch.ones(1)
    with pytest.raises(FewstepError, match="found prediction type 'velocity'"):
        function("velocity", torch.ones(1, 2), torch.ones(1, 2), one, one)
