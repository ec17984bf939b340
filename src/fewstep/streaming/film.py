"""A film that is written as it comes, and can be watched however it ends."""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.evaluation.clips import MOST_FPS, has_films


class FilmFile:
    """An .mp4 (H.264) in fragments, so that what has been written plays while more is written.

    It has a temporary name until it is closed: `.unfinished-PID-NAME` beside it, which a player can open. Left with an
    error, that is what stays away: nothing is renamed, and the temporary file is removed.

    Args:
        path: ends in .mp4; its folder is made.
        fps: frames a second, 1 to 60.

    Raises:
        FewstepError: another ending, another frame rate, or the extra `video` is missing.
    """

    def __init__(self, path: Path, fps: int = 16) -> None:
        if path.suffix.lower() != ".mp4" or not 1 <= fps <= MOST_FPS:
            raise FewstepError(
                f"found {path.name} at {fps} frames a second for a stream, expected a name that ends in .mp4 and 1 to "
                f"{MOST_FPS}, fix: --out film.mp4 --fps 16"
            )
        if not has_films():
            raise FewstepError(
                "found no imageio with ffmpeg, expected both for streams, which are written as .mp4, "
                "fix: pip install 'fewstep[video]'"
            )
        import imageio_ffmpeg

        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.frames = path, 0
        self._fps, self._write_frames = fps, imageio_ffmpeg.write_frames
        self._unfinished = path.with_name(f".unfinished-{os.getpid()}-{path.name}")
        self._writer: Generator[None, Any, None] | None = None

    def __enter__(self) -> FilmFile:
        return self

    def write(self, frames: Tensor) -> None:
        """The next frames (F, 3, H, W) uint8; an odd last row or column is left out, as H.264 wants even sides."""
        height, width = frames.shape[2] // 2 * 2, frames.shape[3] // 2 * 2
        if self._writer is None:
            self._writer = self._write_frames(
                str(self._unfinished), (width, height), fps=self._fps, macro_block_size=1, ffmpeg_log_level="error",
                output_params=["-movflags", "frag_keyframe+empty_moov", "-g", str(self._fps), "-fflags", "+bitexact"],
            )  # fmt: skip
            self._writer.send(None)
        for frame in frames[:, :, :height, :width].permute(0, 2, 3, 1).cpu():
            self._writer.send(frame.contiguous().numpy())
        self.frames += len(frames)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._writer.close()
        if kind is None and self.frames:
            os.replace(self._unfinished, self.path)
        else:
            self._unfinished.unlink(missing_ok=True)
