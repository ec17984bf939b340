"""Wan2.1 and Wan2.2, text to video: flow over videos, channels before frames.

Wan2.2-A14B has two networks, one for times at or above `boundary_ratio` and one below. Here they are one
(`WanExperts`), so that teacher, student and critic have both; a student is saved as two networks again. The pipeline
may guide the second one with another scale (`guidance_scale_2`); here both have one.

Wan2.2-5B is told a time for each token. All tokens of a text-to-video sample have the same, so it is told once here:
the same numbers, without an embedding for each token in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.attention import CausalSeat
from fewstep.attention.sparse.order import Grid
from fewstep.core.prediction import to_denoised
from fewstep.core.tensors import Condition
from fewstep.errors import FewstepError
from fewstep.models.backbone import Backbone, Predict, register_backbone
from fewstep.models.comfyui import wan_key
from fewstep.models.discriminator import blocks_at
from fewstep.models.pipelines import STATES, in_batches, rebuilt, stand_in
from fewstep.models.recipes import Recipe, Setting
from fewstep.models.sizes import Side, frames_side
from fewstep.models.videos import (
    call_default,
    decoded_by_statistics,
    encoded_by_statistics,
    video_pixels,
)
from fewstep.models.wan_decoder import StreamDecoder
from fewstep.models.wan_experts import WanExperts

_BLADE = "Video-BLADE's released TDM for Wan2.1-1.3B (arXiv 2508.10774)"
_FORCING = "Self Forcing's release for Wan2.1-1.3B (arXiv 2506.08009)"
_PHASED = "Phased DMD, arXiv 2510.27684, appendix B (Wan2.2-A14B)"

_SELF_FORCING = {
    "guidance_scale": Setting(4.0, _FORCING),
    "critic_updates": Setting(5, _FORCING),
    "student_rate": Setting(2e-6, _FORCING),
    "critic_rate": Setting(4e-7, _FORCING),
    "roles": Setting("copies", _FORCING),
}


@register_backbone("WanTransformer3DModel")
class Wan(Backbone):
    """Adapter of `WanPipeline`. Latents (C, f, h, w)."""

    pipeline_classes = ("WanPipeline",)
    output_name = "frames"
    teacher_guidance = 5.0  # the pipeline's own
    comfyui_key = staticmethod(wan_key)
    self_attention = ("attn1",)
    adapter_layers = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")
    recipe = Recipe(
        guidance_scale=Setting(5.0, _BLADE),
        shift=Setting(5.0, _PHASED),
        critic_updates=Setting(1, _BLADE),
        student_rate=Setting(1e-4, _BLADE),
        critic_rate=Setting(5e-4, _BLADE),
        roles=Setting("adapters", _BLADE),
        rank=Setting(64, _BLADE),
        by_method={
            "causal-init": {
                "student_rate": Setting(2e-6, "CausVid's release for Wan2.1-1.3B (arXiv 2412.07772)"),
                "roles": Setting("copies", _FORCING),
            },
            **dict.fromkeys(("self-forcing", "reward-forcing", "live-avatar"), _SELF_FORCING),
        },
    )

    def __init__(self, pipeline: Any, source: str) -> None:
        super().__init__(pipeline, source)
        if pipeline.transformer_2 is not None and pipeline.config.boundary_ratio is not None:
            boundary = pipeline.config.boundary_ratio * pipeline.scheduler.config.num_train_timesteps
            self.network = WanExperts(pipeline.transformer, pipeline.transformer_2, boundary).eval()

    @property
    def frame_rate(self) -> int:  # type: ignore[override]
        """16, and 24 for Wan2.2-5B, as their cards say."""
        return 24 if self.pipeline.config.get("expand_timesteps") else 16

    @property
    def sides(self) -> dict[str, Side]:
        pipeline, patch = self.pipeline, self.pipeline.transformer.config.patch_size
        height, width, frames = (call_default(pipeline, name) for name in ("height", "width", "num_frames"))
        return {
            "height": Side(height, max(16, pipeline.vae_scale_factor_spatial * patch[1])),
            "width": Side(width, max(16, pipeline.vae_scale_factor_spatial * patch[2])),
            "num_frames": frames_side(frames, pipeline.vae_scale_factor_temporal),
        }

    @property
    def latent_shape(self) -> tuple[int, ...]:
        pipeline = self.pipeline
        return (
            pipeline.transformer.config.in_channels,
            (self.size["num_frames"] - 1) // pipeline.vae_scale_factor_temporal + 1,
            self.size["height"] // pipeline.vae_scale_factor_spatial,
            self.size["width"] // pipeline.vae_scale_factor_spatial,
        )

    @property
    def token_grid(self) -> Grid:
        frames, height, width = self.latent_shape[1:]
        patch = self.pipeline.transformer.config.patch_size
        return frames // patch[0], height // patch[1], width // patch[2]

    def call(self, network: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """As of all backbones; `t` may also be (B, f), a time for each latent frame."""
        dtype: Any = network.dtype  # some parameters stay float32 whatever the others are
        time = self.process.network_time(t)
        if t.ndim == 2:
            patch = self.pipeline.transformer.config.patch_size
            time = time.repeat_interleave(x.shape[-2] * x.shape[-1] // (patch[1] * patch[2]), 1)
        output = network(
            hidden_states=self.fed(x, condition).to(dtype),
            timestep=time,
            encoder_hidden_states=condition[STATES].to(dtype),
            return_dict=False,
        )[0].to(x.dtype)
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        if t.ndim == 1:
            return to_denoised(self.prediction, output, x, alpha, sigma)
        output, x = (part.transpose(1, 2).flatten(0, 1) for part in (output, x))  # frame by frame
        denoised = to_denoised(self.prediction, output, x, alpha.flatten(), sigma.flatten())
        return denoised.unflatten(0, t.shape).transpose(1, 2)

    def fed(self, x: Tensor, condition: Condition) -> Tensor:
        """What the network is fed of noisy latents (B, C, f, h, w): themselves."""
        return x

    def causal(self, network: nn.Module) -> CausalSeat:
        if isinstance(network, WanExperts) or self.pipeline.transformer.config.patch_size[0] != 1:
            raise FewstepError(
                "found a Wan of two networks, or of patches of several frames, for a causal student, expected one "
                "network and a token row for every latent frame (Wan2.1, Wan2.2-5B), fix: choose such a teacher"
            )
        return CausalSeat(network)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Condition:
        longest = call_default(self.pipeline, "max_sequence_length")

        def encoded(batch: list[str]) -> Condition:  # zeros after the words, to which the network attends as well
            states, _ = self.pipeline.encode_prompt(
                batch, do_classifier_free_guidance=False, device=self.device, max_sequence_length=longest
            )
            return {STATES: states}

        return in_batches(encoded, prompts)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        return video_pixels(decoded_by_statistics(self.pipeline.vae, latents))

    def stream_decoder(self) -> Callable[[Tensor], Tensor]:
        return StreamDecoder(self.pipeline.vae)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Videos (B, F, 3, H, W) in [-1, 1] as latents (B, *latent_shape)."""
        return encoded_by_statistics(self.pipeline.vae, images.transpose(1, 2))

    def tapped_blocks(self, network: nn.Module) -> list[nn.Module]:
        if isinstance(network, WanExperts):  # which of the two computes differs from sample to sample
            return super().tapped_blocks(network)
        return blocks_at(list(network.get_submodule("blocks").children()))

    @property
    def network_parts(self) -> dict[str, str]:
        both = isinstance(self.network, WanExperts)
        return {"transformer": "high.", "transformer_2": "low."} if both else super().network_parts

    @property
    def feature_width(self) -> int:
        config = self.pipeline.transformer.config
        return config.num_attention_heads * config.attention_head_dim

    def pipeline_with(self, network: nn.Module, scheduler: Any) -> Any:
        if not isinstance(network, WanExperts):
            return super().pipeline_with(network, scheduler)
        return rebuilt(self.pipeline, transformer=network.high, transformer_2=network.low, scheduler=scheduler)

    def stock_pipeline(self, forward: Callable[..., tuple[Tensor]], scheduler: Any) -> Any:
        if not isinstance(self.network, WanExperts):
            return super().stock_pipeline(forward, scheduler)
        parts = {
            name: stand_in(getattr(self.pipeline, name), forward, self.device)
            for name in ("transformer", "transformer_2")
        }
        pipeline = rebuilt(self.pipeline, scheduler=scheduler, **parts)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def run_pipeline(self, predict: Predict, scheduler: Any, noise: Tensor, **call: Any) -> Tensor:
        def forward(hidden_states: Tensor, timestep: Tensor, **others: Any) -> tuple[Tensor]:
            latents = hidden_states[:, : noise.shape[1]]  # without what a family feeds beside them
            return (predict(latents, timestep[:, 0] if timestep.ndim == 2 else timestep),)

        states = self.null_condition()[STATES]
        return self.stock_pipeline(forward, scheduler)(
            prompt_embeds=states.expand(len(noise), -1, -1),
            latents=noise.to(self.device),
            guidance_scale=1.0,
            output_type="latent",
            **self.size,
            **call,
        ).frames
