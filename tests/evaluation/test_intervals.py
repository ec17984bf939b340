"""Intervals over prompts: how wide they must be, and how often they must hold the truth."""

from __future__ import annotations

import math

import pytest
import torch

from fewstep.evaluation.intervals import Estimate, drawn_counts, estimate, mean_of
from fewstep.evaluation.metrics import frechet_distance


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_draws_are_of_whole_prompts_and_the_same_for_the_same_seed() -> None:
    counts = drawn_counts(40, 7, seed=3)
    assert counts.shape == (7, 40)
    assert bool((counts.sum(1) == 40).all())
    assert torch.equal(counts, drawn_counts(40, 7, seed=3))
    assert not torch.equal(counts, drawn_counts(40, 7, seed=4))


def test_the_interval_of_a_mean_is_that_of_the_normal_law() -> None:
    values = normal(400, seed=0)
    found = mean_of(values, drawn_counts(400, 4000))
    half = 1.96 * float(values.std()) / math.sqrt(400)
    assert found.value == pytest.approx(float(values.mean()))
    assert (found.low, found.high) == pytest.approx((found.value - half, found.value + half), abs=0.06 * half)


def test_what_every_resample_adds_is_taken_out() -> None:
    counts = drawn_counts(20, 50)
    found = estimate(lambda count: 3.0 if bool((count == 1).all()) else 7.0, counts)
    assert found == Estimate(3.0, 3.0, 3.0)


def test_no_resamples_give_no_interval() -> None:
    assert mean_of(torch.tensor([1.0, 2.0]), drawn_counts(2, 0)) == Estimate(1.5)
    assert str(Estimate(1.5)) == "1.5"
    assert str(Estimate(1.5, 1, 2)) == "1.5 [1, 2]"


def test_intervals_of_a_frechet_distance_hold_its_mean_as_often_as_they_say() -> None:
    """The mean over many sets of this size, bias and all; 80 sets of 100 prompts in three dimensions."""
    counts = drawn_counts(100, 80)
    shift = torch.tensor([1.0, 0, 0], dtype=torch.float64)
    found = []
    for seed in range(80):
        a, b = normal(100, 3, seed=2 * seed), 1.5 * normal(100, 3, seed=2 * seed + 1) + shift
        found.append(estimate(lambda count, a=a, b=b: frechet_distance(a, b, count, count), counts))
    middle = sum(f.value for f in found) / len(found)
    held = sum(f.low <= middle <= f.high for f in found) / len(found)
    assert 0.85 <= held <= 1.0
    widths = [f.high - f.low for f in found]
    spread = torch.tensor([f.value for f in found]).std()
    assert 3 < sum(widths) / len(widths) / float(spread) < 5  # 3.92 for a normal law
