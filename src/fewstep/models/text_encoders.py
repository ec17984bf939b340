"""The text encoders of a teacher: keeping them off the device, or out of memory, while a student is trained.

They are often as large as the network itself, and a training step does not need them once prompts are encoded.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import nn

from fewstep.core.tensors import Condition
from fewstep.errors import FewstepError
from fewstep.models.backbone import Backbone
from fewstep.models.quiet import quiet_libraries


def encoder_parts(backbone: Backbone) -> dict[str, Any]:
    """The parts of the pipeline that make conditions of prompts: text encoders, and tokenizers, by name."""
    parts = backbone.pipeline.components.items()
    return {name: part for name, part in parts if part is not None and name.startswith(("text_encoder", "tokenizer"))}


def text_encoders(backbone: Backbone) -> dict[str, nn.Module]:
    """Those of `encoder_parts` that have weights."""
    return {name: part for name, part in encoder_parts(backbone).items() if isinstance(part, nn.Module)}


def offload(backbone: Backbone) -> None:
    """Keep the text encoders on the CPU from now on, moved to the backbone's device for each batch they encode."""
    from accelerate.hooks import add_hook_to_module

    for encoder in text_encoders(backbone).values():
        encoder.to("cpu")
        if backbone.device.type != "cpu" and not hasattr(encoder, "_hf_hook"):
            add_hook_to_module(encoder, _visit(backbone))


def _visit(backbone: Backbone) -> Any:
    from accelerate.hooks import ModelHook

    class Visit(ModelHook):
        """Moves a module to the device for its forward, and back."""

        @property
        def execution_device(self) -> torch.device:
            """Read by diffusers' pipelines, which would otherwise work where their first part lies."""
            return backbone.device

        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
            module.to(backbone.device)
            return args, kwargs

        def post_forward(self, module: nn.Module, output: Any) -> Any:
            module.to("cpu")
            return output

    return Visit()


Kinds = dict[str, tuple[str, str, torch.dtype]]
"""Library, class and dtype of each text encoder, by its name among the pipeline's parts."""


def encoder_kinds(backbone: Backbone) -> Kinds:
    """What `load_encoders` has to know."""
    return {name: (*backbone.pipeline.config[name], part.dtype) for name, part in text_encoders(backbone).items()}


def load_encoders(backbone: Backbone, kinds: Kinds) -> dict[str, nn.Module]:
    """The text encoders from the folder that the backbone was loaded from, on the CPU.

    Raises:
        FewstepError: it was not loaded from a folder.
    """
    if backbone.folder is None:
        raise FewstepError(
            f"found a teacher {backbone.source} that was not loaded from a folder, expected one, from which its text "
            "encoders can be loaded again after training, fix: --text-encoder offload (text_encoder='offload')"
        )
    loaded = {}
    for name, (library, kind, dtype) in kinds.items():
        with quiet_libraries():
            part = getattr(import_module(library), kind).from_pretrained(
                backbone.folder / name, torch_dtype=dtype, use_safetensors=True
            )
        loaded[name] = part.requires_grad_(False).eval()
    return loaded


@contextmanager
def freed(backbone: Backbone, encode: Callable[[Sequence[str]], Condition], null: Condition) -> Iterator[None]:
    """Within it the text encoders are out of memory, as far as this library holds them; `encode` stands in for them.

    Afterwards they are loaded again and left as `offload` leaves them; not when a signal is about to end the process.
    """
    kinds, former = encoder_kinds(backbone), backbone._null
    for name in kinds:
        setattr(backbone.pipeline, name, None)
    backbone.encode, backbone._null = encode, null  # type: ignore[method-assign, assignment]
    gc.collect()
    if backbone.device.type == "cuda":
        torch.cuda.empty_cache()

    def restore() -> None:
        del backbone.encode
        backbone._null = former
        backbone.pipeline.register_modules(**load_encoders(backbone, kinds))
        offload(backbone)

    try:
        yield
    except Exception:
        restore()
        raise
    restore()
