"""A stock Wan as a causal student. V numbers are those of the card self_forcing.md, section 8."""

from __future__ import annotations

import copy
from itertools import islice

import pytest
import torch
from tiny_causal import GRID, PROCESS, TinyWan, tiny_network
from torch import Tensor

from fewstep.attention import CausalSeat, Layout
from fewstep.attention.rotary import rotary_table, rotate
from fewstep.errors import FewstepError
from fewstep.streaming import CausalPath, stream

EXACT = {"rtol": 0.0, "atol": 1e-12}
LAYOUTS = {
    "all": Layout(chunk=2),
    "window": Layout(chunk=2, window=1),
    "window, absolute": Layout(chunk=2, window=1, positions="absolute"),
    "sink, absolute": Layout(chunk=2, sink=1, window=2, positions="absolute"),
    "sink, slot": Layout(chunk=2, sink=2, window=1),
    "frame by frame": Layout(chunk=1, sink=1, window=2),
}


def rollout(wan: TinyWan, layout: Layout, chunks: int, exit_call: int) -> CausalPath:
    return CausalPath(
        wan.memory(layout), wan.noise(layout), chunks, GRID, PROCESS, wan.condition, exit_call
    )  # fmt: skip


def made(path: CausalPath) -> Tensor:
    return path.landing(path.call).denoised


def exit_inputs(path: CausalPath) -> Tensor:
    """What the last calls of the chunks were asked about."""
    call = torch.full_like(path.call, path.exit_call)
    return torch.cat([chunk.input(call) for _, chunk in path._made], 2)


def test_outside_of_a_context_the_network_is_the_stock_one_to_the_bit() -> None:
    network, stock = tiny_network(), tiny_network()
    seat = CausalSeat(network)
    wan = TinyWan()
    told = {"timestep": torch.tensor([300.0, 900.0]), "encoder_hidden_states": wan.condition["text"]}
    x = wan.video(4)
    plain = stock(x, **told, return_dict=False)[0]
    assert torch.equal(network(x, **told, return_dict=False)[0], plain)
    seat.memory(lambda x, t, c: network(x, **told, return_dict=False)[0], Layout(), {}).denoise(x[:, :, :3], x)
    assert torch.equal(network(x, **told, return_dict=False)[0], plain)
    assert copy.deepcopy(network).state_dict().keys() == stock.state_dict().keys()


def test_rotary_table_is_the_networks_own() -> None:
    network = tiny_network()
    x = torch.zeros(1, 4, 5, 6, 4)
    cos, sin = network.rope(x)
    table = rotary_table(range(5), 3, 2, 12, torch.zeros(1))
    assert torch.equal(table[0], cos[0, ..., ::2])
    assert torch.equal(table[1], sin[0, ..., 1::2])
    turned = rotate(torch.randn(1, 30, 2, 12).bfloat16(), table)
    assert turned.dtype == torch.bfloat16


def test_one_chunk_of_all_frames_is_the_bidirectional_network(wan: TinyWan) -> None:
    x, t = wan.video(4), torch.tensor([0.3, 0.8], dtype=torch.float64)
    plain = wan.student(x, t, wan.condition)
    torch.testing.assert_close(wan.memory(Layout(chunk=4)).denoise(x, t), plain, **EXACT)
    each = wan.seat.parallel(wan.student, Layout(chunk=4), x, t[:, None].expand(2, 4), wan.condition)
    torch.testing.assert_close(each, plain, **EXACT)


@pytest.mark.parametrize("exit_call", [0, 2])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_rollout_with_a_cache_is_one_forward_in_parallel(wan: TinyWan, layout: Layout, exit_call: int) -> None:
    """V1, V2, V4: at the exit step, with the clean chunks as history."""
    path = rollout(wan, layout, 5, exit_call)
    video, noisy = made(path), exit_inputs(path)
    t = GRID[exit_call].expand(2, video.shape[2])
    parallel = wan.seat.parallel(wan.student, layout, noisy, t, wan.condition, clean=video)
    torch.testing.assert_close(parallel, video, **EXACT)
    if layout.window is not None:
        other = Layout(layout.chunk, layout.sink, layout.window + 1, layout.positions)
        wrong = wan.seat.parallel(wan.student, other, noisy, t, wan.condition, clean=video)
        assert (wrong - video).abs().max() > 1e-3


def test_positions_of_slots_and_of_frames_are_the_same_without_a_sink(wan: TinyWan) -> None:
    """V3."""
    slot, absolute = (Layout(2, window=2, positions=kind) for kind in ("slot", "absolute"))
    torch.testing.assert_close(made(rollout(wan, slot, 6, 1)), made(rollout(wan, absolute, 6, 1)), **EXACT)


def test_they_differ_once_the_sink_is_not_next_to_the_window(wan: TinyWan) -> None:
    """V5: from the chunk S + W + 2 on, counted from 1."""
    slot, absolute = (made(rollout(wan, Layout(1, 1, 2, kind), 6, 1)) for kind in ("slot", "absolute"))
    torch.testing.assert_close(slot[:, :, :4], absolute[:, :, :4], **EXACT)
    assert ((slot - absolute)[:, :, 4:].abs().amax((0, 1, 3, 4)) > 1e-4).all()


def test_a_rolling_cache_is_not_the_last_chunks_read_again(wan: TinyWan) -> None:
    """V6: what was forgotten lives on in what was made of it; before, nothing was forgotten."""
    layout = Layout(1, window=2)
    video = made(rollout(wan, layout, 5, 1))
    noisy, t = wan.video(1), torch.full((2,), 0.7, dtype=torch.float64)

    def next_chunk(history: Tensor) -> Tensor:
        memory = wan.memory(layout)
        for frame in history.unbind(2):
            memory.remember(frame.unsqueeze(2))
        return memory.denoise(noisy, t)

    torch.testing.assert_close(next_chunk(video[:, :, :2]), next_chunk(video[:, :, 0:2]), **EXACT)
    assert (next_chunk(video) - next_chunk(video[:, :, 3:])).abs().max() > 1e-3


def test_cost_of_a_chunk_and_memory_are_constant_once_the_window_is_full(wan: TinyWan) -> None:
    """V7, over 60 chunks; times stay in the trained range."""
    layout = Layout(2, sink=1, window=1)
    memory = wan.memory(layout)
    wan.frames.clear()
    sizes, seen = [], []
    for chunk, _ in zip(range(60), stream(memory, wan.noise(layout), GRID, PROCESS), strict=False):
        sizes.append(memory.bytes)
        seen.append(memory.seen_frames)
        assert max(memory._context._times) < 3 * layout.chunk
        assert chunk == memory.finished
    assert seen == [2, 4, *[6] * 58]
    assert len(set(sizes[2:])) == 1
    assert set(wan.frames) == {2}
    assert len(wan.frames) == 60 * 3 + 59


def test_a_sink_is_turned_alike_for_every_chunk(wan: TinyWan) -> None:
    """M2: kept raw and turned when they are read, its keys are those that were turned once, at slots 0 and on."""
    layout = Layout(2, sink=1, window=1)
    memory, found = wan.memory(layout), []
    for _ in islice(stream(memory, wan.noise(layout), GRID, PROCESS), 5):
        found += [part[0][:, :8] for layer, part in memory._context._read.items() if not layer]  # 2 frames of 4 tokens
    raw = memory.chunks[0].layers[0][0]
    once = rotate(raw, rotary_table(range(2), 2, 2, 12, raw))
    assert len(found) == 4
    assert all(torch.equal(turned, once) for turned in found)


def test_a_later_chunk_has_no_gradient_to_earlier_ones(wan: TinyWan) -> None:
    """V8."""
    memory = wan.memory(Layout(1))
    first, second = (wan.video(1, seed).requires_grad_() for seed in (1, 2))
    t = torch.full((2,), 0.7, dtype=torch.float64)
    one = memory.denoise(first, t)
    memory.remember(one)
    two = memory.denoise(second, t)
    nothing, something = torch.autograd.grad(two.sum(), [first, second], allow_unused=True)
    assert nothing is None
    assert something.abs().max() > 1e-3


def test_checkpointing_leaves_the_gradient_as_it_is(wan: TinyWan) -> None:
    """V13, with a cache that rolls between the forward and what is computed again."""
    wan.network.requires_grad_(True)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            wan.network.enable_gradient_checkpointing()
        path = rollout(wan, Layout(1, sink=1, window=1, sink_decay=0.9), 4, 1)
        landing = path.land(wan.student, path.call)
        wan.network.zero_grad()
        landing.denoised.square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in wan.network.parameters()])
    torch.testing.assert_close(*gradients, rtol=0, atol=0)
    assert any(gradient.abs().max() > 1e-3 for gradient in gradients[0])


def test_the_prompt_is_read_once_and_can_be_changed(wan: TinyWan) -> None:
    """V12: kept keys are those that would be computed; another prompt leaves the memory of the video."""
    memory, x, t = wan.memory(Layout(1)), wan.video(1), torch.full((2,), 0.7, dtype=torch.float64)
    with torch.no_grad():
        memory.remember(wan.video(1, 3))
        kept = memory.denoise(x, t)
        assert memory._text.keys() == {0, 1}
        again = memory.denoise(x, t)
    assert torch.equal(kept, again)
    torch.testing.assert_close(kept, memory.denoise(x, t), **EXACT)  # with gradient: computed in the call
    remembered = memory.chunks
    memory.tell({"text": wan.condition["text"].flip(1) * 2})
    with torch.no_grad():
        changed = memory.denoise(x, t)
    assert memory.chunks is remembered
    assert (changed - kept).abs().max() > 1e-3


@pytest.mark.parametrize("history", ["noisy", "clean"])
def test_no_chunk_sees_a_later_one(wan: TinyWan, history: str) -> None:
    x, t = wan.video(6), torch.tensor([0.9, 0.9, 0.4, 0.4, 0.7, 0.7], dtype=torch.float64).expand(2, 6)
    clean = wan.video(6, 1) if history == "clean" else None
    later = [part if part is None else part.clone() for part in (x, clean)]
    for part in later:
        if part is not None:
            part[:, :, 4:] += 1
    before, after = (
        wan.seat.parallel(wan.student, Layout(2, window=1), video, t, wan.condition, clean=known)
        for video, known in ((x, clean), later)
    )
    torch.testing.assert_close(before[:, :, :4], after[:, :, :4], **EXACT)
    assert (before - after)[:, :, 4:].abs().max() > 1e-3


def test_what_is_refused() -> None:
    with pytest.raises(FewstepError, match="7 latent frames in chunks of 3"):
        Layout().chunks(7)
    with pytest.raises(FewstepError, match="found window = 0"):
        Layout(window=0).validate()
    with pytest.raises(FewstepError, match="sink_decay 0.9 with sink 2"):
        Layout(sink=2, window=1, sink_decay=0.9).validate()
