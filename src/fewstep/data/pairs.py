"""Pairs of noise and what the teacher's own sampler makes of it, for the regression of DMD's first version."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fewstep.core.tensors import Condition
from fewstep.data.film_clips import FilmClips
from fewstep.data.prompts import shuffled

_CHUNK = 16


class PairSampler(Protocol):
    """What pairs need of a teacher: `fewstep.models.teacher.Teacher` has it."""

    def noise(self, seeds: Sequence[int]) -> Tensor: ...

    def latents(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        steps: int | None = None,
        *,
        guidance_scale: float | None,
        **told: Any,
    ) -> Tensor: ...

    def encode(self, prompts: Sequence[str], **told: Any) -> Condition: ...


class TeacherPairs:
    """Shuffled passes over `count` pairs, made when they are first needed and kept in memory.

    Pair n has noise of seed n and the n-th prompt; they are made in chunks of 16 that depend on n only, so a resumed
    run makes the same ones. Each costs `steps` guided teacher steps (DMD: 100k to 500k pairs of 18 to 256 steps).

    Args:
        teacher: makes them.
        prompts: texts, used in turn.
        count: how many different pairs.
        steps: teacher steps; the teacher's own number unless told.
        guidance_scale: of the teacher, 1 means none.
        motion_guidance: of the teacher, 0 means none; for prompts that are `FilmClips`.
        seed: of the order in which pairs are used.
    """

    def __init__(
        self,
        teacher: PairSampler,
        prompts: Sequence[str],
        count: int = 1024,
        *,
        steps: int | None = None,
        guidance_scale: float | None = None,
        motion_guidance: float = 0.0,
        seed: int = 0,
    ) -> None:
        self._teacher, self._prompts, self.count = teacher, prompts, count
        self._motion = {"motion_guidance": motion_guidance} if motion_guidance else {}
        self._steps, self._guidance_scale, self._seed = steps, guidance_scale, seed
        self._chunks: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, iteration: int, samples: Tensor) -> tuple[Tensor, Tensor, Condition]:
        """Noise (B, ...), the teacher's samples (B, ...) and conditions of global sample numbers (B,)."""
        pairs = [shuffled(int(n), self.count, (self._seed, 9)) for n in samples]
        noise, made = (torch.stack(parts) for parts in zip(*(self._pair(n) for n in pairs), strict=True))
        return noise, made, self._teacher.encode([self._prompt(n) for n in pairs], **self._told(pairs))

    def _prompt(self, pair: int) -> str:
        return self._prompts[pair % len(self._prompts)]

    def _pair(self, pair: int) -> tuple[Tensor, Tensor]:
        chunk, place = divmod(pair, _CHUNK)
        if chunk not in self._chunks:
            seeds = range(chunk * _CHUNK, min((chunk + 1) * _CHUNK, self.count))
            self._chunks[chunk] = self._make([self._prompt(seed) for seed in seeds], seeds)
        noise, made = self._chunks[chunk]
        return noise[place], made[place]

    def _told(self, pairs: Sequence[int]) -> dict[str, Any]:
        """Tracks and drives of pairs, where the prompts have them."""
        clips = self._prompts
        if not isinstance(clips, FilmClips):
            return {}
        return clips.told([n % len(clips) for n in pairs], self._teacher.noise([0]).shape[2])

    def _make(self, prompts: list[str], seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
        told = self._motion | self._told(seeds)
        made = self._teacher.latents(prompts, seeds, self._steps, guidance_scale=self._guidance_scale, **told)
        return self._teacher.noise(seeds), made


class StateSampler(PairSampler, Protocol):
    """What trajectories need of a teacher: `fewstep.models.teacher.Teacher` has it."""

    def states(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        grid: Tensor,
        keep: Tensor,
        guidance_scale: float,
        **told: Any,
    ) -> tuple[Tensor, Tensor]: ...


class TeacherTrajectories(TeacherPairs):
    """Pairs with more of the teacher's path than its noise: its states (B, K, ...) at a student's K times.

    Args:
        teacher: makes them.
        prompts: texts, used in turn.
        count: how many different ones (CausVid 1,000, Self Forcing 16,000); each costs a guided sampling.
        grid: (steps + 1,) times of the teacher's sampler.
        keep: (K,) times on it at which states are kept.
        guidance_scale: of the teacher, 1 means none.
        motion_guidance: of the teacher, 0 means none; for prompts that are `FilmClips`.
        seed: of the order in which they are used.
    """

    def __init__(
        self,
        teacher: StateSampler,
        prompts: Sequence[str],
        count: int = 1024,
        *,
        grid: Tensor,
        keep: Tensor,
        guidance_scale: float,
        motion_guidance: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            teacher, prompts, count, guidance_scale=guidance_scale, motion_guidance=motion_guidance, seed=seed
        )
        self._sampler, self._grid, self._keep, self._scale = teacher, grid, keep, guidance_scale

    def _make(self, prompts: list[str], seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
        told = self._motion | self._told(seeds)
        return self._sampler.states(prompts, seeds, self._grid, self._keep, self._scale, **told)
