"""A student's LoRA for ComfyUI: the names of layers that its loader knows, and the settings of its sampler nodes.

From ComfyUI's loader (comfy/lora.py, comfy/utils.py): a key is looked up before `.lora_down.weight`, `.lora_up.weight`
and `.alpha`, and alpha / rank * up @ down is added to the weight it names. It knows every layer of a model by its own
name, as `lora_unet_<with underscores>` and as `diffusion_model.<with dots>`; and for families whose original
checkpoints fuse the queries, keys and values that diffusers keeps apart, also diffusers' names, for which it adds to
the rows of the fused weight that are theirs.

| family                | key                                                       | read by        |
|-----------------------|-----------------------------------------------------------|----------------|
| Stable Diffusion 1, 2 | `lora_unet_` + diffusers' name                            | D, sd-scripts  |
| SDXL                  | `lora_unet_` + original name (`input_blocks_4_1_...`)     | D, sd-scripts  |
| SD3, FLUX.1           | `lora_transformer_` + diffusers' name (OneTrainer's form) |                |
| PixArt                | `transformer.` + diffusers' name                          |                |
| Qwen-Image, Z-Image   | `diffusion_model.` + diffusers' name                      | D              |
| Wan, CogVideoX        | `diffusion_model.` + ComfyUI's name                       | D (Wan)        |

Where there is a D, diffusers reads these files too, which is how they are tested beside a list of names.
So nothing has to be fused here, which would cost three to four times the rank. ComfyUI has no Sana.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fewstep.core.files import save_weights
from fewstep.core.process import Process
from fewstep.errors import FewstepError
from fewstep.models.lora import Loras

_SGM = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip
_WAN = {
    "attn1.to_out.0": "self_attn.o", "attn1.to_": "self_attn.", "attn2.to_out.0": "cross_attn.o",
    "attn2.to_": "cross_attn.", "ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2", "proj_out": "head.head",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
}  # fmt: skip
_COGVIDEOX = {
    "transformer_blocks.": "blocks.", "attn1.to_out.0": "attn_out", "attn1.to_": "", "ff.net.0.proj": "ff_proj",
    "ff.net.2": "ff_out", "time_embedding.linear_": "time_embedding_linear_",
}  # fmt: skip


def unet_key(layer: str, config: Mapping[str, Any]) -> str:
    """Stable Diffusion 1.x and 2.x."""
    _sgm_name(layer, config)  # refuses what the original has no place for
    return f"lora_unet_{_flat(layer)}"


def sdxl_key(layer: str, config: Mapping[str, Any]) -> str:
    """SDXL: blocks are numbered through, as in its original checkpoint."""
    return f"lora_unet_{_flat(_sgm_name(layer, config))}"


def split_key(layer: str, config: Mapping[str, Any]) -> str:
    """SD3 and FLUX.1."""
    return f"lora_transformer_{_flat(layer)}"


def pixart_key(layer: str, config: Mapping[str, Any]) -> str:
    """PixArt."""
    return f"transformer.{layer}"


def same_key(layer: str, config: Mapping[str, Any]) -> str:
    """Qwen-Image, whose layers are called alike, and Z-Image."""
    return f"diffusion_model.{layer}"


def wan_key(layer: str, config: Mapping[str, Any]) -> str:
    """Wan."""
    return f"diffusion_model.{_replaced(layer, _WAN)}"


def cogvideox_key(layer: str, config: Mapping[str, Any]) -> str:
    """CogVideoX."""
    return f"diffusion_model.{_replaced(layer, _COGVIDEOX)}"


def comfyui_tensors(kind: Any, loras: Loras, config: Mapping[str, Any]) -> dict[str, dict[str, torch.Tensor]]:
    """For each part the tensors of its file, by ComfyUI's names.

    Args:
        kind: adapter of the family, a subclass of `Backbone`.
        loras: what to write.
        config: of the family's network.

    Raises:
        FewstepError: ComfyUI has no such model.
    """
    if kind.comfyui_key is None:
        raise FewstepError(
            f"found a LoRA of the family {kind.__name__} for ComfyUI, expected a family that ComfyUI itself can load, "
            "fix: export to 'lora' or 'diffusers' (an adapter of your own says its names in comfyui_key)"
        )
    files: dict[str, dict[str, torch.Tensor]] = {}
    for part, layers in loras.items():
        tensors = files.setdefault(part, {})
        for layer, lora in layers.items():
            key = kind.comfyui_key(layer, config)
            tensors[f"{key}.lora_down.weight"], tensors[f"{key}.lora_up.weight"] = lora.down, lora.up
            tensors[f"{key}.alpha"] = torch.tensor(float(lora.rank))
    return files


def save_comfyui(
    folder: Path, files: Mapping[str, Mapping[str, torch.Tensor]], name: str, dtype: torch.dtype, metadata: Any
) -> dict[str, str]:
    """Write `comfyui_tensors` and return the file of each part: one, or one for high and one for low noise."""
    ends = ["_high_noise", "_low_noise"] if len(files) == 2 else [""]
    named = {part: f"{name}{end}.safetensors" for part, end in zip(files, ends, strict=True)}
    for part, tensors in files.items():
        kept = {
            key: value if key.endswith(".alpha") else value.to(dtype).contiguous() for key, value in tensors.items()
        }
        save_weights(folder / named[part], kept, {"format": "pt", **metadata})
    return named


def sigmas(process: Process, grid: Sequence[float]) -> list[float] | None:
    """The grid as ComfyUI's noise levels, sigma / alpha of a VP process and t of a flow; None if the first has none."""
    t = torch.tensor(grid, dtype=torch.float64)
    if process.name == "flow":
        return t.tolist()
    levels = process.sigma(t) / process.alpha(t)
    return None if not bool(levels.isfinite().all()) else levels.tolist()


def _sgm_name(layer: str, config: Mapping[str, Any]) -> str:
    """A layer of diffusers' UNet by its name in the original checkpoint."""
    if layer in _SGM:
        return _SGM[layer]
    match = re.fullmatch(r"(down|mid|up)_block(?:s\.(\d+))?\.(resnets|attentions)\.(\d+)\.(.+)", layer)
    if match is None or not isinstance(config["layers_per_block"], int):
        raise FewstepError(
            f"found an adapter in the layer {layer}, expected one that the original checkpoint of this UNet has too, "
            "fix: export to 'diffusers', or train with --layers attention+ff"
        )
    side, block, kind, index, rest = match.groups()
    inner, rest = int(kind == "attentions"), rest.replace("time_emb_proj", "emb_layers.1")
    if side == "mid":
        return f"middle_block.{1 if inner else 2 * int(index)}.{rest}"
    number = int(block) * (config["layers_per_block"] + 1) + int(index)
    return f"input_blocks.{number + 1}.{inner}.{rest}" if side == "down" else f"output_blocks.{number}.{inner}.{rest}"


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _replaced(name: str, table: Mapping[str, str]) -> str:
    for old, new in table.items():
        name = name.replace(old, new)
    return name
