"""Samplers against the schedulers of diffusers, the exact ODE of a Gaussian teacher, and their own contract."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from core_examples import PROCESSES, GaussianTeacher, network
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    LCMScheduler,
)
from torch import Tensor

from fewstep.core import grids
from fewstep.core.guidance import Denoiser
from fewstep.core.prediction import to_denoised
from fewstep.core.process import Process, process_from_scheduler
from fewstep.core.solvers import SOLVERS, ddim, ddim_step, dpmpp_2m, heun, lcm, mix_noise
from fewstep.core.tensors import Condition
from fewstep.errors import FewstepError

X = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def denoiser(process: Process, kind: str) -> Denoiser:
    """`network` read as a prediction of the given kind."""

    def model(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return to_denoised(kind, network(x, process.network_time(t)), x, process.alpha(t), process.sigma(t))

    return model


def diffusers_states(scheduler: Any, x: Tensor, **options: Any) -> list[Tensor]:
    """The state after every scheduler step; its timesteps must have been set."""
    states = []
    for time in scheduler.timesteps:
        x = scheduler.step(network(x, time.double().expand(len(x))), time, x, **options).prev_sample
        states.append(x)
    return states


def our_states(solver: Any, process: Process, kind: str, grid: Tensor, **options: Any) -> list[Tensor]:
    states: list[Tensor] = []
    result = solver(
        denoiser(process, kind), X, grid, process, {}, callback=lambda k, x, denoised: states.append(x), **options
    )
    assert result is states[-1]
    return states


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_ddim_is_diffusers_ddim(prediction: str, steps: int) -> None:
    scheduler = DDIMScheduler(
        timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False, prediction_type=prediction, **SD
    )
    scheduler.set_timesteps(steps)
    process, kind = process_from_scheduler(scheduler.config)
    assert scheduler.timesteps.tolist() == process.network_time(grids.uniform(steps)[:-1]).tolist()
    ours = our_states(ddim, process, kind, grids.uniform(steps))
    torch.testing.assert_close(ours, diffusers_states(scheduler, X), atol=3e-5, rtol=3e-5)


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_ddim_at_zero_terminal_snr(prediction: str) -> None:
    scheduler = DDIMScheduler(
        timestep_spacing="trailing", clip_sample=False, prediction_type=prediction, rescale_betas_zero_snr=True, **SD
    )
    scheduler.set_timesteps(4)
    process, kind = process_from_scheduler(scheduler.config)
    ours = our_states(ddim, process, kind, grids.uniform(4))
    torch.testing.assert_close(ours, diffusers_states(scheduler, X), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("steps", "shift"), [(1, 1.0), (4, 1.0), (4, 3.0), (8, 6.0)])
def test_ddim_on_flow_is_flow_match_euler(steps: int, shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps, sigmas=grids.uniform(steps)[:-1].tolist())
    ours = our_states(ddim, PROCESSES["flow"], "flow", grids.shifted(steps, shift))
    torch.testing.assert_close(ours, diffusers_states(scheduler, X), atol=1e-5, rtol=1e-5, check_dtype=False)


def test_ddim_on_custom_sigmas() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    grid = grids.from_scheduler(scheduler, 3, PROCESSES["flow"], sigmas=[1.0, 0.8, 0.3])
    ours = our_states(ddim, PROCESSES["flow"], "flow", grid)
    torch.testing.assert_close(ours, diffusers_states(scheduler, X), atol=1e-5, rtol=1e-5, check_dtype=False)


@pytest.mark.parametrize("steps", [1, 2, 4, 8, 20])
@pytest.mark.parametrize("final", [{"lower_order_final": True}, {"lower_order_final": False}])
def test_dpmpp_2m_is_diffusers_dpm_solver(steps: int, final: dict[str, bool]) -> None:
    scheduler = DPMSolverMultistepScheduler(timestep_spacing="trailing", **final, **SD)
    process, kind = process_from_scheduler(scheduler.config)
    grid = grids.from_scheduler(scheduler, steps, process)
    ours = our_states(dpmpp_2m, process, kind, grid)
    torch.testing.assert_close(ours, diffusers_states(scheduler, X), atol=1e-4, rtol=1e-4, check_dtype=False)


@pytest.mark.parametrize(("steps", "shift"), [(1, 1.0), (2, 3.0), (4, 3.0), (8, 6.0)])
def test_dpmpp_2m_on_flow_sigmas(steps: int, shift: float) -> None:
    """The scheduler of the released TDM adapters for SD3 (card 6)."""
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, num_train_timesteps=1000
    )
    process, kind = process_from_scheduler(scheduler.config)
    grid = grids.from_scheduler(scheduler, steps, process)
    ours = our_states(dpmpp_2m, process, kind, grid)
    scheduler.timesteps = scheduler.sigmas[:-1] * 1000  # undo its rounding: both must query the same times
    torch.testing.assert_close(ours, diffusers_states(scheduler, X), atol=1e-4, rtol=1e-4, check_dtype=False)


def test_dpmpp_2m_starts_at_pure_noise() -> None:
    """At alpha = 0 the first interval of log SNR is infinite and the second step falls back to first order."""
    shared = our_states(ddim, PROCESSES["flow"], "flow", grids.uniform(4))
    ours = our_states(dpmpp_2m, PROCESSES["flow"], "flow", grids.uniform(4))
    torch.testing.assert_close(ours[:2], shared[:2])
    assert (ours[2] - shared[2]).abs().max() > 1e-3
    assert ours[3].isfinite().all()


@pytest.mark.parametrize(("steps", "shift"), [(1, 1.0), (2, 1.0), (5, 3.0)])
def test_heun_is_flow_match_heun(steps: int, shift: float) -> None:
    scheduler = FlowMatchHeunDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    grid = (
        torch.cat([scheduler.sigmas[:1], scheduler.sigmas[1::2]]).double() if steps > 1 else scheduler.sigmas.double()
    )
    ours = our_states(heun, PROCESSES["flow"], "flow", grids.explicit(grid.tolist()))
    theirs = diffusers_states(scheduler, X)
    assert len(theirs) == 2 * steps - 1
    torch.testing.assert_close(ours[-1], theirs[-1], atol=1e-5, rtol=1e-5, check_dtype=False)


def lcm_noise(k: int, shape: Any) -> Tensor:
    assert tuple(shape) == X.shape[1:]
    return torch.randn(len(X), *shape, generator=torch.Generator().manual_seed(100 + k), dtype=torch.float64)


def test_lcm_is_flow_match_lcm(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = FlowMatchLCMScheduler()
    scheduler.set_timesteps(4, sigmas=[1.0, 0.75, 0.5, 0.25])
    calls = iter(range(4))
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_flow_match_lcm.randn_tensor",
        lambda shape, **_: lcm_noise(next(calls), shape[1:]),
    )
    ours = our_states(lcm, PROCESSES["flow"], "flow", grids.uniform(4), noise=lcm_noise)
    torch.testing.assert_close(ours, diffusers_states(scheduler, X), atol=1e-5, rtol=1e-5, check_dtype=False)


def test_lcm_is_diffusers_lcm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its boundary scalings c_skip, c_out are 0 and 1 to 1e-5 at the times used here."""
    scheduler = LCMScheduler(clip_sample=False, original_inference_steps=4, timestep_scaling=1000.0, **SD)
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [999, 749, 499, 249]
    calls = iter(range(4))
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_lcm.randn_tensor", lambda shape, **_: lcm_noise(next(calls), shape[1:])
    )
    process, kind = process_from_scheduler(scheduler.config)
    ours = our_states(lcm, process, kind, grids.uniform(4), noise=lcm_noise)
    torch.testing.assert_close(ours, diffusers_states(scheduler, X), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", PROCESSES)
def test_ddim_step_is_equation_2(name: str) -> None:
    process = PROCESSES[name]
    t_from, t_to = torch.tensor([0.9, 0.5]).double(), torch.tensor([0.6, 0.0]).double()
    x0, eps = torch.randn(2, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    wide = {t: (process.alpha(v)[:, None], process.sigma(v)[:, None]) for t, v in (("from", t_from), ("to", t_to))}
    x = wide["from"][0] * x0 + wide["from"][1] * eps
    landed = ddim_step(process, x, x0, t_from, t_to)
    torch.testing.assert_close(landed, wide["to"][0] * x0 + wide["to"][1] * eps, atol=1e-9, rtol=1e-9)
    assert landed[1].equal(x0[1])


def test_eta_mixes_in_fresh_noise() -> None:
    eps, fresh = torch.randn(2, 200_000, generator=torch.Generator().manual_seed(2))
    mixed = mix_noise(eps, fresh, 0.9)
    torch.testing.assert_close(mixed, 0.9 * eps + math.sqrt(0.19) * fresh)
    assert abs(mixed.var() - 1) < 0.02
    flow = PROCESSES["flow"]
    noisy = our_states(ddim, flow, "flow", grids.uniform(4), eta=0.5, noise=lcm_noise)
    plain = our_states(ddim, flow, "flow", grids.uniform(4))
    shift = noisy[0] - plain[0]
    first_eps = X  # at t = 1 of a flow process x is the noise
    wanted = 0.75 * (0.5 * first_eps + math.sqrt(0.75) * lcm_noise(0, X.shape[1:]) - first_eps)
    torch.testing.assert_close(shift, wanted)
    replaced = our_states(ddim, flow, "flow", grids.uniform(4), eta=0.0, noise=lcm_noise)
    torch.testing.assert_close(replaced, our_states(lcm, flow, "flow", grids.uniform(4), noise=lcm_noise))


@pytest.mark.parametrize(("name", "calls"), [("ddim", 5), ("lcm", 5), ("dpmpp_2m", 5), ("heun", 9)])
def test_number_of_calls_and_what_they_are_told(name: str, calls: int) -> None:
    seen: list[float] = []
    condition = {"text": torch.ones(2, 1)}

    def model(x: Tensor, t: Tensor, given: Condition) -> Tensor:
        assert given is condition
        assert t.shape == (2,)
        assert t.dtype == torch.float32
        assert t[0] == t[1]
        seen.append(round(t[0].item(), 6))
        return 0.5 * x

    options = {"noise": lcm_noise} if name == "lcm" else {}
    indices: list[int] = []
    result = SOLVERS[name](
        model,
        X.float(),
        grids.uniform(5),
        PROCESSES["flow"],
        condition,
        **options,
        callback=lambda k, *_: indices.append(k),
    )
    assert result.dtype == torch.float32
    assert indices == [0, 1, 2, 3, 4]
    extra = [0.8, 0.8, 0.6, 0.6, 0.4, 0.4, 0.2, 0.2] if name == "heun" else [0.8, 0.6, 0.4, 0.2]
    assert len(seen) == calls
    assert seen == [1.0, *extra]


@pytest.mark.parametrize("process", ["cosine", "linear", "zero_snr", "flow", "ve"])
@pytest.mark.parametrize(("name", "order"), [("ddim", 1), ("heun", 2)])
def test_order_of_accuracy_from_noise_to_data(name: str, order: int, process: str) -> None:
    """Steps equal in arctan(sigma / alpha), which is smooth up to both ends."""
    assert_order(name, order, PROCESSES[process], lambda ratio: ratio.atan(), start=1.0, end=0.0)


@pytest.mark.parametrize("process", ["cosine", "linear", "zero_snr", "flow", "ve"])
@pytest.mark.parametrize(("name", "order"), [("ddim", 1), ("heun", 2), ("dpmpp_2m", 2)])
def test_order_of_accuracy_between_two_noise_levels(name: str, order: int, process: str) -> None:
    """Steps equal in log SNR, the variable of DPM-Solver, which has no end at pure noise or data."""
    assert_order(name, order, PROCESSES[process], lambda ratio: ratio.log(), start=0.8, end=0.1)


def assert_order(
    name: str, order: int, process: Process, spacing: Callable[[Tensor], Tensor], start: float, end: float
) -> None:
    """The error against the exact ODE of a Gaussian teacher falls as h^order."""
    teacher = GaussianTeacher(process)
    times = torch.linspace(start, end, 100_001, dtype=torch.float64)
    position = spacing(process.sigma(times) / process.alpha(times))
    x = process.alpha(times[0]) * teacher.mean + teacher.spread(times[0]) * X
    exact = teacher.flow_to(x, times[0], times[-1])
    counts, errors = (60, 120), []
    for steps in counts:
        wanted = torch.linspace(0, 1, steps + 1, dtype=torch.float64)[1:-1]
        inside = torch.searchsorted(-position, -torch.lerp(position[0], position[-1], wanted))
        grid = torch.cat([times[:1], times[inside], times[-1:]])
        errors.append((SOLVERS[name](teacher, x, grid, process, {}) - exact).square().mean().sqrt().item())
    slope = math.log2(errors[0] / errors[1])
    assert abs(slope - order) < 0.3, f"order {slope:.2f}, errors {errors}"


@pytest.mark.parametrize("name", SOLVERS)
def test_one_step_is_the_denoised_sample(name: str) -> None:
    teacher = GaussianTeacher(PROCESSES["flow"])
    options = {"noise": lcm_noise} if name == "lcm" else {}
    result = SOLVERS[name](teacher, X, grids.uniform(1), PROCESSES["flow"], {}, **options)
    torch.testing.assert_close(result, teacher(X, torch.ones(2), {}))


def test_bad_arguments_are_refused() -> None:
    teacher = GaussianTeacher(PROCESSES["flow"])
    with pytest.raises(FewstepError, match="without noise"):
        lcm(teacher, X, grids.uniform(2), PROCESSES["flow"], {})
    with pytest.raises(FewstepError, match=r"found noise of shape \(3, 4, 4\) for samples of shape \(2, 3, 4, 4\)"):
        lcm(teacher, X, grids.uniform(2), PROCESSES["flow"], {}, noise=lambda k, shape: torch.zeros(shape))
    with pytest.raises(FewstepError, match=r"eta = 1\.5"):
        ddim(teacher, X, grids.uniform(2), PROCESSES["flow"], {}, eta=1.5, noise=lcm_noise)
