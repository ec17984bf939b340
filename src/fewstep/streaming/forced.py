"""What training sees of a causal student whose history is noised data: all chunks in one forward (CausVid)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fewstep.attention.layout import FRAMES
from fewstep.core.guidance import Denoiser
from fewstep.core.process import Process
from fewstep.core.rollout import DrawnPath, Landing
from fewstep.core.tensors import Condition, at_least_float32

ParallelCall = Callable[[Denoiser, Tensor, Tensor, Condition], Tensor]
"""call(student, x (B, C, F, ...), t (B, F), condition) -> denoised video."""


class ForcedPath(DrawnPath):
    """Videos of data, noised chunk by chunk, and what the student makes of them; a path of one call.

    Args:
        denoise: calls the student for all chunks.
        student: used for everything but `land`, which is handed its own.
        clean: (B, C, F, ...) data.
        t: (B, F) times of the frames, equal within a chunk.
        noise: standard normal of the shape of `clean`.
        process: the noising process.
        condition: what all roles are told.
    """

    def __init__(
        self,
        denoise: ParallelCall,
        student: Denoiser,
        clean: Tensor,
        t: Tensor,
        noise: Tensor,
        process: Process,
        condition: Condition,
    ) -> None:
        super().__init__(student, noise, torch.tensor([1.0, 0.0]), process, condition)
        self.call = torch.zeros(len(clean), dtype=torch.long)
        self._denoise, self._own = denoise, student
        self._t = t.to(clean.device, at_least_float32(clean.dtype))
        self._x, self._eps = noised(process, clean, self._t, noise), noise
        self._seen: Landing | None = None

    @torch.no_grad()
    def landing(self, call: Tensor) -> Landing:
        """What the student makes of them, one forward when it is first asked for."""
        if self._seen is None:
            self._seen = self.land(self._own, call)
        return self._seen

    def land(self, student: Denoiser, call: Tensor) -> Landing:
        """The same with gradient; one forward."""
        denoised = self._denoise(student, self._x, self._t, self.condition)
        top = self._t.amax(1)
        return Landing(denoised, denoised, self._eps, torch.zeros_like(top), top, self.condition)


def noised(process: Process, clean: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """alpha clean + sigma noise, (B, C, F, ...), with a time for each frame: `t` (B, F)."""
    shape = [len(t), 1, 1, *[1] * (clean.ndim - 3)]
    shape[FRAMES] = t.shape[1]
    alpha, sigma = (level(t).to(clean.dtype).view(shape) for level in (process.alpha, process.sigma))
    return alpha * clean + sigma * noise
