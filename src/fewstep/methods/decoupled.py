"""Decoupled DMD: guidance as the engine, matching as its regulariser (Liu et al., arXiv 2511.22677).

DMD as used, with a guided teacher and an unguided critic, is two things at once (eq. 6 of the card `decoupled_dmd.md`):

    guided teacher - critic = (teacher - critic) + (w - 1) (teacher - teacher without a prompt).

The second term asks no critic; it turns many steps into few and, alone, never stops. The first bounds it. So each is
given noise levels and a normaliser of its own: guidance sharpens what belongs to a level, hence only levels *cleaner*
than the student's input; matching sees all of them. Matching may be replaced by a GAN or by two moments.

**Time.** The paper has noise at 0 and data at 1: its tau > t is our tau < t. Asked at noisier levels instead
(`guidance_levels` noisier), guidance goes on pushing what is long resolved (docs/findings/decoupled-guidance.md).

The paper's schedules: 1 coupled-shared, guidance levels `shared`; 2 full, `full`; 3 constrained, `cleaner` with
matching levels `cleaner`; 4 hybrid, `cleaner` with `full`, the default. With `shared` levels, a joint normaliser and
the metric `l2` the terms add up to guided DMD (preset `decoupled-shared`); with one normaliser each, as in public
code, they do so in no schedule, and w - 1 is not the ratio of the two any more. Each term has a half of the squared
distance to its target, public code the whole: its steps are twice as long.

Every matching method (TDM, DMD2, ...) has `guidance` and `guidance_levels`; this one adds matching levels, so schedule
3, and the other regularisers.

Needs a teacher that was trained with dropped prompts and is not itself distilled from guidance: else its two answers
mean nothing. Needs a critic where it matches, a discriminator and real data for a GAN. At K = 4, matching, with five
critic updates, it costs 14 expected network forwards per sample and iteration.

Signs of failure: `denoised_std` that grows on and on (over-saturation, no variety: guidance outruns matching; lower
guidance_scale, or raise critic_rate or critic_updates); `matching_pull` that grows while `critic_loss` falls (the
critic lags). Quality is reported to peak early.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from fewstep.core.rollout import Landing, Path
from fewstep.core.streams import Draw
from fewstep.losses.moments import moment_divergence
from fewstep.methods.base import Loss, Needs, Roles, guidance_metrics
from fewstep.methods.dmd2 import DMD2, DMD2Options
from fewstep.methods.matching import Pull, Query
from fewstep.methods.matching_options import Guidance, contradiction, require
from fewstep.methods.tau import TauLaw
from fewstep.unread import refuse_unread

Regulariser = Literal["dm", "mean_variance", "gan", "none"]
MatchingLevels = Literal["full", "cleaner"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "regulariser": get_args(Regulariser),
    "matching_levels": get_args(MatchingLevels),
}
_OF_MATCHING = ("matching_levels", "joint_normaliser", "divergence", "teacher_regularisation", "critic_call_condition")
_OF_MOMENTS = ("moment_weight", "moment_mean", "moment_variance")


@dataclass(frozen=True)
class DecoupledOptions(DMD2Options):
    """Settings of Decoupled DMD: DMD2's, with its own defaults, and its own. Times are in [0, 1]: data at 0."""

    guidance: Guidance = "decoupled"
    """Only `decoupled` here; `coupled` is DMD2."""
    regulariser: Regulariser = "dm"
    """What bounds guidance: `dm`, distribution matching; `mean_variance`, two moments of each sample; `gan` (gan_weight
    above 0); or `none`, to see what that does (paper: it collapses)."""
    matching_levels: MatchingLevels = "full"
    """Noise levels of the matching term: `full` (paper's hybrid), or as `cleaner` for guidance (paper's constrained).
    The critic learns all of them."""
    moment_weight: float = 1.0
    """Weight of the moments' divergence, 0 or more; for `mean_variance`. The paper's is not known to us."""
    moment_mean: float | None = None
    """Wanted mean of a sample's elements, in units of the data (SDXL's latents: 0.075). None: `distill` measures
    it, and the variance, on the teacher's own latents."""
    moment_variance: float | None = None
    """Wanted variance, above 0 (SDXL's latents: 0.81)."""
    tau_law: TauLaw = "uniform_unshifted"
    """Drawn before the shift, as the authors have it; the same as `uniform` where there is none."""
    gan_weight: float = 0.0
    """Weight of the student's adversarial loss, 0 or more: beside matching (paper's SDXL runs, as in DMD2: 5e-3), or in
    its place; needs real data."""

    @property
    def measures(self) -> bool:
        """Whether moments are wanted that nobody has given."""
        return self.regulariser == "mean_variance" and None in (self.moment_mean, self.moment_variance)

    def build(self) -> Decoupled:
        """The method with these settings."""
        return Decoupled(self)

    def validate(self) -> None:
        self.require_choices(_CHOICES)
        super().validate()
        require(self.moment_weight >= 0, "moment_weight", self.moment_weight, "0 or more", "use 1")
        variance = self.moment_variance
        require(variance is None or variance > 0, "moment_variance", variance, "a number above 0", "leave it out")
        if self.guidance == "coupled":
            raise contradiction("guidance 'coupled' for Decoupled DMD", "guidance apart", "use the method dmd2")
        if self.regulariser != "mean_variance":
            refuse_unread(self, _OF_MOMENTS, "regulariser 'mean_variance'")
        if self.regulariser == "dm":
            return
        refuse_unread(self, ["critic_weight", "snr_cap"], "regulariser 'dm'")
        if self.regulariser != "gan":
            refuse_unread(self, ["critic_updates"], "regulariser 'dm' or 'gan'")
        unread = [f.name for f in fields(self) if f.name in _OF_MATCHING and getattr(self, f.name) != f.default]
        if unread:
            raise contradiction(f"{unread} with regulariser {self.regulariser!r}", "a matching term", "leave them out")
        if self.guidance_scale == 1:
            raise contradiction(
                f"regulariser {self.regulariser!r} with guidance_scale 1",
                "guidance, which it is there to bound",
                "raise guidance_scale, or use regulariser 'dm'",
            )
        if (self.regulariser == "gan") != (self.gan_weight > 0):
            raise contradiction(
                f"regulariser {self.regulariser!r} with gan_weight {self.gan_weight}",
                "a weight above 0 for a GAN, and 0 for others but 'dm'",
                "set gan_weight to 5e-3 for 'gan', else to 0",
            )


class Decoupled(DMD2):
    """DMD2 with guidance as a term of its own; see the module and `DecoupledOptions`."""

    name: ClassVar[str] = "decoupled"
    title: ClassVar[str] = "Decoupled DMD"
    paper: ClassVar[str] = "arXiv 2511.22677"
    options: DecoupledOptions

    @property
    def needs(self) -> Needs:
        matches = self.options.regulariser == "dm"
        return replace(super().needs, critic=matches, features="critic" if matches else "teacher")

    @property
    def critic_updates(self) -> int:
        """Per student update; 0 where nothing is trained beside the student."""
        return self.options.critic_updates if self.needs.critic or self.needs.discriminator else 0

    def _forwards_of_losses(self) -> float:
        if self.needs.critic:
            return super()._forwards_of_losses()
        adversarial = self.needs.discriminator
        return 3 + adversarial + 2 * adversarial * self.critic_updates + (self.options.regression_weight > 0)

    def _critic_loss(self, path: Path, roles: Roles, call: Tensor, draw: Draw) -> Loss:
        if self.needs.critic:
            return super()._critic_loss(path, roles, call, draw)
        landing = self._compared(path, path.landing(call), draw)  # the discriminator alone
        told = self._discriminator_loss(path, roles, landing, self._query(path, landing, draw), draw)
        return Loss(self.options.discriminator_weight * told.values, told.metrics)

    def _student_query(self, path: Path, landing: Landing, draw: Draw) -> Query:
        if self.options.matching_levels == "full":
            return super()._student_query(path, landing, draw)
        return self._query_between(path.process, landing, landing.t, landing.t_from, draw)

    @torch.no_grad()
    def _pulls(
        self, roles: Roles, landing: Landing, query: Query, draw: Draw
    ) -> tuple[list[Pull], dict[str, Tensor], Tensor]:
        """Eq. 8: matching at the query's level, guidance at its own; without matching, guidance alone."""
        if self.needs.critic:
            pulls, metrics, toward = super()._pulls(roles, landing, query, draw)
        else:
            pull, (told, untold) = self._guidance_pull(roles, landing, query, draw)
            pulls, metrics, toward = [pull], guidance_metrics(told, untold), told - untold
        names = ("matching_pull", "guidance_pull") if self.needs.critic else ("guidance_pull",)
        for name, pull in zip(names, pulls, strict=False):  # no guidance at scale 1
            metrics[name] = (pull.direction.abs().flatten(1).mean(1) / pull.divisor).mean()
        return pulls, metrics, toward

    def _further_terms(self, roles: Roles, landing: Landing, query: Query) -> dict[str, tuple[float, Tensor]]:
        """A GAN's, and eq. 7."""
        o, terms = self.options, super()._further_terms(roles, landing, query)
        if o.regulariser == "mean_variance":
            if o.moment_mean is None or o.moment_variance is None:
                raise contradiction(
                    "regulariser 'mean_variance' without the moments to keep",
                    "moment_mean and moment_variance",
                    "give both, such as losses.moments.element_moments of the teacher's own latents (distill does so)",
                )
            terms["moment"] = o.moment_weight, moment_divergence(landing.denoised, o.moment_mean, o.moment_variance)
        return terms


def decoupled() -> DecoupledOptions:
    """The paper's hybrid: guidance at levels cleaner than the student's input, matching at all."""
    return DecoupledOptions()


def decoupled_constrained() -> DecoupledOptions:
    """The paper's second best: both terms at cleaner levels only, each its own."""
    return DecoupledOptions(matching_levels="cleaner")


def decoupled_shared() -> DecoupledOptions:
    """Compatibility: both terms at one level with one normaliser, which add up to guided DMD."""
    return DecoupledOptions(guidance_levels="shared", joint_normaliser=True)
