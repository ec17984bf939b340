"""The losses of a discriminator that tells noised real data from noised student samples, and of the student against it.

Logits are (B,) or (B, heads); each loss is a mean over the heads, shape (B,). At the discriminator's best its logit is
log p/q, and the student's loss descends the softened reverse KL (card dmd2.md, 8.7).
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import softplus


def fooling_loss(logits: Tensor) -> Tensor:
    """The student's: softplus(-logit) of its own noised samples (DMD2, the non-saturating form)."""
    return softplus(-logits).flatten(1).mean(1) if logits.ndim > 1 else softplus(-logits)


def telling_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's: softplus(-real) + softplus(fake) (DMD2, eq. 4 in its softplus form)."""
    return fooling_loss(real) + fooling_loss(-fake)
