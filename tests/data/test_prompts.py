"""The prompt of a sample depends on its number only. Files: `test_sources.py`."""

from __future__ import annotations

from collections import Counter

import torch

from fewstep.data.prompts import PromptData, training_captions
from fewstep.data.scenes import held_out


def test_every_pass_has_every_prompt_once_in_another_order() -> None:
    data = PromptData(
        lambda texts: {"length": torch.tensor([len(t) for t in texts])}, ["a", "bb", "ccc", "dddd"], seed=1
    )
    passes = [[data.prompt(4 * turn + i) for i in range(4)] for turn in range(20)]
    assert all(Counter(texts) == Counter(["a", "bb", "ccc", "dddd"]) for texts in passes)
    assert len({tuple(texts) for texts in passes}) > 5


def test_the_prompt_of_a_sample_does_not_depend_on_what_was_asked_before() -> None:
    def fresh() -> PromptData:
        return PromptData(lambda texts: {}, [str(n) for n in range(7)], seed=3)

    one, other = fresh(), fresh()
    forward = [one.prompt(n) for n in range(50)]
    backward = [other.prompt(n) for n in reversed(range(50))]
    assert forward == backward[::-1]


def test_conditions_have_a_row_per_sample() -> None:
    data = PromptData(lambda texts: {"length": torch.tensor([len(t) for t in texts])}, ["a", "bb"])
    assert data(1, torch.arange(6))["length"].shape == (6,)


def test_training_captions_are_not_held_out() -> None:
    assert not any(held_out(text) for text in training_captions(500))
