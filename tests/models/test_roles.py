"""Three roles on one backbone: the teacher at first, equal where they should be, and exact in backward."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_pixart import PROMPTS, assert_latents_close, perturb

from fewstep.core.guidance import guided
from fewstep.core.streams import Streams
from fewstep.errors import FewstepError
from fewstep.methods import preset
from fewstep.methods.base import Batch
from fewstep.models import Backbone, Roles, build_roles, load_backbone
from fewstep.models.pixart import MASK, STATES
from fewstep.models.roles import CRITIC, STUDENT

KINDS = ["adapters", "copies", "mixed"]


def trained_roles(backbone: Backbone, kind: str, **options) -> Roles:
    """Roles whose student and critic have left the teacher."""
    roles = build_roles(backbone, kind, rank=4, **options)
    perturb(roles.student_parameters(), seed=1)
    perturb(roles.critic_parameters(), seed=2)
    return roles


def gradient(parameters: list, loss: torch.Tensor) -> torch.Tensor:
    """All gradients of `loss` in one row; zeros where there is none."""
    for parameter in parameters:
        parameter.grad = None
    loss.backward()
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps_aware", [False, True])
@pytest.mark.parametrize("layers", ["attention+ff", "all-linear"])
def test_all_start_as_the_teacher_to_the_bit(backbone: Backbone, batch, kind, steps_aware, layers) -> None:
    x, t, condition = batch
    roles = build_roles(backbone, kind, rank=4, steps_aware=steps_aware, layers=layers)
    told = {**condition, "steps": torch.tensor([1.0, 2.0, 8.0]), "landing": torch.tensor([0.0, 0.5, 0.75])}
    with torch.no_grad():
        expected = backbone.call(backbone.network, x, t, condition)
        for role in (roles.teacher, roles.student, roles.critic):
            assert torch.equal(role(x, t, told), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps_aware", [False, True])
def test_teacher_never_changes(backbone: Backbone, batch, kind, steps_aware) -> None:
    """Also with trained adapters in its layers, and after any other role has been called."""
    x, t, condition = batch
    told = {**condition, "steps": torch.tensor([1.0, 2.0, 8.0])}
    roles = trained_roles(backbone, kind, steps_aware=steps_aware)
    with torch.no_grad():
        expected = backbone.call(backbone.network, x, t, condition)
        for other in (roles.student, roles.critic):
            assert not torch.allclose(other(x, t, told), expected)
            assert torch.equal(roles.teacher(x, t, told), expected)
        assert torch.equal(backbone.call(backbone.network, x, t, condition), expected)


@pytest.mark.parametrize("kind", ["adapters", "mixed"])
@pytest.mark.parametrize("steps_aware", [False, True])
def test_the_base_is_the_teachers_own_memory(backbone: Backbone, kind, steps_aware) -> None:
    roles = build_roles(backbone, kind, rank=4, steps_aware=steps_aware)
    base = roles._teacher.network
    assert base is not backbone.network
    pointers = {p.data_ptr() for p in base.parameters()}
    assert {p.data_ptr() for p in backbone.network.parameters()} <= pointers
    assert not any(p.requires_grad for p in backbone.network.parameters())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_one_role_only_whatever_is_called_in_between(backbone, batch, kind, checkpointing) -> None:
    """The two silent traps of adapter switching: see `fewstep.models.adapters`."""
    x, t, condition = batch
    alone = trained_roles(backbone, kind)
    parameters = alone.student_parameters()
    expected = gradient(parameters, alone.student(x, t, condition).square().mean())
    assert expected.norm() > 0

    roles = trained_roles(backbone, kind, checkpointing=checkpointing)
    loss = roles.student(x, t, condition).square().mean()
    roles.critic(x, t, condition).mean().backward()
    critic_before = [p.grad.clone() for p in roles.critic_parameters()]
    with torch.no_grad():
        roles.teacher(x, t, condition)
    found = gradient(roles.student_parameters(), loss)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    for parameter, before in zip(roles.critic_parameters(), critic_before, strict=True):
        assert torch.equal(parameter.grad, before)
    assert all(p.grad is None for p in backbone.network.parameters())


def peft_adapters(backbone: Backbone) -> tuple[torch.nn.Module, Callable]:
    """The naive way: the same trained adapters, but switched by PEFT; returns (network, call of the student)."""
    network = trained_roles(backbone, "adapters").student_seat.network

    def call(x, t, condition):
        select(network, STUDENT)
        return backbone.call(network, x, t, condition)

    return network, call


def select(network: torch.nn.Module, adapter: str) -> None:
    from peft.tuners.tuners_utils import set_adapter

    set_adapter(network, adapter)


def test_trap_1_is_real(backbone: Backbone, batch) -> None:
    """PEFT's `set_adapter` silences the gradient of a student forward that is still waiting for its backward."""
    x, t, condition = batch
    network, student = peft_adapters(backbone)
    parameters = [p for name, p in network.named_parameters() if f".{STUDENT}." in name]
    loss = student(x, t, condition).square().mean()
    select(network, CRITIC)
    loss.backward()
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in parameters)


def test_trap_2_is_real(backbone: Backbone, batch) -> None:
    """diffusers' own checkpointing recomputes with the adapter that is active in the backward: another gradient."""
    x, t, condition = batch
    network, student = peft_adapters(backbone)
    parameters = [p for name, p in network.named_parameters() if f".{STUDENT}." in name]
    expected = gradient(parameters, student(x, t, condition).square().mean())
    network.enable_gradient_checkpointing()
    loss = student(x, t, condition).square().mean()
    select(network, CRITIC)
    for parameter in parameters:  # with trap 1 cured by hand
        parameter.requires_grad_(True)
    try:
        found = gradient(parameters, loss)
    except torch.utils.checkpoint.CheckpointError:  # newer versions of torch may notice
        return
    assert (found - expected).norm() > 0.1 * expected.norm()


def test_a_second_backward_recomputes_as_well(backbone: Backbone, batch) -> None:
    x, t, condition = batch
    roles = trained_roles(backbone, "adapters", checkpointing=True)
    loss = roles.student(x, t, condition).square().mean()
    first = torch.autograd.grad(loss, roles.student_parameters(), retain_graph=True)
    roles.critic(x, t, condition)
    second = torch.autograd.grad(loss, roles.student_parameters())
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b)


def test_checkpointing_leaves_the_active_role_as_it_was(backbone: Backbone, batch) -> None:
    x, t, condition = batch
    roles = trained_roles(backbone, "adapters", checkpointing=True)
    loss = roles.student(x, t, condition).mean()
    with torch.no_grad():
        roles.critic(x, t, condition)
    loss.backward()
    assert roles.student_seat.switch.active == CRITIC


@pytest.mark.parametrize("layers", ["attention+ff", "all-linear"])
@pytest.mark.parametrize("steps_aware", [False, True])
def test_adapters_equal_a_copy_with_the_update_merged(backbone: Backbone, batch, layers, steps_aware) -> None:
    x, t, condition = batch
    condition["steps"] = torch.tensor([1.0, 2.0, 8.0])
    roles = trained_roles(backbone, "adapters", layers=layers, steps_aware=steps_aware, alpha=8.0)
    merged = roles.student_network()
    assert not any("lora" in name for name, _ in merged.named_modules())
    assert not any(p.requires_grad for p in merged.parameters())
    with torch.no_grad():
        ours = roles.student(x, t, condition)
        assert_latents_close(backbone.call(merged, x, t, condition), ours, 1e-5)
        assert not torch.allclose(ours, roles.teacher(x, t, condition))


@pytest.mark.parametrize("steps_aware", [False, True])
def test_one_loss_whatever_the_arrangement(backbone: Backbone, batch, steps_aware) -> None:
    """Distribution matching after all have left the teacher: adapters against copies with the updates merged."""
    x, t, condition = batch
    condition["steps"] = torch.tensor([1.0, 2.0, 8.0])

    def loss(roles: Roles) -> torch.Tensor:
        with torch.no_grad():
            sample = roles.student(x, t, condition)
            real = guided(roles.teacher, x, t, condition, roles.null(condition), 3.0)
            fake = roles.critic(x, t, condition)
            return ((real - fake) * sample).flatten(1).mean(1)

    adapters = trained_roles(backbone, "adapters", steps_aware=steps_aware)
    copies = build_roles(backbone, "copies", steps_aware=steps_aware)
    mixed = build_roles(backbone, "mixed", rank=4, steps_aware=steps_aware)
    student = dict(adapters.student_network().named_parameters())
    copies.load_student_state(student)
    mixed.load_student_state(student)
    mixed.load_critic_state(adapters.critic_state())
    from fewstep.models.adapters import merge_adapter

    merge_adapter(adapters.student_seat.network, CRITIC, into=copies._critic.network)
    expected = loss(adapters)
    torch.testing.assert_close(loss(copies), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    torch.testing.assert_close(loss(mixed), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["decoupled", "decoupled-constrained", "decoupled-shared", "tdm", "sid"])
def test_a_methods_losses_are_one_whatever_the_arrangement(backbone: Backbone, name: str) -> None:
    """Values, on adapters that have left the teacher and on copies with the same updates merged."""
    from fewstep.models.adapters import merge_adapter

    adapters, copies = trained_roles(backbone, "adapters"), build_roles(backbone, "copies")
    copies.load_student_state(dict(adapters.student_network().named_parameters()))
    merge_adapter(adapters.student_seat.network, CRITIC, into=copies._critic.network)
    method, samples = preset(name).build(), torch.arange(3)
    found = []
    for roles in (adapters, copies):
        draw = Streams(0).at(1, samples)
        path = method.rollout(Batch(backbone.encode(PROMPTS), samples, backbone.latent_shape), roles, draw)
        losses = (method.critic_loss(path, roles, draw), method.student_loss(path, roles, draw))
        found.append(torch.cat([loss.values.detach() for loss in losses]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-4 * float(found[0].abs().max()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps_aware", [False, True])
def test_states_restore_the_roles(backbone: Backbone, batch, kind, steps_aware) -> None:
    x, t, condition = batch
    condition["steps"] = torch.tensor([1.0, 2.0, 8.0])
    before = trained_roles(backbone, kind, steps_aware=steps_aware)
    after = build_roles(backbone, kind, rank=4, steps_aware=steps_aware, seed=7)
    parameters = after.student_parameters()
    after.load_student_state(before.student_state())
    after.load_critic_state(before.critic_state())
    assert all(a is b for a, b in zip(parameters, after.student_parameters(), strict=True))
    with torch.no_grad():
        assert torch.equal(after.student(x, t, condition), before.student(x, t, condition))
        assert torch.equal(after.critic(x, t, condition), before.critic(x, t, condition))
    with pytest.raises(FewstepError, match="student state"):
        build_roles(backbone, "adapters", rank=2).load_student_state(before.student_state())


def test_new_weights_depend_on_the_seed_only(backbone: Backbone) -> None:
    torch.manual_seed(3)
    first = build_roles(backbone, "adapters", rank=4, steps_aware=True).student_state()
    drawn = torch.rand(1)
    second = build_roles(backbone, "adapters", rank=4, steps_aware=True).student_state()
    assert all(torch.equal(first[name], second[name]) for name in first)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(1))  # the global stream was not touched


def test_what_is_trained(backbone: Backbone) -> None:
    roles = build_roles(backbone, "adapters", rank=4, steps_aware=True)
    names = set(roles.student_state())
    assert all(f".{STUDENT}." in name for name in names)
    assert any("call_embedder" in name for name in names)
    assert not names & set(roles.critic_state())
    trained = {id(p) for p in [*roles.student_parameters(), *roles.critic_parameters()]}
    assert trained == {id(p) for p in roles.student_seat.network.parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", KINDS)
def test_roles_without_a_critic_hold_nothing_for_it(backbone: Backbone, batch, kind: str) -> None:
    x, t, condition = batch
    roles, full = (build_roles(backbone, kind, rank=4, critic=critic) for critic in (False, True))
    assert roles.critic_parameters() == []
    assert roles.critic_state() == {}
    assert roles.student_state().keys() == full.student_state().keys()
    assert all(torch.equal(value, full.student_state()[name]) for name, value in roles.student_state().items())
    assert not any(f".{CRITIC}." in name for name, _ in roles.student_seat.network.named_parameters())
    perturb(roles.student_parameters())
    assert gradient(roles.student_parameters(), roles.student(x, t, condition).square().mean()).norm() > 0
    with pytest.raises(FewstepError, match="roles without a critic"):
        roles.critic(x, t, condition)


@pytest.mark.parametrize("kind", KINDS)
def test_a_discriminator_on_the_teacher_needs_no_critic(backbone: Backbone, batch, kind: str) -> None:
    roles = build_roles(backbone, kind, rank=4, critic=False, discriminator="teacher")
    assert roles.critic_state().keys() == {name for name in roles.critic_state() if name.startswith("discriminator.")}
    assert gradient(roles.critic_parameters(), roles.discriminator(*batch).mean()).norm() > 0
    with pytest.raises(FewstepError, match="critic that is not there"):
        build_roles(backbone, kind, critic=False, discriminator="critic")


def test_a_small_base_has_float32_adapters(folder: Path, batch) -> None:
    x, t, _ = batch
    backbone = load_backbone(folder, dtype=torch.bfloat16)
    condition = backbone.encode(PROMPTS)
    roles = build_roles(backbone, "adapters", rank=4, steps_aware=True, checkpointing=True)
    condition["steps"] = torch.tensor([1.0, 2.0, 8.0])
    assert {p.dtype for p in roles.student_parameters()} == {torch.float32}
    perturb(roles.student_parameters())
    found = gradient(roles.student_parameters(), roles.student(x, t, condition).square().mean())
    assert bool(found.isfinite().all())
    assert found.norm() > 0
    copies = build_roles(backbone, "copies")
    assert {p.dtype for p in copies.student_parameters()} == {torch.float32}
    assert {p.dtype for p in backbone.network.parameters()} == {torch.bfloat16}


def test_null_keeps_everything_but_the_prompt(backbone: Backbone, batch) -> None:
    _, _, condition = batch
    condition["steps"] = torch.tensor([1.0, 2.0, 8.0])
    null = build_roles(backbone, "copies").null(condition)
    expected = backbone.encode([""] * 3)
    assert torch.equal(null[STATES], expected[STATES])
    assert torch.equal(null[MASK], expected[MASK])
    assert torch.equal(null["steps"], condition["steps"])


def test_refusals_and_the_warning(backbone: Backbone) -> None:
    with pytest.warns(UserWarning, match="rank 2, less than"):
        build_roles(backbone, "adapters", rank=4, critic_rank=2)
    for options in ({"kind": "lora"}, {"layers": "everything"}, {"rank": 0}):
        with pytest.raises(FewstepError, match="found"):
            build_roles(backbone, **options)
