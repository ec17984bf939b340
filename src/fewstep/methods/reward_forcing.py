"""Reward Forcing: Self Forcing with a blended sink, and videos of high reward corrected most (arXiv 2512.04678).

Two things are new. *EMA-Sink* (`Layout.sink_decay`): what leaves the window is blended into the sink, so that a stream
neither forgets its beginning nor copies it for ever. *Re-DMD*: the loss of each video is multiplied by exp(reward /
beta); the reward is a number per video, without gradient. Equation numbers are those of the card `reward_forcing.md`.

A reward is any function of the student's clean videos and their conditions. `latent_motion` is one that needs no
network; a scorer that looks at pixels, such as a vision-language model, is wrapped by `PixelReward`.

What the weight does and does not (card 2, remarks): teacher and critic that agree give no gradient whatever the reward,
so the exact optimum is not tilted; it changes what is matched first and best. Only weights relative to each other act,
since Adam does not feel a common factor. So they are taken relative to the best video of the batch and have mean 1 in
it: a constant reward, and an infinite beta, are plain DMD to the bit. Where a micro-batch of a process is a single
video nothing is relative; there `relative_to="mean"` weighs by exp((reward - reward_mean) / beta), as published.

How it differs from the release: the sink is blended in training as well (theirs only when sampling), and in float32
(theirs in bfloat16, which loses nearly all of it).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from fewstep.attention.layout import FRAMES
from fewstep.core.rollout import DrawnPath, Landing
from fewstep.core.streams import Draw
from fewstep.core.tensors import Condition
from fewstep.errors import FewstepError
from fewstep.methods.base import Batch, Roles
from fewstep.methods.matching import Pull, Query, prompt_of
from fewstep.methods.matching_options import require
from fewstep.methods.self_forcing import SelfForcing, SelfForcingOptions
from fewstep.unread import refuse_unread

Reward = Callable[[Tensor, Condition], Tensor]
"""reward(clean videos (B, C, F, ...), condition) -> (B,), higher is better; called without gradient."""
RelativeTo = Literal["batch", "mean"]


@dataclass(frozen=True)
class RewardForcingOptions(SelfForcingOptions):
    """Settings of Reward Forcing: those of Self Forcing, with its own defaults, and its own."""

    sink: int = 1
    """First chunks that are never forgotten (released: 1 of 3 latent frames); blending needs exactly 1."""
    window: int | None = 1
    """Finished chunks before the current one that are remembered (released: 1; its window of 9 frames counts sink and
    current chunk)."""
    sink_decay: float = 0.99
    """Share of the sink that stays when a chunk leaves the window, in [0, 1] (paper's ablation 0.99, 0.9, 0.5; code
    0.999)."""
    beta: float = 0.5
    """Temperature of the reward in units of its spread, above 0: small is strict, inf is plain DMD (paper: 1/2)."""
    reward_spread: float = 1.0
    """One unit of the reward, above 0: its standard deviation on usual videos (released: the scorer's own)."""
    reward_mean: float = 0.0
    """Reward whose weight is 1, with `relative_to` mean (released: the scorer's own)."""
    relative_to: RelativeTo = "batch"
    """Weights have mean 1 in the `batch` that is computed together, which has to be of two videos or more (ours); or
    weight 1 belongs to the reward's `mean` (published)."""

    @property
    def may_be_infinite(self) -> tuple[str, ...]:
        """An infinite beta is plain DMD."""
        return ("beta",)

    def build(self) -> RewardForcing:
        """The method with these settings; a reward other than motion is given to `RewardForcing` itself."""
        return RewardForcing(self)

    def validate(self) -> None:
        super().validate()
        require(self.beta > 0, "beta", self.beta, "a number above 0", "use 0.5")
        require(self.reward_spread > 0, "reward_spread", self.reward_spread, "a number above 0", "use 1")
        require(self.relative_to in get_args(RelativeTo), "relative_to", self.relative_to, "batch or mean", "use batch")
        require(self.matching_weight > 0, "matching_weight", 0, "above 0, as the reward weighs that loss", "use 1")
        if self.relative_to == "batch":
            refuse_unread(self, ["reward_mean"], "relative_to 'mean'")
        if self.beta == math.inf:
            refuse_unread(self, ["reward_spread", "reward_mean"], "a finite beta")


class RewardForcing(SelfForcing):
    """Reward-weighted distribution matching of the student's own videos; see the module.

    Args:
        options: every setting.
        reward: of a video; `latent_motion` unless told.
    """

    name: ClassVar[str] = "reward-forcing"
    title: ClassVar[str] = "Reward Forcing"
    paper: ClassVar[str] = "arXiv 2512.04678"
    options: RewardForcingOptions

    def __init__(self, options: RewardForcingOptions, reward: Reward | None = None) -> None:
        super().__init__(options)
        self._reward = latent_motion if reward is None else reward

    def rollout(self, batch: Batch, roles: Roles, draw: Draw) -> DrawnPath:
        if self.options.relative_to == "batch" and len(batch.samples) < 2:
            raise FewstepError(
                "found one video at a time, expected two or more to weigh against each other, fix: raise --batch or "
                "--microbatch, or set relative_to to 'mean' and reward_mean and reward_spread to the reward's own"
            )
        return super().rollout(batch, roles, draw)

    @torch.no_grad()
    def _pulls(
        self, roles: Roles, landing: Landing, query: Query, draw: Draw
    ) -> tuple[list[Pull], dict[str, Tensor], Tensor]:
        """Eq. 4: the pulls, weighted by the reward of the clean video."""
        pulls, metrics, toward = super()._pulls(roles, landing, query, draw)
        reward = self._reward(landing.denoised.detach(), prompt_of(landing.condition))
        if reward.shape != query.tau.shape:
            raise FewstepError(
                f"found rewards of shape {tuple(reward.shape)} for {len(query.tau)} videos, expected one number each, "
                "fix: return a (B,) tensor"
            )
        weight = self._weight(reward.to(landing.denoised))
        metrics |= {"reward": reward.mean(), "reward_std": reward.std(correction=0), "weight_max": weight.max()}
        return [replace(pull, weight=weight * pull.weight) for pull in pulls], metrics, toward

    def _weight(self, reward: Tensor) -> Tensor:
        """exp(reward / beta), relative to the batch or to the mean."""
        o = self.options
        if o.relative_to == "mean":
            return ((reward - o.reward_mean) / (o.beta * o.reward_spread)).exp()
        weight = ((reward - reward.max()) / (o.beta * o.reward_spread)).exp()  # 1 for equal rewards, exactly
        return weight / weight.mean()


def latent_motion(video: Tensor, condition: Condition) -> Tensor:
    """Mean absolute difference of neighbouring frames, (B,), in units of the latents."""
    return video.diff(dim=FRAMES).abs().flatten(1).mean(1)


class PixelReward:
    """A reward of pixels: decodes the videos and asks `score`.

    Args:
        backbone: whose `decode` makes pixels of latents (`fewstep.models.Backbone`).
        score: score(pixels (B, F, 3, H, W) uint8 on the CPU, condition) -> (B,).
    """

    def __init__(self, backbone: Any, score: Callable[[Tensor, Condition], Tensor]) -> None:
        self._backbone, self._score = backbone, score

    def __call__(self, video: Tensor, condition: Condition) -> Tensor:
        return self._score(self._backbone.decode(video), condition)


def reward_forcing() -> RewardForcingOptions:
    """DMD weighted by motion, with a blended sink and the shortest window (published)."""
    return RewardForcingOptions()
