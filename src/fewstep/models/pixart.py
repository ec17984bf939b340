"""PixArt-alpha and -sigma: eps-prediction with learned variance over a text-conditioned latent transformer."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.attention.sparse.order import Grid
from fewstep.core.prediction import to_denoised
from fewstep.core.tensors import Condition
from fewstep.models.adapters import shared_copy
from fewstep.models.backbone import Backbone, Predict, register_backbone
from fewstep.models.comfyui import pixart_key
from fewstep.models.discriminator import blocks_at
from fewstep.models.pipelines import MASK, STATES, decoded, encoded_images, in_batches, pixels, without_padding
from fewstep.models.recipes import Recipe, Setting
from fewstep.models.sizes import Side

_BINNED_SIZES = (32, 64, 128)  # latent sizes whose images the pipelines can fit to their tables of aspect ratios
_TDM = "TDM paper, app. D"


@register_backbone("PixArtTransformer2DModel")
@register_backbone("StepsAwarePixArtTransformer2DModel")
@register_backbone("ExpertsPixArtTransformer2DModel")
class PixArt(Backbone):
    """Adapter of `PixArtAlphaPipeline`, `PixArtSigmaPipeline` and our `StepsAwarePixArtPipeline`."""

    pipeline_classes = ("PixArtAlphaPipeline", "PixArtSigmaPipeline", "StepsAwarePixArtPipeline")
    comfyui_key = staticmethod(pixart_key)
    self_attention = ("attn1",)
    adapter_layers = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")
    recipe = Recipe(
        guidance_scale=Setting(3.5, _TDM),
        shift=Setting(1.0, _TDM),
        start_time=Setting(1.0, _TDM),
        critic_updates=Setting(1, _TDM),
        student_rate=Setting(2e-6, _TDM),
        critic_rate=Setting(2e-5, _TDM),
        roles=Setting("copies", "TDM's released demo"),
    )

    @classmethod
    def pipeline_class(cls, name: str) -> Any:
        if name != "StepsAwarePixArtPipeline":
            return super().pipeline_class(name)
        from fewstep.models.steps_aware import StepsAwarePixArtPipeline

        return StepsAwarePixArtPipeline

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
        states, mask = without_padding(condition[STATES], condition[MASK])
        output = network(
            x.to(dtype),
            encoder_hidden_states=states.to(dtype),
            encoder_attention_mask=mask,
            timestep=self.process.network_time(t),
            added_cond_kwargs=self._added_conditions(network, x, condition),
            return_dict=False,
        )[0]
        output = output[:, : x.shape[1]].to(x.dtype)  # the other half, where there is one, is the learned variance
        return to_denoised(self.prediction, output, x, self.process.alpha(t), self.process.sigma(t))

    def _added_conditions(self, network: Any, x: Tensor, condition: Condition) -> dict[str, Tensor | None]:
        """PixArt's own (image size in pixels, 1024-pixel models only), and what steps-aware networks read."""
        added: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if network.use_additional_conditions:
            height, width = (side * self.pipeline.vae_scale_factor for side in x.shape[-2:])
            added["resolution"] = x.new_tensor([height, width]).expand(len(x), 2)
            added["aspect_ratio"] = x.new_tensor([height / width]).expand(len(x), 1)
        if hasattr(network, "call_embedder"):
            added |= {name: condition[name] for name in ("steps", "landing") if name in condition}
        return added

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Condition:
        usual = inspect.signature(self.pipeline.encode_prompt).parameters["max_sequence_length"].default
        longest = min(usual, self.pipeline.tokenizer.model_max_length)  # more would be padding, which is masked anyway

        def encoded(batch: list[str]) -> Condition:
            states, mask = self.pipeline.encode_prompt(
                batch, do_classifier_free_guidance=False, device=self.device, max_sequence_length=longest
            )[:2]
            return {STATES: states, MASK: mask}

        return in_batches(encoded, prompts)

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
        return self.pipeline.transformer.inner_dim

    def steps_aware(self) -> nn.Module:
        from fewstep.models.steps_aware import made_steps_aware

        return made_steps_aware(shared_copy(self.network))

    def pipeline_with(self, network: nn.Module, scheduler: Any) -> Any:
        if not hasattr(network, "call_embedder"):
            return super().pipeline_with(network, scheduler)
        kind = self.pipeline_class("StepsAwarePixArtPipeline")
        return kind(**{**self.pipeline.components, "transformer": network, "scheduler": scheduler})

    @property
    def student_call(self) -> dict[str, Any]:
        """The pipeline refuses sizes for which it has no table of aspect ratios, unless told not to look one up."""
        binned = self.pipeline.transformer.config.sample_size in _BINNED_SIZES and not self.told_size
        return super().student_call | ({} if binned else {"use_resolution_binning": False})

    def run_pipeline(self, predict: Predict, scheduler: Any, noise: Tensor, **call: Any) -> Tensor:
        learns_variance = self.pipeline.transformer.config.out_channels == 2 * noise.shape[1]

        def forward(x: Tensor, *, timestep: Tensor, **others: Any) -> tuple[Tensor]:
            output = predict(x, timestep)
            return (torch.cat([output, output], 1) if learns_variance else output,)

        null = self.null_condition()
        return self.stock_pipeline(forward, scheduler)(
            prompt=None,
            negative_prompt=None,
            prompt_embeds=null[STATES].expand(len(noise), -1, -1),
            prompt_attention_mask=null[MASK].expand(len(noise), -1),
            latents=noise.to(self.device),
            guidance_scale=1.0,
            use_resolution_binning=False,
            output_type="latent",
            **self.size,
            **call,
        ).images
