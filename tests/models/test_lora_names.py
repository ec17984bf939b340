"""All names in a ComfyUI LoRA of every family at its published size, written out as the tools that read them know them.

From ComfyUI's comfy/lora.py, comfy/utils.py and models, and for Stable Diffusion from kohya's sd-scripts (whose U-Net
has 16 transformer blocks in version 1.5 and 70 in XL). Networks are built without numbers.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists

from fewstep.models.cogvideox import CogVideoX
from fewstep.models.flux import Flux
from fewstep.models.pixart import PixArt
from fewstep.models.qwen_image import QwenImage
from fewstep.models.stable_diffusion import StableDiffusion
from fewstep.models.stable_diffusion_3 import StableDiffusion3
from fewstep.models.stable_diffusion_xl import StableDiffusionXL
from fewstep.models.wan import Wan
from fewstep.models.z_image import ZImage

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from training_step import SDXL  # noqa: E402

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")
UNET = [
    *(f"attn{n}_{name}" for n in (1, 2) for name in ("to_q", "to_k", "to_v", "to_out_0")),
    "ff_net_0_proj",
    "ff_net_2",
]
_SD3 = {
    "sample_size": 128, "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536,
    "pos_embed_max_size": 192,
}  # fmt: skip
PUBLISHED: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "sd15": (StableDiffusion, "UNet2DConditionModel", {"cross_attention_dim": 768}),
    "sdxl": (StableDiffusionXL, "UNet2DConditionModel", SDXL),
    "sd3-m": (StableDiffusion3, "SD3Transformer2DModel", _SD3),
    "sd3.5-m": (
        StableDiffusion3, "SD3Transformer2DModel",
        {**_SD3, "pos_embed_max_size": 384, "qk_norm": "rms_norm", "dual_attention_layers": tuple(range(13))},
    ),
    "flux": (Flux, "FluxTransformer2DModel", {"guidance_embeds": True}),
    "pixart": (PixArt, "PixArtTransformer2DModel", {"sample_size": 64}),
    "qwen-image": (QwenImage, "QwenImageTransformer2DModel", {}),
    "z-image": (ZImage, "ZImageTransformer2DModel", {}),
    "cogvideox-2b": (CogVideoX, "CogVideoXTransformer3DModel", {}),
    "wan-1.3b": (
        Wan, "WanTransformer3DModel", {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960},
    ),
}  # fmt: skip


def flat(names: Any) -> list[str]:
    return [name.replace(".", "_") for name in names]


def expected(family: str) -> Iterator[str]:
    """Every name that the reader has for an adapted layer."""
    if family == "sd15":
        places = [f"down_blocks_{block}_attentions_{n}" for block in (0, 1, 2) for n in (0, 1)] + [
            "mid_block_attentions_0"
        ]
        places += [f"up_blocks_{block}_attentions_{n}" for block in (1, 2, 3) for n in (0, 1, 2)]
        yield from (f"lora_unet_{place}_transformer_blocks_0_{name}" for place in places for name in UNET)
    elif family == "sdxl":
        depths = {f"input_blocks_{n}": 2 for n in (4, 5)} | {f"input_blocks_{n}": 10 for n in (7, 8)}
        depths |= {"middle_block": 10} | {f"output_blocks_{n}": 10 for n in (0, 1, 2)}
        depths |= {f"output_blocks_{n}": 2 for n in (3, 4, 5)}
        for place, depth in depths.items():
            yield from (f"lora_unet_{place}_1_transformer_blocks_{n}_{name}" for n in range(depth) for name in UNET)
    elif family in ("sd3-m", "sd3.5-m"):
        for n in range(24):
            names = [f"attn.{name}" for name in (*ATTENTION, *ADDED)] + ["ff.net.0.proj", "ff.net.2"]
            names += ["attn.to_add_out", "ff_context.net.0.proj", "ff_context.net.2"] if n < 23 else []
            names += [f"attn2.{name}" for name in ATTENTION] if family == "sd3.5-m" and n < 13 else []
            yield from (f"lora_transformer_transformer_blocks_{n}_{name}" for name in flat(names))
    elif family == "flux":
        double = [f"attn.{name}" for name in (*ATTENTION, *ADDED, "to_add_out")]
        double += [f"{part}.net.{layer}" for part in ("ff", "ff_context") for layer in ("0.proj", "2")]
        single = ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", "proj_out"]
        yield from (f"lora_transformer_transformer_blocks_{n}_{name}" for n in range(19) for name in flat(double))
        yield from (
            f"lora_transformer_single_transformer_blocks_{n}_{name}" for n in range(38) for name in flat(single)
        )
    elif family == "pixart":
        names = [f"attn{n}.{name}" for n in (1, 2) for name in ATTENTION] + ["ff.net.0.proj", "ff.net.2"]
        yield from (f"transformer.transformer_blocks.{n}.{name}" for n in range(28) for name in names)
    elif family == "qwen-image":
        names = [f"attn.{name}" for name in (*ATTENTION, *ADDED, "to_add_out")]
        names += [f"{part}.net.{layer}" for part in ("img_mlp", "txt_mlp") for layer in ("0.proj", "2")]
        yield from (f"diffusion_model.transformer_blocks.{n}.{name}" for n in range(60) for name in names)
    elif family == "z-image":
        places = [f"{part}_refiner.{n}" for part in ("noise", "context") for n in (0, 1)]
        names = [f"attention.{name}" for name in ATTENTION] + [f"feed_forward.w{n}" for n in (1, 2, 3)]
        for place in [*places, *(f"layers.{n}" for n in range(30))]:
            yield from (f"diffusion_model.{place}.{name}" for name in names)
    elif family == "cogvideox-2b":
        names = ["q", "k", "v", "attn_out", "ff_proj", "ff_out"]
        yield from (f"diffusion_model.blocks.{n}.{name}" for n in range(30) for name in names)
    elif family == "wan-1.3b":
        names = [f"{part}_attn.{name}" for part in ("self", "cross") for name in "qkvo"] + ["ffn.0", "ffn.2"]
        yield from (f"diffusion_model.blocks.{n}.{name}" for n in range(30) for name in names)


@pytest.mark.parametrize("family", PUBLISHED)
def test_every_name_at_the_published_size(family: str) -> None:
    kind, network_class, config = PUBLISHED[family]
    with torch.device("meta"):
        network = getattr(diffusers, network_class)(**config)
    backbone = kind.__new__(kind)
    backbone.network = network
    adapted = LoraConfig(target_modules=backbone.adapter_targets("attention+ff"))
    linear = [name for name, part in network.named_modules() if isinstance(part, torch.nn.Linear)]
    layers = [name for name in linear if check_target_module_exists(adapted, name)]
    names = [kind.comfyui_key(layer, network.config) for layer in layers]
    assert len(set(names)) == len(names)
    assert set(names) == set(expected(family))
