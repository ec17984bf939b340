"""What adapters of video families, and of the video autoencoders that image families use, do alike.

Videos are (B, F, 3, H, W) outside, as frames are what one saves; diffusers' video autoencoders take and give
(B, 3, F, H, W). Nothing here knows a family.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor

from fewstep.models.pipelines import pixels


def call_default(pipeline: Any, name: str) -> Any:
    """What the argument `name` of the pipeline's call is unless told."""
    return inspect.signature(type(pipeline).__call__).parameters[name].default


def latent_statistics(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (1, C, 1, 1, 1) of the autoencoder's latents, to which networks see them scaled."""
    config = vae.config
    mean, std = (like.new_tensor(values).view(1, -1, 1, 1, 1) for values in (config.latents_mean, config.latents_std))
    return mean, std


def decoded_by_statistics(vae: Any, latents: Tensor) -> Tensor:
    """Latents (B, C, f, h, w) of unit variance -> (B, 3, F, H, W), about [-1, 1] (Wan, Qwen-Image)."""
    latents = latents.to(vae.device, vae.dtype)
    mean, std = latent_statistics(vae, latents)
    return vae.decode(latents * std + mean, return_dict=False)[0]


def encoded_by_statistics(vae: Any, videos: Tensor) -> Tensor:
    """(B, 3, F, H, W) in [-1, 1] -> latents (B, C, f, h, w) float32 of unit variance, the mode of their law."""
    latents = vae.encode(videos.to(vae.device, vae.dtype)).latent_dist.mode().float()
    mean, std = latent_statistics(vae, latents)
    return (latents - mean) / std


def video_pixels(videos: Tensor) -> Tensor:
    """(B, 3, F, H, W) in [-1, 1] -> (B, F, 3, H, W) uint8 on the CPU, as diffusers' video processor rounds."""
    return pixels(videos).transpose(1, 2).contiguous()
