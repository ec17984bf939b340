"""EMA-Sink. R numbers are those of the card reward_forcing.md, section 8."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import pytest
import torch
from tiny_causal import GRID, PROCESS, TinyWan
from torch import Tensor

from fewstep.attention import CachedMemory, Layout
from fewstep.streaming import stream

EXACT = {"rtol": 0.0, "atol": 1e-12}


def chunks(wan: TinyWan, layout: Layout, count: int = 7) -> Tensor:
    made = stream(wan.memory(layout), wan.noise(layout), GRID, PROCESS)
    return torch.cat([chunk for _, chunk in zip(range(count), made, strict=False)], 2)


class InputAsKeys:
    """A seat whose only layer has its input as keys and values."""

    context: Any = None

    @contextmanager
    def within(self, context: Any) -> Iterator[None]:
        self.context = context
        yield

    def student(self, x: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
        self.context.made[0] = x, 2 * x
        return x


def remembering(layout: Layout, given: Tensor) -> CachedMemory:
    """After the chunks `given` (m, ...)."""
    seat = InputAsKeys()
    memory = CachedMemory(seat.student, seat, layout, {})  # type: ignore[arg-type]
    for chunk in given:
        memory.remember(chunk)
    return memory


def test_a_decay_of_one_is_the_static_sink(wan: TinyWan) -> None:
    """R1: the limit from below, and 1 itself, which does not blend at all."""
    static = chunks(wan, Layout(1, 1, 1))
    torch.testing.assert_close(chunks(wan, Layout(1, 1, 1, sink_decay=1 - 1e-15)), static, rtol=0, atol=1e-9)
    assert (chunks(wan, Layout(1, 1, 1, sink_decay=0.9)) - static)[:, :, 3:].abs().max() > 1e-3


def test_a_decay_of_zero_is_a_window_one_longer(wan: TinyWan) -> None:
    """R2."""
    blended = chunks(wan, Layout(1, 1, 2, sink_decay=0.0))
    torch.testing.assert_close(blended, chunks(wan, Layout(1, 0, 3)), **EXACT)


def test_closed_form() -> None:
    """R3: S = a^m S0 + (1 - a) sum a^(m-k) K of the chunks that left, for keys and values."""
    given = torch.randn(9, 1, 3, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    decay, window = 0.8, 2
    memory = remembering(Layout(3, 1, window, sink_decay=decay), given)
    left = given[1 : len(given) - window]
    powers = decay ** torch.arange(len(left) - 1, -1, -1, dtype=torch.float64)
    wanted = decay ** len(left) * given[0] + (1 - decay) * torch.einsum("m,m...->...", powers, left)
    key, value = memory.chunks[0].layers[0]
    torch.testing.assert_close(key, wanted, rtol=0, atol=1e-14)
    torch.testing.assert_close(value, 2 * wanted, rtol=0, atol=1e-14)
    assert [chunk.number for chunk in memory.chunks] == [0, 7, 8]


def test_before_the_first_chunk_leaves_all_memories_are_one(wan: TinyWan) -> None:
    """R4: with a window of 2, up to the fourth chunk."""
    blended, static, full = (
        chunks(wan, layout, 5) for layout in (Layout(1, 1, 2, sink_decay=0.5), Layout(1, 1, 2), Layout(1))
    )
    assert torch.equal(blended[:, :, :4], static[:, :, :4])
    torch.testing.assert_close(static[:, :, :4], full[:, :, :4], **EXACT)
    assert (blended - static)[:, :, 4].abs().max() > 1e-3


def test_the_sink_moves_once_a_chunk_and_takes_clean_chunks(wan: TinyWan) -> None:
    """R5: denoising calls leave the memory as it is; what is blended is what a pass at t = 0 made."""
    memory = wan.memory(Layout(1, 1, 1, sink_decay=0.5))
    for seed in range(2):
        memory.remember(wan.video(1, seed))
    leaving, sink = memory.chunks[1].layers[0][0], memory.chunks[0].layers[0][0]
    for step in GRID[:-1]:
        memory.denoise(wan.video(1, 5), step.expand(2))
        assert memory.chunks[0].layers[0][0] is sink
    memory.remember(wan.video(1, 2))
    torch.testing.assert_close(memory.chunks[0].layers[0][0], (sink + leaving) / 2, **EXACT)


def test_a_long_stream_is_bounded() -> None:
    """R6: over 200 chunks bytes, frames seen, rotary times and forwards are constant once the window is full."""
    wan, layout = TinyWan(), Layout(1, 1, 1, sink_decay=0.9)
    memory, sizes, seen = wan.memory(layout), [], []
    for made in islice(stream(memory, wan.noise(layout), GRID, PROCESS), 200):
        assert made.isfinite().all()
        sizes.append(memory.bytes)
        seen.append(memory.seen_frames)
        assert max(memory._context._times) < 3
    assert seen == [1, 2, *[3] * 198]
    assert len(set(sizes[2:])) == 1
    assert wan.frames == [1] * (200 * 3 + 199)


@pytest.mark.parametrize("decay", [0.99, 0.999])
def test_a_bfloat16_memory_has_a_float32_sink(decay: float) -> None:
    """R7: after 100 chunks have left it has moved as it should, within 5 %; blended in bfloat16 it hardly had."""
    given = torch.randn(102, 1, 1, 64, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    moved = remembering(Layout(1, 1, 1, sink_decay=decay), given).chunks[0].layers[0][0].double() - given[0]
    exact = remembering(Layout(1, 1, 1, sink_decay=decay), given.double()).chunks[0].layers[0][0] - given[0]
    assert (moved - exact).norm() / exact.norm() < 0.05
    rounded = given[0]
    for chunk in given[1:101]:
        rounded = decay * rounded + (1 - decay) * chunk
    off = ((rounded - given[0]).double() - exact).norm() / exact.norm()
    assert off > (0.5 if decay == 0.999 else 0.01)
