"""Memories of noisy calls, in float64. L numbers are those of the card live_avatar.md, section 8."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from typing import Any

import pytest
import torch
from tiny_causal import GRID, PROCESS, TinyWan
from torch import Tensor

from fewstep.attention import Layout, NoisyMemory
from fewstep.attention.parallel import Parallel, View
from fewstep.core.streams import Streams
from fewstep.errors import FewstepError
from fewstep.streaming import stream

EXACT = {"rtol": 0.0, "atol": 1e-12}
LAYOUT = Layout(2, sink=1, window=2, kept="noisy")
ROLLING = replace(LAYOUT, positions="rolling", sink_ahead=4, sink_start=7)


def remembering(wan: TinyWan, layout: Layout) -> NoisyMemory:
    memory = wan.memory(layout)
    assert isinstance(memory, NoisyMemory)
    return memory


class Noted:
    """A student that notes each call's input and answer by time, in order; of the sink's reading as well."""

    def __init__(self, wan: TinyWan) -> None:
        self.wan = wan
        self.asked: dict[float, list[tuple[Tensor, Tensor]]] = {}

    def __call__(self, x: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
        denoised = self.wan.student(x, t, condition)
        self.asked.setdefault(float(t[0]), []).append((x, denoised))
        return denoised


def dense(wan: TinyWan, layout: Layout, t: float, noisy: Tensor, sink: Tensor | None) -> Tensor:
    """All chunks at one time in one forward, from plain views: [the sink | chunks], no memory."""
    context = Parallel.__new__(Parallel)
    n, frames = layout.chunk, noisy.shape[2]
    extra = 0 if sink is None else sink.shape[2]
    alone = list(range(extra)), tuple(range(extra))
    context.views = [View(*alone, *alone)] if extra else []
    for chunk in range(frames // n):
        seen = [other for other in range(chunk) if layout.window is None or other >= chunk - layout.window]
        own = list(range(chunk * n, chunk * n + n))
        sees_sink = extra if chunk else 0
        if layout.positions == "rolling":  # eq. 2 as it is written, over absolute numbers
            times = own
            at = layout.sink_start + max(0, chunk * n - (layout.sink_start - layout.sink_ahead))
            past = list(range(at, at + sees_sink)) + [other * n + f for other in seen for f in range(n)]
        elif layout.positions == "absolute":
            times, past = own, list(range(sees_sink)) + [other * n + f for other in seen for f in range(n)]
        else:
            before = sees_sink + len(seen) * n
            times, past = list(range(before, before + n)), list(range(before))
        places = [extra + frame for other in seen for frame in range(other * n, other * n + n)]
        own_places = [extra + frame for frame in own]
        view = View(own_places, tuple(times), [*range(sees_sink), *places, *own_places], (*past, *times))
        context.views.append(view)
    video = noisy if sink is None else torch.cat([sink, noisy], 2)
    times_of = torch.full((len(noisy), video.shape[2]), t, dtype=noisy.dtype)
    times_of[:, :extra] = 0
    with wan.seat._attention.within(context):
        return wan.student(video, times_of, wan.condition)[:, :, extra:]


@pytest.mark.parametrize(
    "layout",
    [
        Layout(2, kept="noisy"),
        Layout(1, window=2, kept="noisy"),
        LAYOUT,
        replace(LAYOUT, window=None),
        replace(LAYOUT, positions="absolute"),
        ROLLING,
    ],
)
def test_calls_equal_a_dense_forward_over_what_calls_at_their_time_were_fed(wan: TinyWan, layout: Layout) -> None:
    """L4, L10, and eq. 1: what is kept of a call is that of its input, for calls at its time, of the last chunks."""
    noted = Noted(wan)
    memory = wan.seat.memory(noted, layout, wan.condition)
    made = list(islice(stream(memory, wan.noise(layout), GRID, PROCESS), 5))
    sink = noted.asked[0.0][0][0] if layout.sink else None
    if sink is not None:
        assert torch.equal(sink, made[0])  # L11: the generated first chunk
    for t in GRID[:-1].tolist():
        fed, answers = (torch.cat(parts, 2) for parts in zip(*noted.asked[t], strict=True))
        torch.testing.assert_close(answers, dense(wan, layout, t, fed, sink), **EXACT)
        if layout.window is not None:
            other = replace(layout, window=layout.window + 1)
            assert (answers - dense(wan, other, t, fed, sink)).abs().max() > 1e-3


def test_what_calls_at_other_times_left_is_not_seen(wan: TinyWan) -> None:
    """L3: spoilt, it changes nothing; spoilt at the call's own time, it does."""
    memory = remembering(wan, LAYOUT)
    list(islice(stream(memory, wan.noise(LAYOUT), GRID, PROCESS), 3))
    t = [float(time) for time in GRID[:-1]]
    x, at = wan.video(2, 3), torch.full((2,), t[1], dtype=torch.float64)

    def spoilt(time: float) -> Tensor:
        twin = memory.snapshot()
        window = twin.windows[time]
        wrong = [replace(c, layers=tuple((k + 1, v + 1) for k, v in c.layers)) for c in window]
        twin.windows = {**twin.windows, time: tuple(wrong)}
        return twin.denoise(x, at)

    plain = memory.snapshot().denoise(x, at)
    assert torch.equal(spoilt(t[0]), plain)
    assert torch.equal(spoilt(t[2]), plain)
    assert (spoilt(t[1]) - plain).abs().max() > 1e-3


def test_with_the_cache_last_all_calls_see_the_last_one(wan: TinyWan) -> None:
    """Algorithm 1 as written: the third chunk's first call sees what the second's last call was fed, and so on."""
    noted = Noted(wan)
    memory = wan.seat.memory(noted, Layout(1, window=1, kept="last"), wan.condition)
    list(islice(stream(memory, wan.noise(Layout(1)), GRID, PROCESS), 3))
    first, last = (float(GRID[call]) for call in (0, 2))
    fed, answer = noted.asked[first][2]
    whole = torch.cat([noted.asked[last][0][0], noted.asked[last][1][0], fed], 2)
    with wan.seat._attention.within(Parallel(Layout(1, window=1), 3, False)):
        times = torch.tensor([[last, last, first]] * 2, dtype=torch.float64)
        found = wan.student(whole, times, wan.condition)[:, :, 2:]
    torch.testing.assert_close(found, answer, **EXACT)


def test_only_the_distance_of_the_sink_counts(wan: TinyWan) -> None:
    """L5: from where the distance is fixed, far into a stream is as near its beginning; times stay bounded.

    Against absolute numbers shifted by 40,000 frames: the same call, 1e-9 (angles of 40,000 lose digits).
    """
    layout = replace(ROLLING, sink_start=0)
    memory = remembering(wan, layout)
    list(islice(stream(memory, wan.noise(layout), GRID, PROCESS), 4))
    x, t = wan.video(2, 3), torch.full((2,), float(GRID[1]), dtype=torch.float64)
    near = memory.snapshot().denoise(x, t)
    later = memory.snapshot()
    later.finished += 20_000
    assert torch.equal(later.denoise(x, t), near)

    far = memory.snapshot()
    shifted = _Shifted(layout, 40_000)
    far.layout = shifted  # type: ignore[assignment]
    torch.testing.assert_close(far.denoise(x, t), near, rtol=0, atol=1e-9)
    nearer = memory.snapshot()
    nearer.layout = replace(layout, sink_ahead=5)
    assert (nearer.denoise(x, t) - near).abs().max() > 1e-4


class _Shifted:
    """A layout whose times all lie `by` frames later."""

    def __init__(self, layout: Layout, by: int) -> None:
        self._layout, self._by = layout, by
        self.kept = layout.kept

    def told(self, *told: Any) -> Any:
        return self._layout.told(*told)

    def times_beside(self, *told: Any) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(time + self._by for time in part) for part in self._layout.times_beside(*told))


def test_the_sink_comes_nearer_until_its_distance_is_fixed() -> None:
    """Eq. 2 with 30 and 12: 30 - c ahead of chunks that begin at c, and 12 from c = 18 on."""
    layout = Layout(3, sink=1, window=3, positions="rolling", kept="noisy")
    for chunk in range(1, 12):
        seen = [other for other in range(chunk) if other >= chunk - 3]
        past, own = layout.times_beside(3, chunk, seen)
        assert past[0] - own[0] == max(12, 30 - 3 * chunk)
        assert len(past) == 3 + 3 * len(seen)
        assert max(past + own) <= 9 + 30


def test_a_long_stream_is_bounded() -> None:
    """L6: over 200 chunks bytes, frames seen, positions and forwards per chunk are constant once the window is full."""
    wan = TinyWan()
    memory = remembering(wan, ROLLING)
    sizes, seen, farthest = [], [], 0
    for _ in islice(stream(memory, wan.noise(ROLLING), GRID, PROCESS), 200):
        sizes.append(memory.bytes)
        seen.append(memory.seen_frames)
        reading: Any = memory._context
        farthest = max(farthest, *reading._times, *reading._past_times)
    assert seen == [2, 6, *[8] * 198]
    assert len(set(sizes[3:])) == 1
    assert farthest < 16
    assert wan.frames == [2] * (200 * 3 + 1)


def test_a_still_input_settles() -> None:
    """L6: with the same noise for every chunk the stream becomes stationary, however far it is."""
    wan = TinyWan()
    noise = wan.noise(ROLLING)
    same = lambda chunk, k: noise(0, k)
    made = list(islice(stream(wan.memory(ROLLING), same, GRID, PROCESS), 60))
    torch.testing.assert_close(made[59], made[58], rtol=1e-3, atol=1e-3)
    assert (made[1] - made[0]).abs().max() > 1e-2


def test_forwards_per_chunk() -> None:
    """L9: K, and one in all for the sink; with the cache back at clean it is Self Forcing's K + 1."""
    wan = TinyWan()
    counts = {}
    for kept, sink in (("noisy", 0), ("noisy", 1), ("last", 1), ("clean", 1)):
        layout = Layout(1, sink=sink, window=1, kept=kept)  # type: ignore[arg-type]
        wan.frames.clear()
        memory = wan.memory(layout)
        for x in islice(stream(memory, wan.noise(layout), GRID, PROCESS), 4):
            del x
        counts[kept, sink] = len(wan.frames)
    assert counts == {("noisy", 0): 12, ("noisy", 1): 13, ("last", 1): 13, ("clean", 1): 15}


def test_the_first_chunk_takes_the_place_of_a_reference() -> None:
    """L11: kept or replaced, the first chunk is the same to the bit; later ones differ. A reference matters at once."""
    wan, reference = TinyWan(), TinyWan().video(1, 7)
    films = {}
    for name in ("none", "replaced", "kept"):
        memory = remembering(wan, LAYOUT)
        if name != "none":
            memory.refer(reference, keep=name == "kept")
        films[name] = list(islice(stream(memory, wan.noise(LAYOUT), GRID, PROCESS), 3))
        assert memory.awaits is False
    assert torch.equal(films["kept"][0], films["replaced"][0])
    assert (films["kept"][1] - films["replaced"][1]).abs().max() > 1e-3
    assert (films["none"][0] - films["replaced"][0]).abs().max() > 1e-3


def test_a_chunk_is_told_its_own_prompt_alone() -> None:
    """L12: what is told from the third chunk on leaves the first two as they are; the memory of the video stays."""
    wan = TinyWan()
    other = {"text": wan.condition["text"].flip(1) * 2}
    films = []
    for changed in (False, True):
        memory, film = wan.memory(LAYOUT), []
        for x in islice(stream(memory, wan.noise(LAYOUT), GRID, PROCESS), 4):
            film.append(x)
            if changed and len(film) == 2:
                memory.tell(other)
        films.append(film)
    assert all(torch.equal(a, b) for a, b in zip(films[0][:2], films[1][:2], strict=True))
    assert (films[0][2] - films[1][2]).abs().max() > 1e-3


def test_no_gradient_reaches_earlier_chunks() -> None:
    wan = TinyWan()
    memory = wan.memory(LAYOUT)
    first, second = (wan.video(2, seed).requires_grad_() for seed in (1, 2))
    t = torch.full((2,), 0.7)
    memory.remember(memory.denoise(first, t))
    nothing, something = torch.autograd.grad(memory.denoise(second, t).sum(), [first, second], allow_unused=True)
    assert nothing is None
    assert something.abs().max() > 1e-3


def test_the_state_before_a_chunk_is_kept_by_a_snapshot() -> None:
    wan = TinyWan()
    memory, noise = remembering(wan, LAYOUT), Streams(3).at(0, range(2))
    t = torch.full((2,), 0.7)
    memory.remember(memory.denoise(wan.video(2, 1), t))
    before, x = memory.snapshot(), noise.normal("x", (4, 2, 4, 4))
    wanted = before.snapshot().denoise(x, t)
    for seed in range(3):
        memory.remember(memory.denoise(wan.video(2, seed), t))
    assert torch.equal(before.denoise(x, t), wanted)
    assert (memory.denoise(x, t) - wanted).abs().max() > 1e-3


def test_what_is_refused() -> None:
    wan = TinyWan()
    with pytest.raises(FewstepError, match="never denoised within this memory"):
        wan.memory(LAYOUT).remember(wan.video(2))
    with pytest.raises(FewstepError, match="a memory of 0 sink chunks"):
        remembering(wan, replace(LAYOUT, sink=0)).refer(wan.video(1))
    with pytest.raises(FewstepError, match="kept 'noisy' with sink 2"):
        replace(LAYOUT, sink=2).validate()
    with pytest.raises(FewstepError, match="found sink_ahead = 1, expected 2 latent frames"):
        replace(ROLLING, sink_ahead=1).validate()
    with pytest.raises(FewstepError, match="found kept = 'dirty'"):
        replace(LAYOUT, kept="dirty").validate()  # type: ignore[arg-type]
    with pytest.raises(FewstepError, match="found sink_ahead = 4, which nothing reads here"):
        replace(LAYOUT, sink_ahead=4).validate_unread()
