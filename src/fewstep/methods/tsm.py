"""Teacher score matching: regression to the teacher's denoised prediction (MSD, Song et al., arXiv 2410.23274).

A student of another architecture cannot begin as a copy of the teacher. It first learns to denoise as the teacher does,
at all noise levels, with no critic and no adversary; then any method of distribution matching goes on from there. On
exact teachers its gradient is that of denoising score matching with less variance (card `msd.md`, section 8, item 4).

The noised samples are either those of data, as in the paper, or points of the teacher's own sampling paths, for which
no data are needed. On data an update costs two forwards, on paths half of `path_steps` more; the teacher's count twice
if guided. Not a few-step method: what it makes samples in many steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from fewstep.core import grids
from fewstep.core.guidance import guided
from fewstep.core.renoise import renoise
from fewstep.core.rollout import Path
from fewstep.core.streams import Draw
from fewstep.core.tensors import Condition, at_least_float32, flat_mean
from fewstep.errors import FewstepError
from fewstep.losses.critic import CriticWeight, critic_weight
from fewstep.methods.base import Batch, ChainNoise, Loss, Needs, Roles, WithoutCritic, contrast_metrics, spread_metrics
from fewstep.methods.matching_options import MOST, require, require_finite
from fewstep.unread import refuse_unread

Points = Literal["path", "data"]


@dataclass(frozen=True)
class TSMOptions:
    """Settings of teacher score matching. Times are in [0, 1]: data at 0, noise at 1."""

    steps: int = 4
    """Network calls that the saved student is sampled with, 1 or more; training covers all times."""
    shift: float = 1.0
    """Shift of that time grid, and of the times at which the student learns, above 0; 1 is uniform."""
    points: Points = "path"
    """Where the student learns: on the teacher's sampling `path`s, or on noised `data` (paper)."""
    path_steps: int = 8
    """Calls of the teacher's sampler on paths, 1 or more. Ours."""
    guidance_scale: float = 1.0
    """Guidance of the teacher that is imitated, 0 or more, 1 = none (paper: none is mentioned)."""
    weight: CriticWeight = "min_snr"
    """Weight of the squared x0 error: `min_snr`, `inverse_sigma` (the error of velocity), `snr` (of eps), or `one`."""
    snr_cap: float = 5.0
    """Cap of min_snr, above 0."""
    tau_min: float = 0.02
    """Lowest time, in (0, 1)."""

    @property
    def eta(self) -> float:
        """The saved student is sampled without fresh noise."""
        return 1.0

    @property
    def chain_noise(self) -> ChainNoise:
        """There is none."""
        return "fresh"

    @property
    def counts(self) -> tuple[int, ...]:
        """The step count of the saved student."""
        return (self.steps,)

    def time_grid(self, steps: int) -> Tensor:
        """The K+1 times of a student with `steps` calls, float64."""
        return grids.shifted(steps, self.shift)

    def build(self) -> TSM:
        """The method with these settings."""
        return TSM(self)

    def validate(self) -> None:
        for name, allowed in (("points", get_args(Points)), ("weight", get_args(CriticWeight))):
            found = getattr(self, name)
            require(found in allowed, name, repr(found), f"one of {allowed}", "choose one of them")
        require_finite(self)
        for name in ("steps", "path_steps"):
            good = 1 <= getattr(self, name) <= MOST
            require(good, name, getattr(self, name), f"1 to {MOST}", "leave it at its default")
        for name in ("shift", "snr_cap"):
            require(getattr(self, name) > 0, name, getattr(self, name), "a number above 0", "leave it at its default")
        require(self.guidance_scale >= 0, "guidance_scale", self.guidance_scale, "0 or more", "1 means none")
        require(0 < self.tau_min < 1, "tau_min", self.tau_min, "a time in (0, 1)", "use 0.02")
        if self.points == "data":
            refuse_unread(self, ["path_steps"], "points 'path'")
        if self.weight != "min_snr":
            refuse_unread(self, ["snr_cap"], "weight 'min_snr'")


class TSM(WithoutCritic):
    """Teacher score matching with the given options; see `TSMOptions` for every setting."""

    name: ClassVar[str] = "tsm"
    title: ClassVar[str] = "Teacher Score Matching"
    paper: ClassVar[str] = "arXiv 2410.23274"

    def __init__(self, options: TSMOptions) -> None:
        options.validate()
        self.options = options

    @property
    def needs(self) -> Needs:
        return Needs(real_data=self.options.points == "data")

    def forwards(self, steps: int | None = None) -> float:
        """Expected network forwards per sample and iteration; a guided call counts 2."""
        o = self.options
        calls = 1 + (o.path_steps + 1) / 2 * (o.points == "path")
        return 1 + calls * (1 if o.guidance_scale == 1 else 2)

    def rollout(self, batch: Batch, roles: Roles, draw: Draw) -> Path:
        """The teacher's sampling path, walked as far as asked; on data, nothing of it is."""
        o, device = self.options, batch.samples.device
        if o.points == "data" and batch.real is None:
            raise FewstepError("found a batch without real data, expected some, fix: fill Batch.real, or points 'path'")

        def teacher(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
            return guided(roles.teacher, x, t, condition, roles.null(condition), o.guidance_scale)

        noise = draw.normal("noise", batch.noise_shape, batch.dtype, device)
        path = Path(teacher, noise, grids.shifted(o.path_steps, o.shift), roles.process, batch.condition)
        path.real = batch.real
        return path

    def student_loss(self, path: Path, roles: Roles, draw: Draw) -> Loss:
        """E lambda_t |student(x_t, t) - teacher(x_t, t)|^2 (card, section 2)."""
        o = self.options
        x, t, condition = self._point(path, draw)
        with torch.no_grad():
            target = guided(roles.teacher, x, t, condition, roles.null(condition), o.guidance_scale)
        denoised = roles.student(x, t, condition)
        weight = critic_weight(o.weight, roles.process, torch.zeros_like(t), t, o.snr_cap)
        values = weight * flat_mean((denoised - target).square())
        distance = flat_mean((denoised - target).square()).mean() / flat_mean(target.square()).mean()
        metrics = {"student_loss": values.detach().mean(), "teacher_distance": distance.detach().sqrt()}
        metrics |= spread_metrics(denoised) | contrast_metrics(denoised, target, denoised)
        return Loss(values, metrics, ((denoised, target - denoised.detach()),))

    @torch.no_grad()
    def _point(self, path: Path, draw: Draw) -> tuple[Tensor, Tensor, Condition]:
        """A noised sample (B, ...), its time (B,), uniform in un-shifted time up to 1, and its condition."""
        o = self.options
        u = 1 - draw.uniform("tau")  # in (0, 1]
        if o.points == "path":
            call = ((1 - u) * o.path_steps).floor().long()
            landing = path.landing(call)
            t = grids.shift_time(u, o.shift).clamp(min=o.tau_min).to(landing.t)
            return path.landing_at(landing, t).x, t, path.condition
        assert path.real is not None
        clean, condition = path.real
        t = grids.shift_time(u, o.shift).clamp(min=o.tau_min).to(clean.device, at_least_float32(clean.dtype))
        noise = draw.normal("renoise", clean.shape[1:], clean.dtype, clean.device)
        return renoise(path.process, clean, torch.zeros_like(t), t, noise), t, condition


def tsm() -> TSMOptions:
    """Our default: no data, eight steps of the plain teacher."""
    return TSMOptions()
