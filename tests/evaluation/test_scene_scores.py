"""Scores of embedded scenes: what can be said of made-up pictures without knowing the judge."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fewstep.embedded.build import JUDGE_FILE, shipped
from fewstep.embedded.judge import Judge
from fewstep.evaluation.scenes import evaluation_captions, judge_features, score_scenes

COUNT = 16


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge.load(shipped(JUDGE_FILE))


def noise(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (COUNT, 3, 64, 64), dtype=torch.uint8, generator=generator)


def test_a_set_against_itself(judge: Judge) -> None:
    images = noise(0)
    scores = score_scenes(judge, images, evaluation_captions(COUNT), judge_features(judge, images)[0])
    assert scores.frechet == pytest.approx(0, abs=1e-3)
    assert (scores.precision, scores.recall) == (1.0, 1.0)
    assert scores.row()["frechet"] == scores.frechet


@pytest.mark.parametrize(("half", "contrast", "clipped"), [((128, 128), 0, 0), ((0, 255), 0.5, 1), ((64, 255), 0, 0.5)])
def test_contrast_and_clipping_are_those_of_the_values(
    judge: Judge, half: tuple[int, int], contrast: float, clipped: float
) -> None:
    images = torch.full((COUNT, 3, 64, 64), half[0], dtype=torch.uint8)
    images[..., 32:] = half[1]
    scores = score_scenes(judge, images, evaluation_captions(COUNT), judge_features(judge, noise(1))[0])
    assert scores.clipped == clipped
    assert scores.contrast == pytest.approx(contrast or (half[1] - half[0]) / 510, abs=1e-4)
