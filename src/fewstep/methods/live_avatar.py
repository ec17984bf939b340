"""Live Avatar's second stage: Self Forcing whose history stays noisy (Huang et al., arXiv 2512.04677).

Two things differ from Self Forcing. *History* (`Layout.kept`): chunks see the keys and values of earlier chunks' calls
at the same time, never those of a clean pass, so that a stream costs K forwards a chunk instead of K + 1 and its calls
can be spread over processes (`fewstep.streaming.pipeline`). *Sink*: the student's own first chunk, read clean, seen
from a fixed distance ahead (`positions` rolling).

The paper has it both ways what calls before the drawn one see in training: the cache of their own time (its text, and
the `noisy` cache here, with which training that stops at the last step is the sampler), or that of the call at which
rollouts stop (its algorithm 1, `kept` last).

How it differs from the paper: text to video instead of speech to video, so there is no given picture that the sink
takes the place of; the sink is a whole chunk (there one latent frame), seen from the second chunk on (released: from
the fifth); its distance is constant (released: drawn anew in every call); the window is exact (there of 4 chunks with
the current one); sampling renoises as training does (released: Euler, after training that renoises; `eta` 1 is Euler in
both). Its first stage is diffusion forcing, `causal-init --source data`, without motion frames.

Costs per sample and iteration: 11.5 expected forwards of whole videos at K = 4, guided, with five critic updates; the
sink's one chunk is not counted.

Signs of failure: those of Self Forcing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fewstep.attention.layout import Kept, Positions
from fewstep.methods.self_forcing import SelfForcing, SelfForcingOptions


@dataclass(frozen=True)
class LiveAvatarOptions(SelfForcingOptions):
    """Settings of Live Avatar: those of Self Forcing, with its own defaults."""

    sink: int = 1
    """First chunks that are never forgotten, 0 or 1 with a noisy cache (paper: 1 frame)."""
    window: int | None = 3
    """Finished chunks before the current one that are remembered (released: 3)."""
    positions: Positions = "rolling"
    """Rotary time of a frame: `rolling` (published), `slot` or `absolute`; see `Layout`."""
    kept: Kept = "noisy"
    """What is kept of a finished chunk: `noisy` (the paper's text), `last` (its algorithm 1), or `clean` (Self
    Forcing); see `Layout`."""

    def build(self) -> LiveAvatar:
        """The method with these settings."""
        return LiveAvatar(self)


class LiveAvatar(SelfForcing):
    """Distribution matching of the student's own videos over a noisy history; see the module."""

    name: ClassVar[str] = "live-avatar"
    title: ClassVar[str] = "Live Avatar"
    paper: ClassVar[str] = "arXiv 2512.04677"


def live_avatar() -> LiveAvatarOptions:
    """DMD over noisy histories, a clean sink ahead, chunks of 3 latent frames (published)."""
    return LiveAvatarOptions()
