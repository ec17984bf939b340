"""Runs that follow one another in one folder, each beginning with what those before it made.

Phased DMD trains its experts so, MSD its stages. Every turn is an ordinary run (`training.loop.train`) in a folder of
its own, so it logs, checkpoints and resumes like any other; a turn that is over is only read when the whole is resumed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.core.shards import whole
from fewstep.errors import FewstepError
from fewstep.methods.base import Method
from fewstep.training.loop import Data, Hooks, NoiseShape, PairData, RealData, TrainableRoles, TrainResult, train
from fewstep.training.options import TrainOptions
from fewstep.training.trainee import copy_tensors

State = dict[str, Tensor]
"""The trained tensors of a student, averaged, by name."""


@dataclass(frozen=True)
class Turn:
    """One of the runs."""

    name: str
    """Of its folder."""
    method: Method
    roles: Callable[[Sequence[State]], TrainableRoles]
    """Called when it is its turn, with the students of the turns before: new roles, with a new critic."""
    options: TrainOptions
    keeps_critic: bool = False
    """The critic goes on from where that of the turn before ended; what only the new one has, such as a discriminator's
    heads, is as new."""
    hooks: Callable[[TrainableRoles], Hooks | None] = lambda roles: None


def train_in_turn(
    turns: Sequence[Turn],
    data: Data,
    out: Path | str,
    *,
    noise_shape: NoiseShape,
    real: RealData | None = None,
    pairs: PairData | None = None,
    configuration: Mapping[str, Any] | None = None,
    resume: bool = False,
) -> tuple[TrainResult, TrainableRoles]:
    """Trains every turn in `out`/<its name>; the last one's result and roles.

    Students are handed on as averaged ones (`TrainOptions.ema_decay`), critics, where they are kept, as they are; both
    to the bit, whole and on the CPU of every process. Digests of them are part of the configuration of each later turn:
    if an earlier turn is trained for longer, the later ones refuse to be resumed.

    Raises:
        FewstepError: as `train` does; two turns of one name, or none.
    """
    names = [turn.name for turn in turns]
    if not turns or len(set(names)) != len(names):
        raise FewstepError(f"found turns named {names}, expected one or more different names, fix: name them apart")
    students: list[State] = []
    critic: State = {}
    for turn in turns:
        roles = turn.roles(students)
        before = {name: digest(state) for name, state in zip(names, students, strict=False)}
        if turn.keeps_critic:
            there = roles.critic_state()
            copy_tensors({name: there[name] for name in critic.keys() & there.keys()}, critic, "critic")
            before["critic"] = digest(critic)
        result = train(
            turn.method,
            roles,
            data,
            turn.options,
            Path(out) / turn.name,
            turn.hooks(roles),
            noise_shape=noise_shape,
            real=real,
            pairs=pairs,
            configuration={**(configuration or {}), "before": before},
            resume=resume,
        )
        with result.ema.applied():
            students.append(_copied(roles.student_state()))
        critic = _copied(roles.critic_state())
    return result, roles


def _copied(state: Mapping[str, Tensor]) -> State:
    return {name: whole(value).to("cpu", copy=True) for name, value in state.items()}


def digest(state: State) -> str:
    """A short fingerprint of every bit of a student."""
    hashed = blake2b(digest_size=8)
    for name in sorted(state):
        hashed.update(name.encode())
        hashed.update(state[name].contiguous().flatten().view(torch.uint8).numpy())
    return hashed.hexdigest()
