"""Every option of TDM and DMD2 does something, and the golden curves of all presets of images stay as they are."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path as File
from typing import Any

import pytest
import torch

from fewstep.core.process import Flow
from fewstep.core.streams import Draw, Streams
from fewstep.evaluation.exact import LABEL, MixtureTeacher
from fewstep.evaluation.toy import LogisticDiscriminator, ResidualMLP, ToyRoles
from fewstep.methods import METHODS, DMD2Options, Options, TDMOptions, preset
from fewstep.methods.base import Batch, Method

BATCH = 64


def two_class_teacher() -> MixtureTeacher:
    """Two classes of one mode each in three dimensions."""
    means = torch.tensor([[1.0, 0.5, -1.0], [-1.0, 0.0, 1.0]])
    return MixtureTeacher(Flow(), torch.ones(2), means, 0.2 * torch.eye(3).expand(2, 3, 3), classes=[0, 1])


def moved(teacher: MixtureTeacher, seed: int) -> ResidualMLP:
    """A network that is not the teacher any more."""
    torch.manual_seed(seed)
    network = ResidualMLP(teacher, width=16, depth=2)
    torch.nn.init.normal_(network.network[-1].weight, std=0.1)
    return network


def discriminator() -> LogisticDiscriminator:
    """One that says something."""
    network = LogisticDiscriminator(Flow(), 3)
    torch.nn.init.normal_(network.weight, std=0.3, generator=torch.Generator().manual_seed(3))
    return network


def batch_of(samples: torch.Tensor) -> Batch:
    """Two classes, with real data and with pairs, for methods that look at them."""
    told, numbers = {LABEL: samples % 2}, Streams(1).at(1, samples)
    real = two_class_teacher().means[samples % 2] + 0.45 * numbers.normal("real", (3,))
    return Batch(told, samples, (3,), real=(real, told), pairs=(numbers.normal("noise", (3,)), real, told))


def setting(options: Options) -> tuple[Method, ToyRoles, Batch, Draw]:
    teacher = two_class_teacher()
    roles = ToyRoles(teacher, moved(teacher, 1), moved(teacher, 2), discriminator())
    samples = torch.arange(BATCH)
    return options.build(), roles, batch_of(samples), Streams(0).at(1, samples)


def losses(options: Options) -> torch.Tensor:
    """Critic's and student's loss of one iteration, one after the other: (2 B,)."""
    method, roles, batch, draw = setting(options)
    path = method.rollout(batch, roles, draw)
    critic = method.critic_loss(path, roles, draw.sub("critic")).values
    return torch.cat([critic, method.student_loss(path, roles, draw.sub("student")).values]).detach()


OTHER: dict[str, Any] = {
    "steps": 2, "step_counts": (2, 4), "shift": 3.0, "start_time": 0.8, "grid": (0.9, 0.7, 0.5, 0.2), "eta": 0.8,
    "tau_range": "to_T", "tau_law": "logit_normal", "tau_min": 0.1, "margin": 0.05, "landing": "random",
    "segments": "all", "critic_target": "denoised", "critic_weight": "one", "snr_cap": 0.5,
    "teacher_regularisation": 0.1, "guidance_scale": 1.0, "normaliser": "none", "metric": "huber_vector",
    "loss_on": "landing", "guidance": "decoupled", "divergence": "jensen_shannon", "gan_weight": 0.1,
    "solver_weight": 1.0,
}  # fmt: skip
UNDER: dict[str, tuple[dict[str, Any], Any]] = {
    "steps_condition": ({"step_counts": (2, 4)}, True),
    "importance": ({"critic_target": "denoised"}, "clipped_sum"),
    "critic_call_condition": ({"tau_range": "to_T"}, True),
    "logit_mean": ({"tau_law": "logit_normal"}, 1.0),
    "logit_std": ({"tau_law": "logit_normal"}, 0.5),
    "huber_c": ({"metric": "huber_elementwise"}, 0.1),
    "guidance_levels": ({"guidance": "decoupled"}, "full"),
    "joint_normaliser": ({"guidance": "decoupled", "guidance_levels": "shared"}, True),
    "ratio_clip": ({"divergence": "jensen_shannon"}, (0.9, 1.1)),
    "ratio_bins": ({"divergence": "jensen_shannon"}, 1),
    "discriminator_weight": ({"gan_weight": 0.1}, 1.0),
    "solver_substeps": ({"solver_weight": 1.0}, 3),
    "solver_guidance": ({"solver_weight": 1.0}, 2.0),
}
"""Options that act only together with others."""
OF_MOTION = {"motion_guidance"}
"""Options that act on conditions of motion alone, which are not here (tests/test_every_option.py has some)."""


@pytest.mark.parametrize("name", [field.name for field in fields(TDMOptions) if field.name not in OF_MOTION])
def test_every_option_changes_something(name: str) -> None:
    if name == "critic_updates":
        assert TDMOptions(critic_updates=5).build().critic_updates == 5
        return
    base, value = UNDER[name] if name in UNDER else ({}, OTHER[name])
    plain = TDMOptions(**base)
    assert not torch.equal(losses(plain), losses(replace(plain, **{name: value})))


DMD2_UNDER: dict[str, tuple[dict[str, Any], Any]] = UNDER | {
    "snr_cap": ({"critic_weight": "min_snr"}, 0.5),
    "critic_call_condition": ({}, True),
    "regression_weight": ({"steps": 1}, 0.25),
    "discriminator_weight": ({}, 1.0),
}


@pytest.mark.parametrize(
    "name", [field.name for field in fields(DMD2Options) if field.name not in {"critic_updates", *OF_MOTION}]
)
def test_every_option_of_dmd2_changes_something(name: str) -> None:
    base, value = DMD2_UNDER[name] if name in DMD2_UNDER else ({}, OTHER[name])
    plain = DMD2Options(**base)
    assert not torch.equal(losses(plain), losses(replace(plain, **{name: value})))


NEEDS = {name: make().build().needs for name, make in METHODS.items()}


@pytest.mark.parametrize("name", [name for name in METHODS if not NEEDS[name].causal])
def test_golden_curve(name: str) -> None:
    """Thirty iterations with a fixed seed: a change meant to be neutral leaves this file as it is."""
    method, roles, _, _ = setting(preset(name))
    torch.nn.init.zeros_(roles.discriminator.weight)
    critic = torch.optim.SGD([*roles.critic.parameters(), *roles.discriminator.parameters()], 0.02)
    student = torch.optim.SGD(roles.student.parameters(), 0.01)
    lines = []
    for iteration in range(1, 31):
        samples = torch.arange((iteration - 1) * BATCH, iteration * BATCH)
        draw = Streams(0).at(iteration, samples)
        path = method.rollout(batch_of(samples), roles, draw)
        values = []
        trained = [(critic, method.critic_loss)] if method.critic_updates else []
        for optimiser, loss in (*trained, (student, method.student_loss)):
            optimiser.zero_grad()
            value = loss(path, roles, draw).values.mean()
            value.backward()
            optimiser.step()
            values.append(float(value.detach()))
        lines.append(values)
    golden = File(__file__).parent / "golden" / f"{name}.txt"
    if not golden.exists():
        golden.parent.mkdir(exist_ok=True)
        golden.write_text("\n".join(" ".join(f"{v:.6e}" for v in line) for line in lines) + "\n")
        pytest.fail(f"wrote {golden.name}; commit it and run again")
    stored = [[float(word) for word in line.split()] for line in golden.read_text().splitlines()]
    torch.testing.assert_close(torch.tensor(lines), torch.tensor(stored), rtol=2e-4, atol=1e-6)
