"""Videos are drawn and written, or refused in a paragraph before anything is left behind."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import tiny_flows
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tests.fuzz.fuzzing import cases, outcome

import fewstep
from fewstep.attention import Layout
from fewstep.core import grids
from fewstep.evaluation.clips import check_file, save_each, save_samples
from fewstep.models.student import Student
from fewstep.models.teacher import Teacher
from fewstep.streaming.student import CausalStudent

NUMBERS = st.integers(-2, 4) | st.sampled_from([61, 1001, 2**63, -(2**63) - 1, 10**30])
ENDINGS = ["", ".", ".png", ".PNG", ".gif", ".webp", ".mp4.", ".avi", ".jpeg", ".png.exe"]
PROMPTS = st.lists(st.text(max_size=20), max_size=2) | st.text(max_size=20)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Teacher | Student | CausalStudent]:
    """A teacher of films of four frames, a student, and one that makes them frame by frame."""
    folder = tmp_path_factory.mktemp("films") / "teacher"
    tiny_flows.film().save_pretrained(folder)
    teacher = fewstep.load_teacher(folder, height=16, width=16, num_frames=4)
    teacher.steps = 2
    backbone, grid = teacher.backbone, {2: grids.uniform(2)}
    network = backbone.network
    causal = CausalStudent(backbone, network, grid, {}, 0.0, Layout(1), backbone.causal(network))
    return [teacher, Student(backbone, network, grid, False, {}), causal]


def test_requests_for_videos(models: list[Any], tmp_path: Path) -> None:
    @cases("video requests")
    @given(
        which=st.integers(0, 2),
        prompts=PROMPTS,
        seeds=NUMBERS | st.lists(NUMBERS, max_size=2),
        more=st.fixed_dictionaries(
            {},
            optional={
                "steps": NUMBERS.filter(lambda steps: not 4 < steps <= 1001),
                "solver": st.sampled_from(["trained", "ddim", "lcm", "nonsense", ""]),
                "batch": NUMBERS,
            },
        ),
        ending=st.sampled_from(ENDINGS),
        columns=st.integers(1, 5),
        fps=NUMBERS | st.integers(1, 60),
    )
    def fuzz(which: int, prompts: Any, seeds: Any, more: dict[str, Any], ending: str, columns: int, fps: int) -> None:
        path = tmp_path / f"clip{ending}"
        videos: list[torch.Tensor] = []

        def use() -> None:
            check_file(path, True, fps)
            videos.append(fewstep.sample(models[which], prompts, seeds, **more))
            save_samples(path, videos[0], columns, fps)

        told = outcome(use)
        assert (told is None) == path.exists()
        if told is None:
            count = 1 if isinstance(prompts, str) else len(prompts)
            assert videos[0].shape == (count, 4, 3, 16, 16)
            with Image.open(path) as film:
                film.load()
                wide = min(columns, 4) if path.suffix.lower() == ".png" else min(columns, count)
                assert film.width == 16 * wide
            texts = [prompts] if isinstance(prompts, str) else prompts
            folder = save_each(tmp_path / "folder", texts, list(range(count)), videos[0], "gif", fps)
            assert len(list(folder.iterdir())) == count
        for left in sorted(tmp_path.rglob("*"), reverse=True):
            assert not left.name.startswith(".unfinished")
            left.rmdir() if left.is_dir() else left.unlink()

    fuzz()


def test_requests_for_streams(models: list[Any]) -> None:
    @cases("streams")
    @given(
        prompts=PROMPTS,
        seeds=NUMBERS | st.lists(NUMBERS, max_size=2),
        more=st.fixed_dictionaries({}, optional={"steps": NUMBERS, "sink": NUMBERS, "window": NUMBERS}),
    )
    def fuzz(prompts: Any, seeds: Any, more: dict[str, Any]) -> None:
        def use() -> None:
            count = 1 if isinstance(prompts, str) else len(prompts)
            for chunk in islice(models[2].stream(prompts, seeds, **more), 3):
                assert chunk.shape == (count, 4, 1, 4, 4)
                assert bool(chunk.isfinite().all())

        outcome(use)

    fuzz()
