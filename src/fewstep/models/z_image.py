"""Z-Image: flow over lists of latents and texts, called with 1 - t, returning minus the flow.

The pipeline's guidance scale g is another number: it computes cond + g (cond - uncond), which is our scale 1 + g, and
its 0 means none. The Turbo weights are distilled from a guided teacher: as a teacher they want our scale 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fewstep.core import grids
from fewstep.core.prediction import to_denoised
from fewstep.core.tensors import Condition
from fewstep.models.backbone import Backbone, Predict, register_backbone
from fewstep.models.comfyui import same_key
from fewstep.models.discriminator import blocks_at
from fewstep.models.pipelines import (
    MASK,
    STATES,
    decoded,
    dynamic_shift,
    encoded_images,
    in_batches,
    padded,
    pixels,
    word_counts,
)
from fewstep.models.recipes import Recipe, Setting
from fewstep.models.sizes import Side
from fewstep.models.videos import call_default


@register_backbone("ZImageTransformer2DModel")
class ZImage(Backbone):
    """Adapter of `ZImagePipeline`. Latents (C, h, w)."""

    pipeline_classes = ("ZImagePipeline",)
    teacher_guidance = 6.0  # the pipeline's guidance_scale 5 unless told
    comfyui_key = staticmethod(same_key)
    adapter_layers = ("to_q", "to_k", "to_v", "to_out.0", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
    recipe = Recipe(
        guidance_scale=Setting(6.0),  # the pipeline's own; 1 for Turbo weights
        shift=Setting(3.0, "Z-Image-Turbo's training shift, as its author states in Tongyi-MAI/Z-Image issue 74"),
        rank=Setting(32, "TDM-R1's released LoRA for Z-Image"),
        alpha=Setting(64, "TDM-R1's released LoRA for Z-Image"),
    )

    @property
    def sides(self) -> dict[str, Side]:
        side = Side(1024, 2 * self.pipeline.vae_scale_factor)
        return {"height": side, "width": side}

    @property
    def latent_shape(self) -> tuple[int, ...]:
        scale = self.pipeline.vae_scale_factor
        return (
            self.pipeline.transformer.config.in_channels, self.size["height"] // scale, self.size["width"] // scale
        )  # fmt: skip

    def call(self, network: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        dtype = next(network.parameters()).dtype
        lengths = word_counts(condition[MASK])  # words come first
        texts = [states[:length] for states, length in zip(condition[STATES].to(dtype), lengths, strict=True)]
        outputs = network(list(x.to(dtype).unsqueeze(2)), (1 - t).float(), texts, return_dict=False)[0]
        flow = -torch.stack(outputs).squeeze(2).to(x.dtype)
        return to_denoised(self.prediction, flow, x, self.process.alpha(t), self.process.sigma(t))

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Condition:
        longest = call_default(self.pipeline, "max_sequence_length")

        def encoded(batch: list[str]) -> Condition:
            texts, _ = self.pipeline.encode_prompt(
                batch, device=self.device, do_classifier_free_guidance=False, max_sequence_length=longest
            )
            states = torch.cat([padded(text[None], longest) for text in texts])
            mask = torch.cat([padded(text.new_ones(1, len(text), dtype=torch.long), longest) for text in texts])
            return {STATES: states, MASK: mask}

        return in_batches(encoded, prompts)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        return pixels(decoded(self.pipeline.vae, latents))

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        return encoded_images(self.pipeline.vae, images)

    def tapped_blocks(self, network: nn.Module) -> list[nn.Module]:
        return blocks_at(list(network.get_submodule("layers").children()))

    def block_tokens(self, output: Any) -> Tensor:
        _, height, width = self.latent_shape
        return output[:, : height * width // 4]  # the image comes first, then padding and the text

    @property
    def feature_width(self) -> int:
        return self.pipeline.transformer.dim

    def teacher_grid(self, steps: int) -> Tensor:
        height, width = self.latent_shape[1:]
        shift = dynamic_shift(self.pipeline.scheduler, height * width // 4)
        sigmas = np.linspace(1.0, 1 / steps, steps)
        return grids.from_scheduler(self.pipeline.scheduler, steps, self.process, sigmas=sigmas, **shift)

    @property
    def student_call(self) -> dict[str, Any]:
        return {"guidance_scale": 0, **self.told_size}

    def run_pipeline(self, predict: Predict, scheduler: Any, noise: Tensor, **call: Any) -> Tensor:
        def forward(x: list[Tensor], t: Tensor, texts: list[Tensor], **others: Any) -> tuple[list[Tensor]]:
            output = predict(torch.stack(x).squeeze(2), 1000 * (1 - t))
            return (list(-output.unsqueeze(2)),)

        null = self.null_condition()
        return self.stock_pipeline(forward, scheduler)(
            prompt_embeds=[null[STATES][0, : int(null[MASK].sum())]] * len(noise),
            latents=noise.to(self.device),
            guidance_scale=0,
            output_type="latent",
            **self.size,
            **call,
        ).images
