"""One process of a chain over a tiny Wan, for torchrun to start: chain_run.py FOLDER.

Two of them make a film, then three. Prompts change in mid-stream, each chunk is told controls of its own, and every
call waits for a random moment, which must not matter.
"""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1] / "attention")]

import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from tiny_causal import CHANNELS, PROCESS, ROWS, SIDE, TinyWan  # noqa: E402
from torch import Tensor  # noqa: E402

from fewstep.attention import Layout  # noqa: E402
from fewstep.core import grids  # noqa: E402
from fewstep.core.streams import Streams  # noqa: E402
from fewstep.core.tensors import CONTROLS  # noqa: E402
from fewstep.streaming.pipeline import Order, run_chain  # noqa: E402
from fewstep.training.parallel import Group, process_group  # noqa: E402

LAYOUT = Layout(2, sink=1, window=2, positions="rolling", sink_ahead=4, sink_start=7, kept="noisy")
CHUNKS = 7
PROMPTS = {2: "another", 5: "änother still"}
STEPS = {2: 4, 3: 2}
"""Calls of a chunk, by the number of processes: two for each of two processes; one each, and one that decodes."""


def controls() -> Tensor:
    """What the frames of the film are told."""
    return Streams(4).at(0, range(ROWS)).normal("controls", (CHANNELS, CHUNKS * LAYOUT.chunk, SIDE, SIDE))


def film(
    group: Group, steps: int, layout: Layout = LAYOUT, *, steered: bool = False, waits: bool = False
) -> tuple[Tensor, int, list[str]]:
    """What arrives in this process, how many calls it made, and what it was told."""
    wan, told, parts = TinyWan(), [], []
    moments = random.Random(group.rank)

    def student(x: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
        time.sleep(moments.random() / 50 if waits else 0)
        return wan.student(x + condition.get(CONTROLS, torch.zeros_like(x)), t, condition)

    memory = wan.seat.memory(student, layout, wan.condition)

    def tell(prompt: str) -> None:
        told.append(prompt)
        memory.tell({"text": wan.condition["text"] * (1 + len(prompt))})

    def orders(chunk: int) -> Order:
        return Order(chunk < CHUNKS, PROMPTS.get(chunk, ""))

    grid, noise = grids.shifted(steps, 5.0), wan.noise(layout)
    coming = iter(controls().split(layout.chunk, 2))
    chunks = run_chain(
        memory, noise, grid, PROCESS, group, orders=orders, tell=tell, deliver=parts.append,
        begun=(lambda: memory.steer(next(coming))) if steered else None,
    )  # fmt: skip
    assert chunks == CHUNKS
    return torch.cat(parts, 2) if parts else torch.empty(0), len(wan.frames), told


if __name__ == "__main__":
    torch.set_num_threads(1)
    with process_group(torch.device("cpu")) as everyone:
        for size, steps in STEPS.items():  # the third looks on first
            made, calls, told = torch.empty(0), 0, []
            if everyone.rank < size:
                made, calls, told = film(Group(everyone.rank, size), steps, steered=True, waits=True)
            counts: list[list[int]] = [[] for _ in range(everyone.size)]
            torch.distributed.all_gather_object(counts, [calls, len(told)])
            if everyone.rank == size - 1:
                found = {"film": made, "counts": torch.tensor(counts[:size])}
                save_file(found, Path(sys.argv[1]) / f"{size}.safetensors")
