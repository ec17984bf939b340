"""How a causal student begins: it imitates the bidirectional teacher, chunk by chunk (CausVid, arXiv 2412.07772).

A copy of the teacher has never been called with half a video. Before it can be trained on what it makes itself, it
learns to denoise chunks that do not see the future. No critic, no rollout: all chunks of a video are noised at times of
their own, drawn from the student's, and denoised in one forward. Two sources of clean videos and two histories:

- `trajectories` of the teacher (card self_forcing.md, eq. 4): the states of its sampler at the student's times, from
  the same noise as the clean end, so that one call learns to jump along the teacher's own path; or real `data`;
- `noisy` history, chunks see each other as they are noised (CausVid); or `clean` (teacher forcing), what a rollout with
  a memory computes, at twice the tokens.

Published: trajectories with noisy history; 1,000 to 16,000 of them, 3,000 updates. Regression to a bidirectional
teacher has no exact solution for a causal student (one history, several futures): what it learns is blurred where the
future is open. That is what distribution matching then repairs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from fewstep.attention.layout import FRAMES, Layout
from fewstep.core import grids
from fewstep.core.rollout import Path
from fewstep.core.streams import Draw
from fewstep.core.tensors import at_least_float32, flat_mean
from fewstep.errors import FewstepError
from fewstep.methods.base import Batch, ChainNoise, Loss, Needs, Roles, WithoutCritic, causal_calls, spread_metrics
from fewstep.methods.matching_options import require
from fewstep.streaming.forced import noised
from fewstep.unread import refuse_unread

Source = Literal["trajectories", "data"]
Context = Literal["noisy", "clean"]


@dataclass(frozen=True)
class CausalInitOptions(Layout):
    """Settings of the causal initialisation. Times are in [0, 1]: data at 0, noise at 1."""

    steps: int = 4
    """Network calls K of the student, 1 or more."""
    shift: float = 5.0
    """Shift of its time grid, above 0; 1 is uniform."""
    start_time: float = 1.0
    """Time of its first call, in (0, 1]; pure noise is taken for the law there."""
    grid: tuple[float, ...] = ()
    """Times of its K calls, falling, within (0, 1], instead of the shifted grid."""
    eta: float = 0.0
    """Share of its own noise that a step keeps when it samples, in [0, 1]; not looked at in training."""
    source: Source = "trajectories"
    """What is imitated: `trajectories` of the teacher's sampler, or noised real `data`."""
    history: Context = "noisy"
    """What a chunk sees: the others as they are noised (CausVid), or `clean` (teacher forcing)."""
    vary_memory: bool = False
    """Every iteration has a sink of 0 to 2 chunks and a window of 1 or more, drawn at random, so that one student can
    begin runs of any memory (MotionStream); `sink` and `window` are then those that it is saved with."""
    path_steps: int = 48
    """Calls of the teacher's sampler along a trajectory, a multiple of the steps (released: 48)."""
    guidance_scale: float = 6.0
    """Guidance of the teacher along trajectories, 0 or more, 1 = none (released: 6)."""
    motion_guidance: float = 0.0
    """Likewise of tracks and drives, 0 or more, 0 = none (MotionStream: 1.5 with text at 3); prompts have to come with
    them."""

    @property
    def chain_noise(self) -> ChainNoise:
        """New noise at every step."""
        return "fresh"

    @property
    def counts(self) -> tuple[int, ...]:
        """The step count of the student."""
        return (self.steps,)

    def time_grid(self, steps: int) -> Tensor:
        """The K+1 times of a student with `steps` calls, float64."""
        return grids.explicit(self.grid) if self.grid else grids.shifted(steps, self.shift, self.start_time)

    @property
    def path_grid(self) -> Tensor:
        """The times of the teacher's sampler, float64: between two of the student's, equal steps in un-shifted time."""
        student, between = self.time_grid(self.steps), self.path_steps // self.steps
        u = grids.unshift_time(student, self.shift)
        shares = torch.arange(between, dtype=torch.float64) / between
        inner = grids.shift_time(torch.lerp(u[:-1, None], u[1:, None], shares), self.shift)
        inner[:, 0] = student[:-1]
        return grids.validated(torch.cat([inner.flatten(), student[-1:]]))

    def build(self) -> CausalInit:
        """The method with these settings."""
        return CausalInit(self)

    def validate(self) -> None:
        super().validate()
        self.validate_unread()
        require(self.steps >= 1, "steps", self.steps, "1 or more", "use 4")
        require(self.shift > 0, "shift", self.shift, "a number above 0", "1 means none")
        require(
            0 < self.start_time <= 1, "start_time", self.start_time, "a time in (0, 1]", "1 is the last noise level"
        )
        fits = len(self.grid) in (0, self.steps)
        require(fits, "grid", self.grid, f"a time for each of the {self.steps} steps", "use shift instead of a grid")
        require(0 <= self.eta <= 1, "eta", self.eta, "a number in [0, 1]", "0 is new noise at every step")
        require(self.source in get_args(Source), "source", self.source, f"one of {get_args(Source)}", "choose one")
        require(self.history in get_args(Context), "history", self.history, f"one of {get_args(Context)}", "choose one")
        whole = self.path_steps >= self.steps and self.path_steps % self.steps == 0
        require(whole, "path_steps", self.path_steps, f"a multiple of steps {self.steps}", "use 48")
        require(self.guidance_scale >= 0, "guidance_scale", self.guidance_scale, "0 or more", "1 means none")
        require(self.kept == "clean", "kept", self.kept, "clean, as all chunks are in parallel", "see history")
        require(self.motion_guidance >= 0, "motion_guidance", self.motion_guidance, "0 or more", "0 means none")
        require(self.sink_decay == 1, "sink_decay", self.sink_decay, "1, as all chunks are in parallel", "use 1")
        if self.grid:
            refuse_unread(self, ["start_time"], "a grid that begins there")
        if self.source == "data":
            refuse_unread(self, ["path_steps", "guidance_scale", "motion_guidance"], "source 'trajectories'")


class CausalInit(WithoutCritic):
    """Imitation of the teacher by a causal student; see the module and `CausalInitOptions`."""

    name: ClassVar[str] = "causal-init"
    title: ClassVar[str] = "Causal initialisation"
    paper: ClassVar[str] = "arXiv 2412.07772"

    def __init__(self, options: CausalInitOptions) -> None:
        options.validate()
        self.options = options

    @property
    def needs(self) -> Needs:
        own = self.options.source == "trajectories"
        return Needs(pairs=own, trajectories=own, real_data=not own, causal=True)

    def forwards(self, steps: int | None = None) -> float:
        """Forwards of whole videos per sample and iteration, without those of the trajectories, which are kept."""
        return 1 + float(self.options.history == "clean")

    def rollout(self, batch: Batch, roles: Roles, draw: Draw) -> Path:
        """Nothing is rolled out: a path that holds what the batch has."""
        o = self.options
        found = batch.pairs if o.source == "trajectories" else batch.real
        if found is None:
            raise FewstepError(
                f"found a batch without {o.source}, expected some, fix: fill Batch.pairs (trajectories) or Batch.real "
                "(data)"
            )
        states = found[0]
        if o.source == "trajectories" and states.shape[1] != o.steps:
            raise FewstepError(
                f"found trajectories of {states.shape[1]} states, expected one at each of the {o.steps} calls of the "
                "student, fix: fewstep.data.pairs.TeacherTrajectories with its grid"
            )
        noise = states[:, 0] if o.source == "trajectories" else states
        path = Path(roles.student, noise, o.time_grid(o.steps), roles.process, found[-1])
        path.pairs, path.real = batch.pairs, batch.real
        return path

    def student_loss(self, path: Path, roles: Roles, draw: Draw) -> Loss:
        """Eq. 4: E |student(chunks at times of their own) - clean|^2, a mean over the elements."""
        o, seat = self.options, causal_calls(roles)
        x, t, clean = self._noised(path, draw)
        history = clean if o.history == "clean" else None
        layout = drawn_memory(o, x.shape[FRAMES], draw) if o.vary_memory else o
        denoised = seat.parallel(roles.student, layout, x, t, path.condition, history)
        values = flat_mean((denoised - clean).square())
        distance = values.detach().mean() / clean.square().mean()
        return Loss(values, {"student_loss": values.detach().mean(), "relative": distance} | spread_metrics(denoised))

    @torch.no_grad()
    def _noised(self, path: Path, draw: Draw) -> tuple[Tensor, Tensor, Tensor]:
        """Videos (B, C, F, ...) noised chunk by chunk, their frames' times (B, F), and the clean ones."""
        o = self.options
        source: Any = path.pairs if o.source == "trajectories" else path.real
        clean: Tensor = source[-2]
        chunks = o.chunks(clean.shape[FRAMES])
        called = torch.stack([draw.integers(f"call {chunk}", o.steps) for chunk in range(chunks)], 1)  # (B, L)
        called = called.repeat_interleave(o.chunk, 1)
        t = o.time_grid(o.steps)[called].to(clean.device, at_least_float32(clean.dtype))
        if o.source == "data":
            noise = draw.normal("noise", clean.shape[1:], clean.dtype, clean.device)
            return noised(path.process, clean, t, noise), t, clean
        by_frame = source[0].movedim(FRAMES + 1, 2)  # (B, K, F, C, ...)
        rows = torch.arange(len(clean))[:, None]
        x = by_frame[rows, called, torch.arange(called.shape[1])[None]]  # (B, F, C, ...)
        return x.movedim(1, FRAMES), t, clean


def drawn_memory(layout: Layout, frames: int, draw: Draw) -> Layout:
    """The layout with a sink of 0 to 2 chunks and a window of 1 up to all of them; the same in all processes."""
    sink, window = int(3 * draw.common("sink")), 1 + int(layout.chunks(frames) * draw.common("window"))
    return replace(layout, sink=sink, window=window)


def causal_init() -> CausalInitOptions:
    """Trajectories of the guided teacher, noisy history (CausVid and Self Forcing)."""
    return CausalInitOptions()


def teacher_forcing() -> CausalInitOptions:
    """Real videos with clean history."""
    return CausalInitOptions(source="data", history="clean")
