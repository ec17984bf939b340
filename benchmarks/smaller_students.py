"""What a student with fewer weights than the embedded teacher saves: parameters and the time of a forward.

MSD's smaller students (`fewstep msd --depth 0.5`, `--width 0.5`). Weights are random, which changes no number here.
Time is the core's own (one thread on a CPU), so that other work on the machine hardly counts; the fastest round's.

    python benchmarks/smaller_students.py
    python benchmarks/smaller_students.py --device cuda --batch 64
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import nn

from fewstep.data.prompts import training_captions
from fewstep.embedded.autoencoder import build_autoencoder
from fewstep.embedded.teacher import build_pipeline, build_text_encoder, build_tokenizer, build_transformer
from fewstep.models.backbone import Backbone
from fewstep.models.pixart import PixArt
from fewstep.models.smaller import smaller_network

SHAPES = [(1.0, 1.0), (0.5, 1.0), (1.0, 0.5), (0.5, 0.5), (0.25, 1.0)]
"""Depth and width of the students."""


def seconds(backbone: Backbone, network: nn.Module, batch: int, rounds: int) -> float:
    """Of the fastest of `rounds` forwards of `batch` samples, after one that warms up."""
    device, prompts = backbone.device, list(training_captions(batch))[:batch]
    condition = backbone.encode(prompts)
    x, t = torch.randn(batch, *backbone.latent_shape, device=device), torch.full((batch,), 0.5, device=device)
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    taken = []
    for _ in range(rounds + 1):
        begun = clock()
        with torch.no_grad():
            backbone.call(network, x, t, condition)
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(clock() - begun)
    return min(taken[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch", type=int, default=8, help="samples of a forward")
    parser.add_argument("--rounds", type=int, default=3, help="forwards that count")
    parser.add_argument("--device", default="cpu")
    told = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    parts = (build_autoencoder(), tokenizer, build_text_encoder(len(tokenizer)), build_transformer())
    backbone = PixArt(build_pipeline(*parts), "random weights").to(told.device)
    print("| depth | width | parameters | share | ms a sample | times as fast |")
    print("|---|---|---|---|---|---|")
    whole: tuple[int, float] | None = None
    for depth, width in SHAPES:
        network = smaller_network(backbone.network, depth=depth, width=width)
        count = sum(parameter.numel() for parameter in network.parameters())
        took = seconds(backbone, network, told.batch, told.rounds)
        whole = whole or (count, took)
        share, faster = count / whole[0], whole[1] / took
        milliseconds = 1000 * took / told.batch
        print(f"| {depth} | {width} | {count} | {share:.0%} | {milliseconds:.1f} | {faster:.1f} |", flush=True)


if __name__ == "__main__":
    main()
