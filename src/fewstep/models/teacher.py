"""A teacher ready to sample: its pipeline's own grid, with classifier-free guidance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fewstep.core.guidance import guided
from fewstep.core.solvers import SOLVERS, Callback
from fewstep.core.tensors import Condition
from fewstep.errors import FewstepError
from fewstep.models.backbone import Backbone, seeded_noise

_MOST_STEPS = 1000


class Teacher:
    """A frozen pipeline that samples in many guided steps.

    Args:
        backbone: the loaded pipeline.
        steps: steps taken unless told otherwise; the family's usual number if None.
        guidance_scale: guidance unless told otherwise; 1 means none, None the family's usual scale.
    """

    def __init__(self, backbone: Backbone, steps: int | None = None, guidance_scale: float | None = None) -> None:
        self.backbone = backbone
        self.steps = backbone.teacher_steps if steps is None else steps
        self.guidance_scale = backbone.teacher_guidance if guidance_scale is None else guidance_scale

    def calls(self, steps: int | None = None, guidance_scale: float | None = None, motion_guidance: float = 0.0) -> int:
        """Network calls per image."""
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        return (self.steps if steps is None else steps) * (3 if motion_guidance else 1 if scale == 1 else 2)

    @torch.no_grad()
    def latents(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        steps: int | None = None,
        *,
        guidance_scale: float | None = None,
        motion_guidance: float = 0.0,
        tracks: Tensor | None = None,
        drives: Tensor | None = None,
        solver: str = "ddim",
        grid: Tensor | None = None,
        callback: Callback | None = None,
    ) -> Tensor:
        """Latents (B, ...) float32 for prompts and seeds of equal number; see `sample`.

        `grid` (steps + 1,) takes the place of the pipeline's own for `steps`; `callback` is the solver's.
        """
        if len(prompts) != len(seeds):
            raise FewstepError(
                f"found {len(prompts)} prompts and {len(seeds)} seeds, expected one seed per prompt, "
                "fix: repeat the shorter"
            )
        if not self._at_hand():
            raise FewstepError(
                "found a teacher whose weights are on disk or spread over processes, expected it whole to sample, "
                "fix: load it again, without defer"
            )
        if solver not in SOLVERS or solver == "lcm":
            raise FewstepError(
                f"found solver {solver!r}, expected one of {sorted(SOLVERS.keys() - {'lcm'})}, fix: choose one of these"
            )
        steps = self.steps if steps is None else steps
        if not 1 <= steps <= _MOST_STEPS:
            raise FewstepError(f"found steps = {steps}, expected 1 to {_MOST_STEPS}, fix: 50 is usual for a teacher")
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        if not math.isfinite(scale):
            raise FewstepError(f"found guidance_scale {scale}, expected a finite number, fix: 1 means none")
        if not 0 <= motion_guidance < math.inf:
            raise FewstepError(f"found motion_guidance {motion_guidance}, expected 0 or more, fix: 0 means none")
        backbone = self.backbone
        told = backbone.told(prompts, tracks, drives)
        empty = backbone.null_condition()
        null = {k: empty[k].expand(len(prompts), *empty[k].shape[1:]) if k in empty else v for k, v in told.items()}

        def denoise(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
            return guided(self._call, x, t, condition, null, scale, motion_guidance)

        grid = backbone.teacher_grid(steps) if grid is None else grid
        start = self.noise(seeds) * backbone.process.noise_scale
        more = {} if callback is None else {"callback": callback}
        return SOLVERS[solver](denoise, start, grid, backbone.process, told, **more)

    def states(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        grid: Tensor,
        keep: Tensor,
        guidance_scale: float,
        **told: Any,
    ) -> tuple[Tensor, Tensor]:
        """Where the sampler (ddim) is at the times `keep` (K,) of `grid` (steps + 1,), and where it ends.

        `told` is tracks, drives and motion_guidance, as of `sample`.

        Returns:
            (B, K, ...) states, each what a call at that time is made with, and (B, ...) samples.

        Raises:
            FewstepError: a time of `keep` that is not on the grid.
        """
        missing = [float(time) for time in keep if not bool(torch.isclose(grid, time, atol=1e-9).any())]
        if missing:
            raise FewstepError(
                f"found the times {missing} to keep of a sampler that does not pass them, expected times of its grid, "
                "fix: a number of steps that is a multiple of the student's, with its shift"
            )
        states = [self.noise(seeds) * self.backbone.process.noise_scale]
        end = self.latents(
            prompts, seeds, guidance_scale=guidance_scale, grid=grid, callback=lambda _, x, __: states.append(x), **told
        )
        kept = [states[int((grid - time).abs().argmin())] for time in keep]
        return torch.stack(kept, 1), end

    def noise(self, seeds: Sequence[int]) -> Tensor:
        """The standard normal noise (B, ...) that `latents` starts from."""
        return seeded_noise(seeds, self.backbone.latent_shape).to(self.backbone.device)

    def encode(self, prompts: Sequence[str], **told: Any) -> Condition:
        """The conditions of prompts, one row each, with tracks and drives where told."""
        return self.backbone.told(prompts, **told)

    def sample(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        steps: int | None = None,
        *,
        guidance_scale: float | None = None,
        motion_guidance: float = 0.0,
        tracks: Tensor | None = None,
        drives: Tensor | None = None,
        solver: str = "ddim",
        batch: int | None = None,
    ) -> Tensor:
        """Images (B, 3, H, W), or videos (B, F, 3, H, W), uint8 on the CPU.

        Args:
            prompts: B prompts.
            seeds: B seeds; the noise a diffusers pipeline draws with generators of these seeds.
            steps: solver steps; guided ones cost two network calls.
            guidance_scale: uncond + w (cond - uncond); 1 means none.
            motion_guidance: of tracks and drives beside that of text, 0 or more (`fewstep.core.guidance`); above 0 a
                step is three network calls.
            tracks: of teachers that read them (`Backbone.controls`), (B, F, 2) as x, y in pixels, nan where open.
            drives: likewise, (B, F) in [0, 1].
            solver: "ddim", "heun" or "dpmpp_2m".
            batch: how many at a time, 1 or more; fewer for larger latents unless told (`Backbone.sample_batch`).
        """
        if not prompts:
            raise FewstepError("found no prompt, expected at least one, fix: pass a prompt")
        parts = []
        batch = self.backbone.rows_at_a_time(batch)
        for start in range(0, len(prompts), batch):
            part = slice(start, start + batch)
            latents = self.latents(
                prompts[part], seeds[part], steps, guidance_scale=guidance_scale, motion_guidance=motion_guidance,
                tracks=None if tracks is None else tracks[part], drives=None if drives is None else drives[part],
                solver=solver,
            )  # fmt: skip
            parts.append(self.backbone.decode(latents))
        return torch.cat(parts)

    def _at_hand(self) -> bool:
        return self.backbone.at_hand

    def _call(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self.backbone.call(self.backbone.network, x, t, condition)
