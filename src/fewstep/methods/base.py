"""What a method is, what it is given, and what it returns.

A method is a pair of losses over one trajectory of the student. It owns no optimiser, device, rank, file or model name;
the trainer owns all of these and knows methods only through the protocols of this file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from fewstep.attention.layout import Layout
from fewstep.core.guidance import Denoiser
from fewstep.core.process import Process
from fewstep.core.rollout import Path
from fewstep.core.streams import Draw
from fewstep.core.tensors import Condition
from fewstep.errors import FewstepError
from fewstep.streaming.rollout import Memory

STEPS = "steps"
"""Condition key of the step count K: (B,) floats. Read by steps-aware students and critics, ignored by teachers."""

ChainNoise = Literal["fresh", "fixed"]
"""What the new noise of a step is, where a student keeps less than all of its own: its own, or that of the start."""

LANDING = "landing"
"""Condition key of the time of the landing point a critic is asked about: (B,) floats in [0, 1)."""


@dataclass(frozen=True)
class Loss:
    """One value per sample and what to log about them."""

    values: Tensor
    """(B,), with gradient; the trainer averages them."""
    metrics: dict[str, Tensor] = field(default_factory=dict)
    """Detached scalars by name."""
    pulls: tuple[tuple[Tensor, Tensor], ...] = ()
    """Of a student's loss: its denoised samples (B, ...), with gradient, and where the method means them to go. The
    trainer compares that with the gradient that comes back, for which no network is asked."""


@dataclass(frozen=True)
class Batch:
    """What an iteration starts from: no pixels, only conditions and which samples they are."""

    condition: Condition
    """Tensors with B rows; may be empty for unconditional teachers."""
    samples: Tensor
    """(B,) long, global sample indices: all randomness of a sample follows from them."""
    noise_shape: tuple[int, ...]
    """Shape of one sample, without the batch axis."""
    dtype: torch.dtype = torch.float32
    """Of the student's path. Its device is that of `samples`."""
    real: tuple[Tensor, Condition] | None = None
    """Clean samples of the data with their own conditions, B rows each, for methods that need them."""
    pairs: tuple[Tensor, Tensor, Condition] | None = None
    """Standard normal noise, what the teacher's sampler made of it, and the conditions, for methods that need them.

    For methods that need trajectories, the first is (B, K, ...): the states at the student's times."""


@dataclass(frozen=True)
class Needs:
    """What a method cannot run without; the trainer says at start, in a sentence, what is missing."""

    critic: bool = False
    discriminator: bool = False
    features: Literal["critic", "teacher"] = "critic"
    """Whose features the discriminator reads in the method's paper, where it needs one."""
    real_data: bool = False
    pairs: bool = False
    """Noise with the teacher's own samples from it."""
    trajectories: bool = False
    """In the place of the noise of `pairs`: where the teacher's path from it is at the student's K times."""
    causal: bool = False
    """A student that can be called chunk by chunk."""
    steps_condition: bool = False
    """Student and critic must read the condition "steps"."""
    landing_condition: bool = False
    """The critic must read the condition "landing"."""


class CausalCalls(Protocol):
    """How a student is called that makes videos (B, C, F, ...) chunk by chunk; see `fewstep.attention.CausalSeat`."""

    def memory(self, student: Denoiser, layout: Layout, condition: Condition) -> Memory:
        """An empty memory; `student` is that of the roles."""
        ...

    def parallel(
        self,
        student: Denoiser,
        layout: Layout,
        x: Tensor,
        t: Tensor,
        condition: Condition,
        clean: Tensor | None = None,
    ) -> Tensor:
        """All chunks at once at times `t` (B, F), with noisy or `clean` history, as a denoised video."""
        ...


class Roles(Protocol):
    """The three networks as denoisers, however they share weights."""

    process: Process

    def teacher(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor: ...

    def student(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor: ...

    def critic(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor: ...

    def null(self, condition: Condition) -> Condition:
        """The condition of the empty prompt, for the same batch."""
        ...

    def discriminator(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Logits (B, heads) that noised x is data and not the student's; for methods that need it."""
        ...

    def log_ratio(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """log p/q (B,), law of the data over the student's, at noised x: the discriminator's mean logit."""
        ...


class WithoutCritic:
    """What a method says that trains no critic; the trainer then never asks for its critic's loss."""

    @property
    def critic_updates(self) -> int:
        """None."""
        return 0

    def critic_loss(self, path: Path, roles: Roles, draw: Draw) -> Loss:
        raise NotImplementedError("there is no critic")


class Method(Protocol):
    """One published method with its options: a rollout and two losses over it."""

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]

    @property
    def options(self) -> Options:
        """What it was built from: part of a run's identity when it is resumed."""
        ...

    @property
    def needs(self) -> Needs: ...

    @property
    def critic_updates(self) -> int:
        """Critic updates per student update."""
        ...

    def forwards(self, steps: int | None = None) -> float:
        """Expected network forwards per sample and iteration, guided ones counting 2.

        `steps` None: the mean over the step counts of the options.
        """
        ...

    def rollout(self, batch: Batch, roles: Roles, draw: Draw) -> Path:
        """The student's trajectory of this iteration, computed as far as the losses below ask for it."""
        ...

    def critic_loss(self, path: Path, roles: Roles, draw: Draw) -> Loss:
        """Gradient to the critic only. Give each of several updates its own `draw.sub(update)`."""
        ...

    def student_loss(self, path: Path, roles: Roles, draw: Draw) -> Loss:
        """Gradient to the student only."""
        ...


class Options(Protocol):
    """Settings of a method: a dataclass that checks itself and builds the method."""

    @property
    def eta(self) -> float:
        """Share of its own noise that a step of the student keeps when it samples."""
        ...

    @property
    def chain_noise(self) -> ChainNoise:
        """What the rest of a step's noise is when it samples."""
        ...

    @property
    def counts(self) -> tuple[int, ...]:
        """The step counts that the student is trained for."""
        ...

    def time_grid(self, steps: int) -> Tensor:
        """The K+1 times of a student with `steps` calls, float64."""
        ...

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def validate(self) -> None:
        """Raises FewstepError for a value out of range or a contradiction."""
        ...

    def build(self) -> Method: ...


def causal_calls(roles: Roles) -> CausalCalls:
    """`roles.causal`, how the student is called chunk by chunk.

    Raises:
        FewstepError: the roles have none.
    """
    found: CausalCalls | None = getattr(roles, "causal", None)
    if found is None:
        raise FewstepError(
            "found roles whose student makes whole samples, expected one that makes videos chunk by chunk, "
            "fix: build_roles(..., causal=True)"
        )
    return found


def mean_loss(losses: Sequence[Loss]) -> Loss:
    """The mean of several losses of one batch, values and metrics alike."""
    values = torch.stack([loss.values for loss in losses]).mean(0)
    metrics = {name: torch.stack([loss.metrics[name] for loss in losses]).mean() for name in losses[0].metrics}
    return Loss(values, metrics, tuple(pull for loss in losses for pull in loss.pulls))


def spread_metrics(denoised: Tensor) -> dict[str, Tensor]:
    """Mean and standard deviation of all elements: a growing spread means saturation, a falling one blur."""
    values = denoised.detach().float()
    return {"denoised_mean": values.mean(), "denoised_std": values.std()}


def agreement_metrics(denoised: Tensor, real: Tensor, fake: Tensor) -> dict[str, Tensor]:
    """How far teacher and critic agree about the student's samples, each seen from the student's own `denoised`.

    - real_fake_cosine: mean cosine between real - denoised and fake - denoised. Near 1 is healthy; a falling value
      means that the student leaves the teacher's law or that the critic lags.
    - real_fake_gap: rms of real - fake over rms of real - denoised. Falls towards 0 as the laws meet.
    - direction: mean |real - fake|, in units of the data.
    - critic_lag: rms of fake - denoised over rms of real - denoised, a geometric mean over the samples. A critic that
      knows the student's law predicts its samples better than the teacher does, and stays about or below 1.

    With them those of `contrast_metrics`.
    """
    real, fake, denoised = (part.detach().float().flatten(1) for part in (real, fake, denoised))
    cosine = torch.cosine_similarity(real - denoised, fake - denoised, dim=1)
    gap = (real - fake).square().mean().sqrt() / (real - denoised).square().mean().sqrt().clamp(min=1e-12)
    return {
        "real_fake_cosine": cosine.mean(),
        "real_fake_gap": gap,
        "direction": (real - fake).abs().mean(),
        "critic_lag": _mean_ratio(fake - denoised, real - denoised),
        **contrast_metrics(denoised, real, fake),
    }


def contrast_metrics(denoised: Tensor, real: Tensor, fake: Tensor) -> dict[str, Tensor]:
    """The student's contrast against the teacher's, asked about the same noised samples of the same prompts.

    Teacher and critic each answer with the mean of their law there, so that their answers can be compared at any noise
    level, where the student's own sample, which is no mean, cannot.

    - contrast: rms of `fake` over that of `real`, a geometric mean over the samples, as single ones are far off near
      pure noise. Above 1: saturation; below: blur.
    - mean_shift: mean of `fake` less that of `real`, in rms of `real`.
    - clipped: share of elements of `denoised` beyond the largest of the teacher's answer to the same sample.
    """
    real, fake, denoised = (part.detach().float().flatten(1) for part in (real, fake, denoised))
    bound = real.abs().amax(1, keepdim=True)
    return {
        "contrast": _mean_ratio(fake, real),
        "mean_shift": ((fake - real).mean(1) / _rms(real)).mean(),
        "clipped": (denoised.abs() > bound).float().mean(),
    }


def _mean_ratio(a: Tensor, b: Tensor) -> Tensor:
    """Geometric mean over the samples of rms(a) / rms(b); both (B, d)."""
    return (_rms(a) / _rms(b)).log().mean().exp()


def _rms(x: Tensor) -> Tensor:
    return x.square().mean(1).sqrt().clamp(min=1e-12)


def guidance_metrics(told: Tensor, untold: Tensor) -> dict[str, Tensor]:
    """guidance_gap: rms of what the prompt changes in the teacher's answer, over rms of the answer; 0: nothing."""
    return {"guidance_gap": _relative_change(told, untold)}


def motion_metrics(told: Tensor, untold: Tensor) -> dict[str, Tensor]:
    """motion_gap: likewise of what tracks and drives change."""
    return {"motion_gap": _relative_change(told, untold)}


def _relative_change(told: Tensor, untold: Tensor) -> Tensor:
    told, untold = told.detach().float(), untold.detach().float()
    return (told - untold).square().mean().sqrt() / told.square().mean().sqrt().clamp(min=1e-12)
