"""How much faster a stream is when several processes share a student's calls, beside what the model says.

Starts itself: alone, then under torchrun with each number of processes. A call is one of a Wan with random weights
(speed does not depend on them), or with `--calls sleep` a pause, which shows the chain apart from processors that are
shared with others. Prints, per number of processes: seconds for all chunks, the speed-up, T M / (T + M - 1) less the
drain (the first chunk becomes the sink), and the seconds that the model makes of what each process itself measured.

    python benchmarks/pipeline.py --processes 2 --chunks 16
    python benchmarks/pipeline.py --processes 2 4 5 --chunks 16 --calls sleep
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from copy import copy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fewstep.attention import CausalSeat, Layout
from fewstep.commands.common import quiet
from fewstep.core import grids
from fewstep.core.process import Flow
from fewstep.core.streams import Streams
from fewstep.streaming.pipeline import Order, StreamMemory, run_chain, shares
from fewstep.streaming.throughput import chain_seconds, chain_speedup
from fewstep.training.parallel import process_group

LAYOUT = Layout(3, sink=1, window=3, positions="rolling", kept="noisy")
CHANNELS, SIDE, WARM = 8, 8, 2


class Pauses:
    """A memory whose calls are pauses."""

    finished = 0

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def denoise(self, x: Tensor, t: Tensor) -> Tensor:
        time.sleep(self._seconds)
        return x

    @property
    def awaits(self) -> bool:
        return self.finished == 0

    def remember(self, x: Tensor) -> None:
        self.finished += 1

    def snapshot(self) -> Pauses:
        return copy(self)


def network_memory(width: int, layers: int) -> StreamMemory:
    """Of a Wan of random weights: tokens of 2x2 latents, 16 a frame."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    network = WanTransformer3DModel(
        num_attention_heads=width // 24, attention_head_dim=24, in_channels=CHANNELS, out_channels=CHANNELS,
        text_dim=32, freq_dim=64, ffn_dim=4 * width, num_layers=layers,
    ).requires_grad_(False).eval()  # fmt: skip

    def student(x: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
        flow = network(x, timestep=1000 * t, encoder_hidden_states=condition["text"], return_dict=False)[0]
        return x - t.view(-1, 1, 1, 1, 1) * flow

    return CausalSeat(network).memory(student, LAYOUT, {"text": torch.zeros(1, 8, 32)})


def timed(told: argparse.Namespace) -> None:
    """One process's part; the last one writes seconds for all chunks, and everyone's own seconds per chunk."""
    torch.set_num_threads(1)
    quiet()
    grid, draw = grids.shifted(told.steps, 5.0), Streams(0).at(0, range(1))
    noise = lambda chunk, k: draw.normal(f"{chunk} {k}", (CHANNELS, LAYOUT.chunk, SIDE, SIDE))
    memory: Any = Pauses(told.pause) if told.calls == "sleep" else network_memory(told.width, told.layers)
    denoise, spent = memory.denoise, 0.0

    def watched(x: Tensor, t: Tensor) -> Tensor:
        nonlocal spent
        begun = time.perf_counter()
        try:
            return denoise(x, t)
        finally:
            spent += time.perf_counter() - begun

    for _ in range(WARM):
        denoise(noise(0, 0), torch.ones(1))
    memory.denoise = watched
    with process_group(torch.device("cpu")) as group:
        group.wait()
        begun = time.perf_counter()
        run_chain(
            memory, noise, grid, Flow(), group,
            orders=lambda chunk: Order(chunk < told.chunks), tell=lambda prompt: None, deliver=lambda x: None,
        )  # fmt: skip
        seconds = time.perf_counter() - begun
        stages: list[float] = [0.0] * group.size
        if group.size > 1:
            dist.all_gather_object(stages, spent / told.chunks)
        else:
            stages = [spent / told.chunks]
        if group.rank == group.size - 1:
            told.result.write_text(json.dumps({"seconds": seconds, "stages": stages}))


def started(processes: int, folder: Path, arguments: list[str]) -> dict[str, Any]:
    """What `timed` measures in that many processes."""
    result = folder / f"{processes}.json"
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *(torchrun if processes > 1 else []), __file__, *arguments, "--result", str(result)]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    found: dict[str, Any] = json.loads(result.read_text())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[2], help="beside one alone")
    parser.add_argument("--chunks", type=int, default=16, help="M")
    parser.add_argument("--steps", type=int, default=4, help="calls of a chunk")
    parser.add_argument("--calls", choices=["network", "sleep"], default="network")
    parser.add_argument("--pause", type=float, default=0.05, help="seconds of a call with --calls sleep")
    parser.add_argument("--width", type=int, default=192, help="of the network; of the embedded video teacher: 192")
    parser.add_argument("--layers", type=int, default=6, help="likewise: 6")
    parser.add_argument("--result", type=Path, help="for the processes that this script starts")
    told = parser.parse_args()
    if told.result:
        timed(told)
        return
    with tempfile.TemporaryDirectory() as folder:
        alone = started(1, Path(folder), sys.argv[1:])
        print(f"1 process: {alone['seconds']:.2f} s for {told.chunks} chunks, {alone['stages'][0]:.3f} s a chunk")
        for processes in told.processes:
            found = started(processes, Path(folder), sys.argv[1:])
            parts = [len(part) for part in shares(told.steps, processes)]
            whole = chain_seconds([float(part) for part in parts], told.chunks, drained=True)
            measured = chain_seconds(found["stages"], told.chunks, drained=True)
            print(
                f"{processes} processes of {parts} calls: {found['seconds']:.2f} s, "
                f"speed-up {alone['seconds'] / found['seconds']:.2f} "
                f"(model: {told.steps * told.chunks / whole:.2f}, without the drain "
                f"{told.steps * told.chunks / chain_seconds([float(part) for part in parts], told.chunks):.2f}, "
                f"of as many equal stages {chain_speedup(processes, told.chunks):.2f}); "
                f"from its own stages {[round(stage, 3) for stage in found['stages']]} the model makes {measured:.2f} s"
            )


if __name__ == "__main__":
    main()
