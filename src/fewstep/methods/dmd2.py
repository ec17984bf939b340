"""DMD2: improved Distribution Matching Distillation (Yin et al., arXiv 2405.14867), and DMD (arXiv 2311.18828).

Whatever call of the student is drawn, its *clean prediction* is matched to the data the teacher models, at all noise
levels. Between calls the student renoises its prediction with fresh noise, in training (backward simulation, which
stops at the drawn call) as in sampling. The critic is updated several times per student update (the two-time-scale
rule, in the place of DMD's regression to pairs), and a discriminator on its features brings in real data, by which the
student can pass its teacher. Section and equation numbers are those of the card `dmd2.md`.

How iterations are counted: the paper's are *critic* updates, of which every R-th (R = 5 to 10) comes after one of the
student; 20k of them on SDXL are 4k student updates. Ours are student updates, with `critic_updates` critic updates each
before it. Ours share the iteration's samples, each with noise of its own; theirs have samples of their own.

Further differences: the critic's error is weighted by min-SNR (theirs on Stable Diffusion is the error of eps,
critic_weight `snr`, which learns far slower in our known answers); every sample draws its own call (theirs: one for the
batch, so that all ranks do equal work); real and fake samples meet the discriminator at one noise level, and the
student meets it where teacher and critic are asked (theirs: levels of its own, over the full axis), which saves
forwards for f-distill and noise in the update.

Needs a critic and, for the adversarial term, a discriminator and real data. At K = 4, guided, with five critic updates
and the adversarial term it costs about 24 network forwards per sample and iteration, 21 for one step.

Signs of failure: as for TDM; and `logit_real` - `logit_fake` grows without end while the pictures get worse (lower
discriminator_weight or gan_weight). Losses say little: look at the samples.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fewstep.core.rollout import Landing, Path
from fewstep.core.streams import Draw
from fewstep.core.tensors import flat_mean
from fewstep.errors import FewstepError
from fewstep.methods.base import LANDING, Batch, Loss, Needs, Roles
from fewstep.methods.matching import Matching
from fewstep.methods.matching_options import MatchingOptions, contradiction, require


@dataclass(frozen=True)
class DMD2Options(MatchingOptions):
    """Settings of DMD2: those of all matching methods, with its own defaults, and its own."""

    eta: float = 0.0
    """Share of its own noise that a step keeps, in [0, 1]: 0 is backward simulation with fresh noise (paper)."""
    margin: float = 0.02
    """Kept free at both ends of the tau range [0, 1], in un-shifted time, [0, 0.5) (paper: 20 to 980 of 1000)."""
    critic_updates: int = 5
    """Critic updates per student update, 1 or more (paper: 5 for SDXL and ImageNet, 10 for SD1.5; DMD: 1)."""
    gan_weight: float = 5e-3
    """Weight of the student's adversarial loss, 0 or more (paper: 5e-3 for SDXL, 3e-3 ImageNet, 1e-3 SD1.5)."""
    critic_call_condition: bool = False
    """Tell the critic which call made a sample, by the time it landed at. Untold (paper), it learns the mixture of all
    calls' samples, and only if it tells their laws apart by itself does each of them become the teacher's."""
    regression_weight: float = 0.0
    """Weight, 0 or more, of the mean squared distance to the teacher's samples from stored noise, for one step only
    (DMD: 0.25, with LPIPS; DMD2: none). Costs one more forward."""

    def build(self) -> DMD2:
        """The method with these settings."""
        return DMD2(self)

    def validate(self) -> None:
        super().validate()
        require(self.regression_weight >= 0, "regression_weight", self.regression_weight, "0 or more", "DMD has 0.25")
        if self.regression_weight and self.counts != (1,):
            raise contradiction(
                f"regression_weight {self.regression_weight} with the step counts {self.counts}",
                "a student of one step, since only that maps the pair's noise to its image in one call",
                "set steps to 1 or regression_weight to 0",
            )
        if self.tau_min >= 1 - self.margin:
            raise contradiction(f"tau_min {self.tau_min} with margin {self.margin}", "room between them", "lower them")


class DMD2(Matching):
    """Distribution matching of the student's clean predictions; see the module and `DMD2Options`."""

    name: ClassVar[str] = "dmd2"
    title: ClassVar[str] = "Improved Distribution Matching Distillation"
    paper: ClassVar[str] = "arXiv 2405.14867"
    options: DMD2Options

    @property
    def needs(self) -> Needs:
        o = self.options
        return replace(super().needs, landing_condition=o.critic_call_condition, pairs=o.regression_weight > 0)

    def _forwards_of_losses(self) -> float:
        return super()._forwards_of_losses() + (self.options.regression_weight > 0)

    def rollout(self, batch: Batch, roles: Roles, draw: Draw) -> Path:
        if self.needs.pairs and batch.pairs is None:
            raise FewstepError(
                "found a batch without pairs of noise and image, expected some for regression_weight above 0, "
                "fix: fill Batch.pairs"
            )
        path = super().rollout(batch, roles, draw)
        path.pairs = batch.pairs
        return path

    def student_loss(self, path: Path, roles: Roles, draw: Draw) -> Loss:
        """Distribution matching, the adversarial term, and DMD's regression to the teacher's own samples (P1 eq. 9)."""
        loss = super().student_loss(path, roles, draw)
        if not self.options.regression_weight:
            return loss
        assert path.pairs is not None  # see `rollout`
        noise, made, condition = path.pairs
        top = path.grid[:, 0].to(noise)
        distance = flat_mean((roles.student(noise * path.process.noise_scale, top, condition) - made).square())
        metrics = loss.metrics | {"regression_loss": distance.detach().mean()}
        return replace(loss, values=loss.values + self.options.regression_weight * distance, metrics=metrics)

    def _compared(self, path: Path, landing: Landing, draw: Draw) -> Landing:
        """The call's clean prediction; the critic may be told where the call landed."""
        clean = path.landing_at(landing, torch.zeros_like(landing.t))
        if not self.options.critic_call_condition:
            return clean
        return replace(clean, condition=clean.condition | {LANDING: landing.t})

    def _levels(self, path: Path, landing: Landing) -> tuple[Tensor, Tensor]:
        """All of the axis (card 3, 4a), whatever the call."""
        return torch.zeros_like(landing.t), torch.ones_like(landing.t)


def dmd2() -> DMD2Options:
    """4 steps with the adversarial term, as published for SDXL (there with guidance 8)."""
    return DMD2Options()


def dmd() -> DMD2Options:
    """The first version: one step, one critic update per student update, regression to pairs, no adversarial term."""
    return DMD2Options(steps=1, critic_updates=1, gan_weight=0.0, regression_weight=0.25)
