"""Wan's autoencoder as a stream: latents go in chunk after chunk, frames come out, as if all had been decoded at once.

Its decoder is causal and keeps the last features of every convolution between latent frames. `AutoencoderKLWan.decode`
forgets them at its end; here they are kept. Rounding apart (now and then a level of 255), the pixels are the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fewstep.models.videos import latent_statistics, video_pixels


class StreamDecoder:
    """decode(latents (B, C, n, h, w)) of one stream -> (B, F, 3, H, W) uint8; the first latent frame is one frame.

    Args:
        vae: diffusers' AutoencoderKLWan; only looked at.
    """

    def __init__(self, vae: Any) -> None:
        from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d

        self._vae = vae
        self._features: list[Any] = [None] * sum(isinstance(m, WanCausalConv3d) for m in vae.decoder.modules())
        self._begun = False

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> Tensor:
        from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

        vae = self._vae
        latents = latents.to(vae.device, vae.dtype)
        mean, std = latent_statistics(vae, latents)
        frames = []
        for frame in (latents * std + mean).split(1, 2):  # one by one, so that no rounding depends on the chunk
            first, self._begun = not self._begun, True
            fed = vae.post_quant_conv(frame)
            frames.append(vae.decoder(fed, feat_cache=self._features, feat_idx=[0], first_chunk=first))
        films = torch.cat(frames, 2)
        if vae.config.patch_size is not None:
            films = unpatchify(films, patch_size=vae.config.patch_size)
        return video_pixels(films.clamp(-1, 1))
