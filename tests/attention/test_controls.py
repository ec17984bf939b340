"""What frames are told, chunk by chunk. M numbers are those of the card motionstream.md, section 8.

M1 to M4 and M10 without controls are V1 to V8 and V13 in test_causal.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice

import pytest
import torch
from tiny_causal import CHANNELS, GRID, PROCESS, ROWS, SIDE, TinyWan
from torch import Tensor

from fewstep.attention import CachedMemory, Layout, NoisyMemory
from fewstep.attention.layout import Kept
from fewstep.core.streams import Streams
from fewstep.core.tensors import CONTROLS
from fewstep.streaming import CausalPath, stream

EXACT = {"rtol": 0.0, "atol": 1e-12}
CHUNKS = 5
LAYOUTS = [Layout(2, sink=1, window=1), Layout(2, sink=1, window=2, positions="absolute"), Layout(1, window=1)]


def controls(frames: int, seed: int = 0) -> Tensor:
    return Streams(seed).at(2, range(ROWS)).normal("controls", (CHANNELS, frames, SIDE, SIDE), torch.float64)


def steered(wan: TinyWan, x: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
    """The tiny network, fed what frames are told."""
    return wan.student(x + 0.5 * condition.get(CONTROLS, torch.zeros_like(x)), t, condition)


def memory(wan: TinyWan, layout: Layout, told: Tensor | None) -> CachedMemory:
    condition = wan.condition if told is None else wan.condition | {CONTROLS: told}
    return wan.seat.memory(lambda x, t, c: steered(wan, x, t, c), layout, condition)


def steered_stream(wan: TinyWan, held: CachedMemory, steer: Callable[[], Tensor | None]) -> Iterator[Tensor]:
    return stream(held, wan.noise(held.layout), GRID, PROCESS, begun=lambda: held.steer(steer()))


def chunks(
    wan: TinyWan, layout: Layout, told: Tensor | None, steer: Callable[[], Tensor | None] = lambda: None
) -> Tensor:
    return torch.cat(list(islice(steered_stream(wan, memory(wan, layout, told), steer), CHUNKS)), 2)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("exit_call", [0, 2])
def test_a_rollout_told_chunk_by_chunk_is_one_forward_told_all(wan: TinyWan, layout: Layout, exit_call: int) -> None:
    """M1 with controls: every chunk was told its own frames, while it was made and when it was remembered."""
    told = controls(CHUNKS * layout.chunk)
    path = CausalPath(
        memory(wan, layout, told), wan.noise(layout), CHUNKS, GRID, PROCESS, wan.condition, exit_call
    )  # fmt: skip
    video = path.landing(path.call).denoised
    noisy = torch.cat([chunk.input(torch.full_like(path.call, exit_call)) for _, chunk in path._made], 2)
    t = GRID[exit_call].expand(ROWS, video.shape[2])

    def in_parallel(told: Tensor) -> Tensor:
        student = lambda x, t, c: steered(wan, x, t, c)
        return wan.seat.parallel(student, layout, noisy, t, wan.condition | {CONTROLS: told}, clean=video)

    torch.testing.assert_close(in_parallel(told), video, **EXACT)
    assert (in_parallel(told.roll(1, 2)) - video).abs().max() > 1e-3  # a frame late
    with torch.enable_grad():
        torch.testing.assert_close(path.land(wan.student, path.call).denoised, video, **EXACT)


def test_what_later_chunks_are_told_changes_no_earlier_one(wan: TinyWan) -> None:
    """M9, to the bit, and no look-ahead: chunk by chunk as it comes is the same as all at once."""
    layout = Layout(2, sink=1, window=2)
    told = controls(CHUNKS * 2)
    other = told.clone()
    other[:, :, 6:] += 1
    one, two = chunks(wan, layout, told), chunks(wan, layout, other)
    assert torch.equal(one[:, :, :6], two[:, :, :6])
    assert (one - two)[:, :, 6:].abs().max() > 1e-3
    coming, asked = iter(told.split(2, 2)), []

    def steer() -> Tensor:
        asked.append(next(coming))
        return asked[-1]

    made = steered_stream(wan, memory(wan, layout, None), steer)
    for number in range(CHUNKS):
        assert torch.equal(next(made), one[:, :, 2 * number : 2 * number + 2])
        assert len(asked) == number + 1


def test_after_the_end_and_without_steering_nothing_is_said(wan: TinyWan) -> None:
    layout, told = Layout(2, sink=1, window=1), controls(5)  # half a chunk at the end
    filled = torch.cat([told, torch.zeros(ROWS, CHANNELS, 5, SIDE, SIDE, dtype=torch.float64)], 2)
    assert torch.equal(chunks(wan, layout, told), chunks(wan, layout, filled))
    assert torch.equal(chunks(wan, layout, None), chunks(wan, layout, torch.zeros_like(filled)))
    assert torch.equal(chunks(wan, layout, filled, steer=lambda: None), chunks(wan, layout, filled))
    assert torch.equal(chunks(wan, layout, filled, steer=lambda: torch.zeros_like(told[:, :, :2])),
                       chunks(wan, layout, None))  # fmt: skip


@pytest.mark.parametrize("kept", ["noisy", "last"])
def test_over_a_noisy_history_all_calls_of_a_chunk_are_told_its_own(wan: TinyWan, kept: Kept) -> None:
    """With a sink ahead of the stream, whose reading is told the first chunk's; a reference's is told nothing."""
    layout = Layout(2, sink=1, window=1, kept=kept, positions="rolling", sink_ahead=2, sink_start=0)
    told, heard = controls(CHUNKS * 2), []

    def student(x: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
        heard.append(condition.get(CONTROLS))
        return steered(wan, x, t, condition)

    held = wan.seat.memory(student, layout, wan.condition | {CONTROLS: told})
    whole = torch.cat(list(islice(steered_stream(wan, held, lambda: None), CHUNKS)), 2)
    parts, calls = told.split(2, 2), len(GRID) - 1
    expected = [*parts[:1] * (calls + 1), *(part for part in parts[1:] for _ in range(calls))]
    assert all(a is not None and torch.equal(a, b) for a, b in zip(heard, expected, strict=True))
    coming = iter(parts)
    assert torch.equal(chunks(wan, layout, None, steer=lambda: next(coming)), whole)
    other = torch.cat([told[:, :, :6], told[:, :, 6:] + 1], 2)
    assert torch.equal(chunks(wan, layout, other)[:, :, :6], whole[:, :, :6])
    assert (chunks(wan, layout, other) - whole)[:, :, 6:].abs().max() > 1e-3
    begun = wan.seat.memory(student, layout, wan.condition | {CONTROLS: told})
    assert isinstance(begun, NoisyMemory)
    heard.clear()
    begun.refer(wan.video(1))
    assert heard == [None]


def test_with_sink_and_window_a_stream_that_is_steered_costs_the_same_for_ever(wan: TinyWan) -> None:
    """M4: every chunk from the third on attends to 3 chunks, in as many forwards."""
    layout = Layout(2, sink=1, window=1)
    held = memory(wan, layout, None)
    wan.frames.clear()
    told = lambda: controls(2)
    sizes = [held.bytes for _ in islice(steered_stream(wan, held, told), 12)]
    assert len(set(sizes[2:])) == 1
    assert held.seen_frames == 6
    assert set(wan.frames) == {2}
    assert len(wan.frames) == 12 * 3 + 11
