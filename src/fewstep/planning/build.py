"""A teacher without its weights: networks on the meta device from the configs of its folder, in seconds, no memory."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fewstep.models.backbone import Backbone
from fewstep.models.loading import _adapter_for, _read_index
from fewstep.models.quiet import quiet_libraries
from fewstep.models.wan_experts import WanExperts


@dataclass(frozen=True)
class Blueprint:
    """A pipeline whose networks have shapes and no numbers: roles are built from it as from a loaded one."""

    backbone: Backbone
    mode: FakeTensorMode
    """In which networks are called, after `made_callable`."""
    others: Mapping[str, int]
    """Parameters of the pipeline's other networks by part: text encoders, autoencoder."""

    def in_dtype(self, dtype: torch.dtype) -> Backbone:
        """The teacher with its network's weights in `dtype`, but for those that the family keeps in float32."""
        made = copy.copy(self.backbone)
        made.network = _cast(copy.deepcopy(self.backbone.network), dtype)
        return made

    def made_callable(self, network: nn.Module, known: dict[int, tuple[Tensor, Tensor]]) -> None:
        """Replace the tensors of `network` by fake ones that claim to be on the CPU, so that it can be called.

        Args:
            network: on the meta device; changed in place.
            known: what has taken the place of which tensor, kept between networks that share some.
        """

        def fake(tensor: Tensor) -> Tensor:
            if id(tensor) not in known:
                with self.mode:
                    made: Tensor = torch.empty_like(tensor, device="cpu")
                if isinstance(tensor, nn.Parameter):
                    made = nn.Parameter(made, requires_grad=tensor.requires_grad)
                known[id(tensor)] = tensor, made  # both, so that no other comes to have this id
            return known[id(tensor)][1]

        for module in network.modules():
            for own in (module._parameters, module._buffers, module.__dict__):
                for name, value in list(own.items()):
                    if isinstance(value, Tensor) and value.is_meta:
                        own[name] = fake(value)  # type: ignore[assignment]


def blueprint(source: str | Path, *, size: Mapping[str, int] | None = None, revision: str | None = None) -> Blueprint:
    """The teacher at `source` (a diffusers folder or a Hub id) from its configs; no weights are read or fetched.

    Raises:
        FewstepError: no pipeline there, no adapter for it, or a size that it does not have.
    """
    index = _read_index(source, revision)
    kind = _adapter_for(index, source)
    folder = Path(source)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(str(source), revision=revision, allow_patterns=["*.json"]))
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    parts: dict[str, Any] = {}
    others: dict[str, int] = {}
    with quiet_libraries(), torch.device("meta"):
        for name, value in index.items():
            if isinstance(value, list) and len(value) == 2 and value[1] is not None:
                part = _part(folder / name, *value)
                if isinstance(part, nn.Module) and not name.startswith(("transformer", "unet")):
                    others[name] = sum(parameter.numel() for parameter in part.parameters())
                parts[name] = None if name in ("safety_checker", "image_encoder") else part
    with quiet_libraries():
        pipeline = _pipeline(kind.pipeline_class(index["_class_name"]), index, parts)
        backbone = kind(pipeline, str(source))
    backbone.set_size(size or {})
    if isinstance(backbone.network, WanExperts):  # which expert computes is not known without times: any, as all cost
        backbone.network.forward = backbone.network.high.forward  # type: ignore[method-assign]
    return Blueprint(backbone, mode, others)


def _part(folder: Path, library: str, name: str) -> Any:
    """A network without weights, a scheduler as it is; None for tokenizers and the like, which hold no weights."""
    home = "diffusers.pipelines.stable_diffusion" if library == "stable_diffusion" else library
    kind: Any = getattr(import_module(home), name)
    if issubclass(kind, nn.Module):
        if getattr(kind, "config_class", None) is not None:  # of transformers
            return kind(kind.config_class.from_pretrained(folder))
        return kind.from_config(kind.load_config(folder))
    if folder.name != "scheduler":
        return None
    with torch.device("cpu"):
        return kind.from_config(kind.load_config(folder))


def _pipeline(kind: Any, index: Mapping[str, Any], parts: Mapping[str, Any]) -> Any:
    """The pipeline of `parts` with the options of `index`."""
    import diffusers

    if kind is diffusers.DiffusionPipeline:
        kind = getattr(diffusers, index["_class_name"])
    names = [name for name in inspect.signature(kind.__init__).parameters if name != "self"]
    told = {name: index[name] for name in names if name in index and name not in parts}
    absent = {name for name in names if isinstance(told.get(name), list)}
    return kind(**{**told, **dict.fromkeys(absent), **{name: parts[name] for name in names if name in parts}})


def _cast(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """As diffusers loads weights: `dtype`, but float32 in the modules that the class keeps so."""
    kept = {name for module in network.modules() for name in getattr(module, "_keep_in_fp32_modules", None) or ()}
    for name, parameter in network.named_parameters():
        wanted = torch.float32 if kept.intersection(name.split(".")) else dtype
        parameter.data = parameter.data.to(wanted)
    return network.requires_grad_(False)
