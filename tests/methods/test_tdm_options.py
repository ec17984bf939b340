"""TDM's settings: presets are valid, bad and contradictory ones are refused with a fix."""

from __future__ import annotations

import ast
import inspect
from dataclasses import fields, replace

import pytest
import torch

from fewstep.errors import FewstepError
from fewstep.methods import METHODS, TDMOptions, matching_options, preset, tdm_options


@pytest.mark.parametrize("name", METHODS)
def test_presets_are_valid_and_build(name: str) -> None:
    options = preset(name)
    options.validate()
    assert options.build().options == options


def test_unknown_method_is_refused() -> None:
    with pytest.raises(FewstepError, match="found method 'dmd9'"):
        preset("dmd9")


def test_every_option_is_documented() -> None:
    modules = (matching_options, tdm_options)
    nodes = [node for module in modules for node in ast.parse(inspect.getsource(module)).body]
    documented = set()
    for definition in (node for node in nodes if getattr(node, "name", "").endswith("Options")):
        for field, text in zip(definition.body, definition.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                documented.add(field.target.id)
    assert documented == {field.name for field in fields(TDMOptions)}


def test_paper_is_as_published() -> None:
    paper = METHODS["tdm-paper"]()
    assert (paper.critic_target, paper.tau_range, paper.metric, paper.loss_on) == (
        "denoised",
        "separate",
        "huber_vector",
        "landing",
    )
    assert (paper.huber_c, paper.critic_updates, paper.eta, paper.importance) == (0.00054, 1, 1.0, "mean")


def test_unify_tells_the_step_count() -> None:
    unify = METHODS["tdm-unify"]()
    assert unify.step_counts == (1, 2, 4, 8)
    assert unify.build().needs.steps_condition


def test_grids() -> None:
    torch.testing.assert_close(TDMOptions().time_grid(4), torch.tensor([1, 0.75, 0.5, 0.25, 0], dtype=torch.float64))
    torch.testing.assert_close(
        TDMOptions(shift=3.0).time_grid(4), torch.tensor([1, 0.9, 0.75, 0.5, 0], dtype=torch.float64)
    )
    torch.testing.assert_close(
        TDMOptions(start_time=0.8).time_grid(4), torch.tensor([0.8, 0.6, 0.4, 0.2, 0], dtype=torch.float64)
    )
    written = TDMOptions(steps=2, grid=(0.9, 0.45))
    torch.testing.assert_close(written.time_grid(2), torch.tensor([0.9, 0.45, 0], dtype=torch.float64))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "expected 1 or more"),
        ({"step_counts": (1, 0), "steps": 1}, "expected 1 or more"),
        ({"step_counts": (1, 2)}, "steps = 4, expected one of step_counts"),
        ({"step_counts": (4, 4)}, "each once"),
        ({"steps_condition": True}, "steps_condition without step_counts"),
        ({"grid": (1.0, 0.5)}, "grid of 2 calls"),
        ({"steps": 2, "grid": (0.9, 0.45), "start_time": 0.9}, "start_time 0.9 with a grid written out"),
        ({"start_time": 0.0}, "start_time = 0.0"),
        ({"start_time": 1.1}, "start_time = 1.1"),
        ({"grid": (1.0, 0.5, 0.7, 0.2)}, "strictly falling"),
        ({"shift": 0.0}, "shift = 0.0, expected a number above 0"),
        ({"shift": float("nan")}, "shift = nan"),
        ({"eta": 1.5}, "eta = 1.5"),
        ({"tau_law": "beta"}, "tau_law = 'beta', expected one of"),
        ({"critic_target": "x0hat"}, "critic_target = 'x0hat'"),
        ({"tau_min": 0.3}, "no room for tau in the segment"),
        ({"steps": 8, "margin": 0.07}, "no room for tau in the segment"),
        ({"margin": 0.0}, "margin 0 with an exact critic target"),
        ({"margin": 0.0, "tau_min": 0.0, "critic_target": "denoised"}, "tau above 0"),
        ({"critic_target": "denoised", "landing": "random", "margin": 0.0}, "random landing"),
        ({"importance": "mean"}, "importance 'mean' with the exact critic target"),
        ({"critic_weight": "beta_ratio"}, "critic_weight 'beta_ratio' with the exact"),
        ({"step_counts": (1, 3, 4), "segments": "all"}, "divide the largest"),
        ({"critic_updates": 0}, "critic_updates = 0"),
        ({"guidance_scale": -1.0}, "guidance_scale = -1.0"),
        ({"teacher_regularisation": -0.1}, "teacher_regularisation = -0.1"),
        ({"huber_c": 0.0}, "huber_c = 0.0"),
        ({"solver_weight": -1.0}, "solver_weight = -1.0"),
        ({"solver_weight": 1.0, "solver_substeps": 0}, "solver_substeps = 0"),
        ({"solver_weight": 1.0, "solver_guidance": -1.0}, "solver_guidance = -1"),
        ({"solver_weight": 1.0, "eta": 0.9}, "solver_weight 1.0 with eta 0.9"),
        ({"solver_weight": 1.0, "landing": "random"}, "solver_weight 1.0 with eta 1"),
    ],
)
def test_bad_settings_are_refused_with_a_fix(changes: dict[str, object], message: str) -> None:
    with pytest.raises(FewstepError, match=message) as caught:
        replace(TDMOptions(), **changes).build()
    assert "fix:" in str(caught.value)
    assert "found" in str(caught.value)
