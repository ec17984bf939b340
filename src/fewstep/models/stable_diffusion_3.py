"""Stable Diffusion 3 and 3.5: flow matching over three text encoders, two of which also give a pooled text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
    pixels,
)
from fewstep.models.recipes import Recipe, Setting
from fewstep.models.sizes import Side

_TDM_R1 = "TDM-R1's code, SD3.5-M at 512 pixels"


@register_backbone("SD3Transformer2DModel")
class StableDiffusion3(Backbone):
    """Adapter of `StableDiffusion3Pipeline`."""

    pipeline_classes = ("StableDiffusion3Pipeline",)
    comfyui_key = staticmethod(split_key)
    self_attention = ("attn", "attn2")
    text_first = False
    adapter_layers = (
        "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "ff.net.0.proj",
        "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2",
    )  # fmt: skip
    teacher_steps = 28
    teacher_guidance = 7.0
    recipe = Recipe(
        guidance_scale=Setting(4.5, _TDM_R1),
        shift=Setting(3.0, _TDM_R1),
        student_rate=Setting(7.5e-5, _TDM_R1),
        critic_rate=Setting(3e-4, _TDM_R1),
        roles=Setting("adapters", _TDM_R1),
        rank=Setting(32, _TDM_R1),
        alpha=Setting(64, _TDM_R1),
    )

    @property
    def sides(self) -> dict[str, Side]:
        config = self.pipeline.transformer.config
        return self._square(config.sample_size, config.patch_size)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        return (self.pipeline.transformer.config.in_channels, *self.latent_sides)

    @property
    def token_grid(self) -> Grid:
        patch = self.pipeline.transformer.config.patch_size
        return 1, self.latent_sides[0] // patch, self.latent_sides[1] // patch

    def call(self, network: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        dtype = next(network.parameters()).dtype
        output = network(
            hidden_states=x.to(dtype),
            timestep=self.process.network_time(t),
            encoder_hidden_states=condition[STATES].to(dtype),
            pooled_projections=condition[POOLED].to(dtype),
            return_dict=False,
        )[0]
        return to_denoised(self.prediction, output.to(x.dtype), x, self.process.alpha(t), self.process.sigma(t))

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Condition:
        def encoded(batch: list[str]) -> Condition:
            states, _, pooled, _ = self.pipeline.encode_prompt(
                batch, None, None, device=self.device, do_classifier_free_guidance=False
            )
            return {STATES: states, POOLED: pooled}

        return in_batches(encoded, prompts)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        return pixels(decoded(self.pipeline.vae, latents))

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        return encoded_images(self.pipeline.vae, images)

    def teacher_grid(self, steps: int) -> Tensor:
        scheduler, patch = self.pipeline.scheduler, self.pipeline.transformer.config.patch_size
        height, width = self.latent_sides
        shift = dynamic_shift(scheduler, height * width // patch**2)
        return grids.from_scheduler(scheduler, steps, self.process, **shift)

    def tapped_blocks(self, network: nn.Module) -> list[nn.Module]:
        return blocks_at(list(network.get_submodule("transformer_blocks").children()))

    def block_tokens(self, output: tuple[Tensor, Tensor]) -> Tensor:
        return output[1]  # the image's; the first is the text's

    @property
    def feature_width(self) -> int:
        return self.pipeline.transformer.inner_dim

    def run_pipeline(self, predict: Predict, scheduler: Any, noise: Tensor, **call: Any) -> Tensor:
        def forward(*, hidden_states: Tensor, timestep: Tensor, **others: Any) -> tuple[Tensor]:
            return (predict(hidden_states, timestep),)

        null = self.null_condition()
        return self.stock_pipeline(forward, scheduler)(
            prompt_embeds=null[STATES].expand(len(noise), -1, -1),
            pooled_prompt_embeds=null[POOLED].expand(len(noise), -1),
            latents=noise,
            guidance_scale=1.0,
            output_type="latent",
            **self.size,
            **call,
        ).images
