"""How prompts become conditions while a student is trained: from a cache on disk, or by the text encoder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from fewstep.caching import make_cache, weights_digest
from fewstep.data.real import RealImages
from fewstep.embedded.names import EMOJI, name_of
from fewstep.errors import FewstepError
from fewstep.live import watched
from fewstep.models.backbone import Backbone
from fewstep.models.text_encoders import encoder_kinds, freed, load_encoders, offload, text_encoders
from fewstep.training.folder import noted
from fewstep.training.parallel import Group
from fewstep.unread import refuse_unread

CACHE_FOLDER = "cache"
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """How prompts are encoded, and where that is kept."""

    text_encoder: Literal["auto", "cache", "offload", "keep"] = "auto"
    """`cache`: every prompt is encoded once, to disk, and the encoders are out of memory during training; `offload`:
    encoded when needed, by encoders that wait on the CPU; `keep`: likewise, on the device; `auto`: cache, but keep for
    the embedded teachers, and offload where hooks or data of your own may ask for other prompts."""
    cache: Path | None = None
    """Folder of caches, each in a folder named by its key; `cache` beside --out unless told."""
    cache_dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Of cached embeddings; `auto`: bfloat16, float32 for the embedded teachers. float32 is lossless."""


def mode_of(told: str, backbone: Backbone, own: bool = False) -> str:
    """`TextOptions.text_encoder` with "auto" decided; `own` says that hooks or data of the caller's encode prompts."""
    if told != "auto":
        return told
    return "keep" if _embedded(backbone) else "offload" if own else "cache"


def _embedded(backbone: Backbone) -> bool:
    return backbone.makes_films or name_of(backbone.source) == EMOJI


@dataclass(frozen=True)
class Encoding:
    """How the prompts of one distillation are encoded."""

    backbone: Backbone
    mode: str
    dtype: torch.dtype
    folder: Path
    """Of caches."""
    texts: list[Sequence[str]]
    """All that will be asked for."""

    @classmethod
    def of(
        cls,
        backbone: Backbone,
        options: TextOptions | None,
        out: Path,
        texts: Sequence[str],
        real: Any,
        *,
        own: bool,
    ) -> Encoding:
        """`options` decided for a run in `out`; `own` says that hooks or pairs of the caller's may encode prompts.

        Raises:
            FewstepError: real data whose texts are not known, with a cache.
        """
        options = options or TextOptions()
        mode = mode_of(options.text_encoder, backbone, own or not isinstance(real, RealImages | None))
        if mode == "cache" and not isinstance(real, RealImages | None):
            raise FewstepError(
                f"found real data of the kind {type(real).__name__} with a cache of prompts, expected RealImages, "
                "whose texts are known beforehand, fix: --text-encoder offload (text_encoder='offload')"
            )
        if mode != "cache":
            refuse_unread(options, ["cache", "cache_dtype"], "text_encoder 'cache'")
        beside = watched(backbone, ())
        asked = [texts, real.texts] if isinstance(real, RealImages) else [texts]
        usual = "float32" if _embedded(backbone) else "bfloat16"
        dtype = usual if options.cache_dtype == "auto" else options.cache_dtype
        folder = options.cache or out.absolute().parent / CACHE_FOLDER
        return cls(backbone, mode, _DTYPES[dtype], folder, asked + [beside.drawn, beside.held_out, beside.judged])

    @property
    def lossy(self) -> dict[str, str]:
        """What of it changes the run's numbers: the precision of a cache that is less than the encoders'."""
        floats = [value.dtype for value in self.backbone.null_condition().values() if value.is_floating_point()]
        exact = all(torch.promote_types(self.dtype, dtype) == self.dtype for dtype in floats)
        return {} if exact or self.mode != "cache" else {"cache_dtype": str(self.dtype).removeprefix("torch.")}

    @contextmanager
    def ready(self, group: Group) -> Iterator[None]:
        """Within it `backbone.encode` answers for `texts` as `mode` says.

        Raises:
            FewstepError: the cache cannot be made (`make_cache`), or encoders could not be loaded again as they are.
        """
        if self.mode == "cache":
            if group.leads:
                _refuse_changed(self.backbone)
            made = make_cache(self.backbone, self.texts, self.folder, self.dtype, group)
            about = {"key": made.folder.name, "dtype": str(self.dtype).removeprefix("torch.")}
            with freed(self.backbone, made.encode, made.null()), noted(embedding_cache=lambda: about):
                yield
            return
        if self.mode == "offload":
            offload(self.backbone)
        yield


def _refuse_changed(backbone: Backbone) -> None:
    """FewstepError where encoders cannot be loaded again after training, or would be others than they are now."""
    there = text_encoders(backbone)
    for name, part in load_encoders(backbone, encoder_kinds(backbone)).items():
        if weights_digest(part) != weights_digest(there[name]):
            raise FewstepError(
                f"found a {name} whose weights are others than those in {backbone.folder}, expected the same, as it is "
                "loaded from there again after training, fix: --text-encoder offload (text_encoder='offload'), or save "
                "the pipeline with save_pretrained and load that"
            )
