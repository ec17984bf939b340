"""Few-step SiD: score identity distillation of a K-step student (Zhou et al., arXiv 2505.12674; SiD: 2404.04057).

The noised laws of student and teacher are matched in Fisher divergence. The student's gradient flows through teacher
and critic to its sample, and to the parameters of neither. Compared are the clean predictions of all K calls, as one
law: their uniform mixture, of which an iteration visits one call, the same for critic and student and for all samples.
The critic is not told the call. Symbols are those of the card `sid_few_step.md`; the paper's own text was not at hand:
where its abstract is silent this follows the code of SiD-DiT (arXiv 2509.25127).

Needs a critic, a teacher whose gradient with respect to its input is defined, and real data for the adversarial term.
At K = 4 with LSG it costs 9.5 expected network forwards per sample and iteration, and, unlike TDM, a backward pass
through teacher and critic.

The adversarial term differs from theirs: heads on the critic's features (`models.discriminator`) in the place of their
mean, logits unclipped, and from the first iteration (SiD-DiT: after 40k samples). Calls are logged apart for one step
count.

Signs of failure: the loss is no measure of progress (near 0 for alpha = 1), watch `fisher`; the mixture may have the
right law while single calls do not, watch `call_k_denoised_mean` and `call_k_denoised_std`, which should agree over k.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, ClassVar, cast, get_args

import torch
from torch import Tensor

from fewstep.core.guidance import Denoiser, guided
from fewstep.core.renoise import renoise
from fewstep.core.rollout import DrawnPath, Landing, Path
from fewstep.core.streams import Draw
from fewstep.core.tensors import Condition, flat_mean
from fewstep.losses.adversarial import fooling_loss, telling_loss
from fewstep.losses.critic import CriticWeight
from fewstep.losses.fisher import FisherWeight, fisher_loss, fisher_weight, handed_on
from fewstep.losses.matching import Normaliser, normaliser
from fewstep.methods.base import Batch, ChainNoise, Loss, Roles, agreement_metrics, spread_metrics
from fewstep.methods.matching import Matching, Query, prompt_of
from fewstep.methods.matching_options import MatchingOptions, contradiction, require
from fewstep.methods.tau import TauLaw
from fewstep.unread import refuse_unread

_CHOICES: dict[str, tuple[str, ...]] = {"weight": get_args(FisherWeight), "chain_noise": get_args(ChainNoise)}
_UNREAD = ["metric", "huber_c", "motion_guidance", "guidance", "guidance_levels", "joint_normaliser"]
_UNREAD += ["divergence", "ratio_clip", "ratio_bins"]


@dataclass(frozen=True)
class SiDOptions(MatchingOptions):
    """Settings of few-step SiD: those of all matching methods, with its own defaults, and its own.

    They are SiD-DiT's, without guidance; for that see the presets below. `start_time` is the paper's t_init (0.625 for
    Stable Diffusion), with noise of standard deviation 1 there (the paper: sigma of that time). Losses are means over
    elements, so `gan_weight` is lambda_adv / lambda_S: 0.01 in SiD-DiT's code, 0.001 reported of the paper.
    """

    alpha: float = 1.0
    """Loss L2 - alpha L1, 0 or more: 1 (SD, DiT, AFHQ) or 1.2 (SiD's other sets), both biased; 0.5 has the gradient of
    the divergence itself, and is the robust choice where others turn to noise (SiD issue 3)."""
    weight: FisherWeight = "alpha"
    """Of a sample by its noise level: `alpha`, a flow's 1 - sigma (SiD-DiT), `alpha_squared`, `inverse_sigma`,
    `inverse_sigma_squared`, `root_snr`, `snr`, or `one` (SiD, with the normaliser)."""
    normaliser: Normaliser = "none"
    """`dmd`: also divide by each sample's mean distance to the teacher, SiD's and LSG's weight (there with weight
    `one`); then alpha 0.5 is not unbiased either."""
    eta: float = 0.0
    """Share of its own noise that a step keeps, in [0, 1]: 0 is new noise at every step (SiD-DiT's default), 1 is
    SiD-DiT's `ddim`; of equal quality, by its authors."""
    chain_noise: ChainNoise = "fresh"
    """What a step's new noise is: `fresh`, or `fixed`, again that of the path's start (both SiD-DiT's). No diffusers
    scheduler samples `fixed` with several steps, so `fewstep distill` refuses it; for networks of your own."""
    critic_training_scale: float = 1.0
    """kappa_1, the guidance with which the critic is trained, any number: its guided answer is what must be right."""
    critic_scale: float = 1.0
    """kappa_2 = kappa_3, the critic's guidance in the student's loss, any number; 0 asks with the empty prompt only."""
    critic_dropout: float = 0.0
    """Share of prompts replaced by the empty one in the critic's training, in [0, 1) (LSG: 0.1); needed where its two
    scales differ, so that it knows the student's law without the prompt."""
    guidance_scale: float = 1.0
    """kappa_4, the teacher's guidance, 0 or more, 1 = none."""
    critic_weight: CriticWeight = "inverse_sigma"
    """Weight of the critic's squared x0 error: `inverse_sigma`, that of velocity (SiD-DiT), `snr`, of eps (LSG)."""
    tau_law: TauLaw = "logit_normal"
    """`logit_normal` (SiD-DiT) or `uniform` (LSG, tau_min 0.02), for critic and student alike."""
    logit_mean: float = math.log(2)
    """Mean of the logit-normal law (SiD-DiT: ln 2)."""
    logit_std: float = 1.6
    """Standard deviation of the logit-normal law, above 0 (SiD-DiT: 1.6)."""

    def build(self) -> SiD:
        """The method with these settings."""
        return SiD(self)

    def validate(self) -> None:
        self.require_choices(_CHOICES)
        unread = [f.name for f in fields(self) if f.name in _UNREAD and getattr(self, f.name) != f.default]
        if unread:
            raise contradiction(
                f"{unread} for SiD", "a Fisher divergence, which has no such settings", "leave them out"
            )
        super().validate()
        require(self.alpha >= 0, "alpha", self.alpha, "0 or more", "use 1, or 0.5 for an unbiased gradient")
        require(0 <= self.critic_dropout < 1, "critic_dropout", self.critic_dropout, "a share in [0, 1)", "use 0.1")
        for name in ("critic_training_scale", "critic_scale"):
            require(math.isfinite(getattr(self, name)), name, getattr(self, name), "a number", "1 means none")
        if self.chain_noise == "fixed" and self.eta == 1:
            raise contradiction("chain_noise 'fixed' with eta 1", "steps with new noise", "set eta to 0")
        known = self.critic_dropout > 0 and self.critic_training_scale != 0
        if self.critic_scale != self.critic_training_scale and not known:
            raise contradiction(
                f"critic_scale {self.critic_scale} for a critic trained with {self.critic_training_scale}",
                "a guided critic that has been trained: both scales equal, or some prompts dropped",
                "set critic_dropout to 0.1 and critic_training_scale to 1, or make the scales equal",
            )
        if self.critic_training_scale == 0:
            refuse_unread(self, ["critic_dropout"], "a critic_training_scale other than 0, which asks no prompt,")


def sid_none() -> SiDOptions:
    """No guidance anywhere."""
    return SiDOptions()


def sid_long(scale: float = 4.5) -> SiDOptions:
    """Only the teacher is guided ("long" guidance)."""
    return SiDOptions(guidance_scale=scale)


def sid_lsg(scale: float = 4.5) -> SiDOptions:
    """Long and short guidance, the same everywhere (SiD-DiT: 4.5, LSG: 1.5 to 4.5); rests where `sid_long` does."""
    return SiDOptions(critic_training_scale=scale, critic_scale=scale, guidance_scale=scale)


def sid_zero_cfg() -> SiDOptions:
    """Zero-CFG: plain teacher, critic without prompts; acts like a teacher's scale of 2 near its fixed point."""
    return SiDOptions(critic_training_scale=0.0, critic_scale=0.0)


def sid_anti_cfg(scale: float = -1.0) -> SiDOptions:
    """Anti-CFG: plain teacher, negative critic scale; -1 acts like 3. The paper's own values are not known to us."""
    return SiDOptions(critic_scale=scale, critic_dropout=0.1)


class SiD(Matching):
    """Few-step score identity distillation with the given options; see `SiDOptions` for every setting."""

    name: ClassVar[str] = "sid"
    title: ClassVar[str] = "Few-step score identity distillation"
    paper: ClassVar[str] = "arXiv 2505.12674"
    options: SiDOptions

    def forwards(self, steps: int | None = None) -> float:
        if steps is None:
            return super().forwards()
        return (steps + 1) / 2 + self._forwards_of_losses()  # the path is walked past the one drawn call

    def _forwards_of_losses(self) -> float:
        o, adversarial = self.options, self.options.gan_weight > 0
        rows = lambda scale: 1 if scale in (0, 1) else 2  # of `_asked`
        critic = rows(o.critic_training_scale) + bool(o.teacher_regularisation) + 2 * adversarial
        return 1 + rows(o.guidance_scale) + rows(o.critic_scale) + adversarial + o.critic_updates * critic

    def rollout(self, batch: Batch, roles: Roles, draw: Draw) -> DrawnPath:
        """The student's path, with the options' noise, and the call drawn for this iteration."""
        o = self.options
        plain = super().rollout(batch, roles, draw)
        noise = plain.input(torch.zeros_like(plain.steps)) / roles.process.noise_scale
        fixed = lambda call, shape: noise
        fresh = lambda call, shape: draw.normal(f"extra {call}", shape, noise.dtype, noise.device)
        extra = fixed if o.chain_noise == "fixed" else fresh
        path = DrawnPath(roles.student, noise, plain.grid, roles.process, plain.condition, o.eta, extra)
        path.real = batch.real
        path.call = (draw.common("call") * path.steps).long()
        return path

    def _visits(self, path: Path, draw: Draw) -> list[tuple[Tensor, Draw]]:
        assert isinstance(path, DrawnPath)
        return [(path.call, draw)]

    def _compared(self, path: Path, landing: Landing, draw: Draw) -> Landing:
        """The clean prediction of the call."""
        return path.landing_at(landing, torch.zeros_like(landing.t))

    def _levels(self, path: Path, landing: Landing) -> tuple[Tensor, Tensor]:
        return landing.t, torch.ones_like(landing.t)

    def _critic_loss(self, path: Path, roles: Roles, call: Tensor, draw: Draw) -> Loss:
        dropped = draw.uniform("dropout") < self.options.critic_dropout
        told = cast(Roles, _WithGuidedCritic(roles, self.options.critic_training_scale, dropped))
        return super()._critic_loss(path, told, call, draw)

    def _discriminator_loss(self, path: Path, roles: Roles, landing: Landing, query: Query, draw: Draw) -> Loss:
        """Data and samples share noise and level; both sides are told their prompts, whatever the critic is told."""
        assert path.real is not None
        clean, condition = path.real
        x = renoise(path.process, clean, landing.t, query.tau, query.noise)
        real = roles.discriminator(x, query.tau, condition)
        fake = roles.discriminator(query.x, query.tau, prompt_of(landing.condition))
        told = {"discriminator_loss": telling_loss(real, fake), "logit_real": real, "logit_fake": fake}
        return Loss(told["discriminator_loss"], {name: value.detach().mean() for name, value in told.items()})

    def _student_loss(self, path: Path, roles: Roles, call: Tensor, draw: Draw) -> Loss:
        o = self.options
        landing = self._compared(path, path.land(roles.student, call), draw)  # the one call with gradient
        query, condition = self._query(path, landing, draw), prompt_of(landing.condition)
        sample = landing.denoised.detach().requires_grad_()
        with torch.enable_grad():  # through both networks to the sample
            x = renoise(path.process, sample, landing.t, query.tau, query.noise)  # query.x, attached
            real = _asked(roles.teacher, roles, x, query.tau, condition, o.guidance_scale)
            fake = _asked(roles.critic, roles, x, query.tau, self._critic_condition(landing), o.critic_scale)
            weight = fisher_weight(o.weight, path.process, query.tau) / normaliser(o.normaliser, sample, real)
            values = matched = weight * fisher_loss(sample, real, fake, o.alpha)
            if o.gan_weight:
                adversarial = weight * fooling_loss(roles.discriminator(x, query.tau, condition))
                values = matched + o.gan_weight * adversarial
        with torch.no_grad():
            own = {"student_loss": matched.mean(), "fisher": (weight * flat_mean((real - fake).square())).mean()}
            own |= spread_metrics(sample)
            metrics = own | agreement_metrics(sample, real, fake)
            if len(o.counts) == 1:
                metrics |= {f"call_{int(call[0])}_{name}": value for name, value in own.items()}
            metrics |= {"adversarial_loss": adversarial.mean()} if o.gan_weight else {}
        toward = (real - fake).detach()
        return Loss(handed_on(values, sample, landing.denoised), metrics, ((landing.denoised, toward),))


class _WithGuidedCritic:
    """Roles whose critic answers with guidance, and is told the empty prompt where `dropped` (B,)."""

    def __init__(self, roles: Roles, scale: float, dropped: Tensor) -> None:
        self._roles, self._scale, self._dropped = roles, scale, dropped

    def __getattr__(self, name: str) -> Any:
        return getattr(self._roles, name)

    def critic(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        null, dropped = self._roles.null(condition), self._dropped.to(x.device)
        told = {
            name: torch.where(dropped.view(-1, *(1,) * (value.ndim - 1)), null[name], value)
            for name, value in condition.items()
        }
        return _asked(self._roles.critic, self._roles, x, t, told, self._scale)


def _asked(model: Denoiser, roles: Roles, x: Tensor, t: Tensor, condition: Condition, scale: float) -> Tensor:
    """`core.guidance.guided`; at scale 0 one plain call with the empty prompt."""
    null = roles.null(condition)
    return model(x, t, null) if scale == 0 else guided(model, x, t, condition, null, scale)
