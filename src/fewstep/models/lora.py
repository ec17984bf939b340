"""A student's LoRA as a file: what it adds to which layers, written as diffusers reads it, and read back.

On disk the scale is 1: alpha / rank of the training is multiplied into the up matrices, and alpha is the rank. A reader
that heeds alpha, and one that has never heard of it, both add up @ down.

`StableDiffusionPipeline.load_lora_weights(folder)` and its likes read `pytorch_lora_weights.safetensors`, with names
such as `unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight`. Pipelines without that method
(PixArt) are given PEFT's own two files: `PeftModel.from_pretrained(pipeline.transformer, folder)`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fewstep.core.files import read_weights, save_weights
from fewstep.errors import FewstepError
from fewstep.models.adapters import adapter_parameters, add_adapter
from fewstep.models.backbone import Backbone
from fewstep.models.roles import STUDENT, Roles

WEIGHTS = "pytorch_lora_weights.safetensors"
PEFT_WEIGHTS = "adapter_model.safetensors"
_PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Lora:
    """What is added to the weight (outputs, inputs) of one linear layer: up @ down."""

    down: Tensor
    """(rank, inputs)"""
    up: Tensor
    """(outputs, rank), times alpha / rank of the training."""

    @property
    def rank(self) -> int:
        return len(self.down)


Loras = dict[str, dict[str, Lora]]
"""By part of the pipeline ("unet", "transformer", "transformer_2"), then by name of the layer in it."""


def student_loras(roles: Roles) -> Loras:
    """The student's adapter, in float32 on the CPU; of roles whose student is an adapter over a pipeline backbone."""
    backbone, network, state = roles.backbone, roles.student_seat.network, roles.student_state()
    assert isinstance(backbone, Backbone)
    loras: Loras = {part: {} for part in backbone.network_parts}
    ends = (f".lora_A.{STUDENT}.weight", f".lora_B.{STUDENT}.weight")
    for name in (name.removesuffix(ends[0]) for name in state if name.endswith(ends[0])):
        part, prefix = next((p, start) for p, start in backbone.network_parts.items() if name.startswith(start))
        scale: float = network.get_submodule(name).scaling[STUDENT]  # type: ignore[index,assignment]
        down, up = (state[name + end].float().cpu() for end in ends)
        loras[part][name.removeprefix(prefix)] = Lora(down, up * scale)
    return loras


def weights_files(parts: Iterable[str], peft: bool = False) -> dict[str, str]:
    """File name for each part: the one that diffusers looks for, and for a second network one of its own."""
    first, *others = parts
    named = {part: WEIGHTS.replace(".", f"{part.removeprefix(first)}.") for part in others}
    return {first: PEFT_WEIGHTS if peft else WEIGHTS} | named


def save_loras(
    folder: Path, loras: Loras, *, base: str, peft: bool, dtype: torch.dtype, metadata: Mapping[str, str]
) -> None:
    """Write the files that diffusers, or PEFT, reads.

    Args:
        folder: exists.
        loras: what to write; a second part is named as the first in its own file, as diffusers wants it.
        base: Hub id or folder of the teacher, for PEFT's config.
        peft: PEFT's two files, for pipelines that load no LoRA.
        dtype: of the weights.
        metadata: of the safetensors file, beside its format.
    """
    first, files = next(iter(loras)), weights_files(loras, peft)
    prefix = _PEFT_PREFIX if peft else f"{first}."
    for part, layers in loras.items():
        tensors = {}
        for layer, lora in layers.items():
            tensors[f"{prefix}{layer}.lora_A.weight"] = lora.down.to(dtype).contiguous()
            tensors[f"{prefix}{layer}.lora_B.weight"] = lora.up.to(dtype).contiguous()
        save_weights(folder / files[part], tensors, {"format": "pt", **metadata})
    if peft:
        from peft import LoraConfig

        rank = next(iter(loras[first].values())).rank
        LoraConfig(
            r=rank, lora_alpha=rank, target_modules=_exactly(loras[first]), base_model_name_or_path=base,
            inference_mode=True,
        ).save_pretrained(str(folder))  # fmt: skip


def read_loras(folder: Path, parts: Iterable[str]) -> Loras:
    """What `save_loras` wrote for the `parts` of a pipeline, as it lies on disk.

    Raises:
        FewstepError: a file is missing, is not safetensors, or holds other tensors.
    """
    parts = list(parts)
    peft = is_peft(folder)
    loras: Loras = {}
    for part, file in weights_files(parts, peft).items():
        if not (folder / file).is_file():
            raise FewstepError(
                f"found no {file} in {folder}, expected a student's LoRA as safetensors (pickles are not read), fix: "
                "export the student again"
            )
        tensors, prefix = read_weights(folder / file), _PEFT_PREFIX if peft else f"{parts[0]}."
        downs = [name for name in tensors if name.endswith(".lora_A.weight")]
        ups = [name.replace(".lora_A.", ".lora_B.") for name in downs]
        if set(tensors) != {*downs, *ups} or not all(name.startswith(prefix) for name in downs):
            raise FewstepError(
                f"found tensors in {folder / file} that are not a student's LoRA, expected pairs of {prefix}*.lora_A "
                "and lora_B, fix: export the student again"
            )
        names = [name.removeprefix(prefix).removesuffix(".lora_A.weight") for name in downs]
        loras[part] = {name: Lora(tensors[down], tensors[up]) for name, down, up in zip(names, downs, ups, strict=True)}
    return loras


def is_peft(folder: Path) -> bool:
    """Whether the LoRA of `folder` is in PEFT's own files."""
    return (folder / PEFT_WEIGHTS).is_file()


@torch.no_grad()
def attach_loras(backbone: Backbone, network: nn.Module, loras: Loras) -> nn.Module:
    """`network`, of the kind of the backbone's, with the LoRA as an adapter in it; frozen, in eval mode.

    Raises:
        FewstepError: as `matched`.
    """
    named = matched(backbone, network, loras)
    rank = next(iter(named.values())).rank
    add_adapter(network, STUDENT, rank=rank, alpha=rank, targets=_exactly(named))
    parameters = adapter_parameters(network, STUDENT)
    for name, lora in named.items():
        parameters[f"{name}.lora_A.{STUDENT}.weight"].copy_(lora.down)
        parameters[f"{name}.lora_B.{STUDENT}.weight"].copy_(lora.up)
    return network.requires_grad_(False).eval()


@torch.no_grad()
def merge_loras(backbone: Backbone, network: nn.Module, loras: Loras) -> None:
    """Add the LoRA to the weights of `network` in place, computed in float32.

    Raises:
        FewstepError: as `matched`.
    """
    for name, lora in matched(backbone, network, loras).items():
        weight: Tensor = network.get_submodule(name).weight  # type: ignore[assignment]
        weight.copy_(weight.float() + (lora.up.float() @ lora.down.float()).to(weight.device))


def matched(backbone: Backbone, network: nn.Module, loras: Loras) -> dict[str, Lora]:
    """The LoRA by the names of the layers in `network`.

    Raises:
        FewstepError: it does not fit the network.
    """
    modules = dict(network.named_modules())
    named = {
        backbone.network_parts[part] + layer: lora for part, layers in loras.items() for layer, lora in layers.items()
    }
    for name, lora in named.items():
        weight = getattr(modules.get(name), "weight", None)
        if weight is None or weight.shape != (len(lora.up), lora.down.shape[1]):
            found = "no such layer" if weight is None else f"a weight of {tuple(weight.shape)}"
            raise FewstepError(
                f"found {found} in the teacher for the LoRA of {name} ({len(lora.up)} outputs, {lora.down.shape[1]} "
                "inputs), expected the teacher it was trained on, fix: pass that one (load_student(..., teacher=...))"
            )
    return named


def _exactly(names: Iterable[str]) -> str:
    """An expression for PEFT's `target_modules` that matches these names and no others."""
    return "|".join(re.escape(name) for name in names)
