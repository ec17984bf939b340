"""Networks that are told their step count: the teacher at first, then one function for each K."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from tiny_pixart import PROMPTS, assert_latents_close, perturb

from fewstep.core import grids
from fewstep.core.solvers import ddim
from fewstep.errors import FewstepError
from fewstep.models import Backbone, build_roles, seeded_noise
from fewstep.models.expert_networks import switching_network
from fewstep.models.steps_aware import StepsAwarePixArtPipeline, StepsAwarePixArtTransformer2DModel, made_steps_aware


def trained_network(backbone: Backbone) -> StepsAwarePixArtTransformer2DModel:
    network = backbone.steps_aware()
    perturb(list(network.get_submodule(network.call_embedder).parameters()), scale=0.3)
    return network


def test_k_makes_a_difference_once_trained(backbone: Backbone, batch) -> None:
    x, t, condition = batch
    network = trained_network(backbone)
    outputs = [
        backbone.call(network, x, t, {**condition, "steps": torch.full((3,), float(steps))}) for steps in (1, 2, 4, 8)
    ]
    for i in range(4):
        for j in range(i):
            assert (outputs[i] - outputs[j]).norm() > 1e-3 * outputs[i].norm()
    mixed = backbone.call(network, x, t, {**condition, "steps": torch.tensor([1.0, 8.0, 2.0])})
    assert_latents_close(mixed, torch.stack([outputs[0][0], outputs[3][1], outputs[1][2]]), 1e-5)


def test_untold_it_is_the_teacher(backbone: Backbone, batch) -> None:
    x, t, condition = batch
    told_nothing = backbone.call(trained_network(backbone), x, t, condition)
    assert torch.equal(told_nothing, backbone.call(backbone.network, x, t, condition))


def test_landing_time_is_read(backbone: Backbone, batch) -> None:
    x, t, condition = batch
    network = trained_network(backbone)
    steps = torch.full((3,), 4.0)
    low, high = (
        backbone.call(network, x, t, {**condition, "steps": steps, "landing": torch.full((3,), landing)})
        for landing in (0.0, 0.5)
    )
    assert (low - high).norm() > 1e-3 * low.norm()
    alone = backbone.call(network, x, t, {**condition, "landing": torch.full((3,), 0.5)})
    assert (alone - high).norm() > 1e-3 * low.norm()


def test_each_adapter_has_its_own_embedding(backbone: Backbone, batch) -> None:
    x, t, condition = batch
    condition["steps"] = torch.tensor([1.0, 2.0, 8.0])
    roles = build_roles(backbone, "adapters", rank=4, steps_aware=True)
    embedding = [p for name, p in roles.student_state().items() if "call_embedder" in name]
    assert embedding
    with torch.no_grad():
        teacher, critic = roles.teacher(x, t, condition), roles.critic(x, t, condition)
        perturb([p for n, p in roles.student_seat.parameters().items() if "call_embedder" in n], scale=0.3)
        assert not torch.allclose(roles.student(x, t, condition), teacher)
        assert torch.equal(roles.critic(x, t, condition), critic)
        assert torch.equal(roles.teacher(x, t, condition), teacher)


def test_a_network_of_experts_is_not_made_steps_aware(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would lose its later experts without a word."""
    experts = switching_network([copy.deepcopy(backbone.network) for _ in range(2)], [500.0])
    with pytest.raises(FewstepError, match=r"ExpertsPixArtTransformer2DModel that is to be told.*fix:"):
        made_steps_aware(experts)
    monkeypatch.setattr(backbone, "network", experts)
    with pytest.raises(FewstepError, match="ExpertsPixArtTransformer2DModel"):
        build_roles(backbone, "adapters", rank=4, steps_aware=True)


def test_the_embedding_is_trained(backbone: Backbone, batch) -> None:
    x, t, condition = batch
    condition["steps"] = torch.tensor([1.0, 2.0, 8.0])
    for kind in ("adapters", "copies"):
        roles = build_roles(backbone, kind, rank=4, steps_aware=True)
        roles.student(x, t, condition).square().mean().backward()
        last = [p for name, p in roles.student_seat.parameters().items() if name.endswith("linear_2.weight")]
        last = [p for p in last if p.grad is not None and p.grad.abs().max() > 0]
        assert last


def test_saves_and_loads_as_diffusers_models_do(backbone: Backbone, batch, tmp_path: Path) -> None:
    x, t, condition = batch
    condition["steps"] = torch.tensor([1.0, 2.0, 8.0])
    network = trained_network(backbone)
    network.save_pretrained(tmp_path)
    loaded = StepsAwarePixArtTransformer2DModel.from_pretrained(tmp_path, use_safetensors=True)
    assert loaded.config.num_layers == 2
    assert loaded.config._class_name == "StepsAwarePixArtTransformer2DModel"
    assert torch.equal(backbone.call(loaded, x, t, condition), backbone.call(network, x, t, condition))


@pytest.mark.parametrize("steps", [1, 4])
def test_the_pipeline_tells_the_network_its_step_count(backbone: Backbone, steps: int) -> None:
    network = trained_network(backbone)
    pipeline = StepsAwarePixArtPipeline(**{**backbone.pipeline.components, "transformer": network})
    pipeline.set_progress_bar_config(disable=True)
    noise = seeded_noise([1, 2, 3], backbone.latent_shape)
    theirs = pipeline(PROMPTS, num_inference_steps=steps, guidance_scale=1, latents=noise, output_type="latent").images
    condition = {**backbone.encode(PROMPTS), "steps": torch.full((3,), float(steps))}
    ours = ddim(lambda *a: backbone.call(network, *a), noise, grids.uniform(steps), backbone.process, condition)
    assert_latents_close(ours, theirs)
    assert network.steps is None  # nothing is left behind
