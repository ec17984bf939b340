"""Phased DMD, MSD and samples of two processes are those of one (what they do is in chain_pair.py)."""

from __future__ import annotations

from pathlib import Path

import chain_pair as pair
import pytest
import torch
from safetensors.torch import load_file
from tests.two_processes import said

from fewstep.errors import FewstepError
from fewstep.evaluation.samples import read_sample
from fewstep.several import RoleOptions, distill_part
from fewstep.training.log import read_log

RUNS = {"phased-adapters": 2, "phased-copies": 2, "part-mixed": 2, "part-copies": 2}
"""Turns of each."""


@pytest.mark.parametrize("check", pair.CHECKS)
def test_the_two_say(two_processes: Path, check: str) -> None:
    assert said(two_processes, check) == ["well", "well"]


@pytest.mark.parametrize("run", RUNS)
def test_a_chain_is_the_same_by_two_processes(two_processes: Path, run: str) -> None:
    """The copies by two that share their weights."""
    assert compare(two_processes / f"one-{run}", two_processes / f"two-{run}") == RUNS[run]


def test_a_chain_goes_on_with_another_number_of_processes(two_processes: Path, tmp_path: Path) -> None:
    whole = two_processes / "one-phased-adapters"
    compare(whole, two_processes / "one-then-two-phased")
    pair.phased(
        two_processes, pair.begun(two_processes / "two-phased-adapters", tmp_path / "run"), "adapters", resume=True
    )
    compare(whole, tmp_path / "run")


def test_samples_are_the_same_by_two_processes(two_processes: Path) -> None:
    """Batches differ, and so may the last bit before pixels are rounded."""
    one, two = (sorted((two_processes / f"{n}-samples").rglob("*.png")) for n in ("one", "two"))
    assert [path.name for path in one] == [path.name for path in two]
    assert len(one) == len(pair.SEEDS)
    for a, b in zip(one, two, strict=True):
        apart = (read_sample(a).int() - read_sample(b).int()).abs()
        assert apart.max() <= 1
        assert (apart > 0).float().mean() < 0.01


def test_smaller_students_are_not_sharded(tiny_teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(FewstepError, match="found --shard for a student with fewer weights"):
        distill_part(tiny_teacher, depth=0.5, out=tmp_path, prompts=pair.TEXTS, roles=RoleOptions(shard=True))


def compare(one: Path, two: Path) -> int:
    """Losses of all turns, and the students' weights; how many turns there were."""
    logs = sorted(path.relative_to(one) for path in one.rglob("log.jsonl"))
    for log in logs:
        for a, b in zip(read_log(one / log), read_log(two / log), strict=True):
            for prefix, near in (("iteration", 0), ("loss/", 1e-5), ("metric/", 1e-5), ("gradient_norm/", 1e-4)):
                names = [name for name in a if name.startswith(prefix)]
                assert [b[name] for name in names] == pytest.approx([a[name] for name in names], rel=near, abs=1e-6)
    (name,) = (path.relative_to(one) for path in one.rglob("student/transformer/*.safetensors"))
    first, second = load_file(one / name), load_file(two / name)
    assert first.keys() == second.keys()
    apart = torch.cat([(second[key] - value).abs().flatten() for key, value in first.items()])
    assert apart.mean() < 1e-6  # AdamW makes more of the rounding of single gradients that are nearly 0
    assert apart.max() < pair.SETTINGS.student_rate / 5
    return len(logs)
