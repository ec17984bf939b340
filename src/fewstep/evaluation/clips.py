"""Samples as files, by what the file's name ends in: a picture or contact sheet, an animation, or a film."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.evaluation.pictures import replace_file, save_pictures, to_pil

ANIMATIONS = ("gif", "webp")
FILMS = ("mp4",)
MOVING = (*ANIMATIONS, *FILMS)
"""Forms of videos."""
EXACT = 128
"""WebP is without loss where no side has more pixels."""
QUALITY = 90
"""Of WebP with loss."""
MOST_FPS = 60
_MP4_QUALITY = 9
"""Of imageio's 0 to 10."""
_LONGEST_NAME = 60


def save_samples(path: Path, samples: Tensor, columns: int = 8, fps: int = 16) -> Path:
    """Write what `sample` returned; the path.

    Args:
        path: images become one PNG, row by row. Videos become a contact sheet as .png, an animation as .gif or .webp,
            and a film as .mp4, which needs the extra `video`.
        samples: uint8, images (N, 3, H, W) or videos (N, F, 3, H, W); several videos play side by side.
        columns: samples in a row, or frames of a contact sheet.
        fps: frames a second, 1 to 60.

    Raises:
        FewstepError: as `check_file`.
    """
    check_file(path, samples.ndim == 5, fps)
    form = _form(path)
    if form == "png":
        return save_pictures(path, samples, columns)
    return replace_file(path, moving_bytes(side_by_side(samples, columns), form, fps))


def save_each(folder: Path, prompts: Sequence[str], seeds: Sequence[int], samples: Tensor, form: str, fps: int) -> Path:
    """Write every sample to a file of its own, `NUMBER-PROMPT-SEED.FORM`; the folder.

    Args:
        form: "png" for images; "png" (a contact sheet), "gif", "webp" or "mp4" for videos.
        others: as of `save_samples`.
    """
    for number, (prompt, seed, sample) in enumerate(zip(prompts, seeds, samples, strict=True)):
        words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:_LONGEST_NAME].strip("-")
        name = "-".join(part for part in (f"{number:04d}", words, str(seed)) if part)
        save_samples(folder / f"{name}.{form}", sample[None], fps=fps)
    return folder


def check_file(path: Path, is_video: bool, fps: int = 16) -> None:
    """Refuses a file that samples could not be written to, before any of them is drawn.

    Raises:
        FewstepError: another ending, another frame rate, or the extra is missing.
    """
    if not 1 <= fps <= MOST_FPS:
        raise FewstepError(f"found fps = {fps}, expected 1 to {MOST_FPS} frames a second, fix: change --fps")
    forms = ("png", *MOVING) if is_video else ("png",)
    if _form(path) not in forms:
        raise FewstepError(
            f"found {path.name} for {'videos' if is_video else 'pictures'}, expected a name that ends in "
            + ("" if not is_video else ".png (a contact sheet), .gif, .webp or ")
            + f".{forms[-1]}, fix: rename it"
        )
    if _form(path) in FILMS and not has_films():
        raise FewstepError(
            "found no imageio with ffmpeg, expected both for .mp4 files, fix: pip install 'fewstep[video]', or name "
            "the file .gif, .webp or .png"
        )


def has_films() -> bool:
    """Whether the extra `video` is there, which writes .mp4."""
    try:
        return all(find_spec(name) is not None for name in ("imageio", "imageio_ffmpeg"))
    except ValueError:  # a module without a spec, or a None in its place
        return False


def moving_bytes(frames: Tensor, form: str, fps: int) -> bytes:
    """A video as the bytes of a file; the same bytes for the same frames with the same versions of the codecs.

    Args:
        frames: (F, 3, H, W) uint8.
        form: "gif" (256 colours, times in hundredths of a second), "webp" (without loss where no side has more than
            128 pixels), or "mp4" (H.264; needs the extra `video`).
        fps: frames a second, written into the file.
    """
    if form in FILMS:
        return _film(frames, fps)
    pictures = [to_pil(frame) for frame in frames]
    if form == "webp":
        return webp_bytes(pictures, fps, max(frames.shape[-2:]) <= EXACT)
    first, *more = pictures
    target = io.BytesIO()
    first.save(target, "GIF", save_all=True, append_images=more, duration=max(20, round(100 / fps) * 10), loop=0)
    return target.getvalue()


def webp_bytes(frames: Sequence[Image.Image], fps: int, exact: bool) -> bytes:
    """One frame as the bytes of a WebP file, several as those of an animated one; `exact` is without loss."""
    first, *more = frames
    moving: dict[str, Any] = {"save_all": True, "append_images": more, "duration": round(1000 / fps), "loop": 0}
    how = {"lossless": True, "quality": 80} if exact else {"quality": QUALITY}
    target = io.BytesIO()
    first.save(target, "WEBP", method=4, **how, **(moving if more else {}))
    return target.getvalue()


def side_by_side(videos: Tensor, columns: int) -> Tensor:
    """(N, F, 3, H, W) -> (F, 3, rows H, columns W), in reading order; missing places are white."""
    count, frames, channels, height, width = videos.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    white = videos.new_full((rows * columns - count, *videos.shape[1:]), 255)
    cells = torch.cat([videos, white]).view(rows, columns, frames, channels, height, width)
    return cells.permute(2, 3, 0, 4, 1, 5).reshape(frames, channels, rows * height, columns * width)


def _form(path: Path) -> str:
    return path.suffix.lower().removeprefix(".")


def _film(frames: Tensor, fps: int) -> bytes:
    """(F, 3, H, W) uint8 as the bytes of an .mp4 (H.264) that plays while it is fetched."""
    import imageio.v3 as imageio

    height, width = frames.shape[2] // 2 * 2, frames.shape[3] // 2 * 2  # H.264 wants even sides
    pixels = frames[:, :, :height, :width].permute(0, 2, 3, 1).contiguous().numpy()
    return imageio.imwrite(
        "<bytes>", pixels, extension=".mp4", plugin="FFMPEG", fps=fps, macro_block_size=1, quality=_MP4_QUALITY,
        output_params=["-threads", "1", "-fflags", "+bitexact", "-flags:v", "+bitexact", "-movflags", "+faststart"],
    )  # fmt: skip
