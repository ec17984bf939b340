"""Pictures of several samplers for the same prompts and seeds, and the grid that puts them into one PNG."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fewstep.errors import FewstepError

_CELL = 128
"""Side, in pixels, that small pictures reach at least in the grid."""
_LARGEST = 256
"""Side above which a picture is scaled down for the grid."""
_GAP, _MARGIN, _LINE = 8, 24, 18
_LINES = 4
_INK, _MUTED = "#1c1e21", "#6b7076"


@dataclass(frozen=True)
class Candidate:
    """One sampler in a comparison, with its pictures; picture i is of prompt i and seed i for every candidate."""

    name: str
    images: Tensor
    """(N, 3, H, W) uint8."""
    calls: int
    """Network calls per picture; a guided step counts two."""
    seconds: float | None
    """Wall seconds per picture; None if not measured."""
    scores: Mapping[str, float] | None
    """Score by name; None or a missing name or nan: not measured."""


def check_candidates(candidates: Sequence[Candidate], prompts: Sequence[str]) -> None:
    """FewstepError unless there is a candidate, names differ, and each has one uint8 RGB picture per prompt."""
    names = [c.name for c in candidates]
    if not names or len(set(names)) < len(names):
        raise FewstepError(f"found candidates {names}, expected at least one and no name twice, fix: rename them")
    for c in candidates:
        shape = tuple(c.images.shape)
        if c.images.dtype != torch.uint8 or len(shape) != 4 or shape[:2] != (len(prompts), 3) or 0 in shape:
            raise FewstepError(
                f"found pictures {c.images.dtype} {shape} of {c.name!r}, expected torch.uint8 "
                f"({len(prompts)}, 3, H, W), fix: pass one decoded picture per prompt"
            )


def to_pil(image: Tensor) -> Image.Image:
    """(3, H, W) uint8 -> a picture."""
    return Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())


def replace_file(path: Path, content: bytes) -> Path:
    """Writes `path` under a temporary name and renames it, so that nobody ever sees half a file. Makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".unfinished-{os.getpid()}-{path.name}")
    try:
        unfinished.write_bytes(content)
        os.replace(unfinished, path)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise
    return path


def save_pictures(path: Path, images: Tensor, columns: int = 8) -> Path:
    """uint8 images (N, 3, H, W) as one PNG, pixel by pixel, in rows of `columns`; missing places are white.

    Videos (N, F, 3, H, W) become contact sheets: a row each, of at most `columns` frames evenly spaced from the first
    to the last. `evaluation.clips.save_samples` writes them as films.
    """
    if images.ndim == 5:
        frames = images.shape[1]
        columns = min(columns, frames)
        images = images[:, torch.linspace(0, frames - 1, columns).round().long()].flatten(0, 1)
    count, _, height, width = images.shape
    columns = min(columns, count)
    sheet = Image.new("RGB", (columns * width, -(-count // columns) * height), "white")
    for i, image in enumerate(images):
        sheet.paste(to_pil(image), (i % columns * width, i // columns * height))
    target = io.BytesIO()
    sheet.save(target, "PNG")
    return replace_file(path, target.getvalue())


def write_grid(path: Path, candidates: Sequence[Candidate], prompts: Sequence[str], columns: int = 12) -> Path:
    """One PNG: a row per candidate (name and calls on the left), a column per prompt (its text on top).

    Only the first `columns` prompts are drawn. Small pictures are enlarged by a whole factor, pixel by pixel; pictures
    above 256 pixels are scaled down. FewstepError for what `check_candidates` refuses and for columns < 1.
    """
    check_candidates(candidates, prompts)
    if columns < 1:
        raise FewstepError(f"found columns = {columns}, expected at least 1, fix: pass --columns 12")
    prompts = prompts[:columns]
    width, height = _cell(candidates[0].images)
    strong, plain = ImageFont.load_default(15), ImageFont.load_default(13)
    labels = [(c.name, f"{c.calls} call{'s' * (c.calls != 1)}") for c in candidates]
    left = _MARGIN + min(260, max(160, *(int(strong.getlength(name)) + 16 for name, _ in labels)))
    captions = [wrap(prompt, plain, width, _LINES) for prompt in prompts]
    top = _MARGIN + _LINE * max(len(lines) for lines in captions) + 6
    size = (left + len(prompts) * (width + _GAP) - _GAP + _MARGIN, top + len(labels) * (height + _GAP) - _GAP + _MARGIN)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for column, lines in enumerate(captions):
        x, y = left + column * (width + _GAP), top - 6 - _LINE * len(lines)
        for i, line in enumerate(lines):
            draw.text((x, y + _LINE * i), line, _INK, plain)
    for row, (name, calls) in enumerate(labels):
        y = top + row * (height + _GAP)
        lines = wrap(name, strong, left - _MARGIN - 12, 3)
        start = y + (height - _LINE * (len(lines) + 1)) // 2
        for i, line in enumerate(lines):
            draw.text((_MARGIN, start + _LINE * i), line, _INK, strong)
        draw.text((_MARGIN, start + _LINE * len(lines) + 2), calls, _MUTED, plain)
        for column in range(len(prompts)):
            picture = to_pil(candidates[row].images[column])
            enlarged = width >= picture.width
            how = Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS
            sheet.paste(picture.resize((width, height), how), (left + column * (width + _GAP), y))
    target = io.BytesIO()
    sheet.save(target, "PNG")
    return replace_file(path, target.getvalue())


def _cell(images: Tensor) -> tuple[int, int]:
    """Width and height of a picture in the grid."""
    height, width = images.shape[-2:]
    longest = max(width, height)
    if longest > _LARGEST:
        return max(1, width * _LARGEST // longest), max(1, height * _LARGEST // longest)
    factor = -(-_CELL // longest)
    return width * factor, height * factor


def wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int, lines: int) -> list[str]:
    """Breaks text into at most `lines` lines of at most `width` pixels; a word that is too long is broken inside.

    What does not fit is cut off, marked by "…".
    """
    out = [""]
    for word in text.split():
        joined = f"{out[-1]} {word}".strip()
        if font.getlength(joined) <= width:
            out[-1] = joined
            continue
        if out[-1]:
            out.append("")
        for letter in word:
            if out[-1] and font.getlength(out[-1] + letter) > width:
                out.append("")
            out[-1] += letter
    if len(out) > lines:
        last = out[lines - 1]
        while last and font.getlength(last + "…") > width:
            last = last[:-1]
        out = [*out[: lines - 1], last.rstrip() + "…"]
    return out
