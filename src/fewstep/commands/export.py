"""`fewstep export RUN`: a student in the form that another tool wants, and on the Hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from fewstep.commands.common import parse
from fewstep.exporting import Target, export_student, require_public_teacher
from fewstep.hub import push, require_token

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(kw_only=True)
class Export:
    """Write a student as a diffusers pipeline, a LoRA for diffusers or ComfyUI, or merged weights, with its card."""

    source: Annotated[Path, tyro.conf.Positional]
    """A run, or the folder of a student or LoRA in it."""
    to: Target = "diffusers"
    """`diffusers`: whole pipeline; `lora`: LoRA for diffusers; `comfyui`: LoRA for ComfyUI; `merged`: the network."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of the weights on disk."""
    out: Path | None = None
    """Folder to write; SOURCE-TO unless told."""
    base_model: str | None = None
    """Hub id by which others know the teacher, where it was a folder here: for the card, and for who loads the LoRA."""
    push: str | None = None
    """Model repository on the Hub (owner/name) to upload to; the token is HF_TOKEN of the environment."""
    private: bool = False
    """Make a new repository a private one."""


def main(arguments: list[str]) -> None:
    """Parse, write, upload if asked; print where it is."""
    args = parse(Export, "export", arguments)
    if args.push:
        require_token()
        require_public_teacher(args.source, args.to, args.base_model)
    folder = export_student(args.source, args.to, out=args.out, dtype=_DTYPES[args.dtype], base_model=args.base_model)
    print(folder)
    if args.push:
        print(push(folder, args.push, private=args.private))
