"""Plans of causal students: which chunks a method calls, what is remembered to the byte, activations as measured."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import tiny_flows
import torch
from measuring import measured  # type: ignore[import-not-found]

from fewstep.api import RoleOptions, load_teacher
from fewstep.core.streams import Streams
from fewstep.methods import METHODS, LiveAvatarOptions, RewardForcingOptions, SelfForcingOptions
from fewstep.methods.base import Batch
from fewstep.models import build_roles
from fewstep.planning.build import blueprint
from fewstep.planning.calls import calls_of
from fewstep.planning.memory import Run, plan
from fewstep.training.options import TrainOptions

SIZE = {"height": 64, "width": 64, "num_frames": 13}
OPTIONS = RewardForcingOptions(chunk=1, sink=1, window=1, steps=2, critic_updates=1, sink_decay=0.9)
NOISY = LiveAvatarOptions(chunk=1, window=2, steps=2, critic_updates=1)
LATE = 2
"""An iteration whose videos stop at the last of two steps."""


@pytest.mark.parametrize("method", [name for name in METHODS if METHODS[name]().build().needs.causal])
def test_every_causal_method_says_which_chunks_it_calls(folders: Any, method: str) -> None:
    """A forward and backward of every chunk within what it sees, or of all chunks at once."""
    options: Any = replace(METHODS[method](), chunk=1)
    found = calls_of(options, blueprint(folders["wan 2.1"]).backbone.process, 2, 4)
    students = [call for call in found["student"] if call.role == "student" and call.graph]
    if students[0].seen is None:
        assert [call.frames for call in students] == [8 if getattr(options, "history", "") == "clean" else 4]
    else:
        noisy = method == "live-avatar"  # sees its sink beside the window
        seen = [0, 2, 3, 4] if noisy else [len(options.seen(n)) for n in range(4)]
        assert [(call.frames, call.seen) for call in students] == [(1, number) for number in seen]
        walked = [call.seen for calls in found.values() for call in calls if call.role == "student" and not call.graph]
        exit_call = int(Streams(0).at(1, torch.arange(2)).common("exit") * options.steps)
        made = [number for number in seen for _ in range(exit_call + 1)]
        assert sorted(walked) == sorted([*made, *([0] if noisy else seen[:-1])])  # and read again, or the sink alone
    others = [call for calls in found.values() for call in calls if call.role != "student"]
    assert all(call.layout is None for call in others)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("adapters", OPTIONS),
        ("copies", OPTIONS),
        ("copies", NOISY),
        ("copies", replace(NOISY, kept="last")),
        ("copies", replace(NOISY, recompute=True)),
    ],
)
def test_memory_of_one_iteration(folders: Any, kind: Any, options: Any) -> None:
    """One iteration on four chunks: remembered keys and values exactly, activations nearly."""
    backbone = load_teacher(folders["wan 2.1"], **SIZE).backbone  # type: ignore[arg-type]
    roles = build_roles(backbone, kind, rank=4, causal=True)
    for parameter in [*roles.student_parameters(), *roles.critic_parameters()]:
        parameter.grad = torch.zeros_like(parameter)
    method, samples = options.build(), torch.arange(2)
    batch = Batch(backbone.encode(tiny_flows.PROMPTS[:2]), samples, backbone.latent_shape)
    backbone.null_condition()
    paths: list[Any] = []

    def iteration() -> None:
        draw = Streams(0).at(LATE, samples)
        paths.append(method.rollout(batch, roles, draw))  # type: ignore[arg-type]
        for loss, parameters in (
            (method.critic_loss, roles.critic_parameters()),
            (method.student_loss, roles.student_parameters()),
        ):
            loss(paths[0], roles, draw).values.sum().backward(inputs=parameters)  # type: ignore[arg-type]

    most = measured(iteration)
    run = Run(options, RoleOptions(roles=kind, rank=4), TrainOptions(batch=2))
    found = plan(blueprint(folders["wan 2.1"], size=SIZE), run)
    assert paths[0].exit_call == 1
    memories = [memory for memory, _ in paths[0]._made]
    kept = {id(part): part for m in memories for c in m.remembered for layer in c.layers for part in layer}
    made = getattr(paths[0]._memory, "_made", {})  # of the last chunk's calls
    kept |= {id(part): part for layers in made.values() for layer in layers for part in layer}
    kept |= {id(part): part for m in memories for layer in m._text.values() for part in layer}
    assert found.parts["remembered chunks"] == sum(part.nbytes for part in kept.values())
    assert found.parts["activations"] + found.parts["remembered chunks"] == pytest.approx(most, rel=0.15)


def test_more_chunks_in_memory_take_more(folders: Any) -> None:
    print_ = blueprint(folders["wan 2.1"], size=SIZE)
    base = SelfForcingOptions(chunk=1, steps=2)
    told = RoleOptions(roles="copies"), TrainOptions(batch=2)
    whole, rolling = (plan(print_, Run(options, *told)) for options in (base, replace(base, window=1)))
    assert whole.parts["remembered chunks"] == rolling.parts["remembered chunks"]  # each is walked again
    assert whole.parts["activations"] > rolling.parts["activations"]
    half = plan(print_, Run(base, told[0], replace(told[1], precision="bf16")))
    assert half.parts["remembered chunks"] * 2 == whole.parts["remembered chunks"]
    data = plan(print_, Run(replace(base, history="data"), *told))
    assert "remembered chunks" not in data.parts
