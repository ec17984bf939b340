"""A tiny random Wan as a causal student: two layers, latents of 4x4 in four channels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fewstep.attention import CachedMemory, CausalSeat, Layout
from fewstep.core import grids
from fewstep.core.process import Flow
from fewstep.core.streams import Streams
from fewstep.streaming import ChunkNoise

PROCESS = Flow()
GRID = grids.shifted(3, 5.0)
CHANNELS, SIDE, ROWS = 4, 4, 2


def keep_float64(monkeypatch: Any) -> None:
    """Wan's blocks call `.float()` on what they add up; from now on that leaves float64 alone."""
    to_float = torch.Tensor.float

    def kept(self: Tensor, *more: Any, **told: Any) -> Tensor:
        return self if self.dtype == torch.float64 else to_float(self, *more, **told)

    monkeypatch.setattr(torch.Tensor, "float", kept)


def tiny_network(layers: int = 2) -> Any:
    """A stock network with random weights, also those that are zero or one in a new one."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    network = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=CHANNELS, out_channels=CHANNELS, text_dim=8,
        freq_dim=16, ffn_dim=32, num_layers=layers, rope_max_seq_len=32,
    ).eval()  # fmt: skip
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return network.requires_grad_(False)


class TinyWan:
    """The network with its causal seat, and called as `fewstep.models.wan.Wan` calls it."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.network = tiny_network().to(dtype)
        self.seat = CausalSeat(self.network)
        self.condition = {"text": torch.randn(ROWS, 5, 8, dtype=dtype, generator=torch.Generator().manual_seed(1))}
        self.dtype = dtype
        self.frames: list[int] = []
        """Of every call so far."""

    def student(self, x: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
        self.frames.append(x.shape[2])
        time = 1000 * t if t.ndim == 1 else (1000 * t).repeat_interleave(x.shape[-1] * x.shape[-2] // 4, 1)
        flow = self.network(x, timestep=time, encoder_hidden_states=condition["text"], return_dict=False)[0]
        return x - (t.view(-1, 1, 1, 1, 1) if t.ndim == 1 else t[:, None, :, None, None]) * flow

    def memory(self, layout: Layout) -> CachedMemory:
        return self.seat.memory(self.student, layout, self.condition)

    def noise(self, layout: Layout, seed: int = 0) -> ChunkNoise:
        draw = Streams(seed).at(0, range(ROWS))
        return lambda chunk, k: draw.normal(f"{chunk} {k}", (CHANNELS, layout.chunk, SIDE, SIDE), self.dtype)

    def video(self, frames: int, seed: int = 0) -> Tensor:
        return Streams(seed).at(1, range(ROWS)).normal("video", (CHANNELS, frames, SIDE, SIDE), self.dtype)
