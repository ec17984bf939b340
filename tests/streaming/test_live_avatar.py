"""Training over noisy histories. L numbers are those of the card live_avatar.md, section 8."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from typing import Any

import pytest
import torch
from tiny_causal import GRID, PROCESS, TinyWan
from torch import Tensor
from toy_roles import FRAMES, WanRoles, draw, gradient

from fewstep.attention import Layout
from fewstep.errors import FewstepError
from fewstep.methods import LiveAvatarOptions, SelfForcingOptions, preset
from fewstep.streaming import CausalPath, stream

SMALL = {"chunk": 1, "window": 2, "steps": 2, "critic_updates": 1}
LAYOUT = Layout(2, sink=1, window=1, kept="noisy", positions="rolling", sink_ahead=2, sink_start=0)


LATE = 2
"""An iteration whose rollouts stop at the second of two calls; those of the first stop at the first."""


def losses(roles: WanRoles, options: Any) -> tuple[Tensor, Tensor]:
    """Values, and the student's gradient."""
    method = options.build()
    path = method.rollout(roles.batch(), roles, draw(LATE))
    assert path.exit_call == 1
    values = method.student_loss(path, roles, draw(LATE).sub("student")).values
    return values, gradient(values, roles.own.network)


@pytest.mark.parametrize("kept", ["noisy", "last"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_training_that_stops_at_the_last_step_is_the_sampler_to_the_bit(kept: Any, eta: float) -> None:
    wan, layout = TinyWan(), replace(LAYOUT, kept=kept)
    path = CausalPath(wan.memory(layout), wan.noise(layout), 4, GRID, PROCESS, wan.condition, 2, eta)
    made = path.landing(path.call).denoised
    sampled = stream(wan.memory(layout), wan.noise(layout), GRID, PROCESS, eta=eta)
    assert torch.equal(made, torch.cat(list(islice(sampled, 4)), 2))
    assert torch.equal(path.land(wan.student, path.call).denoised, made)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("exit_call", [0, 1])
def test_what_carries_gradient_is_what_was_made(exit_call: int, recompute: bool) -> None:
    """Calls are those that are counted: L of the exit and before, one for the sink, L more, L again for algorithm 2."""
    wan = TinyWan()
    wan.network.requires_grad_(True)
    path = CausalPath(
        wan.memory(LAYOUT), wan.noise(LAYOUT), 4, GRID, PROCESS, wan.condition, exit_call, recompute=recompute
    )
    made = path.landing(path.call)
    assert len(wan.frames) == 4 * (exit_call + 1) + 1
    wan.frames.clear()
    landing = path.land(wan.student, path.call)
    assert torch.equal(landing.denoised, made.denoised)
    landing.denoised.square().sum().backward()
    assert wan.frames == [2] * (8 if recompute else 4)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kept", ["noisy", "clean"])
def test_recomputed_chunk_by_chunk_the_gradient_is_the_joint_one(kept: Any, checkpointing: bool) -> None:
    """L8 (algorithm 2), to the bit, also beside activation checkpointing."""
    found = []
    for recompute in (False, True):
        roles = WanRoles()
        if checkpointing:
            roles.own.network.enable_gradient_checkpointing()
        options = LiveAvatarOptions(**SMALL, kept=kept, recompute=recompute)
        found.append(losses(roles, options))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert found[0][1].abs().max() > 1e-6


def test_one_chunk_is_in_memory_at_a_time() -> None:
    """Algorithm 2's point: what the forward leaves for the backward pass is a small part of the joint one's."""
    kept = []
    for recompute in (False, True):
        wan, saved = TinyWan(), []
        wan.network.requires_grad_(True)
        path = CausalPath(
            wan.memory(LAYOUT), wan.noise(LAYOUT), 4, GRID, PROCESS, wan.condition, 1, recompute=recompute
        )
        path.landing(path.call)
        with torch.autograd.graph.saved_tensors_hooks(lambda x, s=saved: s.append(x.nbytes) or x, lambda x: x):
            path.land(wan.student, path.call)
        kept.append(sum(saved))
    assert kept[1] < kept[0] / 50


def test_the_cache_is_another_history_in_training() -> None:
    """Both readings of the paper differ from each other and from Self Forcing; set back to clean it is Self Forcing."""
    found = {kept: losses(WanRoles(), LiveAvatarOptions(**SMALL, kept=kept)) for kept in ("clean", "noisy", "last")}
    same = SelfForcingOptions(**SMALL, sink=1, positions="rolling")
    assert all(torch.equal(a, b) for a, b in zip(found["clean"], losses(WanRoles(), same), strict=True))  # L9
    for one, other in (("clean", "noisy"), ("noisy", "last"), ("last", "clean")):
        assert (found[one][1] - found[other][1]).abs().max() > 1e-6


@pytest.mark.parametrize("recompute", [False, True])
def test_forwards_are_those_that_are_promised(recompute: bool) -> None:
    """Counted in frames, of student, critic and teacher; the sink's one chunk comes on top."""
    options = LiveAvatarOptions(chunk=1, window=2, steps=2, critic_updates=2, guidance_scale=1.0, recompute=recompute)
    method, roles = options.build(), WanRoles()
    for iteration, exit_call in ((1, 0), (LATE, 1)):
        for wan in roles.networks:
            wan.frames.clear()
        path = method.rollout(roles.batch(), roles, draw(iteration))
        for update in range(2):
            method.critic_loss(path, roles, draw(iteration).sub(update))
        gradient(method.student_loss(path, roles, draw(iteration).sub("student")).values, roles.own.network)
        assert path.exit_call == exit_call  # of which 0.5 is the mean
        films = method.forwards() + exit_call - 0.5
        assert sum(sum(wan.frames) for wan in roles.networks) == films * FRAMES + 1


def test_the_preset() -> None:
    options = preset("live-avatar")
    assert isinstance(options, LiveAvatarOptions)
    assert (options.steps, options.chunk, options.sink, options.window) == (4, 3, 1, 3)
    assert options.kept == "noisy"
    assert options.build().needs.causal
    assert options.build().forwards() == preset("self-forcing").build().forwards() - 1


def test_what_is_refused() -> None:
    with pytest.raises(FewstepError, match="kept 'noisy' with history 'data'"):
        LiveAvatarOptions(history="data").validate()
    with pytest.raises(FewstepError, match="found recompute = True, which nothing reads here"):
        SelfForcingOptions(history="data", recompute=True).validate()
    with pytest.raises(FewstepError, match="found kept = noisy, expected clean"):
        replace(preset("causal-init"), kept="noisy").validate()  # type: ignore[type-var]
