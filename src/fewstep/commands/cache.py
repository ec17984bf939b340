"""`fewstep cache`: encode prompts to disk ahead of distillations."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from fewstep.api import EMOJI, cache_prompts, load_teacher
from fewstep.commands.common import choose_device, parse


@dataclass(kw_only=True)
class Cache:
    """Encode prompts once, to disk; `fewstep distill` of the same teacher, --base-dtype and prompts then finds them."""

    teacher: str = EMOJI
    """`emoji` or `films` (embedded), a diffusers pipeline folder, or a Hub id."""
    prompts: str | None = None
    """PATH or PATH:COLUMN, as for `fewstep distill`. The embedded teacher has captions of its own."""
    cache: Path = Path("runs/cache")
    """Folder of caches; each is in a folder named by its key."""
    cache_dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Of the embeddings on disk; `auto`: bfloat16, float32 for the embedded teacher."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1`, ..."""
    base_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the teacher's weights, text encoders among them."""


def main(arguments: list[str]) -> None:
    """Parse, encode, say where the cache is and how large."""
    args = parse(Cache, "cache", arguments)
    dtype, device = getattr(torch, args.base_dtype), choose_device(args.device)
    teacher = load_teacher(args.teacher, dtype=dtype, device=device, defer=True)  # its network is not asked
    folder = cache_prompts(teacher, args.prompts, args.cache, args.cache_dtype)
    if os.environ.get("RANK", "0") == "0":
        size = sum(path.stat().st_size for path in folder.iterdir())
        print(f"cache: {folder} ({size / 1e9:.3f} GB)", file=sys.stderr)
