"""Two processes that share their weights give what one with all of them gives (the checks are in sharded_pair.py)."""

from __future__ import annotations

from pathlib import Path

import pytest
import sharded_pair as pair
import torch
from safetensors.torch import load_file
from tests.two_processes import said
from torch.testing import assert_close

from fewstep.training.log import read_log

GROUPS = ("student", "critic", "ema", "student_optimiser", "critic_optimiser")


@pytest.fixture
def folder(two_processes: Path) -> Path:
    return two_processes


@pytest.mark.parametrize("check", pair.CHECKS)
def test_the_two_say(folder: Path, check: str) -> None:
    assert said(folder, check) == ["well", "well"]


@pytest.mark.parametrize("kind", pair.RUNS)
def test_sharded_training_is_the_same(folder: Path, kind: str) -> None:
    """Losses, norms, gradients (AdamW's first moment, as beta1 is 0), weights, averages, in files alike."""
    compare(folder / f"one-{kind}", folder / f"two-{kind}", 2)


def test_half_precision_is_near(folder: Path) -> None:
    """One process keeps norms and tables in float32."""
    (one,), (two,) = (read_log(folder / f"{n}-bf16/log.jsonl") for n in ("one", "two"))
    for name in ("loss/critic", "loss/student", "gradient_norm/critic", "gradient_norm/student"):
        assert two[name] == pytest.approx(one[name], rel=0.05)
    assert {value.dtype for value in load_file(folder / "two-bf16/checkpoints/000001/ema.safetensors").values()} == {
        torch.float32
    }


def test_the_samples_are_the_same_whatever_the_number_of_processes(folder: Path) -> None:
    for kind in pair.RUNS:
        one, two = (load_file(folder / f"{n}-{kind}/samples-2.safetensors") for n in ("one", "two"))
        assert_close(two, one, rtol=1e-5, atol=1e-5 * float(one["latents"].abs().max()))


def test_a_sharded_student_is_saved_whole(folder: Path) -> None:
    for kind in pair.RUNS:
        file = "student/transformer/diffusion_pytorch_model.safetensors"
        one, two = (load_file(folder / f"{n}-{kind}" / file) for n in ("one", "two"))
        assert_close(two, one, rtol=1e-5, atol=1e-6)


def test_runs_go_on_with_another_number_of_processes(folder: Path) -> None:
    pair.run(folder, folder / "one-adapters", "adapters", 3, resume=True, spread=False)
    pair.run(folder, folder / "two-adapters", "adapters", 3, resume=True, spread=False)
    compare(folder / "one-adapters", folder / "two-adapters", 3)
    compare(folder / "one-adapters", folder / "one-then-two", 3)


def compare(one: Path, two: Path, iteration: int) -> None:
    for a, b in zip(read_log(one / "log.jsonl"), read_log(two / "log.jsonl"), strict=True):
        names = [name for name in a if name.startswith(("iteration", "loss/", "metric/", "gradient_norm/"))]
        assert [a[name] for name in names] == pytest.approx([b[name] for name in names], rel=1e-5, abs=1e-8)
    for group in GROUPS:
        first, second = (
            load_file(run / f"checkpoints/{iteration:06d}/{group}.safetensors") for run in (one, two)
        )  # fmt: skip
        largest = max(float(value.abs().max()) for value in first.values())
        assert_close(second, first, rtol=0, atol=1e-5 * largest)
