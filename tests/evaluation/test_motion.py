"""Videos whose movement and flicker are known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fewstep.errors import FewstepError
from fewstep.evaluation import vbench
from fewstep.evaluation.motion import motion_and_flicker
from fewstep.evaluation.vbench import write_vbench


def texture(side: int) -> torch.Tensor:
    return torch.randint(0, 256, (3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_a_picture_that_slides_moves_and_does_not_flicker() -> None:
    wide = texture(64)
    video = torch.stack([wide[:, 3 * n : 3 * n + 32, 4 * n : 4 * n + 32] for n in range(4)])
    motion, flicker = motion_and_flicker(video)
    assert 3.5 < motion <= 5.5  # 5 pixels a frame; blocks that leave the picture are matched elsewhere
    assert flicker < 0.1
    inner = motion_and_flicker(torch.stack([video[0], video[0]]))
    assert inner == (0.0, 0.0)


def test_light_that_alternates_flickers_and_does_not_move() -> None:
    flat = torch.full((4, 3, 32, 32), 100, dtype=torch.uint8)
    flat[1::2] = 151
    motion, flicker = motion_and_flicker(flat)
    assert motion == 0
    assert flicker == pytest.approx(0.2, abs=1e-6)
    assert motion_and_flicker(flat[:1]) == (0.0, 0.0)


def test_vbench_finds_its_names_and_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    monkeypatch.setattr(vbench, "save_samples", lambda path, videos, columns, fps: written.append((path, videos.shape)))
    video = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    write_vbench(tmp_path, [("a cat", video), ("a cat", video), ("a dog/fox", video)])
    names = [path.relative_to(tmp_path).as_posix() for path, _ in written]
    assert names == ["videos/a cat-0.mp4", "videos/a cat-1.mp4", "videos/a dog fox-0.mp4"]
    assert all(shape == (1, 4, 3, 8, 8) for _, shape in written)
    told = json.loads((tmp_path / "prompts.json").read_text())
    assert list(told.values()) == ["a cat", "a cat", "a dog/fox"]
    with pytest.raises(FewstepError, match="expected a video"):
        write_vbench(tmp_path, [("a cat", video[0])])
