"""The same seed gives the same result; sample i of seed s does not know its batch or its process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.test_every_option import done, quickened
from torch import Tensor

import fewstep
from fewstep.api import RoleOptions
from fewstep.data.prompts import PromptData
from fewstep.evaluation.samples import SampleSet
from fewstep.methods import METHODS, preset
from fewstep.models.backbone import SeededNoise
from fewstep.models.student import Student
from fewstep.models.teacher import Teacher
from fewstep.training.options import TrainOptions
from fewstep.training.parallel import Group

PROMPTS = ["a frog", "a red apple", "a 3d pizza", "a blue frog", "a background"]
SEEDS = [7, 0, 123, 2**40, 5]
ROUNDING = 1e-4
"""Of the largest latent: float32 sums in another order, through a few network calls."""


@pytest.fixture(scope="module")
def models(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Teacher | Student]:
    """A teacher, a student of the deterministic path, and one with fresh noise at every step."""
    teacher = fewstep.load_teacher(tiny_teacher)
    teacher.steps = 3
    more: dict[str, Any] = {
        "prompts": PROMPTS,
        "roles": RoleOptions(rank=2),
        "train_options": TrainOptions(iterations=1, batch=2, warmup=0, student_rate=0.05, tensorboard=False),
    }
    place = tmp_path_factory.mktemp("students")
    return {
        "teacher": teacher,
        "path": fewstep.distill(tiny_teacher, replace(preset("tdm"), steps=2), out=place / "tdm", **more),  # type: ignore
        "fresh": fewstep.distill(tiny_teacher, replace(preset("sid-none"), steps=2), out=place / "sid", **more),  # type: ignore
    }


@pytest.mark.parametrize("name", METHODS)
def test_a_method_draws_from_its_seed_alone(name: str) -> None:
    """All that it asks of networks and returns, with other numbers drawn in between; to the bit."""
    options = quickened(preset(name))
    first = done.__wrapped__(options)
    torch.manual_seed(99)
    torch.randn(7)
    assert done.__wrapped__(options) == first is not None


def test_the_noise_of_a_sample_is_the_same_in_any_batch_to_the_bit() -> None:
    whole = SeededNoise(SEEDS)
    first, second = whole((4, 8, 8)), whole((4, 8, 8))
    for place, seed in enumerate(SEEDS):
        alone = SeededNoise([seed])
        assert torch.equal(alone((4, 8, 8))[0], first[place])
        assert torch.equal(alone((4, 8, 8))[0], second[place])


@pytest.mark.parametrize("name", ["teacher", "path", "fresh"])
def test_a_sample_is_the_same_in_any_batch_and_order(name: str, models: dict[str, Teacher | Student]) -> None:
    """Twice the same batch: to the bit. Another one: to rounding, as matrix products sum in another order."""
    model = models[name]
    whole = model.latents(PROMPTS, SEEDS)
    assert torch.equal(whole, model.latents(PROMPTS, SEEDS))
    for rows in ([0], [3], [4, 1], [2, 0, 1], [4, 3, 2, 1, 0]):
        part = model.latents([PROMPTS[row] for row in rows], [SEEDS[row] for row in rows])
        assert _distance(part, whole[rows]) < ROUNDING
    assert _distance(model.latents(PROMPTS[:1], [8]), whole[:1]) > 0.1


@pytest.mark.parametrize("name", ["teacher", "path"])
def test_a_picture_is_the_same_in_any_batch(name: str, models: dict[str, Teacher | Student]) -> None:
    whole = fewstep.sample(models[name], PROMPTS, SEEDS)
    for batch in (1, 2, 4):
        other = fewstep.sample(models[name], PROMPTS, SEEDS, batch=batch)
        assert (other.int() - whole.int()).abs().max() <= 1  # of 255


def _distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


class _Alone(Group):
    """One of several processes, without the others."""

    def wait(self) -> None:
        """Nobody to wait for."""


def test_the_samples_of_an_evaluation_do_not_know_their_process(
    models: dict[str, Teacher | Student], tmp_path: Path
) -> None:
    model = models["path"]

    def draw(prompts: list[str], seeds: list[int]) -> Tensor:
        return model.sample(prompts, seeds)

    def drawn(processes: int, batch: int) -> Tensor:
        samples = SampleSet(tmp_path / f"{processes}-{batch}", {"of": "path"})
        for rank in range(processes):
            samples.complete(PROMPTS, SEEDS, draw, batch, _Alone(rank, processes))
        return torch.cat(list(samples.read(PROMPTS, SEEDS)))

    one = drawn(1, 5)
    assert torch.equal(one, drawn(1, 5))
    for processes, batch in ((1, 2), (2, 2), (3, 1)):
        assert (drawn(processes, batch).int() - one.int()).abs().max() <= 1


def test_the_prompt_of_a_sample_is_a_function_of_its_number() -> None:
    def encode(prompts: Sequence[str]) -> dict[str, Tensor]:
        return {"place": torch.tensor([PROMPTS.index(prompt) for prompt in prompts])}

    data = PromptData(encode, PROMPTS, 3)
    whole = data(2, torch.arange(8, 16))["place"]
    parts = [data(2, part)["place"] for part in torch.arange(8, 16).split(3)]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(PromptData(encode, PROMPTS, 4)(2, torch.arange(8, 16))["place"], whole)
