"""A stream by several processes, and how fast it ought to be. L numbers are those of the card live_avatar.md, 8."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import chain_run
import pytest
import torch
from chain_run import CHUNKS, LAYOUT, STEPS, film
from safetensors.torch import load_file
from tiny_causal import GRID, PROCESS, TinyWan

from fewstep.errors import FewstepError
from fewstep.streaming import stream
from fewstep.streaming.pipeline import shares
from fewstep.streaming.throughput import chain_seconds, chain_speedup
from fewstep.training.parallel import Group

ALONE = Group(0, 1)


def test_a_chain_of_processes_makes_the_same_film_to_the_bit(tmp_path: Path) -> None:
    """L1 and L2, steered, with prompts that change; with one process more than there are calls, one only decodes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, chain_run.__file__, str(tmp_path)], check=True, timeout=400, env=environment)
    for processes, calls in ((2, [2, 2]), (3, [1, 1, 0])):
        found = load_file(tmp_path / f"{processes}.safetensors")
        assert torch.equal(found["film"], film(ALONE, STEPS[processes], steered=True)[0])
        assert (found["film"] - film(ALONE, STEPS[processes])[0]).abs().max() > 1e-3
        wanted = [[CHUNKS * made + bool(made), 2] for made in calls]  # one to read the sink; two prompts
        assert found["counts"].tolist() == wanted


def test_one_process_makes_what_the_sampler_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a prompt that changes is heard."""
    changed = film(ALONE, 3)[0]
    monkeypatch.setattr(chain_run, "PROMPTS", {})
    plain = film(ALONE, 3)[0]
    wan = TinyWan()
    sampled = stream(wan.memory(LAYOUT), wan.noise(LAYOUT), GRID, PROCESS)
    assert torch.equal(plain, torch.cat(list(islice(sampled, CHUNKS)), 2))
    assert torch.equal(plain[:, :, :4], changed[:, :, :4])
    assert (plain - changed)[:, :, 4:6].abs().max() > 1e-3


def test_with_a_clean_cache_one_process_is_self_forcings_sampler(monkeypatch: pytest.MonkeyPatch) -> None:
    """L9."""
    monkeypatch.setattr(chain_run, "PROMPTS", {})
    wan, clean = TinyWan(), replace(LAYOUT, kept="clean")
    sampled = stream(wan.memory(clean), wan.noise(clean), GRID, PROCESS)
    assert torch.equal(film(ALONE, 3, clean)[0], torch.cat(list(islice(sampled, CHUNKS)), 2))


def test_calls_are_shared_evenly() -> None:
    assert shares(4, 1) == [range(4)]
    assert shares(4, 2) == [range(2), range(2, 4)]
    assert shares(4, 3) == [range(2), range(2, 3), range(3, 4)]
    assert shares(4, 5) == [range(1), range(1, 2), range(2, 3), range(3, 4), range(4, 4)]
    for steps in range(1, 9):
        for processes in range(1, steps + 2):
            parts = shares(steps, processes)
            assert len(parts) == processes
            assert [call for part in parts for call in part] == list(range(steps))
            sizes = [len(part) for part in parts[:steps]]
            assert max(sizes) - min(sizes) <= 1
    with pytest.raises(FewstepError, match="found 6 processes for a student of 4 calls"):
        shares(4, 6)


def ends(stages: list[float], chunks: int, drained: bool) -> float:
    """When the last chunk comes out, chunk by chunk and stage by stage, by who waits for whom (L7)."""
    free, first_out = [0.0] * len(stages), 0.0
    at = 0.0
    for chunk in range(chunks):
        at = 0.0
        for place, seconds in enumerate(stages):
            begins = max(at, free[place], first_out if drained and chunk else 0.0)
            at = free[place] = begins + seconds
        first_out = first_out or at
    return at


@pytest.mark.parametrize("drained", [False, True])
@pytest.mark.parametrize("stages", [[1.0] * 4, [2.0, 1.0], [1.0, 3.0, 2.0], [1.5]])
def test_the_model_of_throughput(stages: list[float], drained: bool) -> None:
    """L7: against the order of events; a chunk that waits for the first begins when that is out."""
    for chunks in (1, 2, 3, 9):
        assert chain_seconds(stages, chunks, drained=drained) == pytest.approx(ends(stages, chunks, drained))


def test_the_published_speedup() -> None:
    assert chain_seconds([0.5] * 4, 7) == pytest.approx((4 + 7 - 1) * 0.5)
    assert chain_speedup(4, 7) == pytest.approx(4 * 7 / (4 + 7 - 1))
    assert chain_speedup(4, 10_000) == pytest.approx(4, rel=1e-3)
    assert chain_speedup(1, 5, drained=True) == pytest.approx(1)
    with pytest.raises(FewstepError, match="0 chunks"):
        chain_seconds([1.0], 0)
