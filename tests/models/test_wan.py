"""Wan's own: two networks that are one inside, schedulers that the released folders name, students of any grid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_flows
import torch
from tiny_flows import PROMPTS
from tiny_pixart import assert_latents_close, perturb

import fewstep
from fewstep.core import grids
from fewstep.errors import FewstepError
from fewstep.models import build_roles, choose_scheduler, load_student, save_student, seeded_noise
from fewstep.models.teacher import Teacher
from fewstep.models.wan import Wan
from fewstep.models.wan_experts import WanExperts

SIZE = {"height": 16, "width": 32, "num_frames": 5}


def teacher(folder: Path, kind: str, scheduler: Any = None) -> Teacher:
    pipeline = tiny_flows.wan(kind)
    if scheduler is not None:
        pipeline.scheduler = scheduler
    pipeline.save_pretrained(folder)
    return fewstep.load_teacher(folder, **SIZE)


@pytest.fixture(scope="module")
def a14b(tmp_path_factory: pytest.TempPathFactory) -> Wan:
    """Read-only for tests."""
    backbone = teacher(tmp_path_factory.mktemp("a14b"), "a14b").backbone
    assert isinstance(backbone, Wan)
    return backbone


def test_each_sample_is_for_the_network_of_its_time(a14b: Wan) -> None:
    x, condition = seeded_noise([1, 2, 3], a14b.latent_shape), a14b.encode(PROMPTS)
    t = torch.tensor([0.2, 0.875, 0.874])
    network = a14b.network
    assert isinstance(network, WanExperts)
    with torch.no_grad():
        both = a14b.call(network, x, t, condition)
        high, low = a14b.call(network.high, x, t, condition), a14b.call(network.low, x, t, condition)
    assert_latents_close(both, torch.stack([low[0], high[1], low[2]]), 1e-6)
    assert (high - low).abs().max() > 1e-3


@pytest.mark.parametrize("checkpointing", [False, True])
def test_both_networks_are_trained_and_gradients_are_exact(a14b: Wan, checkpointing: bool) -> None:
    gradients = []
    for chosen in (False, checkpointing):
        roles = build_roles(a14b, "adapters", rank=2, checkpointing=chosen)
        perturb(roles.student_parameters())
        x, t = seeded_noise([1, 2], a14b.latent_shape), torch.tensor([0.95, 0.3])
        denoised = roles.student(x, t, a14b.encode(PROMPTS[:2]))
        roles.critic(x, t, a14b.encode(PROMPTS[:2]))  # leaves another adapter active
        denoised.square().mean().backward()
        named = zip(roles.student_state(), roles.student_parameters(), strict=True)
        gradients.append({name: parameter.grad for name, parameter in named})
    assert {name.split(".")[0] for name in gradients[0]} == {"high", "low"}
    for name, gradient in gradients[0].items():
        assert gradient is not None
        torch.testing.assert_close(gradients[1][name], gradient)


def test_two_networks_have_no_features(a14b: Wan) -> None:
    with pytest.raises(FewstepError, match="without a discriminator"):
        build_roles(a14b, "adapters", discriminator="critic")


def test_a_lora_of_one_network_loads_again(tmp_path: Path) -> None:
    backbone = teacher(tmp_path / "teacher", "2.1").backbone
    roles = build_roles(backbone, "adapters", rank=2)
    perturb(roles.student_parameters())
    save_student(tmp_path / "lora", roles, [grids.shifted(4, 5.0)], method="tdm", form="lora")
    student = load_student(tmp_path / "lora")
    x, t = seeded_noise([1], backbone.latent_shape), torch.tensor([0.6])
    with torch.no_grad():
        ours = student.denoise(x, t, student.backbone.encode(PROMPTS[:1]))
        assert_latents_close(ours, roles.student(x, t, backbone.encode(PROMPTS[:1])), 1e-5)


def test_a_time_for_each_token_is_the_same_as_one(tmp_path: Path) -> None:
    """What the pipeline of Wan2.2-5B tells its network, and what we do."""
    backbone = teacher(tmp_path, "5b").backbone
    x, condition = seeded_noise([1, 2], backbone.latent_shape), backbone.encode(PROMPTS[:2])
    times = torch.tensor([300.0, 900.0])
    tokens = x[0, 0, :, ::2, ::2].numel()
    with torch.no_grad():
        told = {"encoder_hidden_states": condition["text_states"], "return_dict": False}
        one = backbone.network(x, timestep=times, **told)[0]
        each = backbone.network(x, timestep=times[:, None].expand(2, tokens), **told)[0]
    torch.testing.assert_close(one, each)


def test_unipc_of_the_released_folders_is_a_flow_on_its_grid(tmp_path: Path) -> None:
    from diffusers import UniPCMultistepScheduler

    unipc = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, solver_order=1,
        disable_corrector=list(range(9)),
    )  # fmt: skip
    model = teacher(tmp_path, "2.1", unipc)
    backbone = model.backbone
    assert (backbone.process.to_config(), backbone.prediction) == ({"process": "flow", "time_scale": 1000.0}, "flow")
    grid = backbone.teacher_grid(4)
    unipc.set_timesteps(4)
    torch.testing.assert_close(grid, unipc.sigmas.double())
    noise = seeded_noise([3], backbone.latent_shape)

    def velocity(x: torch.Tensor, network_time: torch.Tensor) -> torch.Tensor:
        return torch.sin(2 * x)

    theirs = backbone.run_pipeline(velocity, unipc, noise, num_inference_steps=4)
    x = noise
    for t_from, t_to in zip(grid, grid[1:], strict=False):
        x = x + float(t_to - t_from) * velocity(x, x)
    assert_latents_close(x, theirs, 1e-5)


@pytest.mark.parametrize("eta", [1.0, 0.0])
@pytest.mark.parametrize("uneven", [False, True])
def test_every_grid_has_a_scheduler(tmp_path: Path, eta: float, uneven: bool) -> None:
    """A shifted one without fresh noise a stock one; the pipeline takes no times, so others have them written down."""
    backbone = teacher(tmp_path, "2.1").backbone
    grid = grids.explicit([1.0, 0.9, 0.5, 0.3]) if uneven else grids.shifted(4, 5.0)
    sampling = choose_scheduler(backbone, [grid], eta)
    assert sampling.calls == {4: {"num_inference_steps": 4}}
    stock = eta == 1 and not uneven
    assert type(sampling.scheduler).__name__ == (
        "FlowMapEulerDiscreteScheduler" if stock else "FlowMatchStepsScheduler"
    )


def test_usual_sizes_are_the_pipelines_own(tmp_path: Path) -> None:
    tiny_flows.wan().save_pretrained(tmp_path)
    backbone = fewstep.load_teacher(tmp_path).backbone
    assert backbone.latent_shape == (4, 21, 60, 104)
    assert backbone.sample_batch == 1
    for frames in (1, 17):
        assert fewstep.load_teacher(tmp_path, num_frames=frames).backbone.latent_shape[1] == (frames + 3) // 4
    with pytest.raises(FewstepError, match="num_frames = 16.*multiple of 4 and 1 more.*17"):
        fewstep.load_teacher(tmp_path, num_frames=16)


@pytest.mark.parametrize("kind", ["adapters", "copies"])
def test_two_networks_on_disk_are_the_two_that_were_trained(a14b: Wan, tmp_path: Path, kind: str) -> None:
    roles = build_roles(a14b, kind, rank=2)  # type: ignore[arg-type]
    perturb(roles.student_parameters())
    student = load_student(save_student(tmp_path / "student", roles, [grids.shifted(4, 5.0)], method="tdm"))
    x, t, condition = seeded_noise([1, 2], a14b.latent_shape), torch.tensor([0.95, 0.3]), a14b.encode(PROMPTS[:2])
    with torch.no_grad():
        assert_latents_close(student.denoise(x, t, condition), roles.student(x, t, condition), 1e-5)
