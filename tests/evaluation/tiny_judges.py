"""CLIP and DINOv2 with tiny random weights, in folders as their releases are."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]


def write_clip(folder: Path, *, head: bool = False) -> Path:
    """A CLIP of 8-dimensional embeddings for images of 16 pixels, with a tokenizer of letters."""
    from tiny_families import clip_tokenizer
    from transformers import CLIPConfig, CLIPModel

    clip_tokenizer(folder).save_pretrained(folder)
    torch.manual_seed(0)
    both = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**both, "vocab_size": 60, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    vision = {**both, "image_size": 16, "patch_size": 8}
    text["max_position_embeddings"] = 12
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    _write_preparation(folder, 16, 16)
    if head:
        layers = {"layers.0.weight": torch.randn(3, 8), "layers.0.bias": torch.randn(3)}
        layers |= {"layers.2.weight": torch.randn(1, 3), "layers.2.bias": torch.randn(1)}
        save_file(layers, folder / "head.safetensors")
    return folder


def write_dinov2(folder: Path) -> Path:
    """A DINOv2 of 16 features for images of 14 pixels, cut from 16."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(1)
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=14, patch_size=7, mlp_ratio=2
    )
    Dinov2Model(config).save_pretrained(folder)
    _write_preparation(folder, 16, 14)
    return folder


def _write_preparation(folder: Path, size: int, crop: int) -> None:
    told = {"size": {"shortest_edge": size}, "crop_size": {"height": crop, "width": crop}}
    told |= {"image_mean": MEAN, "image_std": STD, "resample": 3, "image_processor_type": "CLIPImageProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(told))
