"""Prompts files are read or refused with the line; the prompt of a sample depends on its number only."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fewstep.data.prompts import PromptData, read_prompts, training_captions
from fewstep.data.scenes import held_out
from fewstep.errors import FewstepError


def test_reads_one_prompt_a_line_and_skips_empty_ones(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa frog\r\n\n  ein Apfel, grün \n".encode())
    assert read_prompts(file) == ["a frog", "ein Apfel, grün"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "no prompt"),
        (b"\n \n", "no prompt"),
        (b"fine\n\xff\xfe\x00", "line 2"),
        (b"fine\nfine\na\x00b", "line 3"),
        (b"x" * 5000, "line 1"),
    ],
)
def test_bad_files_are_refused_with_the_line(tmp_path: Path, content: bytes, expected: str) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(content)
    with pytest.raises(FewstepError, match=expected):
        read_prompts(file)


def test_missing_file_and_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(FewstepError, match="no readable prompts file"):
            read_prompts(path)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(content=st.binary(max_size=300))
def test_any_bytes_are_read_or_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(content)
    try:
        prompts = read_prompts(file)
    except FewstepError:
        return
    assert prompts
    assert all(prompt.strip() for prompt in prompts)


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
