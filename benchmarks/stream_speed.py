"""How fast a causal student of the embedded film teacher's size streams: frames a second, latency, evenness.

    python benchmarks/stream_speed.py --threads 2

Weights are random, which changes no number here. A chunk is steered by a track, made in K calls, decoded, and then
remembered, which the next chunk waits for; so that is counted as well. The latency of a frame is the time from when its
chunk is begun, with the pointer where it is then, until it is decoded; all frames of a chunk arrive together.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from fewstep.attention import Layout
from fewstep.core import grids
from fewstep.embedded.autoencoder import build_autoencoder
from fewstep.embedded.film_build import FILM_FOLDER
from fewstep.embedded.film_teacher import LATENT_CHANNELS, FilmModel, build_film_pipeline
from fewstep.models.loading import load_backbone
from fewstep.streaming.student import CausalStudent


def random_student(folder: str, layout: Layout, steps: int, device: str) -> CausalStudent:
    """A student as large as the embedded film teacher."""
    model = FilmModel()
    parts = (model.tokenizer, model.text_encoder, model.transformer, model.track_head)
    build_film_pipeline(build_autoencoder(latent_channels=LATENT_CHANNELS), *parts).save_pretrained(folder)
    backbone = load_backbone(folder, device=device)
    seat = backbone.causal(backbone.network)
    return CausalStudent(backbone, backbone.network, {steps: grids.shifted(steps, 5.0)}, {}, 0.0, layout, seat)


def circling(frames: int) -> Iterator[Tensor]:
    """A pointer that goes round, (1, frames, 2) for each chunk."""
    start = 0
    while True:
        turn = 0.2 * torch.arange(start, start + frames)
        yield 16 + 6 * torch.stack([turn.cos(), turn.sin()], 1)[None]
        start += frames


def quantile(values: list[float], share: float) -> float:
    return float(torch.tensor(values, dtype=torch.float64).quantile(share))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3, help="network calls a chunk")
    parser.add_argument("--chunk", type=int, default=3, help="frames a chunk")
    parser.add_argument("--sink", type=int, default=1, help="chunks")
    parser.add_argument("--window", type=int, default=1, help="chunks")
    parser.add_argument("--frames", type=int, default=300, help="that are timed, after 30")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    layout = Layout(args.chunk, sink=args.sink, window=args.window)
    with tempfile.TemporaryDirectory() as folder:
        student = random_student(f"{folder}/{FILM_FOLDER}", layout, args.steps, args.device)
    stream = student.stream("a frog hops to the right", tracks=circling(args.chunk))
    between: list[float] = []
    decoding: list[float] = []
    warm, count = -(-30 // args.chunk), -(-args.frames // args.chunk)
    cpu = 0.0
    for number in range(warm + count):
        if number == warm:
            cpu = time.process_time()
        begun = time.perf_counter()
        latents = next(stream)  # remembers the chunk before, then makes this one
        made = time.perf_counter()
        student.backbone.decode(latents)
        if number >= warm:
            between.append(time.perf_counter() - begun)
            decoding.append(time.perf_counter() - made)
    cpu = (time.process_time() - cpu) / (count * args.chunk)
    per_frame = [seconds / args.chunk for seconds in between]
    setting = f"c{args.chunk}s{args.sink}w{args.window}, {args.steps} steps, 32x32, {args.threads} threads"
    numbers = {
        "setting": setting,
        "frames": count * args.chunk,
        "fps": count * args.chunk / sum(between),
        "latency_ms": 1e3 * quantile(between, 0.5),
        "p50_ms_per_frame": 1e3 * quantile(per_frame, 0.5),
        "p99_ms_per_frame": 1e3 * quantile(per_frame, 0.99),
        "decoding_ms_per_frame": 1e3 * sum(decoding) / (count * args.chunk),
        "cpu_ms_per_frame": 1e3 * cpu,
    }
    rounded = {name: value if isinstance(value, str) else round(value, 2) for name, value in numbers.items()}
    print(json.dumps(rounded, indent=1))


if __name__ == "__main__":
    main()
