"""Samples as files, by what the file's name ends in: a picture or contact sheet, an animation, or a film."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.evaluation.pictures import replace_file, save_pictures, to_pil

ANIMATIONS = (".gif", ".webp")
FILMS = (".mp4",)


def save_samples(path: Path, samples: Tensor, columns: int = 8, fps: int = 16) -> Path:
    """Write what `sample` returned; the path.

    Args:
        path: images become one PNG whatever its ending (`save_pictures`). Videos become a contact sheet as .png, an
            animation as .gif or .webp, and a film as .mp4, which needs the extra `video`.
        samples: uint8, images (N, 3, H, W) or videos (N, F, 3, H, W); several videos play side by side.
        columns: samples in a row, or frames of a contact sheet.
        fps: frames a second, 1 or more.

    Raises:
        FewstepError: another ending, or the extra is missing.
    """
    ending = path.suffix.lower()
    if samples.ndim == 4 or ending == ".png":
        return save_pictures(path, samples, columns)
    frames = side_by_side(samples, columns)
    if ending in ANIMATIONS:
        first, *more = [to_pil(frame) for frame in frames]
        target = io.BytesIO()
        first.save(target, ending[1:].upper(), save_all=True, append_images=more, duration=round(1000 / fps), loop=0)
        return replace_file(path, target.getvalue())
    if ending in FILMS:
        return replace_file(path, _film(frames, fps))
    raise FewstepError(
        f"found {path.name} for videos, expected a name that ends in .png (a contact sheet), "
        f"{', '.join(ANIMATIONS)} or {', '.join(FILMS)}, fix: rename it"
    )


def side_by_side(videos: Tensor, columns: int) -> Tensor:
    """(N, F, 3, H, W) -> (F, 3, rows H, columns W), in reading order; missing places are white."""
    count, frames, channels, height, width = videos.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    white = videos.new_full((rows * columns - count, *videos.shape[1:]), 255)
    cells = torch.cat([videos, white]).view(rows, columns, frames, channels, height, width)
    return cells.permute(2, 3, 0, 4, 1, 5).reshape(frames, channels, rows * height, columns * width)


def _film(frames: Tensor, fps: int) -> bytes:
    """(F, 3, H, W) uint8 as the bytes of an .mp4 (H.264)."""
    try:
        import imageio.v3 as imageio
        import imageio_ffmpeg  # noqa: F401  (what imageio writes films with)
    except ImportError as error:
        raise FewstepError(
            "found no imageio with ffmpeg, expected both for .mp4 files, fix: pip install 'fewstep[video]', or name "
            "the file .gif, .webp or .png"
        ) from error
    height, width = frames.shape[2] // 2 * 2, frames.shape[3] // 2 * 2  # H.264 wants even sides
    pixels = frames[:, :, :height, :width].permute(0, 2, 3, 1).contiguous().numpy()
    return imageio.imwrite("<bytes>", pixels, extension=".mp4", plugin="FFMPEG", fps=fps, macro_block_size=1)
