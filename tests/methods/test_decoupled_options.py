"""Decoupled DMD: who gets gradients, what it costs, and every setting."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from decoupled_toy import MOMENTS, PROCESSES, VARIANTS, dmd2
from ring_toy import COUNT, WatchedRoles, batch, draw
from torch import Tensor

from fewstep.core.process import Flow, Process
from fewstep.core.solvers import lcm
from fewstep.errors import FewstepError
from fewstep.methods import DecoupledOptions, DMD2Options, preset
from fewstep.methods.decoupled import Decoupled


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: p.name)
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_trains_only_who_it_should(name: str, process: Process) -> None:
    method, roles = Decoupled(DecoupledOptions(**VARIANTS[name])), WatchedRoles(process)
    assert method.critic_updates == (5 if method.needs.critic or method.needs.discriminator else 0)
    trained = ["critic"] * method.needs.critic + ["discriminator"] * method.needs.discriminator
    others = {"critic", "discriminator", "student"} - set(trained)
    path = method.rollout(batch(roles), roles, draw())
    if trained:
        loss = method.critic_loss(path, roles, draw())
        assert loss.values.shape == (COUNT,)
        found = torch.autograd.grad(
            loss.values.mean(), roles.parameters(*trained) + roles.parameters(*others), allow_unused=True
        )
        count = len(roles.parameters(*trained))
        assert all(part.abs().sum() > 0 for part in found[:count])
        assert all(part is None for part in found[count:])

    loss = method.student_loss(path, roles, draw())
    assert loss.values.shape == (COUNT,)
    assert loss.values.isfinite().all()
    found = torch.autograd.grad(loss.values.mean(), roles.parameters("student", "critic"), allow_unused=True)
    assert all(part.abs().sum() > 0 for part in found[:2])
    assert all(part is None for part in found[2:])
    assert all(not metric.requires_grad and metric.ndim == 0 for metric in loss.metrics.values())


@pytest.mark.parametrize("name", VARIANTS)
def test_forwards_are_what_is_claimed(name: str) -> None:
    method, roles = Decoupled(DecoupledOptions(**VARIANTS[name])), WatchedRoles(Flow())
    for iteration in range(25):
        path = method.rollout(batch(roles), roles, draw(iteration))
        for update in range(method.critic_updates):
            method.critic_loss(path, roles, draw(iteration).sub(update))
        method.student_loss(path, roles, draw(iteration))
    made = sum(len(x) for _, x, *_ in roles.calls) / COUNT / 25
    assert made == pytest.approx(method.forwards(), rel=0.04)


def test_forwards_in_the_docstring_are_right() -> None:
    assert preset("decoupled").build().forwards() == pytest.approx(14, abs=0.5)
    plain, apart = (method.forwards(1) for method in (dmd2(steps=1), Decoupled(DecoupledOptions(steps=1))))
    assert apart == plain + 1  # four network evaluations for three (card, section 3, 4)


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: p.name)
def test_backward_simulation_is_the_sampler(process: Process) -> None:
    method, roles = Decoupled(DecoupledOptions()), WatchedRoles(process)
    path = method.rollout(batch(roles), roles, draw())
    predictions: list[Tensor] = []
    lcm(
        roles.networks["student"],
        draw().normal("noise", (2,), torch.float64),
        method.options.time_grid(4),
        process,
        batch(roles).condition,
        noise=lambda k, shape: draw().normal(f"extra {k}", shape, torch.float64),
        callback=lambda k, x, denoised: predictions.append(denoised.detach()),
    )
    for call in range(4):
        torch.testing.assert_close(path.landing(torch.full((COUNT,), call)).denoised, predictions[call])


# Settings


def test_presets_are_the_papers_schedules() -> None:
    hybrid, constrained, shared = (preset(f"decoupled{end}") for end in ("", "-constrained", "-shared"))
    assert (hybrid.guidance_levels, hybrid.matching_levels) == ("cleaner", "full")
    assert (constrained.guidance_levels, constrained.matching_levels) == ("cleaner", "cleaner")
    assert (shared.guidance_levels, shared.joint_normaliser) == ("shared", True)
    for options in (hybrid, constrained, shared):
        assert (options.guidance, options.regulariser, options.counts) == ("decoupled", "dm", (4,))
        assert options.build().needs.critic
        assert not options.build().needs.real_data


UNDER: dict[str, tuple[dict[str, Any], Any]] = {
    "guidance_levels": ({}, "full"),
    "joint_normaliser": ({"guidance_levels": "shared"}, True),
    "regulariser": ({}, "none"),
    "matching_levels": ({}, "cleaner"),
    "moment_weight": (MOMENTS, 0.5),
    "moment_mean": (MOMENTS, 0.2),
    "moment_variance": (MOMENTS, 0.5),
    "tau_law": ({"shift": 3.0}, "uniform"),
    "gan_weight": ({}, 0.1),
    "discriminator_weight": (VARIANTS["GAN alone"], 0.1),
    "guidance_scale": ({}, 2.0),
}


@pytest.mark.parametrize("name", UNDER)
def test_every_option_changes_something(name: str) -> None:
    """Its own, and those of others that it has another use for; the rest are DMD2's."""

    def values(options: DecoupledOptions) -> Tensor:
        method, roles = Decoupled(options), WatchedRoles(Flow())
        path = method.rollout(batch(roles), roles, draw())
        losses = [method.student_loss(path, roles, draw()).values]
        losses += [method.critic_loss(path, roles, draw()).values] if method.critic_updates else []
        return torch.cat(losses).detach()

    base, value = UNDER[name]
    plain = DecoupledOptions(**base)
    first, second = values(plain), values(replace(plain, **{name: value}))
    assert first.shape != second.shape or not torch.equal(first, second)


def test_all_its_own_options_are_tried() -> None:
    own = {field.name for field in fields(DecoupledOptions)} - {field.name for field in fields(DMD2Options)}
    assert own <= UNDER.keys()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"regulariser": "kl"}, "regulariser = 'kl'"),
        ({"matching_levels": "noisier"}, "matching_levels = 'noisier'"),
        ({"guidance": "coupled"}, "use the method dmd2"),
        (MOMENTS | {"moment_weight": -1.0}, "moment_weight = -1"),
        (MOMENTS | {"moment_variance": 0.0}, "moment_variance = 0"),
        ({"regulariser": "gan"}, "regulariser 'gan' with gan_weight 0"),
        ({"regulariser": "none", "gan_weight": 0.1}, "regulariser 'none' with gan_weight 0.1"),
        ({"regulariser": "none", "guidance_scale": 1.0}, "regulariser 'none' with guidance_scale 1"),
        ({"regulariser": "none", "matching_levels": "cleaner"}, r"\['matching_levels'\] with regulariser 'none'"),
        (MOMENTS | {"divergence": "pearson"}, r"\['divergence'\] with regulariser 'mean_variance'"),
        ({"joint_normaliser": True}, "joint_normaliser with guidance_levels 'cleaner'"),
        ({"steps": 2, "grid": (1.0, 0.05), "tau_min": 0.04}, "no room for guidance at levels cleaner"),
    ],
)
def test_bad_settings_are_refused_with_a_fix(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FewstepError, match=message) as caught:
        DecoupledOptions(**changes).build()
    assert "fix:" in str(caught.value)
