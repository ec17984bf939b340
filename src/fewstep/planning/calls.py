"""Which network calls a method makes in an iteration, told by the method itself: it is run on stand-ins."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.attention.layout import FRAMES, Layout
from fewstep.core.process import Process
from fewstep.core.streams import Streams
from fewstep.core.tensors import CONTROLS, Condition
from fewstep.methods.base import Batch, Options
from fewstep.methods.decoupled import DecoupledOptions
from fewstep.methods.self_forcing import layout_of

_SHAPE = (4,)
"""Of the stand-ins' samples: what a method calls does not depend on it, but on the frames of videos made in chunks."""


@dataclass(frozen=True)
class Call:
    """One network call."""

    role: str
    """"teacher", "student", "critic" or "discriminator" (a call of the network whose features it reads)."""
    rows: int
    graph: bool
    """Whether a backward pass follows, so that activations are kept."""
    through: bool
    """Whether gradient is wanted of its input as well."""
    layout: Layout | None = None
    """Of a causal student's call."""
    frames: int = 0
    """Of a causal student's call, those that it computes: a chunk's, or all, and twice with a clean history."""
    seen: int | None = None
    """Of a chunk's call, how many chunks it attends to beside its own; None: all chunks at once."""
    again: bool = False
    """Whether the whole call is computed again in the backward pass, so that nothing is kept until then."""


def calls_of(options: Options, process: Process, rows: int, frames: int = 0) -> dict[str, list[Call]]:
    """The calls of a critic update and of the student's update for a micro-batch of `rows`, in order.

    Those without a backward are given with all rows: along a path, some are of fewer.

    Args:
        options: of the method.
        process: the teacher's.
        rows: of a micro-batch.
        frames: latent frames of a sample, which a causal student makes in chunks.

    Raises:
        FewstepError: the method's student is causal and `frames` is no whole number of chunks.
    """
    if isinstance(options, DecoupledOptions) and options.measures:
        options = replace(options, moment_mean=1.0, moment_variance=1.0)
    method = options.build()
    shape = (1, frames, 2, 2) if method.needs.causal else _SHAPE
    roles = _StandIns(process)
    samples = torch.arange(rows)
    noise = torch.zeros(rows, *shape)
    begun = noise + 1
    if method.needs.trajectories:  # a state at each of the student's calls
        begun = begun[:, None].repeat_interleave(max(options.counts), 1)
    told = {CONTROLS: torch.zeros(rows, 1)} if getattr(options, "motion_guidance", 0) else {}
    batch = Batch(told, samples, shape, real=(noise, told), pairs=(begun, noise, told))
    draw = Streams(0).at(1, samples)
    path = method.rollout(batch, roles, draw)
    found: dict[str, list[Call]] = {}
    for phase, loss in (("critic", method.critic_loss), ("student", method.student_loss)):
        if phase == "critic" and not method.critic_updates:
            continue
        roles.calls = []
        loss(path, roles, draw.sub(phase).sub(0) if phase == "critic" else draw.sub(phase))
        found[phase] = [call if call.graph else replace(call, rows=max(call.rows, rows)) for call in roles.calls]
    return found


class _StandIns:
    """Roles of one number each, that note how they are called."""

    discriminates = True

    def __init__(self, process: Process) -> None:
        self.process, self.causal = process, _Chunks(self)
        self.calls: list[Call] = []
        self._weights = {role: nn.Parameter(torch.tensor(0.5)) for role in ("student", "critic", "discriminator")}

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name not in ("teacher", "student", "critic"):
            raise AttributeError(name)
        return lambda x, t, condition: self._call(name, x)

    def discriminator(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self._call("discriminator", x).flatten(1).mean(1, keepdim=True)

    def log_ratio(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self.discriminator(x, t, condition).flatten(1).mean(1)

    def null(self, condition: Condition) -> Condition:
        return condition

    def _call(self, role: str, x: Tensor, **chunks: Any) -> Tensor:
        through = torch.is_grad_enabled() and x.requires_grad
        graph = through or (torch.is_grad_enabled() and role in self._weights)
        self.calls.append(Call(role, len(x), graph, through, **chunks))
        return x * self._weights.get(role, 0.5)


class _Chunks:
    """How their student is called chunk by chunk (`fewstep.methods.base.CausalCalls`)."""

    def __init__(self, roles: _StandIns) -> None:
        self._roles = roles

    def memory(self, student: Any, layout: Layout, condition: Condition) -> _Memory:
        return _Memory(self._roles, layout_of(layout) or layout, getattr(layout, "recompute", False))

    def parallel(
        self, student: Any, layout: Layout, x: Tensor, t: Tensor, condition: Condition, clean: Tensor | None = None
    ) -> Tensor:
        frames = x.shape[FRAMES] * (1 if clean is None else 2)
        return self._roles._call("student", x, layout=layout_of(layout), frames=frames)


class _Memory:
    """A memory that only counts its chunks."""

    def __init__(self, roles: _StandIns, layout: Layout, recompute: bool) -> None:
        self._roles, self._layout, self._recompute, self._finished = roles, layout, recompute, 0

    def denoise(self, x: Tensor, t: Tensor) -> Tensor:
        seen, again = self._layout.seen_by_calls(self._finished), self._recompute and torch.is_grad_enabled()
        return self._roles._call("student", x, layout=self._layout, frames=x.shape[FRAMES], seen=seen, again=again)

    @torch.no_grad()
    def remember(self, x: Tensor) -> None:
        if self._layout.kept == "clean" or (self._layout.sink and not self._finished):
            self.denoise(x, torch.zeros(len(x)))
        self._finished += 1

    def snapshot(self) -> _Memory:
        return copy(self)
