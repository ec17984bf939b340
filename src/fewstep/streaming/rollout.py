"""Videos made chunk by chunk by a few-step student that remembers what it has made (card self_forcing.md, 3b).

Every chunk begins as pure noise, is denoised in the student's K steps while the memory holds the chunks before it, and
is then remembered. `stream` does that without end. `CausalPath` is what training sees of it: every chunk stops at one
drawn step, what that step predicts is the chunk, and it alone carries gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fewstep.attention.layout import FRAMES
from fewstep.core.guidance import Denoiser
from fewstep.core.process import Process
from fewstep.core.rollout import DrawnPath, Landing, Path
from fewstep.core.solvers import Noise, ddim
from fewstep.core.tensors import Condition

ChunkNoise = Callable[[int, int], Tensor]
"""noise(chunk, k) -> standard normal (B, C, n, ...): k = 0 is what a chunk begins with, k is new after its k-th call.

A function of its arguments alone: chunks can then be made again, and in other processes.
"""


class Memory(Protocol):
    """A causal student with what it knows of its video; see `fewstep.attention.CachedMemory`."""

    def denoise(self, x: Tensor, t: Tensor) -> Tensor:
        """The next chunk (B, C, n, ...) at `t` (B,) -> denoised."""
        ...

    def remember(self, x: Tensor) -> None:
        """The next chunk is finished and is this."""
        ...

    def snapshot(self) -> Memory:
        """This memory as it is now."""
        ...


@torch.no_grad()
def stream(
    memory: Memory,
    noise: ChunkNoise,
    grid: Tensor,
    process: Process,
    *,
    eta: float = 0.0,
    begun: Callable[[], None] | None = None,
) -> Iterator[Tensor]:
    """Chunks (B, C, n, ...), one after the other, without end; K + 1 forwards of n frames each, K with a noisy cache.

    A chunk is handed out before it is remembered, so a prompt that `memory` is told in between also holds for what is
    remembered of that chunk.

    Args:
        memory: of the student; empty, or of a video that goes on.
        noise: see `ChunkNoise`; chunks are counted from 0 in this call.
        grid: (K + 1,) the student's times.
        process: the noising process.
        eta: share of its own noise that a step keeps: 0 is new noise at every step (Self Forcing), 1 none.
        begun: called when a chunk is begun, such as to steer it (`fewstep.attention.CachedMemory.steer`).
    """
    for chunk in count():
        if begun is not None:
            begun()
        first = noise(chunk, 0) * process.noise_scale
        x = called(memory, first, chunk, range(len(grid) - 1), noise, grid, process, eta=eta)
        yield x
        memory.remember(x)


def called(
    memory: Memory,
    x: Tensor,
    chunk: int,
    calls: range,
    noise: ChunkNoise,
    grid: Tensor,
    process: Process,
    *,
    eta: float,
) -> Tensor:
    """A chunk (B, C, n, ...) at the time of the first of `calls`, after these; the rest is as of `stream`."""
    times, fresh = grid[calls.start : calls.stop + 1], _fresh(noise, chunk, calls.start)
    return ddim(_denoiser(memory), x, times, process, {}, eta=eta, noise=fresh)


class CausalPath(DrawnPath):
    """A video that stops at one step of every chunk, seen by a method as a path of one call that lands on clean data.

    The video is made once, when it is first asked for, without gradient: for L chunks and the exit e (0 to K-1), L (e +
    1) + L - 1 forwards of a chunk (with a noisy cache, one instead of L - 1, which reads its sink). `land` repeats the
    last of each chunk's calls with gradient, within the memory that the chunk had: L forwards more, none of the others
    again.

    Args:
        memory: of the student, empty.
        noise: see `ChunkNoise`.
        chunks: L.
        grid: (K + 1,) the student's times.
        process: the noising process.
        condition: what critic and teacher are told.
        exit_call: e, for all chunks and samples.
        eta: as of `stream`.
        recompute: forget what `land` computes, and compute it again in the backward pass, chunk by chunk.
    """

    def __init__(
        self,
        memory: Memory,
        noise: ChunkNoise,
        chunks: int,
        grid: Tensor,
        process: Process,
        condition: Condition,
        exit_call: int,
        eta: float = 0.0,
        recompute: bool = False,
    ) -> None:
        first = noise(0, 0)
        whole = torch.cat([first, *(noise(chunk, 0) for chunk in range(1, chunks))], FRAMES)
        ends = torch.stack([grid[exit_call], torch.zeros_like(grid[0])])
        super().__init__(_denoiser(memory), whole, ends, process, condition)
        self.call = torch.zeros(len(whole), dtype=torch.long)
        self.exit_call = exit_call
        self._memory, self._noise, self._chunks, self._eta_of_chunks = memory, noise, chunks, eta
        self._chunk_grid, self._recompute = grid, recompute
        self._made: list[tuple[Memory, Path]] = []

    def landing(self, call: Tensor) -> Landing:
        """The video as it was made."""
        self._walk()
        return self._joined([path.landing(self._exit) for _, path in self._made])

    def land(self, student: Denoiser, call: Tensor) -> Landing:
        """The same with gradient, through the last call of every chunk; `student` is the memory's own."""
        self._walk()
        lands = [partial(path.land, _denoiser(memory), self._exit) for memory, path in self._made]
        if not self._recompute or not torch.is_grad_enabled():
            return self._joined([land() for land in lands])
        return self._joined([checkpoint(land, use_reentrant=False, preserve_rng_state=False) for land in lands])

    @property
    def first_and_last(self) -> tuple[Tensor, Tensor]:
        """The first and the last chunk (B, C, n, ...), without gradient."""
        self._walk()
        first, last = (self._made[place][1].landing(self._exit).denoised for place in (0, -1))
        return first, last

    @property
    def _exit(self) -> Tensor:
        return torch.full_like(self.call, self.exit_call)

    @torch.no_grad()
    def _walk(self) -> None:
        while len(self._made) < self._chunks:
            chunk = len(self._made)
            before = self._memory.snapshot()
            path = Path(
                _denoiser(self._memory),
                self._noise(chunk, 0),
                self._chunk_grid,
                self.process,
                {},
                self._eta_of_chunks,
                _fresh(self._noise, chunk),
            )
            made = path.landing(self._exit).denoised
            self._made.append((before, path))
            if len(self._made) < self._chunks:
                self._memory.remember(made)

    def _joined(self, landings: list[Landing]) -> Landing:
        """The chunks' clean predictions as one video at time 0."""
        denoised, eps = (
            torch.cat([getattr(landing, part) for landing in landings], FRAMES) for part in ("denoised", "eps_hat")
        )
        t_from = landings[0].t_from
        return Landing(denoised, denoised, eps, torch.zeros_like(t_from), t_from, self.condition)


def _fresh(noise: ChunkNoise, chunk: int, first: int = 0) -> Noise:
    """A chunk's new noise as solvers and paths ask for it, which count calls from `first`."""
    return lambda k, _: noise(chunk, first + k + 1)


def _denoiser(memory: Memory) -> Denoiser:
    """A memory's student as solvers and paths call one; the memory knows the condition."""
    return lambda x, t, _: memory.denoise(x, t)
