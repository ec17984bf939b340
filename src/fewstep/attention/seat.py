"""The two ways to call a causal student: chunk by chunk with a memory, or all chunks of a video at once."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fewstep.attention.causal import CausalAttention
from fewstep.attention.layout import FRAMES, Layout
from fewstep.attention.memory import CachedMemory
from fewstep.attention.noisy import NoisyMemory
from fewstep.attention.parallel import Parallel
from fewstep.core.guidance import Denoiser
from fewstep.core.tensors import CONTROLS, Condition


class CausalSeat:
    """A transformer that can be a causal student.

    Args:
        network: see `CausalAttention`; changed in place.
    """

    def __init__(self, network: nn.Module) -> None:
        self._attention = CausalAttention(network)

    def memory(self, student: Denoiser, layout: Layout, condition: Condition) -> CachedMemory:
        """An empty memory for a video per row of `condition`; `student` is the network as a denoiser."""
        if layout.kept != "clean":
            return NoisyMemory(student, self._attention, layout, condition)
        return CachedMemory(student, self._attention, layout, condition)

    def parallel(
        self,
        student: Denoiser,
        layout: Layout,
        x: Tensor,
        t: Tensor,
        condition: Condition,
        clean: Tensor | None = None,
    ) -> Tensor:
        """All chunks of a video in one forward, with gradient if the grad mode is on.

        Args:
            student: the network as a denoiser, which takes a time for each frame.
            layout: chunks and what they see.
            x: (B, C, F, ...) noisy video.
            t: (B, F) times of its frames, equal within a chunk.
            condition: what the student is told, `CONTROLS` of all F frames.
            clean: (B, C, F, ...) clean history of all chunks; without it they see each other as they are in `x`.

        Returns:
            (B, C, F, ...) denoised. One forward of F frames, or of 2F with a clean history.
        """
        frames = x.shape[FRAMES]
        context = Parallel(layout, layout.chunks(frames), clean is not None)
        with self._attention.within(context):
            if clean is None:
                return student(x, t, condition)
            if CONTROLS in condition:  # a clean frame is told what it was made with
                condition = condition | {CONTROLS: torch.cat([condition[CONTROLS]] * 2, FRAMES)}
            both = student(torch.cat([clean, x], FRAMES), torch.cat([torch.zeros_like(t), t], 1), condition)
        return both.narrow(FRAMES, frames, frames)
