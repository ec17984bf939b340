from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fewstep.core.guidance import guided, guided_parts
from fewstep.core.tensors import Condition
from fewstep.errors import FewstepError


class Recorder:
    """A denoiser that uses all its arguments and remembers how many rows each call had."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def __call__(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        self.rows.append(len(x))
        return x.sin() * t[:, None] + condition["shift"]


X, T = torch.randn(3, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([0.1, 0.5, 0.9])
CONDITION = {"shift": torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])}
NULL = {"shift": torch.tensor([[-1.0, 0.5]]).repeat(3, 1)}


@pytest.mark.parametrize("scale", [0.0, 0.5, 3.5, 7.0])
def test_one_batched_call_and_the_formula(scale: float) -> None:
    model = Recorder()
    value = guided(model, X, T, CONDITION, NULL, scale)
    assert model.rows == [6]
    conditional, unconditional = model(X, T, CONDITION), model(X, T, NULL)
    torch.testing.assert_close(value, unconditional + scale * (conditional - unconditional))
    # the other form of card eq. 8: the conditional one plus guidance as a reward
    torch.testing.assert_close(value, conditional + (scale - 1) * (conditional - unconditional))


def test_scale_one_is_a_plain_call() -> None:
    model = Recorder()
    value = guided(model, X, T, CONDITION, {"never": torch.tensor(float("nan"))}, 1.0)
    assert model.rows == [3]
    assert value.equal(model(X, T, CONDITION))


def test_parts_come_conditional_first() -> None:
    model = Recorder()
    conditional, unconditional = guided_parts(model, X, T, CONDITION, NULL)
    assert model.rows == [6]
    assert conditional.equal(model(X, T, CONDITION))
    assert unconditional.equal(model(X, T, NULL))


def test_a_null_condition_that_does_not_fit_is_refused_before_the_call() -> None:
    model = Recorder()
    with pytest.raises(FewstepError, match="fix: "):
        guided(model, X, T, CONDITION, {}, 2.0)
    assert model.rows == []
