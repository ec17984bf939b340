"""Sana: flow matching by a linear transformer over the strongly compressed latents of a DC-AE, told by Gemma.

The stock scheduler (DPM-Solver with flow sigmas) rounds the numbers that the network is fed down to whole ones; here it
is fed the times themselves.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.core.prediction import to_denoised
from fewstep.core.tensors import Condition
from fewstep.models.backbone import Backbone, Predict, register_backbone
from fewstep.models.discriminator import blocks_at
from fewstep.models.pipelines import MASK, STATES, decoded, encoded_images, in_batches, pixels, without_padding
from fewstep.models.recipes import Recipe, Setting
from fewstep.models.sizes import Side

_BINNED_SIZES = (16, 32, 64, 128)  # latent sizes for which the pipeline has a table of aspect ratios
_STOCK_PIXELS = 1024  # what the pipeline makes unless told, whatever the network's size


@register_backbone("SanaTransformer2DModel")
class Sana(Backbone):
    """Adapter of `SanaPipeline`.

    Prompts are encoded behind the pipeline's instruction to enhance them, the empty one of guidance without it.
    """

    pipeline_classes = ("SanaPipeline",)
    adapter_layers = ("to_q", "to_k", "to_v", "to_out.0")
    teacher_steps = 20
    teacher_guidance = 4.5
    recipe = Recipe(guidance_scale=Setting(4.5), shift=Setting(3.0))

    @property
    def sides(self) -> dict[str, Side]:
        config = self.pipeline.transformer.config
        return self._square(config.sample_size, config.patch_size)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        return (self.pipeline.transformer.config.in_channels, *self.latent_sides)

    def call(self, network: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        dtype = next(network.parameters()).dtype
        states, mask = without_padding(condition[STATES], condition[MASK])
        output = network(
            x.to(dtype),
            encoder_hidden_states=states.to(dtype),
            encoder_attention_mask=mask,
            timestep=self.process.network_time(t) * self.pipeline.transformer.config.timestep_scale,
            return_dict=False,
        )[0]
        return to_denoised(self.prediction, output.to(x.dtype), x, self.process.alpha(t), self.process.sigma(t))

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Condition:
        usual = inspect.signature(type(self.pipeline).__call__).parameters["complex_human_instruction"].default

        def encoded(batch: list[str]) -> Condition:
            states, mask, *_ = self.pipeline.encode_prompt(
                batch, False, device=self.device, complex_human_instruction=usual
            )
            return {STATES: states, MASK: mask}

        return in_batches(encoded, prompts)

    @torch.no_grad()
    def null_condition(self) -> Condition:
        if self._null is None:
            *_, states, mask = self.pipeline.encode_prompt("", True, device=self.device)
            self._null = {STATES: states, MASK: mask}
        return self._null

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        return pixels(decoded(self.pipeline.vae, latents))

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        return encoded_images(self.pipeline.vae, images)

    def tapped_blocks(self, network: nn.Module) -> list[nn.Module]:
        return blocks_at(list(network.get_submodule("transformer_blocks").children()))

    @property
    def feature_width(self) -> int:
        config = self.pipeline.transformer.config
        return config.num_attention_heads * config.attention_head_dim

    @property
    def student_call(self) -> dict[str, Any]:
        usual = set(self.size.values()) == {_STOCK_PIXELS}
        binned = self.pipeline.transformer.config.sample_size in _BINNED_SIZES and not self.told_size
        more = {"guidance_scale": 1} | ({} if usual else self.size)
        return more if binned else more | {"use_resolution_binning": False}

    def run_pipeline(self, predict: Predict, scheduler: Any, noise: Tensor, **call: Any) -> Tensor:
        scale = self.pipeline.transformer.config.timestep_scale

        def forward(x: Tensor, *, timestep: Tensor, **others: Any) -> tuple[Tensor]:
            return (predict(x, timestep / scale),)

        null = self.null_condition()
        return self.stock_pipeline(forward, scheduler)(
            negative_prompt=None,
            prompt_embeds=null[STATES].expand(len(noise), -1, -1),
            prompt_attention_mask=null[MASK].expand(len(noise), -1),
            latents=noise,
            guidance_scale=1.0,
            use_resolution_binning=False,
            output_type="latent",
            **self.size,
            **call,
        ).images
