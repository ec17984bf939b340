"""Videos as files: which file by its ending, frame by frame."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.errors import FewstepError
from fewstep.evaluation.clips import save_each, save_samples, side_by_side

VIDEOS = torch.randint(0, 256, (3, 5, 3, 8, 10), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_side_by_side_puts_each_video_in_its_cell() -> None:
    sheet = side_by_side(VIDEOS, 2)
    assert sheet.shape == (5, 3, 16, 20)
    assert torch.equal(sheet[:, :, :8, 10:], VIDEOS[1])
    assert torch.equal(sheet[:, :, 8:, :10], VIDEOS[2])
    assert bool((sheet[:, :, 8:, 10:] == 255).all())


def test_a_png_is_a_contact_sheet_with_a_row_per_video(tmp_path: Path) -> None:
    sheet = np.asarray(Image.open(save_samples(tmp_path / "clips.png", VIDEOS, columns=3)))
    assert sheet.shape == (24, 30, 3)
    frame = sheet[8:16, 10:20]
    assert np.array_equal(frame, VIDEOS[1, 2].permute(1, 2, 0))
    assert np.array_equal(sheet[16:, 20:], VIDEOS[2, 4].permute(1, 2, 0))


def test_images_are_pictures_whatever_the_ending(tmp_path: Path) -> None:
    picture = np.asarray(Image.open(save_samples(tmp_path / "one.png", VIDEOS[:1, 0])))
    assert np.array_equal(picture, VIDEOS[0, 0].permute(1, 2, 0))


@pytest.mark.parametrize("ending", [".gif", ".webp"])
def test_animations_have_every_frame(tmp_path: Path, ending: str) -> None:
    flat = torch.arange(5, dtype=torch.uint8).view(1, 5, 1, 1, 1).mul(50).expand(1, 5, 3, 8, 10)
    with Image.open(save_samples(tmp_path / f"clip{ending}", flat, fps=10)) as film:
        assert film.n_frames == 5
        film.seek(3)
        assert abs(int(np.asarray(film.convert("RGB")).mean()) - 150) < 8
        assert film.info["duration"] == 100


def test_a_film_names_the_extra_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "imageio", None)
    monkeypatch.setitem(sys.modules, "imageio.v3", None)
    with pytest.raises(FewstepError, match=r"fewstep\[video\]"):
        save_samples(tmp_path / "clip.mp4", VIDEOS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(importlib.util.find_spec("imageio_ffmpeg") is None, reason="needs the extra video")
def test_a_film_has_every_frame(tmp_path: Path) -> None:
    import imageio.v3 as imageio

    path = save_samples(tmp_path / "clip.mp4", VIDEOS.repeat_interleave(8, 3).repeat_interleave(8, 4), columns=2)
    frames = imageio.imread(path, plugin="FFMPEG")
    assert frames.shape == (5, 128, 160, 3)


def test_other_endings_and_speeds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FewstepError, match=r"clip\.avi"):
        save_samples(tmp_path / "clip.avi", VIDEOS)
    with pytest.raises(FewstepError, match=r"clip\.gif for pictures"):
        save_samples(tmp_path / "clip.gif", VIDEOS[:, 0])
    for fps in (0, 61):
        with pytest.raises(FewstepError, match=f"fps = {fps}"):
            save_samples(tmp_path / "clip.gif", VIDEOS, fps=fps)
    assert list(tmp_path.iterdir()) == []


def test_small_films_are_exact_as_webp(tmp_path: Path) -> None:
    """As are their times; the same films are the same bytes."""
    path = save_samples(tmp_path / "clip.webp", VIDEOS[:1], fps=25)
    with Image.open(path) as film:
        for number in range(5):
            film.seek(number)
            assert np.array_equal(np.asarray(film.convert("RGB")), VIDEOS[0, number].permute(1, 2, 0))
            assert film.info["duration"] == 40
    assert save_samples(tmp_path / "again.webp", VIDEOS[:1], fps=25).read_bytes() == path.read_bytes()


def test_a_file_for_each_sample_is_named_by_its_prompt(tmp_path: Path) -> None:
    folder = save_each(tmp_path / "films", ["A frog, hops!", "/..", "x" * 200], [7, 8, 9], VIDEOS, "gif", 10)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["0000-a-frog-hops-7.gif", "0001-8.gif", f"0002-{'x' * 60}-9.gif"]
