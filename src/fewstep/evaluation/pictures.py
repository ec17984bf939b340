"""Pictures of several samplers for the same prompts and seeds, and the grid that puts them into one PNG."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.evaluation.intervals import Estimate

_CELL = 128
"""Side, in pixels, that small pictures reach at least in the grid."""
_LARGEST = 256
"""Side above which a picture is scaled down for the grid."""
_GAP, _MARGIN, _LINE = 8, 24, 18
_LINES = 4
_INK, _MUTED = "#1c1e21", "#6b7076"


class Pictures(Protocol):
    """Samples that are read one at a time: a tensor of all of them, or `samples.Kept` ones on disk."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Tensor:
        """uint8 (3, H, W), or (F, 3, H, W) of a video."""
        ...


@dataclass(frozen=True)
class Candidate:
    """One sampler in a comparison, with its pictures; picture i is of prompt i and seed i for every candidate."""

    name: str
    images: Pictures
    calls: int
    """Network calls per picture; a guided step counts two."""
    seconds: float | None
    """Wall seconds of a picture drawn alone; None if not measured."""
    scores: Mapping[str, Estimate] = field(default_factory=dict)
    """Figures by name, with intervals where there are some; a missing name or nan: not measured."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """All that makes it what it is, JSON-able; votes on a page belong to these settings."""
    fps: int = 16
    """Frames a second, of videos."""


def check_candidates(candidates: Sequence[Candidate], prompts: Sequence[str]) -> None:
    """FewstepError unless there is a candidate, names differ, and each has one uint8 RGB sample per prompt."""
    names = [c.name for c in candidates]
    if not names or len(set(names)) < len(names):
        raise FewstepError(f"found candidates {names}, expected at least one and no name twice, fix: rename them")
    for c in candidates:
        count = len(c.images)
        told = f"{c.images[0].dtype} {tuple(c.images[0].shape)}" if count else "of no shape"
        if count != len(prompts) or not count or not _is_sample(c.images[0]):
            raise FewstepError(
                f"found {count} pictures {told} of {c.name!r}, expected {len(prompts) or 'some'} torch.uint8 (3, H, W) "
                "or (F, 3, H, W), fix: pass one decoded sample per prompt, and a prompt"
            )


def _is_sample(image: Tensor) -> bool:
    shape = tuple(image.shape)
    return image.dtype == torch.uint8 and len(shape) in (3, 4) and shape[-3] == 3 and 0 not in shape


def to_pil(image: Tensor) -> Image.Image:
    """(3, H, W) uint8 -> a picture."""
    return Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())


def replace_file(path: Path, content: bytes | Iterable[bytes]) -> Path:
    """Writes `path` under a temporary name and renames it, so that nobody ever sees half a file. Makes its folder.

    `content` may come in pieces, which are written as they come.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".unfinished-{os.getpid()}-{path.name}")
    try:
        with unfinished.open("wb") as file:
            for piece in [content] if isinstance(content, bytes) else content:
                file.write(piece)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)  # where the disk was full
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

    Only the first `columns` prompts are drawn, and of videos the frame in the middle. Small pictures are enlarged by
    a whole factor, pixel by pixel; pictures above 256 pixels are scaled down. FewstepError for what `check_candidates`
    refuses and for columns < 1.
    """
    check_candidates(candidates, prompts)
    if columns < 1:
        raise FewstepError(f"found columns = {columns}, expected at least 1, fix: pass --columns 12")
    prompts = prompts[:columns]
    width, height = _cell(candidates[0].images[0])
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
            image = candidates[row].images[column]
            picture = to_pil(image if image.ndim == 3 else image[len(image) // 2])
            enlarged = width >= picture.width
            how = Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS
            sheet.paste(picture.resize((width, height), how), (left + column * (width + _GAP), y))
    target = io.BytesIO()
    sheet.save(target, "PNG")
    return replace_file(path, target.getvalue())


def _cell(image: Tensor) -> tuple[int, int]:
    """Width and height of a picture in the grid."""
    height, width = image.shape[-2:]
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
