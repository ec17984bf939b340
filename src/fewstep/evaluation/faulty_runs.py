"""Short runs of the real trainer with an exact teacher, sound ones and ones with a fault built in.

They are the known answers of the monitors (`training.monitors`): each fault has to be named by its condition within a
stated number of iterations, and no sound run may be told anything. A run takes a second or two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from fewstep.core.process import Flow
from fewstep.core.rollout import Path as Trajectory
from fewstep.core.streams import Draw, Streams
from fewstep.core.tensors import Condition
from fewstep.evaluation.exact import LABEL, MixtureTeacher
from fewstep.evaluation.toy import LogisticDiscriminator, ResidualMLP, ToyRoles
from fewstep.methods import Options, preset
from fewstep.methods.base import Loss, Method, Roles
from fewstep.training.log import read_alarms
from fewstep.training.loop import train
from fewstep.training.monitors.guard import Alarmed
from fewstep.training.options import TrainOptions

DIMENSIONS = 8
FAULT_AT = 11
"""Iteration at which a fault begins, in runs that are sound before."""
RATES = {"student_rate": 5e-4, "critic_rate": 2e-3}
"""At which all methods learn here."""


def two_classes() -> MixtureTeacher:
    """Two classes of one mode each."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(2, DIMENSIONS, generator=generator)
    return MixtureTeacher(Flow(), torch.ones(2), means, 0.3 * torch.eye(DIMENSIONS).expand(2, -1, -1), classes=[0, 1])


class RunRoles(ToyRoles):
    """Exact teacher, small student and critic that start as it, and a discriminator; what the trainer asks of roles."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        teacher = two_classes()
        self.networks: dict[str, nn.Module] = {
            "student": ResidualMLP(teacher, width=32, depth=2),
            "critic": ResidualMLP(teacher, width=32, depth=2),
            "discriminator": LogisticDiscriminator(teacher.process, DIMENSIONS),
        }
        super().__init__(teacher, *self.networks.values())

    def student_state(self) -> dict[str, Tensor]:
        return self._state("student")

    def critic_state(self) -> dict[str, Tensor]:
        return self._state("critic", "discriminator")

    def student_parameters(self) -> list[nn.Parameter]:
        return self._parameters("student")

    def critic_parameters(self) -> list[nn.Parameter]:
        return self._parameters("critic", "discriminator")

    def _state(self, *names: str) -> dict[str, Tensor]:
        named = {f"{role}.{name}": p for role in names for name, p in self.networks[role].named_parameters()}
        return {name: parameter.detach() for name, parameter in named.items()}

    def _parameters(self, *names: str) -> list[nn.Parameter]:
        return [parameter for name in names for parameter in self.networks[name].parameters()]


def labels(iteration: int, samples: Tensor) -> Condition:
    """Both classes in turn."""
    return {LABEL: samples % 2}


def clean(iteration: int, samples: Tensor) -> tuple[Tensor, Condition]:
    """Samples of the teacher's law."""
    noise = Streams(1).at(iteration, samples).normal("real", (DIMENSIONS,))
    return two_classes().means[samples % 2] + 0.3**0.5 * noise, {LABEL: samples % 2}


def _sound() -> dict[str, Options]:
    """Methods at two steps (TDM: four), some with guidance, some with a discriminator."""
    changes: dict[str, dict[str, Any]] = {
        "tdm": {"guidance_scale": 2.0},
        "dmd2": {"steps": 2, "guidance_scale": 2.0, "critic_updates": 2},
        "f-distill": {"steps": 2, "guidance_scale": 1.0, "critic_updates": 2},
        "sid-none": {"steps": 2},
        "decoupled": {"steps": 2, "guidance_scale": 1.5, "critic_updates": 2},
        "phased": {"guidance_scale": 2.0, "critic_updates": 2},
    }
    return {name: replace(preset(name), **told) for name, told in changes.items()}  # type: ignore[type-var]


SOUND = _sound()
"""The sound runs, by method."""


class Bent:
    """A method whose losses go through a function of (role, number of the loss, loss); the number counts from 1."""

    def __init__(self, method: Method, bend: Callable[[str, int, Loss], Loss]) -> None:
        self._method, self._bend, self._count = method, bend, {"student": 0, "critic": 0}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._method, name)

    def critic_loss(self, path: Trajectory, roles: Roles, draw: Draw) -> Loss:
        return self._bent("critic", self._method.critic_loss(path, roles, draw))

    def student_loss(self, path: Trajectory, roles: Roles, draw: Draw) -> Loss:
        return self._bent("student", self._method.student_loss(path, roles, draw))

    def _bent(self, role: str, loss: Loss) -> Loss:
        self._count[role] += 1
        return self._bend(role, self._count[role], loss)


def _reversed(role: str, number: int, loss: Loss) -> Loss:
    return replace(loss, values=-loss.values) if role == "student" and number >= FAULT_AT else loss


def _huge(role: str, number: int, loss: Loss) -> Loss:
    return replace(loss, values=1e30 * loss.values) if role == "student" else loss


def _one_bad_label(iteration: int, samples: Tensor) -> Condition:
    """A class that there is not, for one sample of one batch: everything about it is NaN."""
    told = labels(iteration, samples)
    return {LABEL: torch.where(samples == samples[0], 7, told[LABEL])} if iteration == FAULT_AT else told


class _DeadDiscriminator(RunRoles):
    def __init__(self) -> None:
        super().__init__()
        judge = self.networks["discriminator"]
        self.discriminator = lambda x, t, condition: 0.0 * judge(x, t, condition)


class _WithoutNull(RunRoles):
    def null(self, condition: Condition) -> Condition:
        return condition


@dataclass(frozen=True)
class Fault:
    """Something that is wrong, and what should tell of it."""

    title: str
    condition: str
    within: int
    """Iterations from its beginning in which it is told at the latest."""
    method: str = "tdm"
    begins: int = 1
    roles: Callable[[], RunRoles] = RunRoles
    bend: Callable[[str, int, Loss], Loss] | None = None
    data: Callable[[int, Tensor], Condition] = labels
    settings: Mapping[str, Any] = field(default_factory=dict)


FAULTS = (
    Fault("sign of the student's loss reversed", "reversed-sign", 5, begins=FAULT_AT, bend=_reversed),
    Fault("learning rates x100", "explosion", 10, settings={role: 100 * rate for role, rate in RATES.items()}),
    Fault("critic frozen", "frozen", 3, settings={"critic_rate": 0.0}),
    Fault("gradients beyond fp16", "fp16-overflow", 10, bend=_huge, settings={"precision": "fp16"}),
    Fault("one NaN batch", "not-finite", 1, begins=FAULT_AT, data=_one_bad_label),
    Fault("discriminator dead", "dead-discriminator", 10, "dmd2", roles=_DeadDiscriminator),
    Fault("no unconditional embedding", "missing-unconditional", 1, roles=_WithoutNull),
)
"""What issue and users ask for, each in one method; `replace(fault, method=...)` for another."""


def run(fault: Fault, out: Path, **settings: Any) -> list[dict[str, Any]]:
    """The alarms of a run in the folder `out`, as long as the fault may take to be told; `settings` of the trainer."""
    last = fault.begins + fault.within - 1
    told = {
        "iterations": last,
        "batch": 32,
        "warmup": min(10, last),
        "checkpoint_every": 0,
        "on_alarm": "act",
        "tensorboard": False,
        **RATES,
    }
    method = SOUND[fault.method].build()
    if fault.bend is not None:
        method = cast(Method, Bent(method, fault.bend))
    options = TrainOptions(**{**told, **fault.settings, **settings})
    with suppress(Alarmed):
        train(method, fault.roles(), fault.data, options, out, noise_shape=(DIMENSIONS,), real=clean)
    return read_alarms(out / "log.jsonl")


def sound(method: str, iterations: int) -> Fault:
    """A run without a fault, of so many iterations."""
    return Fault("none", "none", iterations, method)
