"""Self Forcing: a causal video student is trained on what it makes itself (Huang et al., arXiv 2506.08009).

The student makes a video chunk by chunk, each chunk with its own finished chunks as history, in training as when it is
used. One loss compares the whole video with the bidirectional teacher's law. It is affordable because every chunk stops
at one drawn step, which alone carries gradient, and because the memory of finished chunks is a constant. Section and
equation numbers are those of the card `self_forcing.md`.

The loss is any of distribution matching: here DMD (with the options of DMD2: divergence, guidance apart, a GAN beside
it or alone) and SiD. `CausalRollout` makes others causal in the same way. With `history="data"` the student instead
sees noised data, all chunks in parallel: CausVid's second stage (arXiv 2412.07772).

How it differs from the release: critic and student look at one rollout of an iteration (theirs make their own), which
the student's update walks again only where it carries gradient; times of teacher and critic end within a margin (theirs
are clamped to 20..980); a guidance of w is 1 + theirs.

Needs a causal student, best one that was prepared by `causal-init`, and a critic. At K = 4, guided, with five critic
updates it costs 12.5 expected forwards of whole videos per sample and iteration.

Signs of failure: `denoised_std` grows chunk by chunk and colours drift (no sink, or a window unlike that of training);
motion dies (too much sink); noise after some hundred iterations (small batches: the authors' is 64).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from fewstep.attention.layout import FRAMES, Layout
from fewstep.core.rollout import DrawnPath, Landing
from fewstep.core.streams import Draw
from fewstep.losses.critic import CriticWeight
from fewstep.methods.base import Batch, Loss, Needs, Roles, causal_calls
from fewstep.methods.dmd2 import DMD2, DMD2Options
from fewstep.methods.matching import Pull, Query
from fewstep.methods.matching_options import contradiction, require
from fewstep.methods.sid import SiD, SiDOptions
from fewstep.methods.tau import TauLaw
from fewstep.streaming.forced import ForcedPath
from fewstep.streaming.rollout import CausalPath
from fewstep.unread import refuse_unread

History = Literal["own", "data"]


@dataclass(frozen=True)
class CausalOptions(Layout):
    """What causal methods have beside the options of their matching: to be named before those in a class's bases."""

    history: History = "own"
    """What a chunk sees in training: the student's `own` finished chunks (Self Forcing), or those of noised `data`, all
    chunks in parallel (CausVid's second stage); the second needs real data."""
    recompute: bool = False
    """Whether the call of a chunk that carries gradient is computed again in the backward pass, chunk by chunk: the
    memory of one chunk instead of all, for one more forward of each; gradients stay (Live Avatar, algorithm 2)."""

    def validate(self) -> None:
        super().validate()
        self.validate_unread()
        require(self.history in get_args(History), "history", self.history, f"{get_args(History)}", "choose one")
        there = {entry.name for entry in fields(self)}
        beside = "a student that makes whole samples, not a causal one,"
        refuse_unread(self, [name for name in _UNREAD if name in there], beside)
        if self.history == "data":
            refuse_unread(self, ["recompute"], "history 'own'")
        if self.history == "data" and self.kept != "clean":
            raise contradiction(
                f"kept {self.kept!r} with history 'data'",
                "'clean' where chunks are in parallel, since there are no calls to keep",
                "set kept to 'clean', or history to 'own'",
            )
        if self.history == "data" and self.sink_decay < 1:
            raise contradiction(
                f"sink_decay {self.sink_decay} with history 'data'",
                "1 where chunks are in parallel, since a blended sink is made chunk by chunk",
                "set sink_decay to 1",
            )
        of_matching: Any = super(Layout, self)
        of_matching.validate()


_UNREAD = ("step_counts", "steps_condition", "regression_weight", "critic_call_condition", "chain_noise")


@dataclass(frozen=True)
class SelfForcingOptions(CausalOptions, DMD2Options):
    """Settings of Self Forcing with DMD's loss: those of DMD2 and of the chunks, with its own defaults."""

    shift: float = 5.0
    """Shift of the time grid and of un-shifted time, above 0 (released: 5; times 1, 0.9375, 0.833, 0.625)."""
    tau_law: TauLaw = "uniform_unshifted"
    """Uniform before the shift, as released."""
    guidance_scale: float = 4.0
    """Guidance of the teacher, 0 or more, 1 = none (released: 3.0 on top of the conditional answer, which is 4)."""
    critic_weight: CriticWeight = "inverse_sigma"
    """Weight of the critic's squared x0 error: `inverse_sigma`, the error of velocity (released)."""
    gan_weight: float = 0.0
    """Weight of the student's adversarial loss, 0 or more; above 0 it needs real data."""
    matching_weight: float = 1.0
    """Weight of distribution matching, 0 or more; 0 leaves the GAN alone (Self Forcing's GAN)."""

    def build(self) -> SelfForcing:
        """The method with these settings."""
        return SelfForcing(self)

    def validate(self) -> None:
        super().validate()
        require(self.matching_weight >= 0, "matching_weight", self.matching_weight, "0 or more", "use 1")
        if self.matching_weight == 0 and self.gan_weight == 0:
            raise contradiction("matching_weight 0 with gan_weight 0", "a loss", "set gan_weight to 1")
        if self.matching_weight == 0:
            refuse_unread(self, _OF_MATCHING, "a matching_weight above 0")


_OF_MATCHING = ["guidance_scale", "motion_guidance", "guidance", "guidance_levels", "joint_normaliser", "normaliser"]
_OF_MATCHING += ["metric", "huber_c", "divergence", "ratio_clip", "ratio_bins"]


@dataclass(frozen=True)
class SelfForcingSiDOptions(CausalOptions, SiDOptions):
    """Settings of Self Forcing with SiD's loss (card eq. 7): those of SiD and of the chunks."""

    shift: float = 5.0
    """Shift of the time grid and of un-shifted time, above 0 (released: 5)."""
    tau_law: TauLaw = "uniform_unshifted"
    """Uniform before the shift, as released."""
    guidance_scale: float = 4.0
    """Guidance of the teacher, 0 or more, 1 = none (released: 3.0 on top of the conditional answer, which is 4)."""
    critic_updates: int = 5
    """Critic updates per student update, 1 or more (released: 5)."""

    def build(self) -> SelfForcingSiD:
        """The method with these settings."""
        return SelfForcingSiD(self)


class CausalRollout:
    """What makes a method of distribution matching causal: to be named before it in a class's bases.

    All of its losses then see the student's video as a path of one call that lands on clean data.
    """

    options: Any

    @property
    def needs(self) -> Needs:
        found: Needs = super().needs  # type: ignore[misc]
        return replace(found, causal=True, real_data=found.real_data or self.options.history == "data")

    def forwards(self, steps: int | None = None) -> float:
        """Expected forwards of whole videos per sample and iteration; reading finished chunks again counts one."""
        o = self.options
        reads = (o.kept == "clean") + o.recompute  # a noisy cache's one chunk of sink is not counted
        rollout = 1 if o.history == "data" else (o.steps + 1) / 2 + reads
        return rollout + float(self._forwards_of_losses())  # type: ignore[attr-defined]

    def rollout(self, batch: Batch, roles: Roles, draw: Draw) -> DrawnPath:
        """The student's video of this iteration, made when it is first asked for."""
        o, calls = self.options, causal_calls(roles)
        self._require_data(batch)  # type: ignore[attr-defined]
        chunks, device = o.chunks(batch.noise_shape[FRAMES - 1]), batch.samples.device
        grid = o.time_grid(o.steps)
        path: DrawnPath
        if o.history == "own":
            shape = (batch.noise_shape[0], o.chunk, *batch.noise_shape[FRAMES:])
            memory = calls.memory(roles.student, o, batch.condition)
            noise = lambda chunk, k: draw.normal(f"chunk {chunk}, {k}", shape, batch.dtype, device)
            exit_call = int(draw.common("exit") * o.steps)
            path = CausalPath(
                memory, noise, chunks, grid, roles.process, batch.condition, exit_call, o.eta, o.recompute
            )
        else:
            assert batch.real is not None  # see `needs`
            clean, condition = batch.real
            called = torch.stack([draw.integers(f"call {chunk}", o.steps) for chunk in range(chunks)], 1)
            t = grid[called].repeat_interleave(o.chunk, 1)
            noise_of_data = draw.normal("noise", clean.shape[1:], batch.dtype, device)
            denoise = lambda student, x, t, told: calls.parallel(student, o, x, t, told)
            path = ForcedPath(denoise, roles.student, clean, t, noise_of_data, roles.process, condition)
        path.real = batch.real
        return path


class SelfForcing(CausalRollout, DMD2):
    """Distribution matching of the student's own videos; see the module and `SelfForcingOptions`."""

    name: ClassVar[str] = "self-forcing"
    title: ClassVar[str] = "Self Forcing"
    paper: ClassVar[str] = "arXiv 2506.08009"

    def _student_loss(self, path: Any, roles: Roles, call: Tensor, draw: Draw) -> Loss:
        loss = super()._student_loss(path, roles, call, draw)
        pulls = loss.pulls if self.options.matching_weight else ()  # a discriminator alone says no direction
        return Loss(loss.values, loss.metrics | chunk_metrics(path), pulls)

    @torch.no_grad()
    def _pulls(
        self, roles: Roles, landing: Landing, query: Query, draw: Draw
    ) -> tuple[list[Pull], dict[str, Tensor], Tensor]:
        weight = self.options.matching_weight
        if weight == 0:
            nothing, nowhere = torch.zeros_like(query.tau), torch.zeros_like(landing.denoised)
            return [Pull(nowhere, query, nothing + 1, nothing)], {}, nowhere
        pulls, metrics, toward = super()._pulls(roles, landing, query, draw)
        return [replace(pull, weight=weight * pull.weight) for pull in pulls], metrics, toward


class SelfForcingSiD(CausalRollout, SiD):
    """Score identity distillation of the student's own videos; see the module and `SelfForcingSiDOptions`."""

    name: ClassVar[str] = "self-forcing-sid"
    title: ClassVar[str] = "Self Forcing with score identity distillation"
    paper: ClassVar[str] = "arXiv 2506.08009"


def chunk_metrics(path: DrawnPath) -> dict[str, Tensor]:
    """The call that videos stopped at, and how the spread of their last chunk compares with the first: drift."""
    if not isinstance(path, CausalPath):
        return {}
    first, last = path.first_and_last
    return {
        "exit_call": first.new_full((), path.exit_call, dtype=torch.float32),
        "last_over_first_std": last.float().std() / first.float().std(),
    }


def self_forcing() -> SelfForcingOptions:
    """DMD on the student's own videos, in chunks of 3 latent frames that remember all (published)."""
    return SelfForcingOptions()


def self_forcing_sid() -> SelfForcingSiDOptions:
    """SiD on the student's own videos (published)."""
    return SelfForcingSiDOptions(normaliser="dmd", weight="one")


def self_forcing_gan() -> SelfForcingOptions:
    """A GAN alone on the student's own videos (published); needs real videos."""
    return SelfForcingOptions(matching_weight=0.0, gan_weight=1.0)


def causvid() -> SelfForcingOptions:
    """CausVid's second stage: DMD with noised real videos as history (there with shift 8, for Wan)."""
    return SelfForcingOptions(history="data")


def layout_of(options: Any) -> Layout | None:
    """The chunks of a causal method's options, without the rest; None for other methods."""
    if not isinstance(options, Layout):
        return None
    return Layout(**{field.name: getattr(options, field.name) for field in fields(Layout)})
