"""How a causal student begins: the teacher's trajectories, and what is regressed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_flows
import torch
from toy_roles import FRAMES, WanRoles, draw, gradient

import fewstep
from fewstep.core import grids
from fewstep.data.pairs import TeacherTrajectories
from fewstep.errors import FewstepError
from fewstep.methods import CausalInitOptions, preset
from fewstep.methods.base import Batch
from fewstep.methods.causal_init import drawn_memory

OPTIONS = CausalInitOptions(chunk=1, window=1, steps=2, path_steps=4)


def batch_of(roles: WanRoles) -> Batch:
    """Trajectories of two states."""
    clean, condition = roles.own.video(FRAMES, 5), roles.own.condition
    states = torch.stack([roles.own.video(FRAMES, seed) for seed in (6, 7)], 1)
    return replace(roles.batch(), pairs=(states, clean, condition), real=(clean, condition))


@pytest.mark.parametrize("source", ["trajectories", "data"])
@pytest.mark.parametrize("history", ["noisy", "clean"])
def test_the_loss_is_the_distance_to_the_clean_video(exact: None, source: Any, history: Any) -> None:
    """Eq. 4, against one call after the other; with clean history the calls are those of a rollout with a memory."""
    roles = WanRoles(torch.float64)
    method = replace(OPTIONS, source=source, history=history, path_steps=48).build()
    path = method.rollout(batch_of(roles), roles, draw())
    found = method.student_loss(path, roles, draw()).values
    assert gradient(found, roles.own.network).abs().max() > 1e-6
    x, t, clean = method._noised(path, draw())
    grid = method.options.time_grid(2)[:2]
    assert all(bool(torch.isclose(time, grid).any()) for time in t.flatten())
    assert len(t.unique()) == 2
    if source == "trajectories":
        states = path.pairs[0]  # type: ignore[index]
        for row in range(2):
            for frame in range(FRAMES):
                call = int((grid - t[row, frame]).abs().argmin())
                assert torch.equal(x[row, :, frame], states[row, call, :, frame])
    if history == "clean":
        memory = roles.own.memory(method.options)
        parts = []
        for frame in range(FRAMES):
            parts.append(memory.denoise(x[:, :, frame : frame + 1], t[:, frame]))
            memory.remember(clean[:, :, frame : frame + 1])
        wanted = (torch.cat(parts, 2) - clean).square().flatten(1).mean(1)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def test_trajectories_are_states_of_the_teachers_sampler(tmp_path: Path) -> None:
    """On the student's times exactly, the first its noise; one call from a state goes on as the sampler does."""
    tiny_flows.wan().save_pretrained(tmp_path)
    teacher = fewstep.load_teacher(tmp_path, height=16, width=32, num_frames=9)
    grid, keep = OPTIONS.path_grid, OPTIONS.time_grid(2)[:-1]
    made = TeacherTrajectories(teacher, ["a frog"], 2, grid=grid, keep=keep, guidance_scale=2.0)
    states, clean, condition = made(1, torch.arange(2))
    assert states.shape == (2, 2, *teacher.backbone.latent_shape)
    assert len(condition["text_states"]) == 2
    seeds = [int((teacher.noise(range(2)) == states[row, :1]).flatten(1).all(1).nonzero()) for row in range(2)]
    assert sorted(seeds) == [0, 1]
    wanted = teacher.latents(["a frog"] * 2, seeds, 4, guidance_scale=2.0, grid=grid)
    torch.testing.assert_close(clean, wanted)
    with pytest.raises(FewstepError, match="does not pass them"):
        teacher.states(["a frog"], [0], grid, grids.uniform(3)[:-1], 2.0)


def test_the_samplers_grid_passes_the_students_times() -> None:
    shifted = CausalInitOptions(steps=4, path_steps=48)
    torch.testing.assert_close(shifted.path_grid, grids.shifted(48, 5.0), rtol=0, atol=1e-12)
    assert torch.equal(shifted.path_grid[::12], shifted.time_grid(4))
    uneven = CausalInitOptions(steps=2, path_steps=6, grid=(0.9, 0.3))
    assert torch.equal(uneven.path_grid[::3], uneven.time_grid(2))


def test_what_is_refused() -> None:
    roles = WanRoles()
    with pytest.raises(FewstepError, match="a batch without trajectories"):
        OPTIONS.build().rollout(roles.batch(), roles, draw())
    with pytest.raises(FewstepError, match="trajectories of 2 states"):
        replace(OPTIONS, steps=4).build().rollout(batch_of(roles), roles, draw())
    with pytest.raises(FewstepError, match="path_steps = 50"):
        replace(OPTIONS, steps=4, path_steps=50).validate()
    assert preset("teacher-forcing").build().needs.real_data


def test_a_varied_memory_is_drawn_in_every_iteration() -> None:
    """The same for all processes, any sink of 0 to 2 and any window; and it is what the loss attends by."""
    drawn = [drawn_memory(OPTIONS, FRAMES, draw(iteration)) for iteration in range(80)]
    assert {layout.sink for layout in drawn} == {0, 1, 2}
    assert {layout.window for layout in drawn} == {1, 2, 3, 4}
    other = [drawn_memory(OPTIONS, FRAMES, draw(iteration, range(2, 4))) for iteration in range(80)]
    assert drawn == other
    roles, losses = WanRoles(), []
    for options in (replace(OPTIONS, vary_memory=True), replace(OPTIONS, sink=drawn[7].sink, window=drawn[7].window)):
        method = options.build()
        path = method.rollout(batch_of(roles), roles, draw(7))
        losses.append(method.student_loss(path, roles, draw(7)).values)
    assert torch.equal(*losses)
