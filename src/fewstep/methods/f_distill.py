"""f-distill: distribution matching by any f-divergence (Xu, Nie, Vahdat, arXiv 2502.15681).

DMD2 descends the reverse KL, which lets go of modes. Any other f-divergence has the same update with each sample
weighted by h(r) = f''(r) r^2, where r = p/q, teacher over student, at the noised sample. The discriminator of the
adversarial term knows r: its logit is log r. Where h grows with r (Jensen-Shannon, squared Hellinger, forward KL),
samples that the teacher finds unlikely weigh less, and modes that the student misses weigh more, at the price of
variance. The ratio is brought to mean 1 in every bin of tau, then the weight to mean 1 in the batch (section 2 of the
card `f_distill.md`).

Which divergence: Jensen-Shannon, the paper's best on large data; forward KL for small data, where its variance can be
borne; `reverse_kl` is DMD2 itself. Logits are averaged over the heads before the exponential, and the ratio belongs to
the unguided data, as in the released code.

Needs a critic, a discriminator (on the frozen teacher's features, as in the released code) and real data, or, in their
place, a log ratio that the method is given and a gan_weight of 0. The ratio costs no forward beyond the adversarial
term's. Both means are taken over the samples of one forward pass: give each process 32 or more.

Signs of failure: `weight_effective_share` below some 0.3 (few samples make the update: a calmer divergence, a narrower
ratio_clip); `weight_max` at its bound throughout (a discriminator that tells all apart: lower discriminator_weight).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from fewstep.losses.divergence import Divergence
from fewstep.methods.base import Needs
from fewstep.methods.dmd2 import DMD2, DMD2Options


@dataclass(frozen=True)
class FDistillOptions(DMD2Options):
    """Settings of f-distill: DMD2's, with another divergence."""

    divergence: Divergence = "jensen_shannon"
    """What is descended: `jensen_shannon` (ImageNet, text to image), `forward_kl` (CIFAR-10) or another of the table;
    `reverse_kl` is DMD2."""
    gan_weight: float = 1e-3
    """Weight of the student's adversarial loss, 0 or more (paper: 1e-3 for SD1.5 and CIFAR-10, 3e-3 ImageNet)."""

    def build(self) -> FDistill:
        """The method with these settings; a log ratio other than the discriminator's is given to `FDistill` itself."""
        return FDistill(self)


class FDistill(DMD2):
    """DMD2 with samples weighted for another divergence; see the module."""

    name: ClassVar[str] = "f-distill"
    title: ClassVar[str] = "f-divergence distribution matching"
    paper: ClassVar[str] = "arXiv 2502.15681"

    @property
    def needs(self) -> Needs:
        return replace(super().needs, features="teacher")


def f_distill() -> FDistillOptions:
    """Jensen-Shannon, 4 steps (the paper has one)."""
    return FDistillOptions()
