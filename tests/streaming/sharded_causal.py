"""What two processes check about sharded causal students: torchrun sharded_causal.py FOLDER (a tiny Wan lies there)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path[:0] = [str(Path(__file__).parents[1] / "models"), str(Path(__file__).parents[2])]

from tests.two_processes import make  # noqa: E402
from tiny_flows import PROMPTS  # noqa: E402
from tiny_pixart import perturb  # noqa: E402

import fewstep  # noqa: E402
from fewstep.api import RoleOptions  # noqa: E402
from fewstep.core.shards import is_sharded, whole  # noqa: E402
from fewstep.core.streams import Streams  # noqa: E402
from fewstep.live import LiveCausalStudent  # noqa: E402
from fewstep.methods import LiveAvatarOptions, SelfForcingOptions  # noqa: E402
from fewstep.methods.base import Batch  # noqa: E402
from fewstep.methods.self_forcing import layout_of  # noqa: E402
from fewstep.models import Roles, build_roles, load_backbone  # noqa: E402
from fewstep.models.sharding import shard  # noqa: E402
from fewstep.training.networks import Networks  # noqa: E402
from fewstep.training.options import TrainOptions  # noqa: E402

SIZE = {"height": 16, "width": 32, "num_frames": 9}
OPTIONS = SelfForcingOptions(chunk=1, sink=1, window=1, steps=2, critic_updates=1)
AGAIN = LiveAvatarOptions(chunk=1, window=1, steps=2, critic_updates=1, recompute=True)
TRAIN = TrainOptions(
    iterations=1, batch=2, warmup=0, tensorboard=False, student_rate=0.0, weight_decay=0.0, ema_decay=0.0
)


def made(folder: Path, kind: Any) -> Roles:
    """Roles that have left the teacher, checkpointed, in float64: three latent frames."""
    backbone = load_backbone(folder / "wan", dtype=torch.float64, size=SIZE)
    roles = build_roles(backbone, kind, rank=2, causal=True, checkpointing=True)
    trained = [*roles.student_parameters(), *roles.critic_parameters()]
    for parameter in trained:
        parameter.data = parameter.data.double()
    perturb(trained)
    return roles


def losses_and_gradients(roles: Roles, spread: bool, options: SelfForcingOptions) -> list[Tensor]:
    """Of critic and student on two videos of the student's own, and its film afterwards."""
    method, networks = options.build(), Networks(roles, "fp32", torch.device("cpu"))
    if spread:
        networks.in_step()
    backbone: Any = roles.backbone
    samples = torch.arange(2)
    draw = Streams(0).at(1, samples)
    batch = Batch(backbone.encode(PROMPTS[:2]), samples, backbone.latent_shape, dtype=torch.float64)
    path: Any = method.rollout(batch, networks, draw)  # type: ignore[arg-type]
    found = []
    for phase, loss, parameters in (
        ("critic", method.critic_loss, roles.critic_parameters()),
        ("student", method.student_loss, roles.student_parameters()),
    ):
        value = loss(path, networks, draw.sub(phase)).values.mean()  # type: ignore[arg-type]
        with networks.timed(phase):
            value.backward()  # as the trainer does where weights are spread
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        found += [value.detach(), *map(whole, gradients)]
        assert max(float(part.abs().max()) for part in found[-len(parameters) :]) > 1e-6
        for parameter in [*roles.student_parameters(), *roles.critic_parameters()]:
            parameter.grad = None
    layout = layout_of(options)
    assert layout is not None
    return [*found, LiveCausalStudent(roles, options, layout).latents(PROMPTS[:2], [3, 4])]


def exact(folder: Path, kind: str, options: SelfForcingOptions = OPTIONS) -> None:
    """Spread weights give the losses, gradients and films of whole ones."""
    spread, one = made(folder, kind), made(folder, kind)
    shard(spread)
    assert all(is_sharded(parameter) for parameter in spread.student_parameters())
    wanted = losses_and_gradients(one, False, options)
    for a, b in zip(losses_and_gradients(spread, True, options), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7 * float(b.abs().max()))


def begins(folder: Path) -> None:
    """A sharded run, its teacher read from disk part by part, begins with the weights of another student.

    Its rates are 0, so that it also ends with them.
    """
    teacher = fewstep.load_teacher(folder / "wan", defer=True, **SIZE)  # type: ignore[arg-type]
    roles = RoleOptions(roles="copies", shard=True)
    student = fewstep.distill(
        teacher, OPTIONS, out=folder / "run", prompts=PROMPTS[:2], roles=roles, train_options=TRAIN,
        start=folder / "start" / "student",
    )  # fmt: skip
    first = fewstep.load_student(folder / "start" / "student").network
    for a, b in zip(student.network.parameters(), first.parameters(), strict=True):
        torch.testing.assert_close(a, b)


CHECKS = {
    "adapters": lambda folder: exact(folder, "adapters"),
    "copies": lambda folder: exact(folder, "copies"),
    "noisy and computed again": lambda folder: exact(folder, "copies", AGAIN),
    "begins": begins,
}


if __name__ == "__main__":
    make(CHECKS, Path(sys.argv[1]))
