"""From a pipeline folder or Hub id to its adapter: `model_index.json` says which.

Adapters are registered by importing their modules: ours, those that a user's program imports before `load_teacher`, and
those that an installed package names as entry points, loaded when a folder names their class (docs/backbones.md):

    [project.entry-points."fewstep.backbones"]
    MyTransformer2DModel = "my_package.adapter:Mine"

Weights are read from safetensors only, and code that lies in a folder is never run.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fewstep.core.files import PICKLES, check_index, check_weights, load_json
from fewstep.errors import FewstepError
from fewstep.models.backbone import BACKBONES, Backbone
from fewstep.models.deferred import Deferred, left_on_disk, weight_files
from fewstep.models.quantised import check as check_quantisation
from fewstep.models.quantised import quantise_
from fewstep.models.quiet import quiet_libraries

ENTRY_POINTS = "fewstep.backbones"
"""Group of the entry points by which other packages name adapters; each is called as its network or pipeline."""

_FAMILIES = (
    "pixart", "stable_diffusion", "stable_diffusion_xl", "stable_diffusion_3", "flux", "sana", "qwen_image", "z_image",
    "cogvideox", "wan", "film",
)  # fmt: skip
"""Modules beside this one whose import registers adapters."""

_LIBRARIES = ("diffusers", "transformers", "stable_diffusion")  # the last: a package in diffusers, for safety checkers
_OWN_LIBRARIES = (
    "fewstep.models.steps_aware", "fewstep.models.flow_scheduler", "fewstep.models.expert_networks",
    "fewstep.models.tracks",
)  # fmt: skip


def load_backbone(
    source: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    revision: str | None = None,
    size: Mapping[str, int] | None = None,
    defer: bool = False,
    quantised: str | None = None,
) -> Backbone:
    """Load any pipeline whose network has an adapter.

    Args:
        source: a diffusers pipeline folder or a Hub id ("owner/name").
        dtype: of all weights: float32, or bfloat16 for a frozen base that takes half the memory.
        device: where to put it.
        revision: branch, tag or commit on the Hub.
        size: height, width, num_frames of its samples, where they are not to be the pipeline's own (`Backbone.sides`).
        defer: leave the network's weights on disk for `fewstep.models.sharding.shard` to read, each process its part.
        quantised: "int8" or "nf4": round the network's blocks (`fewstep.models.quantised`); for roles of adapters.

    Raises:
        FewstepError: no pipeline there, no adapter for its network, weights that are pickles, or parts that would need
            code from the folder, or a size that the family does not have; a quantisation that is unknown, or whose
            package is missing.
    """
    from diffusers import DiffusionPipeline

    if quantised is not None:
        check_quantisation(quantised)
        if defer:
            raise FewstepError(
                f"found defer with a base in {quantised}, expected one or the other, since rounded weights are not "
                "divided, fix: --base-dtype bfloat16, or leave --shard off"
            )
    index = _read_index(source, revision)
    kind = _adapter_for(index, source)
    folder = Path(source)
    try:
        if not folder.is_dir():
            folder = Path(DiffusionPipeline.download(str(source), revision=revision, use_safetensors=True))
        refuse_pickles(folder)
        with quiet_libraries():
            pipeline_class = kind.pipeline_class(index["_class_name"])
            networks = _networks(index, kind) if defer else {}
            with left_on_disk(networks.values(), dtype):
                pipeline = pipeline_class.from_pretrained(folder, dtype=dtype, use_safetensors=True)
            files = _files(folder, pipeline, networks)
        if getattr(pipeline, kind.network_name).dtype != dtype:  # older versions of diffusers do not know `dtype`
            pipeline.to(dtype)
        backbone = kind(pipeline, str(source))
        _try_tokenizers(pipeline)
    except FewstepError:
        raise
    except Exception as error:  # what diffusers, transformers and tokenizers raise has no common base
        raise FewstepError(
            f"found a pipeline at {source} that diffusers cannot load ({type(error).__name__}: {error}), expected all "
            "its parts with safetensors weights, fix: load it with diffusers once and save it with save_pretrained"
        ) from error
    backbone.folder, backbone.revision = folder, revision
    backbone.set_size(size or {})
    if defer:
        for name, part in pipeline.components.items():
            if isinstance(part, nn.Module) and name not in networks:
                part.to(device)
        named = [*backbone.network.named_parameters(), *backbone.network.named_buffers()]
        backbone.deferred = Deferred(
            torch.device(device), {n: (*files[id(t)], t.dtype) for n, t in named if id(t) in files}
        )
        return backbone
    _require_weights(pipeline, source)
    if quantised is not None:
        quantise_(backbone.network, quantised, device)
        backbone.quantised = quantised
    return backbone.to(device)


def _require_weights(pipeline: Any, source: str | Path) -> None:
    """FewstepError for parts whose weight files lack what their configs promise, which diffusers leaves without any."""
    for part, module in pipeline.components.items():
        if isinstance(module, nn.Module):
            missing = [name for name, value in module.named_parameters() if value.is_meta]
            if missing:
                raise FewstepError(
                    f"found no weights for {len(missing)} tensors of {part} in {source} (such as {missing[0]}), "
                    "expected all that its config.json promises, fix: fetch or save the folder again"
                )


def _try_tokenizers(pipeline: Any) -> None:
    """Lets every tokenizer pad two texts: one without its files or settings says so here, and not in mid-training."""
    for name, part in pipeline.components.items():
        if name.startswith("tokenizer") and part is not None:
            part(["a", "a b"], padding=True)


def original(backbone: Backbone) -> Backbone:
    """`backbone`, or where its network is quantised the same teacher in float32, read again on the CPU."""
    if backbone.quantised is None:
        return backbone
    return load_backbone(backbone.source, revision=backbone.revision, size=backbone.told_size)


def _networks(index: Mapping[str, Any], kind: type[Backbone]) -> dict[str, type[nn.Module]]:
    """Classes of the parts that are networks, by name: one, or Wan2.2-A14B's two."""
    return {
        part: getattr(import_module(entry[0]), entry[1])
        for part, entry in index.items()
        if part.startswith(kind.network_name) and isinstance(entry, list) and entry[0] is not None
    }


def _files(folder: Path, pipeline: Any, networks: Iterable[str]) -> dict[int, tuple[Path, str]]:
    """File and name of every tensor of `networks` that has one, by its id.

    Raises:
        FewstepError: the names in the files are not the network's, as in folders of old versions of diffusers.
    """
    files: dict[int, tuple[Path, str]] = {}
    for part in networks:
        found, named = weight_files(folder / part), getattr(pipeline, part).state_dict(keep_vars=True)
        if odd := sorted(found.keys() ^ named.keys()):
            raise FewstepError(
                f"found {len(odd)} names (such as {odd[0]!r}) that only one of {folder / part} and its network has, "
                "expected the same in both, fix: load the pipeline with diffusers once and save it with "
                "save_pretrained, or load it without defer"
            )
        files |= {id(tensor): found[name] for name, tensor in named.items()}
    return files


def built_in() -> list[type[Backbone]]:
    """Our own adapters, each once, in the order of their families."""
    modules = [import_module(f"fewstep.models.{family}").__name__ for family in _FAMILIES]
    kinds = dict.fromkeys(kind for kind in BACKBONES.values() if kind.__module__ in modules)
    return sorted(kinds, key=lambda kind: modules.index(kind.__module__))


def adapter_of(source: str | Path, revision: str | None = None) -> type[Backbone]:
    """The adapter of a pipeline folder or Hub id, told from `model_index.json` alone.

    Raises:
        FewstepError: as `load_backbone`.
    """
    return _adapter_for(_read_index(source, revision), source)


def refuse_pickles(folder: Path) -> None:
    """Raises FewstepError if some part of a pipeline folder has weights only as pickles, or names or hides one.

    Looks at the headers of all safetensors files, and at the files that indices name.
    """
    for part in [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]:
        suffixes = {path.suffix for path in part.iterdir()}
        found = sorted(suffixes.intersection(PICKLES))
        if found and ".safetensors" not in suffixes:
            raise FewstepError(
                f"found weights as {', '.join(found)} in {part}, expected safetensors (a pickle can run any code when "
                "it is read), fix: load the pipeline where you trust it and save it "
                "with save_pretrained(safe_serialization=True)"
            )
        for path in sorted(part.glob("*.safetensors")):
            check_weights(path)
        for path in sorted(part.glob("*.safetensors.index.json")):
            check_index(path)


def _read_index(source: str | Path, revision: str | None) -> dict[str, Any]:
    """`model_index.json` of a folder or Hub id."""
    folder = Path(source)
    if folder.exists():
        try:
            index = load_json(folder / "model_index.json")
        except (OSError, ValueError) as error:
            raise FewstepError(
                f"found no readable model_index.json in {folder}, expected a diffusers pipeline folder, fix: pass the "
                "folder that save_pretrained of the whole pipeline wrote (not of one part)"
            ) from error
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        from diffusers import DiffusionPipeline

        try:
            index = DiffusionPipeline.load_config(str(source), revision=revision)
        except (OSError, ValueError) as error:
            raise FewstepError(
                f"found neither a folder nor a reachable Hub pipeline named {source} ({error}), expected one of these, "
                "fix: check the name and the network"
            ) from error
    else:
        raise FewstepError(
            f"found nothing at {source}, expected a diffusers pipeline folder or a Hub id like 'owner/name', "
            "fix: check the path"
        )
    if not isinstance(index, dict):
        raise FewstepError(f"found a list in model_index.json of {source}, expected an object, fix: save it anew")
    return index


def _adapter_for(index: dict[str, Any], source: str | Path) -> type[Backbone]:
    """The adapter of the pipeline that `index` describes, after a look at what loading it would run."""
    if not isinstance(index.get("_class_name"), str):  # a list names a file with code
        raise FewstepError(
            f"found a pipeline class {index.get('_class_name')!r} in {source}, expected a class of diffusers (code of "
            "others is not run), fix: use a stock pipeline"
        )
    parts = {name: value for name, value in index.items() if isinstance(value, list) and len(value) == 2}
    network = next((part[1] for name, part in parts.items() if name in ("transformer", "unet")), None)
    kind = _registered(index["_class_name"], str(network))
    if kind is None:
        raise FewstepError(
            f"found a {index['_class_name']} with the network {network} in {source}, expected one of "
            f"{sorted(BACKBONES)}, fix: write an adapter, a subclass of fewstep.models.Backbone (docs/backbones.md), "
            f"and register it with @register_backbone({str(network)!r}) in a module that you import, or as an "
            f"entry point of the group {ENTRY_POINTS!r} in your package"
        )
    if kind.pipeline_classes and index["_class_name"] not in kind.pipeline_classes:
        raise FewstepError(
            f"found a {index['_class_name']} in {source}, expected one of {list(kind.pipeline_classes)}, fix: save the "
            "parts as one of these pipelines, or register an adapter that imitates yours"
        )
    for name, (library, _) in parts.items():
        if library in (*_OWN_LIBRARIES, *kind.part_modules):
            import_module(library)  # diffusers looks up classes of others among the imported modules
        elif library is not None and library not in _LIBRARIES:
            raise FewstepError(
                f"found part {name!r} of {source} from the library {library!r}, expected diffusers or transformers "
                "(code of others is not run unless the adapter's part_modules names it), fix: use a pipeline of stock "
                "parts"
            )
    return kind


def _registered(*names: str) -> type[Backbone] | None:
    """The adapter for the first of `names` that has one: registered by hand, ours, or named by an installed package."""
    built_in()
    for name in names:
        if name in BACKBONES:
            return BACKBONES[name]
        for entry in entry_points(group=ENTRY_POINTS, name=name):
            kind = entry.load()
            if not (isinstance(kind, type) and issubclass(kind, Backbone)):
                raise FewstepError(
                    f"found the entry point {name} = {entry.value!r} of the group {ENTRY_POINTS!r} that is no "
                    "adapter, expected a subclass of fewstep.models.Backbone, fix: correct it in the package that "
                    "names it"
                )
            return BACKBONES.setdefault(name, kind)
    return None
