"""A teacher from its configs alone: the very parameters and prompt shapes of the loaded one, for every family."""

from __future__ import annotations

import pytest
import torch
from tiny_families import FAMILIES, PROMPTS

from fewstep.methods import METHODS
from fewstep.models import build_roles, load_backbone
from fewstep.planning.build import blueprint
from fewstep.planning.calls import Call, calls_of
from fewstep.planning.conditions import shapes
from fewstep.planning.trace import _stacks, trace

SIZES = {"qwen_image": {"height": 32, "width": 32}, "z_image": {"height": 32, "width": 32}}
SIZES |= {"wan a14b": {"height": 16, "width": 16, "num_frames": 5}, "cogvideox 5b": {}}
SIZES |= {name: FAMILIES[name].size for name in ("pixart-sigma", "sd15", "sdxl", "sd35", "flux-dev", "sana")}


@pytest.mark.parametrize("family", SIZES)
def test_it_is_the_loaded_teacher_without_numbers(folders, family: str) -> None:
    """Parameters by name, shape and dtype; names and widths of encoded prompts; one call that can be traced."""
    real = load_backbone(folders[family], size=SIZES[family])
    planned = blueprint(folders[family], size=SIZES[family])
    own, meta = ({n: (p.shape, p.dtype) for n, p in b.network.named_parameters()} for b in (real, planned.backbone))
    assert own == meta
    assert all(parameter.is_meta for parameter in planned.backbone.network.parameters())
    assert planned.backbone.latent_shape == real.latent_shape
    encoded = {name: value.shape[1:] for name, value in real.encode(PROMPTS).items()}
    told = shapes(planned.backbone)
    assert told.keys() == encoded.keys()
    for name, shape in told.items():
        assert shape[1:] == encoded[name][1:]
        assert shape[0] >= encoded[name][0]
    roles = build_roles(planned.backbone, rank=2, checkpointing=True)
    planned.made_callable(roles.student_seat.network, {})
    cost = trace(planned, roles, Call("student", 2, True, False))
    assert 0 < cost.saved < cost.forward <= cost.backward
    assert cost.operations > 0


def test_what_is_kept_in_float32_stays(folders) -> None:
    real = load_backbone(folders["wan a14b"], dtype=torch.bfloat16)
    planned = blueprint(folders["wan a14b"]).in_dtype(torch.bfloat16)
    found = [{name: p.dtype for name, p in b.network.named_parameters()} for b in (real, planned)]
    assert found[0] == found[1]
    assert len(set(found[0].values())) == 2


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_few_blocks_tell_what_all_take(folders, checkpointing: bool) -> None:
    """Exactly: with 7 blocks, and the same with all of them run."""
    from diffusers import PixArtTransformer2DModel

    planned = blueprint(folders["middle"])
    config = dict(planned.backbone.network.config) | {"num_layers": 7}
    with torch.device("meta"):
        planned.backbone.network = PixArtTransformer2DModel.from_config(config)
    roles = build_roles(planned.backbone, rank=2, checkpointing=checkpointing)
    planned.made_callable(roles.student_seat.network, {})
    assert [len(blocks) for _, blocks in _stacks(roles.student_seat.network)] == [7]
    for call in (Call("student", 2, True, False), Call("teacher", 4, False, False)):
        assert trace(planned, roles, call) == trace(planned, roles, call, whole=True)
    assert len(roles.student_seat.network.transformer_blocks) == 7


@pytest.mark.parametrize("method", [name for name in METHODS if not METHODS[name]().build().needs.causal])
def test_every_method_says_what_it_calls(folders, method: str) -> None:
    """Its calls with a backward are among the forwards it counts; a guided call has twice the rows."""
    options = METHODS[method]()
    made, found = options.build(), calls_of(options, blueprint(folders["sd15"]).backbone.process, 4)
    assert ("critic" in found) == bool(made.critic_updates)
    calls = [call for calls in found.values() for call in calls]
    assert any(call.role == "student" and call.graph for call in found["student"])
    assert all(call.rows in (4, 8) for call in calls)
    losses = sum(
        call.rows / 4 * (made.critic_updates if phase == "critic" else 1)
        for phase, calls in found.items()
        for call in calls
        if call.graph
    )
    assert losses <= made.forwards() + 1e-9
