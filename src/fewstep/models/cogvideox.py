"""CogVideoX: videos under VP noise with zero terminal signal, v-prediction, frames before channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.attention.sparse.order import Grid
from fewstep.core.prediction import to_denoised
from fewstep.core.tensors import Condition
from fewstep.models.backbone import Backbone, Predict, register_backbone
from fewstep.models.comfyui import cogvideox_key
from fewstep.models.discriminator import blocks_at
from fewstep.models.pipelines import STATES, in_batches
from fewstep.models.recipes import Recipe, Setting
from fewstep.models.sizes import Side, frames_side
from fewstep.models.videos import call_default, video_pixels

_BLADE = "Video-BLADE's released TDM for CogVideoX-5B (arXiv 2508.10774)"


@register_backbone("CogVideoXTransformer3DModel")
class CogVideoX(Backbone):
    """Adapter of `CogVideoXPipeline`, text to video: 2B, 5B and 1.5-5B. Latents (f, C, h, w)."""

    pipeline_classes = ("CogVideoXPipeline",)
    output_name = "frames"
    teacher_guidance = 6.0  # the pipeline's own
    comfyui_key = staticmethod(cogvideox_key)
    self_attention = ("attn1",)
    adapter_layers = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")
    recipe = Recipe(
        guidance_scale=Setting(3.5, _BLADE),
        shift=Setting(2.0, "grid of TDM's released CogVideoX-2B student (arXiv 2503.06674)"),
        grid=Setting((1.0, 0.857, 0.666, 0.4), "timesteps 999, 856, 665, 399 of TDM's released CogVideoX-2B student"),
        critic_updates=Setting(1, _BLADE),
        student_rate=Setting(1e-4, _BLADE),
        critic_rate=Setting(5e-4, _BLADE),
        roles=Setting("adapters", _BLADE),
        rank=Setting(64, _BLADE),
    )

    @property
    def frame_rate(self) -> int:  # type: ignore[override]
        """8, and 16 for CogVideoX 1.5, as their cards say."""
        return 8 if self.pipeline.transformer.config.patch_size_t is None else 16

    @property
    def sides(self) -> dict[str, Side]:
        config, spatial = self.pipeline.transformer.config, self.pipeline.vae_scale_factor_spatial
        multiple = spatial * config.patch_size
        return {
            "height": Side(config.sample_height * spatial, multiple),
            "width": Side(config.sample_width * spatial, multiple),
            "num_frames": frames_side(config.sample_frames, self.pipeline.vae_scale_factor_temporal),
        }

    @property
    def _padding(self) -> int:
        """Latent frames that the pipeline puts before those of the video, so that patches in time (1.5) fill up."""
        frames = (self.size["num_frames"] - 1) // self.pipeline.vae_scale_factor_temporal + 1
        return -frames % (self.pipeline.transformer.config.patch_size_t or 1)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        pipeline = self.pipeline
        return (
            (self.size["num_frames"] - 1) // pipeline.vae_scale_factor_temporal + 1 + self._padding,
            pipeline.transformer.config.in_channels,
            self.size["height"] // pipeline.vae_scale_factor_spatial,
            self.size["width"] // pipeline.vae_scale_factor_spatial,
        )

    @property
    def token_grid(self) -> Grid:
        (frames, _, height, width), config = self.latent_shape, self.pipeline.transformer.config
        return frames // (config.patch_size_t or 1), height // config.patch_size, width // config.patch_size

    def call(self, network: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        dtype = next(network.parameters()).dtype
        output = network(
            hidden_states=x.to(dtype),
            encoder_hidden_states=condition[STATES].to(dtype),
            timestep=self.process.network_time(t),
            image_rotary_emb=self._rotary(x),
            return_dict=False,
        )[0].to(x.dtype)
        return to_denoised(self.prediction, output, x, self.process.alpha(t), self.process.sigma(t))

    def _rotary(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """Positions as the pipeline computes them, for networks that are told (not 2B)."""
        if not self.pipeline.transformer.config.use_rotary_positional_embeddings:
            return None
        key = (x.shape[1], *x.shape[3:], x.device)
        if self._positions is None or self._positions[0] != key:
            height, width = (side * self.pipeline.vae_scale_factor_spatial for side in x.shape[3:])
            positions = self.pipeline._prepare_rotary_positional_embeddings(height, width, x.shape[1], x.device)
            self._positions = (key, positions)
        return self._positions[1]

    _positions: tuple[Any, tuple[Tensor, Tensor]] | None = None
    """The last result of `_rotary` with what it was for."""

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Condition:
        def encoded(batch: list[str]) -> Condition:  # no mask: the network attends to padding as well
            states, _ = self.pipeline.encode_prompt(
                batch, do_classifier_free_guidance=False, device=self.device, max_sequence_length=self._text_length
            )
            return {STATES: states}

        return in_batches(encoded, prompts)

    @property
    def _text_length(self) -> int:
        """The length to which prompts are padded, which the network was built for."""
        return self.pipeline.transformer.config.max_text_seq_length

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        return video_pixels(self.pipeline.decode_latents(latents[:, self._padding :].to(vae.device, vae.dtype)))

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Videos (B, F, 3, H, W) in [-1, 1] as latents (B, *latent_shape)."""
        vae = self.pipeline.vae
        latents = vae.encode(images.transpose(1, 2).to(vae.device, vae.dtype)).latent_dist.mode()
        latents = latents.transpose(1, 2).float() * vae.config.scaling_factor
        return torch.cat([latents[:, :1]] * self._padding + [latents], 1)

    def tapped_blocks(self, network: nn.Module) -> list[nn.Module]:
        return blocks_at(list(network.get_submodule("transformer_blocks").children()))

    def block_tokens(self, output: Any) -> Tensor:
        return output[0]  # of the video; the others are of the text

    @property
    def feature_width(self) -> int:
        config = self.pipeline.transformer.config
        return config.num_attention_heads * config.attention_head_dim

    @property
    def student_call(self) -> dict[str, Any]:
        usual = call_default(self.pipeline, "max_sequence_length")
        length = {} if self._text_length == usual else {"max_sequence_length": self._text_length}
        return super().student_call | length

    def run_pipeline(self, predict: Predict, scheduler: Any, noise: Tensor, **call: Any) -> Tensor:
        def forward(hidden_states: Tensor, timestep: Tensor, **others: Any) -> tuple[Tensor]:
            return (predict(hidden_states, timestep),)

        states = self.null_condition()[STATES]
        return self.stock_pipeline(forward, scheduler)(
            prompt_embeds=states.expand(len(noise), -1, -1),
            latents=noise.to(self.device),
            guidance_scale=1.0,
            output_type="latent",
            **self.size,
            **call,
        ).frames
