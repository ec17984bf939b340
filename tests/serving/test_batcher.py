"""The batcher without HTTP: who is drawn with whom, and that nothing is lost."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Awaitable, Callable, Sequence

import pytest

from fewstep.serving.batcher import Batcher, BatchFailed, Closing, QueueFull


class Easel:
    """Draws strings; waits at the gate, remembers its batches, fails for the prompt "bad"."""

    def __init__(self, *, shut: bool = False) -> None:
        self.batches: list[tuple[list[str], list[int], int]] = []
        self.entered, self.gate = threading.Semaphore(0), threading.Event()
        if not shut:
            self.gate.set()

    def __call__(self, prompts: Sequence[str], seeds: Sequence[int], kind: int) -> list[str]:
        self.batches.append((list(prompts), list(seeds), kind))
        self.entered.release()
        assert self.gate.wait(10)
        if "bad" in prompts:
            raise ValueError("no such thing")
        return [f"{prompt} {seed} {kind}" for prompt, seed in zip(prompts, seeds, strict=True)]


def drive(batcher: Batcher[int, str], work: Callable[[], Awaitable[None]]) -> None:
    """Run `work` beside the batcher, then close it and see it end."""

    async def both() -> None:
        drawing = asyncio.create_task(batcher.run())
        await work()
        batcher.close()
        await asyncio.wait_for(drawing, 10)

    asyncio.run(both())


async def first_batch(easel: Easel) -> None:
    """Until the worker has begun a batch."""
    assert await asyncio.to_thread(easel.entered.acquire, timeout=10)


def test_what_waits_is_drawn_together_oldest_first_and_only_with_its_kind() -> None:
    easel = Easel(shut=True)
    batcher = Batcher(easel, largest=3, queue=100)

    async def work() -> None:
        tasks = [asyncio.create_task(batcher.submit("a", [0], 4))]
        await first_batch(easel)
        for prompt, kind in (("b", 4), ("c", 1), ("d", 4), ("e", 4), ("f", 4), ("g", 1)):
            tasks.append(asyncio.create_task(batcher.submit(prompt, [7], kind)))
        await asyncio.sleep(0)
        assert batcher.waiting == 6
        easel.gate.set()
        made = [await task for task in tasks]
        assert made == [["a 0 4"], ["b 7 4"], ["c 7 1"], ["d 7 4"], ["e 7 4"], ["f 7 4"], ["g 7 1"]]

    drive(batcher, work)
    assert [(prompts, kind) for prompts, _, kind in easel.batches] == [
        (["a"], 4), (["b", "d", "e"], 4), (["c", "g"], 1), (["f"], 4),
    ]  # fmt: skip


def test_a_request_larger_than_a_batch_comes_back_in_order() -> None:
    easel = Easel()
    batcher = Batcher(easel, largest=4, queue=100)

    async def work() -> None:
        assert await batcher.submit("x", range(10), 1) == [f"x {seed} 1" for seed in range(10)]

    drive(batcher, work)
    assert [len(prompts) for prompts, _, _ in easel.batches] == [4, 4, 2]


def test_a_full_queue_refuses_the_whole_request() -> None:
    easel = Easel(shut=True)
    batcher = Batcher(easel, largest=1, queue=3)

    async def work() -> None:
        running = asyncio.create_task(batcher.submit("a", [0], 1))
        await first_batch(easel)
        waiting = asyncio.create_task(batcher.submit("b", [0, 1], 1))
        await asyncio.sleep(0)
        with pytest.raises(QueueFull):
            await batcher.submit("c", [0, 1], 1)
        assert batcher.waiting == 2
        fits = asyncio.create_task(batcher.submit("d", [0], 1))
        await asyncio.sleep(0)
        easel.gate.set()
        assert [len(await task) for task in (running, waiting, fits)] == [1, 2, 1]

    drive(batcher, work)


def test_a_cancelled_request_leaves_the_queue_undrawn() -> None:
    easel = Easel(shut=True)
    batcher = Batcher(easel, largest=8, queue=8)

    async def work() -> None:
        running = asyncio.create_task(batcher.submit("a", [0], 1))
        await first_batch(easel)
        waiting = asyncio.create_task(batcher.submit("b", [0, 1], 1))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert batcher.waiting == 0
        easel.gate.set()
        assert await running == ["a 0 1"]

    drive(batcher, work)
    assert [prompts for prompts, _, _ in easel.batches] == [["a"]]


def test_a_failing_batch_fails_its_own_requests_and_no_others() -> None:
    easel = Easel(shut=True)
    told: list[tuple[int, bool]] = []
    batcher = Batcher(easel, largest=8, queue=8, observe=lambda size, _, failed: told.append((size, failed)))

    async def work() -> None:
        tasks = [asyncio.create_task(batcher.submit("first", [0], 1))]
        await first_batch(easel)
        for prompt, kind in (("bad", 4), ("beside", 4), ("other", 1)):
            tasks.append(asyncio.create_task(batcher.submit(prompt, [0, 1], kind)))
        await asyncio.sleep(0)
        easel.gate.set()
        made = await asyncio.gather(*tasks, return_exceptions=True)
        assert made[0] == ["first 0 1"]
        assert isinstance(made[1], BatchFailed)
        assert isinstance(made[2], BatchFailed)
        assert made[3] == ["other 0 1", "other 1 1"]
        assert await batcher.submit("later", [5], 4) == ["later 5 4"]

    drive(batcher, work)
    assert told == [(1, False), (4, True), (2, False), (1, False)]


def test_closing_finishes_what_was_taken_and_takes_no_more() -> None:
    easel = Easel(shut=True)
    batcher = Batcher(easel, largest=1, queue=8)

    async def work() -> None:
        tasks = [asyncio.create_task(batcher.submit("a", [seed], 1)) for seed in range(4)]
        await first_batch(easel)
        batcher.close()
        assert not batcher.accepting
        with pytest.raises(Closing):
            await batcher.submit("b", [0], 1)
        easel.gate.set()
        assert [await task for task in tasks] == [[f"a {seed} 1"] for seed in range(4)]

    drive(batcher, work)


def test_lingering_collects_company_and_ends_when_the_batch_is_full() -> None:
    easel = Easel()
    batcher = Batcher(easel, largest=3, queue=8, linger=3600)

    async def work() -> None:
        tasks = []
        for seed in range(3):
            tasks.append(asyncio.create_task(batcher.submit("a", [seed], 1)))
            await asyncio.sleep(0.01)
        assert [await asyncio.wait_for(task, 10) for task in tasks] == [[f"a {seed} 1"] for seed in range(3)]

    drive(batcher, work)
    assert [seeds for _, seeds, _ in easel.batches] == [[0, 1, 2]]


def test_a_lonely_picture_goes_when_it_has_lingered() -> None:
    easel = Easel()
    batcher = Batcher(easel, largest=3, queue=8, linger=0.02)

    async def work() -> None:
        assert await asyncio.wait_for(batcher.submit("a", [0], 1), 10) == ["a 0 1"]

    drive(batcher, work)


def test_nothing_is_lost_or_mixed_up_among_many() -> None:
    easel = Easel()
    batcher = Batcher(easel, largest=7, queue=2000, linger=0.001)
    dice = random.Random(0)
    asked = [(f"p{n}", [n * 10 + k for k in range(dice.randint(1, 5))], dice.choice([1, 2, 4])) for n in range(300)]

    async def one(prompt: str, seeds: list[int], kind: int) -> None:
        await asyncio.sleep(dice.random() * 0.05)
        assert await batcher.submit(prompt, seeds, kind) == [f"{prompt} {seed} {kind}" for seed in seeds]

    async def work() -> None:
        await asyncio.gather(*(one(*request) for request in asked))

    drive(batcher, work)
    assert sum(len(prompts) for prompts, _, _ in easel.batches) == sum(len(seeds) for _, seeds, _ in asked)
    assert max(len(prompts) for prompts, _, _ in easel.batches) <= 7
