from __future__ import annotations

import pytest
import torch
from core_examples import PROCESSES
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler

from fewstep.core import grids
from fewstep.core.process import VE
from fewstep.errors import FewstepError


@pytest.mark.parametrize(("steps", "indices"), [(1, [999]), (2, [999, 499]), (4, [999, 749, 499, 249])])
def test_uniform_grid_is_the_trailing_spacing(steps: int, indices: list[int]) -> None:
    grid = grids.uniform(steps)
    assert grid.dtype == torch.float64
    assert grid.shape == (steps + 1,)
    assert grid[-1] == 0
    assert PROCESSES["linear"].network_time(grid[:-1]).tolist() == indices


def test_uniform_grid_from_a_lower_start() -> None:
    assert grids.uniform(4, start=0.5).tolist() == [0.5, 0.375, 0.25, 0.125, 0]


def test_shift() -> None:
    torch.testing.assert_close(grids.shifted(4, 3.0), torch.tensor([1, 0.9, 0.75, 0.5, 0]).double(), atol=1e-7, rtol=0)
    assert grids.shifted(4, 1.0).equal(grids.uniform(4))
    torch.testing.assert_close(
        grids.shifted(2, 2.0, start=0.5), torch.tensor([2 / 3, 0.4, 0]).double(), atol=1e-7, rtol=0
    )
    u = torch.linspace(0, 1, 101, dtype=torch.float64)
    torch.testing.assert_close(grids.unshift_time(grids.shift_time(u, 5.0), 5.0), u)
    assert grids.shift_time(torch.tensor(0.5), 3.0) == 0.75
    assert grids.unshift_time(torch.tensor(0.75), 3.0) == 0.5


def test_explicit_indices_are_those_of_the_card() -> None:
    """The TDM grid of CogVideoX, 999 856 665 399, is the uniform one shifted by 2 and rounded (card 2.8)."""
    grid = grids.explicit([999, 856, 665, 399], 1000)
    assert grid.tolist() == [1.0, 0.857, 0.666, 0.4, 0.0]
    torch.testing.assert_close(grid, grids.shifted(4, 2.0), atol=7e-4, rtol=0)
    assert PROCESSES["linear"].network_time(grid[:-1]).tolist() == [999, 856, 665, 399]
    assert grids.explicit([0], 1000).tolist() == [0.001, 0]


def test_explicit_times_may_end_in_zero() -> None:
    assert grids.explicit([1.0, 0.5]).tolist() == grids.explicit([1.0, 0.5, 0.0]).tolist() == [1.0, 0.5, 0.0]


@pytest.mark.parametrize("values", [[], [0.0], [999, 500], [0.5, 0.5], [0.2, 0.6], [1.0, -0.1]])
def test_bad_grids_are_refused(values: list[float]) -> None:
    with pytest.raises(FewstepError, match="found the time grid .*expected strictly falling"):
        grids.explicit(values)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(FewstepError, match="steps = 0"):
        grids.uniform(0)
    with pytest.raises(FewstepError, match="shift = 0"):
        grids.shifted(4, 0.0)
    with pytest.raises(FewstepError, match="found the time grid"):
        grids.uniform(2, start=1.5)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_from_schedulers(steps: int) -> None:
    ddim = DDIMScheduler(timestep_spacing="trailing")
    torch.testing.assert_close(grids.from_scheduler(ddim, steps, PROCESSES["linear"]), grids.uniform(steps))
    flow = FlowMatchEulerDiscreteScheduler(shift=3.0)
    grid = grids.from_scheduler(flow, steps, PROCESSES["flow"])
    torch.testing.assert_close(grid, flow.sigmas.double())
    karras = EDMEulerScheduler()
    grid = grids.from_scheduler(karras, steps, VE())
    torch.testing.assert_close(VE().sigma(grid), karras.sigmas.double(), rtol=1e-5, atol=0)
    assert karras.num_inference_steps == steps


def test_from_scheduler_hands_arguments_on() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    grid = grids.from_scheduler(scheduler, 2, PROCESSES["flow"], sigmas=[1.0, 0.3])
    torch.testing.assert_close(grid, torch.tensor([1.0, 0.3, 0.0]).double(), atol=1e-7, rtol=0)
    leading = grids.from_scheduler(DPMSolverMultistepScheduler(timestep_spacing="leading"), 4, PROCESSES["linear"])
    torch.testing.assert_close(leading[:-1] * 1000 - 1, torch.tensor([800.0, 600, 400, 200]).double())


def test_stacked_rows_are_padded_with_zeros() -> None:
    stacked = grids.stack(torch.tensor([2, 1, 4]), lambda steps: grids.shifted(steps, 3.0))
    assert stacked.shape == (3, 5)
    assert stacked[0].tolist() == [*grids.shifted(2, 3.0).tolist(), 0, 0]
    assert stacked[1].tolist() == [1, 0, 0, 0, 0]
    assert stacked[2].equal(grids.shifted(4, 3.0))


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_segments_tile_the_time_axis(steps: int) -> None:
    """Card 8.1, identity 6: every tau above 0 has exactly one segment [landing, call] as its owner."""
    grid = grids.shifted(steps, 3.0)
    tau = torch.rand(1000, dtype=torch.float64).clamp(min=1e-9)
    owners = (tau[:, None] > grid[1:]) & (tau[:, None] <= grid[:-1])
    assert owners.sum(1).eq(1).all()
    assert owners.any(0).all()
