"""Every option of TDM does something, and the presets' golden curves stay as they are."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path as File
from typing import Any

import pytest
import torch

from fewstep.core.process import Flow
from fewstep.core.streams import Draw, Streams
from fewstep.evaluation.exact import LABEL, MixtureTeacher
from fewstep.evaluation.toy import ResidualMLP, ToyRoles
from fewstep.methods import METHODS, TDMOptions, preset
from fewstep.methods.base import Batch
from fewstep.methods.tdm import TDM

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


def setting(options: TDMOptions) -> tuple[TDM, ToyRoles, Batch, Draw]:
    teacher = two_class_teacher()
    roles = ToyRoles(teacher, moved(teacher, 1), moved(teacher, 2))
    samples = torch.arange(BATCH)
    return TDM(options), roles, Batch({LABEL: samples % 2}, samples, (3,)), Streams(0).at(1, samples)


def losses(options: TDMOptions) -> torch.Tensor:
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
    "loss_on": "landing",
}  # fmt: skip
UNDER: dict[str, tuple[dict[str, Any], Any]] = {
    "steps_condition": ({"step_counts": (2, 4)}, True),
    "importance": ({"critic_target": "denoised"}, "clipped_sum"),
    "critic_call_condition": ({"tau_range": "to_T"}, True),
    "logit_mean": ({"tau_law": "logit_normal"}, 1.0),
    "logit_std": ({"tau_law": "logit_normal"}, 0.5),
    "huber_c": ({"metric": "huber_elementwise"}, 0.1),
}
"""Options that act only together with others."""


@pytest.mark.parametrize("name", [field.name for field in fields(TDMOptions)])
def test_every_option_changes_something(name: str) -> None:
    if name == "critic_updates":
        assert TDM(TDMOptions(critic_updates=5)).critic_updates == 5
        return
    base, value = UNDER[name] if name in UNDER else ({}, OTHER[name])
    plain = TDMOptions(**base)
    assert not torch.equal(losses(plain), losses(replace(plain, **{name: value})))


@pytest.mark.parametrize("name", METHODS)
def test_golden_curve(name: str) -> None:
    """Thirty iterations with a fixed seed: a change meant to be neutral leaves this file as it is."""
    method, roles, _, _ = setting(preset(name))  # type: ignore[arg-type]
    critic = torch.optim.SGD(roles.critic.parameters(), 0.02)
    student = torch.optim.SGD(roles.student.parameters(), 0.01)
    lines = []
    for iteration in range(1, 31):
        samples = torch.arange((iteration - 1) * BATCH, iteration * BATCH)
        draw = Streams(0).at(iteration, samples)
        path = method.rollout(Batch({LABEL: samples % 2}, samples, (3,)), roles, draw)
        values = []
        for optimiser, loss in ((critic, method.critic_loss), (student, method.student_loss)):
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
