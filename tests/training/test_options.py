from __future__ import annotations

import math
from typing import Any

import pytest

from fewstep.errors import FewstepError
from fewstep.training.options import TrainOptions


def test_warm_up_is_linear_and_reaches_the_peak() -> None:
    options = TrainOptions(iterations=100, warmup=4, student_rate=1.0, critic_rate=8.0)
    assert [options.rate("student", i) for i in (1, 2, 3, 4, 5, 100)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert options.rate("critic", 1) == 2.0


def test_cosine_falls_from_the_peak_to_the_final_share() -> None:
    options = TrainOptions(iterations=19, warmup=10, student_rate=2.0, schedule="cosine", final_rate=0.5)
    assert options.rate("student", 10) == 2.0
    assert options.rate("student", 15) == pytest.approx(2.0 * (0.5 + 0.5 * 0.5))  # half way: 5 of 10
    assert options.rate("student", 19) == pytest.approx(2.0 * (0.5 + 0.25 * (1 + math.cos(0.9 * math.pi))))
    assert options.rate("student", 19) > 1.0  # no iteration is spent at the very end of the curve


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"iterations": 0}, "iterations = 0"),
        ({"batch": 0}, "batch = 0"),
        ({"microbatch": -1}, "microbatch = -1"),
        ({"student_rate": -1e-4}, "student_rate = -0.0001"),
        ({"critic_rate": math.nan}, "critic_rate = nan"),
        ({"beta2": 1.0}, "beta2 = 1.0"),
        ({"ema_decay": 1.0}, "ema_decay = 1.0"),
        ({"final_rate": 1.5}, "final_rate = 1.5"),
        ({"schedule": "linear"}, "schedule = 'linear'"),
        ({"precision": "fp8"}, "precision = 'fp8'"),
        ({"iterations": 5, "warmup": 6}, "warmup = 6, expected at most iterations = 5"),
        ({"keep": 0}, "keep = 0"),
        ({"checkpoint_every": -1}, "checkpoint_every = -1"),
    ],
)
def test_what_is_out_of_range_is_named(change: dict[str, Any], named: str) -> None:
    with pytest.raises(FewstepError, match="found.*expected.*fix: change --") as error:
        TrainOptions(**change).validate()
    assert named in str(error.value)


def test_defaults_are_valid() -> None:
    TrainOptions().validate()


def test_something_is_due_at_its_multiples_and_at_the_end() -> None:
    options = TrainOptions(iterations=10, warmup=0)
    assert [i for i in range(1, 11) if options.due(4, i)] == [4, 8, 10]
    assert [i for i in range(1, 11) if options.due(0, i)] == [10]


def test_what_happens_often_becomes_rarer_so_that_its_number_stays_bounded() -> None:
    options = TrainOptions(iterations=10**6, warmup=0)
    assert [i for i in range(1, 50) if options.due(1, i, 4)] == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48]
    assert [i for i in range(1, 100) if options.due(5, i, 4)] == [5, 10, 15, 20, 30, 40, 60, 80]
    assert sum(options.due(1, i, 100) for i in range(1, 100 * 2**10 + 1)) == 100 + 10 * 50
    assert [i for i in range(1, 10) if options.due(0, i, 4)] == []


def test_iterations_decide_the_result_only_under_a_schedule_that_knows_the_end() -> None:
    assert "iterations" not in TrainOptions(schedule="constant").deciding()
    assert "iterations" in TrainOptions(schedule="cosine").deciding()
    assert "log_every" not in TrainOptions().deciding()
    assert TrainOptions().deciding()["beta1"] == 0.0
