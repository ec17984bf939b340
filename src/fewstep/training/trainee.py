"""A network in training: its parameters, its optimiser, and how a loss becomes a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from fewstep.core.shards import fill_, is_sharded, whole
from fewstep.errors import FewstepError
from fewstep.methods.base import Loss
from fewstep.training import optimisers
from fewstep.training.optimisers import make_optimiser
from fewstep.training.options import TrainOptions
from fewstep.training.parallel import Group


@dataclass(frozen=True)
class Update:
    """What one optimiser step did: mean loss, gradient norm before clipping, and this process's metrics."""

    loss: float
    gradient_norm: float
    metrics: dict[str, Tensor]
    stepped: bool = True
    """False where an infinite or undefined gradient made it leave the weights alone."""


class Trainee:
    """The student or the critic, with an AdamW of its own.

    Sharded parameters (`core.shards`) have sharded gradients and moments. FSDP then sums the gradients, and its
    backward pass is always a whole one: what it leaves with the other role is dropped when that role's next update
    begins.
    """

    def __init__(
        self,
        role: Literal["student", "critic"],
        parameters: Mapping[str, nn.Parameter],
        options: TrainOptions,
        group: Group,
        watch: Callable[[str], AbstractContextManager[None]],
    ) -> None:
        self.role = role
        self.parameters = dict(parameters)
        self._list = list(self.parameters.values())
        self._options, self._group, self._watch = options, group, watch
        self.sharded = is_sharded(self._list[0])
        self._clip = (options.student_clip if role == "student" else options.critic_clip) or math.inf
        betas = (float(options.beta1), float(options.beta2))
        self.optimiser = make_optimiser(options.optimiser, self._list, betas, options.weight_decay)
        self.scaler = torch.amp.GradScaler(self._list[0].device.type, enabled=options.precision == "fp16")
        self.slowed = 1.0
        """By what a roll-back has multiplied the learning rate."""

    def update(self, losses: Iterable[Loss], iteration: int) -> Update:
        """One optimiser step on the mean of `losses` over all samples of all micro-batches and processes.

        `losses` is consumed one micro-batch at a time, each followed by its backward pass. If the loss or its gradient
        is not finite there is no step, and FewstepError unless alarms are acted on; in fp16 an overflowing gradient
        only skips the step and halves the loss scale. Where a loss says where samples are to move (`Loss.pulls`), the
        metric pull_alignment is the mean cosine between that and minus the gradient that reaches them.
        """
        self.optimiser.zero_grad()  # of what the other role's sharded backward has left here
        mean = torch.zeros((), device=self._list[0].device)
        metrics: dict[str, Tensor] = {}
        for loss in losses:
            if not loss.values.requires_grad:
                raise self._unreached(iteration)
            share = loss.values.sum() / self._options.batch
            cosines: list[Tensor] = []
            for sample, toward in loss.pulls:
                if sample.requires_grad:
                    sample.register_hook(partial(_note_alignment, cosines, toward))
            with self._watch("backward"):
                if self.sharded:
                    (share * self._group.size).backward()  # FSDP takes the mean over the processes
                else:
                    self.scaler.scale(share).backward(inputs=self._list)  # a loss may lead through the other role, too
            mean += share.detach()
            aligned = {"pull_alignment": torch.stack(cosines).mean()} if cosines else {}
            for name, value in (loss.metrics | aligned).items():
                metrics[name] = metrics.get(name, 0) + value * (len(loss.values) / self._options.batch)
        self._gather_gradients(mean, iteration)
        norm = whole(nn.utils.clip_grad_norm_(self._list, self._clip))
        value, size = torch.stack([mean, norm.to(mean)]).tolist()
        finite = math.isfinite(value) and math.isfinite(size)
        if finite or self._overflowed(value, size, iteration):
            for settings in self.optimiser.param_groups:
                settings["lr"] = self._options.rate(self.role, iteration) * self.slowed
            self.scaler.step(self.optimiser)
        self.scaler.update()
        self.optimiser.zero_grad()  # the memory of gradients is the other role's now
        return Update(value, size, metrics, finite)

    def _gather_gradients(self, mean: Tensor, iteration: int) -> None:
        """Sums loss and gradients over the processes and takes the loss scale out. A missing gradient counts as 0."""
        if all(parameter.grad is None for parameter in self._list):
            raise self._unreached(iteration)
        for parameter in self._list:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self._group.sum_([mean, *([] if self.sharded else [parameter.grad for parameter in self._list])])
        self.scaler.unscale_(self.optimiser)

    def _unreached(self, iteration: int) -> FewstepError:
        return FewstepError(
            f"found no gradient for the {self.role} at iteration {iteration}, "
            "expected its loss to reach its parameters, "
            "fix: see that they require gradients when the network is called (switching adapters may turn that off)"
        )

    def _overflowed(self, loss: float, norm: float, iteration: int) -> bool:
        """Whether it is a gradient beyond fp16, which the scaler knows how to skip; else False, or FewstepError."""
        if math.isfinite(loss) and self.scaler.is_enabled() and self.scaler.get_scale() > 1:
            return True
        if self._options.on_alarm == "act":
            return False
        raise FewstepError(
            f"found a {self.role} loss of {loss:g} with gradient norm {norm:g} at iteration {iteration}, "
            f"expected finite numbers, fix: lower {self.role}_rate, or use a wider precision"
        )

    def tensors(self) -> dict[str, Tensor]:
        """The optimiser's state as "parameter.entry" -> tensor, sharded as the parameters are."""
        return optimisers.tensors(self.optimiser, list(self.parameters))

    def load(
        self, parameters: Mapping[str, Tensor], optimiser: Mapping[str, Tensor], scaler: Mapping[str, float]
    ) -> None:
        """Takes over what `parameters`, `tensors()` and `scaler.state_dict()` were when a checkpoint was written."""
        copy_tensors(self.parameters, parameters, self.role)
        own = {name: _as_shard(value, self.parameters[name.rsplit(".", 1)[0]]) for name, value in optimiser.items()}
        optimisers.load(self.optimiser, own, list(self.parameters))
        if scaler:
            self.scaler.load_state_dict(dict(scaler))


@torch.no_grad()
def copy_tensors(targets: Mapping[str, Tensor], values: Mapping[str, Tensor], what: str) -> None:
    """Copies each value into the target of its name; FewstepError if names or shapes differ."""
    wrong = {name for name in targets.keys() | values.keys() if _shape(targets, name) != _shape(values, name)}
    if wrong:
        first = min(wrong)
        raise FewstepError(
            f"found a checkpoint whose {what} has {first} of shape {_shape(values, first)}, expected "
            f"{_shape(targets, first)} ({len(wrong)} tensors differ), "
            "fix: build the same networks as the run began with"
        )
    for name, target in targets.items():
        fill_(target, values[name])


def _note_alignment(cosines: list[Tensor], toward: Tensor, gradient: Tensor) -> None:
    """A backward hook: changes nothing."""
    cosines.append(torch.cosine_similarity(-gradient.float().flatten(1), toward.float().flatten(1), dim=1).mean())


def _as_shard(value: Tensor, parameter: nn.Parameter) -> Tensor:
    """A whole moment of `parameter` in pieces like the parameter's own; counters as they are."""
    if not is_sharded(parameter) or value.shape != parameter.shape:
        return value
    part = torch.zeros_like(parameter, requires_grad=False)
    fill_(part, value)
    return part


def _shape(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...] | None:
    return tuple(tensors[name].shape) if name in tensors else None
