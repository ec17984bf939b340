"""A student's samples against the teacher's by pixels alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from fewstep.evaluation.held_out import PER_PROMPT, PROMPTS, HeldOut, compared


def _pictures(seed: int, prompts: int = 4) -> Tensor:
    """Patches of colour with some noise on them; two seeds of a prompt share the colours in part."""
    generator = torch.Generator().manual_seed(seed)
    own = torch.rand(prompts, PER_PROMPT, 3, 4, 4, generator=generator)
    blocks = (own + torch.rand(prompts, 1, 3, 4, 4, generator=generator)).flatten(0, 1) / 2
    fine = torch.randn(len(blocks), 3, 32, 32, generator=generator)
    return ((interpolate(blocks, scale_factor=8) + 0.05 * fine).clamp(0.1, 0.9) * 255).byte()


def _near(told: dict[str, float], **expected: float) -> None:
    for name, value in expected.items():
        assert told[name] == pytest.approx(value, abs=1e-6), name


def test_the_teachers_own_samples_are_at_no_distance() -> None:
    ratios = {"contrast": 1, "sharpness": 1, "variety": 1}
    _near(compared(_pictures(0), _pictures(0)), distance=0, shift=0, clipped=0, **ratios)
    other = compared(_pictures(1), _pictures(0))
    assert 0 < other["distance"] < 0.1
    assert 0.8 < other["variety"] < 1.25


def test_each_figure_sees_what_it_is_named_for() -> None:
    theirs = _pictures(0)
    values = theirs.float()

    def told(changed: Tensor) -> dict[str, float]:
        return compared(changed.round().clamp(0, 255).byte(), theirs)

    blurred = told(interpolate(avg_pool2d(values, 4), scale_factor=4))
    assert blurred["sharpness"] < 0.9
    saturated = told(127 + 3 * (values - 127))
    assert saturated["contrast"] > 1.4
    assert saturated["clipped"] > 0.1
    assert saturated["sharpness"] > 1.2
    _near(told(values + 20), shift=20 / 255, contrast=1, sharpness=1, variety=1)
    alike = values.unflatten(0, (-1, PER_PROMPT))[:, :1].expand(-1, PER_PROMPT, -1, -1, -1).flatten(0, 1)
    _near(told(alike), variety=0)
    assert 0.005 < blurred["distance"] < saturated["distance"]


def test_videos_are_compared_by_frames() -> None:
    films = _pictures(0)[:, None].expand(-1, 6, -1, -1, -1)
    _near(compared(films, films), distance=0, variety=1)


def test_the_teacher_is_sampled_once_and_with_the_students_seeds() -> None:
    asked: list[tuple[str, list[str], list[int]]] = []

    def draw(name: str, prompts: list[str], seeds: list[int]) -> Tensor:
        asked.append((name, prompts, seeds))
        return _pictures(0, PROMPTS)

    held_out = HeldOut(lambda *told: draw("teacher", *told), [f"prompt {n}" for n in range(40)])
    for _ in range(2):
        _near(held_out.compare(lambda *told: draw("student", *told)), distance=0)
    assert [name for name, *_ in asked] == ["teacher", "student", "student"]
    assert asked[0][1:] == asked[1][1:] == asked[2][1:]
    assert asked[0][1][:3] == ["prompt 0", "prompt 0", "prompt 1"]
    assert len(set(asked[0][2])) == PROMPTS * PER_PROMPT
