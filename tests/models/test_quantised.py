"""A frozen base in 8 or 4 bits: near the teacher, trained through but never itself, merged into the whole weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_families
import tiny_flows
import torch
from tiny_pixart import PROMPTS, perturb

from fewstep.api import RoleOptions, distill, load_teacher
from fewstep.errors import FewstepError
from fewstep.models import Backbone, build_roles, load_backbone, seeded_noise
from fewstep.models import quantised as module
from fewstep.models.blocks import repeated_blocks
from fewstep.models.quantised import PACKAGES, rounded_bytes
from fewstep.planning.trace import Ledger
from fewstep.training.options import TrainOptions

KINDS = {"int8": 0.03, "nf4": 0.3}
"""With the largest relative error of the teacher's answer on random weights; nf4 rounds coarsely."""


@pytest.fixture(scope="session")
def rounded(folder: Path) -> dict[str, Backbone]:
    return {kind: load_backbone(folder, quantised=kind) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_near_the_teacher_and_gradients_reach_adapters_only(backbone, rounded, batch, kind: str) -> None:
    x, t, condition = batch
    with torch.no_grad():
        expected = backbone.call(backbone.network, x, t, condition)
    roles = build_roles(rounded[kind], "adapters", rank=4)
    found = roles.teacher(x, t, condition)
    assert not torch.equal(found, expected)
    assert (found - expected).norm() < KINDS[kind] * expected.norm()
    perturb(roles.student_parameters())
    roles.student(x, t, condition).square().mean().backward()
    assert all(parameter.grad.norm() > 0 for parameter in roles.student_parameters()[1::2])
    base = [p for name, p in roles.student_seat.network.named_parameters() if ".student." not in name]
    assert all(parameter.grad is None for parameter in base)


@pytest.mark.parametrize("family", ["sdxl", "sana", "z_image", "wan"])
def test_other_families_have_rounded_bases(tmp_path: Path, family: str) -> None:
    """Levels of a U-Net, linear attention, lists of tokens, videos: near the teacher, with gradients in every layer."""
    if family in tiny_families.FAMILIES:
        folder, size = tiny_families.save(family, tmp_path), tiny_families.FAMILIES[family].size
    else:
        folder, size = tmp_path / family, {"height": 16, "width": 16}
        getattr(tiny_flows, family)().save_pretrained(folder)
    full = load_backbone(folder, size=size)
    x, t = seeded_noise([1, 2], full.latent_shape), torch.tensor([0.95, 0.3])
    condition = full.encode(["a frog", "a red apple"])
    with torch.no_grad():
        expected = full.call(full.network, x, t, condition)
    for kind, tolerance in KINDS.items():
        roles = build_roles(load_backbone(folder, size=size, quantised=kind), rank=2, checkpointing=True)
        perturb(roles.student_parameters())
        found = roles.teacher(x, t, condition)
        assert not torch.equal(found, expected)
        assert (found - expected).norm() < tolerance * expected.norm()
        roles.student(x, t, condition).square().mean().backward()
        assert all(parameter.grad is not None for parameter in roles.student_parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_as_planned(rounded, backbone, kind: str) -> None:
    """What `fewstep plan` counts is what the rounded tensors hold."""
    size = rounded_bytes(kind)
    layers = repeated_blocks(backbone.network)
    planned = sum(
        size(layer.weight.shape, layer.weight.element_size())
        for block in layers.values()
        for layer in block.modules()
        if isinstance(layer, torch.nn.Linear)
    )
    found = 0
    for block in repeated_blocks(rounded[kind].network).values():
        for layer in block.modules():
            if isinstance(layer, torch.nn.Linear):
                weight = layer.weight
                if kind == "int8":
                    parts = [getattr(weight, name) for name in weight.__tensor_flatten__()[0]]
                else:
                    parts = [weight, weight.quant_state.absmax]
                found += sum(part.numel() * part.element_size() for part in parts)
    assert found == planned


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_unrounded_is_kept_for_the_backward(rounded, kind: str) -> None:
    layer = rounded[kind].network.transformer_blocks[0].attn1.to_q
    x = torch.randn(2, layer.in_features, requires_grad=True)
    with Ledger([x, layer.weight, layer.bias]) as ledger:
        answer = layer(x)
        assert ledger.alive < 2 * layer.in_features * layer.out_features  # unrounded they are 4 bytes each
    answer.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("kind", KINDS)
def test_distilled_and_merged_into_whole_weights(folder: Path, backbone, kind: str, tmp_path: Path) -> None:
    """Three iterations; the student on disk is the teacher's own weights plus the adapter, not rounded ones."""
    options = TrainOptions(iterations=3, batch=2, warmup=0, student_rate=1e-2, tensorboard=False)
    teacher = load_teacher(folder, quantised=kind)
    student = distill(
        teacher, "tdm", out=tmp_path, prompts=PROMPTS, roles=RoleOptions(rank=4), train_options=options
    )  # fmt: skip
    merged, own = (dict(network.named_parameters()) for network in (student.network, backbone.network))
    changed = {name for name in own if not torch.equal(merged[name], own[name])}
    assert changed == {f"{name}.weight" for name in _targets(backbone)}
    for name in changed:  # a rank-4 update: rounding would have made the difference full
        values = torch.linalg.svdvals((merged[name] - own[name]).double())
        assert values[4] < 1e-4 * values[0]


def _targets(backbone: Backbone) -> list[str]:
    ends = backbone.adapter_layers
    return [name for name, part in backbone.network.named_modules() if name.endswith(ends) and hasattr(part, "weight")]


@pytest.mark.parametrize("roles", ["copies", "mixed"])
def test_copies_of_rounded_weights_are_refused(rounded, roles: str) -> None:
    with pytest.raises(FewstepError, match=f"found roles '{roles}' on a base in int8, expected adapters"):
        build_roles(rounded["int8"], roles)


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_package_names_the_extra(folder: Path, monkeypatch, kind: str) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(FewstepError, match=rf"pip install 'fewstep\[{PACKAGES[kind]}\]'"):
        load_backbone(folder, quantised=kind)


def test_an_unknown_kind(folder: Path) -> None:
    with pytest.raises(FewstepError, match="found a base in 'int3'"):
        load_backbone(folder, quantised="int3")
