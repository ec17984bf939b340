"""TDM: Trajectory Distribution Matching (Luo, Hu, Sun, Cai, Tang, arXiv 2503.06674, ICCV 2025), and TDM-unify.

A K-step student walks its own deterministic path x_{t_K} -> ... -> x_{t_0}. For every landing point x_{t_i}, the law of
its renoised version x_tau, tau in the segment above it, is matched to the teacher's by the difference of two scores:
the frozen teacher's, and that of a critic trained on the student's own landing points. No images, no teacher sampling;
the gradient goes through one student call. Equation numbers are those of the card `tdm.md`.

Needs a critic and, for a set of step counts, networks that read the condition "steps". At K = 4, guided, with one
critic update, it costs 7.75 expected network forwards per sample and iteration.

Signs of failure: `real_fake_cosine` falls (the critic lags: more critic updates or a higher critic rate);
`denoised_std` grows (saturation: less guidance); few samples dominate the loss (normaliser "dmd" in one or two
dimensions).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewstep.core import grids
from fewstep.core.guidance import guided
from fewstep.core.process import Process
from fewstep.core.renoise import renoise
from fewstep.core.rollout import Landing, Path
from fewstep.core.streams import Draw
from fewstep.core.tensors import Condition
from fewstep.losses.critic import beta_ratio, critic_loss, critic_weight, exact_target, importance_weight
from fewstep.losses.matching import match, normaliser
from fewstep.methods.base import LANDING, STEPS, Batch, Loss, Needs, Roles, agreement_metrics, mean_loss, spread_metrics
from fewstep.methods.tau import draw_tau, tau_bounds
from fewstep.methods.tdm_options import TDMOptions


@dataclass(frozen=True)
class Query:
    """A landing point renoised to where teacher and critic are asked: x_tau = r x_{t_i} + beta n, detached."""

    x: Tensor
    tau: Tensor
    noise: Tensor


class TDM:
    """Trajectory Distribution Matching with the given options; see `TDMOptions` for every setting and its source."""

    name: ClassVar[str] = "tdm"
    title: ClassVar[str] = "Trajectory Distribution Matching"
    paper: ClassVar[str] = "arXiv 2503.06674"

    def __init__(self, options: TDMOptions) -> None:
        options.validate()
        self.options = options

    @property
    def critic_updates(self) -> int:
        return self.options.critic_updates

    @property
    def needs(self) -> Needs:
        o = self.options
        return Needs(critic=True, steps_condition=o.steps_condition, landing_condition=o.critic_call_condition)

    def forwards(self, steps: int | None = None) -> float:
        """Expected network forwards per sample and iteration; a guided call counts 2. None: mean over the step counts.

        The path is walked to the furthest point that any of the losses asks for: past call a for a critic update that
        drew a, up to the input of call b for the student's b.
        """
        o = self.options
        if steps is None:
            return sum(self.forwards(count) for count in o.counts) / len(o.counts)
        if o.segments == "all":
            visits, walked = max(o.counts), float(steps)
        else:
            reached = ((m / steps) ** o.critic_updates * min(1, (m + 1) / steps) for m in range(steps))
            visits, walked = 1, sum(1 - probability for probability in reached)
        critic = 1 + bool(o.teacher_regularisation)
        student = 1 + 1 + (1 if o.guidance_scale == 1 else 2)  # itself, critic, teacher
        return walked + visits * (student + o.critic_updates * critic)

    def rollout(self, batch: Batch, roles: Roles, draw: Draw) -> Path:
        """Pure noise, a step count for each sample, and the student's path from there (eq. 2), walked as asked."""
        o = self.options
        device = batch.samples.device
        counts = torch.tensor(o.counts)
        steps = counts[draw.integers("steps", len(counts))]
        condition = batch.condition | ({STEPS: steps.float().to(device)} if o.steps_condition else {})
        noise = draw.normal("noise", batch.noise_shape, batch.dtype, device)
        return Path(
            roles.student,
            noise,
            grids.stack(steps, o.time_grid),
            roles.process,
            condition,
            o.eta,
            lambda call, shape: draw.normal(f"extra {call}", shape, batch.dtype, device),
        )

    def critic_loss(self, path: Path, roles: Roles, draw: Draw) -> Loss:
        """The critic learns to denoise the student's renoised landing points (card 2.5, 2.6)."""
        visits = self._visits(path, draw.sub("critic"))
        return mean_loss([self._critic_loss(path, roles, call, visit) for call, visit in visits])

    def student_loss(self, path: Path, roles: Roles, draw: Draw) -> Loss:
        """The student's landing points are pulled along the difference of teacher and critic (eq. 4 to 8)."""
        visits = self._visits(path, draw.sub("student"))
        return mean_loss([self._student_loss(path, roles, call, visit) for call, visit in visits])

    def _visits(self, path: Path, draw: Draw) -> list[tuple[Tensor, Draw]]:
        """The calls (B,) that a loss looks at, each with its own random numbers: one per sample, or all in turn."""
        if self.options.segments == "one":
            return [(draw.integers("call", path.steps), draw)]
        return [(index % path.steps, draw.sub(index)) for index in range(int(path.steps.max()))]

    def _critic_loss(self, path: Path, roles: Roles, call: Tensor, draw: Draw) -> Loss:
        o, process = self.options, roles.process
        landing = self._placed(path, path.landing(call), draw)  # x_{t_i}, from the path's own call
        query = self._query(path, landing, draw)  # x_tau ~ q(x_tau | x_{t_i}), eq. 3
        denoised = roles.critic(query.x, query.tau, self._critic_condition(landing))

        target, weight = self._critic_target(process, landing, query)
        values = critic_loss(denoised, target, weight)
        metrics = {"critic_loss": values.detach().mean()}
        if o.teacher_regularisation:
            with torch.no_grad():
                real = roles.teacher(query.x, query.tau, _prompt(landing.condition))
            velocity = critic_weight("inverse_sigma", process, landing.t, query.tau)
            distance = critic_loss(denoised, real, velocity)
            values = values + o.teacher_regularisation * distance
            metrics["critic_teacher_distance"] = distance.detach().mean()
        return Loss(values, metrics)

    def _student_loss(self, path: Path, roles: Roles, call: Tensor, draw: Draw) -> Loss:
        o = self.options
        landing = self._placed(path, path.land(roles.student, call), draw)  # the one call with gradient -> x_{t_i}
        query = self._query(path, landing, draw)  # x_tau ~ q(x_tau | x_{t_i}), eq. 3
        prompt = _prompt(landing.condition)
        with torch.no_grad():
            real = guided(roles.teacher, query.x, query.tau, prompt, roles.null(prompt), o.guidance_scale)  # eq. 8
            fake = roles.critic(query.x, query.tau, self._critic_condition(landing))

        pulled = landing.denoised if o.loss_on == "denoised" else landing.x
        divisor = normaliser(o.normaliser, landing.denoised, real)
        values = match(pulled, real - fake, normaliser=divisor, metric_kind=o.metric, c=o.huber_c)  # eq. 6, 7
        metrics = {"student_loss": values.detach().mean(), "normaliser": divisor.mean()}
        metrics |= agreement_metrics(landing.denoised, real, fake) | spread_metrics(landing.denoised)
        return Loss(values, metrics)

    def _placed(self, path: Path, landing: Landing, draw: Draw) -> Landing:
        """The landing point where the losses look at it: on the grid, or at a random time within its segment."""
        o = self.options
        if o.landing == "fixed":
            return landing
        low, high = (grids.unshift_time(t.double(), o.shift) for t in (landing.t, landing.t_from))
        u = torch.lerp(low, high - 3 * o.margin, draw.uniform("landing").to(low))  # leaves tau a margin's width
        return path.landing_at(landing, grids.shift_time(u, o.shift))

    @torch.no_grad()
    def _query(self, path: Path, landing: Landing, draw: Draw) -> Query:
        """The landing point renoised to a random tau of its range (card 2.3)."""
        o = self.options
        ceiling = landing.t_from if o.tau_range == "separate" else path.grid[:, 0].to(landing.t)
        low, high = tau_bounds(landing.t, ceiling, margin=o.margin, tau_min=o.tau_min, shift=o.shift)
        u = draw.uniform("tau")
        tau = draw_tau(o.tau_law, u, low, high, shift=o.shift, mean=o.logit_mean, std=o.logit_std).to(landing.t)
        noise = draw.normal("renoise", landing.x.shape[1:], landing.x.dtype, landing.x.device)
        return Query(renoise(path.process, landing.x, landing.t, tau, noise), tau, noise)

    def _critic_target(self, process: Process, landing: Landing, query: Query) -> tuple[Tensor, Tensor]:
        """What the critic should answer (B, ...), and the weight (B,) of its squared error."""
        o = self.options
        weight = critic_weight(o.critic_weight, process, landing.t, query.tau, o.snr_cap)
        if o.critic_target == "exact":
            target = exact_target(process, query.x, landing.t, query.tau, query.noise)  # eq. 10
            return target, weight * beta_ratio(process, landing.t, query.tau)
        ratio = importance_weight(o.importance, process, landing.eps_hat, query.noise, landing.t, query.tau)  # eq. 9
        return landing.denoised, weight * ratio

    def _critic_condition(self, landing: Landing) -> Condition:
        """The prompt, K if the student is told it, and the landing time if the critic is to be told."""
        if not self.options.critic_call_condition:
            return landing.condition
        return landing.condition | {LANDING: landing.t}


def _prompt(condition: Condition) -> Condition:
    """What a teacher is told: everything but the step count."""
    return {name: value for name, value in condition.items() if name != STEPS}
