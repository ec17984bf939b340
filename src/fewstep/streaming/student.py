"""A saved causal student: films of the trained length, and streams without end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from fewstep.attention import CachedMemory, CausalSeat, Layout
from fewstep.attention.layout import FRAMES, Kept
from fewstep.core.streams import Streams
from fewstep.core.tensors import CONTROLS, Condition
from fewstep.errors import FewstepError
from fewstep.models.backbone import Backbone
from fewstep.models.student import Student
from fewstep.streaming.rollout import ChunkNoise, stream

Told: TypeAlias = Tensor | Iterable[Tensor]
"""Tracks or drives of a stream: of its first frames, or chunk by chunk, each asked for when that chunk is begun."""


class CausalStudent(Student):
    """A student that makes videos chunk by chunk. A seed gives noise of our own, not the stock pipeline's.

    Args:
        backbone: the pipeline around it.
        network: the student's network.
        grids: the time grid (K+1,) of its step count.
        card: what `fewstep.json` says.
        eta: share of its own noise that a step keeps.
        layout: its chunks and its memory of them.
        seat: the causal seat of `network`.
    """

    def __init__(
        self,
        backbone: Backbone,
        network: nn.Module,
        grids: dict[int, Tensor],
        card: dict[str, Any],
        eta: float,
        layout: Layout,
        seat: CausalSeat,
    ) -> None:
        super().__init__(backbone, network, grids, False, card, eta)
        self.layout, self._seat = layout, seat

    def memory(self, condition: Condition, layout: Layout | None = None) -> CachedMemory:
        """An empty memory of a video per row of `condition`, for `fewstep.streaming.stream`."""
        return self._seat.memory(self.denoise, layout or self.layout, condition)

    @torch.no_grad()
    def latents(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        steps: int | None = None,
        *,
        tracks: Tensor | None = None,
        drives: Tensor | None = None,
        solver: str = "trained",
    ) -> Tensor:
        """Latents (B, C, F, H, W) of the backbone's size; K forwards of all frames, and one to remember them
        where the cache is clean."""
        if solver != "trained":
            raise FewstepError(
                f"found solver {solver!r} for a student that makes videos chunk by chunk, expected 'trained', "
                "fix: leave it out"
            )
        chunks = self.layout.chunks(self.backbone.latent_shape[FRAMES - 1])
        made = self._chunks(prompts, seeds, steps, self.layout, tracks, drives)
        return torch.cat(list(islice(made, chunks)), FRAMES)

    def stream(
        self,
        prompts: Sequence[str] | str,
        seeds: Sequence[int] | int = 0,
        steps: int | None = None,
        *,
        sink: int | None = None,
        window: int | None = None,
        kept: Kept | None = None,
        tracks: Told | None = None,
        drives: Told | None = None,
    ) -> Iterator[Tensor]:
        """Latents of chunks (B, C, n, H, W), without end, at constant memory and cost; they begin as `latents` do.

        Args:
            prompts: one or several.
            seeds: one per prompt, or the first of consecutive ones.
            steps: network calls per chunk; the student's own unless told.
            sink: first chunks that are never forgotten, where it is not to be as trained.
            window: chunks before the current one that are remembered, likewise; has to be told where the student was
                trained to remember all.
            kept: what is kept of a finished chunk, likewise.
            tracks: of students whose teacher reads them (`Backbone.controls`), (B, F, 2) as x, y in pixels and nan
                where open; or an iterable of (B, n, 2), one for each chunk. After its end nothing is said.
            drives: likewise, (B, F) in [0, 1] or an iterable of (B, n).

        Raises:
            FewstepError: no window, or settings out of range; tracks or drives that do not fit, when they come.
        """
        layout = self.endless(sink=sink, window=window, kept=kept)
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        numbers = range(seeds, seeds + len(texts)) if isinstance(seeds, int) else seeds
        return self._chunks(texts, numbers, steps, layout, tracks, drives)

    def endless(self, **told: Any) -> Layout:
        """What a stream remembers: as trained, but for the fields of `Layout` that are told and not None.

        Raises:
            FewstepError: no window, or settings out of range.
        """
        layout = replace(self.layout, **{name: value for name, value in told.items() if value is not None})
        layout.validate()
        if layout.window is None:
            raise FewstepError(
                "found a stream of a student that remembers every chunk, expected a window, or its memory grows "
                "without end and leaves what it was trained for, fix: stream(..., sink=1, window=5)"
            )
        return layout

    def begin(
        self, prompts: Sequence[str], seeds: Sequence[int], steps: int | None, layout: Layout
    ) -> tuple[CachedMemory, ChunkNoise, Tensor]:
        """What `fewstep.streaming.stream` and `run_chain` begin with: an empty memory, noise, and the time grid.

        Raises:
            FewstepError: steps that the student was not trained for, or not a seed for each prompt.
        """
        grid = self._grid(steps)
        if len(prompts) != len(seeds):
            raise FewstepError(
                f"found {len(prompts)} prompts and {len(seeds)} seeds, expected one seed per prompt, "
                "fix: repeat the shorter"
            )
        backbone = self.backbone
        draw = Streams(0).at(0, seeds)
        shape = (backbone.latent_shape[0], layout.chunk, *backbone.latent_shape[FRAMES:])
        noise = lambda chunk, k: draw.normal(f"chunk {chunk}, {k}", shape, device=backbone.device)
        return self.memory(backbone.encode(prompts), layout), noise, grid

    def steering(
        self, memory: CachedMemory, rows: int, tracks: Told | None, drives: Told | None
    ) -> Callable[[], None] | None:
        """What `stream` and `run_chain` call when a chunk is begun, so that `memory` is told what that chunk is told.

        Args:
            memory: of `begin`.
            rows: how many films it is of.
            tracks: as of `stream`; likewise `drives`. None where both are None.

        Raises:
            FewstepError: when it is called, tracks or drives that do not fit.
        """
        if tracks is None and drives is None:
            return None
        chunk = memory.layout.chunk
        shapes = {"tracks": (rows, chunk, 2), "drives": (rows, chunk)}
        parts = {
            name: iter(() if told is None else told.split(chunk, 1) if isinstance(told, Tensor) else told)
            for name, told in (("tracks", tracks), ("drives", drives))
        }

        def begun() -> None:
            told = {name: next(part, None) for name, part in parts.items()}
            for name, value in told.items():
                if value is not None and value.shape != shapes[name]:
                    raise FewstepError(
                        f"found {name} of shape {tuple(value.shape)} for a chunk, expected {shapes[name]}, fix: a row "
                        f"for each prompt and {chunk} frames for each chunk, nan where nothing is said"
                    )
            nothing = told["tracks"] is None and told["drives"] is None
            memory.steer(None if nothing else self.backbone.controls(told["tracks"], told["drives"])[CONTROLS])

        return begun

    def _chunks(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        steps: int | None,
        layout: Layout,
        tracks: Told | None,
        drives: Told | None,
    ) -> Iterator[Tensor]:
        memory, noise, grid = self.begin(prompts, seeds, steps, layout)
        begun = self.steering(memory, len(prompts), tracks, drives)
        return stream(memory, noise, grid, self.backbone.process, eta=self.eta, begun=begun)
