"""Few-step SiD: what it costs, and every setting."""

from __future__ import annotations

import ast
import inspect
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from sid_toy import COUNT, PRESETS, VARIANTS, WatchedRoles, critic_loss, draw, student_loss, walk
from torch import Tensor

from fewstep.core.process import Flow
from fewstep.errors import FewstepError
from fewstep.methods import sid as sid_module
from fewstep.methods.matching_options import MatchingOptions
from fewstep.methods.sid import SiD, SiDOptions


@pytest.mark.parametrize("name", VARIANTS)
def test_forwards_are_what_is_claimed(name: str) -> None:
    iterations, rows = 120, 0
    for iteration in range(iterations):
        roles = WatchedRoles(Flow())
        method, path = walk(VARIANTS[name], roles, iteration)
        for update in range(method.critic_updates):
            method.critic_loss(path, roles, draw(iteration).sub(update))
        method.student_loss(path, roles, draw(iteration))
        rows += sum(len(call[1]) for call in roles.calls)
    assert rows / COUNT / iterations == pytest.approx(method.forwards(), rel=0.04)


def test_presets_cost_what_the_page_says() -> None:
    costs = {name: SiD(options).forwards(4) for name, options in PRESETS.items()}
    assert costs == {"none": 6.5, "long": 7.5, "lsg": 9.5, "zero_cfg": 6.5, "anti_cfg": 7.5}


def test_every_option_is_documented() -> None:
    nodes = ast.parse(inspect.getsource(sid_module)).body
    (definition,) = [node for node in nodes if getattr(node, "name", "") == "SiDOptions"]
    documented = {
        field.target.id
        for field, text in zip(definition.body, definition.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    }
    inherited = {field.name: field.default for field in fields(MatchingOptions)}
    assert documented == {f.name for f in fields(SiDOptions) if inherited.get(f.name) != f.default}


@pytest.mark.parametrize(
    ("base", "changes"),
    [
        ({}, {"alpha": 0.5}),
        ({}, {"weight": "snr"}),
        ({}, {"normaliser": "dmd"}),
        ({}, {"eta": 0.5}),
        ({}, {"chain_noise": "fixed"}),
        ({"critic_dropout": 0.5}, {"critic_training_scale": 2.0}),
        ({"critic_dropout": 0.5}, {"critic_scale": 0.0}),
        ({}, {"critic_dropout": 0.5}),
        ({}, {"guidance_scale": 2.0}),
        ({}, {"critic_weight": "snr"}),
        ({}, {"tau_law": "uniform"}),
        ({}, {"logit_mean": 0.0}),
        ({}, {"logit_std": 1.0}),
        ({}, {"start_time": 0.7}),
        ({}, {"steps": 3}),
        ({}, {"tau_min": 0.3}),
        ({}, {"margin": 0.1}),
        ({}, {"gan_weight": 0.1}),
        ({"gan_weight": 0.1}, {"discriminator_weight": 0.1}),
        ({}, {"teacher_regularisation": 0.1}),
    ],
)
def test_every_option_changes_something(base: dict[str, Any], changes: dict[str, Any]) -> None:
    def values(options: SiDOptions) -> Tensor:
        iteration = next(n for n in range(99) if int(walk(options, WatchedRoles(Flow()), n)[1].call[0]) > 0)
        roles = WatchedRoles(Flow())
        return torch.cat([of(options, roles, iteration).values for of in (critic_loss, student_loss)]).detach()

    plain = SiDOptions(**base)
    assert not torch.equal(values(plain), values(replace(plain, **changes)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": -0.1}, "alpha = -0.1"),
        ({"weight": "sigma"}, "weight = 'sigma'"),
        ({"chain_noise": "ddim"}, "chain_noise = 'ddim'"),
        ({"chain_noise": "fixed", "eta": 1.0}, "chain_noise 'fixed' with eta 1"),
        ({"critic_dropout": 1.0}, "critic_dropout = 1.0"),
        ({"critic_scale": float("nan")}, "critic_scale = nan"),
        ({"critic_scale": -1.0}, "critic_scale -1.0 for a critic trained with 1.0"),
        ({"critic_training_scale": 0.0, "critic_dropout": 0.1}, "for a critic trained with 0.0"),
        ({"metric": "huber_vector"}, r"\['metric'\] for SiD"),
        ({"divergence": "pearson"}, r"\['divergence'\] for SiD"),
        ({"guidance": "decoupled"}, r"\['guidance'\] for SiD"),
        ({"steps": 0}, "expected 1 or more"),
    ],
)
def test_bad_settings_are_refused_with_a_fix(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FewstepError, match=message) as caught:
        replace(SiDOptions(), **changes).build()
    assert "fix:" in str(caught.value)
