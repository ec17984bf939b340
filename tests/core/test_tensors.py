from __future__ import annotations

import pytest
import torch

from fewstep.core.tensors import cat_conditions, expand, flat_mean, index_condition
from fewstep.errors import FewstepError


def test_expand_lines_values_up_with_the_batch() -> None:
    like = torch.zeros(2, 2, 2, 2)
    wide = expand(torch.tensor([3.0, 5.0], dtype=torch.float64), like)
    assert wide.dtype == like.dtype
    assert (like + wide)[0].eq(3).all()
    assert (like + wide)[1].eq(5).all()
    assert expand(torch.ones(4), torch.zeros(4)).shape == (4,)


def test_flat_mean_is_per_sample() -> None:
    x = torch.arange(12.0).reshape(2, 3, 2)
    assert flat_mean(x).tolist() == [2.5, 8.5]


def test_conditions_are_indexed_and_joined_by_row() -> None:
    a = {"text": torch.arange(6).reshape(3, 2), "steps": torch.tensor([1, 2, 4])}
    assert index_condition(a, torch.tensor([2, 0]))["text"].tolist() == [[4, 5], [0, 1]]
    assert index_condition(a, torch.tensor([False, True, False]))["steps"].tolist() == [2]
    assert cat_conditions(a, index_condition(a, torch.tensor([1])))["steps"].tolist() == [1, 2, 4, 2]
    assert index_condition({}, torch.tensor([0])) == {} == cat_conditions({}, {})


def test_conditions_that_do_not_fit_are_refused() -> None:
    a = {"text": torch.zeros(3, 2)}
    with pytest.raises(FewstepError, match="same names"):
        cat_conditions(a, {})
    with pytest.raises(FewstepError, match=r"\(3, 2\) and \(3, 4\)"):
        cat_conditions(a, {"text": torch.zeros(3, 4)})
