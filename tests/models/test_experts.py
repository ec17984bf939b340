"""Experts by time: who is called, who is trained, and a folder that switches as training did."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from tiny_pixart import PROMPTS, assert_latents_close, perturb

from fewstep.core import grids
from fewstep.core.rollout import Path as Trajectory
from fewstep.errors import FewstepError
from fewstep.models import Backbone, build_roles, load_backbone, load_student, save_student, seeded_noise
from fewstep.models.experts import ExpertRoles, build_expert_roles, expert_of, switch_times

KINDS = ["adapters", "copies", "mixed"]
SEEDS = [3, 4, 5]
GRID = grids.uniform(4)
SWITCHES = switch_times(GRID, (2, 3, 4))


def trained_state(backbone: Backbone, kind: str, seed: int) -> dict[str, torch.Tensor]:
    """What an expert's run hands on."""
    roles = build_roles(backbone, kind, rank=4)
    perturb(roles.student_parameters(), seed)
    return {name: value.clone() for name, value in roles.student_state().items()}


def three_experts(backbone: Backbone, kind: str, trained: int = 3) -> ExpertRoles:
    """Roles in which the expert number `trained` of three is the student, all up to it moved at random."""
    earlier = [trained_state(backbone, kind, seed) for seed in range(trained - 1)]
    roles = build_expert_roles(backbone, kind, SWITCHES, earlier, rank=4)
    perturb(roles.student_parameters(), trained - 1)
    return roles


def test_experts_change_midway_between_calls() -> None:
    assert SWITCHES == (0.625, 0.375)
    times = torch.tensor([1.0, 0.75, 0.626, 0.624, 0.5, 0.25, 0.0])
    assert expert_of(times, SWITCHES).tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert expert_of(times, ()).tolist() == [0] * 7


@pytest.mark.parametrize("kind", KINDS)
def test_each_sample_is_served_by_the_expert_of_its_time(backbone: Backbone, batch, kind: str) -> None:
    x, _, condition = batch
    roles = three_experts(backbone, kind)
    t = torch.tensor([0.25, 1.0, 0.5])
    with torch.no_grad():
        together = roles.student(x, t, condition)
        for row, expert in enumerate([2, 0, 1]):
            alone = build_roles(backbone, kind, rank=4)
            alone.load_student_state(trained_state(backbone, kind, expert))
            expected = alone.student(x, t, condition)[row]
            assert_latents_close(together[row], expected, 1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_only_the_expert_in_training_has_gradients(backbone: Backbone, batch, kind: str, checkpointing: bool) -> None:
    x, _, condition = batch
    earlier = [trained_state(backbone, kind, 0)]
    roles = build_expert_roles(backbone, kind, SWITCHES, earlier, rank=4, checkpointing=checkpointing)
    perturb(roles.student_parameters(), 1)
    own = roles.student_parameters()
    mine = {id(p) for p in [*own, *roles.critic_parameters()]}
    others = [p for seat in roles.experts for p in seat.network.parameters() if id(p) not in mine]

    output = roles.student(x, torch.full((3,), 0.5), condition)
    other = [roles.student(x, torch.full((3,), time), condition) for time in (1.0, 0.2)]
    assert not any(part.requires_grad for part in other)
    output.square().mean().backward()  # after other experts were asked
    assert all(p.requires_grad and p.grad is not None for p in own)
    assert all(p.requires_grad and p.grad is None for p in roles.critic_parameters())
    assert others
    assert all(not p.requires_grad and p.grad is None for p in others)
    for p in own:
        p.grad = None


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_expert_is_the_teacher_and_so_are_later_ones(backbone: Backbone, batch, kind: str) -> None:
    x, _, condition = batch
    roles = build_expert_roles(backbone, kind, SWITCHES, [trained_state(backbone, kind, 0)], rank=4)
    for time in (0.5, 0.2):
        t = torch.full((3,), time)
        with torch.no_grad():
            assert torch.equal(roles.student(x, t, condition), roles.teacher(x, t, condition))
            assert torch.equal(roles.critic(x, t, condition), roles.teacher(x, t, condition))
    with torch.no_grad():
        t = torch.ones(3)
        assert not torch.allclose(roles.student(x, t, condition), roles.teacher(x, t, condition))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trained", [2, 3])
def test_the_folder_samples_what_training_rolled_out(
    backbone: Backbone, tmp_path: Path, kind: str, trained: int
) -> None:
    """Plain diffusers' pipeline, our sampler and the rollout, to 1e-4, also while the last expert is still to come."""
    import fewstep.models.expert_networks  # noqa: F401  (whose class the folder names)

    roles = three_experts(backbone, kind, trained)
    noise = seeded_noise(SEEDS, backbone.latent_shape)
    path = Trajectory(roles.student, noise, GRID, backbone.process, backbone.encode(PROMPTS))
    rolled = path.landing(torch.full((3,), 3)).x

    folder = save_student(tmp_path / "student", roles, [GRID], method="phased")
    assert_latents_close(load_student(folder).latents(PROMPTS, SEEDS), rolled)
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    assert type(pipeline).__name__ == type(backbone.pipeline).__name__
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    theirs = pipeline(
        PROMPTS, num_inference_steps=4, guidance_scale=1, generator=generators, output_type="latent",
        use_resolution_binning=False,
    ).images  # fmt: skip
    assert_latents_close(theirs, rolled)


@pytest.mark.parametrize("kind", KINDS)
def test_experts_whose_critic_is_told_the_call_are_saved_as_plain_ones(
    backbone: Backbone, tmp_path: Path, batch, kind: str
) -> None:
    """The networks then read "landing"; the student is not told it, and its folder has no place for it."""
    x, t, condition = batch

    def trained(earlier: list[dict[str, torch.Tensor]], seed: int) -> ExpertRoles:
        roles = build_expert_roles(backbone, kind, SWITCHES[:1], earlier, rank=4, steps_aware=True)
        perturb(roles.student_parameters(), seed)
        perturb(roles.critic_parameters(), seed)
        return roles

    first = {name: value.clone() for name, value in trained([], 0).student_state().items()}
    roles = trained([first], 1)
    with torch.no_grad():
        told = roles.critic(x, t, condition | {"landing": torch.ones(3)})
        assert not torch.allclose(told, roles.critic(x, t, condition))
        student = load_student(save_student(tmp_path / "student", roles, [GRID], method="phased"))
        assert not student.steps_aware
        times = torch.tensor([1.0, 0.5, 0.25])
        assert_latents_close(student.denoise(x, times, condition), roles.student(x, times, condition), 1e-5)


def test_the_loaded_network_splits_mixed_times(backbone: Backbone, batch, tmp_path: Path) -> None:
    x, _, condition = batch
    roles = three_experts(backbone, "adapters")
    student = load_student(save_student(tmp_path / "student", roles, [GRID], method="phased"))
    assert student.network.config.switches == [624.0, 374.0]
    t = torch.tensor([0.5, 1.0, 0.25])
    with torch.no_grad():
        assert_latents_close(student.denoise(x, t, condition), roles.student(x, t, condition), 1e-5)
        asked = {"encoder_hidden_states": condition["text_states"], "encoder_attention_mask": condition["text_mask"]}
        asked["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
        output = student.network(x, timestep=student.backbone.process.network_time(t), **asked)
        assert output.sample.shape == (3, 8, 8, 8)


def test_saving_leaves_the_roles_alone_and_the_readme_tells_what_works(backbone: Backbone, tmp_path: Path) -> None:
    roles = three_experts(backbone, "adapters")
    before = {name: value.clone() for name, value in roles.student_state().items()}
    folder = save_student(tmp_path / "student", roles, [GRID], method="phased", dtype=torch.float16)
    assert all(torch.equal(before[name], value) for name, value in roles.student_state().items())
    assert type(backbone.network).__name__ == "PixArtTransformer2DModel"
    usage = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0].replace("FOLDER", str(folder))
    code = f"{usage}\nassert image.size == (32, 32)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_student_of_experts_can_be_a_teacher(backbone: Backbone, tmp_path: Path, batch) -> None:
    x, t, condition = batch
    folder = save_student(tmp_path / "student", three_experts(backbone, "copies"), [GRID], method="phased")
    again = load_backbone(folder)
    roles = build_roles(again, "adapters", rank=4)
    with torch.no_grad():
        assert_latents_close(roles.student(x, t, condition), again.call(again.network, x, t, condition), 1e-6)


def test_states_that_do_not_fit_are_refused(backbone: Backbone) -> None:
    state = trained_state(backbone, "copies", 0)
    with pytest.raises(FewstepError, match="expert's state that differs"):
        build_expert_roles(backbone, "adapters", SWITCHES, [state], rank=4)
    with pytest.raises(FewstepError, match="no more experts than times"):
        build_expert_roles(backbone, "copies", (), [state])
