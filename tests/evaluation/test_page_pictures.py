"""Pictures inside the report, and the grid in one PNG."""

from __future__ import annotations

import base64
import io
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))

from page_examples import candidates, decoded, numbers, page, parse, pictures, scripts

from fewstep.errors import FewstepError
from fewstep.evaluation.page import Candidate, write_grid
from fewstep.evaluation.page_pictures import Form, choose_form, page_id, webp


def test_pictures_are_made_to_fit(tmp_path: Path) -> None:
    small, large = candidates(3), [Candidate("a", pictures(3, 0, 256), 1, None)]
    assert choose_form(small, 1) == Form(16, True)
    assert choose_form(large, 10) == Form(256, False)
    wanted = sum(len(webp(image, Form(192, False))) for image in large[0].images)
    tight = choose_form(large, wanted * 4 / 3 / 1e6 * 1.001)
    assert tight == Form(192, False)
    assert choose_form(large, 1e-6) == Form(64, False)
    root = parse(page(tmp_path, prompts=["x"] * 3, candidates=large, megabytes=1e-6))
    assert "at 64 of 256 pixels" in root.section("notes").text
    assert decoded(scripts(root, "text/plain")[0].text.split("\n")[2]).shape == (64, 64, 3)


def test_a_video_plays(tmp_path: Path) -> None:
    videos = torch.stack([pictures(5, 0), pictures(5, 1)])
    root = parse(page(tmp_path, candidates=[Candidate("a", videos, 1, None)]))
    first = Image.open(io.BytesIO(base64.b64decode(scripts(root, "text/plain")[0].text.split("\n")[0])))
    assert (first.n_frames, first.size) == (5, (16, 16))
    write_grid(tmp_path / "grid.png", [Candidate("a", videos, 1, None)], ["x", "y"])


def test_votes_belong_to_names_and_settings() -> None:
    def of(name: str, **settings: Any) -> str:
        return page_id([Candidate(name, pictures(1, 0), 1, None, settings=settings)])

    assert of("a", steps=4) == page_id([Candidate("a", pictures(2, 1), 9, 0.1, numbers(x=1.0), {"steps": 4})])
    assert len({of("a", steps=4), of("b", steps=4), of("a", steps=2)}) == 3


@pytest.mark.parametrize(
    ("side", "cell", "columns", "shown"), [(64, 128, 12, 5), (16, 128, 3, 3), (100, 200, 5, 5), (512, 256, 2, 2)]
)
def test_grid_has_each_picture_in_its_place(tmp_path: Path, side: int, cell: int, columns: int, shown: int) -> None:
    given = candidates(5, side)
    prompts = ["a frog", "an apple", "a very long prompt " * 20, "", "x" * 300]
    grid = Image.open(write_grid(tmp_path / "new" / "grid.png", given, prompts, columns)).convert("RGB")
    right, bottom = grid.width - 24, grid.height - 24
    left, top = right - shown * cell - (shown - 1) * 8, bottom - 3 * cell - 2 * 8
    assert left >= 24 + 160
    for row, candidate in enumerate(given):
        for column in range(shown):
            x, y = left + column * (cell + 8), top + row * (cell + 8)
            found = grid.crop((x, y, x + cell, y + cell))
            picture = Image.fromarray(candidate.images[column].permute(1, 2, 0).numpy())
            how = Image.Resampling.NEAREST if cell >= side else Image.Resampling.LANCZOS
            assert found.tobytes() == picture.resize((cell, cell), how).tobytes(), (row, column)
        label = grid.crop((0, top + row * (cell + 8), left, top + row * (cell + 8) + cell))
        assert label.getextrema() != ((255, 255),) * 3
    assert grid.crop((left, 0, left + cell, top)).getextrema() != ((255, 255),) * 3
    assert grid.crop((right, 0, grid.width, grid.height)).getextrema() == ((255, 255),) * 3


def test_grid_refuses_no_columns(tmp_path: Path) -> None:
    with pytest.raises(FewstepError, match="found columns = 0"):
        write_grid(tmp_path / "grid.png", candidates(1), ["a"], 0)
