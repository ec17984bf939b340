from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fewstep.core.guidance import guided, guided_parts, joined, joint_weights
from fewstep.core.tensors import CONTROLS, Condition
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


JOINT = CONDITION | {CONTROLS: torch.tensor([[0.3, -0.2], [1.0, 0.0], [0.0, 2.0]])}


class Steered(Recorder):
    """One that also does as its controls say."""

    def __call__(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return super().__call__(x, t, condition) + (condition[CONTROLS] * condition["shift"]).cos()


def test_joint_guidance_is_equation_2_in_one_call() -> None:
    """M5."""
    model, text, motion = Steered(), 3.0, 1.5
    value = guided(model, X, T, JOINT, NULL | {CONTROLS: JOINT[CONTROLS]}, text, motion)
    assert model.rows == [9]
    still = torch.zeros_like(JOINT[CONTROLS])
    both, of_motion = model(X, T, JOINT), model(X, T, NULL | {CONTROLS: JOINT[CONTROLS]})
    of_text = model(X, T, CONDITION | {CONTROLS: still})
    alpha = text / (text + motion)
    base = alpha * of_motion + (1 - alpha) * of_text
    torch.testing.assert_close(value, base + text * (both - of_motion) + motion * (both - of_text))


def test_weights_of_joint_guidance() -> None:
    """M5: the card's numbers, sum 1, and the limits, which are guidance by one of the two."""
    assert joint_weights(3.0, 1.5) == pytest.approx((4.5, -7 / 3, -7 / 6), abs=1e-15)
    assert joint_weights(3.0, 0.0) == (3.0, -2.0, 0.0)
    assert joint_weights(0.0, 2.0) == (2.0, 0.0, -1.0)
    for scales in ((3.0, 1.5), (1.0, 1.0), (0.5, 7.0)):
        assert sum(joint_weights(*scales)) == pytest.approx(1, abs=1e-14)
        torch.testing.assert_close(joined((X, X, X), *scales), X)


def test_guidance_of_motion_asks_for_controls() -> None:
    with pytest.raises(FewstepError, match="conditions of \\['shift'\\], expected controls among them"):
        guided(Recorder(), X, T, CONDITION, NULL, 3.0, 1.5)
