"""Who plays in the league, and what a budget buys them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.errors import FewstepError
from fewstep.league.budget import PAIR_SHARE, phases, plan
from fewstep.league.cells import cells
from fewstep.league.emoji import GUIDANCE, EmojiLeague
from fewstep.league.entries import COMPOSITIONS, EXCLUDED, entries
from fewstep.league.mixtures import MixtureLeague
from fewstep.methods import METHODS, preset
from fewstep.methods.sid import SiDOptions

EMOJI = EmojiLeague(775.0, 32, 256, "fp32", torch.device("cpu"))
MIXTURES = MixtureLeague(60.0, 64, 200)
STEPS = (4, 1, 2)
NAMES = [entry.name for entry in entries()]


@pytest.mark.parametrize("name", METHODS)
def test_every_preset_plays_or_is_excluded_with_a_reason(name: str) -> None:
    assert (name in NAMES) != (name in EXCLUDED)
    assert len(EXCLUDED.get(name, "with a reason")) > 10


def test_what_is_excluded_and_composed_exists() -> None:
    assert EXCLUDED.keys() <= METHODS.keys()
    assert {base for base, _ in COMPOSITIONS.values()} <= METHODS.keys()


@pytest.mark.parametrize("name", NAMES)
def test_options_are_valid_wherever_a_method_plays(name: str) -> None:
    entry = entries([name])[0]
    played = [steps for steps in STEPS if EMOJI.options(entry, steps) is not None]
    assert played
    for steps in played:
        options: Any = EMOJI.options(entry, steps)
        options.validate()
        assert options.steps == steps
        assert getattr(options, "start_time", 0.8) == 0.8
        own = getattr(preset(entry.preset), "guidance_scale", 1)
        assert getattr(options, "guidance_scale", 1) == (own if own <= 1 else GUIDANCE)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("name", NAMES)
def test_the_budget_is_met_and_not_exceeded(name: str, steps: int) -> None:
    options = EMOJI.options(entries([name])[0], steps)
    if options is None:
        return
    bought = plan(options, 775.0, 32)
    one = sum(phase.build().forwards() for phase in phases(options))
    assert 775 - one < bought.forwards <= 775 + 1e-6
    assert bought.forwards == pytest.approx(bought.iterations * one + bought.pairs * 16 / 32)
    assert bool(bought.pairs) == options.build().needs.pairs
    assert bought.pairs * 16 / 32 <= 775 * PAIR_SHARE


@pytest.mark.parametrize("name", NAMES)
def test_forwards_spent_on_the_mixture_are_those_expected(name: str) -> None:
    """Counted at the networks' doors, for every method; each iteration draws its calls, so within a tenth."""
    entry = entries([name])[0]
    cell = next(cell for cell in cells(MIXTURES, [entry], STEPS, [0]))
    result = MIXTURES.run(cell, Path())
    bought = plan(cell.options, MIXTURES.forwards, MIXTURES.batch)
    assert result["forwards"] == pytest.approx(bought.forwards, rel=0.1)
    assert result["scores"].keys() == {str(count) for count in cell.options.counts}


def test_the_critic_is_guided_like_the_teacher_where_it_is_guided() -> None:
    options = EMOJI.options(entries(["sid"])[0], 4)
    assert isinstance(options, SiDOptions)
    assert options.guidance_scale == options.critic_scale == options.critic_training_scale == GUIDANCE
    anti = EMOJI.options(entries(["sid-anti-cfg"])[0], 4)
    assert isinstance(anti, SiDOptions)
    assert (anti.guidance_scale, anti.critic_scale) == (1, -1)


def test_methods_that_differ_in_guidance_alone_are_one_on_the_mixture() -> None:
    played = [cell.entry.name for cell in cells(MIXTURES, entries(), [4], [0])]
    assert [name for name in played if name.startswith("sid")] == ["sid"]
    assert [cell.entry.name for cell in cells(EMOJI, entries(), [4], [0]) if cell.entry.name.startswith("sid")] == [
        name for name in NAMES if name.startswith("sid")
    ]


def test_order_is_by_steps_as_given_then_seed() -> None:
    work = cells(EMOJI, entries(["tdm", "dmd"]), STEPS, [0, 1])
    assert [cell.name for cell in work] == [
        "tdm-4-steps-seed-0", "tdm-4-steps-seed-1",
        "tdm-1-steps-seed-0", "dmd-1-steps-seed-0", "tdm-1-steps-seed-1", "dmd-1-steps-seed-1",
        "tdm-2-steps-seed-0", "tdm-2-steps-seed-1",
    ]  # fmt: skip


def test_a_budget_below_one_iteration_is_refused() -> None:
    with pytest.raises(FewstepError, match="raise --forwards"):
        plan(preset("tdm"), 5.0, 32)
