"""A training run of a few milliseconds an iteration: for child processes to import, for torchrun to run."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fewstep.core import grids
from fewstep.core.process import Flow, Process
from fewstep.core.renoise import renoise
from fewstep.core.rollout import Path as Trajectory
from fewstep.core.streams import Draw
from fewstep.core.tensors import Condition, expand
from fewstep.methods.base import Batch, Loss, Needs, Roles
from fewstep.training.loop import Hooks, TrainResult, train
from fewstep.training.options import TrainOptions

DIMENSIONS = 4
SPREAD = 0.5  # standard deviation of the teacher's law, whose mean is the condition


class Net(nn.Module):
    """A denoiser: MLP on x, t and the condition "mean"."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.inner = nn.Linear(2 * DIMENSIONS + 1, hidden)
        self.outer = nn.Linear(hidden, DIMENSIONS)

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        told = torch.cat([x, condition["mean"].to(x), t[:, None].to(x)], dim=1)
        return x + self.outer(torch.tanh(self.inner(told)))


class ToyRoles:
    """Exact Gaussian teacher N(mean, SPREAD^2), small student and critic; the same numbers in every process."""

    def __init__(self, hidden: int = 8, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(5)
        self.process: Process = Flow()
        self.student_net, self.critic_net = Net(hidden).to(dtype), Net(hidden).to(dtype)

    def teacher(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        alpha, sigma = expand(self.process.alpha(t), x), expand(self.process.sigma(t), x)
        mean = condition["mean"].to(x)
        gain = alpha * SPREAD**2 / (alpha**2 * SPREAD**2 + sigma**2)
        return mean + gain * (x - alpha * mean)

    def student(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self.student_net(x, t, condition)

    def critic(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self.critic_net(x, t, condition)

    def null(self, condition: Condition) -> Condition:
        return {"mean": torch.zeros_like(condition["mean"])}

    def student_parameters(self) -> list[nn.Parameter]:
        return list(self.student_net.parameters())

    def critic_parameters(self) -> list[nn.Parameter]:
        return list(self.critic_net.parameters())

    def student_state(self) -> dict[str, Tensor]:
        return self.student_net.state_dict()

    def critic_state(self) -> dict[str, Tensor]:
        return self.critic_net.state_dict()


@dataclass(frozen=True)
class ToyOptions:
    steps: int = 2
    critic_updates: int = 2

    def validate(self) -> None: ...

    def build(self) -> ToyMethod:
        return ToyMethod(self)


class ToyMethod:
    """Distribution matching of the student's last landing point, in its plainest form."""

    name: ClassVar[str] = "toy"
    title: ClassVar[str] = "Toy"
    paper: ClassVar[str] = "none"

    def __init__(self, options: ToyOptions | None = None) -> None:
        self.options = options or ToyOptions()
        self.critic_updates = self.options.critic_updates
        self.needs = Needs(critic=True)

    def forwards(self, steps: int | None = None) -> float:
        return self.options.steps + 3 + self.critic_updates

    def rollout(self, batch: Batch, roles: Roles, draw: Draw) -> Trajectory:
        noise = draw.normal("noise", batch.noise_shape, batch.dtype, batch.samples.device)
        return Trajectory(roles.student, noise, grids.uniform(self.options.steps), roles.process, batch.condition)

    def critic_loss(self, path: Trajectory, roles: Roles, draw: Draw) -> Loss:
        landing = path.landing(path.steps - 1)
        x, tau = self._query(path, landing.x, landing.t, draw)
        values = (roles.critic(x, tau, path.condition) - landing.denoised).square().mean(1)
        return Loss(values, {"error": values.detach().mean()})

    def student_loss(self, path: Trajectory, roles: Roles, draw: Draw) -> Loss:
        landing = path.land(roles.student, path.steps - 1)
        with torch.no_grad():
            x, tau = self._query(path, landing.x, landing.t, draw)
            pull = roles.teacher(x, tau, path.condition) - roles.critic(x, tau, path.condition)
        values = (landing.denoised - (landing.denoised + pull).detach()).square().mean(1)
        return Loss(values, {"pull": pull.abs().mean()})

    def _query(self, path: Trajectory, x: Tensor, t: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        tau = (0.05 + 0.9 * draw.uniform("tau")).to(x)
        return renoise(path.process, x, t, tau, draw.normal("renoise", x.shape[1:], x.dtype)), tau


def toy_data(iteration: int, samples: Tensor) -> Condition:
    """One of three means per sample."""
    return {"mean": ((samples % 3) - 1.0)[:, None].expand(-1, DIMENSIONS)}


def toy_options(**changes: Any) -> TrainOptions:
    """Twelve iterations, a checkpoint every third, a log line every second."""
    settings = {"iterations": 12, "batch": 8, "checkpoint_every": 3, "log_every": 2, "keep": 2, "warmup": 2}
    return TrainOptions(**{**settings, "schedule": "cosine", "tensorboard": False, **changes})


def run(
    out: Path,
    *,
    resume: bool = False,
    roles: ToyRoles | None = None,
    hooks: Hooks | None = None,
    method: ToyMethod | None = None,
    **changes: Any,
) -> TrainResult:
    """One toy run in the folder `out`; `changes` are options of the trainer."""
    torch.set_num_threads(1)
    return train(
        method or ToyMethod(),
        roles or ToyRoles(),
        toy_data,
        toy_options(**changes),
        out,
        hooks,
        noise_shape=(DIMENSIONS,),
        resume=resume,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--iterations", type=int, default=12)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--microbatch", type=int, default=0)
    parser.add_argument("--float64", action="store_true")
    told = vars(parser.parse_args())
    run(told.pop("out"), roles=ToyRoles(dtype=torch.float64 if told.pop("float64") else torch.float32), **told)
