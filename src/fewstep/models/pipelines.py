"""What adapters of several families do alike with a diffusers pipeline: take it apart, encode in parts, scale latents.

Nothing here knows a family.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake

from fewstep.core.tensors import Condition

STATES, MASK, POOLED = "text_states", "text_mask", "text_pooled"
"""Condition keys: text encoder states (B, L, width), 1 where they are words and 0 where padding (B, L), and one vector
for the whole text (B, width)."""

ENCODE_BATCH = 64
"""Prompts that a text encoder is given at a time."""


def rebuilt(pipeline: Any, **replaced: Any) -> Any:
    """A new pipeline of the class, parts and options of `pipeline`, but for those `replaced`; parts are shared."""
    kind = type(pipeline)
    options = {
        name: pipeline.config[name]
        for name in inspect.signature(kind.__init__).parameters
        if name in pipeline.config and name not in pipeline.components
    }
    return kind(**{**options, **pipeline.components, **replaced})


def stand_in(network: nn.Module, forward: Callable[..., Any], device: torch.device | None = None) -> nn.Module:
    """`network` with another forward, on `device` if told: config, dtype and submodules are its own, shared."""
    shadow = copy.copy(network)
    shadow.forward = forward
    if device is not None and next(network.parameters()).device != device:
        # Its weights are on disk, and pipelines ask the first one where it is.
        here = nn.Parameter(torch.empty(0, dtype=network.dtype, device=device), requires_grad=False)
        shadow._parameters = {"here": here, **network._parameters}
    return shadow


def in_batches(encode: Callable[[list[str]], Condition], prompts: Sequence[str]) -> Condition:
    """`encode` of `prompts`, at most `ENCODE_BATCH` at a time; it must return the same names and lengths each time."""
    starts = range(0, len(prompts), ENCODE_BATCH)
    parts = [encode(list(prompts[start : start + ENCODE_BATCH])) for start in starts]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def decoded(vae: Any, latents: Tensor) -> Tensor:
    """Latents (B, C, h, w) as the autoencoder's images (B, 3, H, W), about [-1, 1]: unscaled, shifted back, decoded."""
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    latents = latents.to(vae.device, vae.dtype) / vae.config.scaling_factor + shift
    return vae.decode(latents, return_dict=False)[0]


def pixels(images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] as uint8 on the CPU, rounded as diffusers' image processors do."""
    return ((images.float() / 2 + 0.5).clamp(0, 1) * 255).round().byte().cpu()


def encoded_images(vae: Any, images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] as latents (B, C, h, w) float32, the mode where the autoencoder has a law."""
    encoded = vae.encode(images.to(vae.device, vae.dtype))
    if hasattr(encoded, "latent_dist"):
        latents = encoded.latent_dist.mode()
    else:
        latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    return (latents.float() - shift) * vae.config.scaling_factor


def without_padding(states: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """`states` and `mask` without the columns that are padding in every row: the same attention for less work.

    Networks mask padding with a large negative number, so that a row of nothing but padding attends to all of it
    evenly: such a batch is left alone.
    """
    words = mask.bool()
    if is_fake(mask) or not bool(words.any(1).all()):  # of a plan's shapes nothing is known to be padding
        return states, mask
    used = words.any(0)
    return states[:, used], mask[:, used]


def word_counts(mask: Tensor) -> list[int]:
    """Words of each row of a mask (B, L); all L where only the shape is there, as in a plan."""
    return [mask.shape[1]] * len(mask) if is_fake(mask) else mask.sum(1).tolist()


def dynamic_shift(scheduler: Any, tokens: int) -> dict[str, float]:
    """Arguments of `set_timesteps` for a flow scheduler whose shift grows with the image: mu; none if it does not.

    Args:
        scheduler: a flow-matching scheduler of diffusers.
        tokens: of the image, as its transformer counts them.
    """
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    if not scheduler.config.get("use_dynamic_shifting"):
        return {}
    names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    return {"mu": calculate_shift(tokens, *(scheduler.config[name] for name in names))}


def padded(values: Tensor, length: int) -> Tensor:
    """(B, L, ...) with zeros appended up to `length`: conditions of all prompts have to fit together."""
    missing = values.new_zeros(len(values), length - values.shape[1], *values.shape[2:])
    return torch.cat([values, missing], 1)


def pack(x: Tensor) -> Tensor:
    """(B, C, h, w) -> tokens of 2x2 patches (B, h w / 4, 4 C), channels slowest."""
    return x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpack(tokens: Tensor, shape: Sequence[int]) -> Tensor:
    """Inverse of `pack` for latents of `shape` (C, h, w)."""
    channels, height, width = shape
    patches = tokens.unflatten(2, (channels, 2, 2)).unflatten(1, (height // 2, width // 2))
    return patches.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
