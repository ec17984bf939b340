"""CogVideoX's own: its noise levels, the grid of TDM's release, its schedulers."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_flows
import torch
from tiny_pixart import assert_latents_close

import fewstep
from fewstep.core import grids
from fewstep.core.process import DiscreteVP
from fewstep.core.solvers import ddim
from fewstep.core.tensors import Condition
from fewstep.models import Backbone, choose_scheduler, seeded_noise


@pytest.fixture(scope="module", params=["2b", "5b"])
def backbone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    """Read-only for tests; "2b" has shifted noise."""
    folder = tmp_path_factory.mktemp("teacher")
    tiny_flows.cogvideox(request.param).save_pretrained(folder)
    return fewstep.load_teacher(folder).backbone


def test_noise_levels_are_the_schedulers_own_and_end_without_signal(backbone: Backbone) -> None:
    process = backbone.process
    assert isinstance(process, DiscreteVP)
    assert backbone.prediction == "v"
    times = torch.arange(1, 1001, dtype=torch.float64) / 1000
    theirs = backbone.pipeline.scheduler.alphas_cumprod.double()
    torch.testing.assert_close(process.alpha(times).square(), theirs, rtol=1e-4, atol=1e-6)
    assert process.alpha(times[-1]) == 0


@pytest.mark.parametrize(
    ("grid", "name"),
    [
        (grids.uniform(4), "CogVideoXDDIMScheduler"),
        (grids.explicit([999, 856, 665, 399], 1000), "DPMSolverMultistepScheduler"),  # of TDM's release
        (grids.uniform(4, 0.9), "DDIMScheduler"),
    ],
)
def test_students_are_sampled_on_their_grid(backbone: Backbone, grid: torch.Tensor, name: str) -> None:
    """Also with levels that only CogVideoX's own scheduler has: others are given them."""
    sampling = choose_scheduler(backbone, [grid])
    assert type(sampling.scheduler).__name__ == name
    noise, process = seeded_noise([5], backbone.latent_shape), backbone.process

    def velocity(x: torch.Tensor, network_time: torch.Tensor) -> torch.Tensor:
        return torch.cos(3 * x)

    def denoise(x: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
        shape = (-1, 1, 1, 1, 1)
        return process.alpha(t).view(shape) * x - process.sigma(t).view(shape) * velocity(x, t)

    theirs = backbone.run_pipeline(velocity, sampling.scheduler, noise, **sampling.calls[4])
    assert_latents_close(ddim(denoise, noise, grid, process, {}), theirs, 1e-4)


def test_the_recommended_dpm_scheduler_is_the_same_process(tmp_path: Path) -> None:
    from diffusers import CogVideoXDPMScheduler

    pipeline = tiny_flows.cogvideox("5b")
    wanted = pipeline.scheduler.config
    pipeline.scheduler = CogVideoXDPMScheduler.from_config(wanted, timestep_spacing="trailing")
    pipeline.save_pretrained(tmp_path)
    backbone = fewstep.load_teacher(tmp_path).backbone
    assert backbone.process.to_config()["snr_shift"] == 1.0
    torch.testing.assert_close(backbone.teacher_grid(4), grids.uniform(4))


def test_usual_sizes_are_the_networks_own(backbone: Backbone) -> None:
    assert backbone.latent_shape == (3, 4, 4, 4)
