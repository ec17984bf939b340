"""The discriminator on the features of critic or teacher: taps, heads, who gets gradients, what is saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_pixart import PROMPTS, perturb
from torch import Tensor, nn

from fewstep.core.process import Flow
from fewstep.errors import FewstepError
from fewstep.methods import DecoupledOptions, DMD2Options, FDistillOptions
from fewstep.models import Backbone, FunctionTeacher, Roles, build_roles
from fewstep.models.discriminator import Heads, blocks_at, tapped
from fewstep.training.log import read_log
from fewstep.training.loop import train
from fewstep.training.options import TrainOptions

KINDS = ["adapters", "copies", "mixed"]


def discriminating_roles(backbone: Backbone, kind: str, features: str = "critic", **options) -> Roles:
    """Roles that have left the teacher, and a discriminator that says something."""
    roles = build_roles(backbone, kind, rank=4, discriminator=features, **options)
    perturb(roles.student_parameters(), seed=1)
    perturb(roles.critic_parameters(), seed=2)
    return roles


def heads(roles: Roles) -> dict[str, Tensor]:
    return {name: value for name, value in roles.critic_state().items() if name.startswith("discriminator.")}


def test_taps_are_after_half_three_quarters_and_all_of_the_depth() -> None:
    for count, expected in ((28, [13, 20, 27]), (6, [2, 4, 5]), (2, [0, 1]), (1, [0])):
        blocks = [nn.Identity() for _ in range(count)]
        assert [blocks.index(block) for block in blocks_at(blocks)] == expected


def test_taps_collect_in_order_with_gradient_and_leave_no_hook() -> None:
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    x = torch.ones(2, 3, requires_grad=True)
    with tapped([first, second]) as features:
        output = second(first(x))
    assert features[1] is output
    assert features[0].requires_grad
    first(x)
    assert len(features) == 2


def test_heads_give_a_logit_per_tap_that_is_zero_at_first() -> None:
    features = [torch.randn(5, 7, 12), torch.randn(5, 7, 12)]
    torch.testing.assert_close(Heads(12, 2)(features), torch.zeros(5, 2))


@pytest.mark.parametrize("features", ["critic", "teacher"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_of_the_chosen_networks_features(backbone: Backbone, batch, kind: str, features: str) -> None:
    """Moving the critic changes the logits where they are of the critic's features, and only there."""
    x, t, condition = batch
    roles = discriminating_roles(backbone, kind, features)
    told = {**condition, "steps": torch.ones(3), "landing": torch.zeros(3)}  # which it must not be told
    with torch.no_grad():
        before = roles.discriminator(x, t, told)
        assert before.shape == (3, 2)
        torch.testing.assert_close(roles.log_ratio(x, t, condition), before.mean(1))
        perturb(roles.student_parameters(), seed=5)
        assert torch.equal(roles.discriminator(x, t, condition), before)
        perturb(list(roles.critic_parameters())[: -len(heads(roles))], seed=6)
        assert torch.equal(roles.discriminator(x, t, condition), before) == (features == "teacher")


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("features", ["critic", "teacher"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_go_to_heads_critic_and_input(backbone, batch, kind: str, features: str, checkpointing: bool) -> None:
    """With and without activation checkpointing, whatever is called between forward and backward."""
    x, t, condition = batch
    found = {}
    for on in (False, checkpointing):
        roles = discriminating_roles(backbone, kind, features, checkpointing=on)
        point = x.clone().requires_grad_()
        logits = roles.discriminator(point, t, condition).sum()
        with torch.no_grad():
            roles.student(x, t, condition)
        logits.backward()
        names = list(roles.critic_state())
        found[on] = [point.grad, *(p.grad for p in roles.critic_parameters() if p.grad is not None)]
        reached = {n for n, p in zip(names, roles.critic_parameters(), strict=True) if p.grad is not None}
        assert heads(roles).keys() <= reached
        assert (reached > heads(roles).keys()) == (features == "critic")
        assert all(p.grad is None for p in roles.student_parameters())
        assert all(p.grad is None for p in backbone.network.parameters())
    for a, b in zip(found[False], found[checkpointing], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(a.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
def test_the_heads_are_saved_and_loaded_with_the_critic(backbone: Backbone, batch, kind: str) -> None:
    x, t, condition = batch
    before = discriminating_roles(backbone, kind)
    after = build_roles(backbone, kind, rank=4, discriminator="critic", seed=9)
    assert not torch.equal(*(next(iter(heads(roles).values())) for roles in (before, after)))
    after.load_critic_state(before.critic_state())
    with torch.no_grad():
        assert torch.equal(after.discriminator(x, t, condition), before.discriminator(x, t, condition))
    with pytest.raises(FewstepError, match="critic state"):
        build_roles(backbone, kind, rank=4).load_critic_state(before.critic_state())


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_discriminator_nothing_is_different(backbone: Backbone, kind: str) -> None:
    """Neither the names nor the values of what is trained change when there are heads beside it."""
    plain, judged = build_roles(backbone, kind, rank=4), build_roles(backbone, kind, rank=4, discriminator="critic")
    assert not plain.discriminates
    assert judged.discriminates
    assert not heads(plain)
    assert plain.critic_state().keys() == judged.critic_state().keys() - heads(judged).keys()
    for state, other in (
        (plain.critic_state(), judged.critic_state()),
        (plain.student_state(), judged.student_state()),
    ):
        assert all(torch.equal(value, other[name]) for name, value in state.items())


def test_refusals(backbone: Backbone, batch) -> None:
    with pytest.raises(FewstepError, match="found roles without a discriminator"):
        build_roles(backbone, rank=4).discriminator(*batch)
    with pytest.raises(FewstepError, match="found discriminator 'student'"):
        build_roles(backbone, rank=4, discriminator="student")
    with pytest.raises(FewstepError, match="does not say where its features are"):
        Backbone.tapped_blocks(backbone, backbone.network)


def test_any_module_discriminates_beside_a_function_teacher() -> None:
    class Telling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
            return self.layer(torch.cat([x, t[:, None]], 1))

    student, x, t = nn.Bilinear(2, 1, 2), torch.ones(4, 2), torch.full((4,), 0.5)
    roles = FunctionTeacher(lambda x, t: x, Flow()).roles(student, discriminator=Telling())
    assert roles.discriminator(x, t, {}).shape == (4, 2)
    assert {"discriminator.layer.weight", "discriminator.layer.bias"} < roles.critic_state().keys()


@pytest.mark.parametrize("kind", ["adapters", "copies"])
@pytest.mark.parametrize(
    "options",
    [
        DMD2Options(critic_updates=2),
        FDistillOptions(critic_updates=1, steps=2),
        DecoupledOptions(critic_updates=1, regulariser="gan", gan_weight=0.1),
    ],
)
def test_three_iterations_change_student_and_critic_and_nothing_else(backbone, tmp_path: Path, kind, options) -> None:
    method = options.build()
    roles = build_roles(backbone, kind, rank=4, critic=method.needs.critic, discriminator=method.needs.features)
    frozen = {name: value.clone() for name, value in backbone.network.state_dict().items()}
    student, critic = ({n: v.clone() for n, v in s.items()} for s in (roles.student_state(), roles.critic_state()))

    def data(iteration: int, samples: Tensor) -> dict[str, Tensor]:
        return backbone.encode([PROMPTS[n % 3] for n in samples.tolist()])

    def real(iteration: int, samples: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        images = torch.stack([torch.full((3, 32, 32), (n % 5) / 5) for n in samples.tolist()])
        return backbone.encode_images(images), data(iteration, samples)

    settings = TrainOptions(iterations=3, batch=4, warmup=0, log_every=1, tensorboard=False)
    result = train(method, roles, data, settings, tmp_path, noise_shape=backbone.latent_shape, real=real)
    for before, after in ((student, roles.student_state()), (critic, roles.critic_state())):
        assert any(not torch.equal(before[name], after[name]) for name in before)
    assert all(not torch.equal(critic[name], value) for name, value in heads(roles).items() if "logit" in name)
    for name, value in backbone.network.state_dict().items():
        assert torch.equal(value, frozen[name])
    record = read_log(result.log)[-1]
    assert record["forwards/discriminator"] == 1 + 2 * method.critic_updates
    assert {"metric/student/adversarial_loss", "metric/critic/logit_real", "metric/critic/logit_fake"} <= record.keys()
