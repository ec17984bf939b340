"""Dynamic batching: pictures that wait are drawn together, as many as agree, oldest first."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

log = logging.getLogger("fewstep.serving")

Kind = TypeVar("Kind", bound=Hashable)
"""What pictures have to agree in to be drawn in one batch."""
Made = TypeVar("Made")

Draw = Callable[[Sequence[str], Sequence[int], Kind], Sequence[Made]]
"""draw(prompts, seeds, kind) -> one result per prompt; runs in the worker's thread."""


class QueueFull(Exception):
    """As many pictures wait as may; `seconds` is a guess when there will be room."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"the queue is full for about {seconds:.1f} s")
        self.seconds = seconds


class Closing(Exception):
    """The batcher takes no more work."""


class BatchFailed(Exception):
    """Drawing the batch raised an error, which the log has."""


@dataclass(eq=False)
class _Ticket:
    """One picture that waits or is being drawn."""

    prompt: str
    seed: int
    kind: Any
    arrived: float
    result: asyncio.Future[Any]


class Batcher(Generic[Kind, Made]):
    """A queue of pictures and the one thread that draws them.

    While a batch is drawn, others wait; when it is done, the oldest goes next with all that agree with it. `submit` and
    `run` belong to one event loop, which drawing never blocks.

    Args:
        draw: draws a batch. What it raises is told to the requests of that batch alone.
        largest: pictures in a batch, 1 or more.
        queue: pictures that may wait, 1 or more; those being drawn do not count.
        linger: seconds that a picture which finds nobody waiting waits for company; 0 for none.
        observe: told the size of each finished batch, its seconds, and whether it failed.
    """

    def __init__(
        self,
        draw: Draw[Kind, Made],
        *,
        largest: int,
        queue: int,
        linger: float = 0.0,
        observe: Callable[[int, float, bool], None] = lambda size, seconds, failed: None,
    ) -> None:
        self._draw, self._observe = draw, observe
        self.largest, self.queue, self.linger = largest, queue, linger
        self._waiting: dict[_Ticket, None] = {}  # in order of arrival
        self._news = asyncio.Event()
        self._closing = False
        self._seconds = 0.0  # of the latest batch

    @property
    def waiting(self) -> int:
        """Pictures that wait to be drawn."""
        return len(self._waiting)

    @property
    def accepting(self) -> bool:
        """Whether `submit` takes work."""
        return not self._closing

    async def submit(self, prompt: str, seeds: Sequence[int], kind: Kind) -> list[Made]:
        """Pictures of `prompt`, one per seed; cancelling it takes from the queue what is not being drawn yet.

        Raises:
            QueueFull: not all of them may wait.
            Closing: `close` was called.
            BatchFailed: one of them could not be drawn.
        """
        if self._closing:
            raise Closing("shutting down")
        if len(self._waiting) + len(seeds) > self.queue:
            raise QueueFull(len(self._waiting) / self.largest * self._seconds)
        loop = asyncio.get_running_loop()
        tickets = [_Ticket(prompt, seed, kind, loop.time(), loop.create_future()) for seed in seeds]
        self._waiting.update(dict.fromkeys(tickets))
        self._news.set()
        try:
            return await asyncio.gather(*(ticket.result for ticket in tickets))
        finally:
            for ticket in tickets:
                self._waiting.pop(ticket, None)
                ticket.result.cancel()

    async def run(self) -> None:
        """Draw until `close` was called and nothing waits."""
        with ThreadPoolExecutor(1, "fewstep-draw") as worker:
            while self._waiting or not self._closing:
                batch = await self._next()
                if batch:
                    await self._make(batch, worker)

    def close(self) -> None:
        """Take no more work; `run` returns when all that was taken is done."""
        self._closing = True
        self._news.set()

    async def _next(self) -> list[_Ticket]:
        """The next batch, out of the queue; empty if there is nothing, or nothing any more."""
        loop = asyncio.get_running_loop()
        while True:
            oldest = next(iter(self._waiting), None)
            batch = [ticket for ticket in self._waiting if oldest and ticket.kind == oldest.kind][: self.largest]
            left = oldest.arrived + self.linger - loop.time() if oldest else None
            if self._closing or len(batch) == self.largest or (left is not None and left <= 0):
                break
            self._news.clear()
            try:
                await asyncio.wait_for(self._news.wait(), left)
            except asyncio.TimeoutError:
                continue  # nobody came
        for ticket in batch:
            del self._waiting[ticket]
        return batch

    async def _make(self, batch: list[_Ticket], worker: ThreadPoolExecutor) -> None:
        loop = asyncio.get_running_loop()
        started = loop.time()
        prompts, seeds = [ticket.prompt for ticket in batch], [ticket.seed for ticket in batch]
        failure: Exception | None = None
        made: Sequence[Made] = ()
        try:
            made = await loop.run_in_executor(worker, self._draw, prompts, seeds, batch[0].kind)
            if len(made) != len(batch):
                raise RuntimeError(f"found {len(made)} results for {len(batch)} pictures")
        except Exception as error:  # whatever it is, the server lives on
            log.exception("a batch of %d failed", len(batch))
            failure = BatchFailed(f"{type(error).__name__} while drawing a batch of {len(batch)}")
        self._seconds = loop.time() - started
        self._observe(len(batch), self._seconds, failure is not None)
        for place, ticket in enumerate(batch):
            if ticket.result.done():
                continue  # nobody waits for it any more
            if failure is None:
                ticket.result.set_result(made[place])
            else:
                ticket.result.set_exception(failure)
