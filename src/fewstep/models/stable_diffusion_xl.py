"""SDXL: Stable Diffusion's UNet, larger, which is also told a pooled text and the image's size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from fewstep.core.tensors import Condition
from fewstep.models.backbone import register_backbone
from fewstep.models.comfyui import sdxl_key
from fewstep.models.pipelines import POOLED, STATES, decoded, in_batches, pixels
from fewstep.models.recipes import Recipe, Setting
from fewstep.models.stable_diffusion import StableDiffusion

_TDM = "TDM paper, app. D"
_DMD2 = "DMD2 paper, app. F"


@register_backbone("StableDiffusionXLPipeline")
class StableDiffusionXL(StableDiffusion):
    """Adapter of `StableDiffusionXLPipeline`: two text encoders, pooled text and the image's size, no crop.

    Its unconditional input is what the pipeline's own is without a negative prompt: zeros, not the encoded empty
    prompt, where `force_zeros_for_empty_prompt` says so, as in the released weights.
    """

    pipeline_classes: ClassVar[tuple[str, ...]] = ("StableDiffusionXLPipeline",)
    teacher_guidance = 5.0
    comfyui_key = staticmethod(sdxl_key)
    recipe: ClassVar[Recipe] = Recipe(
        guidance_scale=Setting(8.0, _TDM),
        shift=Setting(1.0, _TDM),
        start_time=Setting(1.0, _TDM),
        critic_updates=Setting(1, _TDM),
        student_rate=Setting(1e-6, _TDM),
        critic_rate=Setting(5e-6, _TDM),
        roles=Setting("copies", _TDM),
        by_method={
            "dmd2": {
                "guidance_scale": Setting(8.0, _DMD2),
                "critic_updates": Setting(5, _DMD2),
                "student_rate": Setting(5e-7, _DMD2),
                "critic_rate": Setting(5e-7, _DMD2),
                "gan_weight": Setting(5e-3, _DMD2),
                "roles": Setting("copies", _DMD2),
            }
        },
    )

    def _added_conditions(self, condition: Condition, dtype: torch.dtype) -> dict[str, Tensor] | None:
        pooled = condition[POOLED].to(dtype)
        height, width = self.size["height"], self.size["width"]
        sizes = pooled.new_tensor([height, width, 0, 0, height, width])  # original, crop, target
        return {"text_embeds": pooled, "time_ids": sizes.expand(len(pooled), 6)}

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Condition:
        def encoded(batch: list[str]) -> Condition:
            states, _, pooled, _ = self.pipeline.encode_prompt(
                batch, device=self.device, do_classifier_free_guidance=False
            )
            return {STATES: states, POOLED: pooled}

        return in_batches(encoded, prompts)

    @property
    def zero_null(self) -> bool:  # type: ignore[override]
        """As the pipeline has it."""
        return bool(self.pipeline.config.force_zeros_for_empty_prompt)

    @torch.no_grad()
    def null_condition(self) -> Condition:
        if self._null is None:
            encoded = self.pipeline.encode_prompt("", device=self.device, do_classifier_free_guidance=True)
            self._null = {STATES: encoded[1], POOLED: encoded[3]}
        return self._null

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """As the pipeline, with its watermark if it has one."""
        images = decoded(self.pipeline.vae, latents)
        if self.pipeline.watermark is not None:
            images = self.pipeline.watermark.apply_watermark(images)
        return pixels(images)

    def _prompt_arguments(self, count: int) -> dict[str, Tensor]:
        null = self.null_condition()
        return {
            "prompt_embeds": null[STATES].expand(count, -1, -1),
            "pooled_prompt_embeds": null[POOLED].expand(count, -1),
        }
