"""A stream made by several processes, each with some of the student's calls (timestep forcing, arXiv 2512.04677).

With a noisy cache, call j of chunk i needs that chunk after its call j - 1 and what calls j left of earlier chunks,
which is in the process that makes calls j. So chunks go down a chain of processes like pieces down an assembly line:
only latents and a word about the next chunk travel, memories stay. One process alone walks the same code and makes the
same film to the bit, whatever the order in which others finish.

What a chunk's prompt is, and whether there is another chunk, the first process decides when it begins one; the rest
hear it with the chunk, so that a prompt changed in mid-stream holds for whole chunks, everywhere.

The first chunk becomes the sink once it is finished. The last of the denoising processes then sends it to the others,
which wait: one drain of the chain.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from fewstep.core.process import Process
from fewstep.errors import FewstepError
from fewstep.streaming.rollout import ChunkNoise, Memory, called
from fewstep.training.parallel import Group


class StreamMemory(Memory, Protocol):
    """A memory that says what it needs of a finished chunk; see `fewstep.attention.NoisyMemory`."""

    @property
    def awaits(self) -> bool:
        """Whether `remember` looks at the next chunk once it is finished."""
        ...


@dataclass(frozen=True)
class Order:
    """What the first process says of the next chunk."""

    go: bool = True
    """Whether there is one; if not, the chain ends."""
    prompt: str = ""
    """What is told from this chunk on; empty: as before."""


def shares(steps: int, processes: int) -> list[range]:
    """The calls of each process, in the order of the chain; an empty range only decodes.

    Up to `steps` processes share the calls evenly, earlier ones making one more, and the last also decodes. One more
    than `steps` is a decoder of its own.

    Raises:
        FewstepError: more processes than there is work for.
    """
    if not 1 <= processes <= steps + 1:
        raise FewstepError(
            f"found {processes} processes for a student of {steps} calls, expected 1 to {steps + 1} (one for each call "
            "and one that decodes), fix: change --nproc_per_node"
        )
    denoising = min(processes, steps)
    ends = [-(-steps * place // denoising) for place in range(denoising + 1)]
    made = [range(*pair) for pair in zip(ends, ends[1:], strict=False)]
    return made + [range(steps, steps)] * (processes - denoising)


class Chain:
    """The processes of a chain, from one of them. With a single one nothing travels.

    Args:
        group: all of them.
        denoising: how many of them make calls, the first ones.
        device: where what travels is.
    """

    def __init__(self, group: Group, denoising: int, device: torch.device) -> None:
        self._group, self._denoising, self._device = group, denoising, device
        self._sent: list[tuple[dist.Work, Tensor]] = []

    @property
    def first(self) -> bool:
        return self._group.rank == 0

    @property
    def last(self) -> bool:
        return self._group.rank == self._group.size - 1

    def hear(self) -> Order:
        """The order of the next chunk, from the process before."""
        head = torch.empty(2, dtype=torch.long, device=self._device)
        self._receive(head)
        go, length = head.tolist()
        text = torch.empty(length, dtype=torch.uint8, device=self._device)
        if length:
            self._receive(text)
        return Order(bool(go), bytes(text.tolist()).decode())

    def take(self, like: Tensor) -> Tensor:
        """The chunk that the process before is done with, of the shape of `like`."""
        x = torch.empty_like(like)
        self._receive(x)
        return x

    def give(self, order: Order, x: Tensor | None) -> None:
        """Passes an order on, and the chunk; returns at once, so that one of them may wait for the next process."""
        self.close()
        text = order.prompt.encode()
        self._send(torch.tensor([int(order.go), len(text)], device=self._device))
        if text:
            self._send(torch.tensor(list(text), dtype=torch.uint8, device=self._device))
        if x is not None:
            self._send(x)

    def close(self) -> None:
        """Returns when the next process has all that was sent."""
        for work, _ in self._sent:
            work.wait()
        self._sent.clear()

    def finished(self, x: Tensor) -> Tensor:
        """The chunk as the last denoising process has made it, in all that denoise; `x` is this process's own."""
        source = self._denoising - 1
        if self._group.rank != source:
            x = torch.empty_like(x)
            dist.recv(x, source)
            return x
        for other in range(source):
            dist.send(x.contiguous(), other)
        return x

    def _send(self, x: Tensor) -> None:
        x = x.contiguous()
        work = dist.isend(x, self._group.rank + 1)
        assert work is not None
        self._sent.append((work, x))

    def _receive(self, x: Tensor) -> None:
        dist.recv(x, self._group.rank - 1)


@torch.no_grad()
def run_chain(
    memory: StreamMemory,
    noise: ChunkNoise,
    grid: Tensor,
    process: Process,
    group: Group,
    *,
    orders: Callable[[int], Order],
    tell: Callable[[str], None],
    deliver: Callable[[Tensor], None],
    begun: Callable[[], None] | None = None,
    eta: float = 0.0,
) -> int:
    """This process's part of a stream; every process of `group` calls this. How many chunks there were.

    Args:
        memory: of the student, empty. Each process has its own, and only its own calls are in it; one that reads every
            finished chunk (`kept` clean) makes the chain wait for each, so that nothing is gained.
        noise: see `ChunkNoise`; the same numbers in every process.
        grid: (K + 1,) the student's times.
        process: the noising process.
        group: the processes, K + 1 of them at most (`shares`).
        orders: orders(chunk), asked in the first process when it begins a chunk.
        tell: tell(prompt), called in every process before it makes a chunk with a new prompt.
        deliver: deliver(chunk (B, C, n, ...)), called in the last process with finished chunks in order.
        begun: called in every process when it begins a chunk, after `tell`, such as to steer its memory, and has to say
            the same in all of them: what is only known to one of them does not travel.
        eta: as of `stream`.

    Raises:
        FewstepError: more processes than there is work for.
    """
    parts = shares(len(grid) - 1, group.size)
    calls, denoising = parts[group.rank], sum(bool(part) for part in parts)
    like = noise(0, 0)
    chain = Chain(group, denoising, like.device)
    for chunk in count():
        order = orders(chunk) if chain.first else chain.hear()
        if not order.go:
            if not chain.last:
                chain.give(order, None)
                chain.close()
            return chunk
        if order.prompt:
            tell(order.prompt)
        if begun is not None:
            begun()
        x = noise(chunk, 0) * process.noise_scale if chain.first else chain.take(like)
        if calls:
            x = called(memory, x, chunk, calls, noise, grid, process, eta=eta)
        if not chain.last:
            chain.give(order, x)
        if calls:
            memory.remember(chain.finished(x) if memory.awaits else x)
        if chain.last:
            deliver(x)
    raise AssertionError("chunks are counted without end")
