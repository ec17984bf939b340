"""Distribution matching: what its methods share. Each method says where its samples are compared and with what.

One iteration: the student's path from pure noise; the critic learns the law of the student's samples, seen through
renoising; the student is pulled by the difference of teacher and critic at renoised samples, through one of its calls.
A method chooses the point of the path that is compared (`_compared`), the noise levels (`_levels`) and the critic's
target (`_critic_target`); divergence, guidance and the adversarial term are options of all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fewstep.core import grids
from fewstep.core.guidance import guided_parts, joined, joint_parts
from fewstep.core.process import Process
from fewstep.core.renoise import renoise
from fewstep.core.rollout import Landing, Path
from fewstep.core.streams import Draw
from fewstep.core.tensors import Condition
from fewstep.errors import FewstepError
from fewstep.losses.adversarial import fooling_loss, telling_loss
from fewstep.losses.critic import critic_loss, critic_weight
from fewstep.losses.divergence import clipped_ratio, divergence_weight, mean_one_by_time
from fewstep.losses.matching import match, normaliser
from fewstep.methods.base import (
    LANDING,
    STEPS,
    Batch,
    Loss,
    Needs,
    Roles,
    agreement_metrics,
    guidance_metrics,
    mean_loss,
    motion_metrics,
    spread_metrics,
)
from fewstep.methods.matching_options import MatchingOptions
from fewstep.methods.tau import draw_tau, tau_bounds

LogRatio = Callable[[Tensor, Tensor, Condition], Tensor]
"""f(x_tau (B, ...), tau (B,), condition) -> log p/q (B,) of the teacher's and the student's law at that level."""


@dataclass(frozen=True)
class Query:
    """A sample renoised to where the networks are asked: x_tau = r x_s + beta n, detached."""

    x: Tensor
    tau: Tensor
    noise: Tensor
    logits: Tensor | None = None
    """The discriminator's there, with gradient to the student, where its loss asks for them."""


@dataclass(frozen=True)
class Pull:
    """One term of the student's update: a direction in the space of denoised samples, and what it is scaled by."""

    direction: Tensor
    query: Query
    """Where networks were asked for it."""
    divisor: Tensor
    """(B,), see `losses.matching.normaliser`."""
    weight: Tensor
    """(B,) of its loss."""


class Matching:
    """Base of the methods that match distributions; see the module.

    Args:
        options: every setting.
        log_ratio: log density ratio for divergences other than the reverse KL; without it, the discriminator's.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]

    def __init__(self, options: MatchingOptions, log_ratio: LogRatio | None = None) -> None:
        options.validate()
        self.options = options
        self._log_ratio = log_ratio

    @property
    def critic_updates(self) -> int:
        return self.options.critic_updates

    @property
    def _judged(self) -> bool:
        """Whether samples are weighted by a density ratio."""
        return self.options.divergence != "reverse_kl"

    @property
    def needs(self) -> Needs:
        o = self.options
        adversarial = o.gan_weight > 0 or (self._judged and self._log_ratio is None)
        return Needs(critic=True, discriminator=adversarial, real_data=adversarial, steps_condition=o.steps_condition)

    def forwards(self, steps: int | None = None) -> float:
        """Expected network forwards per sample and iteration; a guided call counts 2. None: mean over the step counts.

        The path is walked to the furthest point that any of the losses asks for: past call a for a critic update that
        drew a, up to the input of call b for the student's b.
        """
        o = self.options
        if steps is None:
            return sum(self.forwards(count) for count in o.counts) / len(o.counts)
        reached = ((m / steps) ** self.critic_updates * min(1, (m + 1) / steps) for m in range(steps))
        return sum(1 - probability for probability in reached) + self._forwards_of_losses()

    def _forwards_of_losses(self) -> float:
        """Forwards of one visit of the student's loss and of the critic's updates, without the path."""
        o = self.options
        adversarial = self.needs.discriminator
        critic = 1 + bool(o.teacher_regularisation) + 2 * adversarial
        apart = o.guidance == "decoupled" and o.guidance_levels != "shared" and o.guidance_scale != 1
        teacher = 3 if o.motion_guidance else (1 if o.guidance_scale == 1 else 2) + apart
        return 2 + teacher + adversarial + o.critic_updates * critic

    def rollout(self, batch: Batch, roles: Roles, draw: Draw) -> Path:
        """Pure noise, a step count for each sample, and the student's path from there, walked as far as asked."""
        o = self.options
        self._require_data(batch)
        device = batch.samples.device
        counts = torch.tensor(o.counts)
        steps = counts[draw.integers("steps", len(counts))]
        condition = batch.condition | ({STEPS: steps.float().to(device)} if o.steps_condition else {})
        noise = draw.normal("noise", batch.noise_shape, batch.dtype, device)
        path = Path(
            roles.student,
            noise,
            grids.stack(steps, o.time_grid),
            roles.process,
            condition,
            o.eta,
            lambda call, shape: draw.normal(f"extra {call}", shape, batch.dtype, device),
        )
        path.real = batch.real
        return path

    def _require_data(self, batch: Batch) -> None:
        if self.needs.real_data and batch.real is None:
            raise FewstepError(
                f"found a batch without real data, expected some, since {self.name} here looks at them (a "
                "discriminator, by gan_weight above 0 or a divergence other than reverse_kl; or history 'data'), "
                "fix: fill Batch.real"
            )

    def critic_loss(self, path: Path, roles: Roles, draw: Draw) -> Loss:
        """The critic learns to denoise the student's renoised samples; the discriminator, to tell them from data."""
        visits = self._visits(path, draw.sub("critic"))
        return mean_loss([self._critic_loss(path, roles, call, visit) for call, visit in visits])

    def student_loss(self, path: Path, roles: Roles, draw: Draw) -> Loss:
        """The student's samples are pulled along the difference of teacher and critic."""
        visits = self._visits(path, draw.sub("student"))
        return mean_loss([self._student_loss(path, roles, call, visit) for call, visit in visits])

    def _visits(self, path: Path, draw: Draw) -> list[tuple[Tensor, Draw]]:
        """The calls (B,) that a loss looks at, each with its own random numbers."""
        return [(draw.integers("call", path.steps), draw)]

    def _compared(self, path: Path, landing: Landing, draw: Draw) -> Landing:
        """The point of the path, with its time, whose renoised law is matched."""
        raise NotImplementedError

    def _levels(self, path: Path, landing: Landing) -> tuple[Tensor, Tensor]:
        """Floor and ceiling (B,) of the noise levels at which it is matched, before margins."""
        raise NotImplementedError

    def _critic_target(self, process: Process, landing: Landing, query: Query) -> tuple[Tensor, Tensor]:
        """What the critic should answer (B, ...), and the weight (B,) of its squared error."""
        o = self.options
        return landing.denoised, critic_weight(o.critic_weight, process, landing.t, query.tau, o.snr_cap)

    def _critic_condition(self, landing: Landing) -> Condition:
        """What the critic is told."""
        return landing.condition

    def _pulled(self, landing: Landing) -> Tensor:
        """What the direction moves."""
        return landing.denoised

    def _critic_loss(self, path: Path, roles: Roles, call: Tensor, draw: Draw) -> Loss:
        o, process = self.options, roles.process
        landing = self._compared(path, path.landing(call), draw)  # from the path's own call, without gradient
        query = self._query(path, landing, draw)
        denoised = roles.critic(query.x, query.tau, self._critic_condition(landing))

        target, weight = self._critic_target(process, landing, query)
        values = critic_loss(denoised, target, weight)
        metrics = {"critic_loss": values.detach().mean()}
        if o.teacher_regularisation:
            with torch.no_grad():
                real = roles.teacher(query.x, query.tau, prompt_of(landing.condition))
            velocity = critic_weight("inverse_sigma", process, landing.t, query.tau)
            distance = critic_loss(denoised, real, velocity)
            values = values + o.teacher_regularisation * distance
            metrics["critic_teacher_distance"] = distance.detach().mean()
        if self.needs.discriminator:
            told = self._discriminator_loss(path, roles, landing, query, draw)
            values = values + o.discriminator_weight * told.values
            metrics |= told.metrics
        return Loss(values, metrics)

    def _discriminator_loss(self, path: Path, roles: Roles, landing: Landing, query: Query, draw: Draw) -> Loss:
        """Real data noised to the same levels, against the renoised samples."""
        assert path.real is not None  # see `rollout`
        clean, condition = path.real
        noise = draw.normal("real", clean.shape[1:], clean.dtype, clean.device)
        x = renoise(roles.process, clean, torch.zeros_like(query.tau), query.tau, noise)
        real = roles.discriminator(x, query.tau, condition)
        fake = roles.discriminator(query.x, query.tau, prompt_of(landing.condition))
        values = telling_loss(real, fake)
        metrics = {"discriminator_loss": values, "logit_real": real, "logit_fake": fake}
        return Loss(values, {name: value.detach().mean() for name, value in metrics.items()})

    def _student_loss(self, path: Path, roles: Roles, call: Tensor, draw: Draw) -> Loss:
        o = self.options
        landing = self._compared(path, path.land(roles.student, call), draw)  # the one call with gradient
        query = self._student_query(path, landing, draw)
        if o.gan_weight:
            attached = renoise(path.process, landing.x, landing.t, query.tau, query.noise)  # query.x, with gradient
            query = replace(query, logits=roles.discriminator(attached, query.tau, prompt_of(landing.condition)))
        pulls, metrics, toward = self._pulls(roles, landing, query, draw)
        parts = [
            pull.weight
            * match(self._pulled(landing), pull.direction, normaliser=pull.divisor, metric_kind=o.metric, c=o.huber_c)
            for pull in pulls
        ]
        values = torch.stack(parts).sum(0)
        metrics |= {"student_loss": values.detach().mean(), "normaliser": pulls[0].divisor.mean()}
        metrics |= spread_metrics(landing.denoised)
        for name, (weight, term) in self._further_terms(roles, landing, query).items():
            values = values + weight * term
            metrics[f"{name}_loss"] = term.detach().mean()
        return Loss(values, metrics, ((landing.denoised, toward),))

    def _further_terms(self, roles: Roles, landing: Landing, query: Query) -> dict[str, tuple[float, Tensor]]:
        """Terms of the student's loss beside the pulls, with gradient: weight and values (B,) by name."""
        if query.logits is None:
            return {}
        return {"adversarial": (self.options.gan_weight, fooling_loss(query.logits))}

    @torch.no_grad()
    def _pulls(
        self, roles: Roles, landing: Landing, query: Query, draw: Draw
    ) -> tuple[list[Pull], dict[str, Tensor], Tensor]:
        """The terms of the student's update, what to log of teacher and critic, and where the terms together point."""
        o, condition, clean = self.options, prompt_of(landing.condition), landing.denoised
        fake = roles.critic(query.x, query.tau, self._critic_condition(landing))
        weight = self._sample_weight(roles, query, condition)
        metrics: dict[str, Tensor] = {}
        if o.motion_guidance:  # card motionstream, eq. 4
            parts = joint_parts(roles.teacher, query.x, query.tau, condition, roles.null(condition))
            real = joined(parts, o.guidance_scale, o.motion_guidance)
            metrics |= guidance_metrics(parts[0], parts[1]) | motion_metrics(parts[0], parts[2])
            pulls = [Pull(real - fake, query, normaliser(o.normaliser, clean, real), weight)]
            toward = real - fake
        elif o.guidance_scale == 1:
            real = roles.teacher(query.x, query.tau, condition)
            pulls = [Pull(real - fake, query, normaliser(o.normaliser, clean, real), weight)]
            toward = real - fake
        elif o.guidance == "coupled":
            told, untold = guided_parts(roles.teacher, query.x, query.tau, condition, roles.null(condition))
            real = untold + o.guidance_scale * (told - untold)
            metrics |= guidance_metrics(told, untold)
            pulls = [Pull(real - fake, query, normaliser(o.normaliser, clean, real), weight)]
            toward = real - fake
        else:  # card decoupled_dmd, eq. 8: the plain teacher at the query, guidance at levels of its own
            guidance, (told, untold) = self._guidance_pull(roles, landing, query, draw)
            shared = guidance.query is query
            real = told if shared else roles.teacher(query.x, query.tau, condition)
            pulls = [Pull(real - fake, query, normaliser(o.normaliser, clean, real), weight), guidance]
            if o.joint_normaliser:
                joint = normaliser(o.normaliser, clean, untold + o.guidance_scale * (told - untold))
                pulls = [replace(pull, divisor=joint) for pull in pulls]
            metrics |= guidance_metrics(told, untold)
            toward = real - fake + (o.guidance_scale - 1) * (told - untold)
        metrics |= agreement_metrics(clean, real, fake)
        if self._judged:
            share = 1 / weight.square().mean()  # effective share of the samples
            metrics |= {"weight_min": weight.min(), "weight_max": weight.max(), "weight_effective_share": share}
        return pulls, metrics, toward

    def _guidance_pull(
        self, roles: Roles, landing: Landing, query: Query, draw: Draw
    ) -> tuple[Pull, tuple[Tensor, Tensor]]:
        """Guidance as a term of its own, and the teacher's two answers; no critic has part in it (card eq. 6)."""
        o, condition = self.options, prompt_of(landing.condition)
        if o.guidance_levels != "shared":
            floor, ceiling = self._guidance_levels(landing)
            query = self._query_between(roles.process, landing, floor, ceiling, draw.sub("guidance"))
        told, untold = guided_parts(roles.teacher, query.x, query.tau, condition, roles.null(condition))
        divisor = normaliser(o.normaliser, landing.denoised, told)
        direction = (o.guidance_scale - 1) * (told - untold)
        return Pull(direction, query, divisor, torch.ones_like(query.tau)), (told, untold)

    def _guidance_levels(self, landing: Landing) -> tuple[Tensor, Tensor]:
        """Floor and ceiling of the noise levels at which guidance is asked about."""
        top = torch.ones_like(landing.t)
        return {
            "cleaner": (landing.t, landing.t_from),
            "full": (landing.t, top),
            "noisier": (landing.t_from - 2 * self.options.margin, top),  # some room for the first call, too
        }[self.options.guidance_levels]

    def _sample_weight(self, roles: Roles, query: Query, condition: Condition) -> Tensor:
        """h(r), with mean 1 over the batch (f-distill, card section 2); 1 for the reverse KL.

        Both of its normalisations are means over the batch that is here, a micro-batch of one process: they alone make
        a result depend on how a batch is split.
        """
        o = self.options
        if not self._judged:
            return torch.ones_like(query.tau)
        if self._log_ratio is not None:
            log_ratio = self._log_ratio(query.x, query.tau, condition)
        elif query.logits is not None:
            log_ratio = query.logits.flatten(1).mean(1)
        else:
            log_ratio = roles.log_ratio(query.x, query.tau, condition)
        ratio = clipped_ratio(log_ratio, o.ratio_clip)
        weight = divergence_weight(o.divergence, mean_one_by_time(ratio, query.tau, o.ratio_bins))
        return weight / weight.mean()

    def _student_query(self, path: Path, landing: Landing, draw: Draw) -> Query:
        """Where the student's loss asks: as the critic's does."""
        return self._query(path, landing, draw)

    @torch.no_grad()
    def _query(self, path: Path, landing: Landing, draw: Draw) -> Query:
        """The compared point renoised to a random tau of its range."""
        floor, ceiling = self._levels(path, landing)
        return self._query_between(path.process, landing, floor, ceiling, draw)

    def _query_between(self, process: Process, landing: Landing, floor: Tensor, ceiling: Tensor, draw: Draw) -> Query:
        o = self.options
        low, high = tau_bounds(floor, ceiling, margin=o.margin, tau_min=o.tau_min, shift=o.shift)
        u = draw.uniform("tau")
        tau = draw_tau(o.tau_law, u, low, high, shift=o.shift, mean=o.logit_mean, std=o.logit_std).to(landing.t)
        noise = draw.normal("renoise", landing.x.shape[1:], landing.x.dtype, landing.x.device)
        return Query(renoise(process, landing.x, landing.t, tau, noise).detach(), tau, noise)


def prompt_of(condition: Condition) -> Condition:
    """What a teacher is told: everything but the step count and the landing time."""
    return {name: value for name, value in condition.items() if name not in (STEPS, LANDING)}
