"""The rollout of training and the endless sampler."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from tiny_causal import GRID, PROCESS, TinyWan

from fewstep.attention import Layout
from fewstep.streaming import CausalPath, stream

LAYOUT = Layout(2, sink=1, window=1)


def path_of(wan: TinyWan, exit_call: int, chunks: int = 4, eta: float = 0.0) -> CausalPath:
    return CausalPath(
        wan.memory(LAYOUT), wan.noise(LAYOUT), chunks, GRID, PROCESS, wan.condition, exit_call, eta
    )  # fmt: skip


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_training_that_stops_at_the_last_step_is_the_sampler_to_the_bit(eta: float) -> None:
    wan = TinyWan()
    path = path_of(wan, 2, eta=eta)
    made = path.landing(path.call).denoised
    sampled = stream(wan.memory(LAYOUT), wan.noise(LAYOUT), GRID, PROCESS, eta=eta)
    assert torch.equal(made, torch.cat(list(islice(sampled, 4)), 2))
    assert torch.equal(path.land(wan.student, path.call).denoised, made)


@pytest.mark.parametrize("exit_call", [0, 1])
def test_what_carries_gradient_is_what_was_remembered(exit_call: int) -> None:
    """The exit's own prediction is the chunk, and calls are those that are counted."""
    wan = TinyWan()
    path = path_of(wan, exit_call)
    made = path.landing(path.call)
    assert wan.frames == ([2] * (exit_call + 2) * 4)[:-1]  # the last chunk is not remembered
    wan.frames.clear()
    landing = path.land(wan.student, path.call)
    assert wan.frames == [2] * 4
    assert torch.equal(landing.denoised, made.denoised)
    assert torch.equal(path.landing_at(landing, torch.zeros(2)).x, made.denoised)
    assert (made.t_from == GRID[exit_call]).all()
    assert not made.denoised.requires_grad


def test_a_stream_goes_on_where_it_was_stopped() -> None:
    wan = TinyWan()
    whole = list(islice(stream(wan.memory(LAYOUT), wan.noise(LAYOUT), GRID, PROCESS), 4))
    memory, noise = wan.memory(LAYOUT), wan.noise(LAYOUT)
    first = list(islice(stream(memory, noise, GRID, PROCESS), 3))
    memory.remember(first[-1])  # handed out, and not yet remembered
    rest = stream(memory, lambda chunk, k: noise(chunk + 3, k), GRID, PROCESS)
    assert torch.equal(torch.cat([*first, next(rest)]), torch.cat(whole))
