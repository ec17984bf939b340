"""The embedded video teacher's pipeline, a Wan in miniature whose frames are encoded one by one, and its adapter.

`WanPipeline` is tied to an autoencoder that squeezes four frames into one latent and asks for 4 n + 1 of them. Here a
frame is a latent, so tracks, sound and chunks are exact to the frame, any number of frames can be made, and a stream is
decoded as it comes. Network, text states and scheduler are Wan's own; beside the noisy latents the network is fed what
frames are told, tracks and a drive signal (`fewstep.models.tracks`), zeros where nothing is said.

    from fewstep.models.film import FilmPipeline
    film = FilmPipeline.from_pretrained(folder)("a frog hops to the right on a green background").frames[0]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderTiny, DiffusionPipeline, SchedulerMixin, WanPipeline, WanTransformer3DModel
from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput
from diffusers.video_processor import VideoProcessor
from torch import Tensor
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

from fewstep.core.guidance import joint_weights
from fewstep.core.tensors import CONTROLS, Condition
from fewstep.errors import FewstepError
from fewstep.models.backbone import register_backbone
from fewstep.models.pipelines import decoded, encoded_images
from fewstep.models.recipes import Recipe, Setting
from fewstep.models.tracks import TrackHead
from fewstep.models.videos import video_pixels
from fewstep.models.wan import Wan


class FilmPipeline(WanPipeline):
    """Captions to films of 24 frames of 32x32 pixels, or other sizes; see `__call__`."""

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _optional_components: ClassVar[list[str]] = []
    transformer_2 = None
    vae_scale_factor_temporal = 1

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        text_encoder: UMT5EncoderModel,
        vae: AutoencoderTiny,
        scheduler: SchedulerMixin,
        transformer: WanTransformer3DModel,
        track_head: TrackHead,
    ) -> None:
        DiffusionPipeline.__init__(self)
        self.register_modules(
            tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, scheduler=scheduler, transformer=transformer,
            track_head=track_head,
        )  # fmt: skip
        self.vae_scale_factor_spatial = 2 ** (len(vae.config.decoder_block_out_channels) - 1)
        self.video_processor = VideoProcessor(vae_scale_factor=self.vae_scale_factor_spatial)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int = 32,
        width: int = 32,
        num_frames: int = 24,
        num_inference_steps: int = 50,
        guidance_scale: float = 3.0,
        motion_guidance: float = 0.0,
        tracks: Tensor | None = None,
        drive: Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        output_type: str = "np",
        return_dict: bool = True,
        max_sequence_length: int = 16,
    ) -> WanPipelineOutput | tuple[Any]:
        """Films of captions; a guided step is two network calls, with `motion_guidance` three, in one batch.

        Args:
            prompt: one or several; or `prompt_embeds`, what `encode_prompt` makes of them.
            negative_prompt: what guidance leads away from; the empty prompt unless told.
            height: in pixels, a multiple of 8; likewise `width`.
            num_frames: any number.
            guidance_scale: of text, 1 for none.
            motion_guidance: of tracks and drive, 0 for none (`fewstep.core.guidance.joint_weights`).
            tracks: (B, F, 2) where things are to be, x, y in pixels, nan where that is open; (B, N, F, 2) of several.
            drive: (B, F) in [0, 1], how loud it is.
            latents: noise to start from, (B, 8, F, height / 4, width / 4).
            output_type: "np", "pt", "pil", or "latent".
        """
        device = self._execution_device
        if prompt_embeds is None:
            prompt_embeds, _ = self.encode_prompt(
                prompt, do_classifier_free_guidance=False, device=device, max_sequence_length=max_sequence_length
            )
        told = prompt_embeds.to(self.transformer.dtype)
        shunned = told
        if guidance_scale != 1 or motion_guidance:
            shunned, _ = self.encode_prompt(
                negative_prompt or "", do_classifier_free_guidance=False, device=device,
                max_sequence_length=told.shape[1],
            )  # fmt: skip
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        count, channels = len(prompt_embeds), self.vae.config.latent_channels
        x = self.prepare_latents(count, channels, height, width, num_frames, torch.float32, device, generator, latents)
        controls = self.controls(tracks, drive, x)
        weights = joint_weights(guidance_scale, motion_guidance)
        branches = ((told, controls), (shunned.to(told).expand_as(told), controls), (told, torch.zeros_like(controls)))
        asked = [(weight, *branch) for weight, branch in zip(weights, branches, strict=True) if weight]
        states, fed_controls = (torch.cat([each[part] for each in asked]) for part in (1, 2))
        for t in self.progress_bar(self.scheduler.timesteps):
            fed = torch.cat([x.to(told.dtype).repeat(len(asked), 1, 1, 1, 1), fed_controls], 1)
            output = self.transformer(
                hidden_states=fed, timestep=t.expand(len(fed)), encoder_hidden_states=states, return_dict=False
            )[0]
            answers = zip(asked, output.chunk(len(asked)), strict=True)
            output = torch.stack([each[0] * answer for each, answer in answers]).sum(0)
            x = self.scheduler.step(output, t, x, return_dict=False)[0]
        if output_type != "latent":
            x = self.video_processor.postprocess_video(decode_frames(self.vae, x), output_type=output_type)
        self.maybe_free_model_hooks()
        return WanPipelineOutput(frames=x) if return_dict else (x,)

    def controls(self, tracks: Tensor | None, drives: Tensor | None, like: Tensor) -> Tensor:
        """What frames of latents `like` (B, C, F, h, w) are told, (B, K, F, h, w) in the network's dtype."""
        if tracks is None and drives is None:
            return like.new_zeros(len(like), self.track_head.width, *like.shape[2:], dtype=self.transformer.dtype)
        made = self.track_head.controls(
            tracks, drives, height=like.shape[3], width=like.shape[4], scale=self.vae_scale_factor_spatial
        )
        if made.shape[::2] != like.shape[::2]:
            raise FewstepError(
                f"found tracks or drives of {len(made)} films of {made.shape[2]} frames for {len(like)} of "
                f"{like.shape[2]}, expected the same, fix: nan where nothing is said"
            )
        return made.to(self.transformer.dtype)


def decode_frames(vae: AutoencoderTiny, latents: Tensor) -> Tensor:
    """Latents (B, C, F, h, w) -> films (B, 3, F, H, W), about [-1, 1], frame by frame."""
    frames = decoded(vae, latents.transpose(1, 2).flatten(0, 1))
    return frames.unflatten(0, (len(latents), -1)).transpose(1, 2)


def encode_frames(vae: AutoencoderTiny, films: Tensor) -> Tensor:
    """Films (B, 3, F, H, W) in [-1, 1] -> latents (B, C, F, h, w) float32, frame by frame."""
    latents = encoded_images(vae, films.transpose(1, 2).flatten(0, 1))
    return latents.unflatten(0, (len(films), -1)).transpose(1, 2)


@register_backbone("FilmPipeline")
class Film(Wan):
    """Adapter of `FilmPipeline`. Latents (C, F, h, w)."""

    pipeline_classes = ("FilmPipeline",)
    comfyui_key = None  # type: ignore[assignment]
    makes_films = True
    teacher_guidance = 3.0
    recipe = Recipe(guidance_scale=Setting(3.0), shift=Setting(3.0), roles=Setting("copies"))

    @classmethod
    def pipeline_class(cls, name: str) -> Any:
        return FilmPipeline

    @property
    def latent_shape(self) -> tuple[int, ...]:
        return (self.pipeline.vae.config.latent_channels, *super().latent_shape[1:])

    @torch.no_grad()
    def controls(self, tracks: Tensor | None, drives: Tensor | None) -> Condition:
        _, _, height, width = self.latent_shape
        scale = self.pipeline.vae_scale_factor_spatial
        made = self.pipeline.track_head.controls(tracks, drives, height=height, width=width, scale=scale)
        return {CONTROLS: made.to(self.device)}

    def fed(self, x: Tensor, condition: Condition) -> Tensor:
        """With what the frames are told beside them, zeros where the condition has no `CONTROLS`."""
        controls = condition.get(CONTROLS)
        if controls is None:
            controls = x.new_zeros(len(x), self.pipeline.track_head.width, *x.shape[2:])
        if controls.shape[2] != x.shape[2]:
            raise FewstepError(
                f"found tracks or drives of {controls.shape[2]} frames for {x.shape[2]} frames, expected as many, "
                "fix: one value for each frame, nan where nothing is said"
            )
        return torch.cat([x, controls.to(x)], 1)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        return video_pixels(decode_frames(self.pipeline.vae, latents))

    def stream_decoder(self) -> Callable[[Tensor], Tensor]:
        return self.decode

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Videos (B, F, 3, H, W) in [-1, 1] as latents (B, *latent_shape)."""
        return encode_frames(self.pipeline.vae, images.transpose(1, 2))
