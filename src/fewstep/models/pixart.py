"""PixArt-alpha and -sigma: eps-prediction with learned variance over a text-conditioned latent transformer."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.core.prediction import to_denoised
from fewstep.core.tensors import Condition
from fewstep.models.adapters import shared_copy
from fewstep.models.backbone import Backbone, Predict, register_backbone
from fewstep.models.discriminator import blocks_at

STATES, MASK = "text_states", "text_mask"
"""Condition keys: text encoder states (B, L, width), and 1 where they are words and 0 where padding (B, L)."""

_ENCODE_BATCH = 64


@register_backbone("PixArtTransformer2DModel")
@register_backbone("StepsAwarePixArtTransformer2DModel")
@register_backbone("ExpertsPixArtTransformer2DModel")
class PixArt(Backbone):
    """Adapter of `PixArtAlphaPipeline`, `PixArtSigmaPipeline` and our `StepsAwarePixArtPipeline`."""

    pipeline_classes = ("PixArtAlphaPipeline", "PixArtSigmaPipeline", "StepsAwarePixArtPipeline")
    adapter_layers = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")

    @classmethod
    def pipeline_class(cls, name: str) -> Any:
        if name != "StepsAwarePixArtPipeline":
            return super().pipeline_class(name)
        from fewstep.models.steps_aware import StepsAwarePixArtPipeline

        return StepsAwarePixArtPipeline

    @property
    def latent_shape(self) -> tuple[int, ...]:
        config = self.pipeline.transformer.config
        return (config.in_channels, config.sample_size, config.sample_size)

    def call(self, network: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        dtype = next(network.parameters()).dtype
        states, mask = _without_padding(condition[STATES], condition[MASK])
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
        parts = []
        usual = inspect.signature(self.pipeline.encode_prompt).parameters["max_sequence_length"].default
        longest = min(usual, self.pipeline.tokenizer.model_max_length)  # more would be padding, which is masked anyway
        for start in range(0, len(prompts), _ENCODE_BATCH):
            batch = list(prompts[start : start + _ENCODE_BATCH])
            encoded = self.pipeline.encode_prompt(
                batch, do_classifier_free_guidance=False, device=self.device, max_sequence_length=longest
            )
            parts.append(encoded[:2])
        states, masks = zip(*parts, strict=True)
        return {STATES: torch.cat(states), MASK: torch.cat(masks)}

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        images = vae.decode(latents.to(vae.device, vae.dtype) / vae.config.scaling_factor, return_dict=False)[0]
        return ((images.float() / 2 + 0.5).clamp(0, 1) * 255).round().byte().cpu()

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        vae = self.pipeline.vae
        encoded = vae.encode(images.to(vae.device, vae.dtype))
        latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
        return latents.float() * vae.config.scaling_factor

    def tapped_blocks(self, network: nn.Module) -> list[nn.Module]:
        return blocks_at(list(network.get_submodule("transformer_blocks").children()))

    @property
    def feature_width(self) -> int:
        return self.pipeline.transformer.inner_dim

    def steps_aware(self) -> nn.Module:
        from fewstep.models.steps_aware import made_steps_aware

        return made_steps_aware(shared_copy(self.network))

    def pipeline_with(self, network: nn.Module, scheduler: Any) -> Any:
        kind = type(self.pipeline)
        if hasattr(network, "call_embedder"):
            kind = self.pipeline_class("StepsAwarePixArtPipeline")
        return kind(**{**self.pipeline.components, "transformer": network, "scheduler": scheduler})

    def run_pipeline(self, predict: Predict, scheduler: Any, noise: Tensor, **call: Any) -> Tensor:
        pipeline = type(self.pipeline)(
            **{
                **self.pipeline.components,
                "transformer": _Predictor(predict, self.pipeline.transformer),
                "scheduler": scheduler,
            }
        )
        pipeline.set_progress_bar_config(disable=True)
        null = self.null_condition()
        return pipeline(
            prompt=None,
            negative_prompt=None,
            prompt_embeds=null[STATES].expand(len(noise), -1, -1),
            prompt_attention_mask=null[MASK].expand(len(noise), -1),
            latents=noise.to(self.device),
            guidance_scale=1.0,
            use_resolution_binning=False,
            output_type="latent",
            **call,
        ).images


class _Predictor(nn.Module):
    """A function in the place of PixArt's network."""

    def __init__(self, predict: Predict, network: Any) -> None:
        super().__init__()
        self.predict, self.config = predict, network.config
        self.device, self.dtype = network.device, network.dtype

    def forward(self, x: Tensor, *, timestep: Tensor, **others: Any) -> tuple[Tensor]:
        output = self.predict(x, timestep)
        learns_variance = self.config.out_channels == 2 * self.config.in_channels
        return (torch.cat([output, output], 1) if learns_variance else output,)


def _without_padding(states: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Without the columns that are padding in every row: the same attention for a fraction of the work.

    Padding is masked with a large negative number, so that a row of nothing but padding attends to all of it evenly:
    such a batch is left alone.
    """
    words = mask.bool()
    if not bool(words.any(1).all()):
        return states, mask
    used = words.any(0)
    return states[:, used], mask[:, used]
