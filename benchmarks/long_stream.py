"""A stream of 10,000 frames: memory, time per chunk, positions, and drift where frames are films of known things.

Without `--student` a tiny Wan of random weights streams, which shows memory and time; of a causal student of films of
32x32 pixels drift is measured as well (`fewstep.evaluation.films`). Prints resident memory at the tenths and its slope
over the second half, median and 99th percentile of the time per chunk in the first and the last tenth (by the clock,
which feels other jobs, and of this process's processor), the largest rotary time, and per tenth the share of frames
that show the thing of the first chunk, the distance of its colour, and the change of the background, in levels of 255.

    python benchmarks/long_stream.py --frames 10000
    python benchmarks/long_stream.py --frames 10000 --student runs/live/student --prompt "a frog bounces around"
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.attention import CachedMemory, CausalSeat, Layout
from fewstep.commands.common import quiet
from fewstep.core import grids
from fewstep.core.process import Flow
from fewstep.core.streams import Streams
from fewstep.evaluation.film_reading import read_films
from fewstep.evaluation.films import CHUNK, drift
from fewstep.streaming import stream

TENTHS = 10
LOOKED_AT = 24
"""Frames of each tenth whose drift is measured."""


def random_stream(kept: str) -> tuple[CachedMemory, Iterator[Tensor]]:
    """Chunks of one latent frame of a tiny Wan, sink 1 and window 3, rolling positions."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    network = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, text_dim=16, freq_dim=32,
        ffn_dim=96, num_layers=2,
    ).requires_grad_(False).eval()  # fmt: skip

    def student(x: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
        flow = network(x, timestep=1000 * t, encoder_hidden_states=condition["text"], return_dict=False)[0]
        return x - t.view(-1, 1, 1, 1, 1) * flow

    layout = Layout(3, sink=1, window=3, positions="rolling", kept=kept)  # type: ignore[arg-type]
    memory = CausalSeat(network).memory(student, layout, {"text": torch.zeros(1, 4, 16)})
    draw = Streams(0).at(0, range(1))
    noise = lambda chunk, k: draw.normal(f"{chunk} {k}", (4, layout.chunk, 8, 8))
    return memory, stream(memory, noise, grids.shifted(4, 5.0), Flow())


def student_stream(told: argparse.Namespace) -> tuple[CachedMemory, Iterator[Tensor], Any]:
    """Chunks of a saved student, and what decodes them."""
    from fewstep.models.student import load_student
    from fewstep.streaming.student import CausalStudent

    student = load_student(told.student, device=told.device)
    assert isinstance(student, CausalStudent), f"{told.student} is no causal student"
    layout = student.endless(sink=told.sink, window=told.window, kept=told.kept)
    memory, noise, grid = student.begin([told.prompt], [told.seed], None, layout)
    chunks = stream(memory, noise, grid, student.backbone.process, eta=student.eta)
    return memory, chunks, student.backbone.stream_decoder()


def resident() -> float:
    """Megabytes of this process that are in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def drift_line(first: Tensor, frames: Tensor) -> str:
    """Of frames (F, 3, 32, 32) against the first chunk (3, 3, 32, 32)."""
    films = torch.cat([first, frames])[None]
    away = drift(films, read_films(films))
    thing, colour, background = (float(part[:, CHUNK:].mean()) for part in (away.thing, away.colour, away.background))
    return f"same thing {100 * thing:5.1f} %  colour {colour:6.2f}  background {background:6.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--frames", type=int, default=10_000, help="latent frames")
    parser.add_argument("--student", help="folder of a causal student; none: a tiny network of random weights")
    parser.add_argument("--prompt", default="a frog bounces around on a green background")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sink", type=int, help="as trained unless told")
    parser.add_argument("--window", type=int, help="likewise")
    parser.add_argument("--kept", choices=["clean", "noisy", "last"], help="likewise; noisy without a student")
    parser.add_argument("--device", default="cpu")
    told = parser.parse_args()
    torch.set_num_threads(1)
    quiet()
    decode = None
    if told.student:
        memory, chunks, decode = student_stream(told)
    else:
        memory, chunks = random_stream(told.kept or "noisy")
    count = -(-told.frames // memory.layout.chunk)
    tenth = max(1, count // TENTHS)
    sizes, times = np.ones(count), {"wall": np.ones(count), "processor": np.ones(count)}  # in memory from now on
    farthest, kept, films, first, shown = 0, set(), [], torch.empty(0), []
    begun = time.perf_counter(), time.process_time()
    for number, latents in enumerate(islice(chunks, count)):
        frames = decode(latents)[0] if decode else None
        now = time.perf_counter(), time.process_time()
        for clock, before, after in zip(times.values(), begun, now, strict=True):
            clock[number] = after - before
        begun = now
        sizes[number] = resident()
        kept.add(memory.bytes)
        reading: Any = memory._context
        farthest = max(farthest, *reading._past_times, *reading._times)
        if frames is None or frames.shape[-2:] != (32, 32):
            continue
        if not number:
            first = frames[:CHUNK]
        shown.append(frames)
        if sum(map(len, shown)) > LOOKED_AT:
            shown.pop(0)
        if number % tenth == tenth - 1:
            films.append(torch.cat(shown))
    half = count // 2
    slope = np.polyfit(np.arange(half, count), sizes[half:], 1)[0] * 1000 / memory.layout.chunk
    print(f"{count} chunks, {memory.layout}")
    at_tenths = ", ".join(f"{size:.1f}" for size in sizes[tenth - 1 :: tenth])
    print(f"resident memory at the tenths, MiB: {at_tenths}; slope {slope:+.3f} MiB in 1000 frames of the second half")
    print(f"the memory itself: {max(kept) / 2**20:.2f} MiB at most; largest rotary time {farthest}")
    for clock, spent in times.items():
        for name, part in (("first", spent[1 : tenth + 1]), ("last", spent[-tenth:])):
            median, late = np.percentile(part, [50, 99]) * 1000
            print(f"{clock} time, {name} tenth: {median:.2f} ms a chunk, 99th percentile {late:.2f}")
    for number, frames in enumerate(films, 1):
        print(f"tenth {number:>2}: {drift_line(first, frames)}")


if __name__ == "__main__":
    main()
