"""For `test_every_option.py`: what each option of a method is changed to, and beside which others it acts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

MOMENTS = {
    "regulariser": "mean_variance", "moment_mean": 0.1, "moment_variance": 0.8, "matching_levels": "full",
    "joint_normaliser": False, "critic_updates": 5,
}  # fmt: skip
ONE_COUNT = {"step_counts": (), "steps_condition": False}
MANY_COUNTS = {"step_counts": (2, 4), "steps": 4, "regression_weight": 0.0}
APART = {
    "guidance": "decoupled",
    "motion_guidance": 0.0,
    "guidance_levels": "shared",
    "normaliser": "dmd",
    "joint_normaliser": False,
}
PROMPTS_DROPPED = {"critic_dropout": 0.5, "critic_training_scale": 1.0, "critic_scale": 1.0}

LOSS = {"matching_weight": 1.0}
TRAJECTORIES = {"source": "trajectories"}
ROLLING = {"positions": "rolling", "sink": 1, "window": 1, "sink_decay": 1.0}
QUICK = {"critic_updates": 1}
QUICK_CAUSAL = {"chunk": 1, "steps": 2}
"""So that tests are quick."""

BESIDE: dict[str, dict[str, Any]] = {
    "steps": ONE_COUNT | {"regression_weight": 0.0},
    "step_counts": MANY_COUNTS | {"step_counts": (4,)},
    "steps_condition": MANY_COUNTS | {"steps_condition": False},
    "grid": ONE_COUNT,
    "tau_law": {"shift": 3.0},
    "logit_mean": {"tau_law": "logit_normal"},
    "logit_std": {"tau_law": "logit_normal"},
    "snr_cap": {"critic_weight": "min_snr"},
    "metric": LOSS,
    "huber_c": LOSS | {"metric": "huber_vector"},
    "guidance_scale": LOSS | TRAJECTORIES,
    "guidance": LOSS | {"motion_guidance": 0.0},
    "motion_guidance": LOSS | {"guidance": "coupled"},
    "guidance_levels": LOSS
    | {
        "guidance": "decoupled",
        "motion_guidance": 0.0,
        "joint_normaliser": False,
        "steps": 4,
        "start_time": 0.9,
        "regression_weight": 0.0,
    },
    "joint_normaliser": LOSS | APART,
    "normaliser": LOSS | {"joint_normaliser": False},
    "divergence": LOSS,
    "ratio_clip": LOSS | {"divergence": "jensen_shannon", "ratio_bins": 1},
    "ratio_bins": LOSS | {"divergence": "jensen_shannon"},
    "discriminator_weight": {"gan_weight": 0.1},
    "solver_substeps": {"solver_weight": 1.0},
    "solver_guidance": {"solver_weight": 1.0},
    "critic_target": {"importance": "none"},
    "importance": {"critic_target": "denoised"},
    "regression_weight": ONE_COUNT | {"steps": 1},
    "regulariser": {"matching_levels": "full", "joint_normaliser": False, "critic_updates": 5},
    "moment_weight": MOMENTS,
    "moment_mean": MOMENTS,
    "moment_variance": MOMENTS,
    "intervals": {"phase": 2},
    "tau_min": {"phase": 2},
    "critic_training_scale": PROMPTS_DROPPED,
    "critic_scale": PROMPTS_DROPPED,
    "critic_dropout": {"critic_training_scale": 1.0, "critic_scale": 1.0},
    "sink": {"window": 1, "sink_decay": 1.0},
    "positions": {"sink": 1, "window": 1},
    "sink_decay": {"sink": 1, "window": 1, "history": "own", "kept": "clean"},
    "kept": {"sink_decay": 1.0, "history": "own"},
    "sink_ahead": ROLLING | {"sink_start": 0},
    "sink_start": ROLLING,
    "recompute": {"history": "own"},
    "history": {"sink_decay": 1.0, "kept": "clean"},
    "path_steps": TRAJECTORIES,
    "vary_memory": {"window": 1},
    "reward_mean": {"relative_to": "mean"},
}
"""Settings, of those that a method has, beside which an option acts."""

EQUAL = {
    "tau_law": "`uniform_unshifted` is `uniform` where there is no shift",
    "intervals": "the first phase begins at the start of the grid",
    "sink_ahead": "the sink is farther ahead until chunks begin `sink_start` less `sink_ahead` frames in",
    "tau_min": "in the first of several phases all levels are above it",
    "vary_memory": "a window that is drawn may hold all of a short video",
}
"""Options of which other values may mean the same as the preset's, with the reason."""

_NOT_SID = {
    "metric", "huber_c", "motion_guidance", "guidance", "guidance_levels", "joint_normaliser", "divergence",
    "ratio_clip", "ratio_bins",
}  # fmt: skip
_NOT_CAUSAL = {"step_counts", "steps_condition", "regression_weight", "critic_call_condition", "chain_noise"}
NEVER: dict[str, set[str]] = {
    "SiDOptions": _NOT_SID,
    "SelfForcingOptions": _NOT_CAUSAL,
    "RewardForcingOptions": _NOT_CAUSAL,
    "LiveAvatarOptions": _NOT_CAUSAL,
    "MotionStreamOptions": _NOT_CAUSAL,
    "SelfForcingSiDOptions": _NOT_CAUSAL | _NOT_SID,
    "CausalInitOptions": {"sink_decay", "kept", "motion_guidance"},  # the last without prompts of motion, as here
    "PhasedOptions": {"step_counts", "steps_condition"},
    "DecoupledOptions": {"guidance", "motion_guidance"},
}  # fmt: skip
"""Options that a method shares with others and refuses whatever they are set to."""

_OTHER: dict[str, list[Any]] = {
    "step_counts": [(2, 4)], "shift": [3.0], "start_time": [0.8], "eta": [0.5], "logit_mean": [1.0],
    "logit_std": [0.5], "tau_min": [0.1], "margin": [0.05], "snr_cap": [0.01], "critic_updates": [3],
    "guidance_scale": [2.0], "ratio_clip": [(0.9, 1.1)], "ratio_bins": [1], "solver_substeps": [3],
    "solver_guidance": [2.0], "moment_mean": [0.3], "moment_variance": [0.5], "critic_dropout": [0.9],
    "critic_clamp": [0.5],
    "critic_scale": [2.0], "critic_training_scale": [2.0], "phase": [2],
    "sink": [0, 1, 2], "window": [1, 2], "path_steps": [24],
}  # fmt: skip


def others(options: Any, name: str) -> list[dict[str, Any]]:
    """Settings of `options` in which the option `name` has another value: each choice, or one other number."""
    value, hint = getattr(options, name), get_type_hints(type(options))[name]
    if name == "grid":
        return [{name: tuple(0.9 - 0.8 * call / options.steps for call in range(options.steps))}]
    if name in ("steps", "phase_calls") and hasattr(options, "phase_calls"):
        return [{"steps": 3, "phase_calls": (2, 1)}] if name == "steps" else [{name: (1, 3)}]
    if name in _OTHER:
        return [{name: other} for other in _OTHER[name] if other != value]
    if isinstance(value, bool):
        return [{name: not value}]
    if get_origin(hint) is Literal:
        return [{name: choice} for choice in get_args(hint) if choice != value]
    if isinstance(value, int):
        return [{name: value + 1}]
    if isinstance(value, float):
        return [{name: value / 2 + 0.1}]
    raise AssertionError(f"{name}: say in option_tables.py what else than {value!r} it can be")


def beside(options: Any, name: str) -> Mapping[str, Any]:
    """Of the settings beside which the option acts, those that there are."""
    there = {entry.name for entry in fields(options)}
    return {key: value for key, value in BESIDE.get(name, {}).items() if key in there}
