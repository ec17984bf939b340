"""Qwen-Image: flow over packed 2x2 patches of latents, text of a vision-language model, network times in [0, 1].

The pipeline guides by `true_cfg_scale` and then gives each token of the guided velocity the length of the conditional
one. Teachers here are guided plainly (`core.guidance`), without that: unguided sampling is the pipeline's own, guided
sampling is the pipeline's before the rescaling.
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
    dynamic_shift,
    in_batches,
    pack,
    padded,
    pixels,
    unpack,
    without_padding,
)
from fewstep.models.recipes import Recipe, Setting
from fewstep.models.sizes import Side
from fewstep.models.videos import call_default, decoded_by_statistics, encoded_by_statistics


@register_backbone("QwenImageTransformer2DModel")
class QwenImage(Backbone):
    """Adapter of `QwenImagePipeline`. Latents (C, h, w), packed as the network wants them at the border."""

    pipeline_classes = ("QwenImagePipeline",)
    teacher_guidance = 4.0  # true_cfg_scale of the pipeline unless told
    comfyui_key = staticmethod(same_key)
    adapter_layers = (
        "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
        "img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2",
    )  # fmt: skip
    recipe = Recipe(
        guidance_scale=Setting(4.0),  # the pipeline's own
        shift=Setting(3.0, "Phased DMD, arXiv 2510.27684, section 3"),
        student_rate=Setting(5e-5, "Phased DMD, arXiv 2510.27684, appendix B (DMD of a LoRA student)"),
        rank=Setting(64, "Phased DMD, arXiv 2510.27684, appendix B"),
        alpha=Setting(8, "Phased DMD, arXiv 2510.27684, appendix B"),
    )

    @property
    def sides(self) -> dict[str, Side]:
        usual = self.pipeline.default_sample_size * self.pipeline.vae_scale_factor
        side = Side(usual, 2 * self.pipeline.vae_scale_factor)
        return {"height": side, "width": side}

    @property
    def latent_shape(self) -> tuple[int, ...]:
        scale = self.pipeline.vae_scale_factor
        channels = self.pipeline.transformer.config.in_channels // 4
        return (channels, self.size["height"] // scale, self.size["width"] // scale)

    def call(self, network: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        dtype = next(network.parameters()).dtype
        states, mask = without_padding(condition[STATES], condition[MASK])
        output = network(
            hidden_states=pack(x.to(dtype)),
            timestep=self.process.network_time(t) / 1000,
            encoder_hidden_states=states.to(dtype),
            encoder_hidden_states_mask=mask,
            img_shapes=[[(1, x.shape[-2] // 2, x.shape[-1] // 2)]] * len(x),
            return_dict=False,
        )[0]
        flow = unpack(output, x.shape[1:]).to(x.dtype)
        return to_denoised(self.prediction, flow, x, self.process.alpha(t), self.process.sigma(t))

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Condition:
        longest = call_default(self.pipeline, "max_sequence_length")

        def encoded(batch: list[str]) -> Condition:
            states, mask = self.pipeline.encode_prompt(batch, device=self.device, max_sequence_length=longest)
            mask = states.new_ones(states.shape[:2], dtype=torch.long) if mask is None else mask
            return {STATES: padded(states, longest), MASK: padded(mask, longest)}

        return in_batches(encoded, prompts)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        return pixels(decoded_by_statistics(self.pipeline.vae, latents.unsqueeze(2))[:, :, 0])

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        return encoded_by_statistics(self.pipeline.vae, images.unsqueeze(2))[:, :, 0]

    def tapped_blocks(self, network: nn.Module) -> list[nn.Module]:
        return blocks_at(list(network.get_submodule("transformer_blocks").children()))

    def block_tokens(self, output: Any) -> Tensor:
        return output[1]  # of the image; the first are of the text

    @property
    def feature_width(self) -> int:
        return self.pipeline.transformer.inner_dim

    def teacher_grid(self, steps: int) -> Tensor:
        sigmas = np.linspace(1.0, 1 / steps, steps)
        height, width = self.latent_shape[1:]
        shift = dynamic_shift(self.pipeline.scheduler, height * width // 4)
        return grids.from_scheduler(self.pipeline.scheduler, steps, self.process, sigmas=sigmas, **shift)

    @property
    def student_call(self) -> dict[str, Any]:
        return {"true_cfg_scale": 1, **self.told_size}

    def run_pipeline(self, predict: Predict, scheduler: Any, noise: Tensor, **call: Any) -> Tensor:
        def forward(hidden_states: Tensor, timestep: Tensor, **others: Any) -> tuple[Tensor]:
            return (pack(predict(unpack(hidden_states, noise.shape[1:]), 1000 * timestep)),)

        null = self.null_condition()
        packed = self.stock_pipeline(forward, scheduler)(
            prompt_embeds=null[STATES].expand(len(noise), -1, -1),
            prompt_embeds_mask=null[MASK].expand(len(noise), -1),
            latents=pack(noise.to(self.device)),
            true_cfg_scale=1,
            output_type="latent",
            **self.size,
            **call,
        ).images
        return unpack(packed, noise.shape[1:])
