"""The shapes of what each family's `encode` returns, told without encoding anything."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from fewstep.core.tensors import Condition
from fewstep.errors import FewstepError
from fewstep.models.backbone import Backbone
from fewstep.models.pipelines import MASK, POOLED, STATES
from fewstep.models.videos import call_default

Shapes = dict[str, tuple[int, ...]]
_CLIP = 77
"""Words that CLIP's text encoders pad every prompt to."""


def _pixart(backbone: Backbone, config: Any) -> Shapes:
    usual = 300 if "Sigma" in type(backbone.pipeline).__name__ else 120
    return {STATES: (usual, config.caption_channels), MASK: (usual,)}


def _stable_diffusion_xl(backbone: Backbone, config: Any) -> Shapes:
    times = 6 * config.addition_time_embed_dim  # of the six numbers about the image, behind the pooled text
    return {
        STATES: (_CLIP, config.cross_attention_dim),
        POOLED: (config.projection_class_embeddings_input_dim - times,),
    }


def _stable_diffusion_3(backbone: Backbone, config: Any) -> Shapes:
    words = _CLIP + call_default(backbone.pipeline, "max_sequence_length")  # of CLIP and of T5, one behind the other
    return {STATES: (words, config.joint_attention_dim), POOLED: (config.pooled_projection_dim,)}


def _flux(backbone: Backbone, config: Any) -> Shapes:
    words = call_default(backbone.pipeline, "max_sequence_length")
    return {STATES: (words, config.joint_attention_dim), POOLED: (config.pooled_projection_dim,)}


def _masked(width: str) -> Callable[[Backbone, Any], Shapes]:
    def shapes(backbone: Backbone, config: Any) -> Shapes:
        words = call_default(backbone.pipeline, "max_sequence_length")
        return {STATES: (words, getattr(config, width)), MASK: (words,)}

    return shapes


FAMILIES: Mapping[str, Callable[[Backbone, Any], Shapes]] = {
    "PixArt": _pixart,
    "StableDiffusionXL": _stable_diffusion_xl,
    "StableDiffusion": lambda backbone, config: {STATES: (_CLIP, config.cross_attention_dim)},
    "StableDiffusion3": _stable_diffusion_3,
    "Flux": _flux,
    "Sana": _masked("caption_channels"),
    "QwenImage": _masked("joint_attention_dim"),
    "ZImage": _masked("cap_feat_dim"),
    "CogVideoX": lambda backbone, config: {STATES: (config.max_text_seq_length, config.text_embed_dim)},
    "Wan": lambda backbone, config: {STATES: (call_default(backbone.pipeline, "max_sequence_length"), config.text_dim)},
}
"""By the name of the adapter, which those derived from it share."""


def shapes(backbone: Backbone, words: int | None = None) -> Shapes:
    """Shape of each part of an encoded prompt, without the batch.

    Args:
        backbone: of a known family.
        words: text tokens of the longest prompt of a batch, for families that cut padding off (those with a mask); the
            most there can be unless told.

    Raises:
        FewstepError: an adapter of another package, of no known family.
    """
    family = next((kind.__name__ for kind in type(backbone).__mro__ if kind.__name__ in FAMILIES), None)
    if family is None:
        raise FewstepError(
            f"found the adapter {type(backbone).__name__}, expected one of {', '.join(FAMILIES)} or one derived from "
            "them, fix: add the shapes of its prompts to fewstep.planning.conditions.FAMILIES"
        )
    found = FAMILIES[family](backbone, backbone.network.config)
    if words is not None and MASK in found:
        found = {name: (min(words, shape[0]), *shape[1:]) if name != POOLED else shape for name, shape in found.items()}
    return found


def condition_like(backbone: Backbone, rows: int, words: int | None) -> Condition:
    """Empty tensors of these shapes for so many prompts, float32, masks as integers."""
    dtypes = {MASK: torch.long}
    return {
        name: torch.empty(rows, *shape, dtype=dtypes.get(name, torch.float32))
        for name, shape in shapes(backbone, words).items()
    }
