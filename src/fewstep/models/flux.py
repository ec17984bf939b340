"""FLUX.1: flow matching over packed latents; dev is told its guidance scale, schnell is not.

Outside, latents are (B, C, h, w) as everywhere; packing 2x2 of them into one token is done at the border.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fewstep.attention.sparse.order import Grid
from fewstep.core import grids
from fewstep.core.prediction import to_denoised
from fewstep.core.tensors import Condition
from fewstep.models.backbone import Backbone, Predict, register_backbone
from fewstep.models.comfyui import split_key
from fewstep.models.discriminator import blocks_at
from fewstep.models.pipelines import (
    POOLED,
    STATES,
    decoded,
    dynamic_shift,
    encoded_images,
    in_batches,
    pack,
    pixels,
    unpack,
)
from fewstep.models.recipes import Recipe, Setting
from fewstep.models.sizes import Side


@register_backbone("FluxTransformer2DModel")
class Flux(Backbone):
    """Adapter of `FluxPipeline`.

    FLUX.1-dev has classifier-free guidance distilled into it: all roles are told `embedded_guidance` (3.5), and
    `teacher_guidance` is 1. A guidance scale above 1 is the pipeline's "true" guidance, with the empty prompt.
    """

    pipeline_classes = ("FluxPipeline",)
    comfyui_key = staticmethod(split_key)
    self_attention = ("attn",)
    adapter_layers = (
        "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "ff.net.0.proj",
        "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp",
    )  # fmt: skip
    teacher_guidance = 1.0
    recipe = Recipe(guidance_scale=Setting(1.0), shift=Setting(3.0))

    def __init__(self, pipeline: Any, source: str) -> None:
        super().__init__(pipeline, source)
        self._told = bool(pipeline.transformer.config.guidance_embeds)
        self.embedded_guidance = 3.5 if self._told else None
        self.teacher_steps = 28 if self._told else 4

    @property
    def sides(self) -> dict[str, Side]:
        return self._square(self.pipeline.default_sample_size, 2)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        return (self.pipeline.transformer.config.in_channels // 4, *self.latent_sides)

    @property
    def token_grid(self) -> Grid:
        return 1, self.latent_sides[0] // 2, self.latent_sides[1] // 2

    def call(self, network: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        dtype = next(network.parameters()).dtype
        states = condition[STATES].to(dtype)
        height, width = self.latent_sides
        places = self.pipeline._prepare_latent_image_ids(len(x), height // 2, width // 2, x.device, dtype)
        guidance = x.new_full((len(x),), self.embedded_guidance, dtype=torch.float32) if self._told else None
        output = network(
            hidden_states=pack(x).to(dtype),
            timestep=self.process.network_time(t) / 1000,
            guidance=guidance,
            pooled_projections=condition[POOLED].to(dtype),
            encoder_hidden_states=states,
            txt_ids=states.new_zeros(states.shape[1], 3),
            img_ids=places,
            return_dict=False,
        )[0]
        output = unpack(output.to(x.dtype), x.shape[1:])
        return to_denoised(self.prediction, output, x, self.process.alpha(t), self.process.sigma(t))

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Condition:
        def encoded(batch: list[str]) -> Condition:
            states, pooled, _ = self.pipeline.encode_prompt(batch, device=self.device)
            return {STATES: states, POOLED: pooled}

        return in_batches(encoded, prompts)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        return pixels(decoded(self.pipeline.vae, latents))

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        return encoded_images(self.pipeline.vae, images)

    def teacher_grid(self, steps: int) -> Tensor:
        """Even steps through a shift that is the scheduler's own (schnell) or grows with the image (dev)."""
        even = np.linspace(1.0, 1 / steps, steps)
        height, width = self.latent_sides
        shift = dynamic_shift(self.pipeline.scheduler, height * width // 4)
        return grids.from_scheduler(self.pipeline.scheduler, steps, self.process, sigmas=even, **shift)

    def adapter_targets(self, layers: str) -> list[str]:
        targets = super().adapter_targets(layers)
        if layers != "attention+ff":
            return targets
        last = [name for name, _ in self.network.named_modules() if name.endswith(".proj_out")]
        return targets + last  # in full: the network's own last layer is called proj_out as well

    def tapped_blocks(self, network: nn.Module) -> list[nn.Module]:
        parts = (network.get_submodule(name) for name in ("transformer_blocks", "single_transformer_blocks"))
        return blocks_at([block for part in parts for block in part.children()])

    def block_tokens(self, output: tuple[Tensor, Tensor]) -> Tensor:
        return output[1]  # the image's; the first is the text's

    @property
    def feature_width(self) -> int:
        return self.pipeline.transformer.inner_dim

    def run_pipeline(self, predict: Predict, scheduler: Any, noise: Tensor, **call: Any) -> Tensor:
        def forward(*, hidden_states: Tensor, timestep: Tensor, **others: Any) -> tuple[Tensor]:
            return (pack(predict(unpack(hidden_states, noise.shape[1:]), 1000 * timestep)),)

        null = self.null_condition()
        packed = self.stock_pipeline(forward, scheduler)(
            prompt_embeds=null[STATES].expand(len(noise), -1, -1),
            pooled_prompt_embeds=null[POOLED].expand(len(noise), -1),
            latents=pack(noise),
            output_type="latent",
            **self.size,
            **call,
        ).images
        return unpack(packed, noise.shape[1:])
